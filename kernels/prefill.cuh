// Attention of many rows on tensor cores, shared by attend_dense (a run of keys) and attend_rows (listed keys).
//
// A CTA = (64 query vectors, heads that share keys, sequence x split) where the vectors are (row, head) pairs, rows
// slowest, so that a K/V tile in shared memory serves all heads of the group; 4 warps of 16 vectors, tiles of 64 keys
// (32 above 128 dimensions) in two stages by cp.async.
//
// A source of keys has entries [begin, end) in tiles of KEYS. `prepare(tile)` is called by all threads, with a barrier
// between it and the first use of the tile; `locate(tile).row(key)` is the cache row of a key, ~0 where there is none;
// `masked(tile)` whether some vector of the CTA may not see some key of the tile, and then `seen(tile, key, p)` whether
// the row at position p does.
#pragma once
#include "flash.cuh"

template <int D> struct PrefillShape {
    static const int keys = D > 128 ? 32 : 64;
    static const int row = Padded<D>::value;
    static const int tile = keys * row;
};

// `size` query vectors from v0 on of the (row, head) pairs of `g` heads from `head0` on.
struct Tile {
    u32 v0, vectors, g, head0, offset, size;
    // False where the sequence has no such tile.
    DEVICE bool of(const Seq& seq, u32 tile, u32 of_size, u32 of_g, u32 of_head0) {
        v0 = tile * of_size, vectors = seq.q_len * of_g, g = of_g, head0 = of_head0;
        offset = seq.kv_len - seq.q_len, size = of_size;
        return v0 < vectors;
    }
    DEVICE u32 position(u32 v) const { return offset + v / g; }
    DEVICE u32 first() const { return position(v0); }
    DEVICE u32 last() const { return position(min(v0 + size, vectors) - 1); }
    DEVICE u64 item(const Seq& seq, u32 heads, u32 v) const {
        return (u64)(seq.q_start + v / g) * heads + head0 + v % g;
    }
};

// The CTA's tile. The last ones have the most keys: they start first.
DEVICE bool tile_of(Tile& vec, const Seq& seq, u32 g, u32 head0) {
    return vec.of(seq, gridDim.x - 1 - blockIdx.x, 64, g, head0);
}

template <class T, int D, class Keys>
DEVICE void prefill(const AttendArgs& a, const Seq& seq, u32 kvh, const Tile& vec, u32 split, Keys& keys) {
    typedef PrefillShape<D> Shape;
    extern __shared__ uint4 shared4[];
    T* q = (T*)shared4;  // [64][row]
    T* ring = q + 64 * Shape::row;
    const u32 chunks = D / 8;
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u32 t0 = keys.begin() / Shape::keys;
    u32 t1 = keys.end() > keys.begin() ? (keys.end() + Shape::keys - 1) / Shape::keys : t0;

    auto fill = [&](u32 tile) {
        T* k = ring + (tile & 1) * 2 * Shape::tile;
        T* v = k + Shape::tile;
        auto at = keys.locate(tile);
        for (u32 i = threadIdx.x; i < Shape::keys * chunks; i += blockDim.x) {
            u32 key = i / chunks, c = i % chunks, row = at.row(key);
            bool ok = row != ~0u;
            row = ok ? row : 0;
            copy16(k + key * Shape::row + c * 8, (const T*)a.pool.k + a.pool.k_at(row, c * 8), ok);
            copy16(v + key * Shape::row + c * 8, (const T*)a.pool.v + a.pool.v_at(row, c * 8), ok);
        }
    };
    keys.prepare(t0);
    keys.prepare(t0 + 1);
    for (u32 i = threadIdx.x; i < 64 * chunks; i += blockDim.x) {
        u32 v = vec.v0 + i / chunks, c = i % chunks;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (v < vec.vectors) x = load8((const T*)a.q + vec.item(seq, a.heads, v) * D + c * 8).v;
        *(uint4*)(q + (i / chunks) * Shape::row + c * 8) = x;
    }
    __syncthreads();
    u32 position[2] = {vec.position(vec.v0 + warp * 16 + (lane >> 2)),
                       vec.position(vec.v0 + warp * 16 + (lane >> 2) + 8)};
    Flash<D> flash;
    flash.init();
    if (t0 < t1) fill(t0);
    copy_commit();
    for (u32 t = t0; t < t1; t++) {
        if (t + 1 < t1) fill(t + 1);
        copy_commit();
        if (t + 2 < t1) keys.prepare(t + 2);
        copy_wait<1>();
        __syncthreads();
        const PaddedRows<T, D> k = {ring + (t & 1) * 2 * Shape::tile}, v = {k.at + Shape::tile};
        flash.template step<T, Shape::keys>(
            SharedQuery<T, D>(q + warp * 16 * Shape::row), k, v, a.scale * LOG2E, keys.masked(t),
            [&](int h, u32 key) { return keys.seen(t, key, position[h]); });
        __syncthreads();
    }
    copy_wait<0>();
    flash.finish();
    Out<T> out = {a.out, a.out_f32};
    u64 plane = (u64)split * a.rows * a.heads;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 v = vec.v0 + warp * 16 + (lane >> 2) + 8 * h;
        if (v >= vec.vectors) continue;
        u64 at = plane + vec.item(seq, a.heads, v);
        float inv = flash.sum[h] > 0.0f ? 1.0f / flash.sum[h] : 0.0f;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            out.put(at * D + i * 8 + (lane & 3) * 2, flash.o[i][2 * h] * inv);
            out.put(at * D + i * 8 + (lane & 3) * 2 + 1, flash.o[i][2 * h + 1] * inv);
        }
        if (a.lse && (lane & 3) == 0)
            a.lse[at] = flash.sum[h] > 0.0f ? (flash.top[h] + log2f(flash.sum[h])) * LN2 : NEG_INF;
    }
}
