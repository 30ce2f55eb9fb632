//! Attention, the merge of its splits, and the mean value of what it left out.

use super::CudaBackend;
use super::args::{PoolArg, SeqsArg, word};
use super::hopper::{self, TensorMap};
use super::launch::{Args, Shape};
use super::parts::{self, Cluster};
use super::score::pool_mode;
use crate::backend::{
    AttendDense, AttendRows, Backend, DType, DeviceBuffer, KvPool, MeanValue, Merge, Result, Seqs,
    Tensor,
};
use bytemuck::{Pod, Zeroable};

/// `AttendArgs` of `flash.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AttendArgs {
    q: u64,
    seqs: SeqsArg,
    pool: PoolArg,
    out: u64,
    lse: u64,
    indices: u64,
    counts: u64,
    head_map: u64,
    scale: f32,
    out_f32: u32,
    heads: u32,
    rows: u32,
    splits: u32,
    sequences: u32,
    together: u32,
    window: u32,
    lists: u32,
    list_len: u32,
    parts: u64,
    arrived: u64,
    scores: u64,
    stride: u64,
    pool_mode: u32,
    mapped: u32,
    settled: u32,
    lists_settled: u32,
}

/// `MergeArgs` of `merge.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MergeArgs {
    part: u64,
    part_lse: u64,
    seqs: SeqsArg,
    out: u64,
    lse: u64,
    out_f32: u32,
    splits: u32,
    rows: u32,
    heads: u32,
    head_dim: u32,
    pad: u32,
}

/// `MeanValueArgs` of `mean_value.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MeanValueArgs {
    scores: u64,
    seqs: SeqsArg,
    indices: u64,
    counts: u64,
    sums: u64,
    out: u64,
    stride: u64,
    k: u32,
    lists: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    slots: u32,
}

/// Queries of `act` over a cache of `kv` rows of `d` numbers run on tensor cores.
pub(super) fn on_tensor_cores(act: DType, kv: DType, d: usize) -> bool {
    act == kv && kv != DType::F32 && MMA_DIMS.contains(&d)
}

/// Head sizes with tensor-core kernels.
pub(super) const MMA_DIMS: [usize; 4] = [64, 96, 128, 256];
/// Query vectors of one block of the prefill and of the CUDA-core kernels.
const PREFILL_VECTORS: usize = 64;
const GENERIC_VECTORS: usize = 16;

/// `DecodeShape` of `decode_keys.cuh`.
fn decode_block(d: usize) -> parts::Block {
    let stages = if d <= 64 { 4 } else { 2 };
    let query = 16 * (d + 8) * 2;
    let panels = d.is_multiple_of(hopper::PANEL);
    let (tile, aligned) = if panels { (16 * d * 2, 1 << 10) } else { (query, 0) };
    let warps = if d > 128 { 2 } else { 4 };
    parts::Block { warps, fixed: query + aligned, ring: stages * 2 * tile }
}

/// Shared memory of `prefill.cuh`: queries, and two stages of K and V tiles.
fn prefill_shared(d: usize) -> usize {
    let keys = if d > 128 { 32 } else { 64 };
    (PREFILL_VECTORS + 2 * 2 * keys) * (d + 8) * 2
}

/// Shared memory of `generic.cuh`: queries, and padded tiles of 32 keys and values, f32.
fn generic_shared(d: usize) -> usize {
    (GENERIC_VECTORS * d + 2 * 32 * (d + 4)) * 4
}

impl CudaBackend {
    /// Where the output of an op with activations of `act` goes, as the kernels' flag.
    fn out_flag(&self, op: &'static str, out: &Tensor, act: DType) -> Result<u32> {
        match out.dtype() {
            DType::F32 => Ok(1),
            d if d == act => Ok(0),
            d => Err(self.unsupported(op, format!("{d} output of {act} activations"))),
        }
    }

    /// Launches `entry` of `decode.cuh` over `pairs` pairs of at most `keys` keys; `maps` for a run of keys.
    fn decode(
        &self,
        op: &'static str,
        entry: &str,
        d: usize,
        (pairs, keys): (usize, usize),
        mut args: AttendArgs,
        maps: Option<[TensorMap; 2]>,
    ) -> Result<()> {
        let listed = args.indices != 0;
        let block = decode_block(d);
        let with = |args: AttendArgs| {
            let args = Args::new().with(args);
            if listed { args } else { args.with(maps.unwrap_or(Zeroable::zeroed())) }
        };
        args.mapped = u32::from(maps.is_some());
        let shape = |blocks: usize, times: usize| {
            Shape::new([blocks, 1, 1], times * block.warps * 32).shared(block.shared(times))
        };
        if args.splits > 1 {
            let blocks = pairs * args.splits as usize;
            return self.launch(op, entry, shape(blocks, 1), with(args));
        }
        if pairs * 4 > self.arrived.bytes() {
            return Err(self.unsupported(op, format!("{pairs} pairs of sequence and KV head")));
        }
        if listed {
            let of = |c: Cluster| shape(pairs * c.blocks, c.times).cluster(c.blocks);
            let resident = |c| self.clusters(op, entry, of(c));
            let cluster = parts::together(&self.limits, &block, (pairs, keys), resident)?;
            if let Some(c) = cluster {
                args.together = 1;
                return self.launch(op, entry, of(c), with(args));
            }
        }
        let (blocks, times) = parts::blocks(&self.limits, &block, (pairs, keys), listed);
        let scratch = self.scratch(blocks * 2 * 16 * (d + 2) * 4)?;
        args.parts = scratch.ptr;
        args.arrived = self.arrived.ptr();
        self.launch(op, entry, shape(blocks, times), with(args))
    }

