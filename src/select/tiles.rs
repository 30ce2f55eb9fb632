//! Choosing tokens for the tiles of a prompt (Kascade, arXiv 2512.16391, prefill): the rows of a tile and the query
//! heads that share a list share a choice. Each row's probabilities over all tokens that it sees are summed over both;
//! the tile's own tokens are always in, so that every row finds itself, and the rest of the budget, which follows the
//! tile's own end ("rolling"), goes to the largest sums.

use super::pick::{force, take};
use super::{LayerContext, LayerPlan, Scorer, SelectError, Selection};
use crate::backend::{ScoreTiles, Share, Tensor};

/// Records the ops that fill `out` for every tile of `cx.seqs`.
///
/// `q`: act `[rows, heads, head_dim]`, after the rotary embedding; `lse`: f32 `[rows, heads]` of each row's dense
/// attention. Without a scorer only sinks and recent tokens are chosen.
///
/// # Errors
/// [`SelectError::Backend`].
pub fn select_tiles(
    cx: &LayerContext<'_>,
    plan: &LayerPlan,
    (q, lse): (&Tensor, &Tensor),
    out: &Selection,
) -> Result<(), SelectError> {
    let (b, s) = (cx.backend, cx.scratch);
    match plan.scorer {
        Scorer::None => b.zero(&s.scores)?,
        _ => b.score_tiles(&ScoreTiles {
            q,
            lse,
            seqs: cx.seqs,
            cache: cx.cache,
            heads: cx.shape.heads,
            scale: 1.0 / (cx.shape.head_dim as f32).sqrt(),
            pool: plan.pool,
            scores: &s.scores,
            stride: s.stride,
        })?,
    }
    let recent = plan.keep.recent.max(plan.tile.unwrap_or(1));
    let take = take(cx, plan.budget.share.unwrap_or(Share::ALL), out, None);
    Ok(cx.backend.force_top_k(&force(cx, (plan.keep.sinks, recent), out, None), &take)?)
}
