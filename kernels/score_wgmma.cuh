// score_tiles on Hopper's tensor cores: S^T = K Q^T by wgmma, so that the sum over vectors stays inside a thread.
//
// A CTA takes jobs one after another: a list of two tiles of up to 128 vectors that share their pages (or of one tile of
// up to 256), over a range of keys. Warpgroup 0 copies the vectors once and streams the keys, 128 at a time; 1 and 2
// have 64 keys each. Products of 64 keys with 128 vectors alternate between two accumulators: while one is summed up
// (MUFU has as many cycles of work as the tensor cores), the other is worked out, from the first tile of a job to its
// last without a break.
#pragma once
#include "hopper.cuh"
#include "paged.cuh"

struct ScoreTilesArgs {
    const void* q;
    const float* lse;
    Seqs seqs;
    Pool pool;
    float* scores;
    u64 stride;
    float scale;
    u32 heads, lists, pad;
};
static_assert(sizeof(ScoreTilesArgs) == 96, "as ScoreTilesArgs of tiles.rs");

// What a launch covers: tiles, tiles a job takes (2, or 1 of up to 256 vectors), jobs over the tiles, ranges of keys and
// their length in tiles of 128.
struct Jobs {
    u32 tiles, per, groups, ranges, length;
    u32 mapped;  // K lies in one piece, and `keys` of the kernel describes it
};
static_assert(sizeof(Jobs) == 24, "as Jobs of hopper.rs");

#if WGMMA

// 128 vectors of one tile; not there: no `vectors` and no `kv_len`.
struct Block {
    u32 tile, q_start, vectors, v0, kv_len, first;  // first: position of the tile's first row
};

struct ScoreItem {
    Block block[2];
    u32 t0, plain, t1;  // tiles of keys, t0 = ~0: the CTA is done; all vectors see those before `plain`
    u32 list, joined;   // both blocks are of one tile
};

template <int S> struct ScoreControl {
    u64 q_full, q_empty, k_full[S], k_empty[S];
    ScoreItem items[2];
    float shift[2][256];  // log2 of the sum of exponentials; infinite where there is no vector
    u32 last[2][256];     // last key that the vector sees
    u32 next;
};

template <int D> struct ScoreShape {
    static const u32 stages = 4, tile = 128 * D * 2;  // bytes
    static const u32 ring = 2 * tile, control = ring + stages * tile;
    static const u32 room = 4608;  // for what lies behind the ring
};

