//! Token lists that a sequence keeps from one decode step to the next, where steps share a choice.

use crate::backend::{Backend, DType, HELD_WORDS, HoldLists, Result, Tensor};
use crate::select::{LayerContext, LayerShape, Selection};
use std::sync::Arc;

/// The lists of one layer, by slot.
#[derive(Debug)]
pub(super) struct Held {
    /// Where a choice goes before it is kept; other layers may use the same.
    pub chosen: Arc<Selection>,
    /// u32 `[slots, lists, k]`.
    lists: Tensor,
    /// u32 `[slots, lists, HELD_WORDS]`.
    marks: Tensor,
    slots: usize,
}

impl Held {
    /// Room for lists like those of `chosen` in every slot.
    pub fn new(b: &dyn Backend, shape: &LayerShape, chosen: Arc<Selection>) -> Result<Held> {
        let (slots, n) = (shape.slots, shape.slots * chosen.rows_per_seq);
        Ok(Held {
            lists: b.alloc(DType::U32, n * chosen.k, "kept token lists")?,
            marks: b.alloc(DType::U32, n * HELD_WORDS, "kept token lists")?,
            chosen,
            slots,
        })
    }

    /// Records what fills `out` for the sequences of `cx`, the first `fresh` of which have just chosen.
    pub fn hold(&self, cx: &LayerContext<'_>, fresh: usize, out: &Selection) -> Result<()> {
        cx.backend.hold_lists(&HoldLists {
            chosen: &self.chosen.indices,
            chosen_counts: &self.chosen.counts,
            seqs: cx.seqs,
            fresh,
            rows_per_seq: out.rows_per_seq,
            k: self.chosen.k,
            held: &self.lists,
            marks: &self.marks,
            slots: self.slots,
            room: out.k,
            indices: &out.indices,
            counts: &out.counts,
        })
    }

    /// Copies what slot `from` holds to slot `to`.
    pub fn fork(&self, b: &dyn Backend, from: usize, to: usize) -> Result<()> {
        for t in [&self.lists, &self.marks] {
            let n = t.len() / self.slots;
            b.copy(&t.slice(from * n, n), &t.slice(to * n, n))?;
        }
        Ok(())
    }
}
