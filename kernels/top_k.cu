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
    u32* masks;               // top_k_streamed: [rows, blocks, tiles, THREADS] for which scores are candidates
    u64 stride;
    u32 rows_per_seq, k, unit, permille, at_least, among_k;
    u32 span;                 // scores of a block, a multiple of 64
    u32 sinks, recent;        // tokens that are forced first, see `force`
    u32 room;                 // top_k_streamed: candidates that shared memory holds
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

DEVICE float finite_or_less(float x) { return x < POS_INF ? x : NEG_INF; }

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

// A block's scores, the candidates among them, and what is chosen of these. A warp has its own part of them, and
// lists its candidates, in ascending order: its lanes share them evenly. Streamed ones are gathered in shared memory,
// where there is room, and warps share them evenly, too.
template <bool CLUSTER, bool CACHED> struct Select : Digits<CLUSTER> {
    const float* x;
    u32 tiles, chunks;  // of the block; of a warp in a tile
    u16* list;          // the warp's, [chunks * CHUNK]: from its part of the tile on
    u32 count;          // of it
    u32* words;         // [tiles, THREADS] where they are streamed: a bit for each of 32 neighbours
    u32 candidates, before;      // of the block, and in the warps before this one
    u32 *keys, *places;          // images and numbers of them, once they are `gathered`
    bool gathered = false;
    u32 bottom, top;    // images: larger ones are chosen, and `want` of these

    DEVICE u32 warp_at(u32 tile) const { return ((threadIdx.x >> 5) * tiles + tile) * chunks * CHUNK; }
    DEVICE u32 four_at(u32 tile, u32 j) const { return warp_at(tile) + j * CHUNK + (threadIdx.x & 31) * 4; }

    // Takes a bit for each of the thread's fours, chunk by chunk.
    DEVICE void mark(u32 tile, u32 bits) {
        u32 lane = threadIdx.x & 31, word = 0;
#pragma unroll
        for (u32 s = 0; s < 8; s++)
            word |= (__shfl_sync(~0u, bits, (lane & 3) * 8 + s) >> (lane >> 2) * 4 & 15) << 4 * s;
        if (CACHED) write_list(word);
        else words[tile * THREADS + threadIdx.x] = word;
    }
    DEVICE void write_list(u32 word) {
        u32 lane = threadIdx.x & 31, end = __popc(word);
#pragma unroll
        for (int s = 1; s < 32; s <<= 1) {
            u32 y = __shfl_up_sync(~0u, end, s);
            if (lane >= s) end += y;
        }
        count = __shfl_sync(~0u, end, 31);
        u32 at = end - __popc(word);
        __syncwarp();
        for (; word; word &= word - 1) list[at++] = (u16)(lane * 32 + __ffs(word) - 1);
        __syncwarp();
    }
    // f(number, image) of the warp's candidates in turn, 32 at a time; image 0 for none.
    template <class F> DEVICE void each(F f) {
        u32 lane = threadIdx.x & 31;
        if (!CACHED && gathered) {
            u32 per = (candidates + WARPS * 32 - 1) / (WARPS * 32) * 32, first = (threadIdx.x >> 5) * per;
            u32 end = min(first + per, candidates);
            for (; first < end; first += 32) {
                bool there = first + lane < end;
                f(there ? places[first + lane] : 0, there ? keys[first + lane] : 0);
            }
            return;
        }
        for (u32 tile = 0; tile < (CACHED ? 1 : tiles); tile++) {
            if (!CACHED) write_list(words[tile * THREADS + threadIdx.x]);
            u32 from = warp_at(tile);
            for (u32 first = 0; first < count; first += 32) {
                bool there = first + lane < count;
                u32 at = from + (there ? list[first + lane] : 0);
                f(at, there ? image(x[at]) : 0);
            }
        }
    }
    // Counts what the threads have marked, `mine` each, and finds the largest finite score: candidates of the row.
    DEVICE u32 meet(u32 mine, float high) {
        __shared__ u32 counts[WARPS], of_block[2];
        __shared__ float tops[WARPS];
        u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        u32 of_warp = __reduce_add_sync(~0u, mine);
        high = warp_max(high);
        if (lane == 0) counts[warp] = of_warp, tops[warp] = high;
        __syncthreads();
        u32 c = counts[lane];
        before = __reduce_add_sync(~0u, lane < warp ? c : 0), candidates = __reduce_add_sync(~0u, c);
        high = warp_max(tops[lane]);
        u32 all = candidates;
        if (CLUSTER) {
            if (threadIdx.x == 0) of_block[0] = candidates, of_block[1] = __float_as_uint(high);
            cluster_sync();
            bool there = lane < cluster_size();
            all = __reduce_add_sync(~0u, there ? remote_word(&of_block[0], lane) : 0);
            high = warp_max(there ? __uint_as_float(remote_word(&of_block[1], lane)) : NEG_INF);
            cluster_sync();
        }
        this->last = high > NEG_INF ? image(high) : LEAST;
        return all;
    }
    DEVICE void gather() {
        u32 lane = threadIdx.x & 31, at = before;
        for (u32 tile = 0; tile < tiles; tile++) {
            write_list(words[tile * THREADS + threadIdx.x]);
            for (u32 i = lane; i < count; i += 32) {
                u32 place = warp_at(tile) + list[i];
                keys[at + i] = image(x[place]), places[at + i] = place;
            }
            at += count;
        }
        gathered = true;
        __syncthreads();
    }
    DEVICE bool last_bin(u32 key) const { return bottom <= key && key <= top; }

    // Finds the k-th largest of the candidates, which are those from image `low` on.
    DEVICE void run(u32 low, u32 k) {
        this->start_at(low);
        each([&](u32, u32 key) {
            if (key) this->count_first(1, key);
        });
        this->want = k;
        this->sync();
        this->search(1, true);
        bottom = this->low();
        u32 shift = bottom == INFINITE ? 0 : this->shift;
        top = this->end(bottom, shift);
        for (u32 round = 2; round < HISTOGRAMS && this->in_bin > this->want && shift > 0; round++) {
            u32 next = shift > 11 ? shift - 11 : 0, *counts = this->hist + round * BINS;
            each([&](u32, u32 key) {
                if (last_bin(key)) atomicAdd(&counts[(key - bottom) >> next], 1);
            });
            this->sync();
            this->search(round, false);
            bottom += this->found << next, shift = next, top = this->end(bottom, shift);
        }
    }

    // Chosen are the larger ones and the first `want` of the last bin of the row.
    template <class Emit> DEVICE void write(u32 first, Emit emit) {
        __shared__ uint2 warps[WARPS], block;
        u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, want = this->want;
        u32 below = (1u << lane) - 1, g = 0, e = 0;
        each([&](u32, u32 key) { g += key > top, e += last_bin(key); });
        g = __reduce_add_sync(~0u, g), e = __reduce_add_sync(~0u, e);
        if (lane == 0) warps[warp] = make_uint2(g, e);
        __syncthreads();
        uint2 c = warps[lane];
        // In the warps before this one, and in the blocks before this one.
        u32 gb = __reduce_add_sync(~0u, lane < warp ? c.x : 0), eb = __reduce_add_sync(~0u, lane < warp ? c.y : 0);
        if (CLUSTER) {
            c.x = __reduce_add_sync(~0u, c.x), c.y = __reduce_add_sync(~0u, c.y);
            if (threadIdx.x == 0) block = c;
            cluster_sync();
            u32 g0 = lane < cluster_rank() ? remote_word(&block.x, lane) : 0;
            u32 e0 = lane < cluster_rank() ? remote_word(&block.y, lane) : 0;
            gb += __reduce_add_sync(~0u, g0), eb += __reduce_add_sync(~0u, e0);
            cluster_arrive_read();  // no block leaves before the others have read its memory
        }
        each([&](u32 at, u32 key) {
            u32 g = __ballot_sync(~0u, key > top), e = __ballot_sync(~0u, last_bin(key));
            u32 larger = gb + __popc(g & below), equal = eb + __popc(e & below);
            if (key > top) emit(larger + min(equal, want), first + at);
            else if (last_bin(key) && equal < want) emit(larger + equal, first + at);
            gb += __popc(g), eb += __popc(e);
        });
        if (CLUSTER) cluster_wait();
    }
};

