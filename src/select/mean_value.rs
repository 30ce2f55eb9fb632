//! SparQ's mean-value correction, for every layer that scores its tokens one by one.

use super::{LayerContext, LayerPlan, SelectError, Selection};
use crate::backend::{Among, MeanValue, Tensor};

/// Blends the mean of all values into `out`, the attention over what the layer's selector has just left in `picked`,
/// where the plan asks for it. The estimated logits are those that the selector left in the shared buffer.
///
/// `out`: act `[rows, heads, head_dim]`.
///
/// # Errors
/// [`SelectError::MissingSummary`] where the cache keeps no sums of the values.
pub fn correct(
    cx: &LayerContext<'_>,
    plan: &LayerPlan,
    picked: &Selection,
    out: &Tensor,
) -> Result<(), SelectError> {
    if !plan.correct {
        return Ok(());
    }
    let missing = |what| SelectError::MissingSummary { method: "mean value".into(), what };
    let sums = cx.value_stats.ok_or_else(|| missing("the sums of the values"))?;
    let scores = cx.scratch.head_scores.as_ref().ok_or_else(|| missing("scores of all heads"))?;
    let (indices, counts) = (&picked.indices, &picked.counts);
    Ok(cx.backend.mean_value(&MeanValue {
        scores,
        seqs: cx.seqs,
        listed: Among { indices, counts, k: picked.k },
        lists: picked.rows_per_seq,
        sums,
        slots: cx.shape.slots,
        heads: cx.shape.heads,
        kv_heads: cx.shape.kv_heads,
        head_dim: cx.shape.head_dim,
        stride: cx.scratch.stride,
        out,
    })?)
}
