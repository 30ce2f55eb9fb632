// attend_dense: causal softmax attention over the cached tokens, for decode and for (chunked) prefill:
//   out = sum_j softmax_j(scale * q . K[j]) V[j] over j <= p (and j > p - window), lse = log sum_j exp(..).
//
// Plan. Decode (one row a sequence, 16-bit): decode.cuh; `attend_scored` leaves the logits as well (`Logits`), for 4 or
// 4 * heads / kv_heads bytes a token and KV head more.
// Prefill (16-bit): wgmma.cuh on Hopper, else prefill.cuh, tiles above the diagonal or before the window skipped. Else:
// generic.cuh on 16 vectors at a time.
// Bytes: decode 2 * kv_len * head_dim * kv per KV head; prefill is bound by arithmetic.
#include "decode.cuh"
#include "generic.cuh"
#include "prefill.cuh"
#include "wgmma.cuh"

// Tokens from `low` on, which is at most 15 behind `b`.
struct Contiguous {
    static const bool in_order = true;
    u32 b, e, low;
    DEVICE u32 begin() const { return b; }
    DEVICE u32 end() const { return e; }
    DEVICE u32 token(u32 i) const { return i >= low ? i : ~0u; }
    DEVICE u32 room() const { return e; }
};

// First token that position p sees.
DEVICE u32 window_low(u32 p, u32 window) { return window && p + 1 > window ? p + 1 - window : 0; }

// A KV head of a sequence and everything that its last token sees.
struct DensePairs {
    static const bool listed = false;
    const AttendArgs& a;
    DEVICE u32 low(const Seq& seq) const { return window_low(seq.kv_len - 1, a.window); }
    DEVICE u32 begin(const Seq& seq) const { return low(seq) & ~15u; }
    DEVICE u32 pairs() const { return a.sequences * a.pool.kv_heads; }
    DEVICE Seq seq(u32 pair) const { return a.seqs.get(pair / a.pool.kv_heads); }
    DEVICE Heads heads(u32 pair) const {
        u32 kvh = pair % a.pool.kv_heads, g = a.heads / a.pool.kv_heads;
        return {kvh, kvh * g, g};
    }
    DEVICE u32 rounds(u32 pair, u32 round) const {
        Seq s = seq(pair);
        return s.q_len ? (s.kv_len - begin(s) + round - 1) / round : 0;
    }
    DEVICE Contiguous keys(u32, const Seq& s, u32 from, u32 to) const {
        return {begin(s) + from, min(begin(s) + to, s.kv_len), low(s)};
    }
    DEVICE Contiguous plane(u32, const Seq& s, u32 split) const {
        Range r = split_range(low(s), s.kv_len, split, a.splits);
        return {r.begin & ~15u, r.end, r.begin};
    }
    DEVICE Dropped keep(u32) const { return {}; }
};

// The logits of a pair's tokens on their way to `scores`, as score_dims leaves those of all dimensions.
struct Logits {
    const AttendArgs& a;
    u32 pair;
    DEVICE float join(float x, float y) const { return a.pool_mode == POOL_SUM ? x + y : fmaxf(x, y); }
    DEVICE void operator()(u32 first, u32 valid, const float (&s)[2][4]) const {
        u32 lane = threadIdx.x & 31, g = a.heads / a.pool.kv_heads, key = (lane & 3) * 2;
        if (a.pool_mode == POOL_NONE) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 half = i & 1, at = (i >> 1) * 8 + key, head = (lane >> 2) + 8 * half;
                if (head >= g) continue;
                float* to = a.scores + ((u64)pair * g + head) * a.stride + first + at;
                float2 x = make_float2(finite(s[i >> 1][2 * half] * a.scale), finite(s[i >> 1][2 * half + 1] * a.scale));
                if ((valid >> at & 3) == 3) *(float2*)to = x;
                else if (valid >> at & 1) *to = x.x;
            }
            return;
        }
        float x[4];  // of keys `key`, `key` + 1, and these + 8
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            x[i] = a.pool_mode == POOL_SUM ? 0.0f : NEG_INF;
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                float one = s[i >> 1][2 * half + (i & 1)] * a.scale;
                if ((lane >> 2) + 8 * half < g) x[i] = join(x[i], a.pool_mode == POOL_SUM ? one : finite(one));
            }
        }
        // Eight lanes hold other heads of the same four keys. Each step hands half of the keys to the other lane.
        bool high = lane & 4, odd = lane & 8;
        float a0 = __shfl_xor_sync(~0u, high ? x[0] : x[2], 4), a1 = __shfl_xor_sync(~0u, high ? x[1] : x[3], 4);
        float b0 = join(high ? x[2] : x[0], a0), b1 = join(high ? x[3] : x[1], a1);
        float c0 = __shfl_xor_sync(~0u, odd ? b0 : b1, 8), c = join(odd ? b1 : b0, c0);
        c = join(c, __shfl_xor_sync(~0u, c, 16));
        u32 at = (high ? 8 : 0) + key + (odd ? 1 : 0);
        if (lane < 16 && (valid >> at & 1)) a.scores[(u64)pair * a.stride + first + at] = finite(c);
    }
};
struct ScoredPairs : DensePairs {
    DEVICE Logits keep(u32 pair) const { return {a, pair}; }
};

