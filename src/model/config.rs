//! What a decoder looks like: sizes, rotary embedding, windows, special tokens.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::{ModelError, Result};
use crate::backend::{MAX_GROUP, MAX_HEAD_DIM};
use crate::select::TrainedBlocks;

/// Architectures the decoder computes. They share one block (pre-norm, rotary GQA attention,
/// gated SiLU); what differs is in [`ModelConfig`]'s flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// Llama 2 and 3.x, SmolLM2 and everything else stored under that name.
    Llama,
    /// Llama's block, with a sliding window in version 0.1.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// RMS norm on every q and k head, explicit head dimension.
    Qwen3,
    /// MiniCPM4: Llama's block with scaled embeddings, branches and logits.
    MiniCpm,
}

/// How rotary frequencies are stretched beyond the pretraining length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// Frequencies as they were trained.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Divisor of every frequency.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth ramp between.
    Llama3 {
        /// Divisor of the lowest frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Tokens of the pretraining context.
        original_max_position: usize,
    },
    /// One divisor per rotary pair (`rope_freqs.weight` of GGUF files), length `head_dim / 2`.
    Factors(Vec<f32>),
    /// LongRoPE beyond its original context: one divisor per rotary pair for texts within it, one for longer ones.
    ///
    /// The reference implementation changes the frequencies with the length of each call, which no cache of rotated
    /// keys can follow, and which lets a sequence's answer depend on its batch. Here the longest text that an engine
    /// may hold decides once, for all its sequences (`ModelConfig::settle`).
    Long {
        /// Divisors within the original context, length `head_dim / 2`.
        short: Vec<f32>,
        /// Divisors beyond it, length `head_dim / 2`.
        long: Vec<f32>,
        /// Tokens of the original context.
        original_max_position: usize,
        /// Factor of every rotated query and key, whatever the length is.
        attention_factor: f64,
        /// The long divisors hold.
        #[serde(skip)]
        beyond: bool,
    },
}

/// Factors of the residual stream (muP): with an embedding `e`, branches `f` and a head `W`,
/// `x = embedding * e`, then `x += residual * f(norm(x))`, then `logits = W (logits * norm(x))`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scales {
    /// Of embeddings.
    pub embedding: f64,
    /// Of what attention and MLP add.
    pub residual: f64,
    /// Of logits.
    pub logits: f64,
}

impl Scales {
    fn none(&self) -> bool {
        *self == Scales::default()
    }
}

impl Default for Scales {
    fn default() -> Self {
        Scales { embedding: 1.0, residual: 1.0, logits: 1.0 }
    }
}

/// Everything the forward pass needs to know besides the weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Which block.
    pub arch: Arch,
    /// For messages only.
    pub name: String,
    /// Layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub n_heads: usize,
    /// KV heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Even; not always `hidden / n_heads`.
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub ffn: usize,
    /// Rows of the embedding; at least the tokenizer's ids.
    pub vocab: usize,
    /// Base of the rotary frequencies, `theta^(-2p / head_dim)` for pair `p`.
    pub rope_theta: f64,
    /// How these are stretched.
    pub rope_scaling: RopeScaling,
    /// Added to the mean square in every RMS norm.
    pub norm_eps: f64,
    /// Factors of the residual stream; left out where there are none, so that fingerprints of models without stay.
    #[serde(default, skip_serializing_if = "Scales::none")]
    pub scales: Scales,
    /// Logits use the embedding matrix.
    pub tie_embeddings: bool,
    /// q, k and v projections have biases.
    pub qkv_bias: bool,
    /// q and k heads are RMS-normalised before the rotary embedding.
    pub qk_norm: bool,
    /// NOSA: tokens have a content importance, which attention adds to their logits, and the model was trained to
    /// attend to these blocks by it; left out where there is none, so that fingerprints of models without stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub importance: Option<TrainedBlocks>,
    /// Per layer: with `Some(w)` the query at position i sees the keys at i - w + 1 ..= i.
    pub windows: Vec<Option<usize>>,
    /// Positions the model was trained for.
    pub max_context: usize,
    /// Token that begins a text, where there is one.
    pub bos: Option<u32>,
    /// Tokens that end an answer; may be empty.
    pub eos: Vec<u32>,
}

/// Bounds beyond which a number in a model file is a mistake, not a model.
const MAX_LAYERS: usize = 4096;
const MAX_WIDTH: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;
const MAX_CONTEXT: usize = 1 << 31;

