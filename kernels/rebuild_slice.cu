// rebuild_slice: rewrites the columns of the compact slice that select_dims marked as changed.
//
// Plan: grid (walkers over the pages, KV heads, sequences); a CTA whose mask is empty returns at once, others walk
// (token, changed column) pairs with columns fastest. Bytes: kv_len * changed * kv, read and written
// (reads cost a sector of 32 bytes each unless columns neighbour).
#include "paged.cuh"

struct SliceArgs {
    Seqs seqs;
    Pool pool;
    void* slice;
    const u32* dims;
    const u32* changed;
    u32 n_dims, capacity;
};
static_assert(sizeof(SliceArgs) == 80, "as SliceArgs of kv.rs");

template <class T> DEVICE void rebuild_slice(const SliceArgs& a) {
    __shared__ u32 column[256], dim[256];
    __shared__ u32 count;
    Seq seq = a.seqs.get(blockIdx.z);
    u32 h = blockIdx.y, n = a.n_dims;
    if (seq.kv_len > a.capacity || blockIdx.x * PAGE >= seq.kv_len) return;
    u64 slot = (u64)seq.slot * a.pool.kv_heads + h;
    const u32* mask = a.changed + slot * 8;
    u32 any = 0;
#pragma unroll
    for (int w = 0; w < 8; w++) any |= mask[w];
    if (any == 0) return;
    u32 c = threadIdx.x;  // blockDim.x == 256 covers all columns
    if (c == 0) count = 0;
    bool on = c < n && (mask[c >> 5] >> (c & 31) & 1);
    u32 before = __popc(mask[c >> 5] & ((1u << (c & 31)) - 1));
    for (u32 w = 0; w < (c >> 5); w++) before += __popc(mask[w]);
    __syncthreads();
    if (on) {
        column[before] = c;
        dim[before] = a.dims[slot * n + c];
        atomicMax(&count, before + 1);
    }
    __syncthreads();
    T* out = (T*)a.slice + slot * a.capacity * n;
    for (u32 page = blockIdx.x; page * PAGE < seq.kv_len; page += gridDim.x) {
        u32 row = a.pool.row(seq, h, page * PAGE);
        u32 tokens = min(PAGE, seq.kv_len - page * PAGE);
        for (u32 i = threadIdx.x; i < tokens * count; i += blockDim.x) {
            u32 t = i / count, j = i % count;
            if (dim[j] >= a.pool.head_dim) continue;
            T x = ((const T*)a.pool.k)[a.pool.k_at(row + t, dim[j])];
            out[(u64)(page * PAGE + t) * n + column[j]] = x;
        }
    }
}

#define KERNEL(T) \
    extern "C" __global__ void rebuild_slice_##T(SliceArgs a) { depend(); rebuild_slice<T>(a); }
KERNEL(f32)
KERNEL(f16)
KERNEL(bf16)
