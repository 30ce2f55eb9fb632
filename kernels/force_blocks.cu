// force_blocks: the scores of listed blocks become +infinity.
//
// Plan: grid (pieces of a list, lists, sequences), a thread an entry. Bytes: 8 * listed blocks.
#include "paged.cuh"

extern "C" __global__ void force_blocks(const u32* blocks, const u32* block_counts, Seqs seqs, float* scores,
                                        u64 stride, u32 rows_per_seq, u32 k, u32 unit) {
    depend();
    u32 kv_len = seqs.get(blockIdx.z).kv_len;
    u64 row = (u64)blockIdx.z * rows_per_seq + blockIdx.y;
    u32 n = min(block_counts[row], k), there = (kv_len + unit - 1) / unit;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        u32 b = blocks[row * k + i];
        if (b < there) scores[row * stride + b] = POS_INF;
    }
}
