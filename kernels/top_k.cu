// top_k: the k largest scores per row as ascending indices; exact and deterministic. force_top_k: force before it.
//
// Most scores lie far below the k-th largest and are compared once:
// 1. Every thread takes the largest of each group of its scores. The k-th largest of these, rounded down to the edge of one
//    of 2048 bins, is reached by k scores at least, and rarely by many more.
// 2. Candidates are the scores that reach it, a bit each. A radix select over digits of 11 + 11 + 10 bits of an
//    order-preserving u32 image, no wider than the candidates' range, finds the k-th largest of them.
// 3. Prefix sums of the bits' counts place what is chosen. Equal scores are kept from the smallest index on.
//
// Plan: a block, or a cluster of them, per row. What a block scores it reads once, into registers and shared memory
// (top_k_cached); where clusters do not hold a row it is read three times, mostly from L2 (top_k_streamed).
// A histogram is counted in shared memory; the blocks of a cluster add up each other's.
// Bytes: row length * 4 read, k * 4 written.
#include "digits.cuh"
#include "paged.cuh"

// A warp loads its part of a tile in chunks, four neighbours a lane.
#define CHUNK 128u
#define CHUNKS 8u
#define TILE (WARPS * CHUNKS * CHUNK)

// What one score row holds (src/backend/ops/score.rs, `TopK`).
struct TopKArgs {
    float* scores;
    Seqs seqs;
    u32* indices;
    u32* counts;
    const u32* among;         // candidates' numbers, or null
    const u32* among_counts;
    u32* masks;               // device memory for top_k_streamed
    u64 stride;
    u32 rows_per_seq, k, unit, permille, at_least, among_k;
    u32 span;                 // scores of a block, a multiple of 64
    u32 sinks, recent;        // tokens that are forced first, see `force`
    u32 pad;
};

// A block's share of a row.
struct Part {
    float* x;
    u32 first, n;         // number of its first score, and how many it has
    u32 readable;         // scores of the buffer that lie there, n or more
    u32 sinks, from;      // tokens below and from which on are forced

    // Scores [i, i + 4), i a multiple of 4.
    DEVICE float4 four(u32 i) const {
        return i < readable ? *(const float4*)(x + i) : make_float4(NEG_INF, NEG_INF, NEG_INF, NEG_INF);
    }
    // -infinity for what is not there; forces the others, in place too.
    DEVICE void fit(float4& v, u32 i) const {
        bool end = i + 4 > n, force = first + i < sinks || first + i + 4 > from;
        if (!end && !force) return;
        float* e = &v.x;
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            u32 token = first + i + c;
            if (i + c >= n) e[c] = NEG_INF;
            else if (token < sinks || token >= from) x[i + c] = e[c] = POS_INF;
        }
    }
};

// The four scores that a thread holds of each of its chunks.
typedef float4 Held[CHUNKS];

// The largest of the thread's groups: of all its scores, of four of them, or each one. A group's scores lie a chunk
// or more apart, because neighbours are often large together.
enum Groups { ALL, FOURS, EACH };
template <class F> DEVICE void tops(const Held& v, Groups groups, F f) {
    if (groups == EACH) {
#pragma unroll
        for (u32 j = 0; j < CHUNKS; j++) f(v[j].x), f(v[j].y), f(v[j].z), f(v[j].w);
        return;
    }
    float4 top[2] = {v[0], v[1]};
#pragma unroll
    for (u32 j = 2; j < CHUNKS; j++) {
        float4& h = top[j & 1];
        h.x = fmaxf(h.x, v[j].x), h.y = fmaxf(h.y, v[j].y), h.z = fmaxf(h.z, v[j].z), h.w = fmaxf(h.w, v[j].w);
    }
    if (groups == FOURS) {
#pragma unroll
        for (u32 h = 0; h < 2; h++) f(top[h].x), f(top[h].y), f(top[h].z), f(top[h].w);
        return;
    }
    float a = fmaxf(fmaxf(top[0].x, top[0].y), fmaxf(top[0].z, top[0].w));
    f(fmaxf(a, fmaxf(fmaxf(top[1].x, top[1].y), fmaxf(top[1].z, top[1].w))));
}

