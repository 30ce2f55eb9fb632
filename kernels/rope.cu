// rope: rotary embedding on interleaved pairs, after an optional per-head RMS norm.
//
//   a = t * inv_freq[h / heads_per_freq, p]
//   out[2p] = x[2p] cos a - x[2p+1] sin a,  out[2p+1] = x[2p+1] cos a + x[2p] sin a
//
// Plan: one warp per (row, head), a pair a lane; up to two embeddings at once, one per y of the grid. The angle is
// taken in f32 with full range reduction.
// Bytes: 2 * rows * heads * head_dim * act.
#include "common.cuh"

struct RopeArgs {
    const void* x;
    const u32* positions;
    const float* inv_freq;
    const float* norm;  // [heads, head_dim], or null
    void* out;
    u64 x_stride;
    u32 rows, heads, head_dim, heads_per_freq;
    float eps;
    float factor;  // of the result
};

template <class T> DEVICE void rope(const RopeArgs& a) {
    u32 lane = threadIdx.x & 31;
    u64 item = (u64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (item >= (u64)a.rows * a.heads) return;
    u32 row = (u32)(item / a.heads), head = (u32)(item % a.heads), d = a.head_dim;
    const T* x = (const T*)a.x + row * a.x_stride + head * d;
    T* out = (T*)a.out + item * d;
    float inv = 1.0f;
    if (a.norm) {
        float sum = 0.0f;
        for (u32 i = lane; i < d; i += 32) {
            float v = to_f32(x[i]);
            sum += v * v;
        }
        inv = 1.0f / sqrtf(warp_sum(sum) / (float)d + a.eps);
    }
    float t = (float)a.positions[row];
    const float* freq = a.inv_freq + (u64)(head / a.heads_per_freq) * (d / 2);
    for (u32 p = lane; p < d / 2; p += 32) {
        float x0 = to_f32(x[2 * p]), x1 = to_f32(x[2 * p + 1]);
        if (a.norm) {
            x0 = x0 * inv * a.norm[head * d + 2 * p];
            x1 = x1 * inv * a.norm[head * d + 2 * p + 1];
        }
        float sn, cs;
        sincosf(t * freq[p], &sn, &cs);
        sn *= a.factor, cs *= a.factor;
        out[2 * p] = from_f32<T>(x0 * cs - x1 * sn);
        out[2 * p + 1] = from_f32<T>(x1 * cs + x0 * sn);
    }
}

#define KERNEL(T) \
    extern "C" __global__ void rope_##T(RopeArgs a, RopeArgs b) { depend(); rope<T>(blockIdx.y ? b : a); }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
