//! Selection by blocks: summaries of keys, their scores, blocks and their tokens.

use super::{Cell, Layout, Output, Seq, floats, words};
use crate::backend::{
    Backend, ExpandBlocks, ForceBlocks, HeadPool, KvSummaries, PAGE, PoolBlocks, Result,
    ScoreSummaries, SummaryKind,
};

/// First element of summary `g` of KV head `h`.
fn place(kind: SummaryKind, kv_heads: usize, d: usize, s: &Seq, h: usize, g: usize) -> usize {
    let page = s.pages[g * kind.run() / PAGE];
    (page * kv_heads + h) * kind.page_len(d) + g % kind.per_page() * kind.vectors() * d
}

/// See [`KvSummaries`].
pub fn kv_summaries<'a>(p: &KvSummaries<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let k = floats(dev, p.cache.k)?;
    let (at, kind) = (Layout::of(&p.cache), p.summaries.kind);
    let d = at.d;
    let mut out = match kind {
        SummaryKind::Bounds { .. } => Output::exact("kv_summaries", "data", p.summaries.data),
        _ => Output::new("kv_summaries", "data", p.summaries.data),
    };
    for s in Seq::read(dev, &p.seqs)? {
        let first = (s.kv_len - s.q_len) / kind.run();
        for g in (first..kind.count(s.kv_len)).filter(|g| kind.exists(*g, s.kv_len)) {
            let end = ((g + 1) * kind.run()).min(s.kv_len);
            let tokens = g * kind.run() - kind.before()..end;
            for h in 0..at.kv_heads {
                let base = place(kind, at.kv_heads, d, &s, h, g);
                let key = |j: usize, i: usize| k[at.k(&s, h, j, i)];
                let finite = tokens.clone().all(|j| (0..d).all(|i| key(j, i).is_finite()));
                for i in 0..d {
                    let column: Vec<f64> = tokens.clone().map(|j| key(j, i)).collect();
                    let mean = |x: &dyn Fn(f64) -> f64| -> f64 {
                        column.iter().map(|k| x(*k)).sum::<f64>() / column.len() as f64
                    };
                    let lo = column.iter().copied().fold(f64::INFINITY, f64::min);
                    let hi = column.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let middle = (lo + hi) / 2.0;
                    let values = match kind {
                        SummaryKind::Windows { .. } => vec![mean(&|k| k)],
                        SummaryKind::Bounds { .. } => vec![lo, hi],
                        SummaryKind::Cuboid { .. } => {
                            let r = mean(&|k| (k - middle).abs());
                            vec![middle - r, middle + r]
                        }
                    };
                    for (v, x) in values.into_iter().enumerate() {
                        out.cells[base + v * d + i] = if finite { Cell::Is(x) } else { Cell::Any };
                    }
                }
            }
        }
    }
    Ok(vec![out])
}

/// See [`ScoreSummaries`].
pub fn score_summaries<'a>(p: &ScoreSummaries<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (q, data) = (floats(dev, p.q)?, floats(dev, p.summaries.data)?);
    let (kind, d) = (p.summaries.kind, p.head_dim);
    let mut out = Output::new("score_summaries", "scores", p.scores);
    for (index, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        for h in 0..p.heads {
            let q = &q[(s.q_start * p.heads + h) * d..][..d];
            let score = |g: usize| {
                if !kind.exists(g, s.kv_len) {
                    return f64::NEG_INFINITY;
                }
                let at = place(kind, p.kv_heads, d, s, h / (p.heads / p.kv_heads), g);
                let term = |i: usize| match kind {
                    SummaryKind::Windows { .. } => q[i] * data[at + i],
                    _ => (q[i] * data[at + i]).max(q[i] * data[at + d + i]),
                };
                let logit = f64::from(p.scale) * (p.from..p.from + p.dims).map(term).sum::<f64>();
                if logit.is_finite() { logit } else { f64::NEG_INFINITY }
            };
            let row: Vec<f64> = (0..kind.count(s.kv_len)).map(score).collect();
            out.put((index * p.heads + h) * p.stride, &row);
        }
    }
    Ok(vec![out])
}

