// top_k: the k largest of kv_len scores per row as ascending token indices; exact and deterministic.
//
// Scores become u32 keys of the same order (-0 as +0; NaN and -infinity get key 0 and are never
// chosen). A radix select over 11 + 11 + 10 bits finds the k-th largest key; a compaction in index order
// then takes every larger key and the first few equal ones, so ties go to the smaller index.
//
// Plan: one cluster of blocks per (row, sequence). A block of 512 threads holds KEYS keys a thread in
// registers, so device memory is read once, with all loads under way together. Each digit's histogram is
// counted in shared memory (increments by one that meet in a word are joined by the hardware, so crowded bins
// cost little); the blocks of a cluster add up each other's. `top_k_long` is for rows beyond what a cluster's registers hold: one block,
// keys in shared memory where they fit.
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
struct Search {
    u32 threshold, want, total;
    u32* scratch;  // 33 words
    u32* found;    // 2 words

    // Thread t brings the counts of PER bins from `top` = BINS - 1 - PER * t down.
    template <int PER> DEVICE void step(const Digit& d, const u32 (&bins)[PER], bool first) {
        u32 mine = 0, all;
#pragma unroll
        for (int i = 0; i < PER; i++) mine += bins[i];
        u32 before = block_scan(mine, scratch, all), top = BINS - 1 - PER * threadIdx.x;
        if (first) total = all, want = min(want, all);
        if (before < want && want <= before + mine) {
#pragma unroll
            for (int i = 0; i < PER; i++) {
                if (before < want && want <= before + bins[i]) found[0] = top - i, found[1] = before;
                before += bins[i];
            }
        }
        __syncthreads();
        if (want > 0) threshold |= found[0] << d.shift, want -= found[1];
        __syncthreads();
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
    // Larger keys in the high half, equal ones in the low half.
    DEVICE u32 kind(u32 key) const { return key > threshold ? 0x10000u : key == threshold ? 1 : 0; }
};

#define THREADS 512u

template <int KEYS>
DEVICE void row_in_registers(const float* scores, u32 n, u32* out, u32* counts, u32 k) {
    extern __shared__ uint4 shared4[];
    u32* hist = (u32*)shared4;  // [3][BINS]: one a digit, so that no block waits before it counts the next
    __shared__ u32 scratch[33], found[2], warps[THREADS / 32], block_total;
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, rank = cluster_rank();

    // A warp owns neighbouring tokens; a thread four neighbours of every 128.
    u32 first = (rank * THREADS + warp * 32) * KEYS + lane * 4;
    u32 key[KEYS];
    bool vectors = ((u64)scores & 15) == 0;
    float4 x[KEYS / 4];
#pragma unroll
    for (int j = 0; j < KEYS / 4; j++) {
        u32 i = first + j * 128;
        x[j] = make_float4(NEG_INF, NEG_INF, NEG_INF, NEG_INF);
        if (vectors && i + 3 < n) {
            x[j] = *(const float4*)(scores + i);
        } else {
            if (i < n) x[j].x = scores[i];
            if (i + 1 < n) x[j].y = scores[i + 1];
            if (i + 2 < n) x[j].z = scores[i + 2];
            if (i + 3 < n) x[j].w = scores[i + 3];
        }
    }
    clear(hist, 3 * BINS);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < KEYS / 4; j++) {
        key[4 * j] = key_of(x[j].x), key[4 * j + 1] = key_of(x[j].y);
        key[4 * j + 2] = key_of(x[j].z), key[4 * j + 3] = key_of(x[j].w);
    }

    Search s = {0, k, 0, scratch, found};
    bool all = false;  // no more keys than wanted
#pragma unroll
    for (int i = 0; i < 3; i++) {
        Digit d = digit_of(i);
        if (all) continue;
        u32* mine = hist + i * BINS;
#pragma unroll
        for (int j = 0; j < KEYS; j++) count(mine, d, key[j], s.threshold);
        cluster_sync();
        u32 bins[4] = {0, 0, 0, 0};
        const u32 blocks = cluster_size();
#pragma unroll
        for (u32 r = 0; r < MAX_CLUSTER; r++) {
            if (r >= blocks) continue;
            uint4 h = remote_words4(mine + BINS - 4 - 4 * threadIdx.x, r);
            bins[0] += h.w, bins[1] += h.z, bins[2] += h.y, bins[3] += h.x;
        }
        s.step(d, bins, i == 0);
        if (i == 0) all = s.total <= k;
    }
    if (rank == 0 && threadIdx.x == 0) *counts = min(k, s.total);

