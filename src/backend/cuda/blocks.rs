//! Selection by blocks: summaries of keys, their scores, blocks and their tokens.

use super::CudaBackend;
use super::args::{SeqsArg, word};
use super::launch::{Args, Shape};
use crate::backend::{
    Backend, DType, ExpandBlocks, ForceBlocks, HeadPool, KvSummaries, PoolBlocks, Result,
    ScoreSummaries, Summaries, SummaryKind,
};
use bytemuck::{Pod, Zeroable};

/// `Summaries` of `summaries.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SummariesArg {
    data: u64,
    kind: u32,
    run: u32,
    before: u32,
    vectors: u32,
}

/// `SummaryScoreArgs` of `score_summaries.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ScoreArgs {
    q: u64,
    scores: u64,
    seqs: SeqsArg,
    summaries: SummariesArg,
    stride: u64,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    scale: f32,
    q_type: u32,
    first: u32,
    dims: u32,
    pad: u32,
}

/// `PoolBlocksArgs` of `pool_blocks.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PoolArgs {
    scores: u64,
    lse: u64,
    out: u64,
    seqs: SeqsArg,
    stride: u64,
    block_stride: u64,
    heads: u32,
    rows: u32,
    mode: u32,
    run: u32,
    unit: u32,
    beyond: u32,
    sinks: u32,
    recent: u32,
}

/// Query heads that a kernel instance keeps sums for.
const GROUPS: [usize; 4] = [1, 4, 8, 16];

impl CudaBackend {
    fn summaries(&self, op: &'static str, s: &Summaries<'_>) -> Result<SummariesArg> {
        Ok(SummariesArg {
            data: self.ptr(op, s.data)?,
            kind: match s.kind {
                SummaryKind::Bounds { .. } => 0,
                SummaryKind::Cuboid { .. } => 1,
                SummaryKind::Windows { .. } => 2,
            },
            run: word(op, "run", s.kind.run())?,
            before: word(op, "window", s.kind.before())?,
            vectors: word(op, "vectors", s.kind.vectors())?,
        })
    }

    pub(super) fn kv_summaries_op(&self, p: &KvSummaries<'_>) -> Result<()> {
        const OP: &str = "kv_summaries";
        p.check()?;
        let args = Args::new()
            .with(self.seqs(OP, &p.seqs)?)
            .with(self.pool(OP, &p.cache)?)
            .with(self.summaries(OP, &p.summaries)?);
        let shape = Shape::new([p.most_written(), p.cache.kv_heads, p.seqs.n], 128);
        self.launch(OP, &format!("kv_summaries_{}", p.cache.k.dtype()), shape, args)
    }

    pub(super) fn score_summaries_op(&self, p: &ScoreSummaries<'_>) -> Result<()> {
        const OP: &str = "score_summaries";
        /// Summaries of a block at a time.
        const BLOCK: usize = 16;
        p.check()?;
        let (act, kv, kind) = (p.q.dtype(), p.summaries.data.dtype(), p.summaries.kind);
        if !self.attends(act, kv) {
            return Err(self.unsupported(OP, format!("{act} queries over a {kv} cache")));
        }
        let group = p.heads / p.kv_heads;
        let Some(g) = GROUPS.into_iter().find(|g| *g >= group) else {
            return Err(self.unsupported(OP, format!("groups of {group} heads")));
        };
        let args = ScoreArgs {
            q: self.ptr(OP, p.q)?,
            scores: self.ptr(OP, p.scores)?,
            seqs: self.seqs(OP, &p.seqs)?,
            summaries: self.summaries(OP, &p.summaries)?,
            stride: p.stride as u64,
            heads: word(OP, "heads", p.heads)?,
            kv_heads: word(OP, "kv_heads", p.kv_heads)?,
            head_dim: word(OP, "head_dim", p.head_dim)?,
            scale: p.scale,
            q_type: match act {
                DType::F16 => 1,
                DType::BF16 => 2,
                _ => 0,
            },
            first: word(OP, "from", p.from)?,
            dims: word(OP, "dims", p.dims)?,
            pad: 0,
        };
        // Enough blocks to fill the device several times; more would only repeat the query's preparation.
        let pairs = (p.kv_heads * p.seqs.n).max(1);
        let blocks = kind.count(p.seqs.max_kv).div_ceil(BLOCK);
        let blocks = blocks.min((self.limits.sms * 16).div_ceil(pairs));
        let shared = group * kind.vectors() * p.dims * DType::F32.bytes();
        let shape = Shape::new([blocks, p.kv_heads, p.seqs.n], 128).shared(shared);
        self.launch(OP, &format!("score_summaries_{kv}_g{g}"), shape, Args::new().with(args))
    }

