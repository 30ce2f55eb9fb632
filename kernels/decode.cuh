// Decode attention on tensor cores, shared by attend_dense (all keys of a range) and attend_rows (listed keys).
//
// Work. A pair is a sequence and the query heads that read the same keys. With `splits` planes, block pair * splits +
// split reads that part of a pair. With one plane the rounds of all pairs, laid end to end, are cut into
// equal shares, one a block, so that ragged batches and any number of pairs fill the device: a block may end one pair
// and begin the next, and a pair that several blocks share is merged by the last of them to finish, in block order.
// Listed keys may have a cluster of blocks for each pair instead (`together`): nothing is counted first, and the blocks
// read each other's results from shared memory.
//
// Every warp walks its own keys, 16 at a time, through its own ring of STAGES shared tiles filled by
// 16-byte cp.async, so the main loop has no block barrier. The group's query heads are the (up to 16) rows
// of the mma tile, so a key row is read once for all of them. At the end the warps' results are merged
// through shared memory in warp order. A source of pairs names them and their keys; see `DensePairs`.
#pragma once
#include "cluster.cuh"
#include "flash.cuh"

// Blocks that a multiprocessor holds, as far as registers go: shared memory leaves older GPUs two. Instead of them it may
// hold one of twice the warps, which leaves fewer parts to merge (parts.rs).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define DECODE_BLOCKS 2
#else
#define DECODE_BLOCKS 3
#endif
#define DECODE_BOUNDS(D) __launch_bounds__(DecodeShape<D>::warps * 32 * DECODE_BLOCKS, 1)

template <int D> struct DecodeShape {
    static const int warps = D > 128 ? 2 : 4;  // of a narrow block
    static const int stages = D <= 64 ? 4 : 2;
    static const int row = Padded<D>::value;
    static const int tile = 16 * row;  // elements of one K or V tile
    static const int ring = stages * 2 * tile;  // elements of one warp's ring
};

// Warps of this block, and keys that it reads at a time.
DEVICE u32 decode_warps() { return blockDim.x >> 5; }
DEVICE u32 decode_round() { return 16 * decode_warps(); }

// The query heads [head0, head0 + g) of a sequence, and the KV head that they read.
struct Heads {
    u32 kvh, head0, g;
};

// What a block has found of a pair, in shared memory: [g, D] sums of values, and of each head the top and the sum.
template <int D> struct Found {
    float* acc;
    float* tops;
    float* sums;
};

