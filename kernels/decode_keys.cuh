// How a block of decode attention reads its keys (decode.cuh): each warp its own, 16 at a time, through a ring of its own, and
// what the warps found merged.
#pragma once
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
    static const bool panels = D % 64 == 0;           // else padded rows
    static const int query = 16 * Padded<D>::value;   // elements of the queries' tile
    static const int tile = panels ? 16 * D : query;  // of one K or V tile
    static const int ring = stages * 2 * tile;        // of one warp's ring
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
// N bits.
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
// `early`: the block has not waited for the kernel before yet.
// keep(first, valid, s): the products of a warp's 16 entries from `first` on, of which `valid` has the bits, as `logits`
// of flash.cuh leaves them.
template <class T, int D, class Keys, class Keep>
DEVICE Found<D> read_keys(const AttendArgs& a, const Seq& seq, const Heads& heads, const Keys& keys, const Keep& keep,
                          Engine& engine, bool early, u32 turn = 0, u32 turns = 1) {
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

    // What the first tiles hold may be asked for at once, but for the newest token.
    if (early) {
        bool wait = !a.settled;
#pragma unroll
        for (int s = 0; s < Shape::stages - 1; s++) {
            u32 tok = token(s);
            wait |= tok != ~0u && tok + 1 >= seq.kv_len;
        }
        if (__any_sync(~0u, wait)) depend(), early = false;
    }
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
    if (early) depend();
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
#if WGMMA
        if (Keys::in_order && engine.maps && mask != 0xffff) fence_proxy();  // before the copy engine writes where cp.async has
#endif
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
