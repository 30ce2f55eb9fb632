//! The selector trait, and what selectors are made of and with.

use super::{
    BlockSelector, ComponentsSelector, DimsSelector, ExactSelector, KeyProfile, LabelsSelector,
    LayerPlan, RandomSelector, Scorer, SelectError, SortedSelector, WindowSelector,
};
use crate::backend::{Backend, CompactSlice, DType, Int8Keys, KvPool, Seqs, Summaries, Tensor};
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

impl LayerShape {
    /// Tokens that a row of scores, and so a list, has room for: `capacity` in whole blocks of 64.
    pub fn stride(&self) -> usize {
        self.capacity.next_multiple_of(64)
    }
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
    /// Room of a list, in tokens; at most [`LayerShape::stride`].
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
