// top_k: the k largest of kv_len scores per row as ascending token indices; exact and deterministic.
//
// Scores become u32 keys of the same order (-0 as +0; NaN and -infinity get key 0 and are never
// chosen). A radix select over 11 + 11 + 10 bits finds the k-th largest key; a compaction in index order
// then takes every larger key and the first few equal ones, so ties go to the smaller index.
//
// Plan: few rows (row_in_registers): a cluster of blocks per (row, sequence), their keys in registers.
// Many or very long rows (row_in_shared): one block each, keys in shared memory as far as they fit. Either way
// device memory is read once, with many loads under way together. A digit's histogram is counted in shared memory
// (the hardware joins increments by one that meet in a word); the blocks of a cluster add up each other's.
// A warp owns neighbouring keys, so one count per warp is enough to place them in order.
// Bytes: kv_len * 4 read, k * 4 written.
#include "cluster.cuh"
#include "paged.cuh"

#define BINS 2048u
#define LOWEST 0x007fffffu  // key of -infinity

DEVICE u32 key_of(float x) {
    u32 b = __float_as_uint(x + 0.0f);  // -0 + 0 = +0
    if (x != x) return 0;
    b = (b >> 31) ? ~b : (b | 0x80000000u);
    return b <= LOWEST ? 0 : b;
}

struct Digit {
    u32 mask, shift, bins;  // bits above the digit, and the digit itself
    DEVICE u32 of(u32 key) const { return key >> shift & (bins - 1); }
};
DEVICE Digit digit_of(int i) {
    if (i == 0) return {0, 21, 2048};
    if (i == 1) return {0xffe00000u, 10, 2048};
    return {0xfffffc00u, 0, 1024};
}

DEVICE void clear(u32* hist, u32 words) {
    for (u32 i = threadIdx.x; i < words / 4; i += blockDim.x) ((uint4*)hist)[i] = make_uint4(0, 0, 0, 0);
}
DEVICE void count(u32* hist, const Digit& d, u32 key, u32 prefix) {
    if (key != 0 && (key & d.mask) == prefix) atomicAdd(&hist[d.of(key)], 1);
}

// Where the threshold lies: its bits so far, how many of the keys with these bits are still wanted, and how many
// keys there are.
template <int THREADS> struct Search {
    u32 threshold, want, total;
    u32* shared;  // a word per warp, and two

    // Thread t brings the counts of PER bins from BINS - 1 - PER * t down. No barrier is needed before the next
    // call as long as there is one before its counts are read.
    template <int PER> DEVICE void step(const Digit& d, const u32 (&bins)[PER], bool first) {
        const u32 warps = THREADS / 32;
        u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, mine = 0;
        u32* found = shared + warps;
#pragma unroll
        for (int i = 0; i < PER; i++) mine += bins[i];
        u32 of_warp = __reduce_add_sync(~0u, mine);
        if (lane == 0) shared[warp] = of_warp;
        __syncthreads();
        u32 w = lane < warps ? shared[lane] : 0;
        u32 before = __reduce_add_sync(~0u, lane < warp ? w : 0);
        if (first) total = __reduce_add_sync(~0u, w), want = min(want, total);
        if (before < want && want <= before + of_warp) {
            u32 incl = mine;
#pragma unroll
            for (int s = 1; s < 32; s <<= 1) {
                u32 y = __shfl_up_sync(~0u, incl, s);
                if (lane >= s) incl += y;
            }
            before += incl - mine;
#pragma unroll
            for (int i = 0; i < PER; i++) {
                if (before < want && want <= before + bins[i])
                    found[0] = BINS - 1 - PER * threadIdx.x - i, found[1] = before;
                before += bins[i];
            }
        }
        __syncthreads();
        if (want > 0) threshold |= found[0] << d.shift, want -= found[1];
    }
};

// Writes the larger keys and the first `ties` equal ones of a run of tokens, in order. `g` and `e` count those of
// either kind before the run.
struct Chosen {
    u32* out;
    u32 threshold, ties, g, e;
    DEVICE void put(u32 key, u32 token) {
        if (key > threshold) {
            out[g + min(e, ties)] = token, g++;
        } else if (key == threshold) {
            if (e < ties) out[g + e] = token;
            e++;
        }
    }
};

// Scores i .. i + 3, -infinity from n on.
DEVICE float4 four(const float* row, u32 i, u32 n, bool vectors) {
    float4 x = make_float4(NEG_INF, NEG_INF, NEG_INF, NEG_INF);
    if (vectors && i + 3 < n) return *(const float4*)(row + i);
    if (i < n) x.x = row[i];
    if (i + 1 < n) x.y = row[i + 1];
    if (i + 2 < n) x.z = row[i + 2];
    if (i + 3 < n) x.w = row[i + 3];
    return x;
}

