// force: sets the scores of the first `sinks` and the last `recent` tokens to +infinity, in place; `force_listed` where
// the scores are those of listed tokens.
//
// Plan: one CTA per (row, sequence). Bytes: 4 * (sinks + recent) a row; listed: 4 a list entry.
#include "paged.cuh"

extern "C" __global__ void force(float* scores, Seqs seqs, u32 rows_per_seq, u64 stride, u32 sinks,
                                 u32 recent) {
    depend();
    u32 n = seqs.get(blockIdx.y).kv_len;
    float* row = scores + ((u64)blockIdx.y * rows_per_seq + blockIdx.x) * stride;
    for (u32 j = threadIdx.x; j < min(sinks, n); j += blockDim.x) row[j] = POS_INF;
    for (u32 j = threadIdx.x; j < min(recent, n); j += blockDim.x) row[n - 1 - j] = POS_INF;
}

extern "C" __global__ void force_listed(float* scores, Seqs seqs, u32 rows_per_seq, u64 stride,
                                        u32 sinks, u32 recent, const u32* indices,
                                        const u32* counts, u32 list_len) {
    depend();
    u32 n = seqs.get(blockIdx.y).kv_len;
    u64 row = (u64)blockIdx.y * rows_per_seq + blockIdx.x;
    u32 count = min(counts[row], list_len);
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        u32 t = indices[row * list_len + i];
        if (t < n && (t < sinks || n - t <= recent)) scores[row * stride + i] = POS_INF;
    }
}
