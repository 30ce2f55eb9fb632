// top_k: the k largest scores per row as ascending indices; exact and deterministic. force_top_k: force before it.
//
// A radix select over digits of 11 + 11 + 10 bits of an order-preserving u32 image, counted from the row's smallest
// finite score on and no wider than its range: pooled log probabilities differ in few of their bits. Comparing the row
// with the edges of the bin in which the k-th largest lies gives two bit masks of it: chosen for sure, and candidates.
// Later digits look at candidates only, a 32-bit word a thread. Equal scores are kept from the smallest index on;
// positions in the list are prefix sums of the masks' bit counts.
//
// Plan: a block, or a cluster of them, per row. What a block scores it reads once into shared memory where it fits
// (top_k_cached), else it reads device memory three times (top_k_streamed: mostly L2 but for the first).
// A digit's histogram is counted in shared memory; the blocks of a cluster add up each other's.
// Bytes: row length * 4 read, k * 4 written.
#include "cluster.cuh"
#include "paged.cuh"

#define THREADS 1024u
#define WARPS (THREADS / 32)
#define BINS 2048u
#define PER (BINS / THREADS)

// Order-preserving image of a score; both zeros have the same, and so have NaN and -infinity, which are never taken.
DEVICE u32 image(float x) {
    u32 b = __float_as_uint(fmaxf(x, NEG_INF) + 0.0f);
    return (b >> 31) ? ~b : (b | 0x80000000u);
}
// The score that has an image; NaN, which no comparison admits, for NOTHING.
DEVICE float score_of(u32 key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); }
#define LEAST 0x00800000u   // of the most negative finite score
#define INFINITE 0xff800000u
#define NOTHING 0xffffffffu  // larger than any

// What one score row holds (src/backend/ops/score.rs, `TopK`).
struct TopKArgs {
    const float* scores;
    Seqs seqs;
    u32* indices;
    u32* counts;
    const u32* among;         // candidates' numbers, or null
    const u32* among_counts;
    u32* masks;               // device memory for them, or null: shared
    u64 stride;
    u32 rows_per_seq, k, unit, permille, at_least, among_k;
    u32 span;                 // scores of a block, a multiple of 64
    u32 sinks, recent;        // tokens that are forced first, see `force`
    u32 pad;
};

// A block's share of a row.
struct Part {
    const float* x;
    u32 first, n;  // number of its first score, and how many it has
    DEVICE u32 words() const { return (n + 31) / 32; }
};

// Scores [i, i + 4) of a part, -infinity from its end on.
DEVICE float4 four(const Part& p, u32 i) {
    float4 x = make_float4(NEG_INF, NEG_INF, NEG_INF, NEG_INF);
    if (i + 3 < p.n && ((u64)p.x & 15) == 0) return *(const float4*)(p.x + i);
    if (i < p.n) x.x = p.x[i];
    if (i + 1 < p.n) x.y = p.x[i + 1];
    if (i + 2 < p.n) x.z = p.x[i + 2];
    if (i + 3 < p.n) x.w = p.x[i + 3];
    return x;
}

// Smallest and largest finite score.
struct Extent {
    float low = POS_INF, high = NEG_INF;
    DEVICE void add(float x) {
        if (fabsf(x) < POS_INF) low = fminf(low, x), high = fmaxf(high, x);
    }
    DEVICE void add(const float4& v) { add(v.x), add(v.y), add(v.z), add(v.w); }
    DEVICE void join(const Extent& o) { low = fminf(low, o.low), high = fmaxf(high, o.high); }
    DEVICE void join_warp() {
        high = warp_max(high), low = -warp_max(-low);
    }
};

