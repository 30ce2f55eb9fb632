// Attention of many rows on Hopper's tensor cores (wgmma), shared by attend_dense (a run of keys) and attend_rows
// (listed keys); prefill.cuh does the same by mma.sync.
//
// A CTA takes items one after another: 128 query vectors ((row, head) pairs of the heads that share keys, rows slowest)
// of a sequence and split. Warpgroup 0 copies: Q once an item, K and V in tiles of 128 keys through a ring. Warpgroups 1
// and 2 compute, 64 vectors each: S = Q K^T of the next tile and O += P V of this one run on the tensor cores while the
// softmax of the next tile is worked out, P staying in registers; named barriers give the tensor cores to the two in
// turn, so that one's softmax falls into the other's products.
// A run of keys is copied by the copy engine, whole pages at a time; listed keys, K in two pieces and the last keys of a
// sequence by cp.async of 16 bytes, swizzled by hand.
// The items of as many heads as fit into the L2 cache are dealt out longest first, then those of the next heads: loads
// are even, and CTAs that run together read the same keys.
//
// Without values (`VALUES`) only the log-sum-exps are worked out: no V, no O, no turns. K has all of the ring, Q lies in
// registers, and products alternate between two accumulators: while one is summed up (MUFU has as many cycles of work as
// the tensor cores) relative to the maximum of before, which mostly will do, the other is worked out.
// A source of keys: `take` fills an item (copying warpgroup; false where there is nothing to do), `ticket(tile)` and
// `at(ticket)` find a tile's keys in two steps of one load each, `At::full` whether all keys of the warp are there,
// `At::row(r)` the cache row of the tile's key r (~0: none) and `At::token` what mask tests get; `Plain::sees`: whether all
// vectors of the item see all keys of a tile, `Sees`: what a row sees of the others.
#pragma once
#include "hopper.cuh"
#include "prefill.cuh"

#if WGMMA

template <int D> struct WgmmaShape {
    static const u32 vectors = 128, keys = 128;
    static const u32 stages = D > 64 ? 2 : 4;
    static const u32 tile = 128 * D * 2;  // bytes; Q's too
    static const u32 ring = tile, control = tile * (1 + 2 * stages);
    static const u32 room = 512 + stages * 1024;  // for what lies behind the ring
};

// What a launch covers: tiles of vectors, parts (heads that share keys), sequences times splits; `near` parts go together.
struct Items {
    u32 tiles, parts, planes, near;
    u32 mapped;  // K lies in one piece, and the kernel's maps describe K and V
};
static_assert(sizeof(Items) == 20, "as Items of hopper.rs");
struct Item {
    u32 q_start, v0, vectors, g, head0, offset, split;
    u32 t0, t1;                         // tiles of keys; t0 = ~0: the CTA is done
    u32 low, high, all_low, all_high;   // attend_dense: keys that some vector sees, that all see
    DEVICE u32 position(u32 v) const { return offset + v / g; }
    DEVICE u64 vector(u32 heads, u32 v) const { return (u64)(q_start + v / g) * heads + head0 + v % g; }
    DEVICE void place(const Seq& seq, const Tile& vec, u32 of_split) {
        q_start = seq.q_start, v0 = vec.v0, vectors = vec.vectors, g = vec.g, head0 = vec.head0;
        offset = vec.offset, split = of_split;
    }
};

// Lies behind the ring; the barriers are used by address.
template <int D, bool VALUES> struct Control {
    static const u32 S = WgmmaShape<D>::stages, keys = VALUES ? S : 2 * S;  // stages of V, of K
    u64 q_full, q_empty, k_full[keys], k_empty[keys], v_full[S], v_empty[S];
    Item items[2];
    u32 tokens[2 * S][128];
    u32 next;
};

