//! Token lists that steps share.

use super::{Seqs, apart, ensure, holds, is};
use crate::backend::{DType, Result, Tensor};

/// u32 words of [`HoldLists::marks`] per (slot, list).
pub const HELD_WORDS: usize = 2;

/// The lists that a step attends with, where a choice of tokens serves several steps.
///
/// The first `fresh` sequences have just chosen: list `r` of sequence `s` is copied from `chosen` to `held` at the
/// sequence's slot, `marks` of that slot become its length and `kv_len`, and `indices` gets the list. Each of the
/// others gets what its slot holds, followed by every token since, `marks[1]..kv_len`, up to `room` in all; its slot
/// is left alone. `counts` is the length of what `indices` got; entries behind it are unspecified.
///
/// Lists are ascending, so the results are: tokens since the choice are newer than all of it. No two sequences of a
/// call share a slot.
#[derive(Debug)]
pub struct HoldLists<'a> {
    /// u32 `[fresh, rows_per_seq, k]`.
    pub chosen: &'a Tensor,
    /// u32 `[fresh, rows_per_seq]`; more than `k` counts as `k`.
    pub chosen_counts: &'a Tensor,
    /// The sequences; those that have just chosen come first.
    pub seqs: Seqs<'a>,
    /// How many have.
    pub fresh: usize,
    /// Lists of a sequence.
    pub rows_per_seq: usize,
    /// Room of a list as it was chosen; at least 1.
    pub k: usize,
    /// u32 `[slots, rows_per_seq, k]`, in and out.
    pub held: &'a Tensor,
    /// u32 `[slots, rows_per_seq, HELD_WORDS]`, in and out: tokens of the list; `kv_len` when it was chosen.
    pub marks: &'a Tensor,
    /// Slots of per-sequence state.
    pub slots: usize,
    /// Room of a list as it is attended with; at least `k`.
    pub room: usize,
    /// u32 `[n, rows_per_seq, room]`, out.
    pub indices: &'a Tensor,
    /// u32 `[n, rows_per_seq]`, out.
    pub counts: &'a Tensor,
}

impl HoldLists<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "hold_lists";
        self.seqs.check_decode(OP)?;
        let (n, rows, k) = (self.seqs.n, self.rows_per_seq, self.k);
        ensure(OP, k > 0 && self.room >= k, || format!("room for {} of {k} tokens", self.room))?;
        ensure(OP, self.fresh <= n, || format!("{} of {n} sequences are fresh", self.fresh))?;
        let ins = [("chosen", self.chosen), ("chosen counts", self.chosen_counts)];
        let outs = [
            ("held", self.held),
            ("marks", self.marks),
            ("indices", self.indices),
            ("counts", self.counts),
        ];
        for (name, t) in ins.iter().chain(&outs) {
            is(OP, name, t, DType::U32)?;
        }
        holds(OP, "chosen", self.chosen, &[self.fresh, rows, k])?;
        holds(OP, "chosen counts", self.chosen_counts, &[self.fresh, rows])?;
        holds(OP, "held", self.held, &[self.slots, rows, k])?;
        holds(OP, "marks", self.marks, &[self.slots, rows, HELD_WORDS])?;
        holds(OP, "indices", self.indices, &[n, rows, self.room])?;
        holds(OP, "counts", self.counts, &[n, rows])?;
        let [meta, pages] = self.seqs.named();
        apart(OP, &outs, &[ins[0], ins[1], meta, pages])
    }
}
