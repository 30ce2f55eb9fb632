//! Scoring listed tokens.

use super::score::logit_scale;
use super::{Layout, Output, Seq, floats, words};
use crate::backend::{Backend, HeadPool, Result, ScoreRows};
use rayon::prelude::*;

/// See [`ScoreRows`].
pub fn score_rows<'a>(p: &ScoreRows<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (q, keys) = (floats(dev, p.q)?, floats(dev, p.cache.k)?);
    let (indices, counts) = (words(dev, p.among.indices)?, words(dev, p.among.counts)?);
    let at = Layout::of(&p.cache);
    let (n, listed) = p.dims();
    let listed = listed.map(|d| words(dev, d)).transpose()?;
    let group = p.heads / at.kv_heads;
    let finite = |x: f64| if x.is_finite() { x } else { f64::NEG_INFINITY };
    let mut out = Output::new("score_rows", "scores", p.scores);
    for (index, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        let logit = |h: usize, j: usize| {
            let kv = h / group;
            let dims: Vec<usize> = match &listed {
                Some(l) => {
                    let list = &l[(s.slot * at.kv_heads + kv) * n..][..n];
                    list.iter().map(|i| *i as usize).collect()
                }
                None => (0..n).collect(),
            };
            let q = &q[(s.q_start * p.heads + h) * at.d..][..at.d];
            let dot: f64 = dims.iter().map(|&i| q[i] * keys[at.k(s, kv, j, i)]).sum();
            logit_scale(p.scale, q, &dims) * dot
        };
        for row in 0..p.rows_per_seq() {
            let heads = match p.pool.in_score() {
                true => row * group..(row + 1) * group,
                false => row..row + 1,
            };
            let list = index * p.lists + heads.start * p.lists / p.heads;
            let room = &indices[list * p.among.k..][..p.among.k];
            let tokens = &room[..(counts[list] as usize).min(p.among.k)];
            let score = |j: &u32| {
                let j = *j as usize;
                if j >= s.kv_len {
                    return f64::NEG_INFINITY;
                }
                match p.pool {
                    HeadPool::MaxLogit => {
                        let each = heads.clone().map(|h| finite(logit(h, j)));
                        each.fold(f64::NEG_INFINITY, f64::max)
                    }
                    _ => finite(heads.clone().map(|h| logit(h, j)).sum()),
                }
            };
            let values: Vec<f64> = tokens.par_iter().map(score).collect();
            out.put((index * p.rows_per_seq() + row) * p.stride, &values);
        }
    }
    Ok(vec![out])
}
