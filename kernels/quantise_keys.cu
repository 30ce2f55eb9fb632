// quantise_keys: brings the chosen key dimensions of every token, in 4 or 8 bits, up to date:
//   scale = max_c |k[c]| / most, number[c] = round(k[c] / scale), ties to even; most = 7 or 127
//
// Plan: two launches. `quantise_keys`: grid (pages, KV heads, sequences); CTAs walk the pages from `done` on, a warp a
// token, which finds the largest of its numbers first. `quantise_mark`: notes how many tokens are there. Bytes: new
// tokens * n * kv, and a quarter to a half of that written.
#include "paged.cuh"

struct QuantiseArgs {
    Seqs seqs;
    Pool pool;
    i8* data;
    float* scale;
    const u32* dims;
    u32* done;
    u32 n, four, capacity, slots;
};
static_assert(sizeof(QuantiseArgs) == 96, "as QuantiseArgs of kv.rs");

DEVICE int number(float x, float scale, float most) {
    float q = scale > 0.0f ? rintf(x / scale) : 0.0f;
    return (int)fminf(fmaxf(q, -most), most);
}

template <class T> DEVICE void quantise_keys(const QuantiseArgs& a) {
    Seq seq = a.seqs.get(blockIdx.z);
    u32 h = blockIdx.y, n = a.n, lane = threadIdx.x & 31;
    if (seq.slot >= a.slots || seq.kv_len > a.capacity) return;
    u64 slot = (u64)seq.slot * a.pool.kv_heads + h;
    const u32* dims = a.dims + slot * n;
    const T* k = (const T*)a.pool.k;
    u32 first = min(a.done[slot], seq.kv_len), bytes = a.four ? n / 2 : n;
    float most = a.four ? 7.0f : 127.0f;
    for (u32 page = first / PAGE + blockIdx.x; page * PAGE < seq.kv_len; page += gridDim.x) {
        u32 end = min((page + 1) * PAGE, seq.kv_len);
        for (u32 t = max(first, page * PAGE) + (threadIdx.x >> 5); t < end; t += blockDim.x >> 5) {
            u32 row = a.pool.row(seq, h, t);
            float top = 0.0f;
            for (u32 c = lane; c < n; c += 32)
                top = fmaxf(top, fabsf(to_f32(k[a.pool.k_at(row, min(dims[c], a.pool.head_dim - 1))])));
            float scale = warp_max(top) / most;
            u64 out = slot * a.capacity + t;
            if (lane == 0) a.scale[out] = scale;
            for (u32 b = lane; b < bytes; b += 32) {
                u32 c = a.four ? 2 * b : b;
                int low = number(to_f32(k[a.pool.k_at(row, min(dims[c], a.pool.head_dim - 1))]), scale, most);
                if (a.four) {
                    u32 next = min(dims[c + 1], a.pool.head_dim - 1);
                    low = (low & 15) | (number(to_f32(k[a.pool.k_at(row, next)]), scale, most) << 4);
                }
                a.data[out * bytes + b] = (i8)low;
            }
        }
    }
}

extern "C" __global__ void quantise_mark(QuantiseArgs a, u32 sequences) {
    depend();
    mark(a, sequences);
}

#define KERNEL(T) \
    extern "C" __global__ void quantise_keys_##T(QuantiseArgs a) { depend(); quantise_keys<T>(a); }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
