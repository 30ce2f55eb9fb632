// pool_scores: pools per-query-head logits over a GQA group (or all heads) after a softmax per head, in the log
// domain: MaxSoftmax and AnySoftmax: out_j = max_h (s_{h,j} - lse_h), MeanSoftmax and AllSoftmax:
// out_j = log sum_h exp(s_{h,j} - lse_h); or as they are: MaxLogit: max_h s_{h,j}, SumLogit: sum_h s_{h,j}.
//
// Plan: two kernels. `pool_lse`: one CTA per (head, sequence) takes the row's log-sum-exp (softmax modes only);
// `pool_scores`: grid (token blocks, output rows, sequences) pools. Bytes: 2 * heads * kv_len * 4 + rows * kv_len * 4.
#include "lse.cuh"
#include "paged.cuh"

// Scores of output row `row` of `rows`: those of all tokens, or of listed ones.
DEVICE u32 row_length(const Seq& seq, const u32* lengths, u64 stride, u32 s, u32 rows, u32 row) {
    return lengths ? (u32)min((u64)lengths[s * rows + row], stride) : seq.kv_len;
}

extern "C" __global__ void pool_lse(const float* scores, Seqs seqs, float* lse, u32 heads, u64 stride,
                                    const u32* lengths, u32 rows) {
    depend();
    Seq seq = seqs.get(blockIdx.y);
    u32 n = row_length(seq, lengths, stride, blockIdx.y, rows, blockIdx.x / (heads / rows));
    float total = block_lse(scores + ((u64)blockIdx.y * heads + blockIdx.x) * stride, n);
    if (threadIdx.x == 0) lse[blockIdx.y * heads + blockIdx.x] = total;
}

extern "C" __global__ void pool_scores(const float* scores, Seqs seqs, const float* lse, float* out,
                                       u32 heads, u32 rows, u64 stride, u32 sums, const u32* lengths) {
    depend();
    Seq seq = seqs.get(blockIdx.z);
    u32 row = blockIdx.y, g = heads / rows;
    u32 n = row_length(seq, lengths, stride, blockIdx.z, rows, row);
    u64 first = (u64)blockIdx.z * heads + row * g;
    float* dst = out + ((u64)blockIdx.z * rows + row) * stride;
    for (u32 j = blockIdx.x * blockDim.x + threadIdx.x; j < n; j += gridDim.x * blockDim.x) {
        float top = NEG_INF, sum = 0.0f;
        if (!lse) {
            for (u32 h = 0; h < g; h++) {
                float s = scores[(first + h) * stride + j];
                top = fmaxf(top, s);
                sum += s;
            }
            dst[j] = sums ? sum : top;
            continue;
        }
        for (u32 h = 0; h < g; h++) top = fmaxf(top, scores[(first + h) * stride + j] - lse[first + h]);
        if (sums && top != NEG_INF) {
            for (u32 h = 0; h < g; h++)
                sum += expf(scores[(first + h) * stride + j] - lse[first + h] - top);
            top += logf(sum);
        }
        dst[j] = top;
    }
}