// Tokens [low, high) of the sequence, less those before the window and behind the position of a row.
template <int TILE> struct Run {
    struct Located {
        u32 row0, there;
        DEVICE u32 row(u32 key) const { return key < there ? row0 + key : ~0u; }
    };
    const Pool& pool;
    const Seq& seq;
    u32 kvh, window, b, e, all_low, all_high;
    DEVICE u32 begin() const { return b; }
    DEVICE u32 end() const { return e; }
    DEVICE void prepare(u32) const {}
    // A tile lies in one page.
    DEVICE Located locate(u32 tile) const {
        return {pool.row(seq, kvh, tile * TILE), seq.kv_len - tile * TILE};
    }
    DEVICE bool masked(u32 tile) const { return tile * TILE < all_low || (tile + 1) * TILE > all_high; }
    DEVICE bool seen(u32 tile, u32 key, u32 p) const {
        u32 token = tile * TILE + key;
        return token >= max(window_low(p, window), b) && token < min(p + 1, e);
    }
};

template <class T, int D> DEVICE void dense_prefill(const AttendArgs& a) {
    u32 s = blockIdx.z / a.splits, split = blockIdx.z % a.splits, kvh = blockIdx.y;
    Seq seq = a.seqs.get(s);
    u32 g = a.heads / a.pool.kv_heads;
    Tile vec;
    if (!tile_of(vec, seq, g, kvh * g)) return;
    // Split ranges are the same for all tiles of the sequence; the tile takes its part of one.
    Range all = split_range(window_low(vec.offset, a.window), seq.kv_len, split, a.splits);
    u32 low = max(window_low(vec.first(), a.window), all.begin), high = min(vec.last() + 1, all.end);
    Run<PrefillShape<D>::keys> keys = {a.pool, seq, kvh, a.window, low, max(low, high),
                                       max(window_low(vec.last(), a.window), all.begin),
                                       min(vec.first() + 1, all.end)};
    prefill<T, D>(a, seq, kvh, vec, split, keys);
}

#if WGMMA
// The same keys for wgmma.cuh.
struct RunTiles {
    static const bool listed = false;
    struct At {
        u32 row0, there;
        DEVICE bool full() const { return there >= 128; }
        DEVICE u32 row(u32 r) const { return r < there ? row0 + r % PAGE : ~0u; }
    };
    const AttendArgs& a;
    Seq seq;
    u32 kvh;
    DEVICE RunTiles(const AttendArgs& args) : a(args) {}
    DEVICE bool take(u32 tile, u32 part, u32 plane, Item& item) {
        u32 split = plane % a.splits, g = a.heads / a.pool.kv_heads;
        seq = a.seqs.get(plane / a.splits), kvh = part;
        Tile vec;
        if (!vec.of(seq, tile, 128, g, kvh * g)) return false;
        Range all = split_range(window_low(vec.offset, a.window), seq.kv_len, split, a.splits);
        item.place(seq, vec, split);
        item.low = max(window_low(vec.first(), a.window), all.begin);
        item.high = max(item.low, min(vec.last() + 1, all.end));
        item.all_low = max(window_low(vec.last(), a.window), all.begin);
        item.all_high = min(vec.first() + 1, all.end);
        item.t0 = item.low / 128;
        item.t1 = item.high > item.low ? (item.high + 127) / 128 : item.t0;
        return true;
    }
    DEVICE u32 ticket(u32 tile) const { return tile; }
    // A warp's 32 keys lie in one page.
    DEVICE At at(u32 tile) const {
        u32 first = tile * 128, token = first + (threadIdx.x & 96);
        bool ok = token < seq.kv_len;
        return {ok ? pool_row(token & ~(PAGE - 1)) : 0, ok ? seq.kv_len - first : 0};
    }
    DEVICE u32 pool_row(u32 token) const { return a.pool.row(seq, kvh, token); }
    struct Plain {
        u32 low, high;
        DEVICE Plain(const Item& item) : low(item.all_low), high(item.all_high) {}
        DEVICE bool sees(u32 tile, const u32*) const { return tile * 128 >= low && (tile + 1) * 128 <= high; }
    };
    // What a row at position p sees.
    struct Sees {
        u32 low, count;
        DEVICE Sees(const AttendArgs& a, const Item& item, u32 p) {
            low = max(window_low(p, a.window), item.low);
            u32 high = min(p + 1, item.high);
            count = high > low ? high - low : 0;
        }
        DEVICE bool operator()(u32 tile, u32 key, const u32*) const { return tile * 128 + key - low < count; }
    };
};
#endif

