//! Writing the KV cache: keys and values, statistics, chosen dimensions, the compact slice, projected keys.

use super::CudaBackend;
use super::args::{PoolArg, SeqsArg, word};
use super::launch::{Args, Shape};
use crate::backend::ops::check_rope_append;
use crate::backend::{
    ContentBias, DimMetric, KeyStats, KvAppend, PAGE, Project, QuantiseKeys, RebuildSlice, Refresh,
    Result, Rope, SelectDims, SliceBits,
};
use bytemuck::{Pod, Zeroable};

/// `AppendArgs` of `kv_append.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AppendArgs {
    k: u64,
    v: u64,
    k_stride: u64,
    v_stride: u64,
    seqs: SeqsArg,
    pool: PoolArg,
    int8_data: u64,
    int8_scale: u64,
    slice: u64,
    slice_dims: u64,
    int8_dims: u32,
    slice_n: u32,
    capacity: u32,
    pad: u32,
}

/// `BiasArgs` of `content_bias.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BiasArgs {
    v: u64,
    delta: u64,
    a: u64,
    q: u64,
    k: u64,
    v_stride: u64,
    rows: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    at: u32,
    high: f32,
    low: f32,
    pad: u32,
}

/// `SelectArgs` of `select_dims.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SelectArgs {
    q: u64,
    seqs: SeqsArg,
    stats: u64,
    dims: u64,
    state: u64,
    changed: u64,
    coverage: u64,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    n_dims: u32,
    unit: u32,
    metric: u32,
    refresh: u32,
    every_or_min: u32,
    phase_or_max: u32,
    beta: f32,
}

/// `SliceArgs` of `rebuild_slice.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SliceArgs {
    seqs: SeqsArg,
    pool: PoolArg,
    slice: u64,
    dims: u64,
    changed: u64,
    n_dims: u32,
    capacity: u32,
}

/// `ProjectArgs` of `project.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ProjectArgs {
    q: u64,
    seqs: SeqsArg,
    pool: PoolArg,
    basis: u64,
    out: u64,
    slice: u64,
    done: u64,
    n: u32,
    heads: u32,
    capacity: u32,
    slots: u32,
}

/// `QuantiseArgs` of `quantise_keys.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct QuantiseArgs {
    seqs: SeqsArg,
    pool: PoolArg,
    data: u64,
    scale: u64,
    dims: u64,
    done: u64,
    n: u32,
    four: u32,
    capacity: u32,
    slots: u32,
}

/// Blocks of 256 threads on a multiprocessor.
const RESIDENT: usize = 8;
/// Blocks of a (KV head, sequence) that bring keys up to date; most steps bring one.
const WALKERS: usize = 64;

impl CudaBackend {
    fn append_args(&self, p: &KvAppend<'_>) -> Result<AppendArgs> {
        const OP: &str = "kv_append";
        let mut args = AppendArgs {
            k: self.ptr(OP, p.k)?,
            v: self.ptr(OP, p.v)?,
            k_stride: p.k_stride as u64,
            v_stride: p.v_stride as u64,
            seqs: self.seqs(OP, &p.seqs)?,
            pool: self.pool(OP, &p.cache)?,
            ..AppendArgs::zeroed()
        };
        if let Some(q) = &p.int8 {
            args.int8_data = self.ptr(OP, q.data)?;
            args.int8_scale = self.ptr(OP, q.scale)?;
            args.int8_dims = word(OP, "int8 dims", q.dims)?;
        }
        if let Some(s) = &p.slice {
            args.slice = self.ptr(OP, s.data)?;
            args.slice_dims = self.ptr(OP, s.dims)?;
            args.slice_n = word(OP, "n_dims", s.n_dims)?;
            args.capacity = word(OP, "capacity", s.capacity)?;
        }
        Ok(args)
    }

    pub(super) fn kv_append_op(&self, p: &KvAppend<'_>) -> Result<()> {
        const OP: &str = "kv_append";
        p.check()?;
        let args = self.append_args(p)?;
        // A decode step has one row a sequence: one warp per KV head then fills the device best.
        let warps = p.cache.kv_heads.clamp(1, 8);
        let shape = Shape::new([p.seqs.max_q, p.seqs.n, 1], warps * 32);
        let entry = format!("kv_append_{}_{}", p.k.dtype(), p.cache.k.dtype());
        self.launch(OP, &entry, shape, Args::new().with(args))
    }

