// Log-sum-exp of a row by one CTA of whole warps.
#pragma once
#include "common.cuh"

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
