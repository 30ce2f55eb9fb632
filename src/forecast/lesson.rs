//! Forecast vectors and their window scores on one text.

use super::grid::Grid;
use super::rotary::Rotary;
use crate::backend::cpu::host::{Matrix, product};
use crate::calibrate::TracedText;
use crate::model::lookahead::source;

/// Forecast vectors `[rows.len(), head_dim]` of a KV head after the rotary embedding, into `out`. `weight`: the head's
/// rows of the matrix, `[head_dim, hidden]`; `input`: `[rows.len(), hidden]`; `rows`: positions.
pub(super) fn project(
    weight: &[f32],
    input: &[f32],
    rows: &[usize],
    rotary: &Rotary,
    out: &mut [f32],
) {
    let d = out.len() / rows.len().max(1);
    let hidden = weight.len() / d.max(1);
    let by = Matrix::columns(weight, hidden);
    product((rows.len(), d, hidden), out, d, false, Matrix::rows(input, hidden), by);
    for (x, &row) in out.chunks_exact_mut(d).zip(rows) {
        rotary.turn(row, x);
    }
}

/// The compressed keys of one KV head among those of its layer, `[windows, kv_heads, head_dim]`.
#[derive(Clone, Copy)]
pub(super) struct HeadKeys<'a> {
    pub compressed: &'a [f32],
    pub head: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl<'a> HeadKeys<'a> {
    /// `[windows, head_dim]`.
    pub fn rows(self) -> Matrix<'a> {
        let (d, from) = (self.head_dim, self.head * self.head_dim);
        Matrix::rows(self.compressed.get(from..).unwrap_or_default(), self.kv_heads * d)
    }

    /// `q . key / sqrt(head_dim)` with the first `windows` keys, row after row into `out`, `[rows, windows]`; `q`:
    /// `[rows, head_dim]`, which comes back scaled.
    pub fn scores(self, q: &mut [f32], windows: usize, out: &mut [f32]) {
        let (d, keys) = (self.head_dim, self.rows());
        let scale = 1.0 / (d as f32).sqrt();
        q.iter_mut().for_each(|q| *q *= scale);
        if windows > 0 {
            let keys = Matrix::columns(keys.data, keys.row_stride);
            product((q.len() / d, windows, d), out, windows, false, Matrix::rows(q, d), keys);
        }
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
    /// [`project`] at the queries `rows`.
    pub fn forecast(&self, weight: &[f32], rows: &[usize]) -> Vec<f32> {
        let mut out = vec![0.0; rows.len() * self.text.head_dim];
        project(weight, &self.input(rows), rows, self.rotary, &mut out);
        out
    }

    /// Normed inputs `[rows.len(), hidden]` of the layer whose input predicts.
    pub fn input(&self, rows: &[usize]) -> Vec<f32> {
        input(self.text, source(self.target), rows)
    }

    /// `q . compressed key / sqrt(head_dim)`, `[rows, windows]`, for queries `[rows, head_dim]` of a KV head.
    pub fn scores(&self, mut q: Vec<f32>, compressed: &[f32], head: usize) -> Vec<f32> {
        let TracedText { head_dim, kv_heads, .. } = *self.text;
        let windows = self.grid.windows(self.text.tokens);
        let mut out = vec![0.0; q.len() / head_dim * windows];
        HeadKeys { compressed, head, kv_heads, head_dim }.scores(&mut q, windows, &mut out);
        out
    }
}

/// Normed inputs `[rows.len(), hidden]` of a layer.
pub(super) fn input(text: &TracedText, layer: usize, rows: &[usize]) -> Vec<f32> {
    let (normed, hidden) = (&text.layers[layer].normed, text.hidden);
    let mut out = Vec::with_capacity(rows.len() * hidden);
    rows.iter().for_each(|r| out.extend_from_slice(&normed[r * hidden..][..hidden]));
    out
}