    pub(super) fn rope_append_op(&self, ropes: [&Rope<'_>; 2], p: &KvAppend<'_>) -> Result<()> {
        const WARPS: usize = 4;
        check_rope_append(ropes, p)?;
        if p.seqs.rows == 0 {
            return Ok(());
        }
        let [q, k] = [self.rope_args(ropes[0])?, self.rope_args(ropes[1])?];
        let heads = p.seqs.max_q * (ropes[0].heads + ropes[1].heads);
        let shape = Shape::new([heads.div_ceil(WARPS), p.seqs.n, 1], WARPS * 32);
        let entry = format!("rope_append_{}_{}", p.k.dtype(), p.cache.k.dtype());
        let args = Args::new().with(q).with(k).with(self.append_args(p)?);
        self.launch("kv_append", &entry, shape, args)
    }

    pub(super) fn content_bias_op(&self, p: &ContentBias<'_>) -> Result<()> {
        const OP: &str = "content_bias";
        const WARPS: usize = 4;
        p.check()?;
        let [high, low] = p.unit();
        let args = BiasArgs {
            v: self.ptr(OP, p.v)?,
            delta: self.ptr(OP, p.delta)?,
            a: self.ptr(OP, p.a)?,
            q: self.ptr(OP, p.q)?,
            k: self.ptr(OP, p.k)?,
            v_stride: p.v_stride as u64,
            rows: word(OP, "rows", p.rows)?,
            heads: word(OP, "heads", p.heads)?,
            kv_heads: word(OP, "kv_heads", p.kv_heads)?,
            head_dim: word(OP, "head_dim", p.head_dim)?,
            at: word(OP, "at", p.at)?,
            high,
            low,
            pad: 0,
        };
        let shape = Shape::new([(p.rows * p.kv_heads).div_ceil(WARPS), 1, 1], WARPS * 32);
        self.launch(OP, &format!("content_bias_{}", p.v.dtype()), shape, Args::new().with(args))
    }

    pub(super) fn key_stats_op(&self, p: &KeyStats<'_>) -> Result<()> {
        const OP: &str = "key_stats";
        /// Threads of a block, and f32 partial sums of each.
        const BLOCK: usize = 512;
        const SUMS: usize = 6;
        p.check()?;
        let args = Args::new()
            .with(self.seqs(OP, &p.seqs)?)
            .with(self.pool(OP, &p.cache)?)
            .with(self.ptr(OP, p.stats)?);
        let shape = Shape::new([p.cache.kv_heads, p.seqs.n, 1], BLOCK).shared(BLOCK * SUMS * 4);
        self.launch(OP, &format!("key_stats_{}", p.cache.k.dtype()), shape, args)
    }

    pub(super) fn select_dims_op(&self, p: &SelectDims<'_>) -> Result<()> {
        const OP: &str = "select_dims";
        p.check()?;
        let (refresh, every_or_min, phase_or_max, beta) = match p.refresh {
            Refresh::Every { every, phase } => (0, every, phase, 0.0),
            Refresh::Adaptive { beta, min, max } => (1, min, max, beta),
        };
        let args = SelectArgs {
            q: self.ptr(OP, p.q)?,
            seqs: self.seqs(OP, &p.seqs)?,
            stats: p.stats.map_or(Ok(0), |t| self.ptr(OP, t))?,
            dims: self.ptr(OP, p.dims)?,
            state: self.ptr(OP, p.state)?,
            changed: self.ptr(OP, p.changed)?,
            coverage: self.ptr(OP, p.coverage)?,
            heads: word(OP, "heads", p.heads)?,
            kv_heads: word(OP, "kv_heads", p.kv_heads)?,
            head_dim: word(OP, "head_dim", p.head_dim)?,
            n_dims: word(OP, "n_dims", p.n_dims)?,
            unit: word(OP, "unit", p.unit)?,
            metric: match p.metric {
                DimMetric::AbsQ => 0,
                DimMetric::PairNorm => 1,
                DimMetric::AbsQk => 2,
                DimMetric::PairQk => 3,
            },
            refresh,
            every_or_min,
            phase_or_max,
            beta,
        };
        let shape = Shape::new([p.kv_heads, p.seqs.n, 1], 256);
        self.launch(OP, &format!("select_dims_{}", p.q.dtype()), shape, Args::new().with(args))
    }

    pub(super) fn rebuild_slice_op(&self, p: &RebuildSlice<'_>) -> Result<()> {
        const OP: &str = "rebuild_slice";
        p.check()?;
        let args = SliceArgs {
            seqs: self.seqs(OP, &p.seqs)?,
            pool: self.pool(OP, &p.cache)?,
            slice: self.ptr(OP, p.slice.data)?,
            dims: self.ptr(OP, p.slice.dims)?,
            changed: self.ptr(OP, p.changed)?,
            n_dims: word(OP, "n_dims", p.slice.n_dims)?,
            capacity: word(OP, "capacity", p.slice.capacity)?,
        };
        // As many as run at once walk over the pages: in most steps nothing has changed, and every block that only finds
        // that out takes its time to start.
        let (pages, kv_heads, n) = (p.seqs.max_kv.div_ceil(PAGE), p.cache.kv_heads, p.seqs.n);
        let walkers = (RESIDENT * self.limits.sms).div_ceil((kv_heads * n).max(1)).min(pages);
        let grid = [walkers, kv_heads, n];
        let entry = format!("rebuild_slice_{}", p.cache.k.dtype());
        self.launch(OP, &entry, Shape::new(grid, 256), Args::new().with(args))
    }

    pub(super) fn project_op(&self, p: &Project<'_>) -> Result<()> {
        const OP: &str = "project";
        p.check()?;
        let (kv_heads, n) = (p.cache.kv_heads, p.seqs.n);
        let args = ProjectArgs {
            q: self.ptr(OP, p.q)?,
            seqs: self.seqs(OP, &p.seqs)?,
            pool: self.pool(OP, &p.cache)?,
            basis: self.ptr(OP, p.basis)?,
            out: self.ptr(OP, p.out)?,
            slice: self.ptr(OP, p.slice)?,
            done: self.ptr(OP, p.done)?,
            n: word(OP, "n", p.n)?,
            heads: word(OP, "heads", p.heads)?,
            capacity: word(OP, "capacity", p.capacity)?,
            slots: word(OP, "slots", p.slots)?,
        };
        let with = || Args::new().with(args);
        let queries = Shape::new([p.heads, n, 1], 128);
        self.launch(OP, &format!("project_queries_{}", p.q.dtype()), queries, with())?;
        let walkers = p.seqs.max_kv.div_ceil(PAGE).min(WALKERS);
        let keys = Shape::new([walkers, kv_heads, n], 256);
        self.launch(OP, &format!("project_keys_{}", p.cache.k.dtype()), keys, with())?;
        self.launch(OP, "project_mark", mark(n * kv_heads), with().with(word(OP, "sequences", n)?))
    }

    pub(super) fn quantise_keys_op(&self, p: &QuantiseKeys<'_>) -> Result<()> {
        const OP: &str = "quantise_keys";
        p.check()?;
        let (kv_heads, n, s) = (p.cache.kv_heads, p.seqs.n, &p.slice);
        let args = QuantiseArgs {
            seqs: self.seqs(OP, &p.seqs)?,
            pool: self.pool(OP, &p.cache)?,
            data: self.ptr(OP, s.data)?,
            scale: self.ptr(OP, s.scale)?,
            dims: self.ptr(OP, s.dims)?,
            done: self.ptr(OP, p.done)?,
            n: word(OP, "n", s.n_dims)?,
            four: u32::from(s.bits == SliceBits::Four),
            capacity: word(OP, "capacity", s.capacity)?,
            slots: word(OP, "slots", s.slots)?,
        };
        let walkers = p.seqs.max_kv.div_ceil(PAGE).min(WALKERS);
        let keys = Shape::new([walkers, kv_heads, n], 256);
        let entry = format!("quantise_keys_{}", p.cache.k.dtype());
        self.launch(OP, &entry, keys, Args::new().with(args))?;
        let args = Args::new().with(args).with(word(OP, "sequences", n)?);
        self.launch(OP, "quantise_mark", mark(n * kv_heads), args)
    }
}

/// Of `mark` of `paged.cuh`.
fn mark(threads: usize) -> Shape {
    Shape::new([threads.div_ceil(128), 1, 1], 128)
}

#[cfg(test)]
super::args::same_sizes! {
    "kv_append" "AppendArgs" AppendArgs,
    "content_bias" "BiasArgs" BiasArgs,
    "select_dims" "SelectArgs" SelectArgs,
    "rebuild_slice" "SliceArgs" SliceArgs,
    "project" "ProjectArgs" ProjectArgs,
    "quantise_keys" "QuantiseArgs" QuantiseArgs,
}
