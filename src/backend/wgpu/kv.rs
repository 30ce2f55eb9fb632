//! The ops that write the KV cache and what is kept beside it: content_bias, kv_append, key_stats, rebuild_slice,
//! project.

use super::encoder::{Bind, Dispatch, MAX_GROUPS, flat_grid, grid, loose_offset, word};
use super::memory::Gpu;
use super::{acts_are_f32, dtype_code, pipelines};
use crate::backend::{
    ContentBias, KeyStats, KvAppend, PAGE, Project, QuantiseKeys, RebuildSlice, Result, SliceBits,
};

/// Workgroups of a (KV head, sequence) that bring keys up to date; most steps bring one.
const WALKERS: usize = 64;

pub fn kv_append(gpu: &Gpu, p: &KvAppend<'_>) -> Result<()> {
    const OP: &str = "kv_append";
    p.check()?;
    acts_are_f32(OP, &[p.k, p.v])?;
    let pool = &p.cache;
    let params = [
        word(OP, p.k_stride)?,
        word(OP, p.v_stride)?,
        word(OP, loose_offset(p.k))?,
        word(OP, loose_offset(p.v))?,
        word(OP, pool.kv_heads)?,
        word(OP, pool.head_dim)?,
        word(OP, pool.lead)?,
        word(OP, pool.n_pages)?,
        word(OP, p.int8.map_or(0, |q| q.dims))?,
        word(OP, p.slice.map_or(0, |s| s.n_dims))?,
        word(OP, p.slice.map_or(0, |s| s.capacity))?,
        word(OP, p.slice.map_or(0, |s| s.slots))?,
    ];
    let constants = [("DTYPE", dtype_code(pool.k.dtype()))];
    // The kernels walk on where a sequence has more rows than the grid.
    let grid = grid(OP, [p.seqs.max_q.min(MAX_GROUPS), pool.kv_heads, p.seqs.n])?;
    let (k, meta, pages) =
        (Bind::Loose(p.k), Bind::Tensor(p.seqs.meta), Bind::Tensor(p.seqs.pages));
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::KV_APPEND,
        constants: &constants,
        binds: &[k, Bind::Loose(p.v), meta, pages, Bind::Tensor(pool.k), Bind::Tensor(pool.v)],
        params: &params,
        grid,
    })?;
    if let Some(q) = &p.int8 {
        gpu.dispatch(&Dispatch {
            kernel: &pipelines::KV_APPEND_INT8,
            constants: &constants,
            binds: &[k, meta, pages, Bind::Tensor(q.data), Bind::Tensor(q.scale)],
            params: &params,
            grid,
        })?;
    }
    if let Some(s) = &p.slice {
        gpu.dispatch(&Dispatch {
            kernel: &pipelines::KV_APPEND_SLICE,
            constants: &constants,
            binds: &[k, meta, Bind::Tensor(s.data), Bind::Tensor(s.dims)],
            params: &params,
            grid,
        })?;
    }
    Ok(())
}

pub fn content_bias(gpu: &Gpu, p: &ContentBias<'_>) -> Result<()> {
    const OP: &str = "content_bias";
    p.check()?;
    acts_are_f32(OP, &[p.v])?;
    let [high, low] = p.unit();
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::CONTENT_BIAS,
        constants: &[],
        binds: &[
            Bind::Loose(p.v),
            Bind::Tensor(p.delta),
            Bind::Tensor(p.a),
            Bind::Tensor(p.q),
            Bind::Tensor(p.k),
        ],
        params: &[
            word(OP, p.rows)?,
            word(OP, p.heads)?,
            word(OP, p.kv_heads)?,
            word(OP, p.head_dim)?,
            word(OP, p.at)?,
            word(OP, p.v_stride)?,
            word(OP, loose_offset(p.v))?,
            high.to_bits(),
            low.to_bits(),
        ],
        grid: flat_grid(OP, p.rows * p.kv_heads)?,
    })
}

pub fn key_stats(gpu: &Gpu, p: &KeyStats<'_>) -> Result<()> {
    const OP: &str = "key_stats";
    p.check()?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::KEY_STATS,
        constants: &[("DTYPE", dtype_code(p.cache.k.dtype()))],
        binds: &[
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.seqs.pages),
            Bind::Tensor(p.cache.k),
            Bind::Tensor(p.stats),
        ],
        params: &[
            word(OP, p.cache.kv_heads)?,
            word(OP, p.cache.head_dim)?,
            word(OP, p.cache.lead)?,
            word(OP, p.cache.n_pages)?,
            word(OP, p.slots)?,
        ],
        grid: grid(OP, [p.cache.kv_heads, p.seqs.n, 1])?,
    })
}

