// Partial logits of one decode query per sequence on few key dimensions, shared by score_dims (every cached token)
// and score_rows (listed tokens).
//
// Four lanes share a key row in chunks of 8 dimensions (16 bytes of a 16-bit cache), a quad handles ROWS rows at a
// time so that loads overlap and every query value read from shared memory serves ROWS rows. The sum over heads is
// taken in the query, before the dot product.
#pragma once
#include "paged.cuh"

#define MAX_GROUP 16u
#define LEAD 0u
#define INT8 1u
#define SLICE 2u
#define GATHER 3u
#define SLICE8 4u
#define SLICE4 5u

struct ScoreArgs {
    const void* q;
    Seqs seqs;
    Pool pool;
    const void* data;       // int8 copy, compact or quantised slice
    const float* row_scale; // scales of either
    const u32* dims;        // slice or gather: [slots, kv_heads, n]
    float* scores;
    u64 stride;
    u32 n, width, capacity;  // dimensions read; elements of a row of `data`; tokens a slice holds
    u32 heads, pool_mode, coverage, source;
    u32 q_type;  // 0 f32, 1 f16, 2 bf16; the query is read once, so its dtype is no template parameter
    const u32* indices;   // score_rows: [n, lists, list_len]
    const u32* counts;    // score_rows: [n, lists]
    u32 lists, list_len;  // score_rows: lists a sequence, capacity of a list
    u32 settled, pad;     // score_dims: all tokens but the newest may be read before depend()
    float2* sums;         // score_mma without a pool: [n, heads, blocks], see `Powers`; or null
};
static_assert(sizeof(ScoreArgs) == 168, "as ScoreArgs of score.rs");

// Value `i` of the query at `src` as the keys' dimensions are listed (`dims`, or null for the leading ones).
DEVICE float query_of(const ScoreArgs& a, const u32* dims, u64 src, u32 i) {
    u32 dim = dims ? dims[i] : i;
    return dim < a.pool.head_dim ? load_any(a.q, a.q_type, src + dim) : 0.0f;
}

// c_h of the head whose query starts at `src`, by a warp.
DEVICE float head_scale(const ScoreArgs& a, const u32* dims, u64 src) {
    u32 d = a.pool.head_dim, lane = threadIdx.x & 31;
    if (!a.coverage) return 1.0f / sqrtf((float)d);
    float all = 0.0f, chosen = 0.0f;
    for (u32 i = lane; i < d; i += 32) all += fabsf(load_any(a.q, a.q_type, src + i));
    for (u32 i = lane; i < a.n; i += 32) chosen += fabsf(query_of(a, dims, src, i));
    all = warp_sum(all);
    chosen = warp_sum(chosen);
    return chosen > 0.0f ? 1.0f / sqrtf((float)d * (chosen / all)) : 0.0f;
}

// Query values of heads [head0, head0 + g) in shared memory, scaled: [heads or 1][n].
DEVICE void load_query(const ScoreArgs& a, const Seq& seq, u32 kvh, u32 head0, u32 g, float* q,
                       float* c) {
    u32 d = a.pool.head_dim, warp = threadIdx.x >> 5;
    u64 src = ((u64)seq.q_start * a.heads + head0) * d;
    const u32* dims = a.source >= SLICE ? a.dims + ((u64)seq.slot * a.pool.kv_heads + kvh) * a.n : nullptr;
    for (u32 h = warp; h < g; h += blockDim.x >> 5) {
        float scale = head_scale(a, dims, src + h * d);
        if ((threadIdx.x & 31) == 0) c[h] = scale;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < a.n; i += blockDim.x) {
        float sum = 0.0f;
        for (u32 h = 0; h < g; h++) {
            float x = query_of(a, dims, src + h * d, i) * c[h];
            if (a.pool_mode == POOL_SUM) sum += x;
            else q[h * a.n + i] = x;
        }
        if (a.pool_mode == POOL_SUM) q[i] = sum;
    }
    __syncthreads();
}

// Eight values of a key row from column `c` on. `whole[c / 8]`: the listed dimensions neighbour in memory.
template <class K, u32 SOURCE>
DEVICE Raw8<K> load_chunk(const ScoreArgs& a, u64 base, u32 row, u32 c, const u32* dims,
                          const u32* whole) {
    if (SOURCE == LEAD) return load8((const K*)a.pool.k + a.pool.k_at(row, c));
    if (SOURCE == GATHER) {
        const K* k = (const K*)a.pool.k;
        if (whole[c / 8]) return load8(k + a.pool.k_at(row, dims[c]));
        Raw8<K> r;
#pragma unroll
        for (int i = 0; i < 8; i++) ((K*)&r)[i] = k[a.pool.k_at(row, dims[c + i])];
        return r;
    }
    if (SOURCE == SLICE4) {
        // Eight numbers a word, in two's complement.
        u32 word = *(const u32*)((const i8*)a.data + base + c / 2);
        Raw8<K> r;
#pragma unroll
        for (int i = 0; i < 8; i++) ((i8*)&r)[i] = (i8)((int)(word << (28 - 4 * i)) >> 28);
        return r;
    }
    return load8((const K*)a.data + base + c);
}

