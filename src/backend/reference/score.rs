//! Scoring, pooling, forcing, top-k.

use super::quantise_keys::dequantised;
use super::{Cell, Layout, Output, Seq, floats, words};
use crate::backend::{
    Backend, Force, HeadPool, LogitScale, PoolScores, Result, ScoreDims, ScoreSource, TopK,
};
use rayon::prelude::*;
use std::cmp::Ordering;

/// Where the keys of a [`ScoreSource`] are, on the host.
enum Source {
    Pool(Vec<f64>),
    Int8 { data: Vec<f64>, scale: Vec<f64>, dims: usize },
    Slice { data: Vec<f64>, capacity: usize },
}

/// See [`ScoreDims`].
pub fn score_dims<'a>(p: &ScoreDims<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let q = floats(dev, p.q)?;
    let at = Layout::of(&p.cache);
    let leading = |n: usize| (n, None);
    // Dimensions read, and the lists [slots, kv_heads, n] where they are not the leading ones.
    let (n, lists) = match &p.source {
        ScoreSource::Lead { n } | ScoreSource::Int8 { n, .. } => leading(*n),
        ScoreSource::Slice(s) => (s.n_dims, Some(words(dev, s.dims)?)),
        ScoreSource::Quantised(s) => (s.n_dims, Some(words(dev, s.dims)?)),
        ScoreSource::Gather { dims, n } => (*n, Some(words(dev, dims)?)),
    };
    let source = match &p.source {
        ScoreSource::Lead { .. } | ScoreSource::Gather { .. } => {
            Source::Pool(floats(dev, p.cache.k)?)
        }
        ScoreSource::Int8 { keys, .. } => Source::Int8 {
            data: floats(dev, keys.data)?,
            scale: floats(dev, keys.scale)?,
            dims: keys.dims,
        },
        ScoreSource::Quantised(s) => {
            Source::Slice { data: dequantised(s, dev)?, capacity: s.capacity }
        }
        ScoreSource::Slice(s) => Source::Slice { data: floats(dev, s.data)?, capacity: s.capacity },
    };
    let group = p.heads / at.kv_heads;
    let mut out = Output::new("score_dims", "scores", p.scores);
    for (index, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        for kv in 0..at.kv_heads {
            let slot_head = s.slot * at.kv_heads + kv;
            let dims: Vec<usize> = match &lists {
                Some(l) => l[slot_head * n..][..n].iter().map(|i| *i as usize).collect(),
                None => (0..n).collect(),
            };
            let key = |j: usize, col: usize| match &source {
                Source::Pool(k) => k[at.k(s, kv, j, dims[col])],
                Source::Int8 { data, scale, dims } => {
                    let row = at.row(s, kv, j);
                    data[row * dims + col] * scale[row]
                }
                Source::Slice { data, capacity } => data[(slot_head * capacity + j) * n + col],
            };
            let logit = |h: usize, j: usize| {
                let q = &q[(s.q_start * p.heads + h) * at.d..][..at.d];
                let dot: f64 = (0..n).map(|c| q[dims[c]] * key(j, c)).sum();
                logit_scale(p.scale, q, &dims) * dot
            };
            let heads = kv * group..(kv + 1) * group;
            let finite = |x: f64| if x.is_finite() { x } else { f64::NEG_INFINITY };
            let rows = if p.pool.in_score() { kv..kv + 1 } else { heads.clone() };
            for row in rows {
                let score = |j: usize| match p.pool {
                    HeadPool::SumLogit => finite(heads.clone().map(|h| logit(h, j)).sum()),
                    HeadPool::MaxLogit => {
                        let logits = heads.clone().map(|h| finite(logit(h, j)));
                        logits.fold(f64::NEG_INFINITY, f64::max)
                    }
                    _ => finite(logit(row, j)),
                };
                let values: Vec<f64> = (0..s.kv_len).into_par_iter().map(score).collect();
                out.put((index * p.rows_per_seq() + row) * p.stride, &values);
            }
        }
    }
    Ok(vec![out])
}

/// `c_h` of the partial logits on `dims`.
pub(super) fn logit_scale(scale: LogitScale, q: &[f64], dims: &[usize]) -> f64 {
    let d = q.len() as f64;
    match scale {
        LogitScale::InvSqrtDim => 1.0 / d.sqrt(),
        LogitScale::Coverage => {
            let all: f64 = q.iter().map(|x| x.abs()).sum();
            let kept: f64 = dims.iter().map(|i| q[*i].abs()).sum();
            if kept == 0.0 { 0.0 } else { 1.0 / (d * kept / all).sqrt() }
        }
    }
}

/// See [`PoolScores`].
pub fn pool_scores<'a>(p: &PoolScores<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    pooled(p, &floats(dev, p.scores)?, dev)
}

/// See [`Backend::score_pool`].
pub fn score_pool<'a>(
    s: &ScoreDims<'a>,
    p: &PoolScores<'a>,
    dev: &dyn Backend,
) -> Result<Vec<Output<'a>>> {
    let (mut scores, mut outs) = (floats(dev, p.scores)?, score_dims(s, dev)?);
    put_cells(&mut scores, &outs[0]);
    outs.extend(pooled(p, &scores, dev)?);
    Ok(outs)
}

