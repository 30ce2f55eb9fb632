// attend_dense: causal softmax attention over the cached tokens, for decode and for (chunked) prefill:
//   out = sum_j softmax_j(scale * q . K[j]) V[j] over j <= p (and j > p - window), lse = log sum_j exp(..).
//
// Plan. Decode (one row a sequence, 16-bit): decode.cuh, a CTA = (part of a split, KV head, sequence).
// Prefill (16-bit): a CTA = (64 query vectors, KV head, sequence x split) where the vectors are (row, head)
// pairs of the group, rows slowest, so that a K/V tile in shared memory serves all heads of the
// group; 4 warps of 16 vectors, tiles of 64 keys in two stages by cp.async, tiles above the diagonal or
// before the window skipped. Else: generic.cuh on 16 vectors at a time.
// Bytes: decode 2 * kv_len * head_dim * kv per KV head; prefill is bound by arithmetic.
#include "decode.cuh"
#include "generic.cuh"

struct Contiguous {
    u32 b, e;
    DEVICE u32 begin() const { return b; }
    DEVICE u32 end() const { return e; }
    DEVICE u32 token(u32 i) const { return i; }
};

// First token that position p sees.
DEVICE u32 window_low(u32 p, u32 window) { return window && p + 1 > window ? p + 1 - window : 0; }

template <class T, int D> DEVICE void dense_decode(const AttendArgs& a) {
    Seq seq = a.seqs.get(blockIdx.z);
    if (seq.q_len == 0) return;
    u32 g = a.heads / a.pool.kv_heads;
    Part p = part_of(a.splits);
    Range r = split_range(window_low(seq.kv_len - 1, a.window), seq.kv_len, p.part, p.parts);
    Contiguous keys = {r.begin, r.end};
    decode<T, D>(a, seq, blockIdx.y, blockIdx.y * g, g, p.split, keys);
}

template <int D> struct PrefillShape {
    static const int keys = D > 128 ? 32 : 64;
    static const int row = Padded<D>::value;
    static const int tile = keys * row;
};

template <class T, int D> DEVICE void dense_prefill(const AttendArgs& a) {
    typedef PrefillShape<D> Shape;
    extern __shared__ uint4 shared4[];
    T* q = (T*)shared4;  // [64][row]
    T* ring = q + 64 * Shape::row;
    const u32 chunks = D / 8;
    u32 s = blockIdx.z / a.splits, split = blockIdx.z % a.splits, kvh = blockIdx.y;
    Seq seq = a.seqs.get(s);
    u32 g = a.heads / a.pool.kv_heads, vectors = seq.q_len * g;
    // The last tiles have the most keys: they start first.
    u32 v0 = (gridDim.x - 1 - blockIdx.x) * 64;
    if (v0 >= vectors) return;
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u32 offset = seq.kv_len - seq.q_len;
    auto item = [&](u32 v) { return (u64)(seq.q_start + v / g) * a.heads + kvh * g + v % g; };

    for (u32 i = threadIdx.x; i < 64 * chunks; i += blockDim.x) {
        u32 v = v0 + i / chunks, c = i % chunks;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (v < vectors) x = load8((const T*)a.q + item(v) * D + c * 8).v;
        *(uint4*)(q + (i / chunks) * Shape::row + c * 8) = x;
    }
    u32 p_first = offset + v0 / g, p_last = offset + (min(v0 + 64, vectors) - 1) / g;
    // Split ranges are the same for all tiles of the sequence; the tile takes its part of one.
    Range all = split_range(window_low(offset, a.window), seq.kv_len, split, a.splits);
    u32 low = max(window_low(p_first, a.window), all.begin), high = min(p_last + 1, all.end);
    u32 t0 = low / Shape::keys, t1 = high > low ? (high + Shape::keys - 1) / Shape::keys : t0;

    auto fill = [&](u32 tile) {
        T* k = ring + (tile & 1) * 2 * Shape::tile;
        T* v = k + Shape::tile;
        u32 row0 = a.pool.row(seq, kvh, tile * Shape::keys);
        for (u32 i = threadIdx.x; i < Shape::keys * chunks; i += blockDim.x) {
            u32 key = i / chunks, c = i % chunks;
            bool ok = tile * Shape::keys + key < seq.kv_len;
            copy16(k + key * Shape::row + c * 8, (const T*)a.pool.k + a.pool.k_at(row0 + key, c * 8), ok);
            copy16(v + key * Shape::row + c * 8, (const T*)a.pool.v + a.pool.v_at(row0 + key, c * 8), ok);
        }
    };
    // Positions and windows of the thread's two vectors.
    u32 begin[2], end[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 p = offset + (v0 + warp * 16 + (lane >> 2) + 8 * h) / g;
        begin[h] = max(window_low(p, a.window), all.begin);
        end[h] = min(p + 1, all.end);
    }
    u32 all_low = max(window_low(p_last, a.window), all.begin), all_high = min(p_first + 1, all.end);
    Flash<D> flash;
    flash.init();
    if (t0 < t1) fill(t0);
    copy_commit();
    for (u32 t = t0; t < t1; t++) {
        if (t + 1 < t1) fill(t + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const T* k = ring + (t & 1) * 2 * Shape::tile;
        u32 key0 = t * Shape::keys;
        bool masked = key0 < all_low || key0 + Shape::keys > all_high;
        flash.template step<T, Shape::keys>(
            q + warp * 16 * Shape::row, k, k + Shape::tile, a.scale * LOG2E, masked,
            [&](int h, u32 key) { return key0 + key >= begin[h] && key0 + key < end[h]; });
        __syncthreads();
    }
    copy_wait<0>();
    flash.finish();
    Out<T> out = {a.out, a.out_f32};
    u64 plane = (u64)split * a.rows * a.heads;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 v = v0 + warp * 16 + (lane >> 2) + 8 * h;
        if (v >= vectors) continue;
        u64 at = plane + item(v);
        float inv = flash.sum[h] > 0.0f ? 1.0f / flash.sum[h] : 0.0f;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            out.put(at * D + i * 8 + (lane & 3) * 2, flash.o[i][2 * h] * inv);
            out.put(at * D + i * 8 + (lane & 3) * 2 + 1, flash.o[i][2 * h + 1] * inv);
        }
        if (a.lse && (lane & 3) == 0)
            a.lse[at] = flash.sum[h] > 0.0f ? (flash.top[h] + log2f(flash.sum[h])) * LN2 : NEG_INF;
    }
}