pub fn rebuild_slice(gpu: &Gpu, p: &RebuildSlice<'_>) -> Result<()> {
    const OP: &str = "rebuild_slice";
    p.check()?;
    let page_groups = p.seqs.max_kv.div_ceil(PAGE).min(MAX_GROUPS);
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::REBUILD_SLICE,
        constants: &[("DTYPE", dtype_code(p.cache.k.dtype()))],
        binds: &[
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.seqs.pages),
            Bind::Tensor(p.cache.k),
            Bind::Tensor(p.slice.dims),
            Bind::Tensor(p.changed),
            Bind::Tensor(p.slice.data),
        ],
        params: &[
            word(OP, p.cache.kv_heads)?,
            word(OP, p.cache.head_dim)?,
            word(OP, p.cache.lead)?,
            word(OP, p.cache.n_pages)?,
            word(OP, p.slice.n_dims)?,
            word(OP, p.slice.capacity)?,
            word(OP, p.slice.slots)?,
        ],
        grid: grid(OP, [page_groups, p.cache.kv_heads, p.seqs.n])?,
    })
}

pub fn project(gpu: &Gpu, p: &Project<'_>) -> Result<()> {
    const OP: &str = "project";
    p.check()?;
    acts_are_f32(OP, &[p.q])?;
    let (pool, n) = (&p.cache, p.seqs.n);
    let params = [
        word(OP, p.heads)?,
        word(OP, pool.kv_heads)?,
        word(OP, pool.head_dim)?,
        word(OP, pool.lead)?,
        word(OP, pool.n_pages)?,
        word(OP, p.n)?,
        word(OP, p.capacity)?,
        word(OP, p.slots)?,
        word(OP, n)?,
    ];
    let constants = [("DTYPE", dtype_code(pool.k.dtype()))];
    let (meta, basis) = (Bind::Tensor(p.seqs.meta), Bind::Tensor(p.basis));
    let (slice, done) = (Bind::Tensor(p.slice), Bind::Tensor(p.done));
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::PROJECT_QUERIES,
        constants: &constants,
        binds: &[meta, Bind::Tensor(p.q), basis, Bind::Tensor(p.out)],
        params: &params,
        grid: grid(OP, [p.heads, n, 1])?,
    })?;
    let walkers = p.seqs.max_kv.div_ceil(PAGE).min(WALKERS);
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::PROJECT_KEYS,
        constants: &constants,
        binds: &[meta, Bind::Tensor(p.seqs.pages), Bind::Tensor(pool.k), basis, slice, done],
        params: &params,
        grid: grid(OP, [walkers, pool.kv_heads, n])?,
    })?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::PROJECT_MARK,
        constants: &constants,
        binds: &[meta, done],
        params: &params,
        grid: grid(OP, [(n * pool.kv_heads).div_ceil(64), 1, 1])?,
    })
}

pub fn quantise_keys(gpu: &Gpu, p: &QuantiseKeys<'_>) -> Result<()> {
    const OP: &str = "quantise_keys";
    p.check()?;
    let (pool, s, n) = (&p.cache, &p.slice, p.seqs.n);
    let params = [
        word(OP, pool.kv_heads)?,
        word(OP, pool.head_dim)?,
        word(OP, pool.lead)?,
        word(OP, pool.n_pages)?,
        word(OP, s.n_dims)?,
        if s.bits == SliceBits::Four { 8 } else { 4 },
        word(OP, s.capacity)?,
        word(OP, s.slots)?,
        word(OP, n)?,
    ];
    let constants = [("DTYPE", dtype_code(pool.k.dtype()))];
    let (meta, done) = (Bind::Tensor(p.seqs.meta), Bind::Tensor(p.done));
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::QUANTISE_KEYS,
        constants: &constants,
        binds: &[
            meta,
            Bind::Tensor(p.seqs.pages),
            Bind::Tensor(pool.k),
            Bind::Tensor(s.dims),
            Bind::Tensor(s.data),
            Bind::Tensor(s.scale),
            done,
        ],
        params: &params,
        grid: grid(OP, [p.seqs.max_kv.div_ceil(PAGE).min(WALKERS), pool.kv_heads, n])?,
    })?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::QUANTISE_MARK,
        constants: &constants,
        binds: &[meta, done],
        params: &params,
        grid: grid(OP, [(n * pool.kv_heads).div_ceil(64), 1, 1])?,
    })
}
