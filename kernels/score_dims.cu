// score_dims: partial logits of one decode query per sequence on few key dimensions,
//   s_{h,j} = c_h * sum_{i in D} q_{h,i} K[j, i],
// for the group's heads, pooled over them (sum, max) or not.
//
// Plan: see score_mma.cuh for 16-bit queries and a multiple of 32 dimensions, score.cuh for the rest; grid (token
// blocks, KV heads, sequences), a row of scores per token.
// Bytes: kv_len * n * element + 4 * kv_len per output row.
#include "score_mma.cuh"

// Every cached token in order.
struct Tokens {
    static const bool in_order = true;
    u32 n;
    DEVICE u32 count() const { return n; }
    DEVICE u32 token(u32 i) const { return i; }
    DEVICE bool cached(u32) const { return true; }
};

template <class K, u32 SOURCE, int G, int ROWS> DEVICE void score_all(const ScoreArgs& a) {
    Seq seq = a.seqs.get(blockIdx.z);
    if (seq.q_len == 0) return;
    score<K, SOURCE, G, ROWS>(a, seq, a.pool.kv_heads, Tokens{seq.kv_len});
}

// Blocks that a multiprocessor is to hold: as many as there are registers for without spilling.
#define RESIDENT(SOURCE, G) (G > 1 ? 4 : SOURCE == INT8 || SOURCE == SLICE8 ? 8 : SOURCE == GATHER ? 5 : 6)

// One instance per group size class: G accumulators a row.
#define KERNEL(K, NAME, SOURCE, G, ROWS)                                                                           \
    extern "C" __global__ void __launch_bounds__(128, RESIDENT(SOURCE, G)) score_dims_##NAME##_g##G(ScoreArgs a) { \
        depend();                                                                                                  \
        score_all<K, SOURCE, G, ROWS>(a);                                                                          \
    }
#define GROUPS(K, NAME, SOURCE)   \
    KERNEL(K, NAME, SOURCE, 1, 4) \
    KERNEL(K, NAME, SOURCE, 4, 4) \
    KERNEL(K, NAME, SOURCE, 8, 4) \
    KERNEL(K, NAME, SOURCE, 16, 2)
#define SOURCES(K)              \
    GROUPS(K, K##_lead, LEAD)   \
    GROUPS(K, K##_slice, SLICE) \
    GROUPS(K, K##_gather, GATHER)

SOURCES(f32)
SOURCES(f16)
SOURCES(bf16)
GROUPS(i8, int8, INT8)
GROUPS(i8, slice8, SLICE8)
GROUPS(i8, slice4, SLICE4)

// NC times 32 dimensions, NT times 8 heads.
template <class K, u32 SOURCE, int NC, int NT, int ROWS, bool SUMS> DEVICE void early_score_mma(const ScoreArgs& a) {
    // A slice has just been brought up to date. Else score_mma waits: depend().
    if (SOURCE != LEAD && SOURCE != INT8) depend();
    Seq seq = a.seqs.get(blockIdx.z);
    if (seq.q_len == 0) return depend();
    score_mma<K, SOURCE, NC, NT, ROWS, SUMS>(a, seq, a.pool.kv_heads, Tokens{seq.kv_len});
}
#define MMA_ONE(K, NAME, SOURCE, NC, NT, ROWS, RESIDENT, SUMS)                      \
    extern "C" __global__ void __launch_bounds__(128, RESIDENT) NAME(ScoreArgs a) { \
        early_score_mma<K, SOURCE, NC, NT, ROWS, SUMS>(a);                          \
    }
#define MMA(K, NAME, SOURCE, NC, NT, ROWS, RESIDENT, RESIDENT_SUMS)                                  \
    MMA_ONE(K, score_dims_##NAME##_c##NC##_t##NT, SOURCE, NC, NT, ROWS, RESIDENT, false)             \
    MMA_ONE(K, score_dims_##NAME##_c##NC##_t##NT##_sums, SOURCE, NC, NT, ROWS, RESIDENT_SUMS, true)
// ROWS1, RESIDENT1: rows of a quad and blocks on a multiprocessor where a row is one piece.
#define MMA_ALL(K, NAME, SOURCE, ROWS1, RESIDENT1, RESIDENT1_SUMS) \
    MMA(K, NAME, SOURCE, 1, 1, ROWS1, RESIDENT1, RESIDENT1_SUMS)   \
    MMA(K, NAME, SOURCE, 2, 1, 4, 6, 6)                            \
    MMA(K, NAME, SOURCE, 4, 1, 4, 4, 4)                            \
    MMA(K, NAME, SOURCE, 1, 2, 4, 5, 5)                            \
    MMA(K, NAME, SOURCE, 2, 2, 4, 4, 4)                            \
    MMA(K, NAME, SOURCE, 4, 2, 4, 3, 3)
MMA_ALL(f16, f16_lead, LEAD, 4, 10, 8)
MMA_ALL(f16, f16_slice, SLICE, 4, 10, 8)
MMA_ALL(bf16, bf16_lead, LEAD, 4, 10, 8)
MMA_ALL(bf16, bf16_slice, SLICE, 4, 10, 8)
MMA_ALL(i8, int8, INT8, 8, 6, 6)
MMA_ALL(i8, slice8, SLICE8, 4, 8, 8)
MMA_ALL(i8, slice4, SLICE4, 4, 8, 8)