    fn attend_args(
        &self,
        op: &'static str,
        q: &Tensor,
        seqs: &Seqs<'_>,
        cache: &KvPool<'_>,
        (out, lse): (&Tensor, Option<&Tensor>),
    ) -> Result<AttendArgs> {
        let (act, kv) = (q.dtype(), cache.k.dtype());
        if !self.attends(act, kv) {
            return Err(self.unsupported(op, format!("{act} queries over a {kv} cache")));
        }
        Ok(AttendArgs {
            q: self.ptr(op, q)?,
            seqs: self.seqs(op, seqs)?,
            pool: self.pool(op, cache)?,
            out: self.ptr(op, out)?,
            lse: lse.map_or(Ok(0), |t| self.ptr(op, t))?,
            out_f32: self.out_flag(op, out, act)?,
            rows: word(op, "rows", seqs.rows)?,
            sequences: word(op, "sequences", seqs.n)?,
            settled: u32::from(seqs.settled),
            ..AttendArgs::zeroed()
        })
    }

    pub(super) fn attend_dense_op(&self, p: &AttendDense<'_>) -> Result<()> {
        const OP: &str = "attend_dense";
        p.check()?;
        let (act, kv, d) = (p.q.dtype(), p.cache.k.dtype(), p.cache.head_dim);
        let args = AttendArgs {
            scale: p.scale,
            heads: word(OP, "heads", p.heads)?,
            splits: word(OP, "splits", p.splits)?,
            // A window that no sequence fills is none.
            window: p.window.filter(|w| *w < p.seqs.max_kv).unwrap_or(0) as u32,
            ..self.attend_args(OP, p.q, &p.seqs, &p.cache, (p.out, p.lse))?
        };
        let hkv = p.cache.kv_heads;
        let vectors = p.seqs.max_q * (p.heads / hkv);
        let of = [vectors, hkv, p.seqs.n * p.splits];
        let kind = (act, kv, d, p.scale);
        if p.seqs.max_q > 1
            && let Some((items, shape)) = hopper::attend(OP, &self.limits, kind, of, p.seqs.max_kv)?
        {
            let kind = if p.values { "prefill" } else { "lse" };
            let entry = format!("attend_{kind}_wgmma_{kv}_d{d}");
            let (items, maps) = items.mapped(&p.cache, &args.pool);
            let args = Args::new().with(args).with(items).with(maps);
            return self.launch(OP, &entry, shape, args);
        }
        let mma = on_tensor_cores(act, kv, d);
        if mma && p.seqs.max_q <= 1 {
            let keys = p.window.map_or(p.seqs.max_kv, |w| w.min(p.seqs.max_kv));
            let (kind, args) = match &p.logits {
                None => ("decode", args),
                Some(l) => {
                    let (scores, stride) = (self.ptr(OP, l.scores)?, l.stride as u64);
                    ("scored", AttendArgs { scores, stride, pool_mode: pool_mode(l.pool), ..args })
                }
            };
            let entry = format!("attend_{kind}_{kv}_d{d}");
            let maps = hopper::decode_maps(&self.limits, &p.cache, &args.pool);
            return self.decode(OP, &entry, d, (hkv * p.seqs.n, keys), args, maps);
        }
        let (entry, shape) = if mma {
            let grid = [vectors.div_ceil(PREFILL_VECTORS), hkv, p.seqs.n * p.splits];
            let shape = Shape::new(grid, 128).shared(prefill_shared(d));
            (format!("attend_prefill_{kv}_d{d}"), shape)
        } else {
            let grid = [vectors.div_ceil(GENERIC_VECTORS), hkv, p.seqs.n * p.splits];
            let shape = Shape::new(grid, 128).shared(generic_shared(d));
            (format!("attend_dense_{act}_{kv}"), shape)
        };
        self.launch(OP, &entry, shape, Args::new().with(args))?;
        p.scoring().map_or(Ok(()), |s| self.score_dims_op(&s, false).map(drop))
    }

