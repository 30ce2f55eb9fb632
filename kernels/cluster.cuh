// Thread block clusters: blocks that run together and read each other's shared memory (compute capability 9).
// Elsewhere a cluster is one block. The host launches clusters only where this file's first half was compiled.
#pragma once
#include "common.cuh"

#define MAX_CLUSTER 8u

#if __CUDA_ARCH__ >= 900
DEVICE u32 cluster_rank() {
    u32 r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
DEVICE u32 cluster_size() {
    u32 n;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return n;
}
// What was written before an arrive is seen by all blocks after their wait.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Says only that this thread has read what it wanted of the others, and used it (nothing else orders the reads): it
// waits for none of its writes.
DEVICE void cluster_arrive_read() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE u32 remote(const void* p, u32 rank) {
    u32 at;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(at)
        : "r"((u32)__cvta_generic_to_shared(p)), "r"(rank));
    return at;
}
// A word, two or four, of block `rank`'s shared memory at this block's address `p`. Volatile keeps them behind the
// barriers; loops over blocks are unrolled up to MAX_CLUSTER, so that the reads are under way together.
DEVICE u32 remote_word(const u32* p, u32 rank) {
    u32 x;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(remote(p, rank)));
    return x;
}
DEVICE uint2 remote_words2(const u32* p, u32 rank) {
    uint2 x;
    asm volatile("ld.shared::cluster.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(remote(p, rank)));
    return x;
}
DEVICE float4 remote_float4(const float4* p, u32 rank) {
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(remote(p, rank)));
    return x;
}
#else
DEVICE u32 cluster_rank() { return 0; }
DEVICE u32 cluster_size() { return 1; }
DEVICE void cluster_arrive() { __syncthreads(); }
DEVICE void cluster_arrive_read() {}
DEVICE void cluster_wait() {}
DEVICE u32 remote_word(const u32* p, u32) { return *p; }
DEVICE uint2 remote_words2(const u32* p, u32) { return *(const uint2*)p; }
DEVICE float4 remote_float4(const float4* p, u32) { return *p; }
#endif

DEVICE float remote_float(const float* p, u32 rank) {
    return __uint_as_float(remote_word((const u32*)p, rank));
}
DEVICE void cluster_sync() { cluster_arrive(), cluster_wait(); }
