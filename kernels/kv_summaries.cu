// kv_summaries: summaries of the runs of keys that hold a new token (bounds, cuboids) or end with one (windows).
//
// Plan: one CTA per (summary, KV head, sequence); thread = (token lane, 8 dimensions). Token lanes are joined in a
// fixed order, so results are the same bits run to run. Bytes: (q_len + run) * kv_heads * head_dim * kv.
#include "summaries.cuh"

#define THREADS 128u
#define MAX_DIM 256u

template <class T> DEVICE void kv_summaries(const Seqs& seqs, const Pool& pool, const Summaries& out) {
    __shared__ float low[THREADS * 8], high[THREADS * 8], middle[MAX_DIM];
    Seq seq = seqs.get(blockIdx.z);
    u32 head = blockIdx.y, g = (seq.kv_len - seq.q_len) / out.run + blockIdx.x, d = pool.head_dim;
    if (!out.exists(g, seq.kv_len)) return;
    u32 first = g * out.run - out.before, end = min((g + 1) * out.run, seq.kv_len);
    u32 chunks = d / 8, lanes = THREADS / chunks;
    u32 lane = threadIdx.x / chunks, c = threadIdx.x % chunks * 8;
    float share = 1.0f / (float)(end - first);
    T* dst = (T*)out.data + out.at(seq, pool.kv_heads, head, g, d);

    if (lane < lanes) {
        float a[8], b[8];
#pragma unroll
        for (int i = 0; i < 8; i++) a[i] = out.kind == WINDOWS ? 0.0f : POS_INF, b[i] = NEG_INF;
        for (u32 t = first + lane; t < end; t += lanes) {
            float x[8];
            read8((const T*)pool.k + pool.k_at(pool.row(seq, head, t), c), x);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (out.kind == WINDOWS) a[i] += x[i];
                else a[i] = fminf(a[i], x[i]), b[i] = fmaxf(b[i], x[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) low[lane * d + c + i] = a[i], high[lane * d + c + i] = b[i];
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < d; i += THREADS) {
        float a = low[i], b = high[i];
        for (u32 l = 1; l < lanes; l++) {
            if (out.kind == WINDOWS) a += low[l * d + i];
            else a = fminf(a, low[l * d + i]), b = fmaxf(b, high[l * d + i]);
        }
        if (out.kind == WINDOWS) dst[i] = from_f32<T>(a * share);
        if (out.kind == BOUNDS) dst[i] = from_f32<T>(a), dst[d + i] = from_f32<T>(b);
        middle[i] = 0.5f * a + 0.5f * b;
    }
    if (out.kind != CUBOID) return;

    __syncthreads();
    if (lane < lanes) {
        float r[8] = {};
        for (u32 t = first + lane; t < end; t += lanes) {
            float x[8];
            read8((const T*)pool.k + pool.k_at(pool.row(seq, head, t), c), x);
#pragma unroll
            for (int i = 0; i < 8; i++) r[i] += fabsf(x[i] - middle[c + i]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) low[lane * d + c + i] = r[i];
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < d; i += THREADS) {
        float r = 0.0f;
        for (u32 l = 0; l < lanes; l++) r += low[l * d + i];
        dst[i] = from_f32<T>(middle[i] - r * share);
        dst[d + i] = from_f32<T>(middle[i] + r * share);
    }
}

#define KERNEL(T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) kv_summaries_##T(Seqs seqs, Pool pool,       \
                                                                       Summaries out) {            \
        depend();                                                                                  \
        kv_summaries<T>(seqs, pool, out);                                                          \
    }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