// The candidates of a block: of every tile a thread has 32 neighbours, a word of bits.
template <bool CACHED> struct Marks {
    u32 tiles, chunks;  // of a block's part; of a warp in a tile
    u32* words;         // [2, tiles, THREADS] where they are streamed
    u32 mine[2];        // else
    DEVICE u32& at(u32 kind, u32 tile) {
        if (CACHED) return mine[kind];
        return words[(kind * tiles + tile) * THREADS + threadIdx.x];
    }
    DEVICE u32 warp_at(u32 tile) const { return tile * TILE + (threadIdx.x >> 5) * chunks * CHUNK; }
    // First score of the word; of the four of a chunk.
    DEVICE u32 word_at(u32 tile) const { return warp_at(tile) + (threadIdx.x & 31) * 32; }
    DEVICE u32 four_at(u32 tile, u32 j) const { return warp_at(tile) + j * CHUNK + (threadIdx.x & 31) * 4; }
    // Bits of a thread's fours, chunk by chunk, into bits of its neighbours.
    DEVICE u32 in_order(u32 bits) const {
        u32 lane = threadIdx.x & 31, word = 0;
#pragma unroll
        for (u32 s = 0; s < 8; s++)
            word |= (__shfl_sync(~0u, bits, (lane & 3) * 8 + s) >> (lane >> 2) * 4 & 15) << 4 * s;
        return word;
    }
};
#define CANDIDATES 0u
#define LARGER 1u