// The pair's query heads against entries [keys.begin(), keys.end()), whose rounds block `turn` of `turns` takes in turn.
// keep(first, valid, s): the products of a warp's 16 entries from `first` on, of which `valid` has the bits, as `logits`
// of flash.cuh leaves them.
template <class T, int D, class Keys, class Keep>
DEVICE Found<D> read_keys(const AttendArgs& a, const Seq& seq, const Heads& heads, const Keys& keys, const Keep& keep,
                          u32 turn = 0, u32 turns = 1) {
    typedef DecodeShape<D> Shape;
    extern __shared__ uint4 shared4[];
    T* q = (T*)shared4;
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    T* ring = q + Shape::tile + warp * Shape::ring;
    const u32 chunks = D / 8, g = heads.g, kvh = heads.kvh;

    // Lane l looks up key l % 16 of the warp's tile t. ~0 marks a key that is not there.
    const u32 skip = (turn * decode_warps() + warp) * 16, stride = turns * decode_round();
    const u32 first = keys.begin() + skip + (lane & 15), end = keys.end();
    auto token = [&](u32 t) {
        u32 i = first + t * stride;
        u32 token = i < keys.room() ? keys.token(i) : ~0u;
        return i < end ? token : ~0u;
    };
    auto locate = [&](u32 tok) { return tok < seq.kv_len ? a.pool.row(seq, kvh, tok) : ~0u; };
    u32 span = max(end, keys.begin()) - keys.begin();
    u32 tiles = span > skip ? (span - skip + stride - 1) / stride : 0;

    u64 masks = 0;  // 16 validity bits per stage
    auto fill = [&](u32 stage, u32 row_of_key) {
        u32 valid = __ballot_sync(~0u, row_of_key != ~0u) & 0xffff;
        masks = (masks & ~((u64)0xffff << (16 * stage))) | ((u64)valid << (16 * stage));
        T* k = ring + stage * 2 * Shape::tile;
        T* v = k + Shape::tile;
#pragma unroll
        for (u32 i = lane; i < 16 * chunks; i += 32) {
            u32 key = i / chunks, c = i % chunks;
            u32 row = __shfl_sync(~0u, row_of_key, key);
            bool ok = row != ~0u;
            u32 at = ok ? row : 0;
            copy16<Keys::in_order>(k + key * Shape::row + c * 8, (const T*)a.pool.k + a.pool.k_at(at, c * 8), ok);
            copy16<Keys::in_order>(v + key * Shape::row + c * 8, (const T*)a.pool.v + a.pool.v_at(at, c * 8), ok);
        }
    };

    // Lookups run ahead of the copies: the page of tile t + 1 and the index of tile t + 2 are on their way
    // while tile t is being filled.
    u32 fetch = 0, row_next = locate(token(0)), token_next = token(1);
    auto advance = [&]() {
        if (fetch < tiles) fill(fetch % Shape::stages, row_next);
        copy_commit();
        fetch++;
        row_next = locate(token_next);
        token_next = token(fetch + 1);
    };
    Flash<D> flash;
    flash.init();
#pragma unroll
    for (int s = 0; s < Shape::stages - 1; s++) advance();

    // The queries come while the first keys are on their way.
    const T* src = (const T*)a.q + ((u64)seq.q_start * a.heads + heads.head0) * D;
    for (u32 i = threadIdx.x; i < 16 * chunks; i += blockDim.x) {
        u32 h = i / chunks, c = i % chunks;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (h < g) x = load8(src + h * D + c * 8).v;
        *(uint4*)(q + h * Shape::row + c * 8) = x;
    }
    __syncthreads();
    typename QueryOf<T, D>::type query(q);

    for (u32 t = 0; t < tiles; t++) {
        advance();
        copy_wait<Shape::stages - 1>();
        __syncwarp();
        u32 stage = t % Shape::stages, mask = (u32)(masks >> (16 * stage)) & 0xffff;
        const T* k = ring + stage * 2 * Shape::tile;
        flash.template step<T, 16>(query, k, k + Shape::tile, a.scale * LOG2E, mask != 0xffff,
                                   [&](int, u32 key) { return (mask >> key & 1) != 0; },
                                   [&](const float(&s)[2][4]) { keep(keys.begin() + skip + t * stride, mask, s); });
        __syncwarp();
    }
    copy_wait<0>();
    flash.finish();
    __syncthreads();

    // Merge of the warps: tops and sums, then outputs, [warp][16][D] f32 over the rings.
    const u32 W = decode_warps();
    float* tops = (float*)shared4;
    float* sums = tops + W * 16;
    float* part = sums + W * 16;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 r = (lane >> 2) + 8 * h;
        if ((lane & 3) == 0) tops[warp * 16 + r] = flash.top[h], sums[warp * 16 + r] = flash.sum[h];
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            *(float2*)&part[(warp * 16 + r) * D + i * 8 + (lane & 3) * 2] =
                make_float2(flash.o[i][2 * h], flash.o[i][2 * h + 1]);
    }
    __syncthreads();
    // Each thread merges its elements into the plane of warp 0, which nobody else reads.
    Found<D> found = {part, part + W * 16 * D, part + W * 16 * D + 16};
    for (u32 i = threadIdx.x; i < g * D; i += blockDim.x) {
        u32 h = i / D;
        float top = NEG_INF, sum = 0.0f, acc = 0.0f;
        for (u32 w = 0; w < W; w++) top = fmaxf(top, tops[w * 16 + h]);
        float shift = top == NEG_INF ? 0.0f : top;
        for (u32 w = 0; w < W; w++) {
            float f = exp2_fast(tops[w * 16 + h] - shift);
            sum += f * sums[w * 16 + h];
            acc += f * part[w * 16 * D + i];
        }
        part[i] = acc;
        if (i % D == 0) found.tops[h] = top, found.sums[h] = sum;
    }
    __syncthreads();
    return found;
}

// One element of head `h` of the pair, from its sum of values, top and sum.
template <class T> DEVICE void put(const AttendArgs& a, u64 head, u32 c, u32 d, float acc, float top, float sum) {
    Out<T> out = {a.out, a.out_f32};
    out.put(head * d + c, sum > 0.0f ? acc / sum : 0.0f);
    if (c == 0 && a.lse) a.lse[head] = sum > 0.0f ? (top + log2f(sum)) * LN2 : NEG_INF;
}

template <class T, int D>
DEVICE void put_all(const AttendArgs& a, const Seq& seq, const Heads& heads, u32 split, const Found<D>& f) {
    u64 first = ((u64)split * a.rows + seq.q_start) * a.heads + heads.head0;
    for (u32 i = threadIdx.x; i < heads.g * D; i += blockDim.x) {
        u32 h = i / D;
        put<T>(a, first + h, i % D, D, f.acc[i], f.tops[h], f.sums[h]);
    }
}