DEVICE void clear_histograms() {
    extern __shared__ uint4 shared4[];
    for (u32 i = threadIdx.x; i < HISTOGRAMS * BINS / 4; i += THREADS) shared4[i] = make_uint4(0, 0, 0, 0);
}

// Row `blockIdx.y` of sequence `blockIdx.z`; the blocks in x share it.
template <bool CLUSTER, bool CACHED> DEVICE void top_k(const TopKArgs& a) {
    extern __shared__ uint4 shared4[];
    __shared__ u32 found[WARPS + 3];
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
        s.keys = (u32*)((u16*)kept + TILE), s.places = s.keys + a.room;
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
            want += want / 16 + 4 * (u32)sqrtf((float)want) + 16;
        }
    }
    u32 alone = THREADS * gridDim.x;  // groups of all scores of a thread
    Groups groups = want > alone * 5 ? EACH : want > alone / 5 * 2 ? FOURS : ALL;
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
    while (true) {
        s.want = want;
        s.search(0, true);
        // Fewer groups than that: all finite scores are candidates.
        low = s.total < want ? LEAST : s.low();
        float from = k > 0 ? score_of(low) : score_of(NOTHING), high = NEG_INF;
        u32 marked = 0;
        for (u32 tile = 0; tile < (CACHED ? 1 : s.tiles); tile++) {
            u32 bits = 0;
#pragma unroll
            for (u32 j = 0; j < CHUNKS; j++) {
                u32 i = s.four_at(tile, j);
                float4 x = CACHED ? v[j] : p.four(i);
                if (!CACHED) {
                    p.fit(x, i);
                    high = fmaxf(fmaxf(high, finite_or_less(x.x)), fmaxf(finite_or_less(x.y), finite_or_less(x.z)));
                    high = fmaxf(high, finite_or_less(x.w));
                }
                bits |= (x.x >= from) << 4 * j | (x.y >= from) << (4 * j + 1);
                bits |= (x.z >= from) << (4 * j + 2) | (x.w >= from) << (4 * j + 3);
            }
            marked += __popc(bits);
            s.mark(tile, bits);
        }
        if (CACHED) break;
        if (s.meet(marked, high) >= k || low == LEAST) break;
        want *= 2;
    }
    if (!CACHED && s.candidates <= a.room) s.gather();
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
