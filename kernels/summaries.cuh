// Summaries of runs of keys as kernels see them (src/backend/ops/blocks.rs, `SummaryKind`).
#pragma once
#include "paged.cuh"

#define BOUNDS 0u
#define CUBOID 1u
#define WINDOWS 2u

struct Summaries {
    void* data;
    u32 kind, run, before, vectors;

    DEVICE u32 count(u32 kv_len) const { return (kv_len + run - 1) / run; }
    DEVICE bool exists(u32 g, u32 kv_len) const {
        if (kind == WINDOWS) return g * run >= before && (g + 1) * run <= kv_len;
        return g * run < kv_len;
    }
    // First element of summary `g` of a sequence.
    DEVICE u64 at(const Seq& seq, u32 kv_heads, u32 head, u32 g, u32 head_dim) const {
        u32 per_page = PAGE / run;
        u64 row = ((u64)seq.pages[g / per_page] * kv_heads + head) * per_page + g % per_page;
        return row * vectors * head_dim;
    }
};
static_assert(sizeof(Summaries) == 24, "as SummariesArg of blocks.rs");
