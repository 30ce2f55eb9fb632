//! Merges split results by log-sum-exp: with `m = max_s lse_s`, `w_s = exp(lse_s - m)`,
//! `out = sum_s w_s part_s / sum_s w_s`, `lse = m + log sum_s w_s`.

use super::attention::log_sum;
use super::memory::Io;
use super::seqs::sequences;
use crate::backend::{Merge, Result};

pub(super) fn run(io: &Io<'_>, p: &Merge<'_>) -> Result<()> {
    let d = p.head_dim;
    let part = io.read::<f32>(p.part)?;
    let part_lse = io.read::<f32>(p.part_lse)?;
    let out = io.write::<f32>(p.out)?;
    let mut lse = p.lse.map(|l| io.write::<f32>(l)).transpose()?;
    let heads = p.seqs.rows * p.heads;
    for seq in sequences(io, &p.seqs)? {
        for i in seq.q_start * p.heads..(seq.q_start + seq.q_len) * p.heads {
            let split_lse = |s: usize| part_lse[s * heads + i];
            let max = (0..p.splits).map(split_lse).fold(f32::NEG_INFINITY, f32::max);
            let out = &mut out[i * d..(i + 1) * d];
            out.fill(0.0);
            let mut sum = 0.0;
            for s in (0..p.splits).filter(|&s| split_lse(s) > f32::NEG_INFINITY) {
                let w = (split_lse(s) - max).exp();
                sum += w;
                let part = &part[(s * heads + i) * d..][..d];
                out.iter_mut().zip(part).for_each(|(o, x)| *o += w * x);
            }
            if sum > 0.0 {
                out.iter_mut().for_each(|o| *o /= sum);
            }
            if let Some(lse) = lse.as_deref_mut() {
                lse[i] = log_sum(max, sum);
            }
        }
    }
    Ok(())
}
