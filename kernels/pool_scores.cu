// pool_scores: pools per-query-head logits over a GQA group (or all heads) after a softmax per head, in the log
// domain: MaxSoftmax and AnySoftmax: out_j = max_h (s_{h,j} - lse_h), MeanSoftmax and AllSoftmax:
// out_j = log sum_h exp(s_{h,j} - lse_h); or as they are: MaxLogit: max_h s_{h,j}, SumLogit: sum_h s_{h,j}.
//
// Plan: two kernels. `pool_lse` (softmax modes only, where `score_dims` has not left the same): a CTA per (CHUNK scores,
// head, sequence) leaves their maximum and sum, in powers of two; `pool_scores`: grid (token blocks, output rows, sequences) joins those of its heads and pools,
// four tokens a thread.
// Bytes: 2 * heads * kv_len * 4 + rows * kv_len * 4; heads * kv_len * 4 fewer without `pool_lse`.
#include "lse.cuh"
#include "paged.cuh"

#define CHUNK 4096u
#define THREADS 256u
#define MOST_HEADS 1024u

// Scores of output row `row` of `rows`: those of all tokens, or of listed ones.
DEVICE u32 row_length(const Seq& seq, const u32* lengths, u64 stride, u32 s, u32 rows, u32 row) {
    return lengths ? (u32)min((u64)lengths[s * rows + row], stride) : seq.kv_len;
}

// Scores [j, j + 4) of a row, j a multiple of 4; -infinity from `n` on, which a row's stride has room behind.
DEVICE float4 four(const float* row, u32 j, u32 n) {
    float4 v = make_float4(NEG_INF, NEG_INF, NEG_INF, NEG_INF);
    if (j < n) v = *(const float4*)(row + j);
    if (j + 1 >= n) v.y = NEG_INF;
    if (j + 2 >= n) v.z = NEG_INF;
    if (j + 3 >= n) v.w = NEG_INF;
    return v;
}

// parts: [sequences, heads, chunks] of the sum of a chunk's exponentials.
extern "C" __global__ void __launch_bounds__(THREADS) pool_lse(const float* scores, Seqs seqs, float2* parts,
                                                               u32 heads, u64 stride, const u32* lengths, u32 rows) {
    depend();
    __shared__ float tops[THREADS / 32], scratch[33];
    Seq seq = seqs.get(blockIdx.z);
    u32 n = row_length(seq, lengths, stride, blockIdx.z, rows, blockIdx.y / (heads / rows));
    const float* row = scores + ((u64)blockIdx.z * heads + blockIdx.y) * stride;
    const u32 EACH = CHUNK / THREADS / 4;
    float4 v[EACH];
    float top = NEG_INF, sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        v[i] = four(row, blockIdx.x * CHUNK + (i * THREADS + threadIdx.x) * 4, n);
        top = fmaxf(top, fmaxf(fmaxf(v[i].x, v[i].y), fmaxf(v[i].z, v[i].w)));
    }
    top = block_max(top, tops) * LOG2E;
    float shift = top == NEG_INF ? 0.0f : top;
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        sum += exp2_fast(fmaf(v[i].x, LOG2E, -shift)) + exp2_fast(fmaf(v[i].y, LOG2E, -shift));
        sum += exp2_fast(fmaf(v[i].z, LOG2E, -shift)) + exp2_fast(fmaf(v[i].w, LOG2E, -shift));
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0)
        parts[((u64)blockIdx.z * heads + blockIdx.y) * gridDim.x + blockIdx.x] = make_float2(top, sum);
}

// Log2-sum-exp of a row from its parts, by a warp: 0 for a row of -infinity throughout, which so stays what it is when
// the result is taken off.
DEVICE float join_lse(const float2* parts, u32 n) {
    Powers all;
    for (u32 i = threadIdx.x & 31; i < n; i += 32) {
        float2 part = parts[i];
        all.add(part.x, part.y);
    }
    all.join();
    return all.sum > 0.0f ? all.top + log2f(all.sum) : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS) pool_scores(const float* scores, Seqs seqs, const float2* parts,
                                                                  u32 chunks, float* out, u32 heads, u32 rows,
                                                                  u64 stride, u32 sums, const u32* lengths) {
    depend();
    __shared__ float lse[MOST_HEADS];
    Seq seq = seqs.get(blockIdx.z);
    u32 row = blockIdx.y, g = heads / rows;
    u32 n = row_length(seq, lengths, stride, blockIdx.z, rows, row);
    u64 first = (u64)blockIdx.z * heads + row * g;
    if (parts) {
        for (u32 h = threadIdx.x >> 5; h < g; h += THREADS / 32) {
            float joined = join_lse(parts + (first + h) * chunks, chunks);
            if ((threadIdx.x & 31) == 0) lse[h] = joined;
        }
        __syncthreads();
    }
    float* dst = out + ((u64)blockIdx.z * rows + row) * stride;
    for (u32 j = (blockIdx.x * THREADS + threadIdx.x) * 4; j < n; j += gridDim.x * THREADS * 4) {
        float pooled[4];
        if (!parts) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) pooled[i] = sums ? 0.0f : NEG_INF;
            for (u32 h = 0; h < g; h++) {
                float4 s = four(scores + (first + h) * stride, j, n);
                const float x[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
                for (u32 i = 0; i < 4; i++) pooled[i] = sums ? pooled[i] + x[i] : fmaxf(pooled[i], x[i]);
            }
        } else {
            Powers all[4];
#pragma unroll 4
            for (u32 h = 0; h < g; h++) {
                float4 s = four(scores + (first + h) * stride, j, n);
                const float x[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    float y = fmaf(x[i], LOG2E, -lse[h]);
                    if (sums) all[i].add(y);
                    else all[i].top = fmaxf(all[i].top, y), all[i].sum = 1.0f;
                }
            }
#pragma unroll
            for (u32 i = 0; i < 4; i++) pooled[i] = all[i].log();
        }
        if (j + 4 <= n) *(float4*)(dst + j) = make_float4(pooled[0], pooled[1], pooled[2], pooled[3]);
        else
            for (u32 i = 0; j + i < n; i++) dst[j + i] = pooled[i];
    }
}
