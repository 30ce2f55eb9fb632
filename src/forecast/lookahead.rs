//! Queries of a layer as its input one layer earlier tells them, head by head: the rival that needs no training.

use super::lesson::Lesson;
use crate::backend::cpu::host::{Matrix, product};
use crate::calibrate::TracedText;
use crate::calibrate::traced::TracedLayer;
use crate::model::{Checkpoint, LayerWeight, ModelError, Weight, lookahead::projection};

/// What one layer's queries are made of.
pub(super) struct Lookahead {
    /// `[heads * head_dim, hidden]`, for the normed input of the layer before.
    projection: Vec<f32>,
    /// `[heads * head_dim]`, where the model has biases.
    bias: Option<Vec<f32>>,
    /// `[head_dim]` and its epsilon, where the model norms queries.
    norm: Option<(Vec<f32>, f32)>,
}

impl Lookahead {
    pub fn new(checkpoint: &Checkpoint, target: usize) -> Result<Self, ModelError> {
        let c = checkpoint.config();
        let read = |weight| checkpoint.read(Weight::Layer(target, weight));
        let norm = c.qk_norm.then(|| read(LayerWeight::QNorm)).transpose()?;
        Ok(Lookahead {
            projection: projection(checkpoint, target)?,
            bias: c.qkv_bias.then(|| read(LayerWeight::QBias)).transpose()?,
            norm: norm.map(|n| (n, c.norm_eps as f32)),
        })
    }

    /// The lesson's text with the speculated queries of its target in place of all else; those at other positions
    /// than `rows` are 0.
    pub fn asked(&self, lesson: &Lesson<'_>, rows: &[usize]) -> TracedText {
        let text = lesson.text;
        let (d, hidden, width) = (text.head_dim, text.hidden, text.heads * text.head_dim);
        let input = lesson.input(rows);
        let mut found = vec![0.0; rows.len() * width];
        let by = Matrix::columns(&self.projection, hidden);
        let input = Matrix::rows(&input, hidden);
        product((rows.len(), width, hidden), &mut found, width, false, input, by);
        let mut q = vec![0.0; text.tokens * width];
        for (found, &row) in found.chunks_exact_mut(width).zip(rows) {
            if let Some(bias) = &self.bias {
                found.iter_mut().zip(bias).for_each(|(q, b)| *q += b);
            }
            for head in found.chunks_exact_mut(d) {
                if let Some((gain, eps)) = &self.norm {
                    let mean = head.iter().map(|q| q * q).sum::<f32>() / d as f32;
                    let scale = 1.0 / (mean + eps).sqrt();
                    head.iter_mut().zip(gain).for_each(|(q, g)| *q *= scale * g);
                }
                lesson.rotary.turn(row, head);
            }
            q[row * width..][..width].copy_from_slice(found);
        }
        let mut layers = vec![TracedLayer::default(); text.layers.len()];
        layers[lesson.target].q = q;
        TracedText { windows: text.windows.clone(), layers, ..*text }
    }
}