// Rounds [first, last) of all pairs are this block's; `pair`, whose rounds begin at `start`, holds the first. Of the
// `blocks` that have any, the first `more` have one round more than the others.
struct Share {
    u32 blocks, each, more, first, last, pair, start;
    DEVICE u32 begin(u32 block) const { return block * each + min(block, more); }
    // The block that has a round.
    DEVICE u32 owner(u32 round) const {
        u32 of_larger = more * (each + 1);
        return round < of_larger ? round / (each + 1) : more + (round - of_larger) / each;
    }
};

// All threads of the block take part; false where there is nothing for it.
template <class Source> DEVICE bool take_share(const Source& source, u32 round, Share& share) {
    __shared__ u32 scratch[33], found[2];
    u32 n = source.pairs(), per = (n + blockDim.x - 1) / blockDim.x;
    u32 p0 = min(threadIdx.x * per, n), p1 = min(p0 + per, n), mine = 0, total;
    for (u32 p = p0; p < p1; p++) mine += source.rounds(p, round);
    u32 before = block_scan(mine, scratch, total);
    share.blocks = min(gridDim.x, total);
    if (blockIdx.x >= share.blocks) return false;
    share.each = total / share.blocks, share.more = total % share.blocks;
    share.first = share.begin(blockIdx.x), share.last = share.begin(blockIdx.x + 1);
    if (before <= share.first && share.first < before + mine) {
        u32 p = p0;
        for (u32 r = source.rounds(p, round); before + r <= share.first; r = source.rounds(++p, round)) before += r;
        found[0] = p, found[1] = before;
    }
    __syncthreads();
    share.pair = found[0], share.start = found[1];
    return true;
}

// The memory where blocks leave their parts of a pair that they share: two parts a block (it may end one pair and begin
// another), and of each pair how many parts are there, zero before and after the kernel.
template <int D> struct Parts {
    float* values;  // [blocks, 2, 16, D]
    float2* heads;  // [blocks, 2, 16]: top and sum
    u32* arrived;
    DEVICE Parts(const AttendArgs& a)
        : values(a.parts), heads((float2*)(a.parts + (u64)gridDim.x * 2 * 16 * D)), arrived(a.arrived) {}
};

// Leaves the block's part of `pair`, whose `rounds` begin at `start`; the last block to come merges all.
template <class T, int D>
DEVICE void join(const AttendArgs& a, const Seq& seq, const Heads& heads, const Share& share, u32 pair, u32 start,
                 u32 rounds, const Found<D>& f) {
    const u32 MOST = 512;  // most parts of a pair, as many as blocks (parts.rs)
    const u32 room = (DecodeShape<D>::tile + DecodeShape<D>::warps * DecodeShape<D>::ring) * sizeof(T);
    static_assert(MOST * 16 * sizeof(float) <= room, "the weights lie over the rings");
    const int AHEAD = 8;
    extern __shared__ uint4 shared4[];
    float(*weights)[16] = (float(*)[16])shared4;  // over what was found, once that has been left
    __shared__ u32 last;
    __shared__ float top_of[16], sum_of[16];
    Parts<D> parts(a);
    u32 g = heads.g, mine = blockIdx.x * 2 + (share.first < start ? 1 : 0);
    for (u32 i = threadIdx.x; i < g * D / 4; i += blockDim.x)
        ((float4*)(parts.values + (u64)mine * 16 * D))[i] = ((const float4*)f.acc)[i];
    if (threadIdx.x < g) parts.heads[mine * 16 + threadIdx.x] = make_float2(f.tops[threadIdx.x], f.sums[threadIdx.x]);
    __threadfence();
    __syncthreads();
    u32 b0 = share.owner(start), n = share.owner(start + rounds - 1) - b0 + 1;
    if (threadIdx.x == 0) last = atomicAdd(parts.arrived + pair, 1) + 1 == n;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) parts.arrived[pair] = 0;
    // Only the first block of a pair may have begun with another one.
    u32 part0 = b0 * 2 + (share.begin(b0) < start ? 1 : 0);
    auto part = [&](u32 i) { return i == 0 ? part0 : (b0 + i) * 2; };
    // Of each head, by one warp: the top, and the sum of the sums.
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (u32 h = warp; h < g; h += blockDim.x >> 5) {
        float top = NEG_INF, sum = 0.0f;
        for (u32 i = lane; i < n; i += 32) top = fmaxf(top, load_l2(parts.heads + part(i) * 16 + h).x);
        top = warp_max(top);
        float shift = top == NEG_INF ? 0.0f : top;
        for (u32 i = lane; i < n; i += 32) {
            float2 x = load_l2(parts.heads + part(i) * 16 + h);
            float w = exp2_fast(x.x - shift);
            weights[i][h] = w;
            sum += w * x.y;
        }
        sum = warp_sum(sum);
        if (lane == 0) top_of[h] = top, sum_of[h] = sum;
    }
    __syncthreads();
    u64 first = (u64)seq.q_start * a.heads + heads.head0;
    for (u32 i = threadIdx.x; i < g * D / 4; i += blockDim.x) {
        u32 h = i * 4 / D;
        float top = top_of[h], sum = sum_of[h];
        float acc[4] = {};
        for (u32 p0 = 0; p0 < n; p0 += AHEAD) {
            float4 x[AHEAD];
            float w[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                u32 p = min(p0 + j, n - 1);
                x[j] = load_l2((const float4*)(parts.values + (u64)part(p) * 16 * D) + i);
                w[j] = p0 + j < n ? weights[p][h] : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                acc[0] = fmaf(w[j], x[j].x, acc[0]), acc[1] = fmaf(w[j], x[j].y, acc[1]);
                acc[2] = fmaf(w[j], x[j].z, acc[2]), acc[3] = fmaf(w[j], x[j].w, acc[3]);
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++) put<T>(a, first + h, i * 4 % D + e, D, acc[e], top, sum);
    }
}

