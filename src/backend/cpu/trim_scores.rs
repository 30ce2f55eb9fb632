//! Sets the scores that a budget leaves out to -infinity: below a share of the row's softmax mass, or below what the
//! rows of a sequence have together.

use super::memory::{Io, Parts};
use super::par;
use super::seqs::sequences;
use crate::backend::{Result, Trim, TrimScores};

pub(super) fn run(io: &Io<'_>, p: &TrimScores<'_>) -> Result<()> {
    let scores = Parts::new(io.write::<f32>(p.scores)?);
    let seqs = sequences(io, &p.seqs)?;
    let work = seqs.iter().map(|s| 16 * s.kv_len * p.rows_per_seq).sum();
    // SAFETY: a task takes the rows of its own sequence, or one of them.
    let row = |s: usize, r: usize| unsafe {
        scores.part((s * p.rows_per_seq + r) * p.stride, seqs[s].kv_len)
    };
    match p.trim {
        Trim::Mass { permille, at_least } => {
            par::tasks(seqs.len() * p.rows_per_seq, work, |i| {
                let row = row(i / p.rows_per_seq, i % p.rows_per_seq);
                let best = falling(row);
                let mass = with_mass(&best, f64::from(permille) / 1000.0);
                cut(row, mass.min(floor(&best, at_least)));
            });
        }
        Trim::Together { tokens, at_least } => par::tasks(seqs.len(), work, |s| {
            let rows: Vec<_> = (0..p.rows_per_seq).map(|r| row(s, r)).collect();
            let best: Vec<Vec<f32>> = rows.iter().map(|r| falling(r)).collect();
            let floors: Vec<f32> = best.iter().map(|b| floor(b, at_least)).collect();
            // What lies above the floors stays; the others, best first, fill what is left.
            let held = |b: &[f32], f: f32| b.partition_point(|x| *x >= f);
            let kept: usize = best.iter().zip(&floors).map(|(b, f)| held(b, *f)).sum();
            let rest = best.iter().zip(&floors).flat_map(|(b, f)| &b[held(b, *f)..]);
            let mut rest: Vec<f32> = rest.copied().collect();
            rest.sort_unstable_by(|a, b| b.total_cmp(a));
            let room = (tokens as usize).saturating_sub(kept).min(rest.len());
            // Equal scores stay or go together.
            let whole = match (rest.get(room), rest[..room].last()) {
                (Some(next), Some(last)) if next == last => rest.partition_point(|x| x > last),
                _ => room,
            };
            let u = rest[..whole].last().copied().unwrap_or(f32::INFINITY);
            rows.into_iter().zip(floors).for_each(|(row, f)| cut(row, u.min(f)));
        }),
    }
    Ok(())
}

/// The scores that can be chosen, best first.
fn falling(row: &[f32]) -> Vec<f32> {
    // Adding 0 makes one zero of two.
    let mut all: Vec<f32> =
        row.iter().filter(|x| **x > f32::NEG_INFINITY).map(|x| x + 0.0).collect();
    all.sort_unstable_by(|a, b| b.total_cmp(a));
    all
}

/// The score of rank `at_least`, or the last; +infinity for none.
fn floor(best: &[f32], at_least: u32) -> f32 {
    match (at_least as usize).min(best.len()) {
        0 => f32::INFINITY,
        n => best[n - 1],
    }
}

/// The largest score for which those of at least as much hold `share` of the mass.
fn with_mass(best: &[f32], share: f64) -> f32 {
    let Some(top) = best.first() else { return f32::INFINITY };
    let weight = |x: &f32| f64::from((x - top).exp());
    let goal = share * best.iter().map(weight).sum::<f64>();
    let mut mass = 0.0;
    let reached = best.iter().find(|x| {
        mass += weight(x);
        mass >= goal
    });
    *reached.or(best.last()).unwrap_or(top)
}

/// Drops the scores below `t`.
fn cut(row: &mut [f32], t: f32) {
    for x in row.iter_mut().filter(|x| x.is_nan() || **x < t) {
        *x = f32::NEG_INFINITY;
    }
}
