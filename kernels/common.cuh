// Shared device code: element types, vector loads and stores, warp and block reductions.
//
// Nothing is included, so that NVRTC needs no header path. 16-bit floats are bit containers with
// explicit conversions; all arithmetic is f32.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef signed char i8;

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};
typedef float f32;

#define NEG_INF __int_as_float(0xff800000)
#define POS_INF __int_as_float(0x7f800000)
#define DEVICE __device__ __forceinline__

// First thing of every kernel, or of its `early_` function. On Hopper a kernel's blocks may be placed while those of the
// kernel before still run (launch.rs): here they wait until its results are there, then let the next kernel's blocks come.
// So all kernels but the one before have ended, and what it does not write may be read before: records and pages of
// the step, positions, weights, keys and values of settled tokens. Nothing but shared memory may be written. All
// blocks get here, or the kernel could end before the one before.
DEVICE void depend() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(i8 x) { return (float)x; }
DEVICE float to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <class T> DEVICE T from_f32(float x);
template <> DEVICE float from_f32<float>(float x) { return x; }
template <> DEVICE f16 from_f32<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> DEVICE bf16 from_f32<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two values in one register, `lo` in the low half (the order of mma operands and of memory).
template <class T> DEVICE u32 pack2(float lo, float hi);
template <> DEVICE u32 pack2<f16>(float lo, float hi) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <> DEVICE u32 pack2<bf16>(float lo, float hi) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

DEVICE void unpack2(u32 v, float& lo, float& hi, f16) {
    f16 a, b;
    a.bits = (u16)v;
    b.bits = (u16)(v >> 16);
    lo = to_f32(a);
    hi = to_f32(b);
}
DEVICE void unpack2(u32 v, float& lo, float& hi, bf16) {
    lo = __uint_as_float(v << 16);
    hi = __uint_as_float(v & 0xffff0000u);
}

// Eight consecutive elements as they lie in memory: the unit of every vectorised loop, because all
// widths in the KV cache and in linear layers are multiples of 8.
template <class T> struct Raw8 {
    uint4 v;
};
template <> struct Raw8<float> {
    float4 lo, hi;
};
template <> struct Raw8<i8> {
    uint2 v;
};

template <class T> DEVICE bool aligned8(const T* p) {
    return ((u64)p & (sizeof(T) == 1 ? 7 : 15)) == 0;
}

// Fast path: `p` must be aligned to 16 bytes (8 for i8).
template <class T> DEVICE Raw8<T> load8(const T* p) { return *(const Raw8<T>*)p; }

// Reads eight elements that lie anywhere.
template <class T> DEVICE void read8(const T* p, float (&x)[8]);

DEVICE void unpack8(const Raw8<float>& r, float (&x)[8]) {
    x[0] = r.lo.x, x[1] = r.lo.y, x[2] = r.lo.z, x[3] = r.lo.w;
    x[4] = r.hi.x, x[5] = r.hi.y, x[6] = r.hi.z, x[7] = r.hi.w;
}
DEVICE void unpack8(const Raw8<i8>& r, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[i] = (float)(i8)(r.v.x >> (8 * i));
        x[i + 4] = (float)(i8)(r.v.y >> (8 * i));
    }
}
template <class T> DEVICE void unpack8(const Raw8<T>& r, float (&x)[8]) {
    unpack2(r.v.x, x[0], x[1], T());
    unpack2(r.v.y, x[2], x[3], T());
    unpack2(r.v.z, x[4], x[5], T());
    unpack2(r.v.w, x[6], x[7], T());
}

template <class T> DEVICE void read8(const T* p, float (&x)[8]) {
    if (aligned8(p)) {
        unpack8(load8(p), x);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = to_f32(p[i]);
    }
}