// Query vectors v0.. of the sequence's (row, head) pairs.
struct CausalVectors {
    u64 row0;
    u32 v0, g, heads, head0, offset, window;
    DEVICE u64 item(u32 r) const { return (row0 + (v0 + r) / g) * heads + head0 + (v0 + r) % g; }
    DEVICE u32 high(u32 r) const { return offset + (v0 + r) / g + 1; }
    DEVICE u32 low(u32 r) const { return window_low(offset + (v0 + r) / g, window); }
};

template <class A, class T> DEVICE void dense_generic(const AttendArgs& a) {
    u32 s = blockIdx.z / a.splits, split = blockIdx.z % a.splits, kvh = blockIdx.y;
    Seq seq = a.seqs.get(s);
    u32 g = a.heads / a.pool.kv_heads, vectors = seq.q_len * g, v0 = blockIdx.x * VECTORS;
    if (v0 >= vectors) return;
    u32 n = min(VECTORS, vectors - v0), offset = seq.kv_len - seq.q_len;
    CausalVectors vec = {seq.q_start, v0, g, a.heads, kvh * g, offset, a.window};
    Range all = split_range(window_low(offset, a.window), seq.kv_len, split, a.splits);
    Contiguous keys = {max(all.begin, vec.low(0)), min(all.end, vec.high(n - 1))};
    generic<A, T>(a, seq, kvh, n, split, vec, keys);
}

#define MMA(T, D)                                                                              \
    extern "C" __global__ void __launch_bounds__(DecodeShape<D>::warps * 32)                   \
        attend_decode_##T##_d##D(AttendArgs a) {                                               \
        dense_decode<T, D>(a);                                                                 \
    }                                                                                          \
    extern "C" __global__ void __launch_bounds__(128) attend_prefill_##T##_d##D(AttendArgs a) { \
        dense_prefill<T, D>(a);                                                                \
    }
#define MMA_ALL(T) MMA(T, 64) MMA(T, 96) MMA(T, 128) MMA(T, 256)
MMA_ALL(f16)
MMA_ALL(bf16)

#define GENERIC(A, T)                                                                          \
    extern "C" __global__ void __launch_bounds__(128, 4) attend_dense_##A##_##T(AttendArgs a) {   \
        dense_generic<A, T>(a);                                                                \
    }
GENERIC(f32, f32)
GENERIC(f32, f16)
GENERIC(f32, bf16)
GENERIC(f16, f16)
GENERIC(bf16, bf16)
