// The logits of score.cuh on tensor cores: 16-bit queries against 16-bit or 8-bit keys, NC times 32 dimensions.
//
// mma m16n8k16 with keys as the left operand: a quad holds a key row in pieces of 8 dimensions, as it loads them. Which
// dimension is which of the operand's columns does not matter as long as queries and keys agree, so nothing is moved
// between lanes. Heads are the 8 columns of a result, NT times. Integers become f16 without rounding, and a query that
// a power of two has brought below 1 does up to 2^-24 of its largest value.
#pragma once
#include "mma.cuh"
#include "score.cuh"

template <class K> struct Operand {
    typedef K type;
};
template <> struct Operand<i8> {
    typedef f16 type;
};

// Eight elements as four registers of two.
template <class K> DEVICE void operand(const Raw8<K>& r, u32 (&x)[4]) {
    x[0] = r.v.x, x[1] = r.v.y, x[2] = r.v.z, x[3] = r.v.w;
}
DEVICE void operand(const Raw8<i8>& r, u32 (&x)[4]) {
    // 1024 + (byte + 128) as f16 by putting the byte below an exponent, less 1152.
    u32 words[2] = {r.v.x ^ 0x80808080u, r.v.y ^ 0x80808080u};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 raised = __byte_perm(words[i >> 1], 0x64646464u, i & 1 ? 0x4342 : 0x4140);
        asm("sub.f16x2 %0, %1, %2;" : "=r"(x[i]) : "r"(raised), "r"(0x64806480u));
    }
}

// Largest magnitude of a head's query below 2^result.
DEVICE int exponent_above(float x) { return x > 0.0f && x < POS_INF ? ilogbf(x) + 1 : 0; }

template <class K, u32 SOURCE, int NC, int NT, int ROWS, class Keys>
DEVICE void score_mma(const ScoreArgs& a, const Seq& seq, u32 parts, const Keys& keys) {
    typedef typename Operand<K>::type Q;
    constexpr bool SLOTTED = SOURCE == SLICE || SOURCE == SLICE8 || SOURCE == SLICE4;
    constexpr bool SCALED = SOURCE == INT8 || SOURCE == SLICE8 || SOURCE == SLICE4;
    __shared__ float of_head[MAX_GROUP];
    __shared__ int exponents[MAX_GROUP];
    u32 g = a.heads / parts, head0 = blockIdx.y * g, d = a.pool.head_dim, count = keys.count();
    u32 kvh = head0 / (a.heads / a.pool.kv_heads);
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, sub = lane & 3;
    const u32 block = blockDim.x / 4 * ROWS, step = gridDim.x * block;
    u32 t0 = blockIdx.x * block;
    if (t0 >= count) return;
    u64 slot = (u64)seq.slot * a.pool.kv_heads + kvh;

    Raw8<K> raw[ROWS][NC];
    float row_scale[(ROWS + 3) / 4];
    u32 there;  // a bit a row
    auto fetch = [&](u32 t0) {
        // A warp's tokens in order lie in one page.
        u32 first = min(t0 + warp * 8 * ROWS, count - 1) / (8 * ROWS) * (8 * ROWS);
        u32 run = Keys::in_order && !SLOTTED ? a.pool.row(seq, kvh, first) + (lane >> 2) : 0;
        there = 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            u32 row = run + 8 * r;
            if (!Keys::in_order || SLOTTED) {
                // Past the end the last one again; its scores are not written.
                u32 t = keys.token(min(t0 + warp * 8 * ROWS + (lane >> 2) + 8 * r, count - 1));
                bool ok = keys.cached(t);
                if (ok) there |= 1u << r;
                row = SLOTTED ? (ok ? t : 0) : a.pool.row(seq, kvh, ok ? t : 0);
            } else {
                there |= 1u << r;
            }
            u64 base = (SLOTTED ? slot * a.capacity + row : (u64)row) * a.width;
            if (SCALED && (r & 3) == sub) row_scale[r / 4] = a.row_scale[SLOTTED ? slot * a.capacity + row : row];
#pragma unroll
            for (int c = 0; c < NC; c++)
                raw[r][c] = load_chunk<K, SOURCE>(a, base, row, c * 32 + sub * 8, nullptr, nullptr);
        }
    };
    // The first keys come while the query is prepared.
    fetch(t0);

    const u32* dims = SLOTTED ? a.dims + slot * a.n : nullptr;
    u64 src = ((u64)seq.q_start * a.heads + head0) * d;
    for (u32 h = warp; h < g; h += blockDim.x >> 5) {
        float scale = head_scale(a, dims, src + h * d), top = 0.0f;
        if (SCALED)
            for (u32 i = lane; i < a.n; i += 32) top = fmaxf(top, fabsf(query_of(a, dims, src + h * d, i)));
        int e = SCALED ? exponent_above(warp_max(top)) : 0;
        if (lane == 0) exponents[h] = e, of_head[h] = ldexpf(scale, e);
    }
    __syncthreads();
    u32 q[NT][NC][4];
    float scale[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        u32 h = n * 8 + (lane >> 2);
#pragma unroll
        for (int c = 0; c < NC; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float x[2] = {};
#pragma unroll
                for (int j = 0; j < 2; j++)
                    if (h < g) x[j] = ldexpf(query_of(a, dims, src + h * d, c * 32 + sub * 8 + i * 2 + j), -exponents[h]);
                q[n][c][i] = pack2<Q>(x[0], x[1]);
            }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            u32 h = n * 8 + sub * 2 + j;
            scale[n][j] = h < g ? of_head[h] : 0.0f;
        }
    }
    u64 out_row = ((u64)blockIdx.z * parts + blockIdx.y) * (a.pool_mode == POOL_NONE ? g : 1);

    while (true) {
        float acc[ROWS / 2][NT][4] = {};
#pragma unroll
        for (int c = 0; c < NC; c++) {
            u32 x[ROWS][4];
#pragma unroll
            for (int r = 0; r < ROWS; r++) operand(raw[r][c], x[r]);
#pragma unroll
            for (int p = 0; p < ROWS / 2; p++)
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    u32 keys16[4] = {x[2 * p][2 * s], x[2 * p + 1][2 * s], x[2 * p][2 * s + 1], x[2 * p + 1][2 * s + 1]};
#pragma unroll
                    for (int n = 0; n < NT; n++)
                        mma16816(acc[p][n], keys16, q[n][c][2 * s], q[n][c][2 * s + 1], Q());
                }
        }
        float own_scale[(ROWS + 3) / 4];
