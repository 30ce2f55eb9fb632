// content_bias: content importance of new tokens, in the keys' and queries' dimensions for it:
//   cis = a[m] * softplus(sum_i delta[m, i] v[r, i]), softplus(x) = max(x, 0) + ln(1 + exp(-|x|))
//
// Plan: a warp per (row, KV head), 8 numbers a lane at a time. The weights of `delta` stay in cache. Bytes:
// rows * kv_heads * head_dim * act, and rows * heads * (head_dim - at) * act.
#include "common.cuh"

#define WARPS 4u

struct BiasArgs {
    const void* v;
    const float* delta;
    const float* a;
    void* q;
    void* k;
    u64 v_stride;
    u32 rows, heads, kv_heads, head_dim, at;  // the bias begins at dimension `at`
    float high, low;                          // what a query holds for it
    u32 pad;
};
static_assert(sizeof(BiasArgs) == 80, "as BiasArgs of kv.rs");

template <class T> DEVICE void content_bias(const BiasArgs& p) {
    u32 item = blockIdx.x * WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    u32 row = item / p.kv_heads, head = item % p.kv_heads;
    if (row >= p.rows) return;
    u32 d = p.head_dim, width = p.kv_heads * d;
    const T* v = (const T*)p.v + row * p.v_stride;
    const float* delta = p.delta + head * width;
    float x = 0.0f;
    for (u32 c = lane * 8; c < width; c += 32 * 8) {
        float a[8], b[8];
        read8(v + c, a);
        read8(delta + c, b);
#pragma unroll
        for (int i = 0; i < 8; i++) x = fmaf(a[i], b[i], x);
    }
    x = warp_sum(x);
    float cis = p.a[head] * (fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
    u32 tail = d - p.at, group = p.heads / p.kv_heads;
    T* k = (T*)p.k + (u64)item * d + p.at;
    for (u32 i = lane; i < tail; i += 32) k[i] = from_f32<T>(i < 2 ? cis : 0.0f);
    T* q = (T*)p.q + ((u64)row * p.heads + head * group) * d + p.at;
    for (u32 i = lane; i < group * tail; i += 32) {
        u32 c = i % tail;
        q[i / tail * d + c] = from_f32<T>(c == 0 ? p.high : c == 1 ? p.low : 0.0f);
    }
}

#define KERNEL(T)                                                                             \
    extern "C" __global__ void __launch_bounds__(128) content_bias_##T(BiasArgs p) {          \
        depend();                                                                             \
        content_bias<T>(p);                                                                   \
    }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
