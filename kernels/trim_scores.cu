// trim_scores: sets the scores that a budget leaves out to -infinity, in place.
//
// Plan: thresholds are found bit by bit in the ordered u32 image of f32, from the top, by counting (or weighing) the
// scores above a candidate; sums are taken in a fixed order. `trim_scores_mass`: one CTA per (row, sequence) keeps a
// share of the row's softmax. `trim_scores_together`: one CTA per sequence shares a number of tokens among its rows.
// Bytes: 4 * kv_len a row, from L2 after the first of some 66 passes.
#include "paged.cuh"

// Order-preserving image; 0 for NaN and -infinity, which are never chosen.
DEVICE u32 image(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u || bits == 0xff800000u) return 0;
    if (bits == 0x80000000u) return 0x80000000u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sum over the block, the same in every thread.
DEVICE u32 block_count(u32 x, u32* scratch) {
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    x = __reduce_add_sync(~0u, x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return __reduce_add_sync(~0u, lane < warps ? scratch[lane] : 0);
}

DEVICE u32 my_count(const float* row, u32 n, u32 t) {
    u32 count = 0;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
        u32 key = image(row[i]);
        count += key != 0 && key >= t;
    }
    return count;
}

DEVICE float my_mass(const float* row, u32 n, u32 t, float top) {
    float mass = 0.0f;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
        float x = row[i];
        u32 key = image(x);
        if (key != 0 && key >= t) mass += expf(x - top);
    }
    return mass;
}

// The largest image that `at_least` scores of a row reach, at most that of +infinity; 0 where the row has fewer.
DEVICE u32 floor_of(const float* row, u32 n, u32 at_least, u32* scratch) {
    u32 t = 0;
    for (u32 bit = 0x80000000u; bit; bit >>= 1)
        if (block_count(my_count(row, n, t | bit), scratch) >= at_least) t |= bit;
    return min(t, 0xff800000u);
}

DEVICE void cut(float* row, u32 n, u32 t) {
    for (u32 i = threadIdx.x; i < n; i += blockDim.x)
        if (image(row[i]) < t) row[i] = NEG_INF;
}

extern "C" __global__ void trim_scores_mass(float* scores, Seqs seqs, u32 rows_per_seq, u64 stride, float share,
                                            u32 at_least) {
    depend();
    __shared__ u32 words[33];
    __shared__ float maxes[32], scratch[33];
    u32 n = seqs.get(blockIdx.y).kv_len;
    float* row = scores + ((u64)blockIdx.y * rows_per_seq + blockIdx.x) * stride;
    float top = NEG_INF;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x)
        if (image(row[i]) != 0) top = fmaxf(top, row[i]);
    top = block_max(top, maxes);
    if (top == NEG_INF) return;
    float goal = block_sum(my_mass(row, n, 0, top), scratch) * share;
    u32 t = 0;
    for (u32 bit = 0x80000000u; bit; bit >>= 1)
        if (block_sum(my_mass(row, n, t | bit, top), scratch) >= goal) t |= bit;
    u32 least = floor_of(row, n, at_least, words);
    cut(row, n, min(t, least));
}

extern "C" __global__ void trim_scores_together(float* scores, Seqs seqs, u32 rows_per_seq, u64 stride, u32 tokens,
                                                u32 at_least) {
    depend();
    __shared__ u32 words[33], floors[256];
    u32 n = seqs.get(blockIdx.x).kv_len;
    float* first = scores + (u64)blockIdx.x * rows_per_seq * stride;
    for (u32 r = 0; r < rows_per_seq; r++) {
        u32 least = floor_of(first + r * stride, n, at_least, words);
        if (threadIdx.x == 0) floors[r] = least;
    }
    __syncthreads();
    // The largest image that leaves too many, 0 where none does.
    u32 t = 0;
    for (u32 bit = 0x80000000u; bit; bit >>= 1) {
        u32 count = 0;
        for (u32 r = 0; r < rows_per_seq; r++) count += my_count(first + r * stride, n, min(t | bit, floors[r]));
        if (block_count(count, words) > tokens) t |= bit;
    }
    u32 u = t == 0xffffffffu ? t : t + 1;
    for (u32 r = 0; r < rows_per_seq; r++) cut(first + r * stride, n, min(u, floors[r]));
}
