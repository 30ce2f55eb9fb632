// The logits of score.cuh on tensor cores: 16-bit queries against 16-bit or 8-bit keys, NC times 32 dimensions.
//
// mma m16n8k16 with keys as the left operand: a quad holds a key row in pieces of 8 dimensions, as it loads them. Which
// dimension is which of the operand's columns does not matter as long as queries and keys agree, so nothing is moved
// between lanes. Heads are the 8 columns of a result, NT times. Integers become f16 without rounding, and a query that
// a power of two has brought below 1 does up to 2^-24 of its largest value. What counts for keys of 8 bits is how few
// instructions a key takes: some 35 for 8 keys of a warp now, which reads at 93 to 95 % of the read bandwidth.
#pragma once
#include "lse.cuh"
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
// How the heads' logits of a row become one score.
struct Sum {
    DEVICE float none() const { return 0.0f; }
    DEVICE float add(float all, float x) const { return all + x; }
    DEVICE float join(float x, float y) const { return x + y; }
};
// NaN counts for nothing, nor does infinity, where there can be one.
template <bool INFINITE> struct Largest {
    DEVICE float none() const { return NEG_INF; }
    DEVICE float add(float all, float x) const { return fmaxf(all, INFINITE ? finite(x) : x); }
    DEVICE float join(float x, float y) const { return fmaxf(x, y); }
};

// Of four rows of a quad, the one whose score lane `sub` of it keeps; and the lane that keeps row `sub`.
DEVICE u32 keeper(u32 sub) { return sub >> 1 | (sub & 1) << 1; }

// All `g` heads of the row that this lane keeps; s(i, n, j): of row i, the lane's own head j of tile n. Every lane hands
// on what is not its own: three exchanges for four rows.
template <int NT, class Pool, class Scores> DEVICE float pool_rows(Pool pool, u32 g, Scores s) {
    u32 sub = threadIdx.x & 3;
    float rows[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        rows[i] = pool.none();
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (n * 8 + sub * 2 + j < g) rows[i] = pool.add(rows[i], s(i, n, j));
    }
    bool high = sub & 2, odd = sub & 1;
    float x = __shfl_xor_sync(~0u, high ? rows[0] : rows[1], 2), y = __shfl_xor_sync(~0u, high ? rows[2] : rows[3], 2);
    x = pool.join(high ? rows[1] : rows[0], x), y = pool.join(high ? rows[3] : rows[2], y);
    float z = __shfl_xor_sync(~0u, odd ? x : y, 1);
    return pool.join(odd ? y : x, z);
}

// Where this block leaves the sum of a head's exponentials.
DEVICE float2* sums_of(const ScoreArgs& a, u32 head) {
    return a.sums + ((u64)blockIdx.z * a.heads + head) * gridDim.x + blockIdx.x;
}

