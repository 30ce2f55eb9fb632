// score_summaries: logits of one decode query per sequence against summaries of its keys. As lo <= hi,
// max(q lo, q hi) = min(q, 0) lo + max(q, 0) hi, so that every kind is one dot product with what is stored.
//
// Plan: grid (blocks of summaries, KV heads, sequences); eight lanes read a summary in pieces of 8 numbers, the
// group's queries lie in shared memory. Bytes: kv_len / run * vectors * kv_heads * head_dim * kv.
#include "summaries.cuh"

#define THREADS 128u
#define LANES 8u

struct SummaryScoreArgs {
    const void* q;
    float* scores;
    Seqs seqs;
    Summaries summaries;
    u64 stride;
    u32 heads, kv_heads, head_dim;
    float scale;
    u32 q_type;  // 0 f32, 1 f16, 2 bf16; the query is read once, so its dtype is no template parameter
    u32 first, dims;  // the dimensions that count
    u32 pad;
};
static_assert(sizeof(SummaryScoreArgs) == 96, "as ScoreArgs of blocks.rs");

template <class T, int G> DEVICE void score(const SummaryScoreArgs& a) {
    extern __shared__ uint4 shared4[];
    float* q = (float*)shared4;  // [heads of the group][width]
    const Summaries& s = a.summaries;
    Seq seq = a.seqs.get(blockIdx.z);
    u32 kvh = blockIdx.y, d = a.head_dim, dims = a.dims, width = s.vectors * dims, group = a.heads / a.kv_heads;
    u32 count = s.count(seq.kv_len);
    u64 from = ((u64)seq.q_start * a.heads + kvh * group) * d + a.first;
    for (u32 i = threadIdx.x; i < group * dims; i += THREADS) {
        float x = load_any(a.q, a.q_type, from + i / dims * d + i % dims) * a.scale;
        u32 at = i / dims * width + i % dims;
        q[at] = s.kind == WINDOWS ? x : fminf(x, 0.0f);
        if (s.kind != WINDOWS) q[at + dims] = fmaxf(x, 0.0f);
    }
    __syncthreads();
    u32 sub = threadIdx.x % LANES, mine = threadIdx.x / LANES, block = THREADS / LANES;
    for (u32 base = blockIdx.x * block; base < count; base += gridDim.x * block) {
        // Lanes behind the end repeat the last summary; the shuffles need all of them.
        u32 g = min(base + mine, count - 1);
        const T* data = (const T*)s.data + s.at(seq, a.kv_heads, kvh, g, d) + a.first;
        float acc[G] = {};
        for (u32 c = sub * 8; c < width; c += LANES * 8) {
            float x[8];
            unpack8(load8(data + (c < dims ? c : c - dims + d)), x);
#pragma unroll
            for (int h = 0; h < G; h++) {
                if (h >= group) break;
                float4 lo = *(const float4*)&q[h * width + c], hi = *(const float4*)&q[h * width + c + 4];
                float sum = acc[h];
                sum = fmaf(lo.x, x[0], sum), sum = fmaf(lo.y, x[1], sum);
                sum = fmaf(lo.z, x[2], sum), sum = fmaf(lo.w, x[3], sum);
                sum = fmaf(hi.x, x[4], sum), sum = fmaf(hi.y, x[5], sum);
                sum = fmaf(hi.z, x[6], sum), sum = fmaf(hi.w, x[7], sum);
                acc[h] = sum;
            }
        }
        bool there = s.exists(g, seq.kv_len);
        u64 row = (u64)blockIdx.z * a.heads + kvh * group;
#pragma unroll
        for (int h = 0; h < G; h++) {
            if (h >= group) break;
            float sum = acc[h];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            sum += __shfl_xor_sync(~0u, sum, 4);
            if (!there || !(fabsf(sum) < POS_INF)) sum = NEG_INF;
            if (sub == h % LANES && base + mine < count) a.scores[(row + h) * a.stride + g] = sum;
        }
    }
}

// One instance per group size class: G accumulators a thread.
#define KERNEL(T, G)                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, 4) score_summaries_##T##_g##G(SummaryScoreArgs a) { \
        depend();                                                                                     \
        score<T, G>(a);                                                                               \
    }
#define GROUPS(T) KERNEL(T, 1) KERNEL(T, 4) KERNEL(T, 8) KERNEL(T, 16)
GROUPS(f32)
GROUPS(f16)
GROUPS(bf16)
