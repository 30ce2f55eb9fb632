// Attention on CUDA cores in f32: any float dtypes and any head_dim that is a multiple of 8. Serves f32 caches,
// f32 activations over 16-bit caches and head sizes without a tensor-core instance.
//
// One CTA of 128 threads takes up to 16 query vectors against a run of keys, 32 keys at a time through
// shared memory: scores, online softmax (a warp per vector), then outputs held in registers (a thread owns
// up to 8 groups of 4 dimensions).
#pragma once
#include "flash.cuh"

#define VECTORS 16u
#define KEYS 32u
#define GENERIC_THREADS 128u
#define MAX_ITEMS 8  // 16 vectors * 64 quads / 128 threads

// `item(r)` = (row, head) index of vector r; `low(r)`, `high(r)` bound the tokens that it sees.
// A source of keys offers `begin()`, `end()` and `token(i)`.
template <class A, class T, class Vectors, class Keys>
DEVICE void generic(const AttendArgs& a, const Seq& seq, u32 kvh, u32 n, u32 split, const Vectors& vec,
                    const Keys& keys) {
    extern __shared__ uint4 shared4[];
    __shared__ float weights[VECTORS][KEYS], top[VECTORS], sum[VECTORS], fix[VECTORS];
    __shared__ u32 tokens[KEYS];
    const u32 d = a.pool.head_dim, pad = d + 4, quads = d / 4, tid = threadIdx.x;
    const u32 warp = tid >> 5, lane = tid & 31;
    float* q = (float*)shared4;
    float* k = q + VECTORS * d;
    float* v = k + KEYS * pad;

    for (u32 i = tid; i < n * d; i += GENERIC_THREADS)
        q[i] = to_f32(((const A*)a.q)[vec.item(i / d) * d + i % d]);
    if (tid < VECTORS) top[tid] = NEG_INF, sum[tid] = 0.0f;
    float4 acc[MAX_ITEMS];
#pragma unroll
    for (int i = 0; i < MAX_ITEMS; i++) acc[i] = make_float4(0, 0, 0, 0);

    for (u32 base = keys.begin(); base < keys.end(); base += KEYS) {
        __syncthreads();
        if (tid < KEYS) {
            u32 t = base + tid < keys.end() ? keys.token(base + tid) : ~0u;
            tokens[tid] = t < seq.kv_len ? t : ~0u;
        }
        __syncthreads();
        for (u32 i = tid; i < KEYS * (d / 8); i += GENERIC_THREADS) {
            u32 key = i / (d / 8), c = i % (d / 8) * 8;
            float x[8] = {}, y[8] = {};
            if (tokens[key] != ~0u) {
                u32 row = a.pool.row(seq, kvh, tokens[key]);
                read8((const T*)a.pool.k + a.pool.k_at(row, c), x);
                read8((const T*)a.pool.v + a.pool.v_at(row, c), y);
            }
            write8(k + key * pad + c, x);
            write8(v + key * pad + c, y);
        }
        __syncthreads();
        for (u32 r = warp; r < n; r += GENERIC_THREADS / 32) {
            u32 t = tokens[lane];
            float s = NEG_INF;
            if (t != ~0u && t >= vec.low(r) && t < vec.high(r)) {
                s = 0.0f;
                for (u32 c = 0; c < d; c += 4) {
                    float4 x = *(const float4*)&q[r * d + c], y = *(const float4*)&k[lane * pad + c];
                    s = fmaf(x.x, y.x, s), s = fmaf(x.y, y.y, s);
                    s = fmaf(x.z, y.z, s), s = fmaf(x.w, y.w, s);
                }
                s *= a.scale * LOG2E;
            }
            float old = top[r], best = fmaxf(old, warp_max(s));
            float shift = best == NEG_INF ? 0.0f : best;
            float p = exp2f(s - shift), f = exp2f(old - shift), total = warp_sum(p);
            weights[r][lane] = p;
            __syncwarp();
            if (lane == 0) top[r] = best, fix[r] = f, sum[r] = sum[r] * f + total;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MAX_ITEMS; i++) {
            u32 it = tid + i * GENERIC_THREADS;
            if (it >= n * quads) break;
            u32 r = it / quads, c = it % quads * 4;
            float4 o = acc[i];
            float f = fix[r];
            o.x *= f, o.y *= f, o.z *= f, o.w *= f;
            for (u32 key = 0; key < KEYS; key++) {
                float p = weights[r][key];
                float4 y = *(const float4*)&v[key * pad + c];
                o.x = fmaf(p, y.x, o.x), o.y = fmaf(p, y.y, o.y);
                o.z = fmaf(p, y.z, o.z), o.w = fmaf(p, y.w, o.w);
            }
            acc[i] = o;
        }
    }
    __syncthreads();
    Out<A> out = {a.out, a.out_f32};
    u64 plane = (u64)split * a.rows * a.heads;
#pragma unroll
    for (int i = 0; i < MAX_ITEMS; i++) {
        u32 it = tid + i * GENERIC_THREADS;
        if (it >= n * quads) break;
        u32 r = it / quads;
        float inv = sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f;
        u64 at = (plane + vec.item(r)) * d + it % quads * 4;
        out.put(at, acc[i].x * inv), out.put(at + 1, acc[i].y * inv);
        out.put(at + 2, acc[i].z * inv), out.put(at + 3, acc[i].w * inv);
    }
    if (a.lse && tid < n)
        a.lse[plane + vec.item(tid)] = sum[tid] > 0.0f ? (top[tid] + log2f(sum[tid])) * LN2 : NEG_INF;
}
