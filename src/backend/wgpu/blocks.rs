//! Selection by blocks: kv_summaries, score_summaries, pool_blocks, force_blocks, expand_blocks.

use super::encoder::{Bind, Dispatch, MAX_GROUPS, grid, word};
use super::memory::Gpu;
use super::{acts_are_f32, dtype_code, pipelines};
use crate::backend::{
    BackendError, ExpandBlocks, ForceBlocks, HeadPool, KvSummaries, MAX_GROUP, PoolBlocks, Result,
    ScoreSummaries, SummaryKind,
};

pub fn kv_summaries(gpu: &Gpu, p: &KvSummaries<'_>) -> Result<()> {
    const OP: &str = "kv_summaries";
    p.check()?;
    let (c, kind) = (&p.cache, p.summaries.kind);
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::KV_SUMMARIES,
        constants: &[
            ("DTYPE", dtype_code(c.k.dtype())),
            (
                "KIND",
                match kind {
                    SummaryKind::Bounds { .. } => 0,
                    SummaryKind::Cuboid { .. } => 1,
                    SummaryKind::Windows { .. } => 2,
                },
            ),
            ("RUN", word(OP, kind.run())?),
            ("BEFORE", word(OP, kind.before())?),
        ],
        binds: &[
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.seqs.pages),
            Bind::Tensor(c.k),
            Bind::Tensor(p.summaries.data),
        ],
        params: &[
            word(OP, c.kv_heads)?,
            word(OP, c.head_dim)?,
            word(OP, c.lead)?,
            word(OP, c.n_pages)?,
        ],
        grid: grid(OP, [p.most_written().min(MAX_GROUPS), c.kv_heads, p.seqs.n])?,
    })
}

pub fn score_summaries(gpu: &Gpu, p: &ScoreSummaries<'_>) -> Result<()> {
    const OP: &str = "score_summaries";
    p.check()?;
    acts_are_f32(OP, &[p.q])?;
    let kind = p.summaries.kind;
    let groups = kind.count(p.seqs.max_kv).div_ceil(64).min(MAX_GROUPS);
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::SCORE_SUMMARIES,
        constants: &[
            ("DTYPE", dtype_code(p.summaries.data.dtype())),
            ("GROUP", word(OP, p.heads / p.kv_heads)?),
            ("VECTORS", word(OP, kind.vectors())?),
            ("RUN", word(OP, kind.run())?),
            ("BEFORE", word(OP, kind.before())?),
        ],
        binds: &[
            Bind::Tensor(p.q),
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.seqs.pages),
            Bind::Tensor(p.summaries.data),
            Bind::Tensor(p.scores),
        ],
        params: &[
            word(OP, p.heads)?,
            word(OP, p.kv_heads)?,
            word(OP, p.head_dim)?,
            word(OP, p.n_pages)?,
            word(OP, p.stride)?,
            p.scale.to_bits(),
            word(OP, p.from)?,
            word(OP, p.dims)?,
        ],
        grid: grid(OP, [groups, p.kv_heads, p.seqs.n])?,
    })
}

pub fn pool_blocks(gpu: &Gpu, p: &PoolBlocks<'_>) -> Result<()> {
    const OP: &str = "pool_blocks";
    p.check()?;
    let rows = p.rows_per_seq();
    let group = p.heads / rows;
    if group > MAX_GROUP {
        return Err(BackendError::Unsupported {
            op: OP,
            backend: "wgpu",
            what: format!("{group} heads per KV head"),
        });
    }
    let mode = match p.pool {
        HeadPool::SumLogit => 0,
        HeadPool::MaxSoftmax => 2,
        HeadPool::MeanSoftmax => 3,
        _ => 1,
    };
    let totals = gpu.scratch(p.seqs.n * p.heads * 4)?;
    let constants = [("GROUP", word(OP, group)?), ("MODE", mode)];
    let most = p.seqs.max_kv;
    let params = [
        word(OP, p.heads)?,
        word(OP, rows)?,
        word(OP, p.stride)?,
        word(OP, p.block_stride)?,
        word(OP, p.kind.run())?,
        word(OP, p.unit)?,
        word(OP, p.spread().1)?,
        // More than all tokens is all tokens.
        word(OP, p.sinks.min(most))?,
        word(OP, p.recent.min(most))?,
    ];
    let (meta, scores) = (Bind::Tensor(p.seqs.meta), Bind::Tensor(p.scores));
    if mode >= 2 {
        gpu.dispatch(&Dispatch {
            kernel: &pipelines::POOL_BLOCKS_TOTALS,
            constants: &constants,
            binds: &[meta, scores, Bind::Raw(&totals.buffer)],
            params: &params,
            grid: grid(OP, [p.heads, p.seqs.n, 1])?,
        })?;
    }
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::POOL_BLOCKS,
        constants: &constants,
        binds: &[meta, scores, Bind::Raw(&totals.buffer), Bind::Tensor(p.out)],
        params: &params,
        grid: grid(OP, [most.div_ceil(64 * p.unit).min(MAX_GROUPS), rows, p.seqs.n])?,
    })
}

pub fn force_blocks(gpu: &Gpu, p: &ForceBlocks<'_>) -> Result<()> {
    const OP: &str = "force_blocks";
    p.check()?;
    let (rows, k) = (p.rows_per_seq, p.listed.k);
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::FORCE_BLOCKS,
        constants: &[],
        binds: &[
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.listed.indices),
            Bind::Tensor(p.listed.counts),
            Bind::Tensor(p.scores),
        ],
        params: &[word(OP, rows)?, word(OP, k)?, word(OP, p.unit)?, word(OP, p.stride)?],
        grid: grid(OP, [k.div_ceil(64).min(MAX_GROUPS), rows, p.seqs.n])?,
    })
}

pub fn expand_blocks(gpu: &Gpu, p: &ExpandBlocks<'_>) -> Result<()> {
    const OP: &str = "expand_blocks";
    p.check()?;
    let groups = (p.k * p.unit).div_ceil(64).min(MAX_GROUPS);
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::EXPAND_BLOCKS,
        constants: &[],
        binds: &[
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.blocks),
            Bind::Tensor(p.block_counts),
            Bind::Tensor(p.indices),
            Bind::Tensor(p.counts),
        ],
        params: &[word(OP, p.rows_per_seq)?, word(OP, p.k)?, word(OP, p.unit)?],
        grid: grid(OP, [groups, p.rows_per_seq, p.seqs.n])?,
    })
}
