// project: projects decode queries and the new keys of their sequences on n directions per KV head.
//
// Plan: three launches. `project_queries`: grid (heads, sequences), a thread a direction. `project_keys`: grid (pages,
// KV heads, sequences); CTAs walk the pages from `done` on, 16 keys at a time in shared memory, a thread a (key,
// direction). `project_mark`: notes how many keys are there. Bytes: new keys * (head_dim + n) * kv, and the basis.
#include "paged.cuh"

struct ProjectArgs {
    const void* q;
    Seqs seqs;
    Pool pool;
    const float* basis;
    float* out;
    void* slice;
    u32* done;
    u32 n, heads, capacity, slots;
};
static_assert(sizeof(ProjectArgs) == 104, "as ProjectArgs of kv.rs");

template <class T> DEVICE void project_queries(const ProjectArgs& a) {
    Seq seq = a.seqs.get(blockIdx.y);
    if (seq.q_len == 0) return;
    u32 d = a.pool.head_dim, h = blockIdx.x, kv = h / (a.heads / a.pool.kv_heads);
    u64 base = ((u64)seq.q_start * a.heads + h) * d;
    const T* q = (const T*)a.q + base;
    for (u32 i = threadIdx.x; i < d; i += blockDim.x) {
        float sum = 0.0f;
        if (i < a.n) {
            const float* row = a.basis + (kv * a.n + i) * d;
            for (u32 j = 0; j < d; j++) sum += row[j] * to_f32(q[j]);
        }
        a.out[base + i] = sum;
    }
}

#define KEYS 16u

template <class T> DEVICE void project_keys(const ProjectArgs& a) {
    __shared__ float keys[KEYS * 256];
    Seq seq = a.seqs.get(blockIdx.z);
    u32 d = a.pool.head_dim, h = blockIdx.y, n = a.n;
    if (seq.slot >= a.slots || seq.kv_len > a.capacity) return;
    u64 slot = (u64)seq.slot * a.pool.kv_heads + h;
    u32 first = min(a.done[slot], seq.kv_len);
    T* out = (T*)a.slice + slot * a.capacity * n;
    for (u32 page = first / PAGE + blockIdx.x; page * PAGE < seq.kv_len; page += gridDim.x) {
        u32 end = min((page + 1) * PAGE, seq.kv_len);
        for (u32 start = max(first, page * PAGE); start < end; start += KEYS) {
            u32 count = min(KEYS, end - start), row = a.pool.row(seq, h, start);
            __syncthreads();
            for (u32 i = threadIdx.x; i < count * d; i += blockDim.x)
                keys[i] = to_f32(((const T*)a.pool.k)[a.pool.k_at(row + i / d, i % d)]);
            __syncthreads();
            for (u32 e = threadIdx.x; e < count * n; e += blockDim.x) {
                const float* direction = a.basis + (h * n + e % n) * d;
                const float* key = keys + e / n * d;
                float sum = 0.0f;
                for (u32 j = 0; j < d; j++) sum += direction[j] * key[j];
                out[(u64)(start + e / n) * n + e % n] = from_f32<T>(sum);
            }
        }
    }
}

extern "C" __global__ void project_mark(ProjectArgs a, u32 sequences) {
    depend();
    mark(a, sequences);
}

#define KERNEL(T)                                                                                       \
    extern "C" __global__ void project_queries_##T(ProjectArgs a) { \
        depend();                                                   \
        project_queries<T>(a);                                      \
    }                                                               \
    extern "C" __global__ void project_keys_##T(ProjectArgs a) {    \
        depend();                                                   \
        project_keys<T>(a);                                         \
    }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
