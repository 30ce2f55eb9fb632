// Candidates among the scores of a row, for top_k.cu: the scores as threads hold them, which of them reach a bound, and
// what is chosen of these.
#pragma once
#include "digits.cuh"

// A warp loads its part of a tile in chunks, four neighbours a lane.
#define CHUNK 128u
#define CHUNKS 8u
#define TILE (WARPS * CHUNKS * CHUNK)

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

// What counts for the largest finite score.
DEVICE float less(float x) { return x < POS_INF ? x : NEG_INF; }

// The four scores that a thread holds of each of its chunks.
typedef float4 Held[CHUNKS];
typedef float4 Half[CHUNKS / 2];

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
// lists its candidates, in ascending order: its lanes share them evenly. Streamed ones are kept with their scores where
// there is room, half a tile at a time, wherever it finds some.
template <bool CLUSTER, bool CACHED> struct Select : Digits<CLUSTER> {
    const float* x;
    u32 tiles, chunks;  // of the block; of a warp in a tile
    u16* list;          // the warp's, [chunks * CHUNK]: from its part of the tile on
    u32 count;          // of it
    u32* words;         // [tiles, THREADS] where they are streamed: a bit for each of 32 neighbours
    u32 *keys, *places, room;    // images and numbers of those that are kept, room for so many
    u32* taken;                  // of it, in shared memory
    uint2 piece;                 // lane `half`'s: where those of the warp's half of a tile begin, and how many
    bool kept;
    u32 bottom, top;    // images: larger ones are chosen, and `want` of these

    DEVICE u32 warp_at(u32 tile) const { return ((threadIdx.x >> 5) * tiles + tile) * chunks * CHUNK; }
    DEVICE u32 four_at(u32 tile, u32 j) const { return warp_at(tile) + j * CHUNK + (threadIdx.x & 31) * 4; }
    DEVICE u32 half_at(u32 half, u32 j) const { return four_at(half / 2, half % 2 * (CHUNKS / 2) + j); }

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
        if (!CACHED && kept) {
            for (u32 half = 0; half < 2 * tiles; half++) {
                u32 first = __shfl_sync(~0u, piece.x, half), end = first + __shfl_sync(~0u, piece.y, half);
                for (; first < end; first += 32) {
                    bool there = first + lane < end;
                    f(there ? places[first + lane] : 0, there ? keys[first + lane] : 0);
                }
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
        u32 all = __reduce_add_sync(~0u, counts[lane]);
        high = warp_max(tops[lane]);
        if (CLUSTER) {
            if (threadIdx.x == 0) of_block[0] = all, of_block[1] = __float_as_uint(high);
            cluster_sync();
            bool there = lane < cluster_size();
            all = __reduce_add_sync(~0u, there ? remote_word(&of_block[0], lane) : 0);
            high = warp_max(there ? __uint_as_float(remote_word(&of_block[1], lane)) : NEG_INF);
            cluster_sync();
        }
        this->last = high > NEG_INF ? image(high) : LEAST;
        return all;
    }
    // Keeps the warp's candidates of half a tile, a bit for each of the thread's fours.
    DEVICE void keep(u32 half, const Half& v, u32 bits) {
        u32 lane = threadIdx.x & 31, below = (1u << lane) - 1, at = 0;
        u32 all = __reduce_add_sync(~0u, __popc(bits));
        if (lane == 0 && all > 0) at = atomicAdd(taken, all);
        at = __shfl_sync(~0u, at, 0);
        if (lane == half) piece = make_uint2(at, all);
        if (at + all > room) return;
#pragma unroll
        for (u32 j = 0; j < CHUNKS / 2; j++) {
            u32 four = bits >> 4 * j & 15, n = __popc(four);
            u32 ones = __ballot_sync(~0u, n & 1), twos = __ballot_sync(~0u, n & 2), fours = __ballot_sync(~0u, n & 4);
            u32 to = at + __popc(ones & below) + 2 * __popc(twos & below) + 4 * __popc(fours & below);
            at += __popc(ones) + 2 * __popc(twos) + 4 * __popc(fours);
            const float x[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
            u32 place = half_at(half, j);
#pragma unroll
            for (u32 c = 0; c < 4; c++)
                if (four >> c & 1) keys[to] = image(x[c]), places[to++] = place + c;
        }
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
