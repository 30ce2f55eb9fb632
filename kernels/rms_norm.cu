// rms_norm: out[r, :] = x[r, :] / sqrt(mean(x[r, :]^2) + eps) * weight.
//
// Plan: one CTA per row; a thread holds its first eight elements and their weights, longer rows are read again (from L1).
// Bytes: rows * cols * (4 + act).
#include "common.cuh"

template <class T>
DEVICE void early_rms_norm(const float* x, const float* weight, T* out, u32 cols, float eps) {
    __shared__ float scratch[33];
    const float* row = x + (u64)blockIdx.x * cols;
    u32 mine = threadIdx.x * 8, step = blockDim.x * 8;
    float sum = 0.0f, first[8] = {}, v[8], w[8] = {};
    if (mine < cols) read_part(weight + mine, cols - mine, w);
    depend();
    auto add = [&](const float(&v)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) sum += v[i] * v[i];
    };
    if (mine < cols) read_part(row + mine, cols - mine, first);
    add(first);
    for (u32 c = mine + step; c < cols; c += step) read_part(row + c, cols - c, v), add(v);
    float inv = 1.0f / sqrtf(block_sum(sum, scratch) / (float)cols + eps);
    auto put = [&](u32 c, float(&v)[8]) {
        if (c != mine) read_part(weight + c, cols - c, w);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = v[i] * inv * w[i];
        write_part(out + (u64)blockIdx.x * cols + c, cols - c, v);
    };
    if (mine < cols) put(mine, first);
    for (u32 c = mine + step; c < cols; c += step) read_part(row + c, cols - c, v), put(c, v);
}

#define KERNEL(T)                                                                                  \
    extern "C" __global__ void rms_norm_##T(const float* x, const float* weight, T* out, u32 cols, \
                                            float eps) {                                           \
        early_rms_norm<T>(x, weight, out, cols, eps);                                              \
    }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
