//! Token lists of several heads or steps.

use super::CudaBackend;
use super::args::{SeqsArg, word};
use super::launch::{Args, Shape};
use crate::backend::{DType, HoldLists, Result, UnionRanks};
use bytemuck::{Pod, Zeroable};

/// `UnionArgs` of `union_ranks.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct UnionArgs {
    scores: u64,
    seqs: SeqsArg,
    indices: u64,
    counts: u64,
    places: u64,
    out: u64,
    stride: u64,
    heads: u32,
    k: u32,
}

impl CudaBackend {
    pub(super) fn union_ranks_op(&self, p: &UnionRanks<'_>) -> Result<()> {
        const OP: &str = "union_ranks";
        p.check()?;
        let (n, k) = (p.seqs.n, p.listed.k);
        let places = self.scratch(n * p.heads * k * DType::U32.bytes())?;
        let args = UnionArgs {
            scores: self.ptr(OP, p.scores)?,
            seqs: self.seqs(OP, &p.seqs)?,
            indices: self.ptr(OP, p.listed.indices)?,
            counts: self.ptr(OP, p.listed.counts)?,
            places: places.ptr,
            out: self.ptr(OP, p.out)?,
            stride: p.stride as u64,
            heads: word(OP, "heads", p.heads)?,
            k: word(OP, "k", k)?,
        };
        let shape = Shape::new([k.div_ceil(256), p.heads, n], 256);
        self.launch(OP, "union_ranks_places", shape, Args::new().with(args))?;
        let shape = Shape::new([p.seqs.max_kv.div_ceil(256), n, 1], 256);
        self.launch(OP, OP, shape, Args::new().with(args))
    }

    pub(super) fn hold_lists_op(&self, p: &HoldLists<'_>) -> Result<()> {
        const OP: &str = "hold_lists";
        p.check()?;
        let args = Args::new()
            .with(self.ptr(OP, p.chosen)?)
            .with(self.ptr(OP, p.chosen_counts)?)
            .with(self.seqs(OP, &p.seqs)?)
            .with(self.ptr(OP, p.held)?)
            .with(self.ptr(OP, p.marks)?)
            .with(self.ptr(OP, p.indices)?)
            .with(self.ptr(OP, p.counts)?)
            .with(word(OP, "fresh", p.fresh)?)
            .with(word(OP, "rows_per_seq", p.rows_per_seq)?)
            .with(word(OP, "k", p.k)?)
            .with(word(OP, "room", p.room)?);
        let grid = [p.room.div_ceil(256).min(64), p.rows_per_seq, p.seqs.n];
        self.launch(OP, OP, Shape::new(grid, 256), args)
    }
}

#[cfg(test)]
super::args::same_sizes! {
    "union_ranks" "UnionArgs" UnionArgs,
}
