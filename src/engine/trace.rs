//! What the layers compute while a text is read.

use super::{Engine, EngineError, SeqId, WantLogits, Work};
use crate::backend::Result as DeviceResult;
use crate::model::{LayerView, Stage};

/// What a trace copies to the host; the rest stays empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceParts {
    /// [`LayerTrace::x`] and [`LayerTrace::attended`].
    pub residual: bool,
    /// [`LayerTrace::normed`].
    pub normed: bool,
    /// [`LayerTrace::q`] and [`LayerTrace::k`].
    pub heads: bool,
}

/// One layer of one chunk of a traced text; f32, row-major, a row for each token of the chunk.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerTrace {
    /// Number of the layer, from 0.
    pub layer: usize,
    /// Position of the first row in the text.
    pub first: usize,
    /// Tokens of the chunk.
    pub rows: usize,
    /// `[rows, hidden]`: the residual stream before the layer.
    pub x: Vec<f32>,
    /// `[rows, hidden]`: the same with the layer's attention output added.
    pub attended: Vec<f32>,
    /// `[rows, hidden]`: what the q, k and v projections read.
    pub normed: Vec<f32>,
    /// `[rows, heads, head_dim]`: queries after the rotary embedding, in the checkpoint's rotary order (dimension
    /// `i` rotates with `i + head_dim / 2`).
    pub q: Vec<f32>,
    /// `[rows, kv_heads, head_dim]`: keys, likewise.
    pub k: Vec<f32>,
}

impl LayerTrace {
    /// Adds what a view shows; true when the layer is complete.
    fn add(&mut self, view: &LayerView<'_>, parts: TraceParts) -> DeviceResult<bool> {
        let last = if parts.residual { Stage::Attended } else { Stage::Projected };
        if view.stage == Stage::Projected {
            (self.layer, self.rows) = (view.layer, view.rows);
            if parts.residual {
                self.x = view.rows_f32(&view.x)?;
            }
            if parts.normed {
                self.normed = view.rows_f32(&view.normed)?;
            }
            if parts.heads {
                self.q = view.heads_f32(&view.q)?;
                self.k = view.heads_f32(&view.k)?;
            }
        } else if parts.residual {
            self.attended = view.rows_f32(&view.x)?;
        }
        Ok(view.stage == last)
    }
}

impl Engine {
    /// Reads `tokens` densely, chunk by chunk, and hands every layer of every chunk to `each`, layers in order inside
    /// a chunk. One layer of one chunk is on the host at a time. The sequence is closed afterwards. `progress` gets
    /// the tokens read and answers whether to go on.
    ///
    /// # Errors
    /// As [`Engine::prefill`]; [`EngineError::NoSlot`].
    pub fn trace(
        &mut self,
        tokens: &[u32],
        parts: TraceParts,
        each: impl FnMut(LayerTrace),
        progress: impl FnMut(usize) -> bool,
    ) -> Result<(), EngineError> {
        if tokens.len() > self.context() {
            return Err(self.too_long(tokens.len(), 0));
        }
        let seq = self.open_sequence()?;
        let outcome = self.trace_in(seq, tokens, parts, each, progress);
        self.close(seq);
        outcome
    }

    fn trace_in(
        &mut self,
        seq: SeqId,
        tokens: &[u32],
        parts: TraceParts,
        mut each: impl FnMut(LayerTrace),
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<(), EngineError> {
        let mut first = 0;
        for chunk in tokens.chunks(self.chunk()) {
            if !progress(first) {
                return Err(EngineError::Interrupted);
            }
            let mut layer = LayerTrace { first, ..LayerTrace::default() };
            let mut observe = |view: &LayerView<'_>| {
                if layer.add(view, parts)? {
                    each(std::mem::replace(&mut layer, LayerTrace { first, ..Default::default() }));
                }
                Ok(())
            };
            let work = [Work { seq, tokens: chunk, decode: false, logits: WantLogits::None }];
            self.step_observed(&work, Some(&mut observe), |_, _, _| ())?;
            first += chunk.len();
        }
        progress(first);
        Ok(())
    }
}
