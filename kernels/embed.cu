// embed: out[r, :] = scale * table[tokens[r], :], f32 out; a token outside the vocabulary gives zeros.
//
// Plan: one CTA per row, 8 elements a thread. Bytes: rows * cols * (weight dtype + 4).
#include "common.cuh"

template <class T>
DEVICE void embed(const u32* tokens, const T* table, float* out, u32 cols, u32 vocab, float scale) {
    u32 token = tokens[blockIdx.x];
    float* dst = out + (u64)blockIdx.x * cols;
    for (u32 c = threadIdx.x * 8; c < cols; c += blockDim.x * 8) {
        float x[8] = {};
        if (token < vocab) read_part(table + (u64)token * cols + c, cols - c, x);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= scale;
        write_part(dst + c, cols - c, x);
    }
}

#define KERNEL(T)                                                                                  \
    extern "C" __global__ void embed_##T(const u32* tokens, const T* table, float* out, u32 cols, \
                                         u32 vocab, float scale) {                                \
        depend();                                                                                  \
        embed<T>(tokens, table, out, cols, vocab, scale);                                          \
    }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
