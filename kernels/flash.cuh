// Tensor-core attention on 16 query vectors a warp: the step that decode, listed-row and prefill kernels
// share. S = Q K^T by mma.sync m16n8k16, online softmax in base 2, O += P V.
//
// Rows of a shared tile are padded by 8 elements (16 bytes), which puts the 8 rows of an ldmatrix into different banks:
// the padded row is an odd number of 16-byte chunks, as D is a multiple of 16. Or they are panels, swizzled.
#pragma once
#include "mma.cuh"
#include "paged.cuh"

// Elements of a padded row in shared memory.
template <int D> struct Padded {
    static const int value = D + 8;
};

// A tile of rows in shared memory: `place` of the 16-byte chunk c of row r, and the `chunk` from dimension d + more on, `d` a
// multiple of 16 that the compiler knows, `more` 0 or 8.
template <class T, int D> struct PaddedRows {
    const T* at;
    static DEVICE T* place(T* to, u32 r, u32 c) { return to + r * Padded<D>::value + c * 8; }
    DEVICE const T* chunk(u32 r, u32 d, u32 more) const { return at + r * Padded<D>::value + d + more; }
};
// ROWS rows as D/64 panels of [ROWS][64], 1024-byte aligned, the 16-byte chunk c of row r at chunk c ^ (r % 8), as the copy
// engine leaves them.
template <class T, int D, int ROWS> struct PanelRows {
    const T* at;
    static DEVICE T* place(T* to, u32 r, u32 c) {
        return to + (c / 8 * ROWS + r) * 64 + ((c ^ r) & 7) * 8;
    }
    DEVICE const T* chunk(u32 r, u32 d, u32 more) const {
        return at + d / 64 * ROWS * 64 + r * 64 + ((more ^ (r & 7) * 8) ^ (d & 63));
    }
};

// 16 query vectors as operands of mma: read from padded rows in shared memory whenever they are needed, or held.
template <class T, int D> struct SharedQuery {
    const T* q;
    DEVICE SharedQuery(const T* q) : q(q) {}
    DEVICE void fragment(u32 (&a)[4], int d) const {
        u32 lane = threadIdx.x & 31;
        ldmatrix4(a, q + (lane & 15) * Padded<D>::value + d + (lane >> 4) * 8);
    }
};
template <class T, int D> struct HeldQuery {
    u32 held[D / 16][4];
    DEVICE HeldQuery(const T* q) {
        SharedQuery<T, D> shared(q);
#pragma unroll
        for (int d = 0; d < D; d += 16) shared.fragment(held[d / 16], d);
    }
    DEVICE void fragment(u32 (&a)[4], int d) const {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = held[d / 16][i];
    }
};
// Held where registers allow.
template <class T, int D, bool HELD = (D <= 128)> struct QueryOf {
    typedef HeldQuery<T, D> type;
};
template <class T, int D> struct QueryOf<T, D, false> {
    typedef SharedQuery<T, D> type;
};

// s += Q K^T of 16 query vectors and KEYS keys: a thread holds vectors lane/4 and lane/4 + 8 (j >> 1) and
// keys 8 n + 2 * (lane % 4) + (j & 1).
template <class T, int D, int KEYS, class Query, class Rows>
DEVICE void logits(const Query& q, const Rows& k, float (&s)[KEYS / 8][4]) {
    u32 lane = threadIdx.x & 31;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        u32 a[4];
        q.fragment(a, d);
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            u32 b[4];
            ldmatrix4(b, k.chunk(n * 16 + (lane & 7) + (lane >> 4) * 8, d, (lane >> 3 & 1) * 8));
            mma16816(s[2 * n], a, b[0], b[1], T());
            mma16816(s[2 * n + 1], a, b[2], b[3], T());
        }
    }
}

// What becomes of the products of a tile besides the softmax: nothing.
struct Dropped {
    template <class... Any> DEVICE void operator()(const Any&...) const {}
};

