//! Choosing dimensions, scoring and selecting tokens: select_dims, score_dims, pool_scores, force, top_k.

use super::encoder::{Bind, Dispatch, MAX_GROUPS, grid, word};
use super::memory::Gpu;
use super::{acts_are_f32, dtype_code, pipelines};
use crate::backend::{
    BackendError, DimMetric, Force, HeadPool, LogitScale, MAX_GROUP, PAGE, PoolScores, Refresh,
    Result, ScoreDims, ScoreSource, SelectDims, TopK,
};

/// f32 values of the query tile of `score_dims`: 14 KiB, which leaves room in 16 KiB for the rest.
const QUERY_TILE: usize = 3584;
/// Tokens of one partial log-sum-exp of `pool_scores` (CHUNK in the shader).
const POOL_CHUNK: usize = 4096;

pub fn select_dims(gpu: &Gpu, p: &SelectDims<'_>) -> Result<()> {
    const OP: &str = "select_dims";
    p.check()?;
    acts_are_f32(OP, &[p.q])?;
    let metric = match p.metric {
        DimMetric::AbsQ => 0,
        DimMetric::PairNorm => 1,
        DimMetric::AbsQk => 2,
        DimMetric::PairQk => 3,
    };
    let (every, phase, min, max, beta) = match p.refresh {
        Refresh::Every { every, phase } => (every, phase, 0, 0, 0.0),
        Refresh::Adaptive { beta, min, max } => (0, 0, min, max, beta),
    };
    let adaptive = u32::from(matches!(p.refresh, Refresh::Adaptive { .. }));
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::SELECT_DIMS,
        constants: &[("METRIC", metric), ("ADAPTIVE", adaptive)],
        binds: &[
            Bind::Tensor(p.q),
            Bind::Tensor(p.seqs.meta),
            p.stats.map_or(Bind::Absent, Bind::Tensor),
            Bind::Tensor(p.dims),
            Bind::Tensor(p.state),
            Bind::Tensor(p.changed),
            Bind::Tensor(p.coverage),
        ],
        params: &[
            word(OP, p.heads)?,
            word(OP, p.kv_heads)?,
            word(OP, p.head_dim)?,
            word(OP, p.n_dims)?,
            word(OP, p.unit)?,
            word(OP, p.slots)?,
            every,
            phase,
            min,
            max,
            beta.to_bits(),
        ],
        grid: grid(OP, [p.kv_heads, p.seqs.n, 1])?,
    })
}

pub fn score_dims(gpu: &Gpu, p: &ScoreDims<'_>) -> Result<()> {
    const OP: &str = "score_dims";
    p.check()?;
    acts_are_f32(OP, &[p.q])?;
    let cache = &p.cache;
    let none = Bind::Absent;
    let k = Bind::Tensor(cache.k);
    // (source, dimensions, keys, dims, scales); slots, int8 width and slice capacity where there are any.
    let (source, n, keys, dims, scales) = match &p.source {
        ScoreSource::Lead { n } => (0, *n, k, none, none),
        ScoreSource::Int8 { keys, n } => {
            (1, *n, Bind::Tensor(keys.data), none, Bind::Tensor(keys.scale))
        }
        ScoreSource::Slice(s) => (2, s.n_dims, Bind::Tensor(s.data), Bind::Tensor(s.dims), none),
        ScoreSource::Gather { dims, n } => (3, *n, k, Bind::Tensor(dims), none),
    };
    let (slots, int8_dims, capacity) = match &p.source {
        ScoreSource::Lead { .. } => (0, 0, 0),
        ScoreSource::Int8 { keys, .. } => (0, keys.dims, 0),
        ScoreSource::Slice(s) => (s.slots, 0, s.capacity),
        ScoreSource::Gather { dims, n } => (dims.len() / (n * cache.kv_heads).max(1), 0, 0),
    };
    let group = p.heads / cache.kv_heads;
    let (pool, rows) = match p.pool {
        HeadPool::SumLogit => (0, 1),
        HeadPool::MaxLogit => (1, group),
        _ => (2, group),
    };
    let chunk = n.min(QUERY_TILE / rows / 8 * 8);
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::SCORE_DIMS,
        constants: &[
            ("DTYPE", dtype_code(cache.k.dtype())),
            ("SOURCE", source),
            ("POOL", pool),
            ("COVERAGE", u32::from(p.scale == LogitScale::Coverage)),
            ("HEAD_DIM", word(OP, cache.head_dim)?),
            ("LEAD", word(OP, cache.lead)?),
            ("GROUP", word(OP, group)?),
            ("ROWS", word(OP, rows)?),
            ("N", word(OP, n)?),
            ("CHUNK", word(OP, chunk)?),
            ("TILE", word(OP, rows * chunk / 4)?),
        ],
        binds: &[
            Bind::Tensor(p.q),
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.seqs.pages),
            keys,
            dims,
            scales,
            Bind::Tensor(p.scores),
        ],
        params: &[
            word(OP, p.heads)?,
            word(OP, cache.kv_heads)?,
            word(OP, cache.n_pages)?,
            word(OP, p.stride)?,
            word(OP, slots)?,
            word(OP, int8_dims)?,
            word(OP, capacity)?,
            word(OP, n)?,
            word(OP, cache.head_dim)?,
        ],
        grid: grid(OP, [p.seqs.max_kv.div_ceil(PAGE).min(MAX_GROUPS), cache.kv_heads, p.seqs.n])?,
    })
}