template <class T, int D, bool VALUES, class Source>
DEVICE void produce(const AttendArgs& a, const Items& all, const TensorMap* maps, u32 base, Control<D, VALUES>& c) {
    typedef WgmmaShape<D> Shape;
    typedef typename Source::At At;
    const u32 S = Shape::stages, STAGES = c.keys;
    Copier<T, D> copier;
    // Rows in units of 8 elements. The chunk's piece of K lies `narrow` units less apart than whole rows do.
    u32 lead = a.pool.lead, column = copier.column * 8;
    u32 narrow = (column < lead ? D - lead : lead) / 8;
    const T* keys_at = (const T*)a.pool.k + (column < lead ? column : (PAGE - 1) * lead + column);
    const T* values_at = (const T*)a.pool.v + column;
    auto k_row = [&](u32 r) { return keys_at + (u64)(r * (D / 8) - r % PAGE * narrow) * 8; };
    auto v_row = [&](u32 r) { return values_at + (u64)r * D; };
    u32 published = 0, filled = 0;  // items, tiles
    u32 row = all.tiles * all.planes;

    // Rows of a run of keys lie `stride` elements apart. Arrives at `bar`.
    auto fill = [&](u32 tile, u32 bar, const At& at, const TensorMap* map, const T* any, auto row_at, u32 stride) {
        if constexpr (!Source::listed) {
            if (at.full() && all.mapped) {
                copy_runs<D>(tile, *map, at.row0, bar);
                return;
            }
        }
        if (!at.full()) {
            copier.copy_some(tile, any, [&](u32 i) {
                u32 row = at.row(copier.first + i * copier.step);
                return row == ~0u ? nullptr : row_at(row);
            });
        } else if constexpr (Source::listed) {
            copier.copy(tile, [&](u32 i) { return row_at(at.row(copier.first + i * copier.step)); });
        } else {
            const T* row = row_at(at.row(copier.first));
            copier.copy(tile, [&](u32) {
                const T* from = row;
                row += copier.step * stride;
                return from;
            });
        }
        barrier_arrive_copies(bar);
    };
    auto fill_k = [&](const At& at, u32 n) {
        u32 slot = n % STAGES;
        barrier_wait(bar(c.k_empty[slot]), (n / STAGES & 1) ^ 1);
        if constexpr (Source::listed) c.tokens[n % (2 * S)][threadIdx.x] = at.token;
        fill(base + Shape::ring + slot * Shape::tile, bar(c.k_full[slot]), at, maps, keys_at, k_row, D - narrow * 8);
        if constexpr (Source::listed) {
            __syncwarp();
            if ((threadIdx.x & 31) == 0) barrier_arrive(bar(c.k_full[slot]));
        }
    };
    auto fill_v = [&](const At& at, u32 n) {
        u32 slot = n % S;
        barrier_wait(bar(c.v_empty[slot]), (n / S & 1) ^ 1);
        fill(base + Shape::ring + (S + slot) * Shape::tile, bar(c.v_full[slot]), at, maps + 1, values_at, v_row, D);
    };
    auto publish = [&](const Item& item) {
        barrier_wait(bar(c.q_empty), (published & 1) ^ 1);
        if (threadIdx.x == 0) c.items[published & 1] = item;
        if (item.t0 < item.t1)
            copier.copy_some(base, (const T*)a.q, [&](u32 i) {
                u32 v = item.v0 + copier.first + i * copier.step;
                return v < item.vectors ? (const T*)a.q + item.vector(a.heads, v) * D + column : nullptr;
            });
        barrier_arrive_copies(bar(c.q_full));
        if (threadIdx.x == 0) barrier_arrive(bar(c.q_full));
        published++;
    };

    Queue queue;
    u32 w;
    while ((w = queue.take(row * all.parts, c.next)) != ~0u) {
        u32 part = w / (row * all.near) * all.near, together = min(all.near, all.parts - part);
        w -= row * part;
        // Later tiles and sequences have more keys.
        u32 x = row - 1 - w / together;
        Item item;
        Source keys(a);
        if (!keys.take(x % all.tiles, part + w % together, x / all.tiles, item)) continue;
        publish(item);
        u32 t0 = item.t0, t1 = item.t1;
        if (t0 >= t1) continue;
        // K a tile ahead of V; where keys lie is looked up two tiles ahead.
        At last = {}, now = keys.at(keys.ticket(t0)), next = keys.at(keys.ticket(t0 + 1));
        u32 ticket = keys.ticket(t0 + 2);
        for (u32 t = t0; t <= t1; t++) {
            At later = keys.at(ticket);
            ticket = keys.ticket(t + 3);
            if (t < t1) fill_k(now, filled + t - t0);
            if (VALUES && t > t0) fill_v(last, filled + t - 1 - t0);
            last = now, now = next, next = later;
        }
        filled += t1 - t0;
    }
    Item none;
    none.t0 = ~0u, none.t1 = 0;
    publish(none);
    copy_wait_all();
}

