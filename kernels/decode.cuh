// Decode attention on tensor cores, shared by attend_dense (all keys of a range) and attend_rows (listed keys).
//
// Work. A pair is a sequence and the query heads that read the same keys. With `splits` planes, block pair * splits +
// split reads that part of a pair. With one plane the rounds of all pairs, laid end to end, are cut into
// equal shares, one a block, so that ragged batches and any number of pairs fill the device: a block may end one pair
// and begin the next, and a pair that several blocks share is merged by the last of them to finish, in block order.
// Listed keys may have a cluster of blocks for each pair instead (`together`): nothing is counted first, and the blocks
// read each other's results from shared memory.
//
// Every warp walks its own keys, 16 at a time, through its own ring of shared tiles, so the main loop has no block barrier.
// A run of keys is copied by Hopper's copy engine, 16 keys an instruction: alone that reads 3.08 TB/s of an H100, cp.async
// of 16 bytes 2.98. The last keys of a sequence, listed keys and K in two pieces come by cp.async. The group's query heads
// are the (up to 16) rows of the mma tile, so a key row is read once for all of them. At the end the warps' results are
// merged through shared memory in warp order. A source of pairs names them and their keys; see `DensePairs`.
#pragma once
#include "cluster.cuh"
#include "flash.cuh"
#include "hopper.cuh"

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
    static const bool panels = D % 64 == 0;          // else padded rows
    static const int query = 16 * Padded<D>::value;     // elements of the queries' tile
    static const int tile = panels ? 16 * D : query;    // of one K or V tile
    static const int ring = stages * 2 * tile;          // of one warp's ring
};
template <class T, int D, bool PANELS> struct DecodeRows {
    typedef PanelRows<T, D, 16> type;
};
template <class T, int D> struct DecodeRows<T, D, false> {
    typedef PaddedRows<T, D> type;
};

// K and V for the copy engine in boxes of 16 rows.
struct Maps {
    TensorMap of[2];
};
template <int N> struct Bits {
    typedef u64 type;
};
template <> struct Bits<32> {
    typedef u32 type;
};