// A warp's keys come in chunks of 128, four neighbours a thread; chunk j of the warp starts at `first` + 128 j.
template <int CHUNKS> struct InRegisters {
    static const u32 chunks = CHUNKS;
    u32 first;
    u32 keys[4 * CHUNKS];
    DEVICE uint4 chunk(u32 j) const {
        return make_uint4(keys[4 * j], keys[4 * j + 1], keys[4 * j + 2], keys[4 * j + 3]);
    }
};
struct InShared {
    u32 first, chunks, n, cached;
    const u32* keys;  // the first `cached`, a multiple of 4
    const float* row;
    DEVICE uint4 chunk(u32 j) const {
        u32 i = first + j * 128;
        if (i < cached) return *(const uint4*)(keys + i);
        if (i >= n) return make_uint4(0, 0, 0, 0);
        float4 x = four(row, i, n, false);
        return make_uint4(key_of(x.x), key_of(x.y), key_of(x.z), key_of(x.w));
    }
};

// Selects from this block's keys and those of its cluster. `hist`: [3][BINS] zeros, a histogram a digit, so that no
// block waits before it counts the next.
template <int THREADS, bool CLUSTER, class Keys>
DEVICE void choose(const Keys& keys, u32* hist, u32* out, u32* counts, u32 k) {
    const u32 WARPS = THREADS / 32, PER = BINS / THREADS;
    __shared__ u32 shared[WARPS + 2], warps[WARPS], block_total;
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u32 rank = CLUSTER ? cluster_rank() : 0, blocks = CLUSTER ? cluster_size() : 1;
    auto sync = [] {
        if (CLUSTER) cluster_sync();
        else __syncthreads();
    };

    Search<THREADS> s = {0, k, 0, shared};
    bool all = false;  // no more keys than wanted
#pragma unroll
    for (int i = 0; i < 3; i++) {
        Digit d = digit_of(i);
        if (all) continue;
        u32* mine = hist + i * BINS;
#pragma unroll
        for (u32 j = 0; j < keys.chunks; j++) {
            uint4 key = keys.chunk(j);
            count(mine, d, key.x, s.threshold), count(mine, d, key.y, s.threshold);
            count(mine, d, key.z, s.threshold), count(mine, d, key.w, s.threshold);
        }
        sync();
        u32 bins[PER];
#pragma unroll
        for (u32 p = 0; p < PER; p++) bins[p] = 0;
        const u32* top = mine + BINS - PER * (threadIdx.x + 1);
        if constexpr (CLUSTER) {
#pragma unroll
            for (u32 r = 0; r < MAX_CLUSTER; r++) {
                if (r >= blocks) continue;
                uint4 h = remote_words4(top, r);
                bins[0] += h.w, bins[1] += h.z, bins[2] += h.y, bins[3] += h.x;
            }
        } else {
#pragma unroll
            for (u32 p = 0; p < PER; p++) bins[p] = top[PER - 1 - p];
        }
        s.step(d, bins, i == 0);
        if (i == 0) all = s.total <= k;
    }
    if (rank == 0 && threadIdx.x == 0) *counts = min(k, s.total);

    Chosen c = {out, all ? LOWEST : s.threshold, all ? 0 : s.want, 0, 0};
    u32 larger = 0, equal = 0;
#pragma unroll
    for (u32 j = 0; j < keys.chunks; j++) {
        uint4 key = keys.chunk(j);
        larger += (key.x > c.threshold) + (key.y > c.threshold) + (key.z > c.threshold) + (key.w > c.threshold);
        equal += (key.x == c.threshold) + (key.y == c.threshold) + (key.z == c.threshold) + (key.w == c.threshold);
    }
    // The larger ones are fewer than k, the equal ones as many as there are keys: two sums.
    larger = __reduce_add_sync(~0u, larger), equal = __reduce_add_sync(~0u, equal);
    __shared__ u32 warps_equal[WARPS], block_equal;
    if (lane == 0) warps[warp] = larger, warps_equal[warp] = equal;
    __syncthreads();
    u32 l = lane < WARPS ? warps[lane] : 0, q = lane < WARPS ? warps_equal[lane] : 0;
    c.g = __reduce_add_sync(~0u, lane < warp ? l : 0), c.e = __reduce_add_sync(~0u, lane < warp ? q : 0);
    if constexpr (CLUSTER) {
        l = __reduce_add_sync(~0u, l), q = __reduce_add_sync(~0u, q);
        if (threadIdx.x == 0) block_total = l, block_equal = q;
        cluster_sync();
        l = lane < rank ? remote_word(&block_total, lane) : 0, q = lane < rank ? remote_word(&block_equal, lane) : 0;
        c.g += __reduce_add_sync(~0u, l), c.e += __reduce_add_sync(~0u, q);
        cluster_arrive();  // no block leaves before the others have read its memory
    }
    u32 below = (1u << lane) - 1;
#pragma unroll
    for (u32 j = 0; j < keys.chunks; j++) {
        u32 larger = 0, equal = 0, before_larger = 0, before_equal = 0;
        uint4 four_keys = keys.chunk(j);
        u32 key[4] = {four_keys.x, four_keys.y, four_keys.z, four_keys.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            u32 g = __ballot_sync(~0u, key[e] > c.threshold), q = __ballot_sync(~0u, key[e] == c.threshold);
            larger += __popc(g), before_larger += __popc(g & below);
            equal += __popc(q), before_equal += __popc(q & below);
        }
        if (larger + equal == 0) continue;
        Chosen part = c;
        part.g += before_larger, part.e += before_equal;
#pragma unroll
        for (int e = 0; e < 4; e++) part.put(key[e], keys.first + j * 128 + e);
        c.g += larger, c.e += equal;
    }
    if (CLUSTER) cluster_wait();
}

