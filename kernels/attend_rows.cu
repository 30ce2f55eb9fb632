// attend_rows: causal attention over listed tokens; see attend_dense for the formula.
//
// Plan. Decode (one row a sequence, 16-bit): decode.cuh, where a pair is the query heads that share a list; keys are
// gathered row by row, each K row as two pieces (leading dimensions, rest).
// A tile of rows (16-bit): wgmma.cuh on Hopper, else prefill.cuh, tiles of 64 list entries; where they lie is looked up
// two tiles ahead.
// Else: generic.cuh on 16 vectors at a time.
// Bytes: (2 * head_dim * kv + 4) per listed token and KV head.
#include "decode.cuh"
#include "generic.cuh"
#include "prefill.cuh"
#include "wgmma.cuh"

struct Listed {
    static const bool in_order = false;
    const u32* list;
    u32 b, e;
    DEVICE u32 begin() const { return b; }
    DEVICE u32 end() const { return e; }
    DEVICE u32 token(u32 i) const { return list[i]; }
    DEVICE u32 room() const { return e; }
};
// A list whose entries, `most` in memory, may be read before it is known how many count.
struct Whole : Listed {
    u32 most;
    DEVICE u32 room() const { return most; }
};

// Query vectors v0.. of the sequence's (row, head) pairs of `g` heads; a row sees tokens up to its own.
struct RowVectors {
    u64 row0;
    u32 v0, g, heads, head0, offset;
    DEVICE u64 item(u32 r) const { return (row0 + (v0 + r) / g) * heads + head0 + (v0 + r) % g; }
    DEVICE u32 low(u32) const { return 0; }
    DEVICE u32 high(u32 r) const { return offset + (v0 + r) / g + 1; }
};

// Query heads of a block: those of a KV head where a map names its list, else those of list `blockIdx.y`.
DEVICE u32 heads_per_block(const AttendArgs& a) {
    return a.heads / (a.head_map ? a.pool.kv_heads : a.lists);
}

// The list of sequence `s` for head group `group`; its range is all of it.
DEVICE Listed list_of(const AttendArgs& a, u32 s, u32 group) {
    u32 own = a.head_map ? a.head_map[group] : group;
    bool there = own < a.lists;  // a list that is not there is empty
    u32 list = s * a.lists + (there ? own : 0);
    return {a.indices + (u64)list * a.list_len, 0, there ? min(a.counts[list], a.list_len) : 0};
}

// Part `part` of `parts` of a list, in whole tiles of `unit`.
DEVICE Listed part_of(Listed keys, u32 part, u32 parts, u32 unit) {
    u32 per = ((keys.e + parts - 1) / parts + unit - 1) / unit * unit;
    keys.b = min(part * per, keys.e);
    keys.e = min(keys.b + per, keys.e);
    return keys;
}

// Query heads of a sequence that share a list, and the tokens of the list.
struct ListPairs {
    static const bool listed = true;
    const AttendArgs& a;
    u32 groups, per;
    DEVICE ListPairs(const AttendArgs& a)
        : a(a), groups(a.head_map ? a.pool.kv_heads : a.lists), per(a.heads / groups) {}
    DEVICE u32 pairs() const { return a.sequences * groups; }
    DEVICE Seq seq(u32 pair) const { return a.seqs.get(pair / groups); }
    DEVICE Heads heads(u32 pair) const {
        u32 head0 = pair % groups * per;
        return {head0 / (a.heads / a.pool.kv_heads), head0, per};
    }
    // An empty list takes a round too: somebody has to say that there is nothing.
    DEVICE u32 rounds(u32 pair, u32 round) const {
        u32 count = list_of(a, pair / groups, pair % groups).e;
        return seq(pair).q_len ? max((count + round - 1) / round, 1u) : 0;
    }
    DEVICE Listed keys(u32 pair, const Seq&, u32 from, u32 to) const {
        Listed keys = list_of(a, pair / groups, pair % groups);
        return {keys.list, from, min(to, keys.e)};
    }
    DEVICE Whole whole(u32 pair) const {
        return {list_of(a, pair / groups, pair % groups), a.list_len};
    }
    DEVICE Dropped keep(u32) const { return {}; }
    DEVICE Listed plane(u32 pair, const Seq&, u32 split) const {
        return part_of(list_of(a, pair / groups, pair % groups), split, a.splits, 16);
    }
};

// Entries of a list in tiles; tokens and cache rows of three tiles in turn are kept in shared memory.
template <int TILE> struct Gathered {
    struct Located {
        const u32* rows;
        DEVICE u32 row(u32 key) const { return rows[key]; }
    };
    const Pool& pool;
    const Seq& seq;
    Listed keys;
    u32 kvh, first;
    u32 (*tokens)[TILE];
    u32 (*rows)[TILE];
    DEVICE u32 begin() const { return keys.b; }
    DEVICE u32 end() const { return keys.e; }
    DEVICE void prepare(u32 tile) const {
        if (threadIdx.x >= TILE) return;
        u32 i = tile * TILE + threadIdx.x, token = i < keys.e ? keys.list[i] : ~0u;
        token = token < seq.kv_len ? token : ~0u;
        tokens[tile % 3][threadIdx.x] = token;
        rows[tile % 3][threadIdx.x] = token == ~0u ? ~0u : pool.row(seq, kvh, token);
    }
    DEVICE Located locate(u32 tile) const { return {rows[tile % 3]}; }
    // Lists are ascending: the last token decides.
    DEVICE bool masked(u32 tile) const { return tokens[tile % 3][TILE - 1] > first; }
    DEVICE bool seen(u32 tile, u32 key, u32 p) const { return tokens[tile % 3][key] <= p; }
};