template <class T, int D>
DEVICE void score_produce(const ScoreTilesArgs& a, const Jobs& all, const TensorMap& keys, u32 base,
                          ScoreControl<4>& c) {
    typedef ScoreShape<D> Shape;
    const u32 S = Shape::stages;
    Copier<T, D> copier;
    u32 g = a.heads / a.pool.kv_heads, published = 0, filled = 0;
    u32 lead = a.pool.lead, column = copier.column * 8, stride = column < lead ? lead : D - lead;
    const T* keys_at = (const T*)a.pool.k + (column < lead ? column : PAGE * lead + column - lead);
    // Vectors `b` of `item`, for query heads head0 ...
    auto vectors = [&](const ScoreItem& item, u32 i) {
        const Block& b = item.block[i];
        u32 at = published & 1, head0 = item.list * g;
        auto vector = [&](u32 r) { return (u64)(b.q_start + (b.v0 + r) / g) * a.heads + head0 + (b.v0 + r) % g; };
        u32 r = threadIdx.x;
        bool ok = b.v0 + r < b.vectors;
        c.shift[at][i * 128 + r] = ok ? a.lse[vector(r)] * LOG2E : POS_INF;
        c.last[at][i * 128 + r] = b.first + (b.v0 + r) / g;
        copier.copy_some(base + i * Shape::tile, (const T*)a.q, [&](u32 j) {
            u32 row = copier.first + j * copier.step;
            return b.v0 + row < b.vectors ? (const T*)a.q + vector(row) * D + column : nullptr;
        });
    };
    auto publish = [&](const ScoreItem& item) {
        barrier_wait(bar(c.q_empty), (published & 1) ^ 1);
        if (threadIdx.x == 0) c.items[published & 1] = item;
        if (item.t0 != ~0u) vectors(item, 0), vectors(item, 1);
        barrier_arrive_copies(bar(c.q_full));
        barrier_arrive(bar(c.q_full));
        published++;
    };
    auto run = [&](const ScoreItem& item, const Seq& seq, u32 kv_len) {
        publish(item);
        auto find = [&](u32 t) {
            u32 token = t * 128 + (threadIdx.x & 96);
            return token < kv_len ? a.pool.row(seq, item.list, token & ~(PAGE - 1)) : 0;
        };
        u32 row = find(item.t0);
        for (u32 t = item.t0; t < item.t1; t++, filled++) {
            u32 later = find(t + 1), slot = filled % S, there = kv_len - t * 128;
            barrier_wait(bar(c.k_empty[slot]), (filled / S & 1) ^ 1);
            u32 to = base + Shape::ring + slot * Shape::tile, now = row;
            row = later;
            if (there >= 128 && all.mapped) {
                copy_runs<D>(to, keys, now, bar(c.k_full[slot]));
                continue;
            }
            const T* from = keys_at + (u64)now * D + copier.first % PAGE * stride;
            if (there >= 128) {
                copier.copy(to, [&](u32) {
                    const T* x = from;
                    from += copier.step * stride;
                    return x;
                });
            } else {
                copier.copy_some(to, keys_at, [&](u32 i) {
                    return copier.first + i * copier.step < there ? from + i * copier.step * stride : nullptr;
                });
            }
            barrier_arrive_copies(bar(c.k_full[slot]));
        }
    };
    auto block = [&](const Seq& seq, u32 tile, u32 v0) {
        Block b = {tile, seq.q_start, seq.q_len * g, v0, seq.kv_len, seq.kv_len - seq.q_len};
        return b;
    };

    Queue queue;
    u32 w;
    while ((w = queue.take(all.groups * all.ranges * a.lists, c.next)) != ~0u) {
        u32 group = all.groups - 1 - w % all.groups, range = w / all.groups % all.ranges;
        u32 tile = group * all.per;
        ScoreItem item;
        item.list = w / all.groups / all.ranges, item.t0 = range * all.length, item.joined = all.per == 1;
        auto cover = [&](const Seq& seq, u32 kv_len) {
            item.t1 = min(item.t0 + all.length, (kv_len + 127) / 128);
            item.plain = min(item.t1, (min(item.block[0].first, item.block[1].first) + 1) / 128);
            if (item.t0 < item.t1) run(item, seq, kv_len);
        };
        Seq seq = a.seqs.get(tile);
        item.block[0] = block(seq, tile, 0), item.block[1] = block(seq, tile, 128);
        u32 kv_len = seq.kv_len;
        if (all.per == 2) {
            item.block[1].vectors = item.block[1].kv_len = 0, item.block[1].first = ~0u;
            Seq other = a.seqs.get(min(tile + 1, all.tiles - 1));
            bool there = tile + 1 < all.tiles, shared = other.pages == seq.pages;
            if (there && shared) item.block[1] = block(other, tile + 1, 0), kv_len = max(kv_len, other.kv_len);
            cover(seq, kv_len);
            if (!there || shared) continue;
            item.block[0] = block(other, tile + 1, 0);
            seq = other, kv_len = other.kv_len;
        }
        cover(seq, kv_len);
    }
    ScoreItem none;
    none.t0 = ~0u;
    publish(none);
    copy_wait_all();
}

