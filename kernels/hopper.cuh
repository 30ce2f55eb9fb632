// Hopper's own instructions (sm_90a): mbarriers, the proxy fence, register budgets of warpgroups, and wgmma on tiles
// with the 128-byte swizzle. Everything that uses them stands inside `#if WGMMA`; other targets compile without.
//
// A tile of R rows and D 16-bit elements lies as D/64 panels of [R][64]: rows of 128 bytes, 1024-byte aligned, the
// 16-byte chunk c of row r at chunk c ^ (r % 8).
#pragma once
#include "mma.cuh"

// Rows of D elements for the copy engine (the driver's CUtensorMap), as (64 columns, row, panel): boxes of so many rows
// and panels as the kernel wants, swizzled.
struct __align__(128) TensorMap {
    u64 words[16];
};
static_assert(sizeof(TensorMap) == 128, "as TensorMap of hopper.rs");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WGMMA 1
#else
#define WGMMA 0
#endif

#if WGMMA

// A number that the compiler knows: which of two accumulators, or whether to mask.
template <int I> struct Index {
    static const int value = I;
};

// An mbarrier is named by its address in shared memory.
DEVICE void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
DEVICE void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Arrives when the thread's copies so far have landed; counted as one of the barrier's arrivals.
DEVICE void barrier_arrive_copies(u32 bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
DEVICE void barrier_wait(u32 bar, u32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(bar), "r"(phase)
        : "memory");
}
DEVICE u32 bar(const u64& b) { return shared_address(&b); }
// Arrives, and expects so many bytes of the copy engine before the phase ends.
DEVICE void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Named barriers 1 to 15, of `threads` threads together.
DEVICE void named_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void named_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Items of a launch, dealt out in order to whichever CTA is free. A launch leaves the counters as it found them, zero;
// launches of one module follow each other on one stream.
__device__ u32 items_taken, items_ended;
struct Queue {
    u32 next;  // of thread 0
    DEVICE Queue() : next(blockIdx.x) {}
    // The same for the 128 threads of warpgroup 0, ~0 when there is none left. `shared`: a word in shared memory.
    DEVICE u32 take(u32 total, volatile u32& shared) {
        if (threadIdx.x == 0) {
            shared = next < total ? next : ~0u;
            if (next < total) next = gridDim.x + atomicAdd(&items_taken, 1);
        }
        named_sync(3, 128);
        u32 item = shared;
        named_sync(3, 128);
        if (item == ~0u && threadIdx.x == 0) {
            __threadfence();
            if (atomicAdd(&items_ended, 1) == gridDim.x - 1) items_taken = items_ended = 0;
        }
        return item;
    }
};

// What this thread has seen written to shared memory (copies, stores) becomes visible to wgmma.
DEVICE void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int N> DEVICE void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving uses of `r` over this point.
template <int N> DEVICE void pin(float (&r)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N> DEVICE void pin(u32 (&r)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(r[i])::"memory");
}

// A run of bytes, 16 or a multiple, by one thread.
DEVICE void copy_run(u32 to, const void* from, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
}
// The box from row `first` and panel `panel` on, by one thread.
DEVICE void copy_box(u32 to, const TensorMap& map, u32 first, u32 panel, u32 bar) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to), "l"(&map), "r"(0), "r"(first), "r"(panel), "r"(bar)
                 : "memory");
}
// A tile of 128 rows as two runs of 64, by all 128 threads: threads 0 to 63 know row `first` of the first run, the others
// that of the second. Each arrives at `bar`.
template <int D> DEVICE void copy_runs(u32 tile, const TensorMap& map, u32 first, u32 bar) {
    if (threadIdx.x % 64) {
        barrier_arrive(bar);
        return;
    }
    barrier_expect(bar, 64 * D * 2);
#pragma unroll
    for (u32 panel = 0; panel < D / 64; panel++)
        copy_box(tile + panel * 128 * 128 + threadIdx.x * 128, map, first, panel, bar);
}

// What `x` (never negative) depends on is worked out before what follows: a store that does not happen, which the
// assembler must not move over a wait. Without it the wait comes first and nothing is left to overlap with.
DEVICE void settle(float x, u32 anywhere) {
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}" ::"f"(x), "r"(anywhere)
                 : "memory");
}

// Copies rows of D elements into a tile of 128, by a warpgroup: a thread has chunk `column` of every `step`-th row of
// its warp's 32.
template <class T, int D> struct Copier {
    static const u32 chunks = D / 8, step = 32 / chunks;
    u32 first, column, to, swizzle;  // first row; place of its chunk
    DEVICE Copier() {
        u32 lane = threadIdx.x & 31, r = lane / chunks;
        column = lane % chunks, first = (threadIdx.x & 96) + r;
        to = (column >> 3) * 128 * 128 + first * 128, swizzle = ((column & 7) ^ r) << 4;
    }
    // `find(i)`: address of the thread's chunk of row first + i * step.
    template <class Find> DEVICE void copy(u32 tile, Find find) const {
#pragma unroll
        for (u32 i = 0; i < chunks; i++)
            copy16_to(tile + to + i * step * 128 + (swizzle ^ ((i * step & 7) << 4)), find(i));
    }
    // The same; null stands for zeros.
    template <class Find> DEVICE void copy_some(u32 tile, const T* any, Find find) const {
#pragma unroll 1
        for (u32 i = 0; i < chunks; i++) {
            const T* from = find(i);
            u32 dst = tile + to + i * step * 128 + (swizzle ^ ((i * step & 7) << 4));
            copy16_to(dst, from ? from : any, from != nullptr);
        }
    }
};

