//! Budgets that follow the scores.

use super::{Cell, Output, Seq, floats};
use crate::backend::{Backend, Result, Trim, TrimScores};

/// How far the mass may be from what is asked for where rounding may decide.
const DOUBT: f64 = 1e-5;

/// Scores of a row that can be chosen, best first.
fn falling(row: &[f64]) -> Vec<f64> {
    let mut all: Vec<f64> = row.iter().copied().filter(|x| *x > f64::NEG_INFINITY).collect();
    all.sort_by(|a, b| b.total_cmp(a));
    all
}

/// `c(t)`.
fn count(row: &[f64], t: f64) -> usize {
    row.iter().filter(|x| **x > f64::NEG_INFINITY && **x >= t).count()
}

/// `f`: the largest score with `c(f) >= at_least`; no score at all where that is 0.
fn floor(best: &[f64], at_least: u32) -> f64 {
    let n = (at_least as usize).min(best.len());
    if n == 0 { f64::INFINITY } else { best[n - 1] }
}

/// The largest score whose superiors and equals hold `share` of the mass.
fn with_mass(best: &[f64], share: f64) -> f64 {
    let Some(last) = best.last() else { return f64::INFINITY };
    let weights = best.iter().map(|x| (x - best[0]).exp());
    let whole: f64 = weights.clone().sum();
    let mut mass = 0.0;
    let mut reached = best.iter().zip(weights).filter_map(|(x, w)| {
        mass += w;
        (mass >= share * whole).then_some(*x)
    });
    reached.next().unwrap_or(*last)
}

/// See [`TrimScores`].
pub fn trim_scores<'a>(p: &TrimScores<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let scores = floats(dev, p.scores)?;
    let mut out = Output::exact("trim_scores", "scores", p.scores);
    for (n, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        let at = |r: usize| (n * p.rows_per_seq + r) * p.stride;
        let rows: Vec<&[f64]> =
            (0..p.rows_per_seq).map(|r| &scores[at(r)..at(r) + s.kv_len]).collect();
        let best: Vec<Vec<f64>> = rows.iter().map(|r| falling(r)).collect();
        // For each row the thresholds between which rounding may choose.
        let bounds: Vec<(f64, f64)> = match p.trim {
            Trim::Mass { permille, at_least } => {
                let share = f64::from(permille) / 1000.0;
                let one = |b: &Vec<f64>| {
                    let t = |share: f64| with_mass(b, share).min(floor(b, at_least));
                    (t((share + DOUBT).min(1.0)), t(share - DOUBT))
                };
                best.iter().map(one).collect()
            }
            Trim::Together { tokens, at_least } => {
                let floors: Vec<f64> = best.iter().map(|b| floor(b, at_least)).collect();
                let held = |u: f64| -> usize {
                    rows.iter().zip(&floors).map(|(r, f)| count(r, u.min(*f))).sum()
                };
                let mut all: Vec<f64> = best.concat();
                all.sort_by(|a, b| a.total_cmp(b));
                let fits = all.partition_point(|u| held(*u) > tokens as usize);
                let u = all.get(fits).copied().unwrap_or(f64::INFINITY);
                floors.iter().map(|f| (u.min(*f), u.min(*f))).collect()
            }
        };
        for (r, (low, high)) in bounds.into_iter().enumerate() {
            for (cell, x) in out.cells[at(r)..].iter_mut().zip(rows[r]) {
                if *x >= high {
                    continue;
                }
                *cell = if *x >= low { Cell::Any } else { Cell::Is(f64::NEG_INFINITY) };
            }
        }
    }
    Ok(vec![out])
}
