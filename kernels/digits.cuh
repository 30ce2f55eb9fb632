// Digits of scores, and the bin in which the k-th largest lies: histograms in shared memory, of a block or a cluster.
#pragma once
#include "cluster.cuh"

#define THREADS 1024u
#define WARPS (THREADS / 32)
#define BINS 2048u
#define PER (BINS / THREADS)  // 2, see `search`
#define HISTOGRAMS 5

// Order-preserving image of a score; both zeros have the same, and so have NaN and -infinity, which are never taken.
DEVICE u32 image(float x) {
    u32 b = __float_as_uint(fmaxf(x, NEG_INF) + 0.0f);
    return (b >> 31) ? ~b : (b | 0x80000000u);
}
// The score that has an image.
DEVICE float score_of(u32 key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); }
#define LEAST 0x00800000u   // of the most negative finite score
#define INFINITE 0xff800000u
#define NOTHING 0xffffffffu  // of NaN, which no comparison admits

// Inclusive sums over a warp's lanes.
DEVICE u32 warp_scan(u32 x) {
#pragma unroll
    for (int s = 1; s < 32; s <<= 1) {
        u32 y = __shfl_up_sync(~0u, x, s);
        if ((threadIdx.x & 31) >= s) x += y;
    }
    return x;
}

template <bool CLUSTER> struct Digits {
    u32* hist;                        // [HISTOGRAMS][BINS] zeros
    u32 want, total, found, in_bin;   // still wanted of the last bin found; what was counted first

    DEVICE void sync() const {
        if (CLUSTER) cluster_sync();
        else __syncthreads();
    }
    DEVICE void count(u32 round, u32 digit) const { atomicAdd(&hist[round * BINS + digit], 1); }

    // Waits until all have counted a digit, and finds its bin in which the want-th largest lies, by what the cluster has
    // counted (ACROSS) or the block. `whole`: of all that were counted, `total`.
    template <bool ACROSS> DEVICE void search(u32 round, bool whole) {
        // Sums of the warps' bins, from the largest on; what is found: a bin, how many lie above it, how many in it, all.
        __shared__ u32 sums[HISTOGRAMS][WARPS];
        __shared__ uint4 result;
        u32 t = threadIdx.x, warp = t >> 5, lane = t & 31;
        const u32* counted = hist + round * BINS;
        auto at = [&](u32 t) { return BINS - PER * (t + 1); };
        __syncthreads();
        uint2 c = *(const uint2*)(counted + at(t));
        u32 of_warp = __reduce_add_sync(~0u, c.x + c.y);
        if (lane == 0) sums[round][warp] = of_warp;
        if (ACROSS) cluster_sync();
        else __syncthreads();
        // By the warp that has the bin; across a cluster by the first, which then fetches those bins.
        u32 w = 0, before = 0, all = 0;
        if (ACROSS) {
            if (warp == 0) {
#pragma unroll
                for (u32 r = 0; r < MAX_CLUSTER; r++)
                    if (r < cluster_size()) w += remote_word(&sums[round][lane], r);
            }
        } else w = sums[round][lane];
        if (!ACROSS || warp == 0) {
            all = __reduce_add_sync(~0u, w);
            if (whole) want = min(want, all);
            bool mine = false;
            if (ACROSS) {
                u32 end = warp_scan(w);
                u32 has = __ballot_sync(~0u, end - w < want && want <= end);
                if (has) {
                    u32 owner = __ffs(has) - 1;
                    before = __shfl_sync(~0u, end - w, owner), c = make_uint2(0, 0), mine = true;
                    t = owner * 32 + lane;
#pragma unroll
                    for (u32 r = 0; r < MAX_CLUSTER; r++)
                        if (r < cluster_size()) {
                            uint2 b = remote_words2(counted + at(t), r);
                            c.x += b.x, c.y += b.y;
                        }
                } else if (lane == 0) result = make_uint4(0, 0, 0, all);
            } else {
                before = __reduce_add_sync(~0u, lane < warp ? w : 0);
                mine = before < want && want <= before + of_warp;
            }
            if (mine) {
                u32 both = c.x + c.y;
                before += warp_scan(both) - both;
                // The larger bin first.
                if (before < want && want <= before + c.y) result = make_uint4(at(t) + 1, before, c.y, all);
                else if (before + c.y < want && want <= before + both) result = make_uint4(at(t), before + c.y, c.x, all);
            } else if (!ACROSS && want == 0 && t == 0) result = make_uint4(0, 0, 0, all);
        }
        __syncthreads();
        if (whole) total = result.w, want = min(want, total);
        found = result.x, want -= result.y, in_bin = result.z;
    }
};
