//! The dense family, but for linear.

use super::CudaBackend;
use super::args::word;
use super::launch::{Args, Shape};
use crate::backend::{Embed, GatherRows, Result, RmsNorm, Rope, SwiGlu};
use bytemuck::{Pod, Zeroable};

/// Blocks along y that walk rows in strides where a grid could exceed its limit.
const MOST_ROWS: usize = 65_535;

/// `RopeArgs` of `rope.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct RopeArgs {
    x: u64,
    positions: u64,
    inv_freq: u64,
    norm: u64,
    out: u64,
    x_stride: u64,
    rows: u32,
    heads: u32,
    head_dim: u32,
    heads_per_freq: u32,
    eps: f32,
    factor: f32,
}

/// Threads for a row of `cols` at 8 elements each: whole warps, 32 to `most`.
fn row_block(cols: usize, most: usize) -> usize {
    cols.div_ceil(8).next_multiple_of(32).clamp(32, most)
}

impl CudaBackend {
    pub(super) fn embed_op(&self, p: &Embed<'_>) -> Result<()> {
        const OP: &str = "embed";
        p.check()?;
        let args = Args::new()
            .with(self.ptr(OP, p.tokens)?)
            .with(self.ptr(OP, p.table)?)
            .with(self.ptr(OP, p.out)?)
            .with(word(OP, "cols", p.cols)?)
            .with(word(OP, "vocab", p.vocab)?)
            .with(p.scale);
        let shape = Shape::new([p.rows, 1, 1], row_block(p.cols, 256));
        self.launch(OP, &format!("embed_{}", p.table.dtype()), shape, args)
    }

    pub(super) fn gather_rows_op(&self, p: &GatherRows<'_>) -> Result<()> {
        const OP: &str = "gather_rows";
        p.check()?;
        let row_bytes = p.cols * p.x.dtype().bytes();
        let args = Args::new()
            .with(self.ptr(OP, p.x)?)
            .with(self.ptr(OP, p.rows)?)
            .with(self.ptr(OP, p.out)?)
            .with(word(OP, "x_rows", p.x_rows)?)
            .with(word(OP, "bytes of a row", row_bytes)?);
        self.launch(OP, OP, Shape::new([p.n, 1, 1], row_block(row_bytes / 2, 256)), args)
    }

    pub(super) fn rms_norm_op(&self, p: &RmsNorm<'_>) -> Result<()> {
        const OP: &str = "rms_norm";
        p.check()?;
        let args = Args::new()
            .with(self.ptr(OP, p.x)?)
            .with(self.ptr(OP, p.weight)?)
            .with(self.ptr(OP, p.out)?)
            .with(word(OP, "cols", p.cols)?)
            .with(p.eps);
        let shape = Shape::new([p.rows, 1, 1], row_block(p.cols, 1024));
        self.launch(OP, &format!("rms_norm_{}", p.out.dtype()), shape, args)
    }

    pub(super) fn swiglu_op(&self, p: &SwiGlu<'_>) -> Result<()> {
        const OP: &str = "swiglu";
        p.check()?;
        let args = Args::new()
            .with(self.ptr(OP, p.x)?)
            .with(self.ptr(OP, p.out)?)
            .with(word(OP, "rows", p.rows)?)
            .with(word(OP, "2 * ffn", 2 * p.ffn)? / 2);
        let shape = Shape::new([p.ffn.div_ceil(8 * 128), p.rows.min(MOST_ROWS), 1], 128);
        self.launch(OP, &format!("swiglu_{}", p.x.dtype()), shape, args)
    }

    /// As the kernels take them.
    pub(super) fn rope_args(&self, p: &Rope<'_>) -> Result<RopeArgs> {
        const OP: &str = "rope";
        Ok(RopeArgs {
            x: self.ptr(OP, p.x)?,
            positions: self.ptr(OP, p.positions)?,
            inv_freq: self.ptr(OP, p.inv_freq)?,
            norm: p.norm.as_ref().map_or(Ok(0), |n| self.ptr(OP, n.weight))?,
            out: self.ptr(OP, p.out)?,
            x_stride: p.x_stride as u64,
            rows: word(OP, "rows", p.rows)?,
            heads: word(OP, "heads", p.heads)?,
            head_dim: word(OP, "head_dim", p.head_dim)?,
            heads_per_freq: word(OP, "heads_per_freq", p.heads_per_freq)?,
            eps: p.norm.as_ref().map_or(0.0, |n| n.eps),
            factor: p.factor,
        })
    }

    /// One or two of one dtype.
    pub(super) fn rope_op(&self, all: &[&Rope<'_>]) -> Result<()> {
        const OP: &str = "rope";
        const WARPS: usize = 4;
        let Some(first) = all.first() else { return Ok(()) };
        let (mut args, mut blocks) = ([RopeArgs::zeroed(); 2], 0);
        for (args, p) in args.iter_mut().zip(all) {
            p.check()?;
            *args = self.rope_args(p)?;
            blocks = blocks.max((p.rows * p.heads).div_ceil(WARPS));
        }
        let shape = Shape::new([blocks, all.len(), 1], WARPS * 32);
        let args = Args::new().with(args[0]).with(args[1]);
        self.launch(OP, &format!("rope_{}", first.x.dtype()), shape, args)
    }
}

#[cfg(test)]
super::args::same_sizes! {
    "rope" "RopeArgs" RopeArgs,
}
