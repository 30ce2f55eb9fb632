// linear: y[r, o] = sum_i x[r, i] * w[o, i] + bias[o], or y += the same; inputs are a multiple of 8.
// linear_gated: the same on 2 * outputs weight rows and swiglu on it, y[r, o] = silu(gate o) * up o, for few rows.
//
// Plan, three shapes of work (cuBLASLt takes the large ones where it is installed):
// * up to 8 rows: a warp takes OUTS weight rows against all rows of x, two steps of 16-byte loads in flight;
//   bound by the weights, outputs * inputs * dtype bytes, which bypass L1.
// * 16-bit, more rows: 64 x 64 tiles of mma.sync m16n8k16, 4 warps of 32 x 32, K in steps of 32 through three
//   cp.async stages.
// * f32 activations, more rows: 64 x 64 tiles on CUDA cores.
// `linear_bias` adds a bias to a finished product.
#include "mma.cuh"

struct LinearArgs {
    const void* x;
    const void* w;
    const float* bias;  // or null
    void* y;
    u32 rows, inputs, outputs, y_f32, accumulate, pad;
};
static_assert(sizeof(LinearArgs) == 56, "as LinearArgs of linear.rs");

template <class X> DEVICE void finish(const LinearArgs& a, u32 r, u32 o, float sum) {
    if (a.bias) sum += a.bias[o];
    u64 at = (u64)r * a.outputs + o;
    if (a.accumulate) sum += ((const float*)a.y)[at];
    Out<X> y = {a.y, a.y_f32};
    y.put(at, sum);
}

DEVICE uint4 stream16(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
template <class T> DEVICE Raw8<T> stream8(const T* p) {
    Raw8<T> r;
#pragma unroll
    for (int i = 0; i < sizeof(Raw8<T>) / 16; i++) ((uint4*)&r)[i] = stream16((const uint4*)p + i);
    return r;
}

// Weight rows of a warp, and loads of each in flight.
#define OUTS 2
template <int ROWS> struct VecDepth {
    static const int value = ROWS <= 2 ? 4 : 2;
};
// Its first one; where outputs are gated its two are the gate and the up of one.
template <bool GATED> DEVICE u32 first_output() {
    return (blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5)) * (GATED ? 1 : OUTS);
}
template <bool GATED> DEVICE u32 weight_row(const LinearArgs& a, u32 o0, u32 o) {
    return GATED ? o0 + o * a.outputs : min(o0 + o, a.outputs - 1);
}

template <class X, class W, int ROWS, bool GATED> DEVICE void early_vec(const LinearArgs& a) {
    const int DEPTH = VecDepth<ROWS>::value;
    u32 lane = threadIdx.x & 31, o0 = first_output<GATED>();
    if (o0 >= a.outputs) return depend();
    const W* w[OUTS];
    const X* x[ROWS];
#pragma unroll
    for (int o = 0; o < OUTS; o++) w[o] = (const W*)a.w + (u64)weight_row<GATED>(a, o0, o) * a.inputs;
#pragma unroll
    for (int r = 0; r < ROWS; r++) x[r] = (const X*)a.x + (u64)min((u32)r, a.rows - 1) * a.inputs;
    float acc[ROWS][OUTS] = {};
    auto add = [&](const Raw8<W>(&raw)[OUTS], u32 c) {
        float wf[OUTS][8], xf[8];
#pragma unroll
        for (int o = 0; o < OUTS; o++) unpack8(raw[o], wf[o]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            unpack8(load8(x[r] + c), xf);
#pragma unroll
            for (int o = 0; o < OUTS; o++)
#pragma unroll
                for (int i = 0; i < 8; i++) acc[r][o] = fmaf(xf[i], wf[o][i], acc[r][o]);
        }
    };
    // Whole steps of DEPTH loads a row, the next one's on their way while one is multiplied; then what is left.
    const u32 step = DEPTH * 256;
    u32 c = lane * 8, steps = a.inputs / step;
    Raw8<W> even[DEPTH][OUTS], odd[DEPTH][OUTS];
    auto load = [&](Raw8<W>(&raw)[DEPTH][OUTS], u32 c) {
#pragma unroll
        for (int t = 0; t < DEPTH; t++)
#pragma unroll
            for (int o = 0; o < OUTS; o++) raw[t][o] = stream8(w[o] + c + t * 256);
    };
    auto multiply = [&](const Raw8<W>(&raw)[DEPTH][OUTS], u32 c) {
#pragma unroll
        for (int t = 0; t < DEPTH; t++) add(raw[t], c + t * 256);
    };
    // The first weights come while the kernel before makes x: it does not write them.
    if (steps > 0) load(even, c);
    depend();
    for (u32 s = 0; s < steps; s += 2, c += 2 * step) {
        if (s + 1 < steps) load(odd, c + step);
        multiply(even, c);
        if (s + 1 >= steps) break;
        if (s + 2 < steps) load(even, c + 2 * step);
        multiply(odd, c + step);
    }
    for (c = steps * step + lane * 8; c < a.inputs; c += 256) {
        Raw8<W> raw[OUTS];
#pragma unroll
        for (int o = 0; o < OUTS; o++) raw[o] = stream8(w[o] + c);
        add(raw, c);
    }
    float mine = 0.0f;  // lane r * OUTS + o keeps that sum
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            float s = warp_sum(acc[r][o]);
            if (lane == r * OUTS + o) mine = s;
        }
    u32 r = lane / OUTS, o = o0 + lane % OUTS;
    if (GATED) {
        // Rounded as a product's results are before swiglu reads them.
        mine = to_f32(from_f32<X>(mine));
        float up = __shfl_down_sync(~0u, mine, 1);
        Out<X> y = {a.y, a.y_f32};
        if (r < a.rows && r < ROWS && lane % OUTS == 0) y.put((u64)r * a.outputs + o0, mine / (1.0f + expf(-mine)) * up);
        return;
    }
    if (r < a.rows && r < ROWS && o < a.outputs) finish<X>(a, r, o, mine);
}

