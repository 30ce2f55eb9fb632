// score_tiles: probabilities of the keys summed over the rows of a tile and the heads that share a list:
//   scores[list, j] = sum_{i, h} exp(scale * q_{i,h} . K[j] - lse_{i,h}) over rows i that see key j.
//
// Plan. 16-bit: score_wgmma.cuh on Hopper, else a CTA = (64 keys, list, tile); the keys lie in shared memory, the tile's
// query vectors (row, head) pass by 64 at a time, 16 a warp; each thread adds up its keys' columns in registers, and
// warps are joined at the end in warp order. Else: CUDA cores, a thread a key, 16 vectors at a time in shared memory.
// Bytes: kv_len * head_dim * kv per KV head and tile, the scores once; bound by arithmetic from tiles of 64 vectors on.
#include "flash.cuh"
#include "score_wgmma.cuh"

#define KEYS 64u
#define VECTORS 16u

// The tile of a CTA, and what its vectors are.
struct Job {
    Seq seq;
    u32 list, g, vectors, key0, head_first, head_end;
    DEVICE bool of(const ScoreTilesArgs& a, u32 keys) {
        seq = a.seqs.get(blockIdx.z);
        list = blockIdx.y, g = a.heads / a.pool.kv_heads, vectors = seq.q_len * g, key0 = blockIdx.x * keys;
        u32 per = a.pool.kv_heads / a.lists;
        head_first = list * per, head_end = head_first + per;
        return key0 < seq.kv_len;
    }
    DEVICE u64 item(const ScoreTilesArgs& a, u32 kvh, u32 v) const {
        return (u64)(seq.q_start + v / g) * a.heads + kvh * g + v % g;
    }
    DEVICE u32 position(u32 v) const { return seq.kv_len - seq.q_len + v / g; }
    DEVICE float* out(const ScoreTilesArgs& a) const {
        return a.scores + ((u64)blockIdx.z * a.lists + list) * a.stride + key0;
    }
};

template <class T, int D> DEVICE void tiles_mma(const ScoreTilesArgs& a) {
    const int P = Padded<D>::value;
    extern __shared__ uint4 shared4[];
    __shared__ float columns[4][KEYS];
    T* q = (T*)shared4;  // [64][P]
    T* k = q + 64 * P;   // [KEYS][P]
    Job job;
    if (!job.of(a, KEYS)) return;
    const u32 chunks = D / 8;
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float sum[KEYS / 8][2] = {};
    for (u32 kvh = job.head_first; kvh < job.head_end; kvh++) {
        u32 row0 = a.pool.row(job.seq, kvh, job.key0);
        for (u32 i = threadIdx.x; i < KEYS * chunks; i += blockDim.x) {
            u32 key = i / chunks, c = i % chunks;
            bool ok = job.key0 + key < job.seq.kv_len;
            u32 row = ok ? row0 + key : row0;
            copy16(k + key * P + c * 8, (const T*)a.pool.k + a.pool.k_at(row, c * 8), ok);
        }
        for (u32 v0 = 0; v0 < job.vectors; v0 += 64) {
            for (u32 i = threadIdx.x; i < 64 * chunks; i += blockDim.x) {
                u32 v = v0 + i / chunks, c = i % chunks;
                bool ok = v < job.vectors;
                u64 at = job.item(a, kvh, ok ? v : 0) * D + c * 8;
                copy16(q + (i / chunks) * P + c * 8, (const T*)a.q + at, ok);
            }
            copy_commit();
            copy_wait<0>();
            __syncthreads();
            u32 mine = v0 + warp * 16 + (lane >> 2);
            if (v0 + warp * 16 < job.vectors) {
                float s[KEYS / 8][4] = {}, shift[2];
                u32 end[2];  // keys of the block that the vector sees
                logits<T, D, KEYS>(SharedQuery<T, D>(q + warp * 16 * P), PaddedRows<T, D>{k}, s);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    u32 v = mine + 8 * h, p = job.position(v);
                    bool ok = v < job.vectors && p >= job.key0;
                    end[h] = ok ? min(p + 1 - job.key0, KEYS) : 0;
                    shift[h] = ok ? a.lse[job.item(a, kvh, v)] * LOG2E : 0.0f;
                }
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        u32 key = n * 8 + (lane & 3) * 2 + (j & 1);
                        float x = exp2f(fmaf(s[n][j], a.scale * LOG2E, -shift[j >> 1]));
                        if (key < end[j >> 1]) sum[n][j & 1] += x;
                    }
            }
            __syncthreads();
        }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float x = sum[n][j];
            x += __shfl_xor_sync(~0u, x, 4);
            x += __shfl_xor_sync(~0u, x, 8);
            x += __shfl_xor_sync(~0u, x, 16);
            if (lane < 4) columns[warp][n * 8 + lane * 2 + j] = x;
        }
    __syncthreads();
    u32 key = threadIdx.x;
    if (key < KEYS && job.key0 + key < job.seq.kv_len)
        job.out(a)[key] = columns[0][key] + columns[1][key] + columns[2][key] + columns[3][key];
}

