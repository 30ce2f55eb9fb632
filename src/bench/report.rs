//! What an end-to-end measurement says.

use super::{EndToEnd, Environment, PrefillArithmetic, Summary};
use crate::backend::{Bandwidth, DType};
use crate::model::ModelConfig;
use crate::select::Plan;
use serde::Serialize;

/// Bytes that decoding one token reads, and how fast.
#[derive(Clone, Debug, Serialize)]
pub struct Traffic {
    /// Weights of all layers and the output projection.
    pub weight_bytes: u64,
    /// KV cache under the plan, at the middle of the measured tokens.
    pub kv_bytes: u64,
    /// (weights + KV) / mean time of a token.
    pub gb_s: f64,
    /// Share of the device-read bandwidth measured in this run.
    pub share: f64,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `pp512`, `tg128@d4096`.
    pub test: String,
    /// `prefill` or `decode`.
    pub phase: &'static str,
    /// Tokens read (prefill) or decoded in a sample.
    pub tokens: usize,
    /// Tokens in the cache before.
    pub depth: usize,
    /// Method as it was asked for; prefill is dense under every method that reads prompts densely.
    pub method: String,
    /// T_b of its sparse layers.
    pub budget: Option<usize>,
    /// Speed.
    pub tokens_per_second: Summary,
    /// Speed relative to dense attention at the same depth.
    pub x_dense: Option<f64>,
    /// Bytes read while decoding.
    pub traffic: Option<Traffic>,
    /// What the method did in each layer.
    pub plan: Option<Plan>,
}

/// The model that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct ModelFacts {
    /// Name of the model.
    pub name: String,
    /// Hash that stands for its files.
    pub fingerprint: String,
    /// Number of weights.
    pub parameters: u64,
    /// Dtype of the weights on the device.
    pub dtype: DType,
    /// Dtype of the KV cache.
    pub kv_dtype: DType,
    /// Prompt tokens of a step.
    pub chunk: usize,
    /// Its sizes.
    pub config: ModelConfig,
}

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct EndToEndReport {
    /// `end_to_end`.
    pub kind: &'static str,
    /// Device, driver, system, date and commit.
    pub environment: Environment,
    /// The model that was measured.
    pub model: ModelFacts,
    /// What was asked for.
    pub settings: EndToEnd,
    /// Measured in this run.
    pub bandwidth_gb_s: Bandwidth,
    /// One line per test and method.
    pub rows: Vec<Row>,
    /// On the cpu only.
    pub prefill_arithmetic: Option<PrefillArithmetic>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}
