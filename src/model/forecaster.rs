//! The Forecast on a device: weights in the key order of the layers they are for, and the vectors of a step.

use super::config::ModelConfig;
use super::forecast::Forecast;
use super::key_order::{KeyOrder, source_rows};
use super::load::{LayerWeights, LoadError, spread, to_bytes};
use super::step::Step;
use crate::backend::{Backend, DType, Linear, Result, Rope, Tensor};

/// `f = rope(W norm(x))`, one vector per KV head of the layer that it is for.
#[derive(Debug)]
pub(super) struct Forecaster {
    file: Forecast,
    /// Per layer that they are for: `[kv_heads * kv_dim, hidden]`, rows in that layer's [`KeyOrder`].
    weights: Vec<Tensor>,
    /// act `[rows, kv_heads * kv_dim]`.
    projected: Tensor,
    /// act `[rows, kv_heads, kv_dim]`: one is read while the other is written.
    out: [Tensor; 2],
}

impl Forecaster {
    /// Loads the weights in `dtype`; room for `rows` rows with activations of `act`.
    pub fn new(
        b: &dyn Backend,
        file: Forecast,
        c: &ModelConfig,
        order: &KeyOrder,
        [dtype, act]: [DType; 2],
        rows: usize,
    ) -> std::result::Result<Self, LoadError> {
        let n = c.n_kv_heads * c.kv_dim();
        let weight = |_| b.alloc(dtype, n * c.hidden, "Forecast weights");
        let [projected, even, odd] = vectors(b, c, act, rows)?;
        let weights = (0..c.n_layers).map(weight).collect::<Result<_>>()?;
        let new = Forecaster { file, weights, projected, out: [even, odd] };
        new.reorder(b, c, order)?;
        Ok(new)
    }

    /// Rewrites the weights in another key order.
    pub fn reorder(
        &self,
        b: &dyn Backend,
        c: &ModelConfig,
        order: &KeyOrder,
    ) -> std::result::Result<(), LoadError> {
        let mut bytes = Vec::new();
        for (l, w) in self.weights.iter().enumerate() {
            let stored = self.file.matrix(l)?;
            let rows = source_rows(c, order, l, c.n_kv_heads);
            let ordered: Vec<f32> = rows
                .iter()
                .flat_map(|r| &stored[r * c.hidden..(r + 1) * c.hidden])
                .copied()
                .collect();
            let ordered = spread(&ordered, c.head_dim * c.hidden, c.kv_dim() * c.hidden);
            to_bytes(&ordered, w.dtype(), &mut bytes);
            b.upload(w, &bytes)?;
        }
        Ok(())
    }

    /// Makes room for another number of rows.
    pub fn resize(&mut self, b: &dyn Backend, c: &ModelConfig, rows: usize) -> Result<()> {
        let [projected, even, odd] = vectors(b, c, self.projected.dtype(), rows)?;
        (self.projected, self.out) = (projected, [even, odd]);
        Ok(())
    }

    /// Makes the Forecast for `layer`, whose weights are `target`, from the normed input of the step's first `rows`.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &self,
        b: &dyn Backend,
        c: &ModelConfig,
        layer: usize,
        target: &LayerWeights,
        normed: &Tensor,
        step: &Step,
        rows: usize,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let width = c.n_kv_heads * c.kv_dim();
        b.linear(&Linear {
            x: normed,
            w: &self.weights[layer],
            bias: None,
            y: &self.projected,
            rows,
            inputs: c.hidden,
            outputs: width,
            accumulate: false,
        })?;
        b.rope(&Rope {
            x: &self.projected,
            x_stride: width,
            positions: step.positions(),
            inv_freq: &target.inv_freq,
            heads_per_freq: 1,
            norm: None,
            factor: c.rope_factor(),
            out: self.of(layer),
            rows,
            heads: c.n_kv_heads,
            head_dim: c.kv_dim(),
        })
    }

    /// The Forecast for `layer`: act `[rows, kv_heads, kv_dim]`.
    pub fn of(&self, layer: usize) -> &Tensor {
        &self.out[layer % 2]
    }
}

fn vectors(b: &dyn Backend, c: &ModelConfig, act: DType, rows: usize) -> Result<[Tensor; 3]> {
    let one = || b.alloc(act, rows * c.n_kv_heads * c.kv_dim(), "Forecast");
    Ok([one()?, one()?, one()?])
}