template <class A, class T> DEVICE void tiles_generic(const ScoreTilesArgs& a) {
    extern __shared__ uint4 shared4[];
    __shared__ float shift[VECTORS];
    __shared__ u32 last[VECTORS];  // the vector's position
    float* q = (float*)shared4;    // [VECTORS][d]
    Job job;
    if (!job.of(a, blockDim.x)) return;
    u32 d = a.pool.head_dim, key = job.key0 + threadIdx.x;
    bool there = key < job.seq.kv_len;
    float sum = 0.0f;
    for (u32 kvh = job.head_first; kvh < job.head_end; kvh++) {
        u32 row = a.pool.row(job.seq, kvh, there ? key : job.key0);
        for (u32 v0 = 0; v0 < job.vectors; v0 += VECTORS) {
            __syncthreads();
            // Vectors that are not there are zero and give nothing.
            for (u32 i = threadIdx.x; i < VECTORS * d; i += blockDim.x) {
                u32 v = v0 + i / d;
                bool ok = v < job.vectors;
                q[i] = ok ? to_f32(((const A*)a.q)[job.item(a, kvh, v) * d + i % d]) * a.scale : 0.0f;
            }
            if (threadIdx.x < VECTORS) {
                u32 v = v0 + threadIdx.x;
                bool ok = v < job.vectors;
                shift[threadIdx.x] = ok ? a.lse[job.item(a, kvh, v)] : POS_INF;
                last[threadIdx.x] = ok ? job.position(v) : 0;
            }
            __syncthreads();
            float s[VECTORS] = {};
            for (u32 c = 0; c < d; c += 8) {
                float x[8];
                read8((const T*)a.pool.k + a.pool.k_at(row, c), x);
#pragma unroll
                for (int v = 0; v < VECTORS; v++)
#pragma unroll
                    for (int i = 0; i < 8; i++) s[v] = fmaf(q[v * d + c + i], x[i], s[v]);
            }
#pragma unroll
            for (int v = 0; v < VECTORS; v++)
                if (key <= last[v]) sum += expf(s[v] - shift[v]);
        }
    }
    if (there) job.out(a)[threadIdx.x] = sum;
}

#define MMA(T, D)                                                                               \
    extern "C" __global__ void __launch_bounds__(128) score_tiles_##T##_d##D(ScoreTilesArgs a) { \
        depend();                                                                               \
        tiles_mma<T, D>(a);                                                                     \
    }
#define MMA_ALL(T) MMA(T, 64) MMA(T, 96) MMA(T, 128) MMA(T, 256)
MMA_ALL(f16)
MMA_ALL(bf16)

#if WGMMA
#define HOPPER(T, D)                                                                              \
    extern "C" __global__ void __launch_bounds__(384, 1) score_tiles_wgmma_##T##_d##D(            \
        const __grid_constant__ ScoreTilesArgs a, const __grid_constant__ Jobs all,               \
        const __grid_constant__ TensorMap keys) {                                                 \
        depend();                                                                                 \
        score_wgmma<T, D>(a, all, keys);                                                          \
    }
HOPPER(f16, 64)
HOPPER(f16, 128)
HOPPER(bf16, 64)
HOPPER(bf16, 128)
#endif

#define GENERIC(A, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(128) score_tiles_##A##_##T(ScoreTilesArgs a) {    \
        depend();                                                                                  \
        tiles_generic<A, T>(a);                                                                    \
    }
GENERIC(f32, f32)
GENERIC(f32, f16)
GENERIC(f32, bf16)
GENERIC(f16, f16)
GENERIC(bf16, bf16)