// Query vectors v0.. of the sequence's (row, head) pairs.
struct CausalVectors {
    u64 row0;
    u32 v0, g, heads, head0, offset, window;
    DEVICE u64 item(u32 r) const { return (row0 + (v0 + r) / g) * heads + head0 + (v0 + r) % g; }
    DEVICE u32 high(u32 r) const { return offset + (v0 + r) / g + 1; }
    DEVICE u32 low(u32 r) const { return window_low(offset + (v0 + r) / g, window); }
};

template <class A, class T> DEVICE void dense_generic(const AttendArgs& a) {
    u32 s = blockIdx.z / a.splits, split = blockIdx.z % a.splits, kvh = blockIdx.y;
    Seq seq = a.seqs.get(s);
    u32 g = a.heads / a.pool.kv_heads, vectors = seq.q_len * g, v0 = blockIdx.x * VECTORS;
    if (v0 >= vectors) return;
    u32 n = min(VECTORS, vectors - v0), offset = seq.kv_len - seq.q_len;
    CausalVectors vec = {seq.q_start, v0, g, a.heads, kvh * g, offset, a.window};
    Range all = split_range(window_low(offset, a.window), seq.kv_len, split, a.splits);
    u32 low = max(all.begin, vec.low(0));
    Contiguous keys = {low, min(all.end, vec.high(n - 1)), low};
    generic<A, T>(a, seq, kvh, n, split, vec, keys);
}

#define MMA(T, D)                                                                               \
    extern "C" __global__ void DECODE_BOUNDS(D)                                                    \
        attend_decode_##T##_d##D(AttendArgs a, const __grid_constant__ Maps maps) {             \
        early_decode<T, D>(a, DensePairs{a}, &maps);                                            \
    }                                                                                           \
    extern "C" __global__ void DECODE_BOUNDS(D)                                                    \
        attend_scored_##T##_d##D(AttendArgs a, const __grid_constant__ Maps maps) {             \
        early_decode<T, D>(a, ScoredPairs{DensePairs{a}}, &maps);                               \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(128) attend_prefill_##T##_d##D(AttendArgs a) { \
        depend();                                                                               \
        dense_prefill<T, D>(a);                                                                 \
    }
#define MMA_ALL(T) MMA(T, 64) MMA(T, 96) MMA(T, 128) MMA(T, 256)
MMA_ALL(f16)
MMA_ALL(bf16)

#if WGMMA
#define HOPPER(T, D)                                                                      \
    extern "C" __global__ void __launch_bounds__(384, 1) attend_prefill_wgmma_##T##_d##D( \
        const __grid_constant__ AttendArgs a, const __grid_constant__ Items all,          \
        const __grid_constant__ Maps maps) {                                              \
        depend();                                                                         \
        attend_wgmma<T, D, RunTiles>(a, all, maps.of);                                    \
    }                                                                                     \
    extern "C" __global__ void __launch_bounds__(384, 1) attend_lse_wgmma_##T##_d##D(     \
        const __grid_constant__ AttendArgs a, const __grid_constant__ Items all,          \
        const __grid_constant__ Maps maps) {                                              \
        depend();                                                                         \
        attend_wgmma<T, D, RunTiles, false>(a, all, maps.of);                             \
    }
HOPPER(f16, 64)
HOPPER(f16, 128)
HOPPER(bf16, 64)
HOPPER(bf16, 128)
#endif

#define GENERIC(A, T)                                                                           \
    extern "C" __global__ void __launch_bounds__(128, 4) attend_dense_##A##_##T(AttendArgs a) { \
        depend();                                                                               \
        dense_generic<A, T>(a);                                                                 \
    }
GENERIC(f32, f32)
GENERIC(f32, f16)
GENERIC(f32, bf16)
GENERIC(f16, f16)
GENERIC(bf16, bf16)
