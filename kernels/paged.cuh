// The paged KV cache as kernels see it: sequence records, page lists and tile addressing.
#pragma once
#include "common.cuh"

#define PAGE 64u
#define META_WORDS 8u

// How the logits of query heads that share a KV head become its scores: they stay, their sum, their largest.
#define POOL_NONE 0u
#define POOL_SUM 1u
#define POOL_MAX 2u
// A score that is not finite is never taken by top_k.
DEVICE float finite(float x) { return fabsf(x) < POS_INF ? x : NEG_INF; }

// One sequence's record (src/backend/ops/kv.rs, `Meta`).
struct Seq {
    u32 q_start, q_len, kv_len, slot, step;
    const u32* pages;
};

struct Seqs {
    const u32* meta;
    const u32* pages;
    DEVICE Seq get(u32 s) const {
        const u32* m = meta + s * META_WORDS;
        Seq r;
        r.q_start = m[0], r.q_len = m[1], r.kv_len = m[2], r.slot = m[4], r.step = m[5];
        r.pages = pages + m[3];
        return r;
    }
};
static_assert(sizeof(Seqs) == 16, "as SeqsArg of args.rs");

// One layer's K and V pages; page lists name only such as exist. A K tile of 64 tokens is [64][lead] followed by
// [64][head_dim - lead].
struct Pool {
    void* k;
    void* v;
    u32 kv_heads, head_dim, lead, n_pages;

    // Row number of a token in the V layout [n_pages, kv_heads, 64]; below 2^32 for any pool that fits.
    DEVICE u32 row(const Seq& seq, u32 head, u32 token) const {
        return (seq.pages[token / PAGE] * kv_heads + head) * PAGE + token % PAGE;
    }
    // Element offset of dimension `i` of a K row. Chunks of 8 dimensions never straddle the pieces.
    DEVICE u64 k_at(u32 row, u32 i) const {
        u64 tile = (u64)(row & ~(PAGE - 1)) * head_dim;
        u32 r = row & (PAGE - 1);
        return tile + (i < lead ? r * lead + i : PAGE * lead + r * (head_dim - lead) + (i - lead));
    }
    DEVICE u64 v_at(u32 row, u32 i) const { return (u64)row * head_dim + i; }
};
static_assert(sizeof(Pool) == 32, "as PoolArg of args.rs");

// Keys [begin, end) that split `split` of `splits` reads out of [low, high), cut at pages.
struct Range {
    u32 begin, end;
};
DEVICE Range split_range(u32 low, u32 high, u32 split, u32 splits) {
    u32 first = low / PAGE, last = (high + PAGE - 1) / PAGE;
    u32 per = last > first ? (last - first + splits - 1) / splits : 0;
    u32 b = first + split * per, e = b + per;
    Range r;
    r.begin = max(b * PAGE, low);
    r.end = min(e * PAGE, high);
    if (r.end < r.begin) r.end = r.begin;
    return r;
}

// Notes how many tokens of each sequence an op has brought up to date; a thread a (sequence, KV head). `Args` have the
// sequences, the pool, `done` of slots * KV heads, and the slots' capacity.
template <class Args> DEVICE void mark(const Args& a, u32 sequences) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, heads = a.pool.kv_heads;
    if (i >= sequences * heads) return;
    Seq seq = a.seqs.get(i / heads);
    if (seq.slot < a.slots && seq.kv_len <= a.capacity) a.done[seq.slot * heads + i % heads] = seq.kv_len;
}