pub fn pool_scores(gpu: &Gpu, p: &PoolScores<'_>) -> Result<()> {
    const OP: &str = "pool_scores";
    p.check()?;
    let group = p.heads / p.kv_heads;
    if group > MAX_GROUP {
        return Err(BackendError::Unsupported {
            op: OP,
            backend: "wgpu",
            what: format!("{group} query heads per KV head"),
        });
    }
    let chunks = p.seqs.max_kv.div_ceil(POOL_CHUNK);
    let scratch = gpu.scratch(p.seqs.n * p.heads * chunks * 8)?;
    let constants =
        [("GROUP", word(OP, group)?), ("MEAN", u32::from(p.pool == HeadPool::MeanSoftmax))];
    let params =
        [word(OP, p.heads)?, word(OP, p.kv_heads)?, word(OP, p.stride)?, word(OP, chunks)?];
    let (meta, scores) = (Bind::Tensor(p.seqs.meta), Bind::Tensor(p.scores));
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::POOL_PARTIALS,
        constants: &constants,
        binds: &[meta, scores, Bind::Raw(&scratch.buffer)],
        params: &params,
        grid: grid(OP, [chunks, p.heads, p.seqs.n])?,
    })?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::POOL_SCORES,
        constants: &constants,
        binds: &[meta, scores, Bind::Raw(&scratch.buffer), Bind::Tensor(p.out)],
        params: &params,
        grid: grid(OP, [p.seqs.max_kv.div_ceil(1024).min(MAX_GROUPS), p.kv_heads, p.seqs.n])?,
    })
}

pub fn force(gpu: &Gpu, p: &Force<'_>) -> Result<()> {
    const OP: &str = "force";
    p.check()?;
    // More than all tokens is all tokens.
    let (sinks, recent) = (p.sinks.min(p.seqs.max_kv), p.recent.min(p.seqs.max_kv));
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::FORCE,
        constants: &[],
        binds: &[Bind::Tensor(p.seqs.meta), Bind::Tensor(p.scores)],
        params: &[
            word(OP, p.rows_per_seq)?,
            word(OP, p.stride)?,
            word(OP, sinks)?,
            word(OP, recent)?,
        ],
        grid: grid(OP, [(sinks + recent).div_ceil(64).min(MAX_GROUPS), p.rows_per_seq, p.seqs.n])?,
    })
}

pub fn top_k(gpu: &Gpu, p: &TopK<'_>) -> Result<()> {
    const OP: &str = "top_k";
    p.check()?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::TOP_K,
        constants: &[],
        binds: &[
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.scores),
            Bind::Tensor(p.indices),
            Bind::Tensor(p.counts),
            p.among.map_or(Bind::Absent, |a| Bind::Tensor(a.indices)),
            p.among.map_or(Bind::Absent, |a| Bind::Tensor(a.counts)),
        ],
        params: &[
            word(OP, p.rows_per_seq)?,
            word(OP, p.stride)?,
            word(OP, p.k)?,
            word(OP, p.unit)?,
            p.share.permille,
            p.share.at_least,
            p.among.map_or(Ok(0), |a| word(OP, a.k))?,
        ],
        grid: grid(OP, [p.rows_per_seq, p.seqs.n, 1])?,
    })
}