// Running softmax of 64 vectors in base 2; a thread holds vectors lane/4 and 8 further of its warp's 16. Weights are
// relative to `top`, which follows the largest logit only when that is more than 2^8 ahead: sums stay far from f32's
// limits, f16 weights too, and O is rarely rescaled.
struct Softmax {
    static constexpr float ahead = 8.0f;
    float top[2], sum[2];
    // Sums up weights relative to `top` as it stands, without a look at maxima. False, and nothing is done, where a vector
    // of the warp has no `top` yet or one that is far too low: a sum in f32 bears more than 2^8.
    DEVICE bool guess(const float (&s)[64], float scale2) {
        const float most = 0x1p32f;
        float part[2][2] = {};
#pragma unroll
        for (int i = 0; i < 64; i++) part[i >> 1 & 1][i & 1] += exp2_fast(fmaf(s[i], scale2, -top[i >> 1 & 1]));
        float all[2] = {part[0][0] + part[0][1], part[1][0] + part[1][1]};
        bool fits = fminf(top[0], top[1]) > NEG_INF && all[0] <= most && all[1] <= most;
        if (!__all_sync(~0u, fits)) return false;
        sum[0] += all[0], sum[1] += all[1];
        return true;
    }
    // s: logits in, weights out; `fix`: what earlier weights are to be multiplied by.
    DEVICE void step(float (&s)[64], float scale2, float (&fix)[2]) {
        float most[8], best[2], shift[2];
#pragma unroll
        for (int i = 0; i < 64; i++) most[i & 7] = i < 8 ? s[i] : fmaxf(most[i & 7], s[i]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            best[h] = fmaxf(fmaxf(most[2 * h], most[2 * h + 1]), fmaxf(most[2 * h + 4], most[2 * h + 5]));
            best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 1));
            best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 2)) * scale2;
            float to = best[h] > top[h] + ahead ? best[h] : top[h];
            shift[h] = to == NEG_INF ? 0.0f : to;
            fix[h] = exp2_fast(top[h] - shift[h]);
            top[h] = to;
        }
        float part[2][2] = {};
#pragma unroll
        for (int i = 0; i < 64; i++) {
            s[i] = exp2_fast(fmaf(s[i], scale2, -shift[i >> 1 & 1]));
            part[i >> 1 & 1][i & 1] += s[i];
        }
#pragma unroll
        for (int h = 0; h < 2; h++) sum[h] = fmaf(sum[h], fix[h], part[h][0] + part[h][1]);
    }
};

