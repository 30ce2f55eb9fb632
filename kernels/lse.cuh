// Sums of exponentials: in parts, and of a row by one CTA of whole warps.
#pragma once
#include "common.cuh"

// A sum of powers of two, as the largest exponent and the sum over its power.
struct Powers {
    float top = NEG_INF, sum = 0.0f;
    DEVICE void add(float x, float times = 1.0f) {
        float d = x - top, e = x == NEG_INF ? 0.0f : exp2_fast(-fabsf(d));
        if (d > 0.0f) sum = fmaf(sum, e, times), top = x;
        else sum = fmaf(times, e, sum);
    }
    template <int N> DEVICE void add(const float (&x)[N]) {
        float all = top;
#pragma unroll
        for (int i = 0; i < N; i++) all = fmaxf(all, x[i]);
        float shift = all == NEG_INF ? 0.0f : all;
        sum *= exp2_fast(top - shift), top = all;
#pragma unroll
        for (int i = 0; i < N; i++) sum += exp2_fast(x[i] - shift);
    }
    DEVICE float log() const { return top == NEG_INF ? NEG_INF : (top + log2f(sum)) * LN2; }
    // Of all lanes of a warp, or of every `apart`-th.
    DEVICE void join(u32 apart = 1) {
        float all = top;
        for (u32 s = 16; s >= apart; s >>= 1) all = fmaxf(all, __shfl_xor_sync(~0u, all, s));
        sum = top == NEG_INF ? 0.0f : sum * exp2_fast(top - all), top = all;
        for (u32 s = 16; s >= apart; s >>= 1) sum += __shfl_xor_sync(~0u, sum, s);
    }
};

// The result is valid in thread 0: 0 for a row of -infinity throughout, which so stays what it is when the result is
// taken off.
DEVICE float block_lse(const float* row, u32 n) {
    __shared__ float maxes[33], scratch[33];
    float m = NEG_INF, sum = 0.0f;
    for (u32 j = threadIdx.x; j < n; j += blockDim.x) m = fmaxf(m, row[j]);
    m = block_max(m, maxes);
    float shift = m == NEG_INF ? 0.0f : m;
    for (u32 j = threadIdx.x; j < n; j += blockDim.x) sum += expf(row[j] - shift);
    sum = block_sum(sum, scratch);
    return sum > 0.0f ? shift + logf(sum) : 0.0f;
}
