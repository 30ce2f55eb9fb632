// top_k: the k largest scores per row as ascending indices; exact and deterministic. force_top_k: force before it.
//
// Most scores lie far below the k-th largest and are compared once:
// 1. Every thread takes the largest of each group of its scores. The k-th largest of these, rounded down to the edge of
//    one of 2048 bins, is reached by k scores at least, and rarely by many more.
// 2. Candidates are the scores that reach it, listed by every warp. A radix select over digits of 11 + 11 + 10 bits of
//    an order-preserving u32 image, no wider than the candidates' range, finds the k-th largest of them.
// 3. Prefix sums of the warps' counts place what is chosen. Equal scores are kept from the smallest index on.
//
// Plan: a block, or a cluster of them, per row. What a block scores it reads once, into registers and shared memory
// (top_k_cached). Where that would be more blocks than run at once, or clusters do not hold a row, the row streams by
// (top_k_streamed): a bound is guessed from a sample, lowered should fewer than k scores reach it, and only candidates
// are kept.
// A histogram is counted in shared memory; the blocks of a cluster add up each other's.
// Bytes: row length * 4 read, k * 4 written; top_k_streamed reads a sample more, the row again for every lowered bound and
// once where candidates find no room (then also a bit a score, written and read three times).
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
    u32* masks;               // top_k_streamed: [rows, blocks, tiles, THREADS] for which scores are candidates
    u64 stride;
    u32 rows_per_seq, k, unit, permille, at_least, among_k;
    u32 span;                 // scores of a block, a multiple of 64
    u32 sinks, recent;        // tokens that are forced first, see `force`
    u32 room;                 // top_k_streamed: candidates that shared memory holds
};

DEVICE void clear_histograms() {
    extern __shared__ uint4 shared4[];
    for (u32 i = threadIdx.x; i < HISTOGRAMS * BINS / 4; i += THREADS) shared4[i] = make_uint4(0, 0, 0, 0);
}

