// pool_scores: pools per-query-head logits over a GQA group (or all heads) after a softmax per head, in the log
// domain: MaxSoftmax and AnySoftmax: out_j = max_h (s_{h,j} - lse_h), MeanSoftmax and AllSoftmax:
// out_j = log sum_h exp(s_{h,j} - lse_h); or as they are: MaxLogit: max_h s_{h,j}, SumLogit: sum_h s_{h,j}.
//
// Plan: two kernels. `pool_lse` (softmax modes only): a CTA per (CHUNK scores, head, sequence) leaves their maximum and
// sum; `pool_scores`: grid (token blocks, output rows, sequences) joins those of its heads and pools.
// Bytes: 2 * heads * kv_len * 4 + rows * kv_len * 4.
#include "paged.cuh"

#define CHUNK 4096u
#define THREADS 256u
#define MOST_HEADS 1024u

// Scores of output row `row` of `rows`: those of all tokens, or of listed ones.
DEVICE u32 row_length(const Seq& seq, const u32* lengths, u64 stride, u32 s, u32 rows, u32 row) {
    return lengths ? (u32)min((u64)lengths[s * rows + row], stride) : seq.kv_len;
}

// parts: [sequences, heads, chunks] of (maximum, sum of exp(s - maximum)).
extern "C" __global__ void __launch_bounds__(THREADS) pool_lse(const float* scores, Seqs seqs, float2* parts,
                                                               u32 heads, u64 stride, const u32* lengths, u32 rows) {
    depend();
    __shared__ float tops[THREADS / 32], scratch[33];
    Seq seq = seqs.get(blockIdx.z);
    u32 n = row_length(seq, lengths, stride, blockIdx.z, rows, blockIdx.y / (heads / rows));
    u32 lane = threadIdx.x & 31, first = blockIdx.x * CHUNK;
    const float* row = scores + ((u64)blockIdx.z * heads + blockIdx.y) * stride + first;
    float v[CHUNK / THREADS], top = NEG_INF, sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < CHUNK / THREADS; i++) {
        u32 j = i * THREADS + threadIdx.x;
        v[i] = first + j < n ? row[j] : NEG_INF;
        top = fmaxf(top, v[i]);
    }
    top = warp_max(top);
    if (lane == 0) tops[threadIdx.x >> 5] = top;
    __syncthreads();
    top = warp_max(lane < THREADS / 32 ? tops[lane] : NEG_INF);
    float shift = top == NEG_INF ? 0.0f : top;
#pragma unroll
    for (u32 i = 0; i < CHUNK / THREADS; i++) sum += expf(v[i] - shift);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0)
        parts[((u64)blockIdx.z * heads + blockIdx.y) * gridDim.x + blockIdx.x] = make_float2(top, sum);
}

// Log-sum-exp of a row from its parts, by a warp: 0 for a row of -infinity throughout, which so stays what it is when
// the result is taken off.
DEVICE float join_lse(const float2* parts, u32 n) {
    u32 lane = threadIdx.x & 31;
    float top = NEG_INF, sum = 0.0f;
    for (u32 i = lane; i < n; i += 32) top = fmaxf(top, parts[i].x);
    top = warp_max(top);
    float shift = top == NEG_INF ? 0.0f : top;
    for (u32 i = lane; i < n; i += 32) sum += expf(parts[i].x - shift) * parts[i].y;
    sum = warp_sum(sum);
    return sum > 0.0f ? shift + logf(sum) : 0.0f;
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
    for (u32 j = blockIdx.x * blockDim.x + threadIdx.x; j < n; j += gridDim.x * blockDim.x) {
        float top = NEG_INF, sum = 0.0f;
        if (!parts) {
            for (u32 h = 0; h < g; h++) {
                float s = scores[(first + h) * stride + j];
                top = fmaxf(top, s);
                sum += s;
            }
            dst[j] = sums ? sum : top;
            continue;
        }
        for (u32 h = 0; h < g; h++) top = fmaxf(top, scores[(first + h) * stride + j] - lse[h]);
        if (sums && top != NEG_INF) {
            for (u32 h = 0; h < g; h++)
                sum += expf(scores[(first + h) * stride + j] - lse[h] - top);
            top += logf(sum);
        }
        dst[j] = top;
    }
}
