// Digits of scores, and the bin in which the k-th largest lies: histograms in shared memory, of a block or a cluster.
#pragma once
#include "cluster.cuh"

#define THREADS 1024u
#define WARPS (THREADS / 32)
#define BINS 2048u
#define PER (BINS / THREADS)
#define HISTOGRAMS 4

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

// Smallest and largest finite score.
struct Extent {
    float low = POS_INF, high = NEG_INF;
    DEVICE void add(float x) {
        if (fabsf(x) < POS_INF) low = fminf(low, x), high = fmaxf(high, x);
    }
    // The largest alone, but where nothing was added.
    DEVICE void raise(float x) {
        if (fabsf(x) < POS_INF) high = fmaxf(high, x), low = fminf(low, high);
    }
    DEVICE void join(const Extent& o) { low = fminf(low, o.low), high = fmaxf(high, o.high); }
    DEVICE void join_warp() { high = warp_max(high), low = -warp_max(-low); }
};

template <bool CLUSTER> struct Digits {
    u32* hist;                        // [HISTOGRAMS][BINS] zeros
    u32* shared;                      // [WARPS + 3]
    u32 want, total, found, in_bin;   // still wanted of the last bin found; what was counted first
    u32 base, shift;                  // of the first digit, whose bin 2047 is +infinity
    u32 last;                         // image of the largest finite score

    DEVICE void sync() const {
        if (CLUSTER) cluster_sync();
        else __syncthreads();
    }
    DEVICE u32 first_digit(u32 key) const { return key >= INFINITE ? BINS - 1 : (key - base) >> shift; }
    DEVICE void count_first(u32 round, u32 key) const { atomicAdd(&hist[round * BINS + first_digit(key)], 1); }

    // Finite scores from `low` on have digits of their own.
    DEVICE void start_at(u32 low) {
        base = low;
        u32 range = last > low ? last - low : 0, bits = 32 - __clz(range);
        shift = bits > 11 ? bits - 11 : 0;
        if (range >> shift == BINS - 1) shift++;
    }

    // The row's digits, where its part in this block has the extent `mine`. All threads take part.
    DEVICE void set(Extent mine) {
        __shared__ Extent of_warps[WARPS], of_block;
        u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        mine.join_warp();
        if (lane == 0) of_warps[warp] = mine;
        __syncthreads();
        Extent all = of_warps[lane];
        all.join_warp();
        if (CLUSTER) {
            if (threadIdx.x == 0) of_block = all;
            cluster_sync();
            Extent other;
            if (lane < cluster_size())
                other.low = remote_float(&of_block.low, lane), other.high = remote_float(&of_block.high, lane);
            all.join(other);
            all.join_warp();
        }
        bool any = all.low <= all.high;
        last = any ? image(all.high) : LEAST;
        start_at(any ? image(all.low) : LEAST);
    }

    // Finds the bin of a counted digit in which the want-th largest lies; `whole`: of all that were counted, `total`.
    DEVICE void search(u32 round, bool whole) {
        const u32* counted = hist + round * BINS;
        u32 t = threadIdx.x, warp = t >> 5, lane = t & 31;
        u32 at = BINS - PER * (t + 1);  // position PER * t from the largest bin on
        u32 lo = 0, hi = 0;
        if (CLUSTER) {
#pragma unroll
            for (u32 r = 0; r < MAX_CLUSTER; r++)
                if (r < cluster_size()) {
                    uint2 c = remote_words2(counted + at, r);
                    lo += c.x, hi += c.y;
                }
        } else {
            uint2 c = *(const uint2*)(counted + at);
            lo = c.x, hi = c.y;
        }
        u32 bins[PER] = {hi, lo};
        u32 mine = bins[0] + bins[1];
        u32 of_warp = __reduce_add_sync(~0u, mine);
        if (lane == 0) shared[warp] = of_warp;
        __syncthreads();
        u32 w = shared[lane];
        u32 before = __reduce_add_sync(~0u, lane < warp ? w : 0);
        if (whole) total = __reduce_add_sync(~0u, w), want = min(want, total);
        if (before < want && want <= before + of_warp) {
            u32 incl = mine;
#pragma unroll
            for (int s = 1; s < 32; s <<= 1) {
                u32 y = __shfl_up_sync(~0u, incl, s);
                if (lane >= s) incl += y;
            }
            before += incl - mine;
#pragma unroll
            for (u32 i = 0; i < PER; i++) {
                if (before < want && want <= before + bins[i])
                    shared[WARPS] = at + PER - 1 - i, shared[WARPS + 1] = before, shared[WARPS + 2] = bins[i];
                before += bins[i];
            }
        }
        __syncthreads();
        found = in_bin = 0;
        if (want > 0) found = shared[WARPS], want -= shared[WARPS + 1], in_bin = shared[WARPS + 2];
    }
    // Smallest image of the bin found of the first digit.
    DEVICE u32 low() const { return found == BINS - 1 ? INFINITE : base + (found << shift); }
    // Largest of a bin that begins at `low` and leaves `shift` bits: infinity is in no bin of finite scores.
    DEVICE static u32 end(u32 low, u32 shift) {
        return low == INFINITE ? low : min(low + ((1u << shift) - 1), INFINITE - 1);
    }
};
