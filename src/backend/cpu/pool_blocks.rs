//! Scores of blocks: heads pooled summary by summary, the largest summary of each block, forced blocks.

use super::memory::Io;
use super::par;
use super::pool_scores::log_sum_exp;
use super::seqs::sequences;
use crate::backend::{HeadPool, PoolBlocks, Result};

pub(super) fn run(io: &Io<'_>, p: &PoolBlocks<'_>) -> Result<()> {
    let scores = io.read::<f32>(p.scores)?;
    let out = io.write::<f32>(p.out)?;
    let seqs = sequences(io, &p.seqs)?;
    let rows = p.rows_per_seq();
    let (group, (own, beyond)) = (p.heads / rows, p.spread());
    let work = seqs.iter().map(|s| 4 * p.kind.count(s.kv_len) * p.heads).sum();
    par::chunks(&mut out[..seqs.len() * rows * p.block_stride], p.block_stride, work, |i, out| {
        let (kv_len, row) = (seqs[i / rows].kv_len, i % rows);
        let n = p.kind.count(kv_len);
        let first = (i / rows) * p.heads + row * group;
        let heads: Vec<&[f32]> =
            (first..first + group).map(|h| &scores[h * p.stride..][..n]).collect();
        let summaries = pooled(p.pool, &heads);
        for (b, out) in out[..kv_len.div_ceil(p.unit)].iter_mut().enumerate() {
            let end = n.min(own * (b + 1) + beyond);
            let best = summaries[own * b..end].iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let recent = p.recent > 0 && (b + 1) * p.unit > kv_len.saturating_sub(p.recent);
            *out = if b * p.unit < p.sinks || recent { f32::INFINITY } else { best };
        }
    });
    Ok(())
}

/// One score per summary.
fn pooled(pool: HeadPool, heads: &[&[f32]]) -> Vec<f32> {
    let n = heads.first().map_or(0, |h| h.len());
    let shift: Vec<f32> = match pool {
        // A head of -infinity throughout has no sum: its scores stay as they are.
        HeadPool::MaxSoftmax | HeadPool::MeanSoftmax => {
            let total = |h: &&[f32]| Some(log_sum_exp(h)).filter(|l| l.is_finite());
            heads.iter().map(|h| total(h).unwrap_or(0.0)).collect()
        }
        _ => vec![0.0; heads.len()],
    };
    let at = |g: usize| heads.iter().zip(&shift).map(move |(h, l)| h[g] - l);
    let one = |g: usize| {
        let top = at(g).fold(f32::NEG_INFINITY, f32::max);
        match pool {
            HeadPool::SumLogit => Some(at(g).sum()).filter(|s: &f32| s.is_finite()),
            HeadPool::MeanSoftmax if top > f32::NEG_INFINITY => {
                Some(top + at(g).map(|s| (s - top).exp()).sum::<f32>().ln())
            }
            _ => Some(top),
        }
        .unwrap_or(f32::NEG_INFINITY)
    };
    (0..n).map(one).collect()
}
