//! Attention and the merge of its splits.

use super::{Cell, Layout, Output, Seq, floats, score_dims, words};
use crate::backend::{AttendDense, AttendRows, Backend, Merge, PAGE, Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Outputs of one row and head: head_dim values and the log-sum-exp.
type Head = (Vec<f64>, f64);

struct Attention<'s> {
    q: &'s [f64],
    k: &'s [f64],
    v: &'s [f64],
    at: Layout,
    scale: f64,
}

impl Attention<'_> {
    /// Attention of the query at `q_at` over `tokens` of KV head `h`.
    fn head(&self, s: &Seq, h: usize, q_at: usize, tokens: &[usize]) -> Head {
        let d = self.at.d;
        let q = &self.q[q_at..q_at + d];
        let lead = self.at.lead;
        let dot =
            |q: &[f64], from: usize| q.iter().zip(&self.k[from..]).map(|(a, b)| a * b).sum::<f64>();
        // The two pieces of a key row, each contiguous.
        let logit = |j: usize| {
            let rest = if lead < d { dot(&q[lead..], self.at.k(s, h, j, lead)) } else { 0.0 };
            self.scale * (dot(&q[..lead], self.at.k(s, h, j, 0)) + rest)
        };
        let logits: Vec<f64> = tokens.iter().map(|j| logit(*j)).collect();
        let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut out = vec![0.0; d];
        if tokens.is_empty() {
            return (out, f64::NEG_INFINITY);
        }
        let sum: f64 = logits.iter().map(|l| (l - top).exp()).sum();
        for (j, l) in tokens.iter().zip(&logits) {
            let w = (l - top).exp() / sum;
            let value = &self.v[self.at.v(s, h, *j, 0)..];
            out.iter_mut().zip(value).for_each(|(o, v)| *o += w * v);
        }
        (out, top + sum.ln())
    }
}

struct Target<'a> {
    op: &'static str,
    out: &'a Tensor,
    lse: Option<&'a Tensor>,
    /// Rows of the ragged batch times heads.
    rows_heads: usize,
}

impl<'a> Target<'a> {
    fn outputs(&self, heads: Vec<(usize, usize, Head)>) -> Vec<Output<'a>> {
        let mut out = Output::new(self.op, "out", self.out);
        let mut lse = self.lse.map(|t| Output::new(self.op, "lse", t));
        for (split, row_head, (values, l)) in heads {
            let at = split * self.rows_heads + row_head;
            out.put(at * values.len(), &values);
            if let Some(lse) = &mut lse {
                lse.put(at, &[l]);
            }
        }
        std::iter::once(out).chain(lse).collect()
    }
}

/// Part `i` of `n` near-equal contiguous parts of `0..len`.
fn part(len: usize, n: usize, i: usize) -> Range<usize> {
    len * i / n..len * (i + 1) / n
}

/// See [`AttendDense`]. With several splits the ranges are this function's own choice.
pub fn attend_dense<'a>(p: &AttendDense<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (q, k, v) = (floats(dev, p.q)?, floats(dev, p.cache.k)?, floats(dev, p.cache.v)?);
    let at = Layout::of(&p.cache);
    let a = Attention { q: &q, k: &k, v: &v, at, scale: f64::from(p.scale) };
    let group = p.heads / at.kv_heads;
    let mut heads = Vec::new();
    for s in Seq::read(dev, &p.seqs)? {
        let jobs = p.splits * s.q_len * p.heads;
        heads.par_extend((0..jobs).into_par_iter().map(|job| {
            let (split, rest) = (job / (s.q_len * p.heads), job % (s.q_len * p.heads));
            let (i, h) = (rest / p.heads, rest % p.heads);
            let position = s.kv_len - s.q_len + i;
            let first = p.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let pages = part(s.kv_len.div_ceil(PAGE), p.splits, split);
            let from = first.max(pages.start * PAGE);
            let tokens: Vec<usize> = (from..(position + 1).min(pages.end * PAGE)).collect();
            let row_head = (s.q_start + i) * p.heads + h;
            (split, row_head, a.head(&s, h / group, row_head * at.d, &tokens))
        }));
    }
    let rows_heads = p.seqs.rows * p.heads;
    let mut outs = Target { op: "attend_dense", out: p.out, lse: p.lse, rows_heads }.outputs(heads);
    if !p.values {
        let out = outs.iter_mut().filter(|o| o.name == "out");
        out.for_each(|o| o.cells.fill(Cell::Any));
    }
    if let Some(scoring) = p.scoring() {
        let scores = score_dims(&scoring, dev)?.into_iter();
        outs.extend(scores.map(|o| Output { op: "attend_dense", name: "logits", ..o }));
    }
    Ok(outs)
}

