// swiglu: out[r, i] = silu(x[r, i]) * x[r, ffn + i], silu(z) = z / (1 + exp(-z)).
//
// Plan: grid (column blocks, rows), 8 elements a thread. Bytes: 3 * rows * ffn * act.
#include "common.cuh"

template <class T> DEVICE void swiglu(const T* x, T* out, u32 rows, u32 ffn) {
    u32 c = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (c >= ffn) return;
    for (u32 r = blockIdx.y; r < rows; r += gridDim.y) {
        const T* gate = x + (u64)r * 2 * ffn + c;
        float g[8], u[8];
        read_part(gate, ffn - c, g);
        read_part(gate + ffn, ffn - c, u);
#pragma unroll
        for (int i = 0; i < 8; i++) g[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
        write_part(out + (u64)r * ffn + c, ffn - c, g);
    }
}

#define KERNEL(T)                                                                         \
    extern "C" __global__ void swiglu_##T(const T* x, T* out, u32 rows, u32 ffn) {        \
        depend();                                                                         \
        swiglu<T>(x, out, rows, ffn);                                                     \
    }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