// What the warp waits for the copy engine with: a barrier of each stage, and which phase each is in.
struct Engine {
    const Maps* maps;  // null: none
    u64* full;
    u32 phases;
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

// Shared memory of the block: the warps' rings, then the queries. The copy engine swizzles by address.
template <bool PANELS> DEVICE uint4* decode_shared() {
    extern __shared__ uint4 shared4[];
    return PANELS ? shared4 + (-shared_address(shared4) & 1023) / 16 : shared4;
}

// The pair's query heads against entries [keys.begin(), keys.end()), whose rounds block `turn` of `turns` takes in turn.
// A run of keys begins at a multiple of 16, so that a tile lies in one page.
// keep(first, valid, s): the products of a warp's 16 entries from `first` on, of which `valid` has the bits, as `logits`
// of flash.cuh leaves them.
template <class T, int D, class Keys, class Keep>
DEVICE Found<D> read_keys(const AttendArgs& a, const Seq& seq, const Heads& heads, const Keys& keys, const Keep& keep,
                          Engine& engine, u32 turn = 0, u32 turns = 1) {
    typedef DecodeShape<D> Shape;
    typedef typename DecodeRows<T, D, Shape::panels>::type Rows;
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    T* ring = (T*)decode_shared<Shape::panels>() + warp * Shape::ring;
    T* q = (T*)decode_shared<Shape::panels>() + decode_warps() * Shape::ring;
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

    typename Bits<16 * Shape::stages>::type masks = 0;  // 16 validity bits per stage
    auto fill = [&](u32 stage, u32 row_of_key) {
        u32 valid = __ballot_sync(~0u, row_of_key != ~0u) & 0xffff;
        masks = (masks & ~((decltype(masks))0xffff << (16 * stage))) | ((decltype(masks))valid << (16 * stage));
        T* k = ring + stage * 2 * Shape::tile;
        T* v = k + Shape::tile;
#if WGMMA
        if (Keys::in_order && engine.maps && valid == 0xffff) {
            if (lane == 0) {
                u32 full = bar(engine.full[stage]);
                barrier_expect(full, 2 * Shape::tile * sizeof(T));
                copy_box(shared_address(k), engine.maps->of[0], row_of_key, 0, full);
                copy_box(shared_address(v), engine.maps->of[1], row_of_key, 0, full);
            }
            return;
        }
#endif
#pragma unroll
        for (u32 i = lane; i < 16 * chunks; i += 32) {
            u32 key = i / chunks, c = i % chunks;
            u32 row = __shfl_sync(~0u, row_of_key, key);
            bool ok = row != ~0u;
            u32 at = ok ? row : 0;
            copy16<Keys::in_order>(Rows::place(k, key, c), (const T*)a.pool.k + a.pool.k_at(at, c * 8), ok);
            copy16<Keys::in_order>(Rows::place(v, key, c), (const T*)a.pool.v + a.pool.v_at(at, c * 8), ok);
        }
    };

    // Lookups run ahead of the copies: the page of tile t + 1 and the index of tile t + 2 are on their way
    // while tile t is being filled.
    u32 row_next = locate(token(0)), token_next = token(1);
    auto advance = [&](u32 t) {
        if (t < tiles) fill(t % Shape::stages, row_next);
        copy_commit();
        row_next = locate(token_next);
        token_next = token(t + 2);
    };
    Flash<D> flash;
    flash.init();
#pragma unroll
    for (int s = 0; s < Shape::stages - 1; s++) advance(s);

    // The queries come while the first keys are on their way.
    const T* src = (const T*)a.q + ((u64)seq.q_start * a.heads + heads.head0) * D;
    for (u32 i = threadIdx.x; i < 16 * chunks; i += blockDim.x) {
        u32 h = i / chunks, c = i % chunks;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (h < g) x = load8(src + h * D + c * 8).v;
        *(uint4*)(q + h * Padded<D>::value + c * 8) = x;
    }
    __syncthreads();
    typename QueryOf<T, D>::type query(q);

    for (u32 t = 0; t < tiles; t++) {
        advance(t + Shape::stages - 1);
        copy_wait<Shape::stages - 1>();
        u32 stage = t % Shape::stages, mask = (u32)(masks >> (16 * stage)) & 0xffff;
#if WGMMA
        if (Keys::in_order && engine.maps && mask == 0xffff) {
            barrier_wait(bar(engine.full[stage]), engine.phases >> stage & 1);
            engine.phases ^= 1u << stage;
        }
#endif
        __syncwarp();
        const Rows k = {ring + stage * 2 * Shape::tile}, v = {k.at + Shape::tile};
        flash.template step<T, 16>(query, k, v, a.scale * LOG2E, mask != 0xffff,
                                   [&](int, u32 key) { return (mask >> key & 1) != 0; },
                                   [&](const float(&s)[2][4]) { keep(keys.begin() + skip + t * stride, mask, s); });
        __syncwarp();
    }
    copy_wait<0>();
    flash.finish();
    __syncthreads();

    // Merge of the warps: tops and sums, then outputs, [warp][16][D] f32 over the rings.
    const u32 W = decode_warps();
    float* tops = (float*)decode_shared<Shape::panels>();
    float* sums = tops + W * 16;
    float* part = sums + W * 16;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 r = (lane >> 2) + 8 * h;
        if (r >= g) continue;
        if ((lane & 3) == 0) tops[warp * 16 + r] = flash.top[h], sums[warp * 16 + r] = flash.sum[h];
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            *(float2*)&part[(warp * 16 + r) * D + i * 8 + (lane & 3) * 2] =
                make_float2(flash.o[i][2 * h], flash.o[i][2 * h + 1]);
    }
    __syncthreads();
    // Each thread merges its elements into the plane of warp 0, which nobody else reads.
    Found<D> found = {part, part + W * 16 * D, part + W * 16 * D + 16};
    for (u32 i = threadIdx.x; i < g * D / 2; i += blockDim.x) {
        u32 h = i * 2 / D;
        float top = NEG_INF, sum = 0.0f;
        float2 acc = make_float2(0.0f, 0.0f);
        for (u32 w = 0; w < W; w++) top = fmaxf(top, tops[w * 16 + h]);
        float shift = top == NEG_INF ? 0.0f : top;
        for (u32 w = 0; w < W; w++) {
            float f = exp2_fast(tops[w * 16 + h] - shift);
            float2 x = ((const float2*)part)[w * 8 * D + i];
            sum += f * sums[w * 16 + h];
            acc.x += f * x.x, acc.y += f * x.y;
        }
        ((float2*)part)[i] = acc;
        if (i * 2 % D == 0) found.tops[h] = top, found.sums[h] = sum;
    }
    __syncthreads();
    return found;
}

