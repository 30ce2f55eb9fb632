// top_k: the k largest scores per row as ascending indices; exact and deterministic. force_top_k: force before it.
//
// Most scores lie far below the k-th largest and are compared once:
// 1. A bound is guessed from 4096 scores of the row, spread over it: what somewhat more than k's share of them reach.
// 2. Candidates are the scores that reach it; every warp looks through a run of the row and keeps what it finds. Should
//    they be fewer than k, the bound is lowered.
// 3. A radix select over digits of 11 bits of an order-preserving u32 image, no wider than the candidates' range, finds
//    the k-th largest of them, or the few (up to 32) among which it is, which are then compared with each other.
// 4. Prefix sums of the warps' counts place what is chosen. Equal scores are kept from the smallest index on.
//
// Plan: a block of 32 warps, or a cluster of them, per row. A warp copies its run to shared memory step by step (copy
// engine, or cp.async), a lane looks at neighbours. Candidates that find no room in shared memory are found again in the
// row whenever they are wanted. Histograms are counted in shared memory; across a cluster one warp adds them up.
// Bytes: row length * 4 + 32 KB read, k * 4 written; the row again for every lowered bound, and four times or more where
// candidates find no room.
#include "candidates.cuh"
#include "paged.cuh"

// What one score row holds (src/backend/ops/score.rs, `TopK`).
struct TopKArgs {
    float* scores;
    Seqs seqs;
    u32* indices;
    u32* counts;
    const u32* among;         // candidates' numbers, or null
    const u32* among_counts;
    u64 stride;
    u32 rows_per_seq, k, unit, permille, at_least, among_k;
    u32 span;                 // scores of a block, a multiple of 64
    u32 sinks, recent;        // tokens that are forced first, see `force`
    u32 room;                 // candidates that shared memory holds
};
static_assert(sizeof(TopKArgs) == 104, "as TopKArgs of top_k.rs");

// Scores that the first bound is guessed from.
#define SAMPLE (4 * THREADS)

DEVICE void clear_histograms() {
    extern __shared__ uint4 shared4[];
    for (u32 i = threadIdx.x; i < HISTOGRAMS * BINS / 4; i += THREADS) shared4[i] = make_uint4(0, 0, 0, 0);
}

// Row `blockIdx.y` of sequence `blockIdx.z`; the blocks in x share it.
template <bool CLUSTER, u32 STEP> DEVICE void early_top_k(const TopKArgs& a) {
    extern __shared__ uint4 shared4[];
    __shared__ u32 taken;
    u32 t = threadIdx.x, rank = CLUSTER ? cluster_rank() : 0, len = a.seqs.get(blockIdx.z).kv_len;
    u64 r = (u64)blockIdx.z * a.rows_per_seq + blockIdx.y;
    u32 k = min(a.k, max(a.at_least, (u32)((u64)len * a.permille / 1000)));
    Select<CLUSTER, STEP> s;
    s.hist = (u32*)shared4, s.taken = &taken;
    s.buffer = (float*)(s.hist + HISTOGRAMS * BINS);
    s.keys = (u32*)(s.buffer + WARPS * STEP), s.places = (u16*)(s.keys + a.room), s.room = a.room;
    if (t == 0) taken = 0;
    s.ready();
    float* x = a.scores + r * a.stride;
    depend();

    u32 n = a.among ? min(a.among_counts[r], a.among_k) : (len + a.unit - 1) / a.unit;
    // Fours of the row at equal distances, the same for all of its blocks, or all of it.
    bool whole = n <= SAMPLE;
    u32 i = (whole ? t : (u32)((u64)t * ((n + 3) / 4) / THREADS)) * 4;
    float4 four = i < n ? *(const float4*)(x + i) : make_float4(NEG_INF, NEG_INF, NEG_INF, NEG_INF);
    Part& p = s.p;
    p.first = rank * a.span, p.x = x + p.first;
    p.readable = a.stride > p.first ? min((u32)(a.stride - p.first), a.span) : 0;
    p.n = n > p.first ? min(n - p.first, a.span) : 0;
    bool forced = a.sinks + a.recent > 0 && k > 0;
    p.sinks = forced ? a.sinks : 0, p.from = forced ? len - min(a.recent, len) : ~0u;
    s.share();
    // How many of them are to reach the bound: k of all, somewhat more than k's share of a sample.
    u32 want = k;
    if (!whole) {
        float share = (float)k * ((float)SAMPLE / (float)n);
        want = (u32)(share + share / 32 + 3 * sqrtf(share)) + 16;
    }
    float scores[4] = {four.x, four.y, four.z, four.w};
    Bound bound = s.sample(scores, i, n);
    while (true) {
        s.want = want;
        s.template search<false>(0, true);
        // Fewer than that: all finite scores are candidates.
        s.start(k == 0 ? NOTHING : s.total < want ? LEAST : bound.low(s.found), bound.high);
        s.keep();
        if (s.find(k)) break;
        // Not enough of them.
        s.sync();
        for (u32 j = t; j < BINS; j += THREADS) s.hist[BINS + j] = 0;
        if (t == 0) taken = 0;
        want *= 2;
        s.copy(0);
        s.sync();
    }
    u32* out = a.indices + r * a.k;
    const u32* among = a.among ? a.among + r * a.among_k : nullptr;
    s.write([&](u32 at, u32 i) { out[at] = among ? among[i] : i; });
    if (rank > 0) return;
    if (t == 0) a.counts[r] = min(k, s.total);
    if (a.sinks + a.recent == 0) return;
    for (u32 j = t; j < min(a.sinks, n); j += THREADS) x[j] = POS_INF;
    for (u32 j = len - min(a.recent, len) + t; j < n; j += THREADS) x[j] = POS_INF;
}

// STEP: scores that a warp copies at a time; with fewer there is more room for candidates.
#define KERNEL(NAME, CLUSTER, STEP)                                       \
    extern "C" __global__ void __launch_bounds__(1024, 1) NAME(TopKArgs a) { \
        clear_histograms();                                               \
        early_top_k<CLUSTER, STEP>(a);                                    \
    }
KERNEL(top_k, false, 1024)
KERNEL(top_k_roomy, false, 256)
KERNEL(top_k_cluster, true, 1024)
KERNEL(top_k_roomy_cluster, true, 256)