template <bool CLUSTER, bool CACHED> struct Select : Digits<CLUSTER>, Marks<CACHED> {
    const float* x;  // the block's scores
    using Digits<CLUSTER>::hist;
    using Digits<CLUSTER>::want;
    using Digits<CLUSTER>::in_bin;
    using Digits<CLUSTER>::found;

    template <class F> DEVICE void each_candidate(F f) {
        for (u32 tile = 0; tile < (CACHED ? 1 : this->tiles); tile++) {
            u32 from = this->word_at(tile);
            for (u32 bits = this->at(CANDIDATES, tile); bits; bits &= bits - 1)
                f(tile, bits & (0u - bits), image(x[from + __ffs(bits) - 1]));
        }
    }

    // Of the candidates, from image `low` on, those above the want-th largest become LARGER ones; its equals stay.
    DEVICE void run(u32 low) {
        this->start_at(low);
        each_candidate([&](u32, u32, u32 key) { this->count_first(1, key); });
        this->sync();
        this->search(1, true);
        u32 bottom = this->low(), shift = bottom == INFINITE ? 0 : this->shift, top = this->end(bottom, shift);
        for (u32 round = 2; round < HISTOGRAMS && in_bin > want && shift > 0; round++) {
            u32 next = shift > 11 ? shift - 11 : 0, *counts = hist + round * BINS;
            each_candidate([&](u32, u32, u32 key) {
                if (bottom <= key && key <= top) atomicAdd(&counts[(key - bottom) >> next], 1);
            });
            this->sync();
            this->search(round, false);
            bottom += found << next, shift = next, top = this->end(bottom, shift);
        }
        for (u32 tile = 0; tile < (CACHED ? 1 : this->tiles); tile++) this->at(LARGER, tile) = 0;
        each_candidate([&](u32 tile, u32 bit, u32 key) {
            if (key > top) this->at(LARGER, tile) |= bit;
            if (key < bottom || key > top) this->at(CANDIDATES, tile) &= ~bit;
        });
    }

    // Chosen are the larger ones and the first `want` candidates of the row.
    template <class Emit> DEVICE void write(u32 first, Emit emit) {
        __shared__ uint2 warps[WARPS], block;
        u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, tiles = CACHED ? 1 : this->tiles;
        u32 g0 = 0, e0 = 0;  // before this block, then before this tile
        if (CLUSTER) {
            u32 g = 0, e = 0;
            for (u32 tile = 0; tile < tiles; tile++)
                g += __popc(this->at(LARGER, tile)), e += __popc(this->at(CANDIDATES, tile));
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
        for (u32 tile = 0; tile < tiles; tile++) {
            u32 g = this->at(LARGER, tile), e = this->at(CANDIDATES, tile);
            u32 gi = __popc(g), ei = __popc(e);
#pragma unroll
            for (int s = 1; s < 32; s <<= 1) {
                u32 a = __shfl_up_sync(~0u, gi, s), b = __shfl_up_sync(~0u, ei, s);
                if (lane >= s) gi += a, ei += b;
            }
            if (CLUSTER || tile > 0) __syncthreads();
            if (lane == 31) warps[warp] = make_uint2(gi, ei);
            __syncthreads();
            uint2 c = warps[lane];
            u32 gb = g0 + __reduce_add_sync(~0u, lane < warp ? c.x : 0) + gi - __popc(g);
            u32 eb = e0 + __reduce_add_sync(~0u, lane < warp ? c.y : 0) + ei - __popc(e);
            g0 += __reduce_add_sync(~0u, c.x), e0 += __reduce_add_sync(~0u, c.y);
            u32 from = first + this->word_at(tile);
            for (u32 bits = g | e; bits; bits &= bits - 1) {
                u32 bit = bits & (0u - bits), i = from + __ffs(bit) - 1;
                if (g & bit) emit(gb++ + min(eb, want), i);
                else if (eb < want) emit(gb + eb, i), eb++;
            }
        }
        if (CLUSTER) cluster_wait();
    }
};

// Row `blockIdx.y` of sequence `blockIdx.z`; the blocks in x share it.
template <bool CLUSTER, bool CACHED> DEVICE void top_k(const TopKArgs& a) {
    extern __shared__ uint4 shared4[];
    __shared__ u32 found[WARPS + 3];
    u32 t = threadIdx.x, rank = CLUSTER ? cluster_rank() : 0;
    for (u32 i = t; i < HISTOGRAMS * BINS / 4; i += THREADS) shared4[i] = make_uint4(0, 0, 0, 0);
    depend();
    u64 r = (u64)blockIdx.z * a.rows_per_seq + blockIdx.y;
    Select<CLUSTER, CACHED> s;
    s.hist = (u32*)shared4, s.shared = found;
    s.tiles = CACHED ? 1 : (a.span + TILE - 1) / TILE;
    s.chunks = CACHED ? (a.span + WARPS * CHUNK - 1) / (WARPS * CHUNK) : CHUNKS;
    if (!CACHED) s.words = a.masks + (r * gridDim.x + rank) * 2 * s.tiles * THREADS;
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
    u32 alone = THREADS * gridDim.x;  // groups of all scores of a thread
    Groups groups = !CACHED || k > alone * 5 ? EACH : k > alone / 5 * 2 ? FOURS : ALL;

    float4* kept = (float4*)(s.hist + HISTOGRAMS * BINS);
    if (CACHED) {
#pragma unroll
        for (u32 j = 0; j < CHUNKS; j++) {
            if (j >= s.chunks) continue;
            u32 i = s.four_at(0, j);
            p.fit(v[j], i);
            kept[i / 4] = v[j];
        }
    }
    // f of the groups' largest.
    auto each_top = [&](auto f) {
        if constexpr (CACHED) {
            tops(v, groups, f);
        } else {
            for (u32 i = t * 4; i < p.n; i += THREADS * 4) {
                float4 x = p.four(i);
                p.fit(x, i);
                f(x.x), f(x.y), f(x.z), f(x.w);
            }
        }
    };
    Extent extent;
    bool infinite = false;
    each_top([&](float x) { extent.add(x), infinite |= x == POS_INF; });
    // Infinity hides its group's largest finite score.
    if (CACHED && infinite) tops(v, EACH, [&](float x) { extent.raise(x); });
    s.set(extent);
    each_top([&](float x) {
        u32 key = image(x);
        if (key >= LEAST) s.count_first(0, key);
    });
    s.want = k;
    s.sync();
    s.search(0, true);
    // Fewer groups than k: all finite scores are candidates.
    u32 low = s.total < k ? LEAST : s.low();
    float from = k > 0 ? score_of(low) : score_of(NOTHING);
    for (u32 tile = 0; tile < (CACHED ? 1 : s.tiles); tile++) {
        u32 bits = 0;
#pragma unroll
        for (u32 j = 0; j < CHUNKS; j++) {
            u32 i = s.four_at(tile, j);
            float4 x = CACHED ? v[j] : p.four(i);
            if (!CACHED) p.fit(x, i);
            bits |= (x.x >= from) << 4 * j | (x.y >= from) << (4 * j + 1);
            bits |= (x.z >= from) << (4 * j + 2) | (x.w >= from) << (4 * j + 3);
        }
        s.at(CANDIDATES, tile) = s.in_order(bits);
    }
    s.x = CACHED ? (const float*)kept : p.x;
    s.want = k;
    s.run(low);
    u32* out = a.indices + r * a.k;
    const u32* among = a.among ? a.among + r * a.among_k : nullptr;
    s.write(p.first, [&](u32 at, u32 i) { out[at] = among ? among[i] : i; });
    if (rank == 0 && t == 0) a.counts[r] = min(k, s.total);
}

#define KERNEL(NAME, CLUSTER, CACHED)                                     \
    extern "C" __global__ void __launch_bounds__(1024, 1) NAME(TopKArgs a) { \
        top_k<CLUSTER, CACHED>(a);                                        \
    }
KERNEL(top_k_cached, false, true)
KERNEL(top_k_streamed, false, false)
KERNEL(top_k_cached_cluster, true, true)
KERNEL(top_k_streamed_cluster, true, false)
