// pool_scores: pools per-query-head logits over a GQA group after a softmax per head, in the log domain:
//   MaxSoftmax: out_j = max_h (s_{h,j} - lse_h), MeanSoftmax: out_j = log sum_h exp(s_{h,j} - lse_h).
//
// Plan: two kernels. `pool_lse`: one CTA per (head, sequence) takes the row's log-sum-exp; `pool_scores`: grid
// (token blocks, KV heads, sequences) pools. Bytes: 2 * heads * kv_len * 4 + kv_heads * kv_len * 4.
#include "lse.cuh"
#include "paged.cuh"

extern "C" __global__ void pool_lse(const float* scores, Seqs seqs, float* lse, u32 heads, u64 stride) {
    const float* row = scores + ((u64)blockIdx.y * heads + blockIdx.x) * stride;
    float total = block_lse(row, seqs.get(blockIdx.y).kv_len);
    if (threadIdx.x == 0) lse[blockIdx.y * heads + blockIdx.x] = total;
}

extern "C" __global__ void pool_scores(const float* scores, Seqs seqs, const float* lse, float* out,
                                       u32 heads, u32 kv_heads, u64 stride, u32 mean) {
    Seq seq = seqs.get(blockIdx.z);
    u32 kvh = blockIdx.y, g = heads / kv_heads;
    u64 first = (u64)blockIdx.z * heads + kvh * g;
    float* dst = out + ((u64)blockIdx.z * kv_heads + kvh) * stride;
    for (u32 j = blockIdx.x * blockDim.x + threadIdx.x; j < seq.kv_len; j += gridDim.x * blockDim.x) {
        float top = NEG_INF, sum = 0.0f;
        for (u32 h = 0; h < g; h++) top = fmaxf(top, scores[(first + h) * stride + j] - lse[first + h]);
        if (mean && top != NEG_INF) {
            for (u32 h = 0; h < g; h++)
                sum += expf(scores[(first + h) * stride + j] - lse[first + h] - top);
            top += logf(sum);
        }
        dst[j] = top;
    }
}
