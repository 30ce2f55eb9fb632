//! Pools per-query-head logits over a GQA group, or over all heads: after a softmax per head, in the log domain,
//! `max_h (s_{h,j} - lse_h)` or `log sum_h exp(s_{h,j} - lse_h)`; or as they are, `max_h s_{h,j}` or `sum_h s_{h,j}`.

use super::attention::log_sum;
use super::memory::{Io, Parts};
use super::seqs::sequences;
use super::{par, simd};
use crate::backend::{HeadPool, PoolScores, Result};

/// Tokens of one task.
const CHUNK: usize = 1024;

pub(super) fn run(io: &Io<'_>, p: &PoolScores<'_>) -> Result<()> {
    let scores = io.read::<f32>(p.scores)?;
    let out = io.write::<f32>(p.out)?;
    let seqs = sequences(io, &p.seqs)?;
    let lengths = p.lengths.map(|l| io.read::<u32>(l)).transpose()?;
    let rows = p.rows_per_seq();
    let group = p.heads / rows;
    let work = seqs.iter().map(|s| 2 * s.kv_len * p.heads).sum();
    // Scores of output row `i`.
    let length = |i: usize| lengths.map_or(seqs[i / rows].kv_len, |l| p.stride.min(l[i] as usize));
    let row = |i: usize| &scores[i * p.stride..][..length(i / group)];
    let mut lse = vec![0.0; seqs.len() * p.heads];
    if p.pool.softmax() {
        par::chunks(&mut lse, 1, work, |i, lse| lse[0] = log_sum_exp(row(i)));
    }

    let per_row = p.longest().div_ceil(CHUNK);
    let out = Parts::new(out);
    par::tasks(seqs.len() * rows * per_row, work, |i| {
        let (i, chunk) = (i / per_row, i % per_row);
        let n = length(i);
        let tokens = n.min(chunk * CHUNK)..n.min((chunk + 1) * CHUNK);
        let heads = i * group..(i + 1) * group;
        // SAFETY: tasks differ in row or tokens.
        let out = unsafe { out.part(i * p.stride + tokens.start, tokens.len()) };
        if p.pool == HeadPool::SumLogit {
            out.fill(0.0);
            for h in heads {
                out.iter_mut().zip(&row(h)[tokens.clone()]).for_each(|(o, s)| *o += s);
            }
            return;
        }
        out.fill(f32::NEG_INFINITY);
        for h in heads.clone() {
            simd::max_sub(&row(h)[tokens.clone()], lse[h], out);
        }
        if !p.pool.largest() {
            for (out, j) in out.iter_mut().zip(tokens).filter(|(max, _)| **max > f32::NEG_INFINITY)
            {
                // -infinity stays: its head may have nothing else, and no sum to divide by.
                let log_p = |h: usize| match row(h)[j] {
                    f32::NEG_INFINITY => f32::NEG_INFINITY,
                    s => s - lse[h],
                };
                let sum: f32 = heads.clone().map(|h| (log_p(h) - *out).exp()).sum();
                *out += sum.ln();
            }
        }
    });
    Ok(())
}

pub(super) fn log_sum_exp(x: &[f32]) -> f32 {
    let max = simd::largest(x);
    if max == f32::NEG_INFINITY { max } else { log_sum(max, simd::sum_exp(x, max)) }
}