// Merges what the blocks of a cluster found of a pair, in their order.
template <class T, int D>
DEVICE void join_cluster(const AttendArgs& a, const Seq& seq, const Heads& heads, const Found<D>& f) {
    const u32 blocks = cluster_size();
    u64 first = (u64)seq.q_start * a.heads + heads.head0;
    cluster_sync();
    for (u32 i = threadIdx.x * blocks + cluster_rank(); i < heads.g * D / 4; i += blockDim.x * blocks) {
        u32 h = i * 4 / D;
        float tops[MAX_CLUSTER], sums[MAX_CLUSTER], top = NEG_INF, sum = 0.0f, acc[4] = {};
        float4 x[MAX_CLUSTER];
#pragma unroll
        for (u32 r = 0; r < MAX_CLUSTER; r++) {
            u32 from = min(r, blocks - 1);
            tops[r] = remote_float(f.tops + h, from), sums[r] = remote_float(f.sums + h, from);
            x[r] = remote_float4((const float4*)f.acc + i, from);
            if (r >= blocks) tops[r] = NEG_INF;
            top = fmaxf(top, tops[r]);
        }
        float shift = top == NEG_INF ? 0.0f : top;
#pragma unroll
        for (u32 r = 0; r < MAX_CLUSTER; r++) {
            float w = exp2_fast(tops[r] - shift);
            sum = fmaf(w, sums[r], sum);
            acc[0] = fmaf(w, x[r].x, acc[0]), acc[1] = fmaf(w, x[r].y, acc[1]);
            acc[2] = fmaf(w, x[r].z, acc[2]), acc[3] = fmaf(w, x[r].w, acc[3]);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) put<T>(a, first + h, i * 4 % D + e, D, acc[e], top, sum);
    }
    // No block leaves before the others have read its memory.
    cluster_arrive_read(), cluster_wait();
}

// Everything that a block does.
template <class T, int D, class Source> DEVICE void decode(const AttendArgs& a, const Source& source) {
    const u32 round = decode_round();
    if constexpr (Source::listed) {
        if (a.together) {
            u32 pair = blockIdx.x / cluster_size();
            // In turns, and not in one piece each, which would need the length first to be even.
            auto keys = source.whole(pair);
            Seq seq = source.seq(pair);
            if (seq.q_len == 0) return;  // all blocks of the cluster
            Heads heads = source.heads(pair);
            Found<D> f = read_keys<T, D>(a, seq, heads, keys, source.keep(pair), cluster_rank(), cluster_size());
            join_cluster<T, D>(a, seq, heads, f);
            return;
        }
    }
    if (a.splits > 1) {
        u32 pair = blockIdx.x / a.splits, split = blockIdx.x % a.splits;
        Seq seq = source.seq(pair);
        if (seq.q_len == 0) return;
        Heads heads = source.heads(pair);
        Found<D> f = read_keys<T, D>(a, seq, heads, source.plane(pair, seq, split), source.keep(pair));
        put_all<T, D>(a, seq, heads, split, f);
        return;
    }
    Share share;
    if (!take_share(source, round, share)) return;
    u32 pair = share.pair, start = share.start, at = share.first;
    while (at < share.last) {
        u32 rounds = source.rounds(pair, round);
        if (rounds > 0) {
            u32 end = min(share.last, start + rounds);
            Seq seq = source.seq(pair);
            Heads heads = source.heads(pair);
            auto keys = source.keys(pair, seq, (at - start) * round, (end - start) * round);
            Found<D> f = read_keys<T, D>(a, seq, heads, keys, source.keep(pair));
            if (at == start && end == start + rounds) put_all<T, D>(a, seq, heads, 0, f);
            else join<T, D>(a, seq, heads, share, pair, start, rounds, f);
            __syncthreads();
            at = end;
        }
        start += rounds, pair++;
    }
}
