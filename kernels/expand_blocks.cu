// expand_blocks: the tokens of listed blocks, cut at kv_len.
//
// Plan: grid (pieces of a list, lists, sequences), a thread a token. Bytes: 4 * tokens.
#include "paged.cuh"

extern "C" __global__ void expand_blocks(const u32* blocks, const u32* block_counts, Seqs seqs, u32* indices,
                                         u32* counts, u32 rows_per_seq, u32 k, u32 unit) {
    depend();
    u32 kv_len = seqs.get(blockIdx.z).kv_len;
    u64 row = (u64)blockIdx.z * rows_per_seq + blockIdx.y;
    const u32* list = blocks + row * k;
    u32 n = min(block_counts[row], k), tokens = 0;
    // Only the last block of an ascending list can reach behind the sequence.
    if (n > 0) tokens = (n - 1) * unit + min(unit, kv_len - min(list[n - 1] * unit, kv_len));
    if (blockIdx.x == 0 && threadIdx.x == 0) counts[row] = tokens;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < tokens; i += gridDim.x * blockDim.x)
        indices[row * k * unit + i] = list[i / unit] * unit + i % unit;
}
