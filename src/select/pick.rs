//! From logits to token lists: the steps that all score-based selectors share.

use super::union::unite;
use super::{Follow, LayerContext, LayerPlan, SelectError, Selection};
use crate::backend::{
    Among, Force, HeadPool, Logits, PoolScores, ScoreDims, ScoreSource, Share, Tensor, TopK, Trim,
    TrimScores,
};

/// The end of every score-based method: pool the heads' logits where the plan says so, force sinks and recent
/// tokens, take the top-k.
///
/// Expects `score_dims` (or a custom scorer) to have written `scratch.scores`, or `scratch.head_scores` for the
/// softmax pools and for a plan that corrects.
pub fn pool_and_pick(
    cx: &LayerContext<'_>,
    plan: &LayerPlan,
    out: &Selection,
) -> Result<(), SelectError> {
    pool_and_pick_among(cx, plan, out, None)
}

/// As [`pool_and_pick`], for scores of all tokens or of listed ones.
pub(super) fn pool_and_pick_among(
    cx: &LayerContext<'_>,
    plan: &LayerPlan,
    out: &Selection,
    among: Option<Among<'_>>,
) -> Result<(), SelectError> {
    let s = cx.scratch;
    if let Some(pool) = pooling(cx, plan, among)? {
        cx.backend.pool_scores(&pool)?;
    } else if plan.pool == HeadPool::Union {
        unite(cx, plan, score_target(cx, plan)?, out)?;
    } else if plan.correct && plan.pool == HeadPool::None {
        // Forcing tokens writes to the scores; the logits are needed once more.
        let n = cx.seqs.n * cx.shape.heads * s.stride;
        let logits = score_target(cx, plan)?;
        cx.backend.copy(&logits.slice(0, n), &s.scores.slice(0, n))?;
    }
    pick(cx, plan, out, among)
}

/// How the heads' logits are pooled, where they were not while they were scored.
fn pooling<'a>(
    cx: &LayerContext<'a>,
    plan: &LayerPlan,
    among: Option<Among<'a>>,
) -> Result<Option<PoolScores<'a>>, SelectError> {
    if !per_head(plan) || matches!(plan.pool, HeadPool::Union | HeadPool::None) {
        return Ok(None);
    }
    Ok(Some(PoolScores {
        scores: score_target(cx, plan)?,
        out: &cx.scratch.scores,
        seqs: cx.seqs,
        heads: cx.shape.heads,
        kv_heads: cx.shape.kv_heads,
        stride: cx.scratch.stride,
        pool: plan.pool,
        lengths: among.map(|a| a.counts),
    }))
}

/// Trims scores to the budget, forces sinks and recent tokens, and takes the top-k.
fn pick(
    cx: &LayerContext<'_>,
    plan: &LayerPlan,
    out: &Selection,
    among: Option<Among<'_>>,
) -> Result<(), SelectError> {
    let s = cx.scratch;
    let trim = |trim: Trim| {
        let (rows_per_seq, stride) = (out.rows_per_seq, s.stride);
        let scores = &s.scores;
        cx.backend.trim_scores(&TrimScores { scores, seqs: cx.seqs, rows_per_seq, stride, trim })
    };
    if let Some(Follow::Mass { permille, at_least }) = plan.budget.follow {
        trim(Trim::Mass { permille, at_least })?;
    }
    let force = force(cx, (plan.keep.sinks, plan.keep.recent), out, among);
    let take = take(cx, plan.budget.share.unwrap_or(Share::ALL), out, among);
    let Some(Follow::Shared { mean, at_least }) = plan.budget.follow else {
        return Ok(cx.backend.force_top_k(&force, &take)?);
    };
    cx.backend.force(&force)?;
    // Forced tokens are part of the total.
    let tokens = u32::try_from(mean.saturating_mul(out.rows_per_seq)).unwrap_or(u32::MAX);
    trim(Trim::Together { tokens, at_least })?;
    Ok(cx.backend.top_k(&take)?)
}

/// Puts sinks and recent tokens first.
pub(super) fn force<'a>(
    cx: &LayerContext<'a>,
    (sinks, recent): (usize, usize),
    out: &Selection,
    among: Option<Among<'a>>,
) -> Force<'a> {
    Force {
        scores: &cx.scratch.scores,
        seqs: cx.seqs,
        rows_per_seq: out.rows_per_seq,
        stride: cx.scratch.stride,
        sinks,
        recent,
        among,
    }
}

/// As many tokens as `out` has room for, by the scores that the selector of this layer has just left in the shared
/// buffer: what an anchor hands down to layers that refine.
///
/// # Errors
/// [`SelectError::Backend`].
pub fn hand_down(cx: &LayerContext<'_>, out: &Selection) -> Result<(), SelectError> {
    Ok(cx.backend.top_k(&take(cx, Share::ALL, out, None))?)
}

/// The best scores of each list.
pub(super) fn take<'a>(
    cx: &LayerContext<'a>,
    share: Share,
    out: &'a Selection,
    among: Option<Among<'a>>,
) -> TopK<'a> {
    TopK {
        scores: &cx.scratch.scores,
        seqs: cx.seqs,
        rows_per_seq: out.rows_per_seq,
        stride: cx.scratch.stride,
        unit: 1,
        k: out.k,
        share,
        among,
        indices: &out.indices,
        counts: &out.counts,
    }
}

/// The logits of every query head are kept apart until they are pooled.
fn per_head(plan: &LayerPlan) -> bool {
    plan.pool.softmax() || plan.correct || plan.pool == HeadPool::Union
}

/// The buffer that a plan's scores are written to before they are pooled.
pub(super) fn score_target<'a>(
    cx: &LayerContext<'a>,
    plan: &LayerPlan,
) -> Result<&'a Tensor, SelectError> {
    if !per_head(plan) {
        return Ok(&cx.scratch.scores);
    }
    cx.scratch.head_scores.as_ref().ok_or_else(|| SelectError::BadPlan {
        method: "pool".into(),
        reason: "pooling without a per-head score buffer".into(),
    })
}

/// Where a plan's logits go before they are pooled, by what is left for [`pool_and_pick`] to do.
///
/// # Errors
/// [`SelectError::BadPlan`] without a buffer for every head where the plan needs one.
pub(crate) fn logits<'a>(
    cx: &LayerContext<'a>,
    plan: &LayerPlan,
) -> Result<Logits<'a>, SelectError> {
    let pool = if per_head(plan) { HeadPool::None } else { plan.pool };
    Ok(Logits { scores: score_target(cx, plan)?, stride: cx.scratch.stride, pool })
}

/// Scores the keys from `source` and picks tokens: the body of every dimension-pruning selector.
pub(super) fn score_and_pick(
    cx: &LayerContext<'_>,
    plan: &LayerPlan,
    q: &Tensor,
    source: ScoreSource<'_>,
    out: &Selection,
) -> Result<(), SelectError> {
    let Logits { scores, stride, pool } = logits(cx, plan)?;
    let score = ScoreDims {
        q,
        seqs: cx.seqs,
        cache: cx.cache,
        source,
        heads: cx.shape.heads,
        pool,
        scale: plan.scale,
        scores,
        stride,
    };
    if let Some(pool) = pooling(cx, plan, None)? {
        cx.backend.score_pool(&score, &pool)?;
        return pick(cx, plan, out, None);
    }
    cx.backend.score_dims(&score)?;
    pool_and_pick(cx, plan, out)
}
