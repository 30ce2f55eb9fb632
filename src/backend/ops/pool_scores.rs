//! Pooling the scores of query heads.

use super::score::check_scores;
use super::{HeadPool, ScoreDims, Seqs, apart, ensure, holds, is};
use crate::backend::{DType, Result, Tensor};

/// Pools per-query-head logits over the GQA group after a softmax per head, in the log domain:
/// `MaxSoftmax`: `out_j = max_h (s_{h,j} - lse_h)`; `MeanSoftmax`: `out_j = log sum_h exp(s_{h,j} - lse_h)`;
/// `AllSoftmax` and `AnySoftmax`: the same sum, and the same largest value, over all query heads, one row per
/// sequence. `SumLogit` and `MaxLogit` pool the logits themselves, as [`ScoreDims`](super::ScoreDims) would: for
/// those who need the logits of every head as well.
///
/// The softmax modes are monotone in the pooled probability, so the top-k is the same and far tokens do not underflow into ties (use a
/// log-sum-exp around the largest term). An entry of -infinity in all heads of the group (for `SumLogit` in any)
/// stays -infinity. Entries
/// from `kv_len` on are neither read nor written; with `lengths`, those from `lengths[s, row]` on, `row` being the
/// output row (more than `stride` counts as `stride`).
#[derive(Debug)]
pub struct PoolScores<'a> {
    /// f32 `[n, heads, stride]`.
    pub scores: &'a Tensor,
    /// f32 `[n, rows, stride]`, out; `rows` = `kv_heads`, or 1 for the modes of all heads.
    pub out: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements between score rows; at least `seqs.max_kv`, a multiple of 64.
    pub stride: usize,
    /// Any but `None` and `Union`.
    pub pool: HeadPool,
    /// u32 `[n, rows]`: how many scores a row holds, where they are those of listed tokens
    /// ([`ScoreRows`](super::ScoreRows)).
    pub lengths: Option<&'a Tensor>,
}

impl PoolScores<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "pool_scores";
        self.seqs.check_decode(OP)?;
        ensure(OP, !matches!(self.pool, HeadPool::None | HeadPool::Union), || {
            format!("{} pools no logits", self.pool)
        })?;
        ensure(OP, self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), || {
            format!("{} heads over {} KV heads", self.heads, self.kv_heads)
        })?;
        check_scores(OP, self.scores, self.seqs, self.heads, self.stride)?;
        let [meta, pages] = self.seqs.named();
        apart(OP, &[("out", self.out)], &[("scores", self.scores), meta, pages])?;
        if let Some(lengths) = self.lengths {
            is(OP, "lengths", lengths, DType::U32)?;
            holds(OP, "lengths", lengths, &[self.seqs.n, self.rows_per_seq()])?;
            apart(OP, &[("out", self.out)], &[("lengths", lengths)])?;
        }
        check_scores(OP, self.out, self.seqs, self.rows_per_seq(), self.stride)
    }

    /// Output rows of a sequence.
    pub fn rows_per_seq(&self) -> usize {
        self.pool.lists(self.heads, self.kv_heads)
    }

    /// Most scores of a row.
    pub fn longest(&self) -> usize {
        if self.lengths.is_some() { self.stride } else { self.seqs.max_kv }
    }
}

/// What [`Backend::score_pool`](crate::backend::Backend::score_pool) takes: the logits of every head, and their pooling.
pub(crate) fn check_score_pool(score: &ScoreDims<'_>, pool: &PoolScores<'_>) -> Result<()> {
    const OP: &str = "score_pool";
    score.check()?;
    pool.check()?;
    ensure(OP, score.scores.same_place(pool.scores), || {
        "score_dims and pool_scores of different scores".into()
    })?;
    ensure(OP, score.pool == HeadPool::None && pool.lengths.is_none(), || {
        "logits of every head and token are pooled".into()
    })?;
    let shapes = [
        (score.seqs.n, score.heads, score.cache.kv_heads, score.stride),
        (pool.seqs.n, pool.heads, pool.kv_heads, pool.stride),
    ];
    ensure(OP, shapes[0] == shapes[1], || {
        format!("sequences, heads and strides {shapes:?} differ")
    })?;
    let seqs = score.seqs.meta.same_place(pool.seqs.meta) && score.seqs.max_kv == pool.seqs.max_kv;
    ensure(OP, seqs, || "score_dims and pool_scores of different sequences".into())?;
    apart(OP, &[("out", pool.out)], &[("q", score.q), score.cache.named()[0]])
}
