//! State of selectors by sequence slot.

use super::LayerShape;
use crate::backend::{Backend, BackendError, Tensor};

impl LayerShape {
    /// A slot's part of `[slots, kv_heads, per_head]`.
    pub(super) fn of_slot(&self, t: &Tensor, per_head: usize, slot: usize) -> Tensor {
        let n = self.kv_heads * per_head;
        t.slice(slot * n, n)
    }

    /// Copies it to another slot.
    pub(super) fn copy_slot(
        &self,
        b: &dyn Backend,
        t: &Tensor,
        per_head: usize,
        (from, to): (usize, usize),
    ) -> Result<(), BackendError> {
        b.copy(&self.of_slot(t, per_head, from), &self.of_slot(t, per_head, to))
    }

    /// Copies the first `tokens` rows of every KV head of a slice of `n` columns from one slot to another.
    pub(super) fn copy_slice(
        &self,
        b: &dyn Backend,
        slice: &Tensor,
        n: usize,
        (from, to): (usize, usize),
        tokens: usize,
    ) -> Result<(), BackendError> {
        let part = |slot: usize, head: usize| {
            let row = (slot * self.kv_heads + head) * self.capacity;
            slice.slice(row * n, tokens.min(self.capacity) * n)
        };
        (0..self.kv_heads).try_for_each(|head| b.copy(&part(from, head), &part(to, head)))
    }
}
