//! LessIsMore's choice as published: the query heads' rankings of the raw logits in turn, each token at
//! its first occurrence, until the budget is full.

use super::{Keep, LayerContext, LayerPlan, SelectError, Selection};
use crate::backend::{Among, Force, Share, Tensor, TopK, UnionRanks};

/// Scores by the union of the heads' rankings: each head ranks all tokens, which are named rank by rank, head by head.
/// Sinks and recent tokens lead every ranking, so those behind them are ranked among themselves.
///
/// `scores`: f32 `[n, heads, stride]`, the logits of every head; forced tokens are marked in them.
pub(super) fn unite(
    cx: &LayerContext<'_>,
    plan: &LayerPlan,
    scores: &Tensor,
    out: &Selection,
) -> Result<(), SelectError> {
    let bad = || SelectError::BadPlan {
        method: "pool".into(),
        reason: "rankings without a buffer for the lists of all heads".into(),
    };
    let (indices, counts) = cx.scratch.head_lists.as_ref().ok_or_else(bad)?;
    let (b, seqs, heads, stride) = (cx.backend, cx.seqs, cx.shape.heads, cx.scratch.stride);
    let Keep { sinks, recent } = plan.keep;
    b.force(&Force { scores, seqs, rows_per_seq: heads, stride, sinks, recent, among: None })?;
    b.top_k(&TopK {
        scores,
        seqs,
        rows_per_seq: heads,
        stride,
        unit: 1,
        k: out.k,
        share: plan.budget.share.unwrap_or(Share::ALL),
        among: None,
        indices,
        counts,
    })?;
    let listed = Among { indices, counts, k: out.k };
    Ok(b.union_ranks(&UnionRanks { scores, seqs, heads, stride, listed, out: &cx.scratch.scores })?)
}