    Chosen c = {out, all ? LOWEST : s.threshold, all ? 0 : s.want, 0, 0};
    u32 mine = 0;
#pragma unroll
    for (int j = 0; j < KEYS; j++) mine += c.kind(key[j]);
    mine = __reduce_add_sync(~0u, mine);
    if (lane == 0) warps[warp] = mine;
    __syncthreads();
    u32 sum = 0;
#pragma unroll
    for (u32 w = 0; w < THREADS / 32; w++) {
        if (w == warp) c.g = sum >> 16, c.e = sum & 0xffff;
        sum += warps[w];
    }
    if (threadIdx.x == 0) block_total = sum;
    cluster_sync();
    u32 before = lane < rank ? remote_word(&block_total, lane) : 0;
    c.g += __reduce_add_sync(~0u, before >> 16), c.e += __reduce_add_sync(~0u, before & 0xffff);
    cluster_arrive();  // no block leaves before the others have read its memory
    u32 below = (1u << lane) - 1;
#pragma unroll
    for (int j = 0; j < KEYS / 4; j++) {
        u32 larger = 0, equal = 0, before_larger = 0, before_equal = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            u32 g = __ballot_sync(~0u, key[4 * j + e] > c.threshold);
            u32 q = __ballot_sync(~0u, key[4 * j + e] == c.threshold);
            larger += __popc(g), before_larger += __popc(g & below);
            equal += __popc(q), before_equal += __popc(q & below);
        }
        if (larger + equal == 0) continue;
        Chosen part = c;
        part.g += before_larger, part.e += before_equal;
#pragma unroll
        for (int e = 0; e < 4; e++) part.put(key[4 * j + e], first + j * 128 + e);
        c.g += larger, c.e += equal;
    }
    cluster_wait();
}

DEVICE void row_in_shared(const float* row, u32 n, u32* out, u32* counts, u32 k, u32 capacity) {
    extern __shared__ uint4 shared4[];
    u32* hist = (u32*)shared4;
    u32* keys = hist + BINS;  // the first `cached`
    __shared__ u32 scratch[33], found[2];
    u32 cached = min(n, capacity);
    auto key_at = [&](u32 i) { return i < cached ? keys[i] : key_of(row[i]); };

    Search s = {0, k, 0, scratch, found};
    bool all = false;
#pragma unroll
    for (int i = 0; i < 3; i++) {
        Digit d = digit_of(i);
        if (all) continue;
        clear(hist, BINS);
        __syncthreads();
#pragma unroll 4
        for (u32 t = threadIdx.x; t < n; t += 1024) {
            u32 key = i == 0 ? key_of(row[t]) : key_at(t);
            if (i == 0 && t < cached) keys[t] = key;
            count(hist, d, key, s.threshold);
        }
        __syncthreads();
        u32 bins[2] = {hist[BINS - 1 - 2 * threadIdx.x], hist[BINS - 2 - 2 * threadIdx.x]};
        s.step(d, bins, i == 0);
        if (i == 0) all = s.total <= k;
    }
    if (threadIdx.x == 0) *counts = min(k, s.total);
    // Four neighbouring keys a thread; the scan counts larger keys (high half) and equal ones.
    Chosen c = {out, all ? LOWEST : s.threshold, all ? 0 : s.want, 0, 0};
    for (u32 t = 0; t < n; t += 1024 * 4) {
        u32 i0 = t + threadIdx.x * 4, key[4], mine = 0, sum;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            key[j] = i0 + j < n ? key_at(i0 + j) : 0;
            mine += c.kind(key[j]);
        }
        u32 scan = block_scan(mine, scratch, sum);
        Chosen part = c;
        part.g += scan >> 16, part.e += scan & 0xffff;
#pragma unroll
        for (u32 j = 0; j < 4; j++) part.put(key[j], i0 + j);
        c.g += sum >> 16, c.e += sum & 0xffff;
    }
}

DEVICE u64 row_number(u32 rows_per_seq) { return (u64)blockIdx.z * rows_per_seq + blockIdx.y; }

#define KERNEL(KEYS, BLOCKS)                                                                        \
    extern "C" __global__ void __launch_bounds__(512, BLOCKS)                                       \
        top_k_##KEYS(const float* scores, Seqs seqs, u32* indices, u32* counts, u32 rows_per_seq,   \
                     u32 k, u64 stride, u32) {                                                      \
        u64 r = row_number(rows_per_seq);                                                           \
        row_in_registers<KEYS>(scores + r * stride, seqs.get(blockIdx.z).kv_len, indices + r * k,   \
                               counts + r, k);                                                      \
    }
KERNEL(8, 2)
KERNEL(16, 2)
KERNEL(32, 2)
KERNEL(64, 1)

extern "C" __global__ void __launch_bounds__(1024)
top_k_long(const float* scores, Seqs seqs, u32* indices, u32* counts, u32 rows_per_seq, u32 k, u64 stride,
           u32 capacity) {
    u64 r = row_number(rows_per_seq);
    row_in_shared(scores + r * stride, seqs.get(blockIdx.z).kv_len, indices + r * k, counts + r, k, capacity);
}