    pub(super) fn attend_rows_op(&self, p: &AttendRows<'_>) -> Result<()> {
        const OP: &str = "attend_rows";
        p.check()?;
        let (act, kv, d) = (p.q.dtype(), p.cache.k.dtype(), p.cache.head_dim);
        let args = AttendArgs {
            indices: self.ptr(OP, p.indices)?,
            counts: self.ptr(OP, p.counts)?,
            head_map: p.head_map.map_or(Ok(0), |t| self.ptr(OP, t))?,
            scale: p.scale,
            heads: word(OP, "heads", p.heads)?,
            splits: word(OP, "splits", p.splits)?,
            lists: word(OP, "rows_per_seq", p.rows_per_seq)?,
            list_len: word(OP, "k", p.k)?,
            lists_settled: u32::from(p.settled),
            ..self.attend_args(OP, p.q, &p.seqs, &p.cache, (p.out, p.lse))?
        };
        let parts = p.parts_per_seq();
        let vectors = p.seqs.max_q * (p.heads / parts);
        let of = [vectors, parts, p.seqs.n * p.splits];
        let kind = (act, kv, d, p.scale);
        if p.seqs.max_q > 1
            && let Some((items, shape)) = hopper::attend(OP, &self.limits, kind, of, p.seqs.max_kv)?
        {
            let entry = format!("attend_tile_wgmma_{kv}_d{d}");
            return self.launch(OP, &entry, shape, Args::new().with(args).with(items));
        }
        let tiles = |size: usize| [vectors.div_ceil(size), parts, p.seqs.n * p.splits];
        let mma = on_tensor_cores(act, kv, d);
        if mma && p.seqs.max_q <= 1 {
            let entry = format!("attend_rows_{kv}_d{d}");
            return self.decode(OP, &entry, d, (parts * p.seqs.n, p.k), args, None);
        }
        let (entry, shape) = if mma {
            let shape = Shape::new(tiles(PREFILL_VECTORS), 128).shared(prefill_shared(d));
            (format!("attend_tile_{kv}_d{d}"), shape)
        } else {
            let shape = Shape::new(tiles(GENERIC_VECTORS), 128).shared(generic_shared(d));
            (format!("attend_rows_{act}_{kv}"), shape)
        };
        self.launch(OP, &entry, shape, Args::new().with(args))
    }

    pub(super) fn merge_op(&self, p: &Merge<'_>) -> Result<()> {
        const OP: &str = "merge";
        p.check()?;
        let args = MergeArgs {
            part: self.ptr(OP, p.part)?,
            part_lse: self.ptr(OP, p.part_lse)?,
            seqs: self.seqs(OP, &p.seqs)?,
            out: self.ptr(OP, p.out)?,
            lse: p.lse.map_or(Ok(0), |t| self.ptr(OP, t))?,
            out_f32: u32::from(p.out.dtype() == DType::F32),
            splits: word(OP, "splits", p.splits)?,
            rows: word(OP, "rows", p.seqs.rows)?,
            heads: word(OP, "heads", p.heads)?,
            head_dim: word(OP, "head_dim", p.head_dim)?,
            pad: 0,
        };
        let shape = Shape::new([p.seqs.max_q, p.seqs.n, p.heads.div_ceil(4)], 128);
        self.launch(OP, &format!("merge_{}", p.out.dtype()), shape, Args::new().with(args))
    }

    pub(super) fn mean_value_op(&self, p: &MeanValue<'_>) -> Result<()> {
        const OP: &str = "mean_value";
        p.check()?;
        let args = MeanValueArgs {
            scores: self.ptr(OP, p.scores)?,
            seqs: self.seqs(OP, &p.seqs)?,
            indices: self.ptr(OP, p.listed.indices)?,
            counts: self.ptr(OP, p.listed.counts)?,
            sums: self.ptr(OP, p.sums)?,
            out: self.ptr(OP, p.out)?,
            stride: p.stride as u64,
            k: word(OP, "k", p.listed.k)?,
            lists: word(OP, "lists", p.lists)?,
            heads: word(OP, "heads", p.heads)?,
            kv_heads: word(OP, "kv_heads", p.kv_heads)?,
            head_dim: word(OP, "head_dim", p.head_dim)?,
            slots: word(OP, "slots", p.slots)?,
        };
        let shape = Shape::new([p.heads, p.seqs.n, 1], 512);
        self.launch(OP, &format!("mean_value_{}", p.out.dtype()), shape, Args::new().with(args))
    }
}

#[cfg(test)]
super::args::same_sizes! {
    "attend_dense" "AttendArgs" AttendArgs,
    "merge" "MergeArgs" MergeArgs,
    "mean_value" "MeanValueArgs" MeanValueArgs,
}
