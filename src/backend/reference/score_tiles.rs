//! Scores of keys for a tile of query rows.

use super::{Layout, Output, Seq, floats};
use crate::backend::{Backend, Result, ScoreTiles};
use rayon::prelude::*;

/// See [`ScoreTiles`].
pub fn score_tiles<'a>(p: &ScoreTiles<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (q, k, lse) = (floats(dev, p.q)?, floats(dev, p.cache.k)?, floats(dev, p.lse)?);
    let at = Layout::of(&p.cache);
    let (d, group, lists) = (at.d, p.heads / at.kv_heads, p.lists());
    let mut out = Output::new("score_tiles", "scores", p.scores);
    for (n, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        for list in 0..lists {
            let heads = list * p.heads / lists..(list + 1) * p.heads / lists;
            let score = |j: usize| -> f64 {
                let first = j.saturating_sub(s.kv_len - s.q_len);
                let rows = (first..s.q_len).flat_map(|i| heads.clone().map(move |h| (i, h)));
                rows.map(|(i, h)| {
                    let row_head = (s.q_start + i) * p.heads + h;
                    let key = |c: usize| k[at.k(s, h / group, j, c)];
                    let dot: f64 = (0..d).map(|c| q[row_head * d + c] * key(c)).sum();
                    (f64::from(p.scale) * dot - lse[row_head]).exp()
                })
                .sum()
            };
            let values: Vec<f64> = (0..s.kv_len).into_par_iter().map(score).collect();
            out.put((n * lists + list) * p.stride, &values);
        }
    }
    Ok(vec![out])
}
