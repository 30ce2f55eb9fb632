//! Blocks that were chosen once and are to be chosen again.

use super::blocks::{check_rows, check_unit};
use super::{Among, Seqs, apart};
use crate::backend::{Result, Tensor};

/// Sets the scores of listed blocks to +infinity, in place: what one choice took, the next one (by other scores) takes
/// first. All other scores are left alone, and so are listed blocks that start at `kv_len` or behind.
#[derive(Debug)]
pub struct ForceBlocks<'a> {
    /// f32 `[n, rows_per_seq, stride]`, in and out.
    pub scores: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// Score rows, and lists, of a sequence.
    pub rows_per_seq: usize,
    /// Elements between score rows: at least the blocks of `seqs.max_kv` tokens.
    pub stride: usize,
    /// Tokens of a block.
    pub unit: usize,
    /// The blocks.
    pub listed: Among<'a>,
}

impl ForceBlocks<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "force_blocks";
        self.seqs.check_decode(OP)?;
        check_unit(OP, self.unit)?;
        let (rows, stride) = (self.rows_per_seq, self.stride);
        check_rows(OP, "scores", self.scores, self.seqs, rows, stride, self.unit)?;
        self.listed.check_room(OP, self.seqs.n, rows)?;
        let [meta, pages] = self.seqs.named();
        let [indices, counts] = self.listed.named();
        apart(OP, &[("scores", self.scores)], &[indices, counts, meta, pages])
    }
}
