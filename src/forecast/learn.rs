//! Loss, agreement and gradient of one KV head's rows of one matrix on one text.

use super::grid::Picker;
use super::lesson::project;
use super::loss::restricted_kl;
use super::prepared::Prepared;
use super::rotary::Rotary;
use crate::backend::cpu::host::{Matrix, product};

/// Queries of one matrix product.
const ROWS: usize = 256;

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

/// Room that [`study`] works in.
#[derive(Default)]
pub(super) struct Desk {
    /// `[ROWS, head_dim]`: Forecast vectors, then their gradients.
    vectors: Vec<f32>,
    /// `[ROWS, windows]`: scores, then their gradients.
    scores: Vec<f32>,
    shares: Vec<f64>,
    picker: Picker,
}

/// Compares the Forecast of KV head `head` for layer `target` with its teacher. `weight`: the head's rows of the
/// matrix, `[head_dim, hidden]`. With `gradient` (like `weight`), the gradient of the summed loss is added to it.
pub(super) fn study(
    piece: &Prepared,
    (target, head): (usize, usize),
    weight: &[f32],
    rotary: &Rotary,
    mut gradient: Option<&mut [f32]>,
    desk: &mut Desk,
) -> Tally {
    let (d, hidden, grid) = (piece.head_dim, piece.hidden, piece.grid);
    let mut tally = Tally { queries: piece.rows.len(), ..Tally::default() };
    // A layer with a sliding window reads no blocks: nothing to learn.
    let Some((inputs, keys, truth)) = piece.of(target, head) else { return tally };
    if piece.windows == 0 {
        return tally;
    }
    for (block, rows) in piece.rows.chunks(ROWS).enumerate() {
        let first = block * ROWS;
        let input = &inputs[first * hidden..(first + rows.len()) * hidden];
        // Nobody here sees what starts after the last row.
        let windows = rows.last().map_or(0, |&last| grid.started(last)).min(piece.windows);
        desk.vectors.resize(ROWS * d, 0.0);
        desk.scores.resize(ROWS * piece.windows, 0.0);
        let vectors = &mut desk.vectors[..rows.len() * d];
        let scores = &mut desk.scores[..rows.len() * windows];
        project(weight, input, rows, rotary, vectors);
        keys.scores(vectors, windows, scores);
        for (i, (scores, &row)) in scores.chunks_exact_mut(windows).zip(rows).enumerate() {
            let (seen, truth) = (grid.started(row).min(windows), truth.row(first + i));
            let (scores, unseen) = scores.split_at_mut(seen);
            if truth.picks.len() < grid.candidates(row).len() {
                let guess = grid.pick_in(scores, row, &mut desk.picker);
                tally.wanted += truth.picks.len();
                tally.found += truth.picks.iter().filter(|b| guess.contains(b)).count();
            }
            let selected = grid.of_blocks(truth.picks, seen);
            let teacher = (truth.shares, truth.entropy);
            tally.loss += restricted_kl(teacher, selected, scores, &mut desk.shares);
            unseen.fill(0.0);
        }
        let Some(gradient) = gradient.as_deref_mut() else { continue };
        // Back through the products: scores to Forecast vectors, the rotation, then the matrix.
        let by = Matrix::rows(scores, windows);
        product((rows.len(), d, windows), vectors, d, false, by, keys.rows());
        let scale = 1.0 / (d as f32).sqrt();
        for (x, &row) in vectors.chunks_exact_mut(d).zip(rows) {
            x.iter_mut().for_each(|x| *x *= scale);
            rotary.turn_back(row, x);
        }
        let by = Matrix::columns(vectors, d);
        let input = Matrix::rows(input, hidden);
        product((d, hidden, rows.len()), gradient, hidden, true, by, input);
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::super::grid::Grid;
    use super::super::teacher::Teacher;
    use super::*;
    use crate::calibrate::TracedText;

    const GRID: Grid = Grid { window: 8, stride: 4, block: 8, init: 1, local: 1, budget: 5 };

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let text = TracedText::random(11, 2, 72);
        let rotary = Rotary::new(&[1.0, 0.3, 0.1, 0.02], 72);
        let weight: Vec<f32> = text.layers[1].normed[..8 * 12].iter().map(|x| x * 0.5).collect();
        let rows: Vec<usize> = (40..72).collect();
        for kind in [Teacher::Fine, Teacher::Plain] {
            let piece = Prepared::new(&text, GRID, kind, rows.clone(), &|| true).unwrap();
            for target in [0, 1] {
                let study = |weight: &[f32], gradient: Option<&mut [f32]>| {
                    study(&piece, (target, 1), weight, &rotary, gradient, &mut Desk::default())
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

    /// More queries than one product takes give what single queries give together.
    #[test]
    fn blocks_of_queries_add_up() {
        let text = TracedText::random(12, 1, 2 * ROWS + 40);
        let rotary = Rotary::new(&[1.0, 0.3, 0.1, 0.02], text.tokens);
        let weight: Vec<f32> = text.layers[0].normed[..8 * 12].iter().map(|x| x * 0.5).collect();
        let run = |rows: Vec<usize>, gradient: &mut [f32]| {
            let piece = Prepared::new(&text, GRID, Teacher::Fine, rows, &|| true).unwrap();
            study(&piece, (0, 0), &weight, &rotary, Some(gradient), &mut Desk::default())
        };
        let (mut all, mut one) = (vec![0.0; 96], vec![0.0; 96]);
        let together = run((0..text.tokens).collect(), &mut all);
        let mut alone = Tally::default();
        (0..text.tokens).for_each(|row| alone.add(run(vec![row], &mut one)));
        assert!((together.loss - alone.loss).abs() < 1e-5 * alone.loss, "{together:?} {alone:?}");
        let counts = |t: Tally| (t.queries, t.wanted, t.found);
        assert_eq!(counts(together), counts(alone));
        let off = all.iter().zip(&one).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let most = one.iter().fold(0.0, |m: f32, g| m.max(g.abs()));
        assert!(off < 1e-4 * most, "{off} of {most}");
    }
}
