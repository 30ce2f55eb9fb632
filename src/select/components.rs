//! Loki (arXiv 2406.02542): tokens are scored on the leading principal components of the keys of their KV head.
//!
//! The directions are measured once, on keys after the rotary embedding. The published code stores the keys rotated;
//! here the pages stay as they are for every other method, and the leading components have a slice of their own, which
//! is brought up to date whenever the layer selects.

use super::pick::score_and_pick;
use super::{
    KeyProfile, LayerContext, LayerPlan, LayerShape, Scorer, SelectError, Selection, Selector,
};
use crate::backend::{Backend, CompactSlice, DType, Project, ScoreSource, Tensor};

/// Scores tokens on the leading principal components.
#[derive(Debug)]
pub struct ComponentsSelector {
    plan: LayerPlan,
    n: usize,
    shape: LayerShape,
    /// f32 `[kv_heads, n, head_dim]`.
    basis: Tensor,
    /// f32 `[slots, heads, head_dim]`: the step's queries along the components.
    q: Tensor,
    /// kv dtype `[slots, kv_heads, capacity, n]`.
    slice: Tensor,
    /// u32 `[slots, kv_heads]`: tokens that are in the slice.
    done: Tensor,
    /// u32 `[slots, kv_heads, n]`: column `i` of the slice is component `i`.
    dims: Tensor,
}

impl ComponentsSelector {
    /// For a plan with [`Scorer::Components`]; `profile` is in the order of the keys as the cache holds them.
    ///
    /// # Errors
    /// [`SelectError::BadPlan`] for any other scorer, [`SelectError::Backend`] when the device is full.
    pub fn new(
        b: &dyn Backend,
        shape: &LayerShape,
        plan: &LayerPlan,
        profile: &KeyProfile,
    ) -> Result<Self, SelectError> {
        let Scorer::Components { dims: n } = plan.scorer else {
            return Err(SelectError::BadPlan {
                method: "components".into(),
                reason: "the plan has no scorer of principal components".into(),
            });
        };
        let (d, per) = (shape.head_dim, shape.slots * shape.kv_heads);
        let leading: Vec<f32> = profile
            .basis(shape.layer)
            .chunks_exact(d * d)
            .flat_map(|head| &head[..n * d])
            .copied()
            .collect();
        let basis = b.alloc(DType::F32, leading.len(), "principal components")?;
        b.upload(&basis, bytemuck::cast_slice(&leading))?;
        let columns: Vec<u32> = (0..per).flat_map(|_| 0..n as u32).collect();
        let dims = b.alloc(DType::U32, columns.len(), "components of the slice")?;
        b.upload(&dims, bytemuck::cast_slice(&columns))?;
        Ok(ComponentsSelector {
            plan: plan.clone(),
            n,
            shape: *shape,
            basis,
            q: b.alloc(DType::F32, shape.slots * shape.heads * d, "projected queries")?,
            slice: b.alloc(shape.kv_dtype, per * shape.capacity * n, "projected keys")?,
            done: b.alloc(DType::U32, per, "projected tokens")?,
            dims,
        })
    }
}

impl Selector for ComponentsSelector {
    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError> {
        let LayerShape { slots, capacity, .. } = self.shape;
        cx.backend.project(&Project {
            q,
            seqs: cx.seqs,
            cache: cx.cache,
            basis: &self.basis,
            n: self.n,
            heads: self.shape.heads,
            out: &self.q,
            slice: &self.slice,
            done: &self.done,
            capacity,
            slots,
        })?;
        let (data, dims) = (&self.slice, &self.dims);
        let slice = CompactSlice { data, dims, n_dims: self.n, capacity, slots };
        score_and_pick(cx, &self.plan, &self.q, ScoreSource::Slice(slice), out)
    }

    fn reset(&mut self, b: &dyn Backend, slot: usize) -> Result<(), SelectError> {
        Ok(b.zero(&self.shape.of_slot(&self.done, 1, slot))?)
    }

    fn fork(
        &mut self,
        b: &dyn Backend,
        from: usize,
        to: usize,
        tokens: usize,
    ) -> Result<(), SelectError> {
        self.shape.copy_slot(b, &self.done, 1, (from, to))?;
        Ok(self.shape.copy_slice(b, &self.slice, self.n, (from, to), tokens)?)
    }
}
