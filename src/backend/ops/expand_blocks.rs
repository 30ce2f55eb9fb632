//! Blocks turned into the tokens that they hold.

use super::blocks::check_unit;
use super::{Seqs, apart, ensure, holds, is};
use crate::backend::{DType, Result, Tensor};

/// The tokens of listed blocks: `indices[i] = blocks[i / unit] * unit + i % unit`, cut at `kv_len`.
///
/// Block lists are those of [`TopK`](super::TopK) with this `unit`: ascending, without duplicates, below
/// `ceil(kv_len / unit)`. So the token lists are ascending too; entries from `counts` on are unspecified.
#[derive(Debug)]
pub struct ExpandBlocks<'a> {
    /// u32 `[n, rows_per_seq, k]`.
    pub blocks: &'a Tensor,
    /// u32 `[n, rows_per_seq]`.
    pub block_counts: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// Lists of a sequence.
    pub rows_per_seq: usize,
    /// Most blocks of a list.
    pub k: usize,
    /// Tokens of a block.
    pub unit: usize,
    /// u32 `[n, rows_per_seq, k * unit]`, out.
    pub indices: &'a Tensor,
    /// u32 `[n, rows_per_seq]`, out: tokens.
    pub counts: &'a Tensor,
}

impl ExpandBlocks<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "expand_blocks";
        self.seqs.check_decode(OP)?;
        check_unit(OP, self.unit)?;
        ensure(OP, self.k > 0, || "k must be positive".into())?;
        let (n, rows) = (self.seqs.n, self.rows_per_seq);
        let lists = [("blocks", self.blocks), ("block counts", self.block_counts)];
        let outs = [("indices", self.indices), ("counts", self.counts)];
        for (name, t) in lists.iter().chain(&outs) {
            is(OP, name, t, DType::U32)?;
        }
        holds(OP, "blocks", self.blocks, &[n, rows, self.k])?;
        holds(OP, "block counts", self.block_counts, &[n, rows])?;
        holds(OP, "indices", self.indices, &[n, rows, self.k, self.unit])?;
        holds(OP, "counts", self.counts, &[n, rows])?;
        let [meta, pages] = self.seqs.named();
        apart(OP, &outs, &[lists[0], lists[1], meta, pages])
    }
}