#define TILE 64u
#define STEP 32u
#define STAGES 3u
#define PITCH (STEP + 8)  // an odd number of 16-byte chunks: ldmatrix without bank conflicts

template <class T> DEVICE void gemm_mma(const LinearArgs& a) {
    __shared__ __align__(16) T tiles[STAGES][2][TILE * PITCH];
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u32 r0 = blockIdx.y * TILE, o0 = blockIdx.x * TILE, steps = (a.inputs + STEP - 1) / STEP;
    auto fill = [&](u32 step) {
        if (step < steps) {
            for (u32 i = threadIdx.x; i < TILE * STEP / 8; i += 128) {
                u32 row = i / (STEP / 8), c = i % (STEP / 8) * 8, k = step * STEP + c;
                bool xs = r0 + row < a.rows && k < a.inputs, ws = o0 + row < a.outputs && k < a.inputs;
                const T* x = (const T*)a.x + (xs ? (u64)(r0 + row) * a.inputs + k : 0);
                const T* w = (const T*)a.w + (ws ? (u64)(o0 + row) * a.inputs + k : 0);
                copy16(&tiles[step % STAGES][0][row * PITCH + c], x, xs);
                copy16(&tiles[step % STAGES][1][row * PITCH + c], w, ws);
            }
        }
        copy_commit();
    };
    float acc[2][4][4] = {};
    u32 wr = (warp >> 1) * 32, wo = (warp & 1) * 32;
    fill(0);
    fill(1);
    for (u32 step = 0; step < steps; step++) {
        copy_wait<1>();
        __syncthreads();
        fill(step + 2);
        const T* x = tiles[step % STAGES][0] + wr * PITCH;
        const T* w = tiles[step % STAGES][1] + wo * PITCH;
#pragma unroll
        for (u32 k = 0; k < STEP; k += 16) {
            u32 b[2][4];
#pragma unroll
            for (u32 n = 0; n < 2; n++)
                ldmatrix4(b[n], w + (n * 16 + (lane & 7) + (lane >> 4) * 8) * PITCH + k + (lane >> 3 & 1) * 8);
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                u32 f[4];
                ldmatrix4(f, x + (m * 16 + (lane & 15)) * PITCH + k + (lane >> 4) * 8);
#pragma unroll
                for (u32 n = 0; n < 4; n++)
                    mma16816(acc[m][n], f, b[n >> 1][(n & 1) * 2], b[n >> 1][(n & 1) * 2 + 1], T());
            }
        }
    }
#pragma unroll
    for (u32 m = 0; m < 2; m++)
#pragma unroll
        for (u32 n = 0; n < 4; n++)
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                u32 r = r0 + wr + m * 16 + (lane >> 2) + (j >> 1) * 8;
                u32 o = o0 + wo + n * 8 + (lane & 3) * 2 + (j & 1);
                if (r < a.rows && o < a.outputs) finish<T>(a, r, o, acc[m][n][j]);
            }
}

