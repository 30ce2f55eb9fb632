// union_ranks: scores that order tokens by the turn in which the heads' rankings name them,
//   out_j = -min_h (rank_h(j) * heads + h).
//
// Plan: two launches. `union_ranks_places`: grid (blocks of entries, heads, sequences), a thread an entry, which counts
// the entries before it; the list's scores pass through shared memory. `union_ranks`: grid (token blocks, sequences), a
// thread a token, which looks for itself in every list (they are ascending). Bytes: 12 * heads * k, 4 * kv_len.
#include "paged.cuh"

#define TILE 1024u

struct UnionArgs {
    const float* scores;
    Seqs seqs;
    const u32* indices;  // [n, heads, k]
    const u32* counts;   // [n, heads]
    u32* places;         // [n, heads, k]
    float* out;
    u64 stride;
    u32 heads, k;
};
static_assert(sizeof(UnionArgs) == 72, "as UnionArgs of lists.rs");

extern "C" __global__ void union_ranks_places(UnionArgs a) {
    depend();
    __shared__ float tile[TILE];
    u64 row = (u64)blockIdx.z * a.heads + blockIdx.y;
    u32 n = min(a.counts[row], a.k);
    const u32* list = a.indices + row * a.k;
    const float* scores = a.scores + row * a.stride;
    for (u32 first = blockIdx.x * blockDim.x; first < n; first += gridDim.x * blockDim.x) {
        u32 e = first + threadIdx.x, place = 0;
        float mine = scores[list[min(e, n - 1)]];
        for (u32 start = 0; start < n; start += TILE) {
            u32 count = min(TILE, n - start);
            __syncthreads();
            for (u32 i = threadIdx.x; i < count; i += blockDim.x) tile[i] = scores[list[start + i]];
            __syncthreads();
            for (u32 i = 0; i < count; i++) place += tile[i] > mine || (tile[i] == mine && start + i < e);
        }
        if (e < n) a.places[row * a.k + e] = place;
    }
}

extern "C" __global__ void union_ranks(UnionArgs a) {
    depend();
    u32 kv_len = a.seqs.get(blockIdx.y).kv_len;
    for (u32 j = blockIdx.x * blockDim.x + threadIdx.x; j < kv_len; j += gridDim.x * blockDim.x) {
        u32 turn = ~0u;
        for (u32 h = 0; h < a.heads; h++) {
            u64 row = (u64)blockIdx.y * a.heads + h;
            const u32* list = a.indices + row * a.k;
            u32 n = min(a.counts[row], a.k), low = 0, high = n;
            while (low < high) {
                u32 middle = (low + high) / 2;
                if (list[middle] < j) low = middle + 1;
                else high = middle;
            }
            if (low < n && list[low] == j) turn = min(turn, a.places[row * a.k + low] * a.heads + h);
        }
        a.out[blockIdx.y * a.stride + j] = turn == ~0u ? NEG_INF : -(float)turn;
    }
}
