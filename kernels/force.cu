// force: sets the scores of the first `sinks` and the last `recent` tokens to +infinity, in place.
//
// Plan: one CTA per (row, sequence). Bytes: 4 * (sinks + recent) a row.
#include "paged.cuh"

extern "C" __global__ void force(float* scores, Seqs seqs, u32 rows_per_seq, u64 stride, u32 sinks,
                                 u32 recent) {
    u32 n = seqs.get(blockIdx.y).kv_len;
    float* row = scores + ((u64)blockIdx.y * rows_per_seq + blockIdx.x) * stride;
    for (u32 j = threadIdx.x; j < min(sinks, n); j += blockDim.x) row[j] = POS_INF;
    for (u32 j = threadIdx.x; j < min(recent, n); j += blockDim.x) row[n - 1 - j] = POS_INF;
}
