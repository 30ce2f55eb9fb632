//! Choosing dimensions, scoring and selecting tokens: select_dims, score_dims, score_rows, score_tiles, pool_scores, force, trim_scores,
//! top_k.

use super::encoder::{Bind, Dispatch, MAX_GROUPS, grid, word};
use super::memory::Gpu;
use super::{acts_are_f32, dtype_code, pipelines};
use crate::backend::{
    BackendError, DimMetric, Force, HeadPool, KvPool, LogitScale, PAGE, PoolScores, Refresh,
    Result, ScoreDims, ScoreRows, ScoreSource, ScoreTiles, SelectDims, SliceBits, TopK, Trim,
    TrimScores,
};

/// f32 values of the query tile of `score_dims`: 14 KiB, which leaves room in 16 KiB for the rest.
const QUERY_TILE: usize = 3584;
/// Tokens of one partial log-sum-exp of `pool_scores` (CHUNK in the shader).
const POOL_CHUNK: usize = 4096;
/// Query heads whose log-sum-exps fit the workgroup memory that every device has.
const POOL_HEADS: usize = 1024;

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
        ScoreSource::Quantised(s) => {
            let source = if s.bits == SliceBits::Four { 5 } else { 4 };
            let (data, scales) = (Bind::Tensor(s.data), Bind::Tensor(s.scale));
            (source, s.n_dims, data, Bind::Tensor(s.dims), scales)
        }
        ScoreSource::Gather { dims, n } => (3, *n, k, Bind::Tensor(dims), none),
    };
    let (slots, int8_dims, capacity) = match &p.source {
        ScoreSource::Lead { .. } => (0, 0, 0),
        ScoreSource::Int8 { keys, .. } => (0, keys.dims, 0),
        ScoreSource::Slice(s) => (s.slots, 0, s.capacity),
        ScoreSource::Quantised(s) => (s.slots, 0, s.capacity),
        ScoreSource::Gather { dims, n } => (dims.len() / (n * cache.kv_heads).max(1), 0, 0),
    };
    let group = p.heads / cache.kv_heads;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::SCORE_DIMS,
        constants: &score_constants(OP, cache, source, (p.pool, p.scale), group, n)?,
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

/// Values of `score_query.wgsl` for `heads` query heads that share `n` dimensions of the keys.
fn score_constants(
    op: &'static str,
    cache: &KvPool<'_>,
    source: u32,
    (pool, scale): (HeadPool, LogitScale),
    heads: usize,
    n: usize,
) -> Result<[(&'static str, u32); 11]> {
    let (pool, rows) = match pool {
        HeadPool::SumLogit => (0, 1),
        HeadPool::MaxLogit => (1, heads),
        _ => (2, heads),
    };
    let chunk = n.min(QUERY_TILE / rows / 8 * 8);
    Ok([
        ("DTYPE", dtype_code(cache.k.dtype())),
        ("SOURCE", source),
        ("POOL", pool),
        ("COVERAGE", u32::from(scale == LogitScale::Coverage)),
        ("HEAD_DIM", word(op, cache.head_dim)?),
        ("LEAD", word(op, cache.lead)?),
        ("GROUP", word(op, heads)?),
        ("ROWS", word(op, rows)?),
        ("N", word(op, n)?),
        ("CHUNK", word(op, chunk)?),
        ("TILE", word(op, rows * chunk / 4)?),
    ])
}

pub fn score_rows(gpu: &Gpu, p: &ScoreRows<'_>) -> Result<()> {
    const OP: &str = "score_rows";
    p.check()?;
    acts_are_f32(OP, &[p.q])?;
    let cache = &p.cache;
    let (n, dims) = p.dims();
    let slots = dims.map_or(0, |d| d.len() / (n * cache.kv_heads).max(1));
    let source = if dims.is_some() { 3 } else { 0 };
    let parts = p.parts_per_seq();
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::SCORE_ROWS,
        constants: &score_constants(OP, cache, source, (p.pool, p.scale), p.heads / parts, n)?,
        binds: &[
            Bind::Tensor(p.q),
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.seqs.pages),
            Bind::Tensor(cache.k),
            dims.map_or(Bind::Absent, Bind::Tensor),
            Bind::Tensor(p.among.indices),
            Bind::Tensor(p.scores),
            Bind::Tensor(p.among.counts),
        ],
        params: &[
            word(OP, p.heads)?,
            word(OP, cache.kv_heads)?,
            word(OP, cache.n_pages)?,
            word(OP, p.stride)?,
            word(OP, slots)?,
            word(OP, n)?,
            word(OP, cache.head_dim)?,
            word(OP, p.lists)?,
            word(OP, p.among.k)?,
        ],
        grid: grid(OP, [p.among.k.div_ceil(64).min(MAX_GROUPS), parts, p.seqs.n])?,
    })
}

