//! Queries and keys on directions of their own.

use super::kv::{check_dims, check_head_dim};
use super::score::check_heads;
use super::{KvPool, Seqs, apart, holds, is};
use crate::backend::{DType, Result, Tensor};

/// Projects decode queries and the cached keys of their sequences on `n` directions per KV head (Loki, arXiv
/// 2406.02542: the leading principal components), so that [`ScoreDims`](super::ScoreDims) can score `n` numbers a
/// token from [`ScoreSource::Slice`](super::ScoreSource::Slice).
///
/// `out[row, h, i] = sum_j basis[kv, i, j] q[row, h, j]` for `i < n`, 0 for the other dimensions of the head.
/// `slice[slot, kv, t, i] = sum_j basis[kv, i, j] K[t, j]` for the tokens `done .. kv_len`, of which `done` then says
/// that they are there; rows below are left alone. A key that holds a number that is not finite gives a row that does.
#[derive(Debug)]
pub struct Project<'a> {
    /// act `[rows, heads, head_dim]`.
    pub q: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The layer's pages.
    pub cache: KvPool<'a>,
    /// f32 `[kv_heads, n, head_dim]`.
    pub basis: &'a Tensor,
    /// Directions of a KV head; a multiple of 8.
    pub n: usize,
    /// Query heads.
    pub heads: usize,
    /// f32 `[rows, heads, head_dim]`, out.
    pub out: &'a Tensor,
    /// kv dtype `[slots, kv_heads, capacity, n]`, out.
    pub slice: &'a Tensor,
    /// u32 `[slots, kv_heads]`: tokens whose rows are in the slice, in and out.
    pub done: &'a Tensor,
    /// Tokens a slot has room for.
    pub capacity: usize,
    /// Sequences that have a slice.
    pub slots: usize,
}

impl Project<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "project";
        self.seqs.check_decode(OP)?;
        self.cache.check(OP)?;
        let (hkv, d) = (self.cache.kv_heads, self.cache.head_dim);
        check_head_dim(OP, d)?;
        check_dims(OP, self.n, d)?;
        check_heads(OP, self.q, self.seqs.rows, self.heads, hkv, d)?;
        self.seqs.check_room(OP, self.capacity)?;
        is(OP, "basis", self.basis, DType::F32)?;
        is(OP, "out", self.out, DType::F32)?;
        is(OP, "slice", self.slice, self.cache.k.dtype())?;
        is(OP, "done", self.done, DType::U32)?;
        holds(OP, "basis", self.basis, &[hkv, self.n, d])?;
        holds(OP, "out", self.out, &[self.seqs.rows, self.heads, d])?;
        holds(OP, "slice", self.slice, &[self.slots, hkv, self.capacity, self.n])?;
        holds(OP, "done", self.done, &[self.slots, hkv])?;
        let outs = [("out", self.out), ("slice", self.slice), ("done", self.done)];
        let ([meta, pages], keys) = (self.seqs.named(), self.cache.named()[0]);
        apart(OP, &outs, &[("q", self.q), keys, ("basis", self.basis), meta, pages])
    }
}