    pub(super) fn pool_blocks_op(&self, p: &PoolBlocks<'_>) -> Result<()> {
        const OP: &str = "pool_blocks";
        p.check()?;
        let rows = p.rows_per_seq();
        let softmax = matches!(p.pool, HeadPool::MaxSoftmax | HeadPool::MeanSoftmax);
        let scratch = self.scratch(p.seqs.n * p.heads * DType::F32.bytes())?;
        let args = PoolArgs {
            scores: self.ptr(OP, p.scores)?,
            lse: scratch.ptr,
            out: self.ptr(OP, p.out)?,
            seqs: self.seqs(OP, &p.seqs)?,
            stride: p.stride as u64,
            block_stride: p.block_stride as u64,
            heads: word(OP, "heads", p.heads)?,
            rows: word(OP, "rows", rows)?,
            mode: match p.pool {
                HeadPool::SumLogit => 0,
                HeadPool::MaxSoftmax => 2,
                HeadPool::MeanSoftmax => 3,
                _ => 1,
            },
            run: word(OP, "run", p.kind.run())?,
            unit: word(OP, "unit", p.unit)?,
            beyond: word(OP, "window", p.spread().1)?,
            // More than all tokens is all tokens.
            sinks: p.sinks.min(p.seqs.max_kv) as u32,
            recent: p.recent.min(p.seqs.max_kv) as u32,
        };
        if softmax {
            let shape = Shape::new([p.heads, p.seqs.n, 1], 512);
            self.launch(OP, "pool_blocks_lse", shape, Args::new().with(args))?;
        }
        let grid = [p.seqs.max_kv.div_ceil(64 * p.unit), rows, p.seqs.n];
        self.launch(OP, OP, Shape::new(grid, 64), Args::new().with(args))
    }

    pub(super) fn force_blocks_op(&self, p: &ForceBlocks<'_>) -> Result<()> {
        const OP: &str = "force_blocks";
        p.check()?;
        let (rows, k) = (p.rows_per_seq, p.listed.k);
        let args = Args::new()
            .with(self.ptr(OP, p.listed.indices)?)
            .with(self.ptr(OP, p.listed.counts)?)
            .with(self.seqs(OP, &p.seqs)?)
            .with(self.ptr(OP, p.scores)?)
            .with(p.stride as u64)
            .with(word(OP, "rows_per_seq", rows)?)
            .with(word(OP, "k", k)?)
            .with(word(OP, "unit", p.unit)?);
        let grid = [k.div_ceil(128).min(64), rows, p.seqs.n];
        self.launch(OP, OP, Shape::new(grid, 128), args)
    }

    pub(super) fn expand_blocks_op(&self, p: &ExpandBlocks<'_>) -> Result<()> {
        const OP: &str = "expand_blocks";
        p.check()?;
        let args = Args::new()
            .with(self.ptr(OP, p.blocks)?)
            .with(self.ptr(OP, p.block_counts)?)
            .with(self.seqs(OP, &p.seqs)?)
            .with(self.ptr(OP, p.indices)?)
            .with(self.ptr(OP, p.counts)?)
            .with(word(OP, "rows_per_seq", p.rows_per_seq)?)
            .with(word(OP, "k", p.k)?)
            .with(word(OP, "unit", p.unit)?);
        let grid = [(p.k * p.unit).div_ceil(256).min(64), p.rows_per_seq, p.seqs.n];
        self.launch(OP, OP, Shape::new(grid, 256), args)
    }
}

#[cfg(test)]
super::args::same_sizes! {
    "kv_summaries" "Summaries" SummariesArg,
    "score_summaries" "SummaryScoreArgs" ScoreArgs,
    "pool_blocks" "PoolBlocksArgs" PoolArgs,
}