DEVICE Raw8<float> pack8(const float (&x)[8], float) {
    Raw8<float> r;
    r.lo = make_float4(x[0], x[1], x[2], x[3]);
    r.hi = make_float4(x[4], x[5], x[6], x[7]);
    return r;
}
template <class T> DEVICE Raw8<T> pack8(const float (&x)[8], T) {
    Raw8<T> r;
    r.v = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                     pack2<T>(x[6], x[7]));
    return r;
}
// Writes eight elements that lie anywhere.
template <class T> DEVICE void write8(T* p, const float (&x)[8]) {
    if (aligned8(p)) {
        *(Raw8<T>*)p = pack8(x, T());
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) p[i] = from_f32<T>(x[i]);
    }
}

// The first `count` (1 to 8) of eight elements; the rest read as zero and are not written.
template <class T> DEVICE void read_part(const T* p, u32 count, float (&x)[8]) {
    if (count >= 8) {
        read8(p, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = i < count ? to_f32(p[i]) : 0.0f;
}
template <class T> DEVICE void write_part(T* p, u32 count, const float (&x)[8]) {
    if (count >= 8) {
        write8(p, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count) p[i] = from_f32<T>(x[i]);
}

// An output that is either the activation dtype T or f32.
template <class T> struct Out {
    void* p;
    u32 is_f32;
    DEVICE void put(u64 i, float x) const {
        if (is_f32) ((float*)p)[i] = x;
        else ((T*)p)[i] = from_f32<T>(x);
    }
    // Two neighbours of a 16-bit T, `i` even.
    DEVICE void put2(u64 i, float x, float y) const {
        if (is_f32) *(float2*)((float*)p + i) = make_float2(x, y);
        else *(u32*)((T*)p + i) = pack2<T>(x, y);
    }
};

// Adds; what the block's threads wrote before a barrier before it is seen by those that come behind a barrier after it, in a
// block that reads the sum.
DEVICE u32 add_acq_rel(u32* p, u32 x) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(x) : "memory");
    return before;
}
// Loads past L1: what other blocks of this kernel have written.
DEVICE float2 load_l2(const float2* p) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
    return v;
}
DEVICE float4 load_l2(const float4* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p));
    return v;
}

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) x += __shfl_xor_sync(~0u, x, s);
    return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, s));
    return x;
}

// Sum over the block, the same bits in every thread. `scratch` holds 33 floats.
DEVICE float block_sum(float x, float* scratch) {
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = (blockDim.x + 31) >> 5;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    if (warp == 0) {
        x = warp_sum(lane < warps ? scratch[lane] : 0.0f);
        if (lane == 0) scratch[32] = x;
    }
    __syncthreads();
    return scratch[32];
}

// Element `i` of f32 (0), f16 (1) or bf16 (2) at `p`, for what is read once.
DEVICE float load_any(const void* p, u32 type, u64 i) {
    if (type == 0) return ((const float*)p)[i];
    return type == 1 ? to_f32(((const f16*)p)[i]) : to_f32(((const bf16*)p)[i]);
}

// Largest over the block, the same in every thread. `scratch` holds a word a warp, which nobody else uses.
DEVICE float block_max(float x, float* scratch) {
    u32 lane = threadIdx.x & 31;
    x = warp_max(x);
    if (lane == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    return warp_max(lane < (blockDim.x >> 5) ? scratch[lane] : NEG_INF);
}

// Exclusive prefix sum over the block; `total` is the block's sum. `scratch` holds 33 words.
DEVICE u32 block_scan(u32 x, u32* scratch, u32& total) {
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    u32 incl = x;
#pragma unroll
    for (int s = 1; s < 32; s <<= 1) {
        u32 y = __shfl_up_sync(~0u, incl, s);
        if (lane >= s) incl += y;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = incl;
    __syncthreads();
    if (warp == 0) {
        u32 w = lane < warps ? scratch[lane] : 0, sum = w;
#pragma unroll
        for (int s = 1; s < 32; s <<= 1) {
            u32 y = __shfl_up_sync(~0u, sum, s);
            if (lane >= s) sum += y;
        }
        scratch[lane] = sum - w;
        if (lane == 31) scratch[32] = sum;
    }
    __syncthreads();
    total = scratch[32];
    return scratch[warp] + incl - x;
}

// 2^x, flushed to zero below the normal range: the exponential of the attention kernels.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
