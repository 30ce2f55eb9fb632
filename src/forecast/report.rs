//! What Forecasts find on text that they were not trained on.

use super::lesson::Lesson;
use super::lookahead::Lookahead;
use super::rotary::Rotary;
use super::teacher::LayerTeacher;
use super::{Forecast, Grid, Teacher};
use crate::calibrate::mass::{Keys, causal, probabilities};
use crate::calibrate::{CalibrateError, TracedText};
use crate::engine::{Engine, TraceParts};
use rayon::prelude::*;
use serde::Serialize;

/// Queries of one matrix product; even, as queries come in pairs.
const ROWS: usize = 64;

/// What one way of choosing blocks finds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Scores {
    /// Share of the teacher's picks among its own picks; those that are always read do not count.
    pub recall: f64,
    /// Share of all attention mass on the blocks read, those always read included.
    pub mass: f64,
}

/// One layer's results, means over KV heads, query positions and texts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerRecall {
    /// The layer whose blocks are predicted.
    pub layer: usize,
    /// Samples: (query, KV head) pairs with more candidates than picks.
    pub samples: usize,
    /// The teacher itself: recall 1.
    pub teacher: Scores,
    /// The trained matrix.
    pub forecast: Scores,
    /// The matrix before training.
    pub untrained: Scores,
    /// The layer's query heads as the input of the layer before tells them, untrained, in place of the teacher's own.
    pub lookahead: Scores,
    /// The mean of the layer's own queries, known only once the layer runs.
    pub own_query: Scores,
    /// The teacher's picks for the token before.
    pub previous: Scores,
    /// Expectation of a random choice.
    pub random: Scores,
}

/// Ways of choosing that are summed, in the order of [`LayerRecall`].
const WAYS: usize = 7;

#[derive(Clone, Copy, Default)]
struct Sums {
    samples: usize,
    scores: [(f64, f64); WAYS],
}

impl Sums {
    fn add(&mut self, other: &Sums) {
        self.samples += other.samples;
        for (sum, of) in self.scores.iter_mut().zip(other.scores) {
            *sum = (sum.0 + of.0, sum.1 + of.1);
        }
    }

    fn layer(&self, layer: usize) -> LayerRecall {
        let n = self.samples.max(1) as f64;
        let [teacher, forecast, untrained, lookahead, own_query, previous, random] =
            self.scores.map(|(recall, mass)| Scores { recall: recall / n, mass: mass / n });
        LayerRecall {
            layer,
            samples: self.samples,
            teacher,
            forecast,
            untrained,
            lookahead,
            own_query,
            previous,
            random,
        }
    }
}

