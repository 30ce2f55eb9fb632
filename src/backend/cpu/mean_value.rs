//! The mean value in place of the tokens that were left out: `out = alpha out + (1 - alpha) sum_v / kv_len`, with
//! `alpha` the share of the estimated softmax that the listed tokens hold.

use super::memory::{Io, Parts};
use super::seqs::{Lists, slotted};
use super::{par, simd};
use crate::backend::{MeanValue, Result, key_stats_len};

pub(super) fn run(io: &Io<'_>, p: &MeanValue<'_>) -> Result<()> {
    let (d, group) = (p.head_dim, p.heads / p.kv_heads);
    let scores = io.read::<f32>(p.scores)?;
    let sums = io.read::<f32>(p.sums)?;
    let lists = Lists::read(io, p.listed)?;
    let out = Parts::new(io.write::<f32>(p.out)?);
    let seqs = slotted(io, &p.seqs, p.slots)?;
    let work = seqs.iter().map(|s| s.kv_len * p.heads).sum();
    par::tasks(seqs.len() * p.heads, work, |i| {
        let (s, h) = (i / p.heads, i % p.heads);
        let seq = &seqs[s];
        let row = &scores[i * p.stride..][..seq.kv_len];
        let top = simd::largest(row);
        if seq.q_len == 0 || top == f32::NEG_INFINITY {
            return;
        }
        let all = simd::sum_exp(row, top);
        let listed = lists.of(s * p.lists + h * p.lists / p.heads);
        let known = listed.iter().filter_map(|&j| row.get(j as usize));
        let kept: f32 = known.map(|s| (s - top).exp()).sum();
        let rest = ((all - kept) / all).clamp(0.0, 1.0);
        if rest == 0.0 {
            return;
        }
        let share = rest / seq.kv_len as f32;
        let sums = &sums[(seq.slot * p.kv_heads + h / group) * key_stats_len(d)..][..d];
        // SAFETY: a task writes its head of the row of its sequence; no two sequences share a row.
        let out = unsafe { out.part((seq.q_start * p.heads + h) * d, d) };
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = (1.0 - rest) * *out + share * sum;
        }
    });
    Ok(())
}
