//! The Forecast on a device: weights in the key order of the layers they are for, and the vectors of a step.

use super::attention::Attention;
use super::config::ModelConfig;
use super::forecast::Forecast;
use super::key_order::{KeyOrder, source_rows};
use super::load::{LoadError, spread, to_bytes};
use super::step::Step;
use crate::backend::{Backend, DType, Linear, Result, Rope, Tensor};

/// `f = rope(W norm(x))`, one vector per KV head of the layer that it is for.
#[derive(Debug)]
pub(crate) struct Forecaster {
    file: Forecast,
    /// Per layer that they are for: `[kv_heads * kv_dim, hidden]`, rows in that layer's [`KeyOrder`].
    weights: Vec<Tensor>,
    /// Likewise f32 `[kv_heads, kv_dim / 2]`: the rotary frequencies, in the order of the keys as the layer has them.
    inv_freq: Vec<Tensor>,
    /// act `[rows, kv_heads * kv_dim]`.
    projected: Tensor,
    /// act `[rows, kv_heads, kv_dim]`: one is read while the other is written.
    out: [Tensor; 2],
}

impl Forecaster {
    /// Loads the weights in `dtype`; room for `rows` rows with activations of `act`. `inv_freq`: those of every layer.
    pub fn new(
        b: &dyn Backend,
        file: Forecast,
        c: &ModelConfig,
        (order, inv_freq): (&KeyOrder, Vec<Tensor>),
        [dtype, act]: [DType; 2],
        rows: usize,
    ) -> std::result::Result<Self, LoadError> {
        let n = c.n_kv_heads * c.kv_dim();
        let weight = |_| b.alloc(dtype, n * c.hidden, "Forecast weights");
        let [projected, even, odd] = vectors(b, c, act, rows)?;
        let weights = (0..c.n_layers).map(weight).collect::<Result<_>>()?;
        let new = Forecaster { file, weights, inv_freq, projected, out: [even, odd] };
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

    /// Makes the Forecast for the layer after `l` (and for layer 0 its own) from `normed`, what layer `l` reads, act
    /// `[rows, hidden]`; returns that for layer `l` itself, where `attention` scores the layer with one.
    pub fn at(
        &self,
        b: &dyn Backend,
        c: &ModelConfig,
        l: usize,
        normed: &Tensor,
        step: &Step,
        attention: &Attention,
    ) -> Result<Option<&Tensor>> {
        let from_here = if l == 0 { 0..2 } else { l + 1..l + 2 };
        for target in from_here.filter(|t| attention.wants_forecast(*t)) {
            let rows = match attention.reads_prompts_sparsely(target) {
                true => step.rows,
                false => step.decode_rows(),
            };
            if rows > 0 {
                self.run(b, c, target, normed, step, rows)?;
            }
        }
        Ok(attention.wants_forecast(l).then(|| self.of(l)))
    }

    /// Makes the Forecast for `layer` from the input of the step's first `rows`.
    fn run(
        &self,
        b: &dyn Backend,
        c: &ModelConfig,
        layer: usize,
        normed: &Tensor,
        step: &Step,
        rows: usize,
    ) -> Result<()> {
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
            inv_freq: &self.inv_freq[layer],
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
    fn of(&self, layer: usize) -> &Tensor {
        &self.out[layer % 2]
    }
}

fn vectors(b: &dyn Backend, c: &ModelConfig, act: DType, rows: usize) -> Result<[Tensor; 3]> {
    let one = || b.alloc(act, rows * c.n_kv_heads * c.kv_dim(), "Forecast");
    Ok([one()?, one()?, one()?])
}
