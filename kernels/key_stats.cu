// key_stats: adds the step's new keys to running sums per (slot, KV head): sum and sum of squares per
// coordinate [d, d], then of the rotary pair norms [d/2, d/2]. A sequence with kv_len == q_len starts
// from zero.
//
// Plan: one CTA per (KV head, sequence); thread = (token lane, pair). Token lanes are added in a fixed
// order, so results are the same bits run to run. Bytes: q_len * kv_heads * head_dim * kv.
#include "paged.cuh"

#define SUMS 6u  // sum and squares of both coordinates, of the pair norm

template <class T> DEVICE void key_stats(const Seqs& seqs, const Pool& pool, float* stats) {
    extern __shared__ float part[];  // [token lanes][SUMS][pairs]
    Seq seq = seqs.get(blockIdx.y);
    u32 h = blockIdx.x, d = pool.head_dim, pairs = d / 2, lanes = blockDim.x / pairs;
    u32 p = threadIdx.x % pairs, lane = threadIdx.x / pairs, first = seq.kv_len - seq.q_len;
    float s[SUMS] = {};
    if (lane < lanes) {
        for (u32 i = lane; i < seq.q_len; i += lanes) {
            const T* k = (const T*)pool.k + pool.k_at(pool.row(seq, h, first + i), 2 * p);
            float x = to_f32(k[0]), y = to_f32(k[1]), n2 = x * x + y * y;
            s[0] += x, s[1] += y, s[2] += x * x, s[3] += y * y, s[4] += sqrtf(n2), s[5] += n2;
        }
#pragma unroll
        for (u32 j = 0; j < SUMS; j++) part[(lane * SUMS + j) * pairs + p] = s[j];
    }
    __syncthreads();
    if (lane != 0) return;
    float* out = stats + ((u64)seq.slot * pool.kv_heads + h) * 3 * d;
    u32 at[SUMS] = {2 * p, 2 * p + 1, d + 2 * p, d + 2 * p + 1, 2 * d + p, 2 * d + pairs + p};
#pragma unroll
    for (u32 j = 0; j < SUMS; j++) {
        float sum = 0.0f;
        for (u32 l = 0; l < lanes; l++) sum += part[(l * SUMS + j) * pairs + p];
        float old = seq.kv_len == seq.q_len ? 0.0f : out[at[j]];
        out[at[j]] = old + sum;
    }
}

#define KERNEL(T)                                                                            \
    extern "C" __global__ void key_stats_##T(Seqs seqs, Pool pool, float* stats) {           \
        depend();                                                                            \
        key_stats<T>(seqs, pool, stats);                                                     \
    }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