template <int CHUNKS>
DEVICE void row_in_registers(const float* row, u32 n, u32* out, u32* counts, u32 k) {
    extern __shared__ uint4 shared4[];
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    InRegisters<CHUNKS> keys;
    keys.first = (cluster_rank() * 16 + warp) * CHUNKS * 128 + lane * 4;
    bool vectors = ((u64)row & 15) == 0;
    float4 x[CHUNKS];
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) x[j] = four(row, keys.first + j * 128, n, vectors);
    clear((u32*)shared4, 3 * BINS);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
        keys.keys[4 * j] = key_of(x[j].x), keys.keys[4 * j + 1] = key_of(x[j].y);
        keys.keys[4 * j + 2] = key_of(x[j].z), keys.keys[4 * j + 3] = key_of(x[j].w);
    }
    choose<512, true>(keys, (u32*)shared4, out, counts, k);
}

DEVICE void row_in_shared(const float* row, u32 n, u32* out, u32* counts, u32 k, u32 capacity) {
    extern __shared__ uint4 shared4[];
    u32 *hist = (u32*)shared4, *kept = hist + 3 * BINS;
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u32 chunks = (n + 32 * 128 - 1) / (32 * 128), first = warp * chunks * 128 + lane * 4;
    u32 cached = min((n + 3) & ~3u, capacity & ~3u);
    clear(hist, 3 * BINS);
    bool vectors = ((u64)row & 15) == 0;
    for (u32 j = 0; j < chunks; j += 4) {
        float4 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = four(row, first + (j + i) * 128, j + i < chunks ? n : 0, vectors);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 at = first + (j + i) * 128;
            uint4 key = make_uint4(key_of(x[i].x), key_of(x[i].y), key_of(x[i].z), key_of(x[i].w));
            if (j + i < chunks && at < cached) *(uint4*)(kept + at) = key;
        }
    }
    __syncthreads();
    InShared keys = {first, chunks, n, cached, kept, row};
    choose<1024, false>(keys, hist, out, counts, k);
}

DEVICE u64 row_number(u32 rows_per_seq) { return (u64)blockIdx.z * rows_per_seq + blockIdx.y; }

#define KERNEL(KEYS, CHUNKS)                                                                        \
    extern "C" __global__ void __launch_bounds__(512)                                               \
        top_k_##KEYS(const float* scores, Seqs seqs, u32* indices, u32* counts, u32 rows_per_seq,   \
                     u32 k, u64 stride, u32) {                                                      \
        u64 r = row_number(rows_per_seq);                                                           \
        row_in_registers<CHUNKS>(scores + r * stride, seqs.get(blockIdx.z).kv_len, indices + r * k, \
                                 counts + r, k);                                                    \
    }
KERNEL(8, 2)
KERNEL(16, 4)
KERNEL(32, 8)
KERNEL(48, 12)

extern "C" __global__ void __launch_bounds__(1024)
top_k_shared(const float* scores, Seqs seqs, u32* indices, u32* counts, u32 rows_per_seq, u32 k, u64 stride,
             u32 capacity) {
    u64 r = row_number(rows_per_seq);
    row_in_shared(scores + r * stride, seqs.get(blockIdx.z).kv_len, indices + r * k, counts + r, k, capacity);
}
