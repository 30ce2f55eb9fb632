// Split-KV decode on tensor cores, shared by attend_dense (all keys of a range) and attend_rows (listed
// keys): one CTA = (split, head group, sequence).
//
// Every warp walks its own keys, 16 at a time, through its own ring of STAGES shared tiles filled by
// 16-byte cp.async, so the main loop has no block barrier. The group's query heads are the (up to 16) rows
// of the mma tile, so a key row is read once for all of them. At the end the warps' results are merged
// through shared memory in warp order, and those of the blocks of a cluster, which share a split, in block
// order. A source of keys offers `begin()`, `end()` and `token(i)`.
#pragma once
#include "cluster.cuh"
#include "flash.cuh"

// Keys are cut into `parts` ranges; this block reads number `part` and belongs to split `split`.
struct Part {
    u32 part, parts, split;
};
DEVICE Part part_of(u32 splits) {
    u32 n = cluster_size();
    return {blockIdx.x, splits * n, blockIdx.x / n};
}

template <int D> struct DecodeShape {
    static const int warps = D > 128 ? 2 : 4;
    static const int stages = D <= 64 ? 4 : 2;
    static const int row = Padded<D>::value;
    static const int tile = 16 * row;  // elements of one K or V tile
    static const int ring = stages * 2 * tile;  // elements of one warp's ring
};

// Query heads [head0, head0 + g) of `row` against `keys`; `split` selects the plane of the outputs.
template <class T, int D, class Keys>
DEVICE void decode(const AttendArgs& a, const Seq& seq, u32 kvh, u32 head0, u32 g, u32 split,
                   const Keys& keys) {
    typedef DecodeShape<D> Shape;
    extern __shared__ uint4 shared4[];
    T* q = (T*)shared4;
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    T* ring = q + Shape::tile + warp * Shape::ring;
    const u32 chunks = D / 8;

    // Lane l looks up key l % 16 of the warp's tile t. ~0 marks a key that is not there.
    const u32 first = keys.begin() + warp * 16 + (lane & 15), end = keys.end();
    auto token = [&](u32 t) {
        u32 i = first + t * (16 * Shape::warps);
        return i < end ? keys.token(i) : ~0u;
    };
    auto locate = [&](u32 tok) { return tok < seq.kv_len ? a.pool.row(seq, kvh, tok) : ~0u; };
    u32 span = keys.end() - keys.begin(), skip = warp * 16;
    const u32 stride = 16 * Shape::warps;
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
            copy16(k + key * Shape::row + c * 8, (const T*)a.pool.k + a.pool.k_at(at, c * 8), ok);
            copy16(v + key * Shape::row + c * 8, (const T*)a.pool.v + a.pool.v_at(at, c * 8), ok);
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
    u64 item = (u64)seq.q_start * a.heads + head0;  // first of g (row, head) pairs
    const T* src = (const T*)a.q + item * D;
    for (u32 i = threadIdx.x; i < 16 * chunks; i += blockDim.x) {
        u32 h = i / chunks, c = i % chunks;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (h < g) x = load8(src + h * D + c * 8).v;
        *(uint4*)(q + h * Shape::row + c * 8) = x;
    }
    __syncthreads();

    for (u32 t = 0; t < tiles; t++) {
        advance();
        copy_wait<Shape::stages - 1>();
        __syncwarp();
        u32 stage = t % Shape::stages, mask = (u32)(masks >> (16 * stage)) & 0xffff;
        const T* k = ring + stage * 2 * Shape::tile;
        flash.template step<T, 16>(q, k, k + Shape::tile, a.scale * LOG2E, mask != 0xffff,
                                   [&](int, u32 key) { return (mask >> key & 1) != 0; });
        __syncwarp();
    }
    copy_wait<0>();
    flash.finish();
    __syncthreads();

    // Merge of the warps: tops and sums, then outputs, [warp][16][D] f32 over the rings.
    const int W = Shape::warps;
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
    float* block_tops = part + W * 16 * D;
    float* block_sums = block_tops + 16;
    for (u32 i = threadIdx.x; i < g * D; i += blockDim.x) {
        u32 h = i / D;
        float top = NEG_INF, sum = 0.0f, acc = 0.0f;
#pragma unroll
        for (int w = 0; w < W; w++) top = fmaxf(top, tops[w * 16 + h]);
        float shift = top == NEG_INF ? 0.0f : top;
#pragma unroll
        for (int w = 0; w < W; w++) {
            float f = exp2_fast(tops[w * 16 + h] - shift);
            sum += f * sums[w * 16 + h];
            acc += f * part[w * 16 * D + i];
        }
        part[i] = acc;
        if (i % D == 0) block_tops[h] = top, block_sums[h] = sum;
    }
    cluster_sync();
    Out<T> out = {a.out, a.out_f32};
    u64 plane = (u64)split * a.rows * a.heads + item;
    const u32 blocks = cluster_size();
    for (u32 i = cluster_rank() * blockDim.x + threadIdx.x; i < g * D; i += blocks * blockDim.x) {
        u32 h = i / D, c = i % D;
        float tops_of[MAX_CLUSTER], sums_of[MAX_CLUSTER], part_of_block[MAX_CLUSTER];
        float top = NEG_INF, sum = 0.0f, acc = 0.0f;
#pragma unroll
        for (u32 b = 0; b < MAX_CLUSTER; b++) {
            bool there = b < blocks;
            tops_of[b] = there ? remote_float(block_tops + h, b) : NEG_INF;
            sums_of[b] = there ? remote_float(block_sums + h, b) : 0.0f;
            part_of_block[b] = there ? remote_float(part + i, b) : 0.0f;
        }
#pragma unroll
        for (u32 b = 0; b < MAX_CLUSTER; b++) top = fmaxf(top, tops_of[b]);
        float shift = top == NEG_INF ? 0.0f : top;
#pragma unroll
        for (u32 b = 0; b < MAX_CLUSTER; b++) {
            float f = exp2_fast(tops_of[b] - shift);
            sum += f * sums_of[b], acc += f * part_of_block[b];
        }
        out.put((plane + h) * D + c, sum > 0.0f ? acc / sum : 0.0f);
        if (c == 0 && a.lse) a.lse[plane + h] = sum > 0.0f ? (top + log2f(sum)) * LN2 : NEG_INF;
    }
    cluster_sync();  // no block leaves before the others have read its memory
}
