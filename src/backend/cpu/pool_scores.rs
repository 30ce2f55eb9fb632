//! Pools per-query-head logits over a GQA group after a softmax per head, in the log domain:
//! `max_h (s_{h,j} - lse_h)`, or `log sum_h exp(s_{h,j} - lse_h)`.

use super::attention::log_sum;
use super::memory::{Io, Parts};
use super::seqs::sequences;
use super::{par, simd};
use crate::backend::{Pool, PoolScores, Result};

pub(super) fn run(io: &Io<'_>, p: &PoolScores<'_>) -> Result<()> {
    let scores = io.read::<f32>(p.scores)?;
    let out = io.write::<f32>(p.out)?;
    let seqs = sequences(io, &p.seqs)?;
    let group = p.heads / p.kv_heads;
    let work = seqs.iter().map(|s| s.kv_len * p.heads).sum();
    let out = Parts::new(out);
    par::tasks(seqs.len() * p.kv_heads, work, |i| {
        let (s, n) = (i / p.kv_heads, seqs[i / p.kv_heads].kv_len);
        let first = s * p.heads + i % p.kv_heads * group;
        let rows: Vec<&[f32]> =
            (first..first + group).map(|h| &scores[h * p.stride..][..n]).collect();
        let lse: Vec<f32> = rows.iter().map(|row| log_sum_exp(row)).collect();
        // SAFETY: one row a task.
        let out = unsafe { out.part(i * p.stride, n) };
        for (j, out) in out.iter_mut().enumerate() {
            // -infinity stays: its head may have nothing else, and no sum to divide by.
            let log_p = || {
                rows.iter().zip(&lse).map(|(row, lse)| match row[j] {
                    f32::NEG_INFINITY => f32::NEG_INFINITY,
                    s => s - lse,
                })
            };
            let max = log_p().fold(f32::NEG_INFINITY, f32::max);
            *out = match p.pool {
                Pool::MeanSoftmax if max > f32::NEG_INFINITY => {
                    max + log_p().map(|x| (x - max).exp()).sum::<f32>().ln()
                }
                _ => max,
            };
        }
    });
    Ok(())
}

fn log_sum_exp(x: &[f32]) -> f32 {
    let max = simd::largest(x);
    if max == f32::NEG_INFINITY { max } else { log_sum(max, simd::sum_exp(x, max)) }
}