template <class T, int D, bool VALUES, class Source>
DEVICE void consume(const AttendArgs& a, bool mapped, u32 base, Control<D, VALUES>& c) {
    typedef WgmmaShape<D> Shape;
    const u32 S = Shape::stages, STAGES = c.keys;
    u32 group = warpgroup() - 1, lane = threadIdx.x & 31;
    u32 mine = group * 64 + (threadIdx.x >> 5 & 3) * 16 + (lane >> 2);  // first vector of the thread in the tile
    u32 q = base + group * 64 * 128;
    float scale2 = a.scale * LOG2E;
    u32 n = 0;  // tiles so far
    auto release = [&](const u64& b) {
        if (lane == 0) barrier_arrive(bar(b));
    };
    auto k_at = [&](u32 slot) { return base + Shape::ring + slot * Shape::tile; };
    float o[D / 2], s[2][64];
    u32 p[32], held[D / 16][4];
    Softmax soft;
    // `count`: the tile's number over all items.
    auto hide = [&](float (&x)[64], const Item& item, u32 tile, u32 count) {
        const u32* tokens = c.tokens[count % (2 * S)];
        typename Source::Sees sees[2] = {{a, item, item.position(item.v0 + mine)},
                                         {a, item, item.position(item.v0 + mine + 8)}};
#pragma unroll
        for (int i = 0; i < 64; i++) {
            u32 key = (i >> 2) * 8 + (lane & 3) * 2 + (i & 1);
            if (!sees[i >> 1 & 1](tile, key, tokens)) x[i] = NEG_INF;
        }
    };
    auto weigh = [&](auto mask, const Item& item, u32 tile, u32 count, float (&fix)[2]) {
        if constexpr (mask.value) hide(s[0], item, tile, count);
        soft.step(s[0], scale2, fix);
    };
    auto pack = [&] {
#pragma unroll
        for (int i = 0; i < 32; i++) p[i] = pack2<T>(s[0][2 * i], s[0][2 * i + 1]);
    };
    auto values = [&](u32 slot) {
        u32 v = wgmma_tile(k_at(S + slot));
#pragma unroll
        for (int k = 0; k < 8; k++) Wgmma<D, T>::rs(o, p + 4 * k, wgmma_at(v, k * 16 * 128));
    };
    // Logits of tile t, and meanwhile the values of the tile before it.
    auto step = [&](auto mask, const Item& item, u32 t, u32 t1) {
        u32 slot = n % S, next = (n + 1) % S;
        float fix[2];
        named_sync(1 + group, 256);
        pin(o);
        pin(p);
        wgmma_fence();
        wgmma_logits<T, D>(s[0], q, 128, k_at(next));
        wgmma_commit();
        values(slot);
        wgmma_commit();
        named_arrive(2 - group, 256);
        wgmma_wait<1>();
        pin(s[0]);
        release(c.k_empty[next]);
        if (t + 1 == t1) release(c.q_empty);
        weigh(mask, item, t, n + 1, fix);
        settle(soft.sum[0] + soft.sum[1], base);
        wgmma_wait<0>();
        pin(o);
        pin(p);
        release(c.v_empty[slot]);
        if (__any_sync(~0u, fix[0] != 1.0f || fix[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[i] *= fix[i >> 1 & 1];
        }
        pack();
    };
    // The product for the tile of number `count` into s[i].
    auto start = [&](auto i, u32 count, bool fence) {
        u32 slot = count % STAGES;
        barrier_wait(bar(c.k_full[slot]), count / STAGES & 1);
        if (fence) fence_proxy();
        wgmma_fence();
        if constexpr (VALUES) wgmma_logits<T, D>(s[i.value], q, 128, k_at(slot));
        else wgmma_logits<T, D>(s[i.value], held, k_at(slot));
        wgmma_commit();
    };
    // Without values: sums up tile t, the one of number n, from s[i]; the product of the next one, if any, runs meanwhile.
    auto add = [&](auto i, auto last, const Item& item, auto& plain, u32 t, u32 t1) {
        float fix[2];
        if constexpr (!last.value) start(Index<1 - i.value>(), n + 1, !mapped || t + 2 == t1);
        wgmma_wait<1 - last.value>();
        pin(s[i.value]);
        release(c.k_empty[n % STAGES]);
        if (!plain.sees(t, c.tokens[n % (2 * S)])) hide(s[i.value], item, t, n);
        if (!soft.guess(s[i.value], scale2)) soft.step(s[i.value], scale2, fix);
        settle(soft.sum[0] + soft.sum[1], base);
        n++;
    };
    if (VALUES && group == 1) named_arrive(1, 256);
    for (u32 count = 0;; count++) {
        barrier_wait(bar(c.q_full), count & 1);
        const Item& item = c.items[count & 1];
        u32 t0 = item.t0, t1 = item.t1;
        if (t0 == ~0u) break;
        typename Source::Plain plain(item);
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0.0f;
        soft.top[0] = soft.top[1] = NEG_INF;
        soft.sum[0] = soft.sum[1] = 0.0f;
        if (!VALUES && t0 < t1) {
            Index<0> first, more;
            Index<1> second, last;
            u32 t = t0;
            wgmma_hold<D>(held, base, mine - (lane >> 2));
            release(c.q_empty);
            start(first, n, true);
            for (; t + 2 < t1; t += 2)
                add(first, more, item, plain, t, t1), add(second, more, item, plain, t + 1, t1);
            if (t + 2 == t1) add(first, more, item, plain, t, t1), add(second, last, item, plain, t + 1, t1);
            else add(first, last, item, plain, t, t1);
        } else if (t0 < t1) {
            float fix[2];
            start(Index<0>(), n, true);
            wgmma_wait<0>();
            pin(s[0]);
            release(c.k_empty[n % S]);
            if (t0 + 1 == t1) release(c.q_empty);
            weigh(Index<1>(), item, t0, n, fix);
            pack();
            for (u32 t = t0 + 1; t < t1; t++, n++) {
                barrier_wait(bar(c.k_full[(n + 1) % S]), (n + 1) / S & 1);
                barrier_wait(bar(c.v_full[n % S]), n / S & 1);
                // The copy engine needs no fence, but it does not copy the last keys of a sequence.
                if (!mapped || t + 1 == t1) fence_proxy();
                if (plain.sees(t, c.tokens[(n + 1) % (2 * S)])) step(Index<0>(), item, t, t1);
                else step(Index<1>(), item, t, t1);
            }
            barrier_wait(bar(c.v_full[n % S]), n / S & 1);
            fence_proxy();
            pin(o);
            pin(p);
            wgmma_fence();
            values(n % S);
            wgmma_commit();
            wgmma_wait<0>();
            pin(o);
            release(c.v_empty[n % S]);
            n++;
        } else {
            release(c.q_empty);
        }
        Out<T> out = {a.out, a.out_f32};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = soft.sum[h] + __shfl_xor_sync(~0u, soft.sum[h], 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            u32 v = item.v0 + mine + 8 * h;
            if (v >= item.vectors) continue;
            u64 at = (u64)item.split * a.rows * a.heads + item.vector(a.heads, v);
            float inv = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
            for (int i = 0; VALUES && i < D / 8; i++)
                out.put2(at * D + i * 8 + (lane & 3) * 2, o[4 * i + 2 * h] * inv, o[4 * i + 2 * h + 1] * inv);
            if (a.lse && (lane & 3) == 0)
                a.lse[at] = sum > 0.0f ? (soft.top[h] + log2f(sum)) * LN2 : NEG_INF;
        }
    }
}

// `maps`: K and V, for a run of keys.
template <class T, int D, class Source, bool VALUES = true>
DEVICE void attend_wgmma(const AttendArgs& a, const Items& all, const TensorMap* maps) {
    typedef WgmmaShape<D> Shape;
    extern __shared__ uint4 shared4[];
    u32 start = shared_address(shared4), base = (start + 1023) & ~1023u;
    static_assert(sizeof(Control<D, VALUES>) <= Shape::room, "shared memory behind the ring");
    static_assert(VALUES || !Source::listed, "tokens are kept for S stages of K");
    Control<D, VALUES>& c = *(Control<D, VALUES>*)((char*)shared4 + (base - start) + Shape::control);
    if (threadIdx.x == 0) {
        const u32 copies = 128, warps = 8;
        barrier_init(bar(c.q_full), copies + 1);
        barrier_init(bar(c.q_empty), warps);
        for (u32 i = 0; i < c.keys; i++) {
            barrier_init(bar(c.k_full[i]), copies + (Source::listed ? 4 : 0));
            if (VALUES) barrier_init(bar(c.v_full[i]), copies);
            barrier_init(bar(c.k_empty[i]), warps);
            if (VALUES) barrier_init(bar(c.v_empty[i]), warps);
        }
        fence_proxy();  // the copy engine arrives too
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_down<56>();
        produce<T, D, VALUES, Source>(a, all, maps, base, c);
    } else {
        registers_up<224>();
        consume<T, D, VALUES, Source>(a, !Source::listed && all.mapped, base, c);
    }
}

#endif  // WGMMA