// Descriptor of a swizzled tile at byte address `at`, its low word. Rows along M or N (K-major): groups of 8 rows lie
// 1024 bytes apart. Rows along K (the transposed operand): the same, and a panel of 128 rows between 64 columns and the
// next. `wgmma_at`: the tile `bytes` further on.
DEVICE u32 wgmma_tile(u32 at) { return (at >> 4 & 0x3fff) | (128 * 128 >> 4) << 16; }
DEVICE u32 wgmma_at(u32 tile, u32 bytes) { return tile + (bytes >> 4); }
#define WGMMA_HIGH "0x40000040"  // 128-byte swizzle; 1024 bytes

// Number of the thread's warpgroup, which the compiler knows to be the same in a warp.
DEVICE u32 warpgroup() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

#define REG4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define REG16(d, i) REG4(d, i), REG4(d, i + 4), REG4(d, i + 8), REG4(d, i + 12)
#define REG32(d) REG16(d, 0), REG16(d, 16)
#define REG64(d) REG32(d), REG16(d, 32), REG16(d, 48)
#define NAMES32 "{" \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
    "}"
#define NAMES64 "{" \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
    "}"

// d (+)= A[64 x 16] B[16 x N], asynchronously: a thread of warp w holds rows 16 w + lane/4 and 8 further, in
// d[4 n + j] row j >> 1 and column 8 n + 2 * (lane % 4) + (j & 1). `ss`: A and B K-major in shared memory, d is
// overwritten where `add` is 0. `rk`: A in registers (as mma m16n8k16's). `rs`: so too, and B with its rows along K.
template <int N, class T> struct Wgmma;
#define WGMMA_OF(N, T, TYPE, REGS, NAMES, A, B, C, D, E, F)                                                     \
    template <> struct Wgmma<N, T> {                                                                            \
        static DEVICE void ss(float (&d)[N / 2], u32 a, u32 b, int add) {                                       \
            asm volatile("{\n.reg .pred p;\n.reg .b64 x, y;\nsetp.ne.b32 p, %" C ", 0;\n"                        \
                         "mov.b64 x, {%" A ", " WGMMA_HIGH "};\nmov.b64 y, {%" B ", " WGMMA_HIGH "};\n"         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " NAMES              \
                         ", x, y, p, 1, 1, 0, 0;\n}"                                                            \
                         : REGS(d)                                                                              \
                         : "r"(a), "r"(b), "r"(add));                                                           \
        }                                                                                                       \
        static DEVICE void rk(float (&d)[N / 2], const u32* a, u32 b, int add) {                                \
            asm volatile("{\n.reg .pred p;\n.reg .b64 y;\nsetp.ne.b32 p, %" F ", 0;\n"                           \
                         "mov.b64 y, {%" E ", " WGMMA_HIGH "};\n"                                               \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " NAMES              \
                         ", {%" A ", %" B ", %" C ", %" D "}, y, p, 1, 1, 0;\n}"                                \
                         : REGS(d)                                                                              \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add));                       \
        }                                                                                                       \
        static DEVICE void rs(float (&d)[N / 2], const u32* a, u32 b) {                                         \
            asm volatile("{\n.reg .b64 y;\nmov.b64 y, {%" E ", " WGMMA_HIGH "};\n"                               \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " NAMES              \
                         ", {%" A ", %" B ", %" C ", %" D "}, y, 1, 1, 1, 1;\n}"                                 \
                         : REGS(d)                                                                              \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));                                 \
        }                                                                                                       \
    };
WGMMA_OF(64, f16, "f16", REG32, NAMES32, "32", "33", "34", "35", "36", "37")
WGMMA_OF(64, bf16, "bf16", REG32, NAMES32, "32", "33", "34", "35", "36", "37")
WGMMA_OF(128, f16, "f16", REG64, NAMES64, "64", "65", "66", "67", "68", "69")
WGMMA_OF(128, bf16, "bf16", REG64, NAMES64, "64", "65", "66", "67", "68", "69")

// d = A B^T, not waited for: A[64 x D] and B[128 x D] are tiles of `a_rows` and 128 rows at byte addresses `a`, `b`.
template <class T, int D> DEVICE void wgmma_logits(float (&d)[64], u32 a, u32 a_rows, u32 b) {
    u32 left = wgmma_tile(a), right = wgmma_tile(b);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        Wgmma<128, T>::ss(d, wgmma_at(left, k / 4 * a_rows * 128 + k % 4 * 32),
                          wgmma_at(right, k / 4 * 128 * 128 + k % 4 * 32), k > 0);
}
// The same with A in registers, of this warp.
template <class T, int D> DEVICE void wgmma_logits(float (&d)[64], const u32 (&a)[D / 16][4], u32 b) {
    u32 right = wgmma_tile(b);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        Wgmma<128, T>::rk(d, a[k], wgmma_at(right, k / 4 * 128 * 128 + k % 4 * 32), k > 0);
}
// 16 rows of a tile of 128 from row `first` on as A.
template <int D> DEVICE void wgmma_hold(u32 (&a)[D / 16][4], u32 tile, u32 first) {
    u32 lane = threadIdx.x & 31, row = first + (lane & 15);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        ldmatrix4_at(a[k], tile + k / 4 * 128 * 128 + row * 128 + (((k % 4 * 2 + (lane >> 4)) ^ (row & 7)) << 4));
    __syncwarp();  // all lanes have read the tile
}

#endif  // WGMMA
