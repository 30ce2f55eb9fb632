//! Double Sparsity's label cache in 4 or 8 bits (arXiv 2408.07092): the dimensions that were chosen offline, as small
//! integers with a scale per token and KV head, in a slice that is brought up to date whenever the layer selects.
//!
//! In 16 bits the slice is that of [`DimsSelector`](super::DimsSelector), which the cache appends to.

use super::pick::score_and_pick;
use super::{
    KeyProfile, LayerContext, LayerPlan, LayerShape, Scorer, SelectError, Selection, Selector,
};
use crate::backend::{
    Backend, DType, QuantiseKeys, QuantisedSlice, ScoreSource, SliceBits, Tensor,
};

/// Scores tokens on a quantised slice of dimensions that never change.
#[derive(Debug)]
pub struct LabelsSelector {
    plan: LayerPlan,
    n: usize,
    bits: SliceBits,
    shape: LayerShape,
    /// u32 `[slots, kv_heads, n]`.
    dims: Tensor,
    /// i8 `[slots, kv_heads, capacity, bits.row(n)]` and f32 `[slots, kv_heads, capacity]`.
    data: Tensor,
    scale: Tensor,
    /// u32 `[slots, kv_heads]`: tokens that are in the slice.
    done: Tensor,
}

/// The `n` dimensions of the largest importance, ascending; of equal ones the first.
fn largest(importance: &[f32], n: usize) -> Vec<u32> {
    let mut order: Vec<usize> = (0..importance.len()).collect();
    order.sort_by(|&a, &b| importance[b].total_cmp(&importance[a]));
    order.truncate(n);
    order.sort_unstable();
    order.into_iter().map(|i| i as u32).collect()
}

impl LabelsSelector {
    /// For a plan with [`Scorer::Static`] of 4 or 8 bits; `profile` is in the order of the keys as the cache holds
    /// them.
    ///
    /// # Errors
    /// [`SelectError::BadPlan`] for any other scorer, [`SelectError::Backend`] when the device is full.
    pub fn new(
        b: &dyn Backend,
        shape: &LayerShape,
        plan: &LayerPlan,
        profile: &KeyProfile,
    ) -> Result<Self, SelectError> {
        let (n, bits) = match plan.scorer {
            Scorer::Static { dims, bits: 4 } => (dims, SliceBits::Four),
            Scorer::Static { dims, bits: 8 } => (dims, SliceBits::Eight),
            _ => {
                return Err(SelectError::BadPlan {
                    method: "labels".into(),
                    reason: "the plan has no scorer of dimensions in 4 or 8 bits".into(),
                });
            }
        };
        let heads = profile.importance(shape.layer).chunks_exact(shape.head_dim);
        let list: Vec<u32> = heads.flat_map(|head| largest(head, n)).collect();
        let per = shape.slots * shape.kv_heads;
        let dims = b.alloc(DType::U32, per * n, "dimension sets")?;
        b.upload(&dims, bytemuck::cast_slice(&list.repeat(shape.slots)))?;
        let tokens = per * shape.capacity;
        Ok(LabelsSelector {
            plan: plan.clone(),
            n,
            bits,
            shape: *shape,
            dims,
            data: b.alloc(DType::I8, tokens * bits.row(n), "quantised key slice")?,
            scale: b.alloc(DType::F32, tokens, "scales of the key slice")?,
            done: b.alloc(DType::U32, per, "quantised tokens")?,
        })
    }
}

impl Selector for LabelsSelector {
    fn dims(&self) -> Option<(&Tensor, usize)> {
        Some((&self.dims, self.n))
    }

    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError> {
        let slice = QuantisedSlice {
            data: &self.data,
            scale: &self.scale,
            dims: &self.dims,
            n_dims: self.n,
            bits: self.bits,
            capacity: self.shape.capacity,
            slots: self.shape.slots,
        };
        let (seqs, cache, done) = (cx.seqs, cx.cache, &self.done);
        cx.backend.quantise_keys(&QuantiseKeys { seqs, cache, slice, done })?;
        score_and_pick(cx, &self.plan, q, ScoreSource::Quantised(slice), out)
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
        self.shape.copy_slice(b, &self.data, self.bits.row(self.n), (from, to), tokens)?;
        Ok(self.shape.copy_slice(b, &self.scale, 1, (from, to), tokens)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_listed_in_ascending_order() {
        assert_eq!(largest(&[0.5, 2.0, 0.5, 3.0, 0.1], 3), [0, 1, 3]);
        assert_eq!(largest(&[1.0; 4], 2), [0, 1]);
    }
}
