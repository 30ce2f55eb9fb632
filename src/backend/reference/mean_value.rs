//! The mean value in place of the tokens that were left out.

use super::{Output, Seq, floats, words};
use crate::backend::{Backend, MeanValue, Result, key_stats_len};

/// See [`MeanValue`].
pub fn mean_value<'a>(p: &MeanValue<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (scores, sums, before) =
        (floats(dev, p.scores)?, floats(dev, p.sums)?, floats(dev, p.out)?);
    let (indices, counts) = (words(dev, p.listed.indices)?, words(dev, p.listed.counts)?);
    let (d, k) = (p.head_dim, p.listed.k);
    let mut out = Output::new("mean_value", "out", p.out);
    for (n, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        for h in 0..p.heads {
            let row = &scores[(n * p.heads + h) * p.stride..][..s.kv_len];
            let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let at = (s.q_start * p.heads + h) * d;
            let mut values = before[at..at + d].to_vec();
            if top > f64::NEG_INFINITY {
                let list = n * p.lists + h * p.lists / p.heads;
                let listed = &indices[list * k..][..(counts[list] as usize).min(k)];
                let all: f64 = row.iter().map(|x| (x - top).exp()).sum();
                let known = listed.iter().filter_map(|j| row.get(*j as usize));
                let alpha = known.map(|x| (x - top).exp()).sum::<f64>() / all;
                let head = s.slot * p.kv_heads + h / (p.heads / p.kv_heads);
                let sums = &sums[head * key_stats_len(d)..][..d];
                for (x, sum) in values.iter_mut().zip(sums) {
                    *x = alpha * *x + (1.0 - alpha) * sum / s.kv_len as f64;
                }
            }
            out.put(at, &values);
        }
    }
    Ok(vec![out])
}
