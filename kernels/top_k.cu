// top_k: the k largest of kv_len scores per row as ascending token indices; exact and deterministic.
//
// Scores become u32 keys of the same order (-0 as +0; NaN and -infinity get key 0 and are never
// chosen). A radix select over 11 + 11 + 10 bits finds the k-th largest key; a compaction in index order
// then takes every larger key and the first few equal ones, so ties go to the smaller index.
//
// Plan: one CTA of 1024 threads per (row, sequence). The first pass reads the scores from device memory and
// keeps their keys in shared memory where they fit (`cached` words), so device memory is read once.
// Histograms have four copies, picked by lane, because scores crowd into few bins.
// Bytes: kv_len * 4 read, k * 4 written.
#include "paged.cuh"

#define THREADS 1024u
#define BINS 2048u
#define COPIES 4u
#define LOWEST 0x007fffffu  // key of -infinity

DEVICE u32 key_of(float x) {
    u32 b = __float_as_uint(x + 0.0f);  // -0 + 0 = +0
    if (x != x) return 0;
    b = (b >> 31) ? ~b : (b | 0x80000000u);
    return b <= LOWEST ? 0 : b;
}

struct Row {
    const float* scores;
    u32* keys;
    u32 n, cached;
    DEVICE u32 key(u32 i) const { return i < cached ? keys[i] : key_of(scores[i]); }
};

// Adds the bin `digit(key)` of every key with `(key & mask) == prefix`; key 0 is left out.
DEVICE void histogram(const Row& row, u32* hist, u32 mask, u32 prefix, u32 shift, u32 bins, bool fill) {
    for (u32 i = threadIdx.x; i < BINS * COPIES; i += THREADS) hist[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.n; i += THREADS) {
        u32 k;
        if (fill) {
            k = key_of(row.scores[i]);
            if (i < row.cached) row.keys[i] = k;
        } else {
            k = row.key(i);
        }
        if (k != 0 && (k & mask) == prefix)
            atomicAdd(&hist[(k >> shift & (bins - 1)) * COPIES + (threadIdx.x & (COPIES - 1))], 1);
    }
    __syncthreads();
}

// The bin in which the `want`-th largest lies, and how many keys lie above it. All threads get both.
DEVICE void find_bin(const u32* hist, u32* scratch, u32* found, u32 want, u32& bin, u32& above) {
    // Thread t owns bins hi = BINS - 1 - 2t and hi - 1, so the scan runs from the largest bin down.
    u32 hi = BINS - 1 - 2 * threadIdx.x, a = 0, b = 0, total;
#pragma unroll
    for (u32 c = 0; c < COPIES; c++) a += hist[hi * COPIES + c], b += hist[(hi - 1) * COPIES + c];
    u32 before = block_scan(a + b, scratch, total);
    if (before < want && want <= before + a) found[0] = hi, found[1] = before;
    else if (before + a < want && want <= before + a + b) found[0] = hi - 1, found[1] = before + a;
    __syncthreads();
    bin = found[0], above = found[1];
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(1024)
top_k(const float* scores, Seqs seqs, u32* indices, u32* counts, u32 rows_per_seq, u32 k, u64 stride,
      u32 capacity) {
    extern __shared__ uint4 shared4[];
    u32* hist = (u32*)shared4;
    __shared__ u32 scratch[33], found[2];
    u64 r = (u64)blockIdx.y * rows_per_seq + blockIdx.x;
    Row row;
    row.scores = scores + r * stride;
    row.keys = hist + BINS * COPIES;
    row.n = seqs.get(blockIdx.y).kv_len;
    row.cached = min(row.n, capacity);

    u32 bin, above, total, sum = 0;
    histogram(row, hist, 0, 0, 21, 2048, true);
#pragma unroll
    for (u32 c = 0; c < 2 * COPIES; c++) sum += hist[threadIdx.x * 2 * COPIES + c];
    block_scan(sum, scratch, total);  // keys that may be chosen
    u32 chosen = min(k, total);
    if (threadIdx.x == 0) counts[r] = chosen;
    if (chosen == 0) return;

    u32 threshold = LOWEST, ties = 0;  // all of them, unless there are more than k
    if (total > k) {
        u32 want = k;
        find_bin(hist, scratch, found, want, bin, above);
        threshold = bin << 21, want -= above;
        histogram(row, hist, 0xffe00000u, threshold, 10, 2048, false);
        find_bin(hist, scratch, found, want, bin, above);
        threshold |= bin << 10, want -= above;
        histogram(row, hist, 0xfffffc00u, threshold, 0, 1024, false);
        find_bin(hist, scratch, found, want, bin, above);
        threshold |= bin, want -= above;
        ties = want;
    }
    // Compaction: four neighbouring keys a thread; the scan counts larger keys (high half) and equal ones.
    u32* out = indices + r * k;
    u32 larger = 0, equal = 0;  // in all tiles before
    for (u32 t = 0; t < row.n; t += THREADS * 4) {
        u32 i0 = t + threadIdx.x * 4, key[4], mine = 0;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            key[j] = i0 + j < row.n ? row.key(i0 + j) : 0;
            mine += (key[j] > threshold ? 0x10000u : 0) + (key[j] == threshold ? 1 : 0);
        }
        u32 sum4, scan = block_scan(mine, scratch, sum4);
        u32 g = larger + (scan >> 16), e = equal + (scan & 0xffff);
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (key[j] > threshold) out[g + min(e, ties)] = i0 + j, g++;
            else if (key[j] == threshold) {
                if (e < ties) out[g + e] = i0 + j;
                e++;
            }
        }
        larger += sum4 >> 16, equal += sum4 & 0xffff;
    }
}