/// Inputs of a matrix product come in units of this many.
pub(super) const UNIT: usize = 8;

impl ModelConfig {
    /// Checks every number; `path` is the file that messages name.
    pub(crate) fn validate(self, path: &Path) -> Result<Self> {
        let bad = |what: String| Err(ModelError::corrupt(path, what));
        for (name, value, max) in [
            ("number of layers", self.n_layers, MAX_LAYERS),
            ("hidden size", self.hidden, MAX_WIDTH),
            ("number of heads", self.n_heads, MAX_WIDTH),
            ("number of KV heads", self.n_kv_heads, MAX_WIDTH),
            ("head dimension", self.head_dim, MAX_WIDTH),
            ("MLP width", self.ffn, MAX_WIDTH),
            ("vocabulary", self.vocab, MAX_VOCAB),
            ("context length", self.max_context, MAX_CONTEXT),
        ] {
            if value == 0 || value > max {
                return bad(format!("its {name} is {value}"));
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return bad(format!(
                "{} query heads cannot share {} KV heads evenly",
                self.n_heads, self.n_kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return bad(format!("its head dimension {} is odd", self.head_dim));
        }
        // Rows of the q projection; also bounds the k and v projections.
        if self.n_heads * self.head_dim > MAX_WIDTH {
            return bad(format!(
                "{} heads of {} dimensions are too many",
                self.n_heads, self.head_dim
            ));
        }
        // The ops' own limits, said before any weight is loaded.
        let not_here = |what: String| Err(ModelError::unsupported(path, what));
        let group = self.n_heads / self.n_kv_heads;
        if group > MAX_GROUP {
            return not_here(format!(
                "{group} query heads per KV head (at most {MAX_GROUP} run here)"
            ));
        }
        if self.head_dim > MAX_HEAD_DIM || !self.head_dim.is_multiple_of(UNIT) {
            return not_here(format!(
                "a head dimension of {} (multiples of {UNIT} up to {MAX_HEAD_DIM} run here)",
                self.head_dim
            ));
        }
        self.check_importance(path)?;
        for (name, width) in [("hidden size", self.hidden), ("MLP width", self.ffn)] {
            if !width.is_multiple_of(UNIT) {
                return not_here(format!("a {name} of {width} (multiples of {UNIT} run here)"));
            }
        }
        if !(self.rope_theta.is_finite() && self.rope_theta >= 1.0) {
            return bad(format!("its rotary base is {}", self.rope_theta));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return bad(format!("its norm epsilon is {}", self.norm_eps));
        }
        let Scales { embedding, residual, logits } = self.scales;
        for (name, scale) in [("embedding", embedding), ("residual", residual), ("logit", logits)] {
            if !(scale.is_finite() && (1e-6..=1e6).contains(&scale)) {
                return bad(format!("its {name} scale is {scale}"));
            }
        }
        if self.windows.len() != self.n_layers {
            return bad(format!(
                "it describes {} attention windows for {} layers",
                self.windows.len(),
                self.n_layers
            ));
        }
        if self.windows.contains(&Some(0)) {
            return bad("an attention window is 0".into());
        }
        for id in self.bos.iter().chain(&self.eos) {
            if *id as usize >= self.vocab {
                return bad(format!(
                    "the special token {id} lies outside the vocabulary of {}",
                    self.vocab
                ));
            }
        }
        if let Some(what) = self.rope_scaling.fault(self.head_dim) {
            return bad(what);
        }
        Ok(self)
    }

    /// Factor of embeddings and epsilon of the norms of a residual stream that is kept divided by its
    /// residual scale: `x / r` grows by the branches as they are, and a norm does not see the factor
    /// but for its epsilon, which shrinks by `r^2`.
    pub(super) fn stream(&self) -> (f32, f32) {
        let r = self.scales.residual;
        ((self.scales.embedding / r) as f32, (self.norm_eps / (r * r)) as f32)
    }

    /// Parameters of all matrices, a tied embedding counted once.
    pub fn parameters(&self) -> u64 {
        let width = (self.n_heads + self.n_kv_heads) * 2 * self.head_dim;
        let layer = self.hidden * (width + 3 * self.ffn) + self.importance_parameters();
        let embed = self.vocab * self.hidden * if self.tie_embeddings { 1 } else { 2 };
        (self.n_layers * layer + embed) as u64
    }

    /// Settles what depends on the longest text that will be read: the divisors of [`RopeScaling::Long`].
    pub(crate) fn settle(&mut self, context: usize) {
        if let RopeScaling::Long { original_max_position, beyond, .. } = &mut self.rope_scaling {
            *beyond = context > *original_max_position;
        }
    }

    /// Factor of every rotated query and key.
    pub(super) fn rope_factor(&self) -> f32 {
        match self.rope_scaling {
            RopeScaling::Long { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Rotary frequencies, one per pair: `inv_freq[i]` radians per position for the dimensions
    /// `i` and `i + head_dim / 2`. Length `head_dim / 2`.
    ///
    /// `theta^(-2i/head_dim)` in the rounding of the reference implementation (power and
    /// reciprocal in f32), then scaled as [`RopeScaling`] says.
    pub fn inv_freq(&self) -> Vec<f32> {
        let plain = (0..self.head_dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / self.head_dim as f32;
            1.0 / (self.rope_theta.powf(f64::from(exponent)) as f32)
        });
        match &self.rope_scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / *factor as f32).collect(),
            RopeScaling::Factors(factors) => plain.zip(factors).map(|(f, d)| f / d).collect(),
            RopeScaling::Long { short, long, beyond, .. } => {
                let factors = if *beyond { long } else { short };
                plain.zip(factors).map(|(f, d)| f / d).collect()
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position,
            } => {
                let original = *original_max_position as f64;
                plain
                    .map(|f| {
                        let f = f64::from(f);
                        // How often the pair turns within the original context.
                        let turns = original * f / std::f64::consts::TAU;
                        // 0 at the low-frequency end (scaled), 1 at the high end (kept).
                        let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        let keep = keep.clamp(0.0, 1.0);
                        ((1.0 - keep) * f / factor + keep * f) as f32
                    })
                    .collect()
            }
        }
    }
}

impl RopeScaling {
    /// What is wrong with the numbers, if anything.
    fn fault(&self, head_dim: usize) -> Option<String> {
        let sane = |v: f64| v.is_finite() && v > 0.0;
        match self {
            RopeScaling::None => None,
            RopeScaling::Linear { factor } => {
                (!sane(*factor)).then(|| format!("its rotary scaling factor is {factor}"))
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position,
            } => {
                let fine = sane(*factor)
                    && sane(*low_freq_factor)
                    && sane(*high_freq_factor)
                    && high_freq_factor > low_freq_factor
                    && (1..=MAX_CONTEXT).contains(original_max_position);
                (!fine).then(|| "its llama3 rotary scaling makes no sense".to_owned())
            }
            RopeScaling::Factors(factors) => misfit(factors, head_dim),
            RopeScaling::Long { short, long, original_max_position, attention_factor, .. } => {
                let fine = (1e-3..=1e3).contains(attention_factor)
                    && (1..=MAX_CONTEXT).contains(original_max_position);
                let wrong = || (!fine).then(|| "its longrope scaling makes no sense".to_owned());
                misfit(short, head_dim).or_else(|| misfit(long, head_dim)).or_else(wrong)
            }
        }
    }
}

/// What is wrong with divisors of rotary frequencies.
fn misfit(factors: &[f32], head_dim: usize) -> Option<String> {
    let fine = factors.len() == head_dim / 2 && factors.iter().all(|f| f.is_finite() && *f > 0.0);
    (!fine).then(|| {
        format!("its {} rotary factors do not suit a head dimension of {head_dim}", factors.len())
    })
}

/// LongRoPE's divisors for texts of up to `max` tokens by a model first trained on `original`: without a given factor
/// of queries and keys that is `sqrt(1 + ln(max / original) / ln(original))`, 1 where `max` is no longer.
pub(super) fn long_rope(
    (short, long): (Vec<f32>, Vec<f32>),
    (original, max): (usize, usize),
    factor: Option<f64>,
) -> RopeScaling {
    let ratio = max as f64 / original as f64;
    let by_length = || match ratio > 1.0 {
        true => (1.0 + ratio.ln() / (original as f64).ln()).sqrt(),
        false => 1.0,
    };
    let attention_factor = factor.unwrap_or_else(by_length);
    // Within the original context the short divisors hold and lengths have no other effect.
    if max <= original && attention_factor == 1.0 {
        return RopeScaling::Factors(short);
    }
    RopeScaling::Long {
        short,
        long,
        original_max_position: original,
        attention_factor,
        beyond: false,
    }
}

#[cfg(test)]
#[path = "tests/config.rs"]
mod tests;