template <class T, int D> DEVICE void rows_prefill(const AttendArgs& a) {
    const int TILE = PrefillShape<D>::keys;
    __shared__ u32 tokens[3][TILE], rows[3][TILE];
    u32 s = blockIdx.z / a.splits, split = blockIdx.z % a.splits;
    Seq seq = a.seqs.get(s);
    u32 per = heads_per_block(a), head0 = blockIdx.y * per, kvh = head0 / (a.heads / a.pool.kv_heads);
    Tile vec;
    if (!tile_of(vec, seq, per, head0)) return;
    Listed list = part_of(list_of(a, s, blockIdx.y), split, a.splits, TILE);
    Gathered<TILE> keys = {a.pool, seq, list, kvh, vec.first(), tokens, rows};
    prefill<T, D>(a, seq, kvh, vec, split, keys);
}

#if WGMMA
// The same keys for wgmma.cuh: a thread looks up the entry of its own number and hands the row to its warp.
struct ListTiles {
    static const bool listed = true;
    struct At {
        u32 mine, token;
        DEVICE bool full() const { return __all_sync(~0u, mine != ~0u); }
        DEVICE u32 row(u32 r) const { return __shfl_sync(~0u, mine, r & 31); }
    };
    const AttendArgs& a;
    Seq seq;
    Listed keys;
    u32 kvh;
    DEVICE ListTiles(const AttendArgs& args) : a(args) {}
    DEVICE bool take(u32 tile, u32 part, u32 plane, Item& item) {
        u32 s = plane / a.splits, split = plane % a.splits, per = heads_per_block(a);
        seq = a.seqs.get(s), keys = part_of(list_of(a, s, part), split, a.splits, 128);
        kvh = part * per / (a.heads / a.pool.kv_heads);
        Tile vec;
        if (!vec.of(seq, tile, 128, per, part * per)) return false;
        item.place(seq, vec, split);
        item.low = vec.first(), item.high = item.all_low = item.all_high = 0;
        item.t0 = keys.b / 128, item.t1 = keys.e > keys.b ? (keys.e + 127) / 128 : item.t0;
        return true;
    }
    DEVICE u32 ticket(u32 tile) const {
        u32 i = tile * 128 + threadIdx.x;
        return i < keys.e ? keys.list[i] : ~0u;
    }
    DEVICE At at(u32 token) const {
        bool ok = token < seq.kv_len;
        return {ok ? a.pool.row(seq, kvh, token) : ~0u, ok ? token : ~0u};
    }
    // Lists are ascending: the last token decides.
    struct Plain {
        u32 first;  // position
        DEVICE Plain(const Item& item) : first(item.low) {}
        DEVICE bool sees(u32, const u32* tokens) const { return tokens[127] <= first; }
    };
    struct Sees {
        u32 p;
        DEVICE Sees(const AttendArgs&, const Item&, u32 position) : p(position) {}
        DEVICE bool operator()(u32, u32 key, const u32* tokens) const { return tokens[key] <= p; }
    };
};
#endif

template <class A, class T> DEVICE void rows_generic(const AttendArgs& a) {
    u32 s = blockIdx.z / a.splits, split = blockIdx.z % a.splits;
    Seq seq = a.seqs.get(s);
    u32 per = heads_per_block(a), head0 = blockIdx.y * per;
    u32 vectors = seq.q_len * per, v0 = blockIdx.x * VECTORS;
    if (v0 >= vectors) return;
    RowVectors vec = {seq.q_start, v0, per, a.heads, head0, seq.kv_len - seq.q_len};
    u32 kvh = head0 / (a.heads / a.pool.kv_heads);
    Listed keys = part_of(list_of(a, s, blockIdx.y), split, a.splits, 16);
    generic<A, T>(a, seq, kvh, min(VECTORS, vectors - v0), split, vec, keys);
}

#define MMA(T, D)                                                                            \
    extern "C" __global__ void DECODE_BOUNDS(D)                                                 \
        attend_rows_##T##_d##D(AttendArgs a) {                                               \
        early_decode<T, D>(a, ListPairs(a));                                                 \
    }                                                                                        \
    extern "C" __global__ void __launch_bounds__(128) attend_tile_##T##_d##D(AttendArgs a) { \
        depend();                                                                            \
        rows_prefill<T, D>(a);                                                               \
    }
#define MMA_ALL(T) MMA(T, 64) MMA(T, 96) MMA(T, 128) MMA(T, 256)
MMA_ALL(f16)
MMA_ALL(bf16)

#if WGMMA
#define HOPPER(T, D)                                                                   \
    extern "C" __global__ void __launch_bounds__(384, 1) attend_tile_wgmma_##T##_d##D( \
        const __grid_constant__ AttendArgs a, const __grid_constant__ Items all) {     \
        depend();                                                                      \
        attend_wgmma<T, D, ListTiles>(a, all, nullptr);                                \
    }
HOPPER(f16, 64)
HOPPER(f16, 128)
HOPPER(bf16, 64)
HOPPER(bf16, 128)
#endif

#define GENERIC(A, T)                                                                       \
    extern "C" __global__ void __launch_bounds__(128) attend_rows_##A##_##T(AttendArgs a) { \
        depend();                                                                           \
        rows_generic<A, T>(a);                                                              \
    }
GENERIC(f32, f32)
GENERIC(f32, f16)
GENERIC(f32, bf16)
GENERIC(f16, f16)
GENERIC(bf16, bf16)