// Four elements of a head from `c` on, from its sums of values, top and sum.
template <class T> DEVICE void put4(const AttendArgs& a, u64 head, u32 c, u32 d, float4 acc, float top, float sum) {
    Out<T> out = {a.out, a.out_f32};
    bool any = sum > 0.0f;
    out.put2(head * d + c, any ? acc.x / sum : 0.0f, any ? acc.y / sum : 0.0f);
    out.put2(head * d + c + 2, any ? acc.z / sum : 0.0f, any ? acc.w / sum : 0.0f);
    if (c == 0 && a.lse) a.lse[head] = sum > 0.0f ? (top + log2f(sum)) * LN2 : NEG_INF;
}

template <class T, int D>
DEVICE void put_all(const AttendArgs& a, const Seq& seq, const Heads& heads, u32 split, const Found<D>& f) {
    u64 first = ((u64)split * a.rows + seq.q_start) * a.heads + heads.head0;
    for (u32 i = threadIdx.x; i < heads.g * D / 4; i += blockDim.x) {
        u32 h = i * 4 / D;
        put4<T>(a, first + h, i * 4 % D, D, ((const float4*)f.acc)[i], f.tops[h], f.sums[h]);
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

// Sums of weights and weighted values relative to the largest top so far.
struct Merged {
    float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float top = NEG_INF, sum = 0.0f;
    DEVICE void add(const float4& x, float of_top, float of_sum) {
        float to = fmaxf(top, of_top), shift = to == NEG_INF ? 0.0f : to;
        float fix = exp2_fast(top - shift), w = exp2_fast(of_top - shift);
        top = to, sum = fmaf(w, of_sum, sum * fix);
        acc.x = fmaf(w, x.x, acc.x * fix), acc.y = fmaf(w, x.y, acc.y * fix);
        acc.z = fmaf(w, x.z, acc.z * fix), acc.w = fmaf(w, x.w, acc.w * fix);
    }
};

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
    const int AHEAD = 10;
    __shared__ u32 last;
    Parts<D> parts(a);
    u32 g = heads.g, mine = blockIdx.x * 2 + (share.first < start ? 1 : 0);
    for (u32 i = threadIdx.x; i < g * D / 4; i += blockDim.x)
        ((float4*)(parts.values + (u64)mine * 16 * D))[i] = ((const float4*)f.acc)[i];
    if (threadIdx.x < g) parts.heads[mine * 16 + threadIdx.x] = make_float2(f.tops[threadIdx.x], f.sums[threadIdx.x]);
    __syncthreads();
    u32 b0 = share.owner(start), n = share.owner(start + rounds - 1) - b0 + 1;
    if (threadIdx.x == 0) last = add_acq_rel(parts.arrived + pair, 1) + 1 == n;
    __syncthreads();
    if (!last) return;
    if (threadIdx.x == 0) parts.arrived[pair] = 0;
    // Only the first block of a pair may have begun with another one.
    u32 part0 = b0 * 2 + (share.begin(b0) < start ? 1 : 0);
    auto part = [&](u32 i) { return i == 0 ? part0 : (b0 + i) * 2; };
    // Four numbers a thread. Where those are fewer than threads, teams of threads take the parts in turn, and the first
    // merges what the others found.
    const u32 items = g * D / 4, teams = max(blockDim.x / items, 1u), team = teams > 1 ? threadIdx.x / items : 0;
    float4* others = (float4*)f.acc;  // over what was found: it has been left; [teams - 1, items]
    float2* weights = (float2*)(others + (teams - 1) * items);
    u64 first = (u64)seq.q_start * a.heads + heads.head0;
    for (u32 from = 0; from < items; from += blockDim.x) {
        u32 i = teams > 1 ? threadIdx.x % items : from + threadIdx.x, h = i * 4 / D;
        Merged all;
        for (u32 p0 = i < items && team < teams ? team : n; p0 < n; p0 += AHEAD * teams) {
            float4 x[AHEAD];
            float2 w[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                u32 p = min(p0 + j * teams, n - 1);
                x[j] = load_l2((const float4*)(parts.values + (u64)part(p) * 16 * D) + i);
                w[j] = load_l2(parts.heads + part(p) * 16 + h);
                if (p0 + j * teams >= n) w[j].x = NEG_INF;
            }
#pragma unroll
            for (int j = 0; j < AHEAD; j++) all.add(x[j], w[j].x, w[j].y);
        }
        if (teams > 1) {
            u32 at = (team - 1) * items + i;
            if (team > 0 && team < teams) others[at] = all.acc, weights[at] = make_float2(all.top, all.sum);
            __syncthreads();
        }
        if (i >= items || team > 0) continue;
        for (u32 t = 1; t < teams; t++) {
            float2 w = weights[(t - 1) * items + i];
            all.add(others[(t - 1) * items + i], w.x, w.y);
        }
        put4<T>(a, first + h, i * 4 % D, D, all.acc, all.top, all.sum);
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
        put4<T>(a, first + h, i * 4 % D, D, make_float4(acc[0], acc[1], acc[2], acc[3]), top, sum);
    }
    // No block leaves before the others have read its memory.
    cluster_arrive_read(), cluster_wait();
}

// Everything that a block does.
template <class T, int D, class Source>
DEVICE void decode(const AttendArgs& a, const Source& source, const Maps* maps = nullptr) {
    const u32 round = decode_round();
    Engine engine = {nullptr, nullptr, 0};
#if WGMMA
    if constexpr (!Source::listed && DecodeShape<D>::panels) {
        const u32 STAGES = DecodeShape<D>::stages;
        __shared__ u64 full[2 * DecodeShape<D>::warps][STAGES];
        if (a.mapped) {
            engine.maps = maps, engine.full = full[threadIdx.x >> 5];
            if ((threadIdx.x & 31) < STAGES) barrier_init(bar(engine.full[threadIdx.x & 31]), 1);
            fence_proxy();
        }
    }
#endif
    if constexpr (Source::listed) {
        if (a.together) {
            u32 pair = blockIdx.x / cluster_size();
            // In turns, and not in one piece each, which would need the length first to be even.
            auto keys = source.whole(pair);
            Seq seq = source.seq(pair);
            if (seq.q_len == 0) return;  // all blocks of the cluster
            Heads heads = source.heads(pair);
            Found<D> f = read_keys<T, D>(a, seq, heads, keys, source.keep(pair), engine, cluster_rank(), cluster_size());
            join_cluster<T, D>(a, seq, heads, f);
            return;
        }
    }
    if (a.splits > 1) {
        u32 pair = blockIdx.x / a.splits, split = blockIdx.x % a.splits;
        Seq seq = source.seq(pair);
        if (seq.q_len == 0) return;
        Heads heads = source.heads(pair);
        Found<D> f = read_keys<T, D>(a, seq, heads, source.plane(pair, seq, split), source.keep(pair), engine);
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
            Found<D> f = read_keys<T, D>(a, seq, heads, keys, source.keep(pair), engine);
            if (at == start && end == start + rounds) put_all<T, D>(a, seq, heads, 0, f);
            else join<T, D>(a, seq, heads, share, pair, start, rounds, f);
#if WGMMA
            if (engine.maps) fence_proxy();  // what has been written over the rings, before the copy engine writes there
#endif
            __syncthreads();
            at = end;
        }
        start += rounds, pair++;
    }
}