// 256 threads, 4 x 4 outputs each; K in steps of 16, tiles stored K-major.
template <class X, class W> DEVICE void gemm_simt(const LinearArgs& a) {
    __shared__ float xs[16][TILE + 4], ws[16][TILE + 4];
    u32 r0 = blockIdx.y * TILE, o0 = blockIdx.x * TILE, tr = threadIdx.x / 16 * 4, to = threadIdx.x % 16 * 4;
    float acc[4][4] = {};
    for (u32 k0 = 0; k0 < a.inputs; k0 += 16) {
        // Half of the threads bring x, half w: 8 values of one row each.
        u32 row = threadIdx.x % 128 / 2, c = threadIdx.x % 2 * 8, k = k0 + c;
        float v[8] = {};
        if (threadIdx.x < 128) {
            if (r0 + row < a.rows && k < a.inputs) read8((const X*)a.x + (u64)(r0 + row) * a.inputs + k, v);
        } else {
            if (o0 + row < a.outputs && k < a.inputs)
                read8((const W*)a.w + (u64)(o0 + row) * a.inputs + k, v);
        }
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            if (threadIdx.x < 128) xs[c + i][row] = v[i];
            else ws[c + i][row] = v[i];
        }
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < 16; i++) {
            float4 p = *(const float4*)&xs[i][tr], q = *(const float4*)&ws[i][to];
            float xv[4] = {p.x, p.y, p.z, p.w}, wv[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
            for (u32 m = 0; m < 4; m++)
#pragma unroll
                for (u32 n = 0; n < 4; n++) acc[m][n] = fmaf(xv[m], wv[n], acc[m][n]);
        }
    }
#pragma unroll
    for (u32 m = 0; m < 4; m++)
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            u32 r = r0 + tr + m, o = o0 + to + n;
            if (r < a.rows && o < a.outputs) finish<X>(a, r, o, acc[m][n]);
        }
}

template <class T> DEVICE void add_bias(const LinearArgs& a) {
    u32 o = blockIdx.x * blockDim.x + threadIdx.x;
    if (o >= a.outputs) return;
    Out<T> y = {a.y, a.y_f32};
    for (u32 r = blockIdx.y; r < a.rows; r += gridDim.y) {
        u64 at = (u64)r * a.outputs + o;
        y.put(at, (a.y_f32 ? ((float*)a.y)[at] : to_f32(((T*)a.y)[at])) + a.bias[o]);
    }
}

#define VEC(X, W, ROWS)                                                                        \
    extern "C" __global__ void __launch_bounds__(128) linear_vec_##X##_##W##_r##ROWS(LinearArgs a) { \
        early_vec<X, W, ROWS, false>(a);                                                             \
    }
#define VEC_ALL(X, W) VEC(X, W, 1) VEC(X, W, 2) VEC(X, W, 4) VEC(X, W, 8)
VEC_ALL(f32, f32)
VEC_ALL(f32, f16)
VEC_ALL(f32, bf16)
VEC_ALL(f16, f16)
VEC_ALL(bf16, bf16)

#define GATED(T, ROWS)                                                                         \
    extern "C" __global__ void __launch_bounds__(128) linear_gated_##T##_r##ROWS(LinearArgs a) { \
        early_vec<T, T, ROWS, true>(a);                                                          \
    }
#define GATED_ALL(T) GATED(T, 1) GATED(T, 2) GATED(T, 4) GATED(T, 8)
GATED_ALL(f16)
GATED_ALL(bf16)

#define MMA(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) linear_mma_##T(LinearArgs a) { \
        depend();                                                                              \
        gemm_mma<T>(a);                                                                        \
    }
MMA(f16)
MMA(bf16)

#define SIMT(X, W)                                                                             \
    extern "C" __global__ void __launch_bounds__(256) linear_simt_##X##_##W(LinearArgs a) {    \
        depend();                                                                              \
        gemm_simt<X, W>(a);                                                                    \
    }
SIMT(f32, f32)
SIMT(f32, f16)
SIMT(f32, bf16)

#define BIAS(T) \
    extern "C" __global__ void linear_bias_##T(LinearArgs a) { depend(); add_bias<T>(a); }
BIAS(f32)
BIAS(f16)
BIAS(bf16)
