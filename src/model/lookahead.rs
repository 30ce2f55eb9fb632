//! What a layer would ask, read off the layer before it: the query projection of layer `l` applied to the input of
//! layer `l - 1`, as InfiniGen (OSDI 2024) speculates. Nothing is trained.
//!
//! Layer `l - 1` reads `x / rms(x) * norm[l - 1]` of the residual stream `x`. Dividing by that norm's weight and
//! multiplying by `norm[l]` gives the input of layer `l`, had layer `l - 1` added nothing; so the projections here
//! have that ratio folded in.

use super::error::Result;
use super::weights::{Checkpoint, LayerWeight, Weight};

/// The layer whose normed input tells the queries of layer `target`: the one before, for the first itself.
pub(crate) fn source(target: usize) -> usize {
    target.saturating_sub(1)
}

/// The query projection of layer `target` for the normed input of layer [`source`]: f32 `[heads * head_dim, hidden]`,
/// rows in the checkpoint's rotary order.
pub(crate) fn projection(checkpoint: &Checkpoint, target: usize) -> Result<Vec<f32>> {
    let read = |layer, weight| checkpoint.read(Weight::Layer(layer, weight));
    let (from, to) =
        (read(source(target), LayerWeight::AttnNorm)?, read(target, LayerWeight::AttnNorm)?);
    let ratio: Vec<f32> =
        from.iter().zip(&to).map(|(f, t)| if *f == 0.0 { 0.0 } else { t / f }).collect();
    let mut q = read(target, LayerWeight::Q)?;
    for row in q.chunks_exact_mut(ratio.len()) {
        row.iter_mut().zip(&ratio).for_each(|(q, ratio)| *q *= ratio);
    }
    Ok(q)
}

/// The mean of [`projection`] over the query heads of each KV head: f32 `[kv_heads * head_dim, hidden]`.
pub(crate) fn mean_projection(checkpoint: &Checkpoint, target: usize) -> Result<Vec<f32>> {
    let c = checkpoint.config();
    let q = projection(checkpoint, target)?;
    // A norm of queries: its weight is kept, the length that it takes away is not known here.
    let head_norm = match c.qk_norm {
        true => checkpoint.read(Weight::Layer(target, LayerWeight::QNorm))?,
        false => vec![1.0; c.head_dim],
    };
    let (d, group) = (c.head_dim, c.n_heads / c.n_kv_heads);
    let mut out = vec![0.0; c.n_kv_heads * d * c.hidden];
    for (r, row) in out.chunks_exact_mut(c.hidden).enumerate() {
        let (head, dim) = (r / d, r % d);
        for g in 0..group {
            let at = ((head * group + g) * d + dim) * c.hidden;
            row.iter_mut().zip(&q[at..]).for_each(|(o, q)| *o += q);
        }
        let scale = head_norm[dim] / group as f32;
        row.iter_mut().for_each(|o| *o *= scale);
    }
    Ok(out)
}