// Running softmax of 16 query vectors: a thread holds vectors lane/4 and lane/4 + 8, and of each output
// tile of 8 dimensions the two at 2 * (lane % 4). `sum` is the thread's own part until `finish`.
template <int D> struct Flash {
    float o[D / 8][4];
    float top[2], sum[2];

    DEVICE void init() {
#pragma unroll
        for (int i = 0; i < D / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) o[i][j] = 0.0f;
        top[0] = top[1] = NEG_INF;
        sum[0] = sum[1] = 0.0f;
    }

    // One tile of KEYS keys. `q`: 16 query vectors; `k`, `v`: KEYS rows, zero where invalid.
    // `visible(half, key)` says whether vector lane/4 + 8 * half sees key `key` of the tile; asked only
    // when `masked`. `scale2` = logit scale * log2(e). `keep` is shown the products as `logits` leaves them.
    template <class T, int KEYS, class Query, class Rows, class Visible, class Keep = Dropped>
    DEVICE void step(const Query& q, const Rows& k, const Rows& v, float scale2, bool masked, Visible visible,
                     Keep keep = Keep()) {
        u32 lane = threadIdx.x & 31;
        float s[KEYS / 8][4] = {};
        logits<T, D, KEYS>(q, k, s);
        keep(s);
        float best[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float x = s[n][j] * scale2;
                if (masked && !visible(j >> 1, n * 8 + (lane & 3) * 2 + (j & 1))) x = NEG_INF;
                s[n][j] = x;
                best[j >> 1] = fmaxf(best[j >> 1], x);
            }
        float shift[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 1));
            best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 2));
            shift[h] = best[h] == NEG_INF ? 0.0f : best[h];
            float fix = exp2_fast(top[h] - shift[h]);
            top[h] = best[h];
            sum[h] *= fix;
#pragma unroll
            for (int i = 0; i < D / 8; i++) o[i][2 * h] *= fix, o[i][2 * h + 1] *= fix;
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[n][j] = exp2_fast(s[n][j] - shift[j >> 1]);
                sum[j >> 1] += s[n][j];
            }
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            u32 a[4] = {pack2<T>(s[2 * n][0], s[2 * n][1]), pack2<T>(s[2 * n][2], s[2 * n][3]),
                        pack2<T>(s[2 * n + 1][0], s[2 * n + 1][1]),
                        pack2<T>(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
            for (int d = 0; d < D; d += 16) {
                u32 b[4];
                ldmatrix4_trans(b, v.chunk(n * 16 + (lane & 15), d, (lane >> 4) * 8));
                mma16816(o[d / 8], a, b[0], b[1], T());
                mma16816(o[d / 8 + 1], a, b[2], b[3], T());
            }
        }
    }

    // Completes `sum` over the four threads that share a vector.
    DEVICE void finish() {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
            sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        }
    }
};

// Arguments that both attention ops share.
struct AttendArgs {
    const void* q;
    Seqs seqs;
    Pool pool;
    void* out;
    float* lse;           // or null
    const u32* indices;   // attend_rows: [n, lists, k]
    const u32* counts;    // attend_rows: [n, lists]
    const u32* head_map;  // attend_rows: [kv_heads], list of each KV head, or null
    float scale;
    u32 out_f32, heads, rows, splits, sequences;
    u32 together;         // decode of lists: a cluster of blocks a pair
    u32 window;           // attend_dense: tokens, 0 = none
    u32 lists, list_len;  // attend_rows: lists a sequence, capacity of a list
    float* parts;         // decode with one plane: see decode.cuh
    u32* arrived;
    float* scores;        // decode that keeps its logits: see attend_dense.cu
    u64 stride;
    u32 pool_mode;
    u32 mapped;           // attend_dense: K lies in one piece, and the kernel's maps describe K and V
    u32 settled;          // decode: all tokens but the newest may be read before depend()
    u32 lists_settled;    // attend_rows: so may lists and counts
};
static_assert(sizeof(AttendArgs) == 184, "as AttendArgs of attend.rs");