// Row `blockIdx.y` of sequence `blockIdx.z`; the blocks in x share it.
template <bool CLUSTER, bool CACHED> DEVICE void top_k(const TopKArgs& a) {
    extern __shared__ uint4 shared4[];
    __shared__ u32 found[WARPS + 3], taken;
    u32 t = threadIdx.x, rank = CLUSTER ? cluster_rank() : 0;
    u64 r = (u64)blockIdx.z * a.rows_per_seq + blockIdx.y;
    Select<CLUSTER, CACHED> s;
    s.hist = (u32*)shared4, s.shared = found;
    s.tiles = 1;
    s.chunks = CACHED ? (a.span + WARPS * CHUNK - 1) / (WARPS * CHUNK) : CHUNKS;
    float4* kept = (float4*)(s.hist + HISTOGRAMS * BINS);
    u32 round = WARPS * s.chunks * CHUNK;
    s.list = (u16*)(kept + (CACHED ? round / 4 : 0)) + (t >> 5) * s.chunks * CHUNK;
    if (!CACHED) {
        s.words = a.masks + (r * gridDim.x + rank) * ((a.span + TILE - 1) / TILE) * THREADS;
        // Over the lists, which are there where these are not.
        s.keys = (u32*)kept, s.places = s.keys + a.room, s.room = a.room, s.taken = &taken;
    }
    Part p;
    p.first = rank * a.span, p.x = a.scores + r * a.stride + p.first;
    p.readable = a.stride > p.first ? min((u32)(a.stride - p.first), a.span) : 0;
    // The scores are on their way while the record comes.
    Held v;
    if (CACHED) {
#pragma unroll
        for (u32 j = 0; j < CHUNKS; j++) v[j] = p.four(j < s.chunks ? s.four_at(0, j) : p.readable);
    }
    u32 len = a.seqs.get(blockIdx.z).kv_len;
    u32 n = a.among ? min(a.among_counts[r], a.among_k) : (len + a.unit - 1) / a.unit;
    u32 k = min(a.k, max(a.at_least, (u32)((u64)len * a.permille / 1000)));
    p.n = n > p.first ? min(n - p.first, a.span) : 0;
    bool forced = a.sinks + a.recent > 0;
    p.sinks = forced ? a.sinks : 0, p.from = forced ? len - min(a.recent, len) : ~0u;
    // How many of the scores looked at are to reach the bound: k of all, about k's share of a sample.
    u32 want = k;
    if (CACHED) {
#pragma unroll
        for (u32 j = 0; j < CHUNKS; j++) {
            if (j >= s.chunks) continue;
            u32 i = s.four_at(0, j);
            p.fit(v[j], i);
            kept[i / 4] = v[j];
        }
    } else {
        s.tiles = (p.n + TILE - 1) / TILE;
        // Chunks at equal distances.
        const u32 SAMPLE = CHUNKS / 2;
        u32 apart = max(p.n / (WARPS * SAMPLE), CHUNK);
#pragma unroll
        for (u32 j = 0; j < CHUNKS; j++) {
            u32 i = ((t >> 5) * SAMPLE + j) * apart / 4 * 4 + (t & 31) * 4;
            v[j] = p.four(j < SAMPLE ? i : p.readable);
            p.fit(v[j], j < SAMPLE ? i : p.n);
        }
        u32 looked = min(n, gridDim.x * WARPS * SAMPLE * CHUNK);
        if (looked < n) {
            want = (u32)((u64)k * looked / n);
            want += want / 32 + 3 * (u32)sqrtf((float)want) + 16;
        }
    }
    u32 alone = THREADS * gridDim.x;  // groups of all scores of a thread
    Groups groups = !CACHED || want > alone * 5 ? EACH : want > alone / 5 * 2 ? FOURS : ALL;
    Extent extent;
    bool infinite = false;
    tops(v, groups, [&](float x) { extent.add(x), infinite |= x == POS_INF; });
    // Infinity hides its group's largest finite score.
    if (infinite) tops(v, EACH, [&](float x) { extent.raise(x); });
    s.set(extent);
    tops(v, groups, [&](float x) {
        u32 key = image(x);
        if (key >= LEAST) s.count_first(0, key);
    });
    s.sync();
    s.x = CACHED ? (const float*)kept : p.x;
    u32 low;
    float from;
    // A bit for each of the scores that reach the bound.
    auto reach = [&](const auto& v) {
        u32 bits = 0;
#pragma unroll
        for (u32 j = 0; j < sizeof(v) / sizeof(float4); j++) {
            bits |= (v[j].x >= from) << 4 * j | (v[j].y >= from) << (4 * j + 1);
            bits |= (v[j].z >= from) << (4 * j + 2) | (v[j].w >= from) << (4 * j + 3);
        }
        return bits;
    };
    auto load = [&](Half& w, u32 half) {
#pragma unroll
        for (u32 j = 0; j < CHUNKS / 2; j++) w[j] = p.four(s.half_at(half, j));
#pragma unroll
        for (u32 j = 0; j < CHUNKS / 2; j++) p.fit(w[j], s.half_at(half, j));
    };
    while (true) {
        if (!CACHED && t == 0) taken = 0;
        s.want = want;
        s.search(0, true);
        // Fewer groups than that: all finite scores are candidates.
        low = s.total < want ? LEAST : s.low();
        from = k > 0 ? score_of(low) : score_of(NOTHING);
        if (CACHED) {
            s.mark(0, reach(v));
            break;
        }
        float high = NEG_INF;
        u32 marked = 0;
        for (u32 half = 0; half < 2 * s.tiles; half++) {
            Half w;
            load(w, half);
#pragma unroll
            for (u32 j = 0; j < CHUNKS / 2; j++) {
                high = fmaxf(fmaxf(high, less(w[j].x)), fmaxf(less(w[j].y), less(w[j].z)));
                high = fmaxf(high, less(w[j].w));
            }
            u32 bits = reach(w);
            marked += __popc(bits);
            s.keep(half, w, bits);
        }
        if (s.meet(marked, high) >= k || low == LEAST) break;
        want *= 2;
    }
    if (!CACHED) {
        s.kept = taken <= a.room && s.tiles <= 16;
        for (u32 tile = 0; tile < (s.kept ? 0 : s.tiles); tile++) {
            Half w;
            load(w, 2 * tile);
            u32 bits = reach(w);
            load(w, 2 * tile + 1);
            s.mark(tile, bits | reach(w) << 16);
        }
    }
    s.run(low, k);
    u32* out = a.indices + r * a.k;
    const u32* among = a.among ? a.among + r * a.among_k : nullptr;
    s.write(p.first, [&](u32 at, u32 i) { out[at] = among ? among[i] : i; });
    if (rank == 0 && t == 0) a.counts[r] = min(k, s.total);
}

#define KERNEL(NAME, CLUSTER, CACHED)                                     \
    extern "C" __global__ void __launch_bounds__(1024, 1) NAME(TopKArgs a) { \
        clear_histograms();                                               \
        depend();                                                         \
        top_k<CLUSTER, CACHED>(a);                                        \
    }
KERNEL(top_k_cached, false, true)
KERNEL(top_k_streamed, false, false)
KERNEL(top_k_cached_cluster, true, true)
KERNEL(top_k_streamed_cluster, true, false)