/// What an output will hold.
fn put_cells(values: &mut [f64], out: &Output<'_>) {
    for (x, cell) in values.iter_mut().zip(&out.cells) {
        if let Cell::Is(v) = cell {
            *x = *v;
        }
    }
}

fn pooled<'a>(p: &PoolScores<'a>, scores: &[f64], dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let lengths = p.lengths.map(|l| words(dev, l)).transpose()?;
    let rows = p.rows_per_seq();
    let group = p.heads / rows;
    let mut out = Output::new("pool_scores", "out", p.out);
    let log_sum_exp = |x: &[f64]| {
        let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = x.iter().map(|v| (v - top).exp()).sum();
        if top == f64::NEG_INFINITY { top } else { top + sum.ln() }
    };
    for (index, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        for r in 0..rows {
            let listed = |l: &Vec<u32>| (l[index * rows + r] as usize).min(p.stride);
            let n = lengths.as_ref().map_or(s.kv_len, listed);
            let row = |h: usize| &scores[(index * p.heads + h) * p.stride..][..n];
            let heads = r * group..(r + 1) * group;
            let total = |h: usize| if p.pool.softmax() { log_sum_exp(row(h)) } else { 0.0 };
            let lse: Vec<f64> = heads.clone().map(total).collect();
            let pooled = |j: usize| {
                let each = heads.clone().zip(&lse).map(|(h, l)| match row(h)[j] {
                    f64::NEG_INFINITY => f64::NEG_INFINITY,
                    s => s - l,
                });
                match p.pool {
                    HeadPool::SumLogit => each.sum(),
                    pool if pool.largest() => each.fold(f64::NEG_INFINITY, f64::max),
                    _ => log_sum_exp(&each.collect::<Vec<_>>()),
                }
            };
            let values: Vec<f64> = (0..n).map(pooled).collect();
            out.put((index * rows + r) * p.stride, &values);
        }
    }
    Ok(vec![out])
}

/// See [`Force`].
pub fn force<'a>(p: &Force<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let mut out = Output::exact("force", "scores", p.scores);
    let listed = match &p.among {
        Some(a) => Some((words(dev, a.indices)?, words(dev, a.counts)?, a.k)),
        None => None,
    };
    for (index, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        for row in index * p.rows_per_seq..(index + 1) * p.rows_per_seq {
            let tokens: Vec<usize> = match &listed {
                Some((indices, counts, k)) => {
                    let n = (counts[row] as usize).min(*k);
                    indices[row * k..][..n].iter().map(|j| *j as usize).collect()
                }
                None => (0..s.kv_len).collect(),
            };
            let recent = s.kv_len.saturating_sub(p.recent)..s.kv_len;
            for (column, j) in tokens.into_iter().enumerate() {
                if j < p.sinks.min(s.kv_len) || recent.contains(&j) {
                    out.cells[row * p.stride + column] = Cell::Is(f64::INFINITY);
                }
            }
        }
    }
    Ok(vec![out])
}

/// See [`TopK`].
pub fn top_k<'a>(p: &TopK<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    best(p, &floats(dev, p.scores)?, dev)
}

/// See [`Backend::force_top_k`].
pub fn force_top_k<'a>(f: &Force<'a>, p: &TopK<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (mut scores, mut outs) = (floats(dev, p.scores)?, force(f, dev)?);
    put_cells(&mut scores, &outs[0]);
    outs.extend(best(p, &scores, dev)?);
    Ok(outs)
}

fn best<'a>(p: &TopK<'a>, scores: &[f64], dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let mut indices = Output::exact("top_k", "indices", p.indices);
    let mut counts = Output::exact("top_k", "counts", p.counts);
    let among = p.among.map(|a| Ok((words(dev, a.indices)?, words(dev, a.counts)?, a.k)));
    let among: Option<(Vec<u32>, Vec<u32>, usize)> = among.transpose()?;
    for (index, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        for row in index * p.rows_per_seq..(index + 1) * p.rows_per_seq {
            let n = match &among {
                Some((_, counts, k)) => (counts[row] as usize).min(*k),
                None => s.kv_len.div_ceil(p.unit),
            };
            let score = &scores[row * p.stride..][..n];
            let may = |j: &usize| !score[*j].is_nan() && score[*j] != f64::NEG_INFINITY;
            let mut order: Vec<usize> = (0..n).filter(may).collect();
            // Stable: equal scores keep the smaller index first.
            order.sort_by(|a, b| score[*b].partial_cmp(&score[*a]).unwrap_or(Ordering::Equal));
            order.truncate(p.k.min(p.share.of(s.kv_len)));
            order.sort_unstable();
            counts.cells[row] = Cell::Is(order.len() as f64);
            indices.cells[row * p.k..(row + 1) * p.k].fill(Cell::Any);
            let number = |j: &usize| match &among {
                Some((indices, _, k)) => f64::from(indices[row * k + j]),
                None => *j as f64,
            };
            let chosen: Vec<f64> = order.iter().map(number).collect();
            indices.put(row * p.k, &chosen);
        }
    }
    Ok(vec![indices, counts])
}
