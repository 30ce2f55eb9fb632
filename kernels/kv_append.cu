// kv_append: writes the step's keys and values into the pages, the int8 copy and the compact slice.
// rope_append: `rope` of queries and keys, and kv_append of what comes out.
//
// Plan: grid (rows of a sequence, sequences); one warp per KV head, 8 dimensions a lane (head_dim <= 256); rope_append: a
// warp per head of a row.
// The int8 copy and the slice are made from the stored (rounded) key, so every summary agrees with
// the cache. Bytes: 2 * rows * kv_heads * head_dim * (act + kv), plus the summaries.
#include "paged.cuh"
#include "rope.cuh"

struct AppendArgs {
    const void* k;
    const void* v;
    u64 k_stride, v_stride;
    Seqs seqs;
    Pool pool;
    i8* int8_data;  // null: no int8 copy
    float* int8_scale;
    void* slice;  // null: no compact slice
    const u32* slice_dims;
    u32 int8_dims, slice_n, capacity, pad;
};
static_assert(sizeof(AppendArgs) == 128, "as AppendArgs of kv.rs");

template <class A, class T>
DEVICE void append_int8(const AppendArgs& a, const float (&key)[8], u32 row, u32 lane) {
    float top = 0.0f;
    bool mine = lane * 8 < a.int8_dims;
    if (mine) {
#pragma unroll
        for (int i = 0; i < 8; i++) top = fmaxf(top, fabsf(key[i]));
    }
    top = warp_max(top);
    float scale = top / 127.0f;
    if (lane == 0) a.int8_scale[row] = scale;
    if (!mine) return;
    i8* dst = a.int8_data + (u64)row * a.int8_dims + lane * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float q = scale > 0.0f ? rintf(key[i] / scale) : 0.0f;
        dst[i] = (i8)fminf(fmaxf(q, -127.0f), 127.0f);
    }
}

// The warp's lanes have 8 dimensions each of the key and the value of KV head `h` of token `token`, row `row` of the pages;
// `k`: the key.
template <class A, class T>
DEVICE void append_head(const AppendArgs& a, const Seq& seq, u32 row, u32 token, u32 h, const A* k, const float (&key)[8],
                        const A* v) {
    u32 lane = threadIdx.x & 31, d = a.pool.head_dim;
    float kept[8] = {}, val[8];
    if (lane * 8 < d) {
        read8(v + lane * 8, val);
        write8((T*)a.pool.k + a.pool.k_at(row, lane * 8), key);
        write8((T*)a.pool.v + a.pool.v_at(row, lane * 8), val);
#pragma unroll
        for (int j = 0; j < 8; j++) kept[j] = to_f32(from_f32<T>(key[j]));
    }
    if (a.int8_data) append_int8<A, T>(a, kept, row, lane);
    if (a.slice && seq.kv_len <= a.capacity) {
        u64 slot = (u64)seq.slot * a.pool.kv_heads + h;
        T* dst = (T*)a.slice + (slot * a.capacity + token) * a.slice_n;
        for (u32 c = lane; c < a.slice_n; c += 32) {
            u32 dim = a.slice_dims[slot * a.slice_n + c];
            if (dim < d) dst[c] = from_f32<T>(to_f32(k[dim]));
        }
    }
}

template <class A, class T> DEVICE void kv_append(const AppendArgs& a) {
    Seq seq = a.seqs.get(blockIdx.y);
    u32 lane = threadIdx.x & 31, d = a.pool.head_dim;
    for (u32 i = blockIdx.x; i < seq.q_len; i += gridDim.x) {
        u64 in = seq.q_start + i;
        for (u32 h = threadIdx.x >> 5; h < a.pool.kv_heads; h += blockDim.x >> 5) {
            const A* k = (const A*)a.k + in * a.k_stride + h * d;
            float key[8] = {};
            if (lane * 8 < d) read8(k + lane * 8, key);
            u32 token = seq.kv_len - seq.q_len + i;
            const A* v = (const A*)a.v + in * a.v_stride + h * d;
            append_head<A, T>(a, seq, a.pool.row(seq, h, token), token, h, k, key, v);
        }
    }
}

// A warp takes a head of a row. Keys come first: there is more to do for them. Rows that no sequence has stay as they are.
// Positions, records and pages were there before the step's kernels: what follows from them is worked out before depend().
template <class A, class T> DEVICE void early_rope_append(const RopeArgs& q, const RopeArgs& k, const AppendArgs& a) {
    Seq seq = a.seqs.get(blockIdx.y);
    u32 lane = threadIdx.x & 31, heads = k.heads + q.heads;
    u32 item = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), i = item / heads, h = item % heads, row = seq.q_start + i;
    bool there = i < seq.q_len, key = h < k.heads;
    if (!there) row = 0;  // any that is there
    RopeHead<A> head = key ? RopeHead<A>(k, row, h) : RopeHead<A>(q, row, h - k.heads);
    u32 token = seq.kv_len - seq.q_len + i;
    u32 at = there && key ? a.pool.row(seq, h, token) : 0;
    Angles angles = head.angles(min(lane * 8, head.d - 8));
    depend();
    if (!there) return;
    float v[8] = {}, inv = head.inverse();
    if (lane * 8 < head.d) head.rotate(lane * 8, angles, inv, v);
    if (!key) return;
    // As kv_append reads it; a slice takes any of the key's dimensions.
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = to_f32(from_f32<A>(v[j]));
    __syncwarp();
    append_head<A, T>(a, seq, at, token, h, head.out, v, (const A*)a.v + row * a.v_stride + h * head.d);
}

#define KERNEL(A, T)                                                                                         \
    extern "C" __global__ void kv_append_##A##_##T(AppendArgs a) { depend(); kv_append<A, T>(a); }           \
    extern "C" __global__ void rope_append_##A##_##T(RopeArgs q, RopeArgs k, AppendArgs a) {                 \
        early_rope_append<A, T>(q, k, a);                                                                    \
    }
KERNEL(f32, f32)
KERNEL(f32, f16)
KERNEL(f32, bf16)
KERNEL(f16, f32)
KERNEL(f16, f16)
KERNEL(f16, bf16)
KERNEL(bf16, f32)
KERNEL(bf16, f16)
KERNEL(bf16, bf16)