// Part `blockIdx.y` of the `parts` that the heads of a sequence fall into (a KV head's, or single ones) against
// `keys`: `count()` of them, number i being `token(i)`, a token that is there where `cached(token)`.
template <class K, u32 SOURCE, int G, int ROWS, class Keys>
DEVICE void score(const ScoreArgs& a, const Seq& seq, u32 parts, const Keys& keys) {
    __shared__ float q[MAX_GROUP * 256];
    __shared__ float c[MAX_GROUP];
    __shared__ u32 dims[256], whole[32];
    u32 g = a.heads / parts, head0 = blockIdx.y * g, n = a.n, count = keys.count();
    u32 kvh = head0 / (a.heads / a.pool.kv_heads);
    const u32 block = blockDim.x / 4 * ROWS, step = gridDim.x * block;
    constexpr bool SLOTTED = SOURCE == SLICE || SOURCE == SLICE8 || SOURCE == SLICE4;
    constexpr bool SCALED = SOURCE == INT8 || SOURCE == SLICE8 || SOURCE == SLICE4;
    if (blockIdx.x * block >= count) return;
    if (SOURCE == GATHER) {
        const u32* list = a.dims + ((u64)seq.slot * a.pool.kv_heads + kvh) * n;
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) dims[i] = min(list[i], a.pool.head_dim - 1);
        __syncthreads();
        if (threadIdx.x < n / 8) {
            bool run = dims[threadIdx.x * 8] % 8 == 0;
            for (u32 i = 1; i < 8; i++) run &= dims[threadIdx.x * 8 + i] == dims[threadIdx.x * 8] + i;
            whole[threadIdx.x] = run;
        }
        __syncthreads();
    }
    u32 lane = threadIdx.x & 31, sub = lane & 3;
    u32 first_row = (threadIdx.x >> 5) * 8 * ROWS + (lane >> 2);
    u32 rows_out = a.pool_mode == POOL_NONE ? g : 1, heads = a.pool_mode == POOL_SUM ? 1 : g;
    u64 out_row = ((u64)blockIdx.z * parts + blockIdx.y) * rows_out;

    u32 row[ROWS];
    u64 base[ROWS];
    Raw8<K> raw[ROWS];
    float row_scale = 1.0f;
    auto fetch = [&](u32 t0) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            // Rows past the end repeat the last one; their scores are not written.
            u32 t = keys.token(min(t0 + first_row + 8 * r, count - 1));
            t = keys.cached(t) ? t : 0;
            row[r] = SLOTTED ? 0 : a.pool.row(seq, kvh, t);
            base[r] = SLOTTED
                ? (((u64)seq.slot * a.pool.kv_heads + kvh) * a.capacity + t) * a.width
                : (u64)row[r] * a.width;
            if (SCALED && r == sub)
                row_scale = a.row_scale[SLOTTED ? ((u64)seq.slot * a.pool.kv_heads + kvh) * a.capacity + t : row[r]];
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (sub * 8 < n) raw[r] = load_chunk<K, SOURCE>(a, base[r], row[r], sub * 8, dims, whole);
    };
    // The first keys come while the query is prepared.
    u32 t0 = blockIdx.x * block;
    fetch(t0);
    load_query(a, seq, kvh, head0, g, q, c);

    while (true) {
        float acc[ROWS][G] = {};
        for (u32 ch = sub * 8; ch < n; ch += 32) {
            if (ch >= 32) {
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    raw[r] = load_chunk<K, SOURCE>(a, base[r], row[r], ch, dims, whole);
            }
            float x[ROWS][8];
#pragma unroll
            for (int r = 0; r < ROWS; r++) unpack8(raw[r], x[r]);
#pragma unroll
            for (int h = 0; h < G; h++) {
                if (h >= heads) break;
                float4 lo = *(const float4*)&q[h * n + ch], hi = *(const float4*)&q[h * n + ch + 4];
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float s = acc[r][h];
                    s = fmaf(lo.x, x[r][0], s), s = fmaf(lo.y, x[r][1], s);
                    s = fmaf(lo.z, x[r][2], s), s = fmaf(lo.w, x[r][3], s);
                    s = fmaf(hi.x, x[r][4], s), s = fmaf(hi.y, x[r][5], s);
                    s = fmaf(hi.z, x[r][6], s), s = fmaf(hi.w, x[r][7], s);
                    acc[r][h] = s;
                }
            }
        }
        float best = NEG_INF;
#pragma unroll
        for (int h = 0; h < G; h++) {
            if (h >= heads) break;
            float mine = 0.0f;  // lane `sub` of the quad keeps rows sub, sub + 4, ..
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float s = acc[r][h];
                s += __shfl_xor_sync(~0u, s, 1);
                s += __shfl_xor_sync(~0u, s, 2);
                if (r == sub) mine = s;
            }
            u32 t = t0 + first_row + 8 * sub;
            if (sub >= ROWS || t >= count) continue;
            if (SCALED) mine *= row_scale;
            if (!(fabsf(mine) < POS_INF) || !keys.cached(keys.token(t))) mine = NEG_INF;  // see `finite`
            best = fmaxf(best, mine);
            if (a.pool_mode == POOL_NONE) a.scores[(out_row + h) * a.stride + t] = mine;
        }
        u32 t = t0 + first_row + 8 * sub;
        if (a.pool_mode != POOL_NONE && sub < ROWS && t < count)
            a.scores[out_row * a.stride + t] = best;
        t0 += step;
        if (t0 >= count) break;
        fetch(t0);
    }
}
