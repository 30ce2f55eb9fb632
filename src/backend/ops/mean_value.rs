//! The mean value in place of the tokens that were left out.

use super::score::{check_heads, check_scores};
use super::{Among, Seqs, apart, ensure, holds, is, key_stats_len};
use crate::backend::{DType, Result, Tensor};

/// SparQ's mean-value correction (arXiv 2312.04985): what the tokens that are not on a list would have
/// added is replaced by their estimated share of the attention times the mean of all values. Per query head, with
/// the estimated logits `s` of all tokens:
///
/// `alpha = sum_{j on the list} exp(s_j) / sum_{j < kv_len} exp(s_j)`, `out = alpha out + (1 - alpha) sum_v / kv_len`.
///
/// Query head `h` goes over list `h * lists / heads` of its sequence; listed tokens from `kv_len` on are skipped.
/// Logits of -infinity weigh nothing; where all of them are, `out` is left alone.
#[derive(Debug)]
pub struct MeanValue<'a> {
    /// f32 `[n, heads, stride]`: estimated logits, from [`ScoreDims`](super::ScoreDims) with
    /// [`HeadPool::None`](super::HeadPool::None).
    pub scores: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The tokens that were attended to: u32 `[n, lists, k]` and `[n, lists]`.
    pub listed: Among<'a>,
    /// Lists of a sequence: 1, `kv_heads` or `heads`.
    pub lists: usize,
    /// f32 `[slots, kv_heads, key_stats_len(head_dim)]`, of which the first `head_dim` are the sums of all values
    /// ([`KeyStats`](super::KeyStats) over the value pages).
    pub sums: &'a Tensor,
    /// Slots of per-sequence state.
    pub slots: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Elements between score rows; at least `seqs.max_kv`, a multiple of 64.
    pub stride: usize,
    /// act `[rows, heads, head_dim]`, in and out: attention over the listed tokens.
    pub out: &'a Tensor,
}

impl MeanValue<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "mean_value";
        self.seqs.check_decode(OP)?;
        let (hkv, d) = (self.kv_heads, self.head_dim);
        check_heads(OP, self.out, self.seqs.rows, self.heads, hkv, d)?;
        ensure(OP, [1, hkv, self.heads].contains(&self.lists), || {
            format!("{} lists a sequence for {} heads over {hkv}", self.lists, self.heads)
        })?;
        check_scores(OP, self.scores, self.seqs, self.heads, self.stride)?;
        self.listed.check(OP, self.seqs.n, self.lists, usize::MAX)?;
        is(OP, "sums", self.sums, DType::F32)?;
        holds(OP, "sums", self.sums, &[self.slots, hkv, key_stats_len(d)])?;
        let ([meta, pages], [indices, counts]) = (self.seqs.named(), self.listed.named());
        let ins = [("scores", self.scores), indices, counts, ("sums", self.sums), meta, pages];
        apart(OP, &[("out", self.out)], &ins)
    }
}
