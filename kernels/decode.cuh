// Decode attention on tensor cores, shared by attend_dense (all keys of a range) and attend_rows (listed keys).
//
// Work. A pair is a sequence and the query heads that read the same keys. With `splits` planes, block pair * splits +
// split reads that part of a pair. With one plane the rounds of all pairs, laid end to end, are cut into
// equal shares, one a block, so that ragged batches and any number of pairs fill the device: a block may end one pair
// and begin the next, and a pair that several blocks share is merged by the last of them to finish, in an order that
// the number of blocks fixes.
// Listed keys may have a cluster of blocks for each pair instead (`together`): nothing is counted first, and the blocks
// read each other's results from shared memory.
//
// Every warp walks its own keys, 16 at a time, through its own ring of shared tiles, so the main loop has no block barrier.
// A run of keys is copied by Hopper's copy engine, 16 keys an instruction: alone that reads 3.08 TB/s of an H100, cp.async
// of 16 bytes 2.98. The last keys of a sequence, the first of a window, listed keys and K in two pieces come by cp.async. The group's query heads
// are the (up to 16) rows of the mma tile, so a key row is read once for all of them. At the end the warps' results are
// merged through shared memory in warp order. A source of pairs names them and their keys; see `DensePairs`.
#pragma once
#include "cluster.cuh"
#include "decode_keys.cuh"

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

// Everything that a block does. It waits for the kernel before when it knows its share and has asked for the first keys, or
// at once where that kernel may have made the lists.
template <class T, int D, class Source>
DEVICE void early_decode(const AttendArgs& a, const Source& source, const Maps* maps = nullptr) {
    const u32 round = decode_round();
    bool early = !Source::listed || (a.together && a.lists_settled);
    if (!early) depend();
    Engine engine = {nullptr, nullptr, 0};
#if WGMMA
    if constexpr (!Source::listed && DecodeShape<D>::panels) {
        const u32 STAGES = DecodeShape<D>::stages;
        __shared__ u64 full[2 * DecodeShape<D>::warps][STAGES];
        if (a.mapped) {
            engine.maps = maps, engine.full = full[threadIdx.x >> 5];
            if ((threadIdx.x & 31) < STAGES) barrier_init(bar(engine.full[threadIdx.x & 31]), 1);
            fence_proxy();
            __syncwarp();
        }
    }
#endif
    if constexpr (Source::listed) {
        if (a.together) {
            u32 pair = blockIdx.x / cluster_size();
            // In turns, and not in one piece each, which would need the length first to be even.
            auto keys = source.whole(pair);
            Seq seq = source.seq(pair);
            if (seq.q_len == 0) return depend();  // all blocks of the cluster
            Heads heads = source.heads(pair);
            Found<D> f = read_keys<T, D>(a, seq, heads, keys, source.keep(pair), engine, early, cluster_rank(),
                                         cluster_size());
            join_cluster<T, D>(a, seq, heads, f);
            return;
        }
    }
    if (a.splits > 1) {
        u32 pair = blockIdx.x / a.splits, split = blockIdx.x % a.splits;
        Seq seq = source.seq(pair);
        if (seq.q_len == 0) return depend();
        Heads heads = source.heads(pair);
        Found<D> f = read_keys<T, D>(a, seq, heads, source.plane(pair, seq, split), source.keep(pair), engine,
                                     !Source::listed);
        put_all<T, D>(a, seq, heads, split, f);
        return;
    }
    Share share;
    if (!take_share(source, round, share)) return depend();
    u32 pair = share.pair, start = share.start, at = share.first;
    while (at < share.last) {
        u32 rounds = source.rounds(pair, round);
        if (rounds > 0) {
            u32 end = min(share.last, start + rounds);
            Seq seq = source.seq(pair);
            Heads heads = source.heads(pair);
            auto keys = source.keys(pair, seq, (at - start) * round, (end - start) * round);
            Found<D> f = read_keys<T, D>(a, seq, heads, keys, source.keep(pair), engine, !Source::listed && early);
            early = false;
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