template <bool CLUSTER> struct Select {
    u32 *hist, *larger, *candidates;  // [3][BINS] zeros; [words] each
    u32 want, total, found, in_bin;   // still wanted of the last bin found; scores that may be chosen
    u32* shared;                      // [WARPS + 3]
    u32 base, shift;                  // of the first digit: 2047 is +infinity

    DEVICE u32 first_digit(u32 key) const { return key >= INFINITE ? BINS - 1 : (key - base) >> shift; }

    // Sets the first digit for a row whose part in this block has `mine`. All threads take part.
    DEVICE void set_digits(Extent mine) {
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
        base = shift = 0;
        if (all.low > all.high) return;
        base = image(all.low);
        u32 range = image(all.high) - base, bits = 32 - __clz(range);
        shift = bits > 11 ? bits - 11 : 0;
        if (range >> shift == BINS - 1) shift++;
    }

    DEVICE void sync() const {
        if (CLUSTER) cluster_sync();
        else __syncthreads();
    }

    // Finds the bin of a counted digit in which the want-th largest lies.
    DEVICE void search(u32 round) {
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
        if (round == 0) total = __reduce_add_sync(~0u, w), want = min(want, total);
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
        if (want > 0) found = shared[WARPS], want -= shared[WARPS + 1], in_bin = shared[WARPS + 2];
    }
    // Every candidate is wanted: no further digit is needed.
    DEVICE bool settled() const { return want == 0 || in_bin == want; }

    template <class F> DEVICE void each_word(const Part& p, F f) {
        for (u32 w = threadIdx.x; w < p.words(); w += THREADS) f(w);
    }
    // Candidates in a bin above the found one are chosen, those below are out; the rest goes to `f`.
    template <class F> DEVICE void refine(const Part& p, u32 from, u32 mask, F f) {
        each_word(p, [&](u32 w) {
            u32 bits = candidates[w], up = 0, stay = 0;
            while (bits) {
                u32 bit = bits & (0u - bits);
                bits ^= bit;
                u32 key = image(p.x[w * 32 + __ffs(bit) - 1]) - base, d = key >> from & mask;
                if (d > found) up |= bit;
                if (d == found) stay |= bit, f(key);
            }
            larger[w] |= up, candidates[w] = stay;
        });
    }

    template <class Emit> DEVICE void run(const Part& p, u32 k, Emit emit) {
        u32 t = threadIdx.x, warp = t >> 5, lane = t & 31;
        want = k, total = 0, found = 0, in_bin = 0;
        sync();
        search(0);
        u32 low = found == BINS - 1 ? INFINITE : base + (found << shift);
        u32 above = found == BINS - 1 ? NOTHING : min(base + ((found + 1) << shift), INFINITE);
        // Fewer than k: all that may be chosen are candidates, and all are wanted.
        if (total <= k) low = LEAST, above = NOTHING, want = in_bin = total;
        if (k == 0) low = above = NOTHING;
        float from = score_of(low), beyond = score_of(above);
        // A warp makes 32 words at a time, of 32 scores each; its lane j keeps word j.
        for (u32 word0 = warp * 32; word0 < p.words(); word0 += THREADS) {
            u32 my_larger = 0, my_candidates = 0;
#pragma unroll 8
            for (u32 j = 0; j < 32; j++) {
                u32 i = (word0 + j) * 32 + lane;
                float x = i < p.n ? p.x[i] : NEG_INF;
                u32 a = __ballot_sync(~0u, x >= beyond), c = __ballot_sync(~0u, x >= from);
                if (lane == j) my_larger = a, my_candidates = c & ~a;
            }
            if (word0 + lane < p.words()) larger[word0 + lane] = my_larger, candidates[word0 + lane] = my_candidates;
        }
        __syncthreads();
        u32 second = shift > 11 ? shift - 11 : 0, mask = (1u << (shift - second)) - 1;
        if (!settled() && shift > 0) {
            u32* counts = hist + BINS;
            each_word(p, [&](u32 w) {
                for (u32 bits = candidates[w]; bits; bits &= bits - 1)
                    atomicAdd(&counts[(image(p.x[w * 32 + __ffs(bits) - 1]) - base) >> second & mask], 1);
            });
            sync();
            search(1);
            u32 rest = (1u << second) - 1, *last = hist + 2 * BINS;
            refine(p, second, mask, [&](u32 key) { if (second) atomicAdd(&last[key & rest], 1); });
            if (!settled() && second > 0) {
                sync();
                search(2);
                refine(p, 0, rest, [](u32) {});
            }
        }
        write(p, emit);
    }

    // Chosen are the larger ones and the first `want` candidates of the row.
    template <class Emit> DEVICE void write(const Part& p, Emit emit) {
        __shared__ uint2 warps[WARPS], block;
        u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        u32 g0 = 0, e0 = 0;  // before this block, then before this round of words
        if (CLUSTER) {
            u32 g = 0, e = 0;
            each_word(p, [&](u32 w) { g += __popc(larger[w]), e += __popc(candidates[w]); });
            g = __reduce_add_sync(~0u, g), e = __reduce_add_sync(~0u, e);
            if (lane == 0) warps[warp] = make_uint2(g, e);
            __syncthreads();
            uint2 c = warps[lane];
            c.x = __reduce_add_sync(~0u, c.x), c.y = __reduce_add_sync(~0u, c.y);
            if (threadIdx.x == 0) block = c;
            cluster_sync();
            g0 = lane < cluster_rank() ? remote_word(&block.x, lane) : 0;
            e0 = lane < cluster_rank() ? remote_word(&block.y, lane) : 0;
            g0 = __reduce_add_sync(~0u, g0), e0 = __reduce_add_sync(~0u, e0);
            cluster_arrive();  // no block leaves before the others have read its memory
        }
        for (u32 base = 0; base < p.words(); base += THREADS) {
            u32 w = base + threadIdx.x;
            u32 g = w < p.words() ? larger[w] : 0, e = w < p.words() ? candidates[w] : 0;
            u32 gi = __popc(g), ei = __popc(e);
#pragma unroll
            for (int s = 1; s < 32; s <<= 1) {
                u32 a = __shfl_up_sync(~0u, gi, s), b = __shfl_up_sync(~0u, ei, s);
                if (lane >= s) gi += a, ei += b;
            }
            __syncthreads();
            if (lane == 31) warps[warp] = make_uint2(gi, ei);
            __syncthreads();
            uint2 c = warps[lane];
            u32 gb = g0 + __reduce_add_sync(~0u, lane < warp ? c.x : 0) + gi - __popc(g);
            u32 eb = e0 + __reduce_add_sync(~0u, lane < warp ? c.y : 0) + ei - __popc(e);
            g0 += __reduce_add_sync(~0u, c.x), e0 += __reduce_add_sync(~0u, c.y);
            for (u32 bits = g | e; bits; bits &= bits - 1) {
                u32 bit = bits & (0u - bits), i = p.first + w * 32 + __ffs(bits) - 1;
                if (g & bit) emit(gb++ + min(eb, want), i);
                else if (eb < want) emit(gb + eb, i), eb++;
            }
        }
        if (CLUSTER) cluster_wait();
    }
};

