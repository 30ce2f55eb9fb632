// attend_rows: decode attention over listed tokens; see attend_dense for the formula.
//
// Plan: one CTA = (part of a split, query heads that share a list, sequence); the list's range of the part is gathered row by row, each K
// row as two pieces (leading dimensions, rest), by the decode core (16-bit) or the generic core.
// Bytes: (2 * head_dim * kv + 4) per listed token and KV head.
#include "decode.cuh"
#include "generic.cuh"

struct Listed {
    const u32* list;
    u32 b, e;
    DEVICE u32 begin() const { return b; }
    DEVICE u32 end() const { return e; }
    DEVICE u32 token(u32 i) const { return list[i]; }
};

// Query vectors of one list: heads [head0, head0 + g) of the sequence's only row; no causal bound.
struct RowVectors {
    u64 first;
    DEVICE u64 item(u32 r) const { return first + r; }
    DEVICE u32 low(u32) const { return 0; }
    DEVICE u32 high(u32) const { return ~0u; }
};

// Query heads of a block: those of a KV head where a map names its list, else those of list `blockIdx.y`.
DEVICE u32 heads_per_block(const AttendArgs& a) {
    return a.heads / (a.head_map ? a.pool.kv_heads : a.lists);
}

DEVICE Listed listed(const AttendArgs& a, const Part& p) {
    u32 own = a.head_map ? a.head_map[blockIdx.y] : blockIdx.y;
    bool there = own < a.lists;  // a list that is not there is empty
    u64 list = (u64)blockIdx.z * a.lists + (there ? own : 0);
    u32 count = there ? min(a.counts[list], a.list_len) : 0;
    u32 per = ((count + p.parts - 1) / p.parts + 15) & ~15u;  // whole tiles of 16
    Listed keys;
    keys.list = a.indices + list * a.list_len;
    keys.b = min(p.part * per, count);
    keys.e = min(keys.b + per, count);
    return keys;
}

template <class T, int D> DEVICE void rows_mma(const AttendArgs& a) {
    Seq seq = a.seqs.get(blockIdx.z);
    Part p = part_of(a.splits);
    Listed keys = listed(a, p);  // its loads go along with the record's
    if (seq.q_len == 0) return;
    u32 per = heads_per_block(a), head0 = blockIdx.y * per;
    decode<T, D>(a, seq, head0 / (a.heads / a.pool.kv_heads), head0, per, p.split, keys);
}

template <class A, class T> DEVICE void rows_generic(const AttendArgs& a) {
    Seq seq = a.seqs.get(blockIdx.z);
    if (seq.q_len == 0) return;
    u32 per = heads_per_block(a), head0 = blockIdx.y * per;
    RowVectors vec = {(u64)seq.q_start * a.heads + head0};
    Part p = part_of(a.splits);
    generic<A, T>(a, seq, head0 / (a.heads / a.pool.kv_heads), per, p.split, vec, listed(a, p));
}

#define MMA(T, D)                                                                              \
    extern "C" __global__ void __launch_bounds__(DecodeShape<D>::warps * 32)                   \
        attend_rows_##T##_d##D(AttendArgs a) {                                                 \
        rows_mma<T, D>(a);                                                                     \
    }
#define MMA_ALL(T) MMA(T, 64) MMA(T, 96) MMA(T, 128) MMA(T, 256)
MMA_ALL(f16)
MMA_ALL(bf16)

#define GENERIC(A, T)                                                                          \
    extern "C" __global__ void __launch_bounds__(128) attend_rows_##A##_##T(AttendArgs a) {    \
        rows_generic<A, T>(a);                                                                 \
    }
GENERIC(f32, f32)
GENERIC(f32, f16)
GENERIC(f32, bf16)
GENERIC(f16, f16)
GENERIC(bf16, bf16)
