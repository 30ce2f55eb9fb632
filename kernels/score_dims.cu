// score_dims: partial logits of one decode query per sequence on few key dimensions,
//   s_{h,j} = c_h * sum_{i in D} q_{h,i} K[j, i],
// for the group's heads, pooled over them (sum, max) or not.
//
// Plan: grid (token blocks, KV heads, sequences). Four lanes share a key row in chunks of 8 dimensions (16
// bytes of a 16-bit cache), a quad handles ROWS rows at a time so that loads overlap and every query
// value read from shared memory serves ROWS rows. The sum over heads is taken in the query, before the
// dot product. Bytes: kv_len * n * element + 4 * kv_len per output row.
#include "paged.cuh"

#define MAX_GROUP 16u
#define LEAD 0u
#define INT8 1u
#define SLICE 2u
#define GATHER 3u
#define POOL_NONE 0u
#define POOL_SUM 1u
#define POOL_MAX 2u

struct ScoreArgs {
    const void* q;
    Seqs seqs;
    Pool pool;
    const void* data;       // int8 copy or compact slice
    const float* row_scale; // int8 scales
    const u32* dims;        // slice or gather: [slots, kv_heads, n]
    float* scores;
    u64 stride;
    u32 n, width, capacity;  // dimensions read; elements of a row of `data`; tokens a slice holds
    u32 heads, pool_mode, coverage, source;
    u32 q_type;  // 0 f32, 1 f16, 2 bf16; the query is read once, so its dtype is no template parameter
};

DEVICE float query(const ScoreArgs& a, u64 i) {
    if (a.q_type == 0) return ((const float*)a.q)[i];
    return a.q_type == 1 ? to_f32(((const f16*)a.q)[i]) : to_f32(((const bf16*)a.q)[i]);
}

// Query values of the group in shared memory, scaled: [heads or 1][n].
DEVICE void load_query(const ScoreArgs& a, const Seq& seq, u32 kvh, u32 g, float* q, float* c) {
    u32 d = a.pool.head_dim, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 src = ((u64)seq.q_start * a.heads + kvh * g) * d;
    bool listed = a.source == SLICE || a.source == GATHER;
    const u32* dims = a.dims + ((u64)seq.slot * a.pool.kv_heads + kvh) * a.n;
    for (u32 h = warp; h < g; h += blockDim.x >> 5) {
        float all = 0.0f, chosen = 0.0f;
        for (u32 i = lane; i < d; i += 32) all += fabsf(query(a, src + h * d + i));
        for (u32 i = lane; i < a.n; i += 32) {
            u32 dim = listed ? dims[i] : i;
            chosen += dim < d ? fabsf(query(a, src + h * d + dim)) : 0.0f;
        }
        all = warp_sum(all);
        chosen = warp_sum(chosen);
        float scale = 1.0f / sqrtf((float)d);
        if (a.coverage) scale = chosen > 0.0f ? 1.0f / sqrtf((float)d * (chosen / all)) : 0.0f;
        if (lane == 0) c[h] = scale;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < a.n; i += blockDim.x) {
        u32 dim = listed ? dims[i] : i;
        float sum = 0.0f;
        for (u32 h = 0; h < g; h++) {
            float x = dim < d ? query(a, src + h * d + dim) * c[h] : 0.0f;
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
    return load8((const K*)a.data + base + c);
}

template <class K, u32 SOURCE, int G, int ROWS> DEVICE void score(const ScoreArgs& a) {
    __shared__ float q[MAX_GROUP * 256];
    __shared__ float c[MAX_GROUP];
    __shared__ u32 dims[256], whole[32];
    Seq seq = a.seqs.get(blockIdx.z);
    u32 kvh = blockIdx.y, g = a.heads / a.pool.kv_heads, n = a.n;
    const u32 block = blockDim.x / 4 * ROWS;
    if (seq.q_len == 0 || blockIdx.x * block >= seq.kv_len) return;
    load_query(a, seq, kvh, g, q, c);
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
    u64 out_row = ((u64)blockIdx.z * a.pool.kv_heads + kvh) * rows_out;

    for (u32 t0 = blockIdx.x * block; t0 < seq.kv_len; t0 += gridDim.x * block) {
        u32 row[ROWS];
        u64 base[ROWS];
        float acc[ROWS][G] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            // Rows past the end repeat the last one; their scores are not written.
            u32 t = min(t0 + first_row + 8 * r, seq.kv_len - 1);
            row[r] = SOURCE == SLICE ? 0 : a.pool.row(seq, kvh, t);
            base[r] = SOURCE == SLICE
                ? (((u64)seq.slot * a.pool.kv_heads + kvh) * a.capacity + t) * a.width
                : (u64)row[r] * a.width;
        }
        for (u32 ch = sub * 8; ch < n; ch += 32) {
            Raw8<K> raw[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                raw[r] = load_chunk<K, SOURCE>(a, base[r], row[r], ch, dims, whole);
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
            if (sub >= ROWS || t >= seq.kv_len) continue;
            if (SOURCE == INT8) mine *= a.row_scale[a.pool.row(seq, kvh, t)];
            if (!(fabsf(mine) < POS_INF)) mine = NEG_INF;  // never taken by top_k
            best = fmaxf(best, mine);
            if (a.pool_mode == POOL_NONE) a.scores[(out_row + h) * a.stride + t] = mine;
        }
        u32 t = t0 + first_row + 8 * sub;
        if (a.pool_mode != POOL_NONE && sub < ROWS && t < seq.kv_len)
            a.scores[out_row * a.stride + t] = best;
    }
}

// One instance per group size class: G accumulators a row.
#define KERNEL(K, NAME, SOURCE, G, ROWS)                                                          \
    extern "C" __global__ void __launch_bounds__(128, 4) score_dims_##NAME##_g##G(ScoreArgs a) {  \
        score<K, SOURCE, G, ROWS>(a);                                                             \
    }
#define GROUPS(K, NAME, SOURCE)        \
    KERNEL(K, NAME, SOURCE, 1, 4)      \
    KERNEL(K, NAME, SOURCE, 4, 4)      \
    KERNEL(K, NAME, SOURCE, 8, 4)      \
    KERNEL(K, NAME, SOURCE, 16, 2)
#define SOURCES(K)                     \
    GROUPS(K, K##_lead, LEAD)          \
    GROUPS(K, K##_slice, SLICE)        \
    GROUPS(K, K##_gather, GATHER)

SOURCES(f32)
SOURCES(f16)
SOURCES(bf16)
GROUPS(i8, int8, INT8)
