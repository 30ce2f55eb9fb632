// gather_rows: out[i, :] = x[rows[i], :], same dtype.
//
// Plan: one CTA per output row; 16-byte copies where both rows are aligned, 2-byte copies otherwise.
// An index from x_rows on (a caller's bug) writes zeros instead of reading out of bounds.
// Bytes: 2 * n * cols * dtype.
#include "common.cuh"

extern "C" __global__ void gather_rows(const char* x, const u32* rows, char* out, u32 x_rows,
                                       u32 row_bytes) {
    depend();
    u32 r = rows[blockIdx.x];
    bool ok = r < x_rows;
    const char* src = x + (u64)(ok ? r : 0) * row_bytes;
    char* dst = out + (u64)blockIdx.x * row_bytes;
    if ((((u64)src | (u64)dst | row_bytes) & 15) == 0) {
        uint4 zero = make_uint4(0, 0, 0, 0);
        for (u32 i = threadIdx.x; i < row_bytes / 16; i += blockDim.x)
            ((uint4*)dst)[i] = ok ? ((const uint4*)src)[i] : zero;
    } else {
        for (u32 i = threadIdx.x; i < row_bytes / 2; i += blockDim.x)
            ((u16*)dst)[i] = ok ? ((const u16*)src)[i] : (u16)0;
    }
}
