//! A union of the query heads' rankings.

use super::{Cell, Output, Seq, floats, words};
use crate::backend::{Backend, Result, UnionRanks};

/// See [`UnionRanks`]: the turns are gone through as they are published.
pub fn union_ranks<'a>(p: &UnionRanks<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (scores, k) = (floats(dev, p.scores)?, p.listed.k);
    let (indices, counts) = (words(dev, p.listed.indices)?, words(dev, p.listed.counts)?);
    let mut out = Output::exact("union_ranks", "out", p.out);
    for (i, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        let ranking = |h: usize| {
            let row = i * p.heads + h;
            let n = k.min(counts[row] as usize);
            let mut list: Vec<usize> =
                indices[row * k..][..n].iter().map(|j| *j as usize).collect();
            // Stable, and `+ 0.0` takes -0 to 0: equal scores stay in the order of their indices.
            let score = |j: usize| scores[row * p.stride + j] + 0.0;
            list.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
            list
        };
        let rankings: Vec<Vec<usize>> = (0..p.heads).map(ranking).collect();
        let cells = &mut out.cells[i * p.stride..][..s.kv_len];
        cells.fill(Cell::Is(f64::NEG_INFINITY));
        for turn in 0..k * p.heads {
            let named = rankings[turn % p.heads].get(turn / p.heads);
            if let Some(cell) = named.map(|j| &mut cells[*j])
                && *cell == Cell::Is(f64::NEG_INFINITY)
            {
                *cell = Cell::Is(-(turn as f64));
            }
        }
    }
    Ok(vec![out])
}
