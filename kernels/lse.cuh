// Log-sum-exp of a row by one CTA of whole warps.
#pragma once
#include "common.cuh"

// The result is valid in thread 0: 0 for a row of -infinity throughout, which so stays what it is when the result is
// taken off.
DEVICE float block_lse(const float* row, u32 n) {
    __shared__ float maxes[33], scratch[33];
    u32 lane = threadIdx.x & 31;
    float m = NEG_INF, sum = 0.0f;
    for (u32 j = threadIdx.x; j < n; j += blockDim.x) m = fmaxf(m, row[j]);
    m = warp_max(m);
    if (lane == 0) maxes[threadIdx.x >> 5] = m;
    __syncthreads();
    m = warp_max(lane < (blockDim.x >> 5) ? maxes[lane] : NEG_INF);
    float shift = m == NEG_INF ? 0.0f : m;
    for (u32 j = threadIdx.x; j < n; j += blockDim.x) sum += expf(row[j] - shift);
    sum = block_sum(sum, scratch);
    return sum > 0.0f ? shift + logf(sum) : 0.0f;
}