#pragma unroll
        for (int i = 0; i < (ROWS + 3) / 4; i++) own_scale[i] = SCALED ? row_scale[i] : 1.0f;
        u32 mine = t0 + warp * 8 * ROWS + (lane >> 2), ok = there;
        t0 += step;
        bool more = t0 < count;
        if (more) fetch(t0);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float of_row = SCALED ? __shfl_sync(~0u, own_scale[r / 4], (lane & ~3u) | (r & 3)) : 1.0f;
            u32 t = mine + 8 * r;
            bool listed = t < count;
            float pooled = a.pool_mode == POOL_SUM ? 0.0f : NEG_INF;
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    u32 h = n * 8 + sub * 2 + j;
                    if (h >= g) continue;
                    float s = acc[r / 2][n][(r & 1) * 2 + j] * scale[n][j] * of_row;
                    if (a.pool_mode == POOL_SUM) {
                        pooled += s;
                        continue;
                    }
                    if (!(fabsf(s) < POS_INF) || !(ok >> r & 1)) s = NEG_INF;  // never taken by top_k
                    pooled = fmaxf(pooled, s);
                    if (a.pool_mode == POOL_NONE && listed) a.scores[(out_row + h) * a.stride + t] = s;
                }
            if (a.pool_mode == POOL_NONE) continue;
#pragma unroll
            for (int s = 1; s < 4; s <<= 1) {
                float other = __shfl_xor_sync(~0u, pooled, s);
                pooled = a.pool_mode == POOL_SUM ? pooled + other : fmaxf(pooled, other);
            }
            if (!(fabsf(pooled) < POS_INF) || !(ok >> r & 1)) pooled = NEG_INF;
            if (sub == (r & 3) && listed) a.scores[out_row * a.stride + t] = pooled;
        }
        if (!more) break;
    }
}
