//! What the linear layers cost. On the CPU: the linear layers against the GEMM crate's own peak at the same shapes.

use super::random::{Random, Values};
use super::{Result, Summary};
use crate::backend::cpu::{GemmCeiling, GemmSplit};
use crate::backend::{Backend, DType, Linear};
use crate::model::ModelConfig;
use serde::Serialize;

/// One linear layer.
#[derive(Clone, Debug, Serialize)]
pub struct ShapeArithmetic {
    /// `qkv`, `o`, `gate_up` or `down`.
    pub name: &'static str,
    /// Width of its input.
    pub inputs: usize,
    /// Width of its output.
    pub outputs: usize,
    /// Seconds of the backend's `linear`, weights in their dtype.
    pub linear_seconds: Summary,
    /// Seconds of the GEMM crate on f32 operands, split over the threads by rows or by outputs, whichever has the
    /// smaller median.
    pub gemm_seconds: Summary,
    /// How the faster GEMM was split over the threads.
    pub gemm_split: GemmSplit,
}

/// The linear layers of one block; figures in 1e9 operations per second (2 per multiply-add).
#[derive(Clone, Debug, Serialize)]
pub struct PrefillArithmetic {
    /// Prompt tokens of one product.
    pub rows: usize,
    /// The layers one by one.
    pub shapes: Vec<ShapeArithmetic>,
    /// Over all shapes, as often as a block runs them, from medians.
    pub linear_gflop_s: f64,
    /// The same for the GEMM crate alone.
    pub gemm_gflop_s: f64,
    /// `linear / gemm`.
    pub linear_share: f64,
    /// Operations of the linear layers over the time of the whole prefill (attention, norms and logits included).
    pub prefill_gflop_s: Option<f64>,
    /// `prefill / gemm`.
    pub prefill_share: Option<f64>,
}

/// Inputs and outputs of a block's linear layers.
pub(super) fn shapes(c: &ModelConfig) -> [(&'static str, usize, usize); 4] {
    let q = c.n_heads * c.head_dim;
    [
        ("qkv", c.hidden, q + 2 * c.n_kv_heads * c.head_dim),
        ("o", q, c.hidden),
        ("gate_up", c.hidden, 2 * c.ffn),
        ("down", c.ffn, c.hidden),
    ]
}

/// Weight bytes read for one token: every layer's matrices and the output projection (one row of the embedding and
/// the norms are too small to count).
pub(super) fn weight_bytes(c: &ModelConfig, dtype: DType) -> u64 {
    let layer: usize = shapes(c).iter().map(|(_, i, o)| i * o).sum();
    ((layer * c.n_layers + c.vocab * c.hidden) * dtype.bytes()) as u64
}

/// Operations of the linear layers of all blocks for one token.
fn flop_per_token(c: &ModelConfig) -> f64 {
    let block: usize = shapes(c).iter().map(|(_, i, o)| 2 * i * o).sum();
    (block * c.n_layers) as f64
}

/// Measures on the cpu backend `b`; `prefill` = tokens per second of a whole prefill.
pub(super) fn measure(
    b: &dyn Backend,
    c: &ModelConfig,
    dtype: DType,
    rows: usize,
    repeats: usize,
    prefill: Option<f64>,
) -> Result<PrefillArithmetic> {
    let mut random = Random::new(1);
    let mut all = Vec::new();
    for (name, inputs, outputs) in shapes(c) {
        let what = "linear layer to measure";
        let x = random.tensor(b, DType::F32, rows * inputs, what, Values::Normal)?;
        let w = random.tensor(b, dtype, outputs * inputs, what, Values::Normal)?;
        let y = b.alloc(DType::F32, rows * outputs, what)?;
        let linear = || -> Result<f64> {
            let p = Linear {
                x: &x,
                w: &w,
                bias: None,
                y: &y,
                rows,
                inputs,
                outputs,
                accumulate: false,
            };
            Ok(b.time(&mut || b.linear(&p))? / 1e3)
        };
        let (xs, ws) = (random.normal(rows * inputs), random.normal(outputs * inputs));
        let mut gemm = GemmCeiling::new(rows, inputs, outputs, xs, ws);
        // Taken in turns, so that a busy machine slows all of them alike.
        let (mut ours, mut by_rows, mut by_outputs) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..=repeats {
            let times =
                (linear()?, gemm.seconds(GemmSplit::Rows), gemm.seconds(GemmSplit::Outputs));
            // The first round warms up.
            if i > 0 {
                ours.push(times.0);
                by_rows.push(times.1);
                by_outputs.push(times.2);
            }
        }
        let (by_rows, by_outputs) = (Summary::of(by_rows), Summary::of(by_outputs));
        let (gemm_seconds, gemm_split) = if by_rows.median <= by_outputs.median {
            (by_rows, GemmSplit::Rows)
        } else {
            (by_outputs, GemmSplit::Outputs)
        };
        all.push(ShapeArithmetic {
            name,
            inputs,
            outputs,
            linear_seconds: Summary::of(ours),
            gemm_seconds,
            gemm_split,
        });
    }
    let flop: usize = all.iter().map(|s| 2 * rows * s.inputs * s.outputs).sum();
    let rate = |seconds: f64| flop as f64 / 1e9 / seconds;
    let linear_gflop_s = rate(all.iter().map(|s| s.linear_seconds.median).sum());
    let gemm_gflop_s = rate(all.iter().map(|s| s.gemm_seconds.median).sum());
    let prefill_gflop_s = prefill.map(|t| t * flop_per_token(c) / 1e9);
    Ok(PrefillArithmetic {
        rows,
        shapes: all,
        linear_gflop_s,
        gemm_gflop_s,
        linear_share: linear_gflop_s / gemm_gflop_s,
        prefill_gflop_s,
        prefill_share: prefill_gflop_s.map(|p| p / gemm_gflop_s),
    })
}
