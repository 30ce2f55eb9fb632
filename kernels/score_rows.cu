// score_rows: partial logits of listed tokens; see score_dims for the formula.
//
// Plan: see score_mma.cuh and score.cuh, as score_dims; grid (entry blocks, KV heads or heads with lists of their own, sequences). A key row is read
// in pieces of 16 bytes, only the dimensions asked for.
// Bytes: entries * n * element + 4 * entries per list and output row.
#include "score_mma.cuh"

struct Listed {
    static const bool in_order = false;
    const u32* list;
    u32 n, kv_len;
    DEVICE u32 count() const { return n; }
    DEVICE u32 token(u32 i) const { return list[i]; }
    DEVICE bool cached(u32 token) const { return token < kv_len; }
};

// `run(seq, parts, keys)` for the block's list.
template <class Run> DEVICE void each_list(const ScoreArgs& a, Run run) {
    Seq seq = a.seqs.get(blockIdx.z);
    if (seq.q_len == 0) return;
    u32 parts = a.lists > a.pool.kv_heads ? a.heads : a.pool.kv_heads;
    u64 list = (u64)blockIdx.z * a.lists + blockIdx.y * a.lists / parts;
    u32 n = min(a.counts[list], a.list_len);
    run(seq, parts, Listed{a.indices + list * a.list_len, n, seq.kv_len});
}
template <class K, u32 SOURCE, int G, int ROWS> DEVICE void score_listed(const ScoreArgs& a) {
    each_list(a, [&](const Seq& seq, u32 parts, const Listed& keys) { score<K, SOURCE, G, ROWS>(a, seq, parts, keys); });
}
template <class K, int NC, int NT> DEVICE void score_listed_mma(const ScoreArgs& a) {
    each_list(a, [&](const Seq& seq, u32 parts, const Listed& keys) {
        score_mma<K, LEAD, NC, NT, 4, false>(a, seq, parts, keys);
    });
}

#define KERNEL(K, NAME, SOURCE, G, ROWS)                                                                      \
    extern "C" __global__ void __launch_bounds__(128, G == 1 ? 5 : 4) score_rows_##NAME##_g##G(ScoreArgs a) { \
        depend();                                                                                             \
        score_listed<K, SOURCE, G, ROWS>(a);                                                                  \
    }
#define GROUPS(K, NAME, SOURCE)   \
    KERNEL(K, NAME, SOURCE, 1, 4) \
    KERNEL(K, NAME, SOURCE, 4, 4) \
    KERNEL(K, NAME, SOURCE, 8, 4) \
    KERNEL(K, NAME, SOURCE, 16, 2)
#define SOURCES(K)            \
    GROUPS(K, K##_lead, LEAD) \
    GROUPS(K, K##_gather, GATHER)

SOURCES(f32)
SOURCES(f16)
SOURCES(bf16)

#define MMA(K, NC, NT, RESIDENT)                                                                                \
    extern "C" __global__ void __launch_bounds__(128, RESIDENT) score_rows_##K##_lead_c##NC##_t##NT(ScoreArgs a) { \
        depend();                                                                                               \
        score_listed_mma<K, NC, NT>(a);                                                                         \
    }
#define MMA_ALL(K) MMA(K, 1, 1, 8) MMA(K, 2, 1, 6) MMA(K, 4, 1, 4) MMA(K, 1, 2, 5) MMA(K, 2, 2, 4) MMA(K, 4, 2, 3)
MMA_ALL(f16)
MMA_ALL(bf16)
