//! Loss, agreement and gradient of one KV head's rows of one matrix on one text.

use super::grid::Grid;
use super::loss::restricted_kl;
use super::rotary::Rotary;
use super::teacher::LayerTeacher;
use crate::backend::cpu::host::{Matrix, product};
use crate::calibrate::TracedText;
use crate::model::lookahead::source;

/// Queries of one matrix product.
const ROWS: usize = 128;

/// What queries of one KV head agree on with their teacher.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Tally {
    /// Sum of the restricted divergences.
    pub loss: f64,
    /// Queries.
    pub queries: usize,
    /// Blocks that the teacher picks, of queries that cannot pick all.
    pub wanted: usize,
    /// Those among them that the prediction picks too.
    pub found: usize,
}

impl Tally {
    pub fn add(&mut self, other: Tally) {
        self.loss += other.loss;
        self.queries += other.queries;
        self.wanted += other.wanted;
        self.found += other.found;
    }
}

/// One text, the layer whose blocks are predicted, and the layer whose input predicts them.
pub(super) struct Lesson<'a> {
    pub text: &'a TracedText,
    pub grid: Grid,
    pub rotary: &'a Rotary,
    /// The layer whose blocks are predicted.
    pub target: usize,
}

impl Lesson<'_> {
    /// Forecast vectors `[rows.len(), head_dim]` of a KV head after the rotary embedding. `weight`: the head's rows of
    /// the matrix, `[head_dim, hidden]`.
    pub fn forecast(&self, weight: &[f32], rows: &[usize]) -> Vec<f32> {
        let (d, hidden) = (self.text.head_dim, self.text.hidden);
        let input = self.input(rows);
        let mut out = vec![0.0; rows.len() * d];
        let by = Matrix::columns(weight, hidden);
        product((rows.len(), d, hidden), &mut out, d, false, Matrix::rows(&input, hidden), by);
        for (x, &row) in out.chunks_exact_mut(d).zip(rows) {
            self.rotary.turn(row, x);
        }
        out
    }

    /// Normed inputs `[rows.len(), hidden]` of the layer whose input predicts.
    pub fn input(&self, rows: &[usize]) -> Vec<f32> {
        let (layer, hidden) = (&self.text.layers[source(self.target)], self.text.hidden);
        rows.iter().flat_map(|r| &layer.normed[r * hidden..][..hidden]).copied().collect()
    }

    /// `q . compressed key / sqrt(head_dim)`, `[rows, windows]`, for queries `[rows, head_dim]` of a KV head.
    pub fn scores(&self, q: &[f32], compressed: &[f32], head: usize) -> Vec<f32> {
        let (d, kv_heads) = (self.text.head_dim, self.text.kv_heads);
        let windows = self.grid.windows(self.text.tokens);
        let rows = q.len() / d;
        let mut out = vec![0.0; rows * windows];
        if windows > 0 {
            let keys = Matrix::columns(&compressed[head * d..], kv_heads * d);
            product((rows, windows, d), &mut out, windows, false, Matrix::rows(q, d), keys);
        }
        let scale = 1.0 / (d as f32).sqrt();
        out.iter_mut().for_each(|s| *s *= scale);
        out
    }

    /// Compares the head's Forecast with its teacher at the queries `rows`. With `gradient` (like `weight`), the
    /// gradient of the summed loss is added to it.
    pub fn study(
        &self,
        weight: &[f32],
        head: usize,
        rows: &[usize],
        (teacher, compressed): (&LayerTeacher<'_>, &[f32]),
        mut gradient: Option<&mut [f32]>,
    ) -> Tally {
        let (text, grid) = (self.text, self.grid);
        let (d, hidden) = (text.head_dim, text.hidden);
        let windows = grid.windows(text.tokens);
        let mut tally = Tally { queries: rows.len(), ..Tally::default() };
        if windows == 0 {
            return tally;
        }
        for rows in rows.chunks(ROWS) {
            let truth = teacher.of(head, rows);
            let mut scores = self.scores(&self.forecast(weight, rows), compressed, head);
            let each = scores.chunks_exact_mut(windows).zip(truth.chunks_exact(windows));
            for ((scores, truth), &row) in each.zip(rows) {
                let seen = grid.started(row).min(windows);
                let picks = grid.pick(&truth[..seen], row);
                if picks.len() < grid.candidates(row).len() {
                    let guess = grid.pick(&scores[..seen], row);
                    tally.wanted += picks.len();
                    tally.found += picks.iter().filter(|b| guess.contains(b)).count();
                }
                let of_block = |&b: &u32| grid.of_block(b as usize, seen).map(|j| j as u32);
                let selected: Vec<u32> = picks.iter().flat_map(of_block).collect();
                tally.loss += restricted_kl(truth, &mut scores[..seen], &selected);
                scores[seen..].fill(0.0);
            }
            let Some(gradient) = gradient.as_deref_mut() else { continue };
            // Back through the products: scores to Forecast vectors, the rotation, then the matrix.
            let mut back = vec![0.0; rows.len() * d];
            let keys = Matrix::rows(&compressed[head * d..], text.kv_heads * d);
            let by = Matrix::rows(&scores, windows);
            product((rows.len(), d, windows), &mut back, d, false, by, keys);
            let scale = 1.0 / (d as f32).sqrt();
            for (x, &row) in back.chunks_exact_mut(d).zip(rows) {
                x.iter_mut().for_each(|x| *x *= scale);
                self.rotary.turn_back(row, x);
            }
            let input = self.input(rows);
            let by = Matrix::columns(&back, d);
            let input = Matrix::rows(&input, hidden);
            product((d, hidden, rows.len()), gradient, hidden, true, by, input);
        }
        tally
    }
}

#[cfg(test)]
mod tests {
    use super::super::teacher::Teacher;
    use super::*;

    const GRID: Grid = Grid { window: 8, stride: 4, block: 8, init: 1, local: 1, budget: 5 };

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let text = TracedText::random(11, 2, 72);
        let rotary = Rotary::new(&[1.0, 0.3, 0.1, 0.02], 72);
        let weight: Vec<f32> = text.layers[1].normed[..8 * 12].iter().map(|x| x * 0.5).collect();
        let rows: Vec<usize> = (40..72).collect();
        for kind in [Teacher::Fine, Teacher::Plain] {
            for target in [0, 1] {
                let lesson = Lesson { text: &text, grid: GRID, rotary: &rotary, target };
                let compressed = GRID.compressed(&text, target);
                let teacher = LayerTeacher::new(&text, target, GRID, kind, &compressed);
                let study = |weight: &[f32], gradient: Option<&mut [f32]>| {
                    lesson.study(weight, 1, &rows, (&teacher, &compressed), gradient)
                };
                let mut gradient = vec![0.0; weight.len()];
                let tally = study(&weight, Some(&mut gradient));
                assert!(tally.loss > 0.1 && tally.wanted > tally.found && tally.queries == 32);
                assert!(gradient.iter().any(|g| g.abs() > 0.1));
                for i in [0, 5, 17, 40, 63, 95] {
                    let at = |step: f32| {
                        let mut moved = weight.clone();
                        moved[i] += step;
                        study(&moved, None).loss
                    };
                    let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
                    let got = f64::from(gradient[i]);
                    let off = (slope - got).abs();
                    assert!(off < 2e-3 * (1.0 + got.abs()), "{kind:?} {target} {i}: {slope} {got}");
                }
            }
        }
    }
}
