//! Exact top-k.

use super::CudaBackend;
use super::args::{SeqsArg, word};
use super::launch::{Args, Shape};
use crate::backend::{Force, Result, TopK};
use bytemuck::{Pod, Zeroable};

/// `TopKArgs` of `top_k.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TopKArgs {
    scores: u64,
    seqs: SeqsArg,
    indices: u64,
    counts: u64,
    among: u64,
    among_counts: u64,
    masks: u64,
    stride: u64,
    rows_per_seq: u32,
    k: u32,
    unit: u32,
    permille: u32,
    at_least: u32,
    among_k: u32,
    span: u32,
    sinks: u32,
    recent: u32,
    pad: u32,
}

impl CudaBackend {
    /// `forced`: what runs before it, of the same scores and of all tokens.
    pub(super) fn top_k_op(&self, p: &TopK<'_>, forced: Option<&Force<'_>>) -> Result<()> {
        const OP: &str = "top_k";
        const THREADS: usize = 1024;
        /// Shared memory beside masks and scores: three histograms of 2048 bins, and more than the kernel declares.
        const HISTOGRAMS: usize = 3 * 2048 * 4;
        const DECLARED: usize = 1024;
        p.check()?;
        let n = p.among.map_or(p.seqs.max_kv.div_ceil(p.unit), |a| a.k).max(1);
        let room = self.limits.shared.saturating_sub(HISTOGRAMS + DECLARED);
        // Masks of whole 16 bytes, behind which the scores lie.
        let span = |blocks: usize| n.div_ceil(blocks).next_multiple_of(64);
        // A score is a word and a bit in each of two masks.
        let masks = |span: usize| span / 4;
        let bytes = |span: usize| 4 * span + masks(span);
        // One block a row where it holds the scores: blocks of a cluster wait for each other after every digit.
        let blocks = (1..=self.limits.cluster).find(|b| bytes(span(*b)) <= room);
        let (blocks, cached) = blocks.map_or((1, false), |b| (b, true));
        let span = span(blocks);
        let rows = p.rows_per_seq * p.seqs.n;
        let (shared, scratch) = match () {
            () if cached => (bytes(span), None),
            () if masks(span) <= room => (masks(span), None),
            () => (0, Some(self.scratch(rows * blocks * masks(span))?)),
        };
        let args = TopKArgs {
            scores: self.ptr(OP, p.scores)?,
            seqs: self.seqs(OP, &p.seqs)?,
            indices: self.ptr(OP, p.indices)?,
            counts: self.ptr(OP, p.counts)?,
            among: p.among.map_or(Ok(0), |a| self.ptr(OP, a.indices))?,
            among_counts: p.among.map_or(Ok(0), |a| self.ptr(OP, a.counts))?,
            masks: scratch.as_ref().map_or(0, |s| s.ptr),
            stride: p.stride as u64,
            rows_per_seq: word(OP, "rows_per_seq", p.rows_per_seq)?,
            k: word(OP, "k", p.k)?,
            unit: word(OP, "unit", p.unit)?,
            permille: p.share.permille,
            at_least: p.share.at_least,
            among_k: p.among.map_or(Ok(0), |a| word(OP, "candidates", a.k))?,
            span: word(OP, "scores of a block", span)?,
            sinks: forced.map_or(0, |f| f.sinks.min(p.seqs.max_kv) as u32),
            recent: forced.map_or(0, |f| f.recent.min(p.seqs.max_kv) as u32),
            pad: 0,
        };
        let kind = if cached { "cached" } else { "streamed" };
        let cluster = if blocks > 1 { "_cluster" } else { "" };
        let grid = [blocks, p.rows_per_seq, p.seqs.n];
        let shape = Shape::new(grid, THREADS).shared(HISTOGRAMS + shared).cluster(blocks);
        self.launch(OP, &format!("top_k_{kind}{cluster}"), shape, Args::new().with(args))
    }
}
