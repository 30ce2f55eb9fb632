// pool_blocks: scores of blocks from scores of summaries: heads pooled summary by summary, the largest summary of
// each block, forced blocks.
//
// Plan: two kernels. `pool_blocks_lse` (softmax pools only): one CTA per (head, sequence) takes the row's
// log-sum-exp; `pool_blocks`: grid (64-block pieces, rows, sequences), a thread a block. Bytes:
// 2 * heads * kv_len / run * 4.
#include "lse.cuh"
#include "paged.cuh"

#define SUM_LOGIT 0u
#define MAX_LOGIT 1u
#define MAX_SOFTMAX 2u
#define MEAN_SOFTMAX 3u

struct PoolBlocksArgs {
    const float* scores;
    const float* lse;
    float* out;
    Seqs seqs;
    u64 stride, block_stride;
    u32 heads, rows, mode, run, unit;
    u32 beyond;  // summaries that reach into a block from behind it
    u32 sinks, recent;
};
static_assert(sizeof(PoolBlocksArgs) == 88, "as PoolArgs of blocks.rs");

extern "C" __global__ void pool_blocks_lse(PoolBlocksArgs a) {
    depend();
    u32 row = blockIdx.y * a.heads + blockIdx.x;
    u32 n = (a.seqs.get(blockIdx.y).kv_len + a.run - 1) / a.run;
    float total = block_lse(a.scores + row * a.stride, n);
    if (threadIdx.x == 0) ((float*)a.lse)[row] = total;
}

// Score of summary `g` over the `group` heads from row `first` on.
DEVICE float pooled(const PoolBlocksArgs& a, u64 first, u32 group, u32 g) {
    bool softmax = a.mode >= MAX_SOFTMAX;
    float top = NEG_INF, sum = 0.0f;
    for (u32 h = 0; h < group; h++) {
        float s = a.scores[(first + h) * a.stride + g] - (softmax ? a.lse[first + h] : 0.0f);
        top = fmaxf(top, s), sum += s;
    }
    if (a.mode == SUM_LOGIT) return fabsf(sum) < POS_INF ? sum : NEG_INF;
    if (a.mode != MEAN_SOFTMAX || top == NEG_INF) return top;
    sum = 0.0f;
    for (u32 h = 0; h < group; h++)
        sum += expf(a.scores[(first + h) * a.stride + g] - a.lse[first + h] - top);
    return top + logf(sum);
}

extern "C" __global__ void pool_blocks(PoolBlocksArgs a) {
    depend();
    u32 kv_len = a.seqs.get(blockIdx.z).kv_len, group = a.heads / a.rows;
    u32 n = (kv_len + a.run - 1) / a.run, own = a.unit / a.run;
    u32 old = kv_len - min(a.recent, kv_len);  // tokens before the recent ones
    u64 first = (u64)blockIdx.z * a.heads + blockIdx.y * group;
    float* out = a.out + ((u64)blockIdx.z * a.rows + blockIdx.y) * a.block_stride;
    for (u32 b = blockIdx.x * blockDim.x + threadIdx.x; b * a.unit < kv_len; b += gridDim.x * blockDim.x) {
        float best = NEG_INF;
        u32 end = min(n, own * (b + 1) + a.beyond);
        for (u32 g = own * b; g < end; g++) best = fmaxf(best, pooled(a, first, group, g));
        bool forced = b * a.unit < a.sinks || (a.recent > 0 && (b + 1) * a.unit > old);
        out[b] = forced ? POS_INF : best;
    }
}
