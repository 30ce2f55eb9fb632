// Rotary embedding of one head's vector by a warp, after an optional RMS norm: what rope.cu and kv_append.cu do with it.
#pragma once
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
static_assert(sizeof(RopeArgs) == 72, "as RopeArgs of dense.rs");

// Sines and cosines of four pairs.
struct Angles {
    float sn[4], cs[4];
};

// Head `head` of row `row`. The angle is taken in f32 with full range reduction.
template <class T> struct RopeHead {
    const T* x;
    T* out;
    const float *freq, *norm;
    float t, eps, factor;
    u32 d;
    DEVICE RopeHead(const RopeArgs& a, u32 row, u32 head) : eps(a.eps), factor(a.factor), d(a.head_dim) {
        x = (const T*)a.x + row * a.x_stride + head * d;
        out = (T*)a.out + ((u64)row * a.heads + head) * d;
        freq = a.inv_freq + (u64)(head / a.heads_per_freq) * (d / 2);
        norm = a.norm ? a.norm + head * d : nullptr;
        t = (float)a.positions[row];
    }
    // Of dimensions [c, c + 8), c a multiple of 8; 0 for those that are not there.
    DEVICE Angles angles(u32 c) const {
        Angles a;
#pragma unroll
        for (int p = 0; p < 4; p++) {
            u32 i = c + 2 * p;
            sincosf(i < d ? t * freq[i / 2] : 0.0f, &a.sn[p], &a.cs[p]);
            a.sn[p] *= factor, a.cs[p] *= factor;
        }
        return a;
    }
    // What the norm multiplies by, the same in all lanes of the warp.
    DEVICE float inverse() const {
        if (!norm) return 1.0f;
        float sum = 0.0f, v[8];
        for (u32 c = (threadIdx.x & 31) * 8; c < d; c += 256) {
            read_part(x + c, d - c, v);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += v[i] * v[i];
        }
        return 1.0f / sqrtf(warp_sum(sum) / (float)d + eps);
    }
    // Dimensions [c, c + 8), fewer at the end, rotated and written; c below d.
    DEVICE void rotate(u32 c, const Angles& a, float inv, float (&v)[8]) const {
        read_part(x + c, d - c, v);
#pragma unroll
        for (int p = 0; p < 4; p++) {
            u32 i = c + 2 * p;
            if (i >= d) break;
            float x0 = v[2 * p], x1 = v[2 * p + 1];
            if (norm) x0 = x0 * inv * norm[i], x1 = x1 * inv * norm[i + 1];
            v[2 * p] = x0 * a.cs[p] - x1 * a.sn[p];
            v[2 * p + 1] = x1 * a.cs[p] + x0 * a.sn[p];
        }
        write_part(out + c, d - c, v);
    }
};
