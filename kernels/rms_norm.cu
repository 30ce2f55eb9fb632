// rms_norm: out[r, :] = x[r, :] / sqrt(mean(x[r, :]^2) + eps) * weight.
//
// Plan: one CTA per row, two passes over the row (the second hits L1). Bytes: rows * cols * (4 + act).
#include "common.cuh"

template <class T>
DEVICE void rms_norm(const float* x, const float* weight, T* out, u32 cols, float eps) {
    __shared__ float scratch[33];
    const float* row = x + (u64)blockIdx.x * cols;
    float sum = 0.0f, v[8], w[8];
    for (u32 c = threadIdx.x * 8; c < cols; c += blockDim.x * 8) {
        read_part(row + c, cols - c, v);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += v[i] * v[i];
    }
    float inv = 1.0f / sqrtf(block_sum(sum, scratch) / (float)cols + eps);
    for (u32 c = threadIdx.x * 8; c < cols; c += blockDim.x * 8) {
        read_part(row + c, cols - c, v);
        read_part(weight + c, cols - c, w);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = v[i] * inv * w[i];
        write_part(out + (u64)blockIdx.x * cols + c, cols - c, v);
    }
}

#define KERNEL(T)                                                                                 \
    extern "C" __global__ void rms_norm_##T(const float* x, const float* weight, T* out, u32 cols, \
                                            float eps) {                                          \
        depend();                                                                                  \
        rms_norm<T>(x, weight, out, cols, eps);                                                    \
    }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
