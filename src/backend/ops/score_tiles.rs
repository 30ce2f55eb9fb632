//! Scores of keys for a tile of query rows.

use super::score::{check_heads, check_scores};
use super::{HeadPool, KvPool, Seqs, apart, ensure, holds, is};
use crate::backend::{DType, Result, Tensor};

/// Probabilities of the keys, summed over the rows of a tile and the query heads that share a list (Kascade's
/// post-softmax pooling in prefill): with `p_i` the position of row `i`,
/// `scores[s, list, j] = sum_{i < q_len} sum_{h in list} [j <= p_i] exp(scale * q_{i,h} . K[j] - lse_{i,h})`.
///
/// Each "sequence" is a tile: `q_len` rows that end at token `kv_len`. What a row gives to all tokens sums to 1 where
/// `lse` is that of [`AttendDense`](super::AttendDense). Row `list` of sequence `s` starts at
/// `(s * lists + list) * stride`; entries from `kv_len` on are left alone.
#[derive(Debug)]
pub struct ScoreTiles<'a> {
    /// act `[rows, heads, head_dim]`.
    pub q: &'a Tensor,
    /// f32 `[rows, heads]`, finite: natural log-sum-exp of each row's scaled logits.
    pub lse: &'a Tensor,
    /// The tiles.
    pub seqs: Seqs<'a>,
    /// The layer's pages; values are not read.
    pub cache: KvPool<'a>,
    /// Query heads.
    pub heads: usize,
    /// Logit scale.
    pub scale: f32,
    /// `MeanSoftmax` (a list per KV head) or `AllSoftmax` (one list).
    pub pool: HeadPool,
    /// f32 `[n, lists, stride]`, out.
    pub scores: &'a Tensor,
    /// At least `seqs.max_kv`; a multiple of 64.
    pub stride: usize,
}

impl ScoreTiles<'_> {
    /// Lists of a tile.
    pub fn lists(&self) -> usize {
        self.pool.lists(self.heads, self.cache.kv_heads)
    }

    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "score_tiles";
        self.seqs.check(OP)?;
        self.cache.check(OP)?;
        ensure(OP, matches!(self.pool, HeadPool::MeanSoftmax | HeadPool::AllSoftmax), || {
            format!("{}: probabilities of a tile are summed", self.pool)
        })?;
        let (rows, heads) = (self.seqs.rows, self.heads);
        check_heads(OP, self.q, rows, heads, self.cache.kv_heads, self.cache.head_dim)?;
        is(OP, "lse", self.lse, DType::F32)?;
        holds(OP, "lse", self.lse, &[rows, heads])?;
        let ([meta, pages], keys) = (self.seqs.named(), self.cache.named()[0]);
        let ins = [("q", self.q), ("lse", self.lse), keys, meta, pages];
        apart(OP, &[("scores", self.scores)], &ins)?;
        check_scores(OP, self.scores, self.seqs, self.lists(), self.stride)
    }
}
