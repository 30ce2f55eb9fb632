// mean_value: the mean value in place of the tokens that were left out. Per query head,
//   out = alpha out + (1 - alpha) sum_v / kv_len, in place,
// with alpha the share of the estimated softmax that the listed tokens hold.
//
// Plan: grid (heads, sequences); one CTA goes over the row twice (largest, sum of exponentials), over the list once,
// and blends. Bytes: 8 * heads * kv_len (the second time from L2) + 8 * listed tokens.
#include "paged.cuh"

struct MeanValueArgs {
    const float* scores;
    Seqs seqs;
    const u32* indices;
    const u32* counts;
    const float* sums;
    void* out;
    u64 stride;
    u32 k, lists, heads, kv_heads, head_dim, slots;
};
static_assert(sizeof(MeanValueArgs) == 88, "as MeanValueArgs of attend.rs");

template <class T> DEVICE void mean_value(const MeanValueArgs& a) {
    __shared__ float maxes[32], scratch[33];
    Seq seq = a.seqs.get(blockIdx.y);
    u32 h = blockIdx.x, n = seq.kv_len;
    const float* row = a.scores + ((u64)blockIdx.y * a.heads + h) * a.stride;
    float m = NEG_INF, all = 0.0f, kept = 0.0f;
    for (u32 j = threadIdx.x; j < n; j += blockDim.x) m = fmaxf(m, row[j]);
    m = block_max(m, maxes);
    if (m == NEG_INF || seq.q_len == 0 || seq.slot >= a.slots) return;
    for (u32 j = threadIdx.x; j < n; j += blockDim.x) all += expf(row[j] - m);
    all = block_sum(all, scratch);
    u64 list = (u64)blockIdx.y * a.lists + h * a.lists / a.heads;
    u32 count = min(a.counts[list], a.k);
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        u32 t = a.indices[list * a.k + i];
        if (t < n) kept += expf(row[t] - m);
    }
    kept = block_sum(kept, scratch);
    float rest = fminf(fmaxf((all - kept) / all, 0.0f), 1.0f);
    if (rest == 0.0f) return;
    float share = rest / (float)n;
    u32 d = a.head_dim;
    const float* sums = a.sums + ((u64)seq.slot * a.kv_heads + h / (a.heads / a.kv_heads)) * 3 * d;
    T* out = (T*)a.out + ((u64)seq.q_start * a.heads + h) * d;
    for (u32 i = threadIdx.x; i < d; i += blockDim.x)
        out[i] = from_f32<T>((1.0f - rest) * to_f32(out[i]) + share * sums[i]);
}

#define KERNEL(T) \
    extern "C" __global__ void mean_value_##T(MeanValueArgs a) { depend(); mean_value<T>(a); }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
