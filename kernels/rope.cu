// rope: rotary embedding on interleaved pairs, after an optional per-head RMS norm.
//
//   a = t * inv_freq[h / heads_per_freq, p]
//   out[2p] = x[2p] cos a - x[2p+1] sin a,  out[2p+1] = x[2p+1] cos a + x[2p] sin a
//
// Plan: one warp per (row, head), four pairs a lane; up to two embeddings at once, one per y of the grid.
// Bytes: 2 * rows * heads * head_dim * act.
#include "rope.cuh"

template <class T> DEVICE void rope(const RopeArgs& a) {
    u64 item = (u64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (item >= (u64)a.rows * a.heads) return;
    RopeHead<T> head(a, (u32)(item / a.heads), (u32)(item % a.heads));
    float v[8], inv = head.inverse();
    for (u32 c = (threadIdx.x & 31) * 8; c < head.d; c += 256) head.rotate(c, head.angles(c), inv, v);
}

#define KERNEL(T) \
    extern "C" __global__ void rope_##T(RopeArgs a, RopeArgs b) { \
        depend();                                                 \
        if (blockIdx.y) rope<T>(b);                               \
        else rope<T>(a);                                          \
    }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
