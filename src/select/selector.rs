//! The selector trait and the steps that all selectors share.

use super::union::unite;
use super::{
    BlockSelector, ComponentsSelector, DimsSelector, ExactSelector, Follow, KeyProfile,
    LabelsSelector, LayerPlan, RandomSelector, Scorer, SelectError, SortedSelector, WindowSelector,
};
use crate::backend::{
    Among, Backend, CompactSlice, DType, Force, HeadPool, Int8Keys, KvPool, Logits, PoolScores,
    Seqs, Share, Summaries, Tensor, TopK, Trim, TrimScores,
};
use std::sync::Arc;

/// Fixed sizes of a layer's attention.
#[derive(Clone, Copy, Debug)]
pub struct LayerShape {
    /// Number of the layer, from 0.
    pub layer: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head as keys and queries have them.
    pub head_dim: usize,
    /// Those of them that are no bias (NOSA's content importance comes behind them); `head_dim` where there is none.
    pub plain_dim: usize,
    /// Cache dtype.
    pub kv_dtype: DType,
    /// Slots of per-sequence state.
    pub slots: usize,
    /// Most sequences, or tiles of prompts, that one call of a selector may see.
    pub at_once: usize,
    /// Most rows of a step.
    pub rows: usize,
    /// Most tokens of a sequence.
    pub capacity: usize,
}

/// Score buffers that all layers share.
#[derive(Debug)]
pub struct Scratch {
    /// f32 `[n, rows, stride]`, rows = KV heads, or query heads for per-head selection.
    pub scores: Tensor,
    /// f32 `[n, heads, stride]`, per-head logits before they are pooled.
    pub head_scores: Option<Tensor>,
    /// u32 `[n, heads, k]` and `[n, heads]`, each head's best tokens before their rankings are united.
    pub head_lists: Option<(Tensor, Tensor)>,
    /// At least every sequence's length; a multiple of 64.
    pub stride: usize,
}

/// Where a selection goes: ascending token lists per (sequence, KV head) or (sequence, query head), or one per
/// sequence.
#[derive(Debug)]
pub struct Selection {
    /// u32 `[n, rows_per_seq, k]`.
    pub indices: Tensor,
    /// u32 `[n, rows_per_seq]`.
    pub counts: Tensor,
    /// Room of a list, in tokens.
    pub k: usize,
    /// Lists of a sequence: one per KV head, one per query head, or one for all.
    pub rows_per_seq: usize,
}

impl Selection {
    /// The lists of `n` sequences from the `first` on.
    pub fn part(&self, first: usize, n: usize) -> Selection {
        let (k, lists) = (self.k, self.rows_per_seq);
        Selection {
            indices: self.indices.slice(first * lists * k, n * lists * k),
            counts: self.counts.slice(first * lists, n * lists),
            k,
            rows_per_seq: lists,
        }
    }
}

/// What a selector may read in a decode step of one layer, or in a prefill with tiles of one row.
#[derive(Clone, Copy)]
pub struct LayerContext<'a> {
    /// The device.
    pub backend: &'a dyn Backend,
    /// Decoding sequences of the step that this layer treats sparsely.
    pub seqs: Seqs<'a>,
    /// The layer's pages.
    pub cache: KvPool<'a>,
    /// The int8 key copy, where the cache keeps one.
    pub int8: Option<Int8Keys<'a>>,
    /// Running key statistics `[slots, kv_heads, key_stats_len(head_dim)]`.
    pub stats: Option<&'a Tensor>,
    /// Running sums of the values `[slots, kv_heads, key_stats_len(head_dim)]`, where the cache keeps them.
    pub value_stats: Option<&'a Tensor>,
    /// The summaries of keys that the layer's plan reads, where the cache keeps them.
    pub summaries: Option<Summaries<'a>>,
    /// act `[rows, kv_heads, head_dim]`: the Forecast for this layer, where there is one.
    pub forecast: Option<&'a Tensor>,
    /// Sizes of the layer.
    pub shape: LayerShape,
    /// Score buffers.
    pub scratch: &'a Scratch,
}

impl std::fmt::Debug for LayerContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerContext").field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// Chooses tokens for one layer.
///
/// Implement it to bring your own method: see `examples/own_method.rs`.
pub trait Selector: Send {
    /// Compact slice that must be appended to with every new key.
    fn slice(&self) -> Option<CompactSlice<'_>> {
        None
    }

    /// The key dimensions that the query has chosen, u32 `[slots, kv_heads, n]`, and `n`, for those who measure how
    /// the choice changes.
    fn dims(&self) -> Option<(&Tensor, usize)> {
        None
    }

    /// Records the ops that fill `out` for every sequence of `cx.seqs`.
    ///
    /// `q`: act `[rows, heads, head_dim]`, after the rotary embedding. Nothing may be read back to the host.
    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError>;

    /// The sequence in `slot` is new: forget what was known about it.
    fn reset(&mut self, backend: &dyn Backend, slot: usize) -> Result<(), SelectError> {
        let _ = (backend, slot);
        Ok(())
    }

    /// The sequence in slot `to` is a fork of the one in slot `from`, which holds `tokens` tokens: copy what was
    /// known, so that both continue alike. Without an implementation the fork starts as a new sequence.
    fn fork(
        &mut self,
        backend: &dyn Backend,
        from: usize,
        to: usize,
        tokens: usize,
    ) -> Result<(), SelectError> {
        let _ = (from, tokens);
        self.reset(backend, to)
    }
}

