// hold_lists: lists that were just chosen are kept in their slots; the others are those of their slots and the tokens
// since.
//
// Plan: grid (pieces of a list, lists, sequences), a thread an entry. Bytes: 12 * tokens at most.
#include "paged.cuh"

extern "C" __global__ void hold_lists(const u32* chosen, const u32* chosen_counts, Seqs seqs, u32* held, u32* marks,
                                      u32* indices, u32* counts, u32 fresh, u32 rows_per_seq, u32 k, u32 room) {
    depend();
    Seq seq = seqs.get(blockIdx.z);
    u64 row = (u64)blockIdx.z * rows_per_seq + blockIdx.y;
    u64 own = (u64)seq.slot * rows_per_seq + blockIdx.y;
    bool now = blockIdx.z < fresh;
    // The marks of a fresh list are written below and not read by any other block.
    u32 n = min(now ? chosen_counts[row] : marks[2 * own], k);
    u32 at = now ? seq.kv_len : min(marks[2 * own + 1], seq.kv_len);
    u32 total = min(n + (seq.kv_len - at), room);
    const u32* list = now ? chosen + row * k : held + own * k;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < total; i += gridDim.x * blockDim.x) {
        u32 token = i < n ? list[i] : at + (i - n);
        indices[row * room + i] = token;
        if (now) held[own * k + i] = token;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        counts[row] = total;
        if (now) marks[2 * own] = n, marks[2 * own + 1] = seq.kv_len;
    }
}
