//! The distribution over compressed keys that real queries have.

use super::grid::{Grid, means};
use crate::calibrate::TracedText;
use crate::calibrate::mass::{Keys, causal, probabilities};
use serde::{Deserialize, Serialize};

/// What a Forecast learns from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Teacher {
    /// Softmax over means of two neighbouring keys, then the largest of the `stride + 1` that start at most one token
    /// before the first half of a window (as published).
    #[default]
    Fine,
    /// Softmax over the compressed keys themselves, of the windows that lie wholly in the past.
    Plain,
}

/// Tokens of a fine key, and between two of them.
const FINE: (usize, usize) = (2, 1);

/// Room that [`LayerTeacher::of_in`] works in.
#[derive(Default)]
pub(super) struct Room {
    /// `[heads of the group, rows, keys]`.
    p: Vec<f32>,
    /// `[keys]`.
    sum: Vec<f32>,
    /// `[rows, windows]`.
    out: Vec<f32>,
}

/// A teacher with what it precomputes for one layer of one text.
pub(super) struct LayerTeacher<'a> {
    text: &'a TracedText,
    layer: usize,
    grid: Grid,
    kind: Teacher,
    keys: Vec<f32>,
}

impl<'a> LayerTeacher<'a> {
    /// `compressed`: the layer's [`Grid::compressed`] keys.
    pub fn new(
        text: &'a TracedText,
        layer: usize,
        grid: Grid,
        kind: Teacher,
        compressed: &[f32],
    ) -> Self {
        let keys = match kind {
            Teacher::Fine => {
                let count = text.tokens.saturating_sub(FINE.0 - 1) / FINE.1;
                means(text, layer, count, FINE.0, FINE.1)
            }
            Teacher::Plain => compressed.to_vec(),
        };
        LayerTeacher { text, layer, grid, kind, keys }
    }

    /// The same with the queries of another text.
    pub fn asked_by<'b>(&self, text: &'b TracedText) -> LayerTeacher<'b> {
        LayerTeacher { text, keys: self.keys.clone(), ..*self }
    }

    /// Probabilities of the query rows `rows` of a KV head over the windows, `[rows.len(), windows]`: summed over the
    /// query heads, then over the windows to 1. All 0 where a query sees none.
    pub fn of(&self, head: usize, rows: &[usize]) -> Vec<f32> {
        self.of_in(head, rows, &mut Room::default()).to_vec()
    }

    /// [`LayerTeacher::of`] without an allocation.
    pub fn of_in<'r>(&self, head: usize, rows: &[usize], room: &'r mut Room) -> &'r [f32] {
        let (text, grid) = (self.text, self.grid);
        let count = self.keys.len() / (text.kv_heads * text.head_dim);
        let last = rows.iter().copied().max().unwrap_or(0);
        // Nobody sees what starts after the last row.
        let count = match self.kind {
            Teacher::Fine => count.min(last + 1),
            Teacher::Plain => count.min(grid.started(last)),
        };
        let keys = Keys { data: &self.keys, count };
        let Room { p, sum, out } = room;
        let at = (self.layer, head);
        match self.kind {
            Teacher::Fine => {
                probabilities(text, at, rows, keys, |row| causal(None, row), p);
            }
            Teacher::Plain => {
                let past = |row: usize| 0..grid.windows(row + 1);
                probabilities(text, at, rows, keys, past, p);
            }
        }
        let windows = grid.windows(text.tokens);
        out.clear();
        out.resize(rows.len() * windows, 0.0);
        if count == 0 || windows == 0 {
            return out;
        }
        for (i, target) in out.chunks_exact_mut(windows).enumerate() {
            sum.clear();
            sum.resize(count, 0.0);
            for heads in p.chunks_exact(rows.len() * count) {
                let of_row = &heads[i * count..][..count];
                sum.iter_mut().zip(of_row).for_each(|(s, p)| *s += p);
            }
            match self.kind {
                Teacher::Plain => target[..count].copy_from_slice(sum),
                Teacher::Fine => align(sum, grid.stride, target),
            }
            let total: f32 = target.iter().sum();
            target.iter_mut().for_each(|t| *t /= total + 1e-8);
        }
        out
    }
}

/// The largest of `fine[stride * j - 1 ..= stride * j + stride - 1]` for each window j.
fn align(fine: &[f32], stride: usize, out: &mut [f32]) {
    for (j, t) in out.iter_mut().enumerate() {
        let range = (stride * j).saturating_sub(1)..(stride * (j + 1)).min(fine.len());
        let inside = fine.get(range).unwrap_or_default();
        *t = peak(inside);
    }
}

/// The largest value, at least 0; eight at a time.
fn peak(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (eights, rest) = x.as_chunks::<8>();
    let mut most = [0.0; 8];
    for x in eights {
        most.iter_mut().zip(x).for_each(|(m, &x)| *m = larger(*m, x));
    }
    most.iter().chain(rest).fold(0.0, |m, &x| larger(m, x))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid { window: 8, stride: 4, block: 8, init: 1, local: 1, budget: 5 };

    #[test]
    fn fine_probabilities_are_aligned_by_their_largest() {
        let mut out = [9.0; 3];
        align(&[0.1, 0.0, 0.0, 0.5, 0.2, 0.3], 4, &mut out);
        assert_eq!(out, [0.5, 0.5, 0.0]);
    }

    #[test]
    fn teachers_are_distributions_over_windows_that_have_begun() {
        let text = TracedText::random(4, 1, 40);
        let compressed = GRID.compressed(&text, 0);
        let rows = [2, 7, 23, 39];
        for kind in [Teacher::Fine, Teacher::Plain] {
            let t = LayerTeacher::new(&text, 0, GRID, kind, &compressed).of(1, &rows);
            for (target, row) in t.chunks_exact(9).zip(rows) {
                let none = kind == Teacher::Plain && row < 7;
                let sum: f32 = target.iter().sum();
                assert!((sum - if none { 0.0 } else { 1.0 }).abs() < 1e-5, "{kind:?} {row}: {sum}");
                // Aligned windows reach one token back, so one may begin after the query.
                let begun = (GRID.started(row) + usize::from(kind == Teacher::Fine)).min(9);
                assert!(target[begun..].iter().all(|&p| p == 0.0), "{kind:?} {row}: {target:?}");
            }
        }
    }

    #[test]
    fn the_plain_teacher_is_the_softmax_by_hand() {
        let text = TracedText::random(6, 1, 40);
        let keys = GRID.compressed(&text, 0);
        let t = LayerTeacher::new(&text, 0, GRID, Teacher::Plain, &keys).of(0, &[30]);
        let mut want = [0f64; 9];
        for q_head in 0..2 {
            let logit = |j: usize| -> f64 {
                let q = &text.layers[0].q[(30 * 4 + q_head) * 8..][..8];
                let dot: f32 = q.iter().zip(&keys[j * 16..][..8]).map(|(a, b)| a * b).sum();
                (f64::from(dot) / 8f64.sqrt()).exp()
            };
            // The last whole window of 31 tokens is number 5: tokens 20 to 27.
            let sum: f64 = (0..6).map(logit).sum();
            (0..6).for_each(|j| want[j] += logit(j) / sum / 2.0);
        }
        for (got, want) in t.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-5, "{t:?}");
        }
    }
}