template <class T, int D> DEVICE void score_consume(const ScoreTilesArgs& a, bool mapped, u32 base, ScoreControl<4>& c) {
    typedef ScoreShape<D> Shape;
    const u32 S = Shape::stages;
    u32 group = warpgroup() - 1, lane = threadIdx.x & 31, quad = lane & 3;
    u32 mine = group * 64 + (threadIdx.x >> 5 & 3) * 16 + (lane >> 2);  // first key of the thread in a tile
    float scale2 = a.scale * LOG2E;
    u32 n = 0;  // tiles so far
    float s[2][64], shift[2][32];
    float* row[2] = {};
    u32 end[2];
    bool joined;
    Index<0> first;
    Index<1> second;
    auto release = [&](const u64& b) {
        if (lane == 0) barrier_arrive(bar(b));
    };
    // Block i of the tile of number `count`, which has landed.
    auto start = [&](auto i, u32 count) {
        u32 keys = base + Shape::ring + count % S * Shape::tile + group * 64 * 128;
        wgmma_fence();
        wgmma_logits<T, D>(s[i.value], keys, 128, base + i.value * Shape::tile);
        wgmma_commit();
    };
    // Sums up block i of tile t.
    auto add = [&](auto i, const u32* last, u32 t, u32 plain) {
        float (&x)[64] = s[i.value];
        pin(x);
        if (t >= plain) {
#pragma unroll
            for (int j = 0; j < 64; j++) {
                u32 v = i.value * 128 + (j >> 2) * 8 + quad * 2 + (j & 1), key = t * 128 + mine + (j & 2) * 4;
                if (key > last[v]) x[j] = NEG_INF;
            }
        }
        float part[2][2] = {};
#pragma unroll
        for (int j = 0; j < 64; j++)
            part[j >> 1 & 1][j & 1] += exp2_fast(fmaf(x[j], scale2, -shift[i.value][(j >> 2) * 2 + (j & 1)]));
        // Of each four lanes the first two get the sums of keys `mine` and 8 further.
        float x0 = part[0][0] + part[0][1], x1 = part[1][0] + part[1][1];
        float y = (quad & 1 ? x1 : x0) + __shfl_xor_sync(~0u, quad & 1 ? x0 : x1, 1);
        y += __shfl_xor_sync(~0u, y, 2);
        settle(y, base);
        u32 key = t * 128 + mine + 8 * quad;
        if (key >= end[i.value]) return;
        if (i.value && joined) atomicAdd(row[0] + key, y);
        else row[i.value][key] = y;
    };
    for (u32 count = 0;; count++) {
        barrier_wait(bar(c.q_full), count & 1);
        const ScoreItem& item = c.items[count & 1];
        const u32* last = c.last[count & 1];
        u32 t = item.t0, t1 = item.t1, plain = item.plain;
        if (t == ~0u) break;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 32; j++)
                shift[i][j] = c.shift[count & 1][i * 128 + (j >> 1) * 8 + quad * 2 + (j & 1)];
        joined = item.joined;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Block& b = item.block[joined ? 0 : i];
            row[i] = a.scores + ((u64)b.tile * a.lists + item.list) * a.stride;
            end[i] = quad < 2 ? b.kv_len : 0;
        }
        barrier_wait(bar(c.k_full[n % S]), n / S & 1);
        fence_proxy();
        start(first, n);
        for (; t + 1 < t1; t++, n++) {
            start(second, n);
            wgmma_wait<1>();
            add(first, last, t, plain);
            barrier_wait(bar(c.k_full[(n + 1) % S]), (n + 1) / S & 1);
            // The copy engine needs no fence, but it does not copy the last keys of a sequence.
            if (!mapped || t + 2 == t1) fence_proxy();
            start(first, n + 1);
            wgmma_wait<1>();
            release(c.k_empty[n % S]);
            add(second, last, t, plain);
        }
        // Always so; without the question the assembler merges this with the loop and lets products run one by one.
        if (t + 1 == t1) {
            start(second, n);
            wgmma_wait<1>();
            add(first, last, t, plain);
            wgmma_wait<0>();
            release(c.k_empty[n % S]);
            release(c.q_empty);
            add(second, last, t, plain);
        } else {
            wgmma_wait<0>();
            pin(s[0]);
        }
        n++;
    }
}

template <class T, int D>
DEVICE void score_wgmma(const ScoreTilesArgs& a, const Jobs& all, const TensorMap& keys) {
    typedef ScoreShape<D> Shape;
    extern __shared__ uint4 shared4[];
    u32 start = shared_address(shared4), base = (start + 1023) & ~1023u;
    static_assert(sizeof(ScoreControl<4>) <= Shape::room, "shared memory behind the ring");
    ScoreControl<4>& c = *(ScoreControl<4>*)((char*)shared4 + (base - start) + Shape::control);
    if (threadIdx.x == 0) {
        barrier_init(bar(c.q_full), 256);
        barrier_init(bar(c.q_empty), 8);
        for (u32 i = 0; i < Shape::stages; i++) {
            barrier_init(bar(c.k_full[i]), 128);
            barrier_init(bar(c.k_empty[i]), 8);
        }
        fence_proxy();  // the copy engine arrives too
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_down<40>();
        score_produce<T, D>(a, all, keys, base, c);
    } else {
        registers_up<232>();
        score_consume<T, D>(a, all.mapped, base, c);
    }
}

#endif  // WGMMA