/// Makes a program's own selectors, one per layer that its plan marks [`Scorer::Custom`].
pub type SelectorFactory = Arc<
    dyn Fn(&dyn Backend, &LayerShape, &LayerPlan) -> Result<Box<dyn Selector>, SelectError>
        + Send
        + Sync,
>;

/// What selectors are made with, beside the plan.
#[derive(Clone, Copy, Default)]
pub struct Given<'a> {
    /// Makes those of [`Scorer::Custom`].
    pub custom: Option<&'a SelectorFactory>,
    /// What was measured of the model, in the order of the keys as the cache holds them.
    pub profile: Option<&'a KeyProfile>,
}

impl std::fmt::Debug for Given<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Given").field("custom", &self.custom.is_some()).finish_non_exhaustive()
    }
}

/// Makes the selector of a layer; `None` for layers that are dense or reuse another's tokens.
///
/// # Errors
/// [`SelectError::BadPlan`] for a custom scorer without a factory, [`SelectError::MissingSummary`] for one that reads
/// a profile without one, [`SelectError::Backend`] when its state does not fit the device.
pub fn build(
    backend: &dyn Backend,
    shape: &LayerShape,
    plan: &LayerPlan,
    given: Given<'_>,
) -> Result<Option<Box<dyn Selector>>, SelectError> {
    if !plan.selects() {
        return Ok(None);
    }
    let profile = || {
        let fits = |p: &&KeyProfile| {
            (p.kv_heads, p.head_dim) == (shape.kv_heads, shape.head_dim)
                && p.fits_layer(shape.layer)
        };
        given.profile.filter(fits).ok_or_else(|| SelectError::MissingSummary {
            method: "profile".into(),
            what: "a profile of this model's keys",
        })
    };
    Ok(Some(match &plan.scorer {
        Scorer::None => Box::new(WindowSelector::new(plan)),
        Scorer::Random { .. } => Box::new(RandomSelector::new(backend, shape, plan)?),
        Scorer::Static { bits, .. } if *bits != 16 => {
            Box::new(LabelsSelector::new(backend, shape, plan, profile()?)?)
        }
        Scorer::Static { .. } => {
            Box::new(DimsSelector::chosen_offline(backend, shape, plan, profile()?)?)
        }
        Scorer::Components { .. } => {
            Box::new(ComponentsSelector::new(backend, shape, plan, profile()?)?)
        }
        Scorer::Exact => Box::new(ExactSelector::new(plan)),
        Scorer::Sorted { .. } => Box::new(SortedSelector::new(plan)?),
        Scorer::Dims { .. } => Box::new(DimsSelector::new(backend, shape, plan)?),
        Scorer::Blocks { .. } => Box::new(BlockSelector::new(backend, shape, plan)?),
        Scorer::Custom { name } => match given.custom {
            Some(f) => f(backend, shape, plan)?,
            None => {
                return Err(SelectError::BadPlan {
                    method: name.clone(),
                    reason: "its selector was not given to the engine".into(),
                });
            }
        },
    }))
}

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
    if plan.pool == HeadPool::Union {
        unite(cx, plan, score_target(cx, plan)?, out)?;
    } else if plan.correct && plan.pool == HeadPool::None {
        // Forcing tokens writes to the scores; the logits are needed once more.
        let n = cx.seqs.n * cx.shape.heads * s.stride;
        let logits = score_target(cx, plan)?;
        cx.backend.copy(&logits.slice(0, n), &s.scores.slice(0, n))?;
    } else if per_head(plan) {
        cx.backend.pool_scores(&PoolScores {
            scores: score_target(cx, plan)?,
            out: &s.scores,
            seqs: cx.seqs,
            heads: cx.shape.heads,
            kv_heads: cx.shape.kv_heads,
            stride: s.stride,
            pool: plan.pool,
            lengths: among.map(|a| a.counts),
        })?;
    }
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
    source: crate::backend::ScoreSource<'_>,
    out: &Selection,
) -> Result<(), SelectError> {
    let Logits { scores, stride, pool } = logits(cx, plan)?;
    cx.backend.score_dims(&crate::backend::ScoreDims {
        q,
        seqs: cx.seqs,
        cache: cx.cache,
        source,
        heads: cx.shape.heads,
        pool,
        scale: plan.scale,
        scores,
        stride,
    })?;
    pool_and_pick(cx, plan, out)
}
