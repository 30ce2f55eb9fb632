//! SparCas: key dimensions chosen by the query, refreshed every U steps, scored on a compact slice.
//!
//! With `refresh = every step` and no slice it is SparQ's selection; with units of 8 or 16 it reads query-chosen
//! groups of sorted keys; with what was measured in the place of the query, and no refresh, it is Double Sparsity.
//! Formulas: [`SelectDims`](crate::backend::SelectDims).

use super::pick::score_and_pick;
use super::{
    KeyProfile, LayerContext, LayerPlan, LayerShape, Scorer, SelectError, Selection, Selector,
};
use crate::backend::{
    Backend, CHANGED_WORDS, CompactSlice, DIM_STATE_WORDS, DType, DimMetric, RebuildSlice, Refresh,
    ScoreSource, SelectDims, Tensor,
};

/// Query-chosen dimensions of one layer, with their per-sequence state on the device.
#[derive(Debug)]
pub struct DimsSelector {
    plan: LayerPlan,
    n_dims: usize,
    metric: DimMetric,
    unit: usize,
    refresh: Refresh,
    shape: LayerShape,
    dims: Tensor,
    state: Tensor,
    changed: Tensor,
    coverage: Tensor,
    slice: Option<Tensor>,
    /// f32 `[slots, heads, head_dim]`: what dimensions are chosen by, where it is not the query.
    offline: Option<Tensor>,
}

impl DimsSelector {
    /// For a plan with [`Scorer::Dims`]; allocates the sets and, where the plan wants it, the slice.
    pub fn new(b: &dyn Backend, shape: &LayerShape, plan: &LayerPlan) -> Result<Self, SelectError> {
        let (n_dims, metric, unit, refresh, slice) = match plan.scorer {
            Scorer::Dims { dims, metric, unit, refresh, slice } => {
                // Where the layer sees only some of the steps, those at which a choice of dimensions is due by their
                // number may not be among them: count the steps since the last choice.
                let refresh = match refresh {
                    Refresh::Every { every, .. } if plan.reuse > 1 && every > 0 => {
                        Refresh::Adaptive { beta: 1.0, min: every, max: every }
                    }
                    other => other,
                };
                (dims, metric, unit, refresh, slice)
            }
            // Chosen in the first decode step, which also fills the slice, and never again.
            Scorer::Static { dims, bits: 16 } => {
                (dims, DimMetric::AbsQ, 1, Refresh::Every { every: 0, phase: 0 }, true)
            }
            _ => {
                return Err(SelectError::BadPlan {
                    method: "dims".into(),
                    reason: "the plan has no dimension scorer".into(),
                });
            }
        };
        let per = shape.slots * shape.kv_heads;
        let slice = slice
            .then(|| b.alloc(shape.kv_dtype, per * shape.capacity * n_dims, "compact key slice"))
            .transpose()?;
        Ok(DimsSelector {
            plan: plan.clone(),
            n_dims,
            metric,
            unit,
            refresh,
            shape: *shape,
            dims: b.alloc(DType::U32, per * n_dims, "dimension sets")?,
            state: b.alloc(DType::U32, per * DIM_STATE_WORDS, "dimension state")?,
            changed: b.alloc(DType::U32, per * CHANGED_WORDS, "changed columns")?,
            coverage: b.alloc(DType::F32, per * 2, "dimension coverage")?,
            slice,
            offline: None,
        })
    }

    /// For a plan with [`Scorer::Static`]: the dimensions of the largest importance in `profile`, which is in the order
    /// of the keys as the cache holds them.
    ///
    /// # Errors
    /// As [`DimsSelector::new`].
    pub fn chosen_offline(
        b: &dyn Backend,
        shape: &LayerShape,
        plan: &LayerPlan,
        profile: &KeyProfile,
    ) -> Result<Self, SelectError> {
        let mut selector = Self::new(b, shape, plan)?;
        // The sum of |q| over a group is the importance where one head of the group has it and the others nothing.
        let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let mut row = vec![0.0; shape.heads * d];
        let heads = profile.importance(shape.layer).chunks_exact(d);
        row.chunks_exact_mut(group * d).zip(heads).for_each(|(q, i)| q[..d].copy_from_slice(i));
        let offline = b.alloc(DType::F32, shape.slots * row.len(), "importance of dimensions")?;
        b.upload(&offline, bytemuck::cast_slice(&row.repeat(shape.slots)))?;
        selector.offline = Some(offline);
        Ok(selector)
    }
}

impl Selector for DimsSelector {
    fn slice(&self) -> Option<CompactSlice<'_>> {
        Some(CompactSlice {
            data: self.slice.as_ref()?,
            dims: &self.dims,
            n_dims: self.n_dims,
            capacity: self.shape.capacity,
            slots: self.shape.slots,
        })
    }

    fn dims(&self) -> Option<(&Tensor, usize)> {
        Some((&self.dims, self.n_dims))
    }

    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError> {
        if self.metric.needs_stats() && cx.stats.is_none() {
            return Err(SelectError::MissingSummary {
                method: "dims".into(),
                what: "key statistics",
            });
        }
        cx.backend.select_dims(&SelectDims {
            q: self.offline.as_ref().unwrap_or(q),
            seqs: cx.seqs,
            stats: cx.stats,
            dims: &self.dims,
            state: &self.state,
            changed: &self.changed,
            coverage: &self.coverage,
            heads: cx.shape.heads,
            kv_heads: cx.shape.kv_heads,
            head_dim: cx.shape.head_dim,
            slots: cx.shape.slots,
            n_dims: self.n_dims,
            unit: self.unit,
            metric: self.metric,
            refresh: self.refresh,
        })?;
        let source = match self.slice() {
            Some(slice) => {
                let changed = &self.changed;
                cx.backend.rebuild_slice(&RebuildSlice {
                    seqs: cx.seqs,
                    cache: cx.cache,
                    slice,
                    changed,
                })?;
                ScoreSource::Slice(slice)
            }
            None => ScoreSource::Gather { dims: &self.dims, n: self.n_dims },
        };
        score_and_pick(cx, &self.plan, q, source, out)
    }

    fn reset(&mut self, b: &dyn Backend, slot: usize) -> Result<(), SelectError> {
        Ok(b.zero(&self.shape.of_slot(&self.state, DIM_STATE_WORDS, slot))?)
    }

    /// `changed` and `coverage` are left out: the next step writes them before it reads them.
    fn fork(
        &mut self,
        b: &dyn Backend,
        from: usize,
        to: usize,
        tokens: usize,
    ) -> Result<(), SelectError> {
        self.shape.copy_slot(b, &self.dims, self.n_dims, (from, to))?;
        self.shape.copy_slot(b, &self.state, DIM_STATE_WORDS, (from, to))?;
        if let Some(slice) = &self.slice {
            self.shape.copy_slice(b, slice, self.n_dims, (from, to), tokens)?;
        }
        Ok(())
    }
}