// force on the part of a row of `len` tokens, in place.
DEVICE void force_part(const TopKArgs& a, const Part& p, u32 len) {
    for (u32 i = threadIdx.x; i < a.sinks + a.recent; i += THREADS) {
        u32 token = i < a.sinks ? i : len - 1 - (i - a.sinks);
        if (token < len && token >= p.first && token - p.first < p.n) ((float*)p.x)[token - p.first] = POS_INF;
    }
}

// Row `blockIdx.y` of sequence `blockIdx.z`; the blocks in x share it.
template <bool CLUSTER, bool CACHED> DEVICE void top_k(const TopKArgs& a) {
    extern __shared__ uint4 shared4[];
    __shared__ u32 found[WARPS + 3];
    u64 r = (u64)blockIdx.z * a.rows_per_seq + blockIdx.y;
    u32 rank = CLUSTER ? cluster_rank() : 0, len = a.seqs.get(blockIdx.z).kv_len, t = threadIdx.x;
    u32 n = a.among ? min(a.among_counts[r], a.among_k) : (len + a.unit - 1) / a.unit;
    u32 k = min(a.k, max(a.at_least, (u32)((u64)len * a.permille / 1000)));

    Part p = {a.scores + r * a.stride + (u64)rank * a.span, rank * a.span, 0};
    p.n = n > p.first ? min(n - p.first, a.span) : 0;
    Select<CLUSTER> s;
    s.hist = (u32*)shared4, s.shared = found;
    u32* masks = s.hist + 3 * BINS;
    if (a.masks) masks = a.masks + (r * gridDim.x + rank) * (a.span / 16);
    s.larger = masks, s.candidates = masks + a.span / 32;

    force_part(a, p, len);
    for (u32 i = t; i < 3 * BINS / 4; i += THREADS) shared4[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    float4* kept = (float4*)(s.hist + 3 * BINS + a.span / 16);
    Extent extent;
    for (u32 i = t * 4; i < p.n; i += THREADS * 32) {
        float4 x[8];
#pragma unroll
        for (u32 j = 0; j < 8; j++) x[j] = four(p, i + j * THREADS * 4);
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            if (i + j * THREADS * 4 >= p.n) continue;
            if (CACHED) kept[i / 4 + j * THREADS] = x[j];
            extent.add(x[j]);
        }
    }
    s.set_digits(extent);
    auto count = [&](float x) {
        u32 key = image(x);
        if (key >= LEAST) atomicAdd(&s.hist[s.first_digit(key)], 1);
    };
    // Every thread reads back what it has kept.
    for (u32 i = t * 4; i < p.n; i += THREADS * 4) {
        float4 x = CACHED ? kept[i / 4] : four(p, i);
        count(x.x), count(x.y), count(x.z), count(x.w);
    }
    if (CACHED) p.x = (const float*)kept;
    u32* out = a.indices + r * a.k;
    const u32* among = a.among ? a.among + r * a.among_k : nullptr;
    s.run(p, k, [&](u32 at, u32 i) { out[at] = among ? among[i] : i; });
    if (rank == 0 && t == 0) a.counts[r] = min(k, s.total);
}

#define KERNEL(NAME, CLUSTER, CACHED)                                     \
    extern "C" __global__ void __launch_bounds__(1024) NAME(TopKArgs a) { \
        depend();                                                         \
        top_k<CLUSTER, CACHED>(a);                                        \
    }
KERNEL(top_k_cached, false, true)
KERNEL(top_k_streamed, false, false)
KERNEL(top_k_cached_cluster, true, true)
KERNEL(top_k_streamed_cluster, true, false)
