// merge: joins split results by log-sum-exp. With m = max_s lse_s and w_s = exp(lse_s - m):
//   out = sum_s w_s part_s / sum_s w_s,  lse = m + log sum_s w_s; zeros and -infinity when all are empty.
//
// Plan: grid (rows of a sequence, sequences, head groups); one warp per head, lanes over dimensions.
// Bytes: (splits * 4 + out) * rows * heads * head_dim.
#include "paged.cuh"

struct MergeArgs {
    const float* part;
    const float* part_lse;
    Seqs seqs;
    void* out;
    float* lse;
    u32 out_f32, splits, rows, heads, head_dim, pad;
};
static_assert(sizeof(MergeArgs) == 72, "as MergeArgs of attend.rs");

template <class T> DEVICE void merge(const MergeArgs& a) {
    Seq seq = a.seqs.get(blockIdx.y);
    u32 lane = threadIdx.x & 31, d = a.head_dim;
    Out<T> out = {a.out, a.out_f32};
    u64 plane = (u64)a.rows * a.heads;
    for (u32 i = blockIdx.x; i < seq.q_len; i += gridDim.x) {
        u32 warps = blockDim.x >> 5;
        for (u32 h = blockIdx.z * warps + (threadIdx.x >> 5); h < a.heads; h += gridDim.z * warps) {
            u64 item = (u64)(seq.q_start + i) * a.heads + h;
            float m = NEG_INF, sum = 0.0f;
            for (u32 s = 0; s < a.splits; s++) m = fmaxf(m, a.part_lse[s * plane + item]);
            float shift = m == NEG_INF ? 0.0f : m;
            for (u32 s = 0; s < a.splits; s++) sum += expf(a.part_lse[s * plane + item] - shift);
            float inv = sum > 0.0f ? 1.0f / sum : 0.0f;
            for (u32 x = lane; x < d; x += 32) {
                float acc = 0.0f;
                for (u32 s = 0; s < a.splits; s++) {
                    float w = expf(a.part_lse[s * plane + item] - shift);
                    if (w > 0.0f) acc += w * a.part[(s * plane + item) * d + x];
                }
                out.put(item * d + x, acc * inv);
            }
            if (a.lse && lane == 0) a.lse[item] = sum > 0.0f ? m + logf(sum) : NEG_INF;
        }
    }
}

#define KERNEL(T) \
    extern "C" __global__ void merge_##T(MergeArgs a) { depend(); merge<T>(a); }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