// SUMS: of scores that are not pooled the sums of their exponentials are left too.
template <class K, u32 SOURCE, int NC, int NT, int ROWS, bool SUMS, class Keys>
DEVICE void score_mma(const ScoreArgs& a, const Seq& seq, u32 parts, const Keys& keys) {
    typedef typename Operand<K>::type Q;
    static_assert(ROWS % 4 == 0, "a lane of a quad keeps one row of four");
    constexpr bool SLOTTED = SOURCE == SLICE || SOURCE == SLICE8 || SOURCE == SLICE4;
    constexpr bool SCALED = SOURCE == INT8 || SOURCE == SLICE8 || SOURCE == SLICE4;
    __shared__ float of_head[MAX_GROUP];
    __shared__ int exponents[MAX_GROUP];
    u32 g = a.heads / parts, head0 = blockIdx.y * g, d = a.pool.head_dim, count = keys.count();
    u32 kvh = head0 / (a.heads / a.pool.kv_heads);
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, sub = lane & 3;
    const u32 block = blockDim.x / 4 * ROWS, step = gridDim.x * block;
    u32 t0 = blockIdx.x * block;
    // What the cache holds of settled tokens is not written by the kernel before.
    constexpr bool CACHED = Keys::in_order && !SLOTTED;
    const bool early = CACHED && a.settled && t0 + block < count;
    if (CACHED && !early) depend();
    if (t0 >= count) {
        if (SUMS && threadIdx.x < g) *sums_of(a, head0 + threadIdx.x) = make_float2(NEG_INF, 0.0f);
        return;
    }
    const u64 slot = SLOTTED ? (u64)seq.slot * a.pool.kv_heads + kvh : 0;

    Raw8<K> raw[ROWS][NC];
    float row_scale[ROWS / 4];  // of the rows that this lane keeps
    u32 there;  // a bit a row
    auto fetch = [&](u32 t0) {
        there = ~0u;
        if constexpr (Keys::in_order) {
            // A warp's tokens lie in one page; past the end of a slice's slot the last of its tokens again. What is read
            // past the sequence's end is not written.
            u32 first = t0 + warp * 8 * ROWS, last = SLOTTED ? a.capacity - 1 : ~0u;
            u32 row0 = SLOTTED ? 0 : a.pool.row(seq, kvh, min(first, count - 1) / (8 * ROWS) * (8 * ROWS));
            u32 at = (SLOTTED ? first : 0) + (lane >> 2);
            if (SCALED)
#pragma unroll
                for (int i = 0; i < ROWS / 4; i++)
                    row_scale[i] = a.row_scale[slot * a.capacity + row0 + min(at + 8 * (4 * i + keeper(sub)), last)];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                u32 row = row0 + min(at + 8 * r, last);
#pragma unroll
                for (int c = 0; c < NC; c++)
                    raw[r][c] = load_chunk<K, SOURCE>(a, (slot * a.capacity + row) * a.width, row, c * 32 + sub * 8,
                                                      nullptr, nullptr);
            }
        } else {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                // Past the end the last one again; its scores are not written.
                u32 t = keys.token(min(t0 + warp * 8 * ROWS + (lane >> 2) + 8 * r, count - 1));
                bool ok = keys.cached(t);
                if (!ok) there &= ~(1u << r);
                u32 row = a.pool.row(seq, kvh, ok ? t : 0);
#pragma unroll
                for (int c = 0; c < NC; c++)
                    raw[r][c] = load_chunk<K, SOURCE>(a, (u64)row * a.width, row, c * 32 + sub * 8, nullptr, nullptr);
            }
        }
    };
    // The first keys come while the query is prepared, or even before it is there.
    fetch(t0);
    if (early) depend();

    const u32* dims = SLOTTED ? a.dims + slot * a.n : nullptr;
    u64 src = ((u64)seq.q_start * a.heads + head0) * d;
    for (u32 h = warp; h < g; h += blockDim.x >> 5) {
        float scale = head_scale(a, dims, src + h * d), top = 0.0f;
        if (SCALED)
            for (u32 i = lane; i < a.n; i += 32) top = fmaxf(top, -finite(-fabsf(query_of(a, dims, src + h * d, i))));
        top = warp_max(top);
        int e = SCALED ? exponent_above(top) : 0;
        // What is not finite makes NaN of every score of its head.
        if (lane == 0) exponents[h] = e, of_head[h] = top < POS_INF ? ldexpf(scale, e) : __int_as_float(0x7fffffff);
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
    // Of the first of the lane's heads, or of all, where they are pooled.
    u64 part = (u64)blockIdx.z * parts + blockIdx.y;
    float* to = a.scores + (SUMS || a.pool_mode == POOL_NONE ? part * g + sub * 2 : part) * a.stride;
    to += t0 + warp * 8 * ROWS + (lane >> 2);
    Powers powers[NT][2];

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
        float own_scale[ROWS / 4];
#pragma unroll
        for (int i = 0; i < ROWS / 4; i++) own_scale[i] = SCALED ? row_scale[i] : 1.0f;
        u32 mine = t0 + warp * 8 * ROWS + (lane >> 2), ok = there;
        t0 += step;
        bool more = t0 < count;
        if (more) fetch(t0);
        if (SUMS || a.pool_mode == POOL_NONE) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float of_row = SCALED ? __shfl_sync(~0u, own_scale[r / 4], (lane & ~3u) | keeper(r & 3)) : 1.0f;
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float& x = acc[r / 2][n][(r & 1) * 2 + j];
                        float s = finite(x * scale[n][j] * of_row);
                        bool here = mine + 8 * r < count;
                        if (n * 8 + sub * 2 + j < g && here) to[(n * 8 + j) * a.stride + 8 * r] = ok >> r & 1 ? s : NEG_INF;
                        x = here ? s : NEG_INF;
                    }
            }
            if (SUMS) {
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float x[ROWS];
#pragma unroll
                        for (int r = 0; r < ROWS; r++) x[r] = acc[r / 2][n][(r & 1) * 2 + j] * LOG2E;
                        powers[n][j].add(x);
                    }
            }
        } else {
#pragma unroll
            for (int four = 0; four < ROWS / 4; four++) {
                auto s = [&](int i, int n, int j) {
                    return acc[four * 2 + i / 2][n][(i & 1) * 2 + j] * scale[n][j];
                };
                float all = a.pool_mode == POOL_SUM ? pool_rows<NT>(Sum(), g, s) : pool_rows<NT>(Largest<!SCALED>(), g, s);
                u32 r = four * 4 + keeper(sub), t = mine + 8 * r;
                // No scale of a row is negative, so the largest stays the largest.
                if (t < count) to[8 * r] = ok >> r & 1 ? finite(all * own_scale[four]) : NEG_INF;
            }
        }
        if (!more) break;
        to += step;
    }
    if constexpr (SUMS) {
        // What the lanes and the warps have of a head.
        __shared__ float2 of_warps[4][MAX_GROUP];
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                powers[n][j].join(4);
                if (lane < 4) of_warps[warp][n * 8 + sub * 2 + j] = make_float2(powers[n][j].top, powers[n][j].sum);
            }
        __syncthreads();
        if (threadIdx.x >= g) return;
        Powers all;
        for (u32 w = 0; w < blockDim.x >> 5; w++) all.add(of_warps[w][threadIdx.x].x, of_warps[w][threadIdx.x].y);
        *sums_of(a, head0 + threadIdx.x) = make_float2(all.top, all.sum);
    }
}
