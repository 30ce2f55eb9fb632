//! The second look at an anchor's tokens: a layer scores only those with its own query and keeps its budget.

use super::pick::{pool_and_pick_among, score_target};
use super::{LayerContext, LayerPlan, Refine, Scorer, SelectError, Selection};
use crate::backend::{Among, ScoreRows, ScoreSource, Tensor};

/// Records the ops that pick the layer's tokens for `out` from `candidates`; both have as many lists as the plan's
/// pool makes. What the layer keeps (sinks, recent tokens) is among the candidates, because the anchor keeps it too.
///
/// `q`: act `[rows, heads, head_dim]`, after the rotary embedding.
///
/// # Errors
/// [`SelectError::BadPlan`] for a scorer that cannot score listed tokens.
pub fn refine(
    cx: &LayerContext<'_>,
    plan: &LayerPlan,
    refine: &Refine,
    q: &Tensor,
    candidates: &Selection,
    out: &Selection,
) -> Result<(), SelectError> {
    let n = match refine.scorer {
        Scorer::Exact => cx.shape.head_dim,
        Scorer::Sorted { dims, int8: false } => dims,
        _ => {
            return Err(SelectError::BadPlan {
                method: "refine".into(),
                reason: "candidates are scored on dimensions of the keys themselves".into(),
            });
        }
    };
    let (indices, counts) = (&candidates.indices, &candidates.counts);
    let among = Among { indices, counts, k: candidates.k };
    cx.backend.score_rows(&ScoreRows {
        q,
        seqs: cx.seqs,
        cache: cx.cache,
        source: ScoreSource::Lead { n },
        heads: cx.shape.heads,
        pool: plan.pool,
        scale: plan.scale,
        among,
        lists: candidates.rows_per_seq,
        scores: score_target(cx, plan)?,
        stride: cx.scratch.stride,
    })?;
    pool_and_pick_among(cx, plan, out, Some(among))
}