/// See [`PoolBlocks`].
pub fn pool_blocks<'a>(p: &PoolBlocks<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let scores = floats(dev, p.scores)?;
    let rows = p.rows_per_seq();
    let group = p.heads / rows;
    let ((own, beyond), unit) = (p.spread(), p.unit);
    let mut out = Output::new("pool_blocks", "out", p.out);
    let lse = |x: &[f64]| {
        let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = x.iter().map(|v| (v - top).exp()).sum();
        if top == f64::NEG_INFINITY { top } else { top + sum.ln() }
    };
    for (index, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        let n = p.kind.count(s.kv_len);
        let row = |h: usize| &scores[(index * p.heads + h) * p.stride..][..n];
        for r in 0..rows {
            let heads = r * group..(r + 1) * group;
            let totals: Vec<f64> = heads.clone().map(|h| lse(row(h))).collect();
            let pooled = |g: usize| -> f64 {
                let logits = heads.clone().map(|h| row(h)[g]);
                let probability = |(s, total): (f64, &f64)| match s {
                    f64::NEG_INFINITY => s,
                    _ => s - total,
                };
                let each = || logits.clone().zip(&totals).map(probability).collect::<Vec<f64>>();
                let top = |x: &[f64]| x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                match p.pool {
                    HeadPool::SumLogit => {
                        let sum: f64 = logits.clone().sum();
                        if sum.is_finite() { sum } else { f64::NEG_INFINITY }
                    }
                    HeadPool::MaxSoftmax => top(&each()),
                    HeadPool::MeanSoftmax => lse(&each()),
                    _ => top(&logits.clone().collect::<Vec<f64>>()),
                }
            };
            for b in 0..s.kv_len.div_ceil(unit) {
                let recent = p.recent > 0 && (b + 1) * unit + p.recent > s.kv_len;
                let forced = b * unit < p.sinks || recent;
                let around = (own * b..own * (b + 1) + beyond).take_while(|g| *g < n);
                let best = around.map(pooled).fold(f64::NEG_INFINITY, f64::max);
                let at = (index * rows + r) * p.block_stride + b;
                out.cells[at] = Cell::Is(if forced { f64::INFINITY } else { best });
            }
        }
    }
    Ok(vec![out])
}

/// See [`ForceBlocks`].
pub fn force_blocks<'a>(p: &ForceBlocks<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (blocks, counts) = (words(dev, p.listed.indices)?, words(dev, p.listed.counts)?);
    let mut out = Output::exact("force_blocks", "scores", p.scores);
    for (index, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        for row in index * p.rows_per_seq..(index + 1) * p.rows_per_seq {
            let list = &blocks[row * p.listed.k..][..p.listed.k.min(counts[row] as usize)];
            for b in list.iter().map(|b| *b as usize).filter(|b| b * p.unit < s.kv_len) {
                out.cells[row * p.stride + b] = Cell::Is(f64::INFINITY);
            }
        }
    }
    Ok(vec![out])
}

/// See [`ExpandBlocks`].
pub fn expand_blocks<'a>(p: &ExpandBlocks<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (blocks, block_counts) = (words(dev, p.blocks)?, words(dev, p.block_counts)?);
    let mut indices = Output::exact("expand_blocks", "indices", p.indices);
    let mut counts = Output::exact("expand_blocks", "counts", p.counts);
    for (index, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        for row in index * p.rows_per_seq..(index + 1) * p.rows_per_seq {
            let list = &blocks[row * p.k..][..block_counts[row] as usize];
            let tokens = list.iter().flat_map(|b| {
                let first = *b as usize * p.unit;
                first..(first + p.unit).min(s.kv_len)
            });
            let tokens: Vec<f64> = tokens.map(|j| j as f64).collect();
            let room = p.k * p.unit;
            indices.cells[row * room..(row + 1) * room].fill(Cell::Any);
            indices.put(row * room, &tokens);
            counts.cells[row] = Cell::Is(tokens.len() as f64);
        }
    }
    Ok(vec![indices, counts])
}
