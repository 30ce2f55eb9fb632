// bandwidth: reads a buffer once, for the figure of the backend's `bandwidth`; not an op of models.
//
// Plan: grid-stride, four 16-byte loads in flight a thread. The sum is written only if it matches a value that
// cannot be known beforehand, so the loads stay.
// Bytes: 16 * count.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) bandwidth(const uint4* p, u64 count, u32* sink) {
    depend();
    u32 sum = 0;
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = i + j * step < count ? p[i + j * step] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < 4; j++) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (sum == 0x9e3779b9u) *sink = sum;
}