/// Compares trained matrices, the matrices before training and simpler choices on `texts`, at every `every`-th query
/// that has more blocks to choose from than it may.
///
/// # Errors
/// As [`TracedText::read`]; [`CalibrateError::BadOption`] when no query has a choice.
pub fn held_out(
    engine: &mut Engine,
    texts: &[Vec<u32>],
    (trained, untrained): (&Forecast, &Forecast),
    grid: Grid,
    teacher: Teacher,
    every: usize,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<LayerRecall>, CalibrateError> {
    grid.check()?;
    let c = engine.decoder().config();
    let (layers, inv_freq) = (c.n_layers, c.inv_freq());
    let ahead = (0..layers).map(|l| Lookahead::new(engine.checkpoint(), l));
    let ahead = ahead.collect::<Result<Vec<_>, _>>()?;
    let mut sums = vec![Sums::default(); layers];
    for text in texts {
        let parts = TraceParts { normed: true, ..TraceParts::default() };
        let traced = TracedText::read(engine, text, parts, |_| go_on())?;
        let rotary = Rotary::new(&inv_freq, text.len());
        let has_choice = |row: &usize| grid.candidates(*row).len() > grid.free();
        // Each query comes after the one before it, whose picks are compared as well.
        let rows: Vec<usize> = (1..text.len())
            .step_by(every.max(1))
            .filter(has_choice)
            .flat_map(|row| [row - 1, row])
            .collect();
        let of_layer = |target: usize| {
            if traced.windows[target].is_some() {
                return Sums::default();
            }
            let lesson = Lesson { text: &traced, grid, rotary: &rotary, target };
            let weights = [&trained.matrices[target][..], &untrained.matrices[target]];
            compare(&lesson, weights, &ahead[target], teacher, &rows)
        };
        let found: Vec<Sums> = (0..layers).into_par_iter().map(of_layer).collect();
        sums.iter_mut().zip(&found).for_each(|(sum, of)| sum.add(of));
    }
    if sums.iter().all(|s| s.samples == 0) {
        return Err(CalibrateError::BadOption(format!(
            "no query of the held-out text has more than {} blocks of {} to choose from; give longer pieces or a \
             smaller budget",
            grid.free(),
            grid.block
        )));
    }
    Ok(sums.iter().enumerate().map(|(layer, s)| s.layer(layer)).collect())
}

fn compare(
    lesson: &Lesson<'_>,
    weights: [&[f32]; 2],
    ahead: &Lookahead,
    teacher: Teacher,
    rows: &[usize],
) -> Sums {
    let (text, grid, layer) = (lesson.text, lesson.grid, lesson.target);
    let (d, group) = (text.head_dim, text.group());
    let windows = grid.windows(text.tokens);
    let compressed = grid.compressed(text, layer);
    let teacher = LayerTeacher::new(text, layer, grid, teacher, &compressed);
    let speculated = ahead.asked(lesson, rows);
    let ahead = teacher.asked_by(&speculated);
    let mut sums = Sums::default();
    let mut tokens = Vec::new();
    for head in 0..text.kv_heads {
        let head_len = d * text.hidden;
        let of_head = |w: &[f32], rows: &[usize]| {
            let q = lesson.forecast(&w[head * head_len..][..head_len], rows);
            lesson.scores(q, &compressed, head)
        };
        for rows in rows.chunks(ROWS) {
            let [truth, ahead] = [&teacher, &ahead].map(|t| t.of(head, rows));
            let own = lesson.scores(mean_queries(text, layer, head, rows), &compressed, head);
            let [trained, untrained] = weights.map(|w| of_head(w, rows));
            let end = rows.iter().max().map_or(0, |r| r + 1);
            let keys = Keys { data: &text.layers[layer].k, count: end };
            probabilities(text, (layer, head), rows, keys, |r| causal(None, r), &mut tokens);
            for (i, &row) in rows.iter().enumerate().filter(|(i, _)| i % 2 == 1) {
                let seen = grid.started(row).min(windows);
                let pick = |scores: &[f32]| grid.pick(&scores[i * windows..][..seen], row);
                let wanted = pick(&truth);
                let before = grid.started(row - 1).min(windows);
                let previous = grid.pick(&truth[(i - 1) * windows..][..before], row - 1);
                let of_blocks = block_mass(&tokens, (i, rows.len()), end, group, grid.block);
                let candidates = grid.candidates(row);
                let chosen_from: f64 = of_blocks[candidates.clone()].iter().sum();
                let forced = of_blocks.iter().sum::<f64>() - chosen_from;
                let mut add = |way: usize, picks: &[u32]| {
                    let found = picks.iter().filter(|b| wanted.contains(b)).count();
                    let mass: f64 = picks.iter().map(|&b| of_blocks[b as usize]).sum();
                    sums.scores[way].0 += found as f64 / wanted.len() as f64;
                    sums.scores[way].1 += forced + mass;
                };
                add(0, &wanted);
                add(1, &pick(&trained));
                add(2, &pick(&untrained));
                add(3, &pick(&ahead));
                add(4, &pick(&own));
                add(5, &previous);
                let chance = grid.free() as f64 / candidates.len() as f64;
                sums.scores[6].0 += chance;
                sums.scores[6].1 += forced + chance * chosen_from;
                sums.samples += 1;
            }
        }
    }
    sums
}

/// Mean of a KV head's queries, `[rows, head_dim]`.
fn mean_queries(text: &TracedText, layer: usize, head: usize, rows: &[usize]) -> Vec<f32> {
    let (d, group) = (text.head_dim, text.group());
    let mut out = vec![0.0; rows.len() * d];
    for (mean, row) in out.chunks_exact_mut(d).zip(rows) {
        let at = (row * text.heads + head * group) * d;
        for q in text.layers[layer].q[at..at + group * d].chunks_exact(d) {
            mean.iter_mut().zip(q).for_each(|(m, q)| *m += q / group as f32);
        }
    }
    out
}

/// Attention mass of every block for query `i` of `n`, mean over the query heads of a KV head. `tokens`:
/// `[group, n, end]`.
fn block_mass(
    tokens: &[f32],
    (i, n): (usize, usize),
    end: usize,
    group: usize,
    block: usize,
) -> Vec<f64> {
    let mut out = vec![0.0; end.div_ceil(block)];
    for g in 0..group {
        let row = &tokens[(g * n + i) * end..][..end];
        for (mass, tokens) in out.iter_mut().zip(row.chunks(block)) {
            *mass += tokens.iter().map(|&p| f64::from(p)).sum::<f64>() / group as f64;
        }
    }
    out
}