/// See [`AttendRows`]. With several splits the ranges are this function's own choice.
pub fn attend_rows<'a>(p: &AttendRows<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (q, k, v) = (floats(dev, p.q)?, floats(dev, p.cache.k)?, floats(dev, p.cache.v)?);
    let (indices, counts) = (words(dev, p.indices)?, words(dev, p.counts)?);
    let map = p.head_map.map(|m| words(dev, m)).transpose()?;
    let at = Layout::of(&p.cache);
    let a = Attention { q: &q, k: &k, v: &v, at, scale: f64::from(p.scale) };
    let mut heads = Vec::new();
    for (n, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        let jobs = p.splits * s.q_len * p.heads;
        heads.par_extend((0..jobs).into_par_iter().map(|job| {
            let (split, rest) = (job / (s.q_len * p.heads), job % (s.q_len * p.heads));
            let (i, h) = (rest / p.heads, rest % p.heads);
            let kv_head = h / (p.heads / at.kv_heads);
            let list = match &map {
                Some(map) => map[kv_head] as usize,
                None => h / (p.heads / p.rows_per_seq),
            };
            let listed: &[u32] = if list < p.rows_per_seq {
                let list = n * p.rows_per_seq + list;
                &indices[list * p.k..][..counts[list] as usize]
            } else {
                &[]
            };
            let mine = &listed[part(listed.len(), p.splits, split)];
            let position = s.kv_len - s.q_len + i;
            let tokens = mine.iter().map(|j| *j as usize).filter(|j| *j <= position);
            let row_head = (s.q_start + i) * p.heads + h;
            (split, row_head, a.head(s, kv_head, row_head * at.d, &tokens.collect::<Vec<_>>()))
        }));
    }
    let rows_heads = p.seqs.rows * p.heads;
    Ok(Target { op: "attend_rows", out: p.out, lse: p.lse, rows_heads }.outputs(heads))
}

/// See [`Merge`].
pub fn merge<'a>(p: &Merge<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (part, part_lse) = (floats(dev, p.part)?, floats(dev, p.part_lse)?);
    let rows_heads = p.seqs.rows * p.heads;
    let d = p.head_dim;
    let one = |row_head: usize| {
        let lse = |s: usize| part_lse[s * rows_heads + row_head];
        let top = (0..p.splits).map(lse).fold(f64::NEG_INFINITY, f64::max);
        let mut out = vec![0.0; d];
        if top == f64::NEG_INFINITY {
            return (out, top);
        }
        let sum: f64 = (0..p.splits).map(|s| (lse(s) - top).exp()).sum();
        for s in (0..p.splits).filter(|s| lse(*s) > f64::NEG_INFINITY) {
            let w = (lse(s) - top).exp() / sum;
            let from = &part[(s * rows_heads + row_head) * d..][..d];
            out.iter_mut().zip(from).for_each(|(o, x)| *o += w * x);
        }
        (out, top + sum.ln())
    };
    let mut heads = Vec::new();
    for s in Seq::read(dev, &p.seqs)? {
        let rows = s.q_start * p.heads..(s.q_start + s.q_len) * p.heads;
        heads.extend(rows.map(|row_head| (0, row_head, one(row_head))));
    }
    Ok(Target { op: "merge", out: p.out, lse: p.lse, rows_heads }.outputs(heads))
}
