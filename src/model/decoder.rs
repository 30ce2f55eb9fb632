//! The decoder's forward pass.

use super::attention::Attention;
use super::forecaster::Forecaster;
use super::load::{LayerWeights, LoadError, Loader, Weights};
use super::step::{Step, StepSeq, Tiling};
use super::trace::{LayerView, Observer, Stage};
use super::workspace::{LOGIT_ROWS, Workspace};
use super::{Checkpoint, Forecast, KeyOrder, ModelConfig};
use crate::backend::{
    Backend, DType, Embed, GatherRows, Linear, PAGE, QkNorm, Result, RmsNorm, Rope, SwiGlu, Tensor,
};
use crate::kv::{KvCache, pages_for};
use crate::select::{LayerShape, SelectError};
use std::sync::Arc;

/// Sizes that a decoder allocates for.
#[derive(Clone, Copy, Debug)]
pub struct DecoderLimits {
    /// Rows of one step.
    pub rows: usize,
    /// Sequences at once.
    pub seqs: usize,
    /// Tokens of one sequence.
    pub context: usize,
}

/// A model on a device.
pub struct Decoder {
    backend: Arc<dyn Backend>,
    config: ModelConfig,
    weights: Weights,
    order: KeyOrder,
    ws: Workspace,
    limits: DecoderLimits,
    step_words: Option<Tensor>,
    forecaster: Option<Forecaster>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Decoder {
    /// Loads the weights in `dtype` and allocates activations.
    ///
    /// # Errors
    /// [`LoadError::Model`] when a tensor cannot be read, [`LoadError::Backend`] when the device is full.
    pub fn load(
        backend: Arc<dyn Backend>,
        checkpoint: &Checkpoint,
        dtype: DType,
        order: KeyOrder,
        limits: DecoderLimits,
        progress: &mut dyn FnMut(u64, u64),
    ) -> std::result::Result<Self, LoadError> {
        let config = checkpoint.config().clone();
        let weights = Loader::new(&*backend, checkpoint, dtype, progress).weights(&order)?;
        let act = backend.caps().activations(dtype);
        let ws = Workspace::new(&*backend, &config, act, limits.rows)?;
        let (step_words, forecaster) = (None, None);
        Ok(Decoder { backend, config, weights, order, ws, limits, step_words, forecaster })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Dtype of the weights on the device.
    pub fn weight_dtype(&self) -> DType {
        self.weights.embed.dtype()
    }

    /// Allocates activations for other limits. Caches and [`Attention`]s of the old ones do not fit any more.
    ///
    /// # Errors
    /// When the device is full; the limits are as before.
    pub fn set_limits(&mut self, limits: DecoderLimits) -> Result<()> {
        let act = self.backend.caps().activations(self.weight_dtype());
        let ws = Workspace::new(&*self.backend, &self.config, act, limits.rows)?;
        if let Some(f) = &mut self.forecaster {
            f.resize(&*self.backend, &self.config, limits.rows)?;
        }
        (self.ws, self.step_words, self.limits) = (ws, None, limits);
        Ok(())
    }

    /// Loads Forecast projections, for plans that are scored with them.
    ///
    /// # Errors
    /// When the device is full or the file cannot be read.
    pub fn set_forecast(&mut self, file: Forecast) -> std::result::Result<(), LoadError> {
        let (b, c, dtype) = (&*self.backend, &self.config, self.weight_dtype());
        let types = [dtype, b.caps().activations(dtype)];
        let inv_freq = self.weights.layers.iter().map(|w| w.inv_freq.clone()).collect();
        let order = (&self.order, inv_freq);
        self.forecaster = Some(Forecaster::new(b, file, c, order, types, self.limits.rows)?);
        Ok(())
    }

    /// Forecast projections are loaded.
    pub fn has_forecast(&self) -> bool {
        self.forecaster.is_some()
    }

    /// Limits it was allocated for.
    pub fn limits(&self) -> DecoderLimits {
        self.limits
    }

    /// The order of key pairs in use.
    pub fn key_order(&self) -> &KeyOrder {
        &self.order
    }

    /// Rewrites the weights that depend on the key order. Caches filled before are stale afterwards.
    ///
    /// # Errors
    /// [`LoadError`] where the checkpoint cannot be read again or the device fails; weights may have changed in part.
    pub fn set_key_order(
        &mut self,
        checkpoint: &Checkpoint,
        order: KeyOrder,
    ) -> std::result::Result<(), LoadError> {
        let dtype = self.weights.embed.dtype();
        let mut quiet = |_, _| ();
        let mut loader = Loader::new(&*self.backend, checkpoint, dtype, &mut quiet);
        for (l, w) in self.weights.layers.iter().enumerate() {
            loader.key_ordered(l, &order, w)?;
        }
        if let Some(f) = &self.forecaster {
            f.reorder(&*self.backend, &self.config, &order)?;
        }
        self.order = order;
        Ok(())
    }

    /// Attention sizes of a layer.
    pub fn layer_shape(&self, layer: usize, kv_dtype: DType) -> LayerShape {
        LayerShape {
            layer,
            heads: self.config.n_heads,
            kv_heads: self.config.n_kv_heads,
            head_dim: self.config.kv_dim(),
            plain_dim: self.config.head_dim,
            kv_dtype,
            slots: self.limits.seqs,
            at_once: self.limits.seqs,
            rows: self.limits.rows,
            capacity: self.limits.context.next_multiple_of(PAGE),
        }
    }

    /// Runs one step: keys and values of all new tokens go into `cache`, the residual stream of every row stays on
    /// the device for [`Decoder::logits`]. Returns the step, which names each sequence's rows.
    ///
    /// # Errors
    /// [`SelectError`]: what an op answers (a step beyond the limits does not fit its buffers), or a plan that lacks a
    /// part.
    pub fn forward(
        &mut self,
        seqs: &[StepSeq<'_>],
        cache: &KvCache,
        attention: &mut Attention,
    ) -> std::result::Result<Step, SelectError> {
        self.forward_observed(seqs, cache, attention, None)
    }

    /// [`Decoder::forward`] that calls `observer` twice a layer: when queries and keys are there, and when the
    /// attention output was added to the residual stream; see [`LayerView`].
    ///
    /// # Errors
    /// As [`Decoder::forward`], and whatever the observer answers.
    pub fn forward_observed(
        &mut self,
        seqs: &[StepSeq<'_>],
        cache: &KvCache,
        attention: &mut Attention,
        mut observer: Option<&mut Observer<'_>>,
    ) -> std::result::Result<Step, SelectError> {
        let b = self.backend.clone();
        let cuts = attention.cuts(seqs);
        let tilings = attention.tilings();
        let buffer = self.step_buffer(cuts.len(), tilings)?;
        let capacity = self.limits.context.next_multiple_of(PAGE);
        let step = Step::upload(&*b, &buffer, seqs, capacity, &cuts, tilings)?;
        let c = &self.config;
        b.embed(&Embed {
            tokens: step.tokens(),
            table: &self.weights.embed,
            out: &self.ws.x,
            rows: step.rows,
            cols: c.hidden,
            vocab: c.vocab,
            scale: c.stream().0,
        })?;
        let mut show = |l: usize, stage: Stage| match observer.as_deref_mut() {
            Some(observe) => {
                observe(&LayerView::new(&*b, c, &self.order, &self.ws, (l, stage), &step))
            }
            None => Ok(()),
        };
        let mut layers = || -> std::result::Result<(), SelectError> {
            for l in 0..c.n_layers {
                let shape = self.layer_shape(l, cache.shape().dtype);
                let w = &self.weights.layers[l];
                self.queries_and_keys(w, &step, |ropes| {
                    attention.append(&*b, &step, cache, shape, &self.ws, ropes)
                })?;
                show(l, Stage::Projected)?;
                let forecast = match &self.forecaster {
                    Some(f) => f.at(&*b, c, l, &self.ws.normed, &step, attention)?,
                    None => None,
                };
                attention.layer(&*b, &step, cache, shape, c.windows[l], &self.ws, forecast)?;
                self.output(w, step.rows)?;
                show(l, Stage::Attended)?;
                self.mlp(w, step.rows)?;
                b.advance()?;
            }
            Ok(())
        };
        // Prompts bring other shapes with every chunk; decode steps repeat.
        let mut outcome = Ok(());
        if step.prefill.n > 0 {
            outcome = layers();
        } else {
            b.replayable(&mut || {
                outcome = layers();
                outcome.is_ok()
            })?;
        }
        outcome?;
        attention.ran(seqs, &cuts);
        Ok(step)
    }

    fn step_buffer(&mut self, paces: usize, tilings: &[Tiling]) -> Result<Tensor> {
        let l = self.limits;
        let pages = l.seqs * pages_for(l.context);
        let words = Step::words(l.rows, l.seqs, pages, paces, tilings);
        if let Some(t) = self.step_words.as_ref().filter(|t| t.len() >= words) {
            return Ok(t.clone());
        }
        let t = self.backend.alloc(DType::U32, words, "step")?;
        self.step_words = Some(t.clone());
        Ok(t)
    }

    fn norm(&self, weight: &Tensor, rows: usize) -> Result<()> {
        self.backend.rms_norm(&RmsNorm {
            x: &self.ws.x,
            weight,
            out: &self.ws.normed,
            rows,
            cols: self.config.hidden,
            eps: self.config.stream().1,
        })
    }

    /// `ws.q`, and `ws.k`, which `append` puts into the cache.
    fn queries_and_keys(
        &self,
        w: &LayerWeights,
        step: &Step,
        append: impl FnOnce(Option<[&Rope<'_>; 2]>) -> Result<()>,
    ) -> Result<()> {
        let (c, ws, rows) = (&self.config, &self.ws, step.rows);
        self.norm(&w.attn_norm, rows)?;
        let d = c.kv_dim();
        let width = (c.n_heads + 2 * c.n_kv_heads) * d;
        self.backend.linear(&Linear {
            x: &ws.normed,
            w: &w.qkv,
            bias: w.qkv_bias.as_ref(),
            y: &ws.qkv,
            rows,
            inputs: c.hidden,
            outputs: width,
            accumulate: false,
        })?;
        let eps = c.norm_eps as f32;
        let k_part = ws.qkv_from(c.n_heads * d);
        let (qn, kn) = w.qk_norm.as_ref().map_or((None, None), |(q, k)| (Some(q), Some(k)));
        let side = |x, norm: Option<_>, factor, out, heads| Rope {
            x,
            x_stride: width,
            positions: step.positions(),
            inv_freq: &w.inv_freq,
            heads_per_freq: heads / c.n_kv_heads,
            norm: norm.map(|weight| QkNorm { weight, eps }),
            factor,
            out,
            rows,
            heads,
            head_dim: d,
        };
        let factor = c.rope_factor();
        let q = side(&ws.qkv, qn, factor * c.query_factor(), &ws.q, c.n_heads);
        let k = side(&k_part, kn, factor, &ws.k, c.n_kv_heads);
        if w.importance.is_none() && step.prefill.n == 0 {
            return append(Some([&q, &k]));
        }
        self.backend.rope_both([&q, &k])?;
        if let Some(importance) = &w.importance {
            importance.write(&*self.backend, c, ws, rows)?;
        }
        append(None)
    }

    fn output(&self, w: &LayerWeights, rows: usize) -> Result<()> {
        let (c, ws) = (&self.config, &self.ws);
        self.backend.linear(&Linear {
            x: &ws.attn,
            w: &w.o,
            bias: None,
            y: &ws.x,
            rows,
            inputs: c.n_heads * c.kv_dim(),
            outputs: c.hidden,
            accumulate: true,
        })
    }

    fn mlp(&self, w: &LayerWeights, rows: usize) -> Result<()> {
        let (c, ws, b) = (&self.config, &self.ws, &self.backend);
        let linear = |x, w, y, inputs, outputs, accumulate| Linear {
            x,
            w,
            bias: None,
            y,
            rows,
            inputs,
            outputs,
            accumulate,
        };
        self.norm(&w.ffn_norm, rows)?;
        b.linear_gated(
            &linear(&ws.normed, &w.gate_up, &ws.gate_up, c.hidden, 2 * c.ffn, false),
            &SwiGlu { x: &ws.gate_up, out: &ws.ffn, rows, ffn: c.ffn },
        )?;
        b.linear(&linear(&ws.ffn, &w.down, &ws.x, c.ffn, c.hidden, true))
    }

    /// Logits of some rows that the last step had, f32 `[rows.len(), vocab]`, handed to `each` as (index, logits).
    ///
    /// # Errors
    /// What the ops answer, a failing device among it.
    pub fn logits(&self, rows: &[usize], mut each: impl FnMut(usize, &[f32])) -> Result<()> {
        let (c, ws, b) = (&self.config, &self.ws, &self.backend);
        let mut host = vec![0f32; rows.len().min(LOGIT_ROWS) * c.vocab];
        for (chunk_index, chunk) in rows.chunks(LOGIT_ROWS).enumerate() {
            let n = chunk.len();
            let words: Vec<u32> = chunk.iter().map(|&r| r as u32).collect();
            b.upload(&ws.logit_rows.slice(0, n), bytemuck::cast_slice(&words))?;
            b.gather_rows(&GatherRows {
                x: &ws.x,
                rows: &ws.logit_rows,
                out: &ws.picked,
                n,
                x_rows: self.limits.rows,
                cols: c.hidden,
            })?;
            b.rms_norm(&RmsNorm {
                x: &ws.picked,
                weight: &self.weights.output_norm,
                out: &ws.picked_normed,
                rows: n,
                cols: c.hidden,
                eps: c.stream().1,
            })?;
            b.linear(&Linear {
                x: &ws.picked_normed,
                w: &self.weights.output,
                bias: None,
                y: &ws.logits,
                rows: n,
                inputs: c.hidden,
                outputs: c.vocab,
                accumulate: false,
            })?;
            let host = &mut host[..n * c.vocab];
            b.download(&ws.logits.slice(0, host.len()), bytemuck::cast_slice_mut(host))?;
            for (i, row) in host.chunks_exact(c.vocab).enumerate() {
                each(chunk_index * LOGIT_ROWS + i, row);
            }
        }
        Ok(())
    }
}
