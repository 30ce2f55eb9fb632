//! What a layer computes on the way, for those who measure a model instead of running it.

use super::workspace::Workspace;
use super::{KeyOrder, ModelConfig, Step};
use crate::backend::{Backend, DType, Result, Tensor};

/// Hears of every layer of a step; an error ends the step.
pub type Observer<'a> = dyn FnMut(&LayerView<'_>) -> Result<()> + 'a;

/// Where in a layer an observer is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Queries and keys are projected and rotated; `x` is the residual stream that the layer reads.
    Projected,
    /// The attention output was added to `x`; the feed-forward part has not run.
    Attended,
}

/// One layer's tensors at one stage, still on the device. They are overwritten by the next op: copy what is to stay.
pub struct LayerView<'a> {
    /// Number of the layer, from 0.
    pub layer: usize,
    /// When the observer was called.
    pub stage: Stage,
    /// Rows of the step: the new tokens of its sequences, decoding sequences first.
    pub rows: usize,
    /// f32 `[rows, hidden]`: the residual stream.
    pub x: Tensor,
    /// `[rows, hidden]` in the dtype of activations: the normed input that feeds the q, k and v projections.
    pub normed: Tensor,
    /// `[rows, heads, kv_dim]` ([`ModelConfig::kv_dim`]), same dtype: queries after the rotary embedding, in the decoder's [`KeyOrder`].
    pub q: Tensor,
    /// `[rows, kv_heads, kv_dim]`, same dtype: keys after the rotary embedding, in the decoder's [`KeyOrder`].
    pub k: Tensor,
    backend: &'a dyn Backend,
    config: &'a ModelConfig,
    order: &'a KeyOrder,
}

impl std::fmt::Debug for LayerView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let view = (self.layer, self.stage, self.rows);
        f.debug_tuple("LayerView").field(&view).finish()
    }
}

impl<'a> LayerView<'a> {
    pub(super) fn new(
        backend: &'a dyn Backend,
        config: &'a ModelConfig,
        order: &'a KeyOrder,
        ws: &Workspace,
        (layer, stage): (usize, Stage),
        step: &Step,
    ) -> Self {
        let rows = step.rows;
        let part = |t: &Tensor, width: usize| t.slice(0, rows * width);
        LayerView {
            layer,
            stage,
            rows,
            x: part(&ws.x, config.hidden),
            normed: part(&ws.normed, config.hidden),
            q: part(&ws.q, config.n_heads * config.kv_dim()),
            k: part(&ws.k, config.n_kv_heads * config.kv_dim()),
            backend,
            config,
            order,
        }
    }

    /// A tensor of this view as f32, row after row, as it lies on the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn rows_f32(&self, t: &Tensor) -> Result<Vec<f32>> {
        download_f32(self.backend, t)
    }

    /// [`LayerView::q`] or [`LayerView::k`] as f32 with each head's dimensions in the checkpoint's rotary order:
    /// dimension `i` rotates with `i + head_dim / 2`. Content importance, and what it takes of a query, is left out:
    /// logits are those of `head_dim` dimensions.
    ///
    /// # Errors
    /// When the device fails.
    pub fn heads_f32(&self, t: &Tensor) -> Result<Vec<f32>> {
        let stored = download_f32(self.backend, t)?;
        let (c, d, wide) = (self.config, self.config.head_dim, self.config.kv_dim());
        let heads = t.len() / (self.rows * wide);
        let per_kv = heads / c.n_kv_heads;
        let factor = if t.same_buffer(&self.q) { c.query_factor() } else { 1.0 };
        let mut out = vec![0.0; stored.len() / wide * d];
        let sources: Vec<Vec<usize>> = (0..c.n_kv_heads)
            .map(|h| (0..d).map(|i| self.order.source_dim(self.layer, h, i)).collect())
            .collect();
        for (i, (from, to)) in stored.chunks_exact(wide).zip(out.chunks_exact_mut(d)).enumerate() {
            for (&x, &dim) in from.iter().zip(&sources[i % heads / per_kv]) {
                to[dim] = x / factor;
            }
        }
        Ok(out)
    }
}

/// A tensor of floats on the host, widened to f32.
pub(super) fn download_f32(b: &dyn Backend, t: &Tensor) -> Result<Vec<f32>> {
    let mut bytes = vec![0u8; t.bytes()];
    b.download(t, &mut bytes)?;
    let pairs = || bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]]));
    Ok(match t.dtype() {
        DType::F16 => pairs().map(|u| half::f16::from_bits(u).to_f32()).collect(),
        DType::BF16 => pairs().map(|u| half::bf16::from_bits(u).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect(),
    })
}