pub fn score_tiles(gpu: &Gpu, p: &ScoreTiles<'_>) -> Result<()> {
    const OP: &str = "score_tiles";
    p.check()?;
    acts_are_f32(OP, &[p.q])?;
    let cache = &p.cache;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::SCORE_TILES,
        constants: &[
            ("DTYPE", dtype_code(cache.k.dtype())),
            ("HEAD_DIM", word(OP, cache.head_dim)?),
            ("LEAD", word(OP, cache.lead)?),
            ("GROUP", word(OP, p.heads / cache.kv_heads)?),
        ],
        binds: &[
            Bind::Tensor(p.q),
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.seqs.pages),
            Bind::Tensor(cache.k),
            Bind::Tensor(p.lse),
            Bind::Tensor(p.scores),
        ],
        params: &[
            word(OP, p.heads)?,
            word(OP, cache.kv_heads)?,
            word(OP, p.lists())?,
            word(OP, cache.n_pages)?,
            word(OP, p.stride)?,
            p.scale.to_bits(),
            word(OP, cache.head_dim)?,
        ],
        grid: grid(OP, [p.seqs.max_kv.div_ceil(PAGE), p.lists(), p.seqs.n])?,
    })
}

pub fn pool_scores(gpu: &Gpu, p: &PoolScores<'_>) -> Result<()> {
    const OP: &str = "pool_scores";
    p.check()?;
    let rows = p.rows_per_seq();
    let group = p.heads / rows;
    if group > POOL_HEADS {
        return Err(BackendError::Unsupported {
            op: OP,
            backend: "wgpu",
            what: format!("{group} query heads in one pool"),
        });
    }
    let chunks = p.longest().div_ceil(POOL_CHUNK);
    let scratch = gpu.scratch(p.seqs.n * p.heads * chunks * 8)?;
    let constants = [
        ("GROUP", word(OP, group)?),
        ("SUM", u32::from(!p.pool.largest())),
        ("SOFTMAX", u32::from(p.pool.softmax())),
    ];
    let params = [
        word(OP, p.heads)?,
        word(OP, rows)?,
        word(OP, p.stride)?,
        word(OP, chunks)?,
        u32::from(p.lengths.is_some()),
    ];
    let (meta, scores) = (Bind::Tensor(p.seqs.meta), Bind::Tensor(p.scores));
    let lengths = p.lengths.map_or(Bind::Absent, Bind::Tensor);
    if p.pool.softmax() {
        gpu.dispatch(&Dispatch {
            kernel: &pipelines::POOL_PARTIALS,
            constants: &constants,
            binds: &[meta, scores, Bind::Raw(&scratch.buffer), lengths],
            params: &params,
            grid: grid(OP, [chunks, p.heads, p.seqs.n])?,
        })?;
    }
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::POOL_SCORES,
        constants: &constants,
        binds: &[meta, scores, Bind::Raw(&scratch.buffer), Bind::Tensor(p.out), lengths],
        params: &params,
        grid: grid(OP, [p.longest().div_ceil(1024).min(MAX_GROUPS), rows, p.seqs.n])?,
    })
}

pub fn force(gpu: &Gpu, p: &Force<'_>) -> Result<()> {
    const OP: &str = "force";
    p.check()?;
    // More than all tokens is all tokens.
    let (sinks, recent) = (p.sinks.min(p.seqs.max_kv), p.recent.min(p.seqs.max_kv));
    if let Some(a) = &p.among {
        return gpu.dispatch(&Dispatch {
            kernel: &pipelines::FORCE_LISTED,
            constants: &[],
            binds: &[
                Bind::Tensor(p.seqs.meta),
                Bind::Tensor(p.scores),
                Bind::Tensor(a.indices),
                Bind::Tensor(a.counts),
            ],
            params: &[
                word(OP, p.rows_per_seq)?,
                word(OP, p.stride)?,
                word(OP, sinks)?,
                word(OP, recent)?,
                word(OP, a.k)?,
            ],
            grid: grid(OP, [a.k.div_ceil(64).min(MAX_GROUPS), p.rows_per_seq, p.seqs.n])?,
        });
    }
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::FORCE,
        constants: &[],
        binds: &[Bind::Tensor(p.seqs.meta), Bind::Tensor(p.scores)],
        params: &[
            word(OP, p.rows_per_seq)?,
            word(OP, p.stride)?,
            word(OP, sinks)?,
            word(OP, recent)?,
            0,
        ],
        grid: grid(OP, [(sinks + recent).div_ceil(64).min(MAX_GROUPS), p.rows_per_seq, p.seqs.n])?,
    })
}

pub fn trim_scores(gpu: &Gpu, p: &TrimScores<'_>) -> Result<()> {
    const OP: &str = "trim_scores";
    p.check()?;
    let (kernel, tokens, at_least, share, groups) = match p.trim {
        Trim::Mass { permille, at_least } => {
            let share = permille as f32 / 1000.0;
            (&pipelines::TRIM_MASS, 0, at_least, share, [p.rows_per_seq, p.seqs.n, 1])
        }
        Trim::Together { tokens, at_least } => {
            (&pipelines::TRIM_TOGETHER, tokens, at_least, 0.0, [p.seqs.n, 1, 1])
        }
    };
    gpu.dispatch(&Dispatch {
        kernel,
        constants: &[],
        binds: &[Bind::Tensor(p.seqs.meta), Bind::Tensor(p.scores)],
        params: &[
            word(OP, p.rows_per_seq)?,
            word(OP, p.stride)?,
            tokens,
            at_least,
            share.to_bits(),
        ],
        grid: grid(OP, groups)?,
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
