//! SparCas: key dimensions chosen by the query, refreshed every U steps, scored on a compact slice.
//!
//! With `refresh = every step` and no slice it is SparQ's selection; with units of 8 or 16 it reads query-chosen
//! groups of sorted keys. Formulas: [`SelectDims`](crate::backend::SelectDims).

use super::selector::score_and_pick;
use super::{LayerContext, LayerPlan, LayerShape, Scorer, SelectError, Selection, Selector};
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
}

impl DimsSelector {
    /// For a plan with [`Scorer::Dims`]; allocates the sets and, where the plan wants it, the slice.
    pub fn new(b: &dyn Backend, shape: &LayerShape, plan: &LayerPlan) -> Result<Self, SelectError> {
        let Scorer::Dims { dims: n_dims, metric, unit, refresh, slice } = plan.scorer.clone()
        else {
            return Err(SelectError::BadPlan {
                method: "dims".into(),
                reason: "the plan has no dimension scorer".into(),
            });
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
        })
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
            q,
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
        let n = self.shape.kv_heads * DIM_STATE_WORDS;
        Ok(b.zero(&self.state.slice(slot * n, n))?)
    }

    /// `changed` and `coverage` are left out: the next step writes them before it reads them.
    fn fork(
        &mut self,
        b: &dyn Backend,
        from: usize,
        to: usize,
        tokens: usize,
    ) -> Result<(), SelectError> {
        let kv_heads = self.shape.kv_heads;
        for (t, per_head) in [(&self.dims, self.n_dims), (&self.state, DIM_STATE_WORDS)] {
            let n = kv_heads * per_head;
            b.copy(&t.slice(from * n, n), &t.slice(to * n, n))?;
        }
        if let Some(slice) = &self.slice {
            let part = |slot: usize, head: usize| {
                let row = (slot * kv_heads + head) * self.shape.capacity;
                slice.slice(row * self.n_dims, tokens.min(self.shape.capacity) * self.n_dims)
            };
            for head in 0..kv_heads {
                b.copy(&part(from, head), &part(to, head))?;
            }
        }
        Ok(())
    }
}
