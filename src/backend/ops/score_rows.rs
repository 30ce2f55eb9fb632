//! Scoring listed tokens on key dimensions.

use super::kv::check_dims;
use super::score::{check_heads, check_scores};
use super::{Among, HeadPool, KvPool, LogitScale, ScoreSource, Seqs, apart, ensure, is};
use crate::backend::{DType, Result, Tensor};

/// Partial logits of listed tokens: as [`ScoreDims`](super::ScoreDims), for the tokens of `among` instead of all.
///
/// Entry `i` of a list gets its score at column `i`. Query head `h` goes over list `h * lists / heads` of its
/// sequence. A token from `kv_len` on, and a score that is not finite, gives -infinity, so that
/// [`TopK`](super::TopK) never takes it; columns from the end of the list on are left alone.
///
/// Output rows per sequence: `kv_heads` when `pool.in_score()`, else `heads`, as in `ScoreDims`.
#[derive(Debug)]
pub struct ScoreRows<'a> {
    /// act `[rows, heads, head_dim]`.
    pub q: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The layer's pages.
    pub cache: KvPool<'a>,
    /// Which dimensions are read: `Lead` or `Gather`.
    pub source: ScoreSource<'a>,
    /// Query heads.
    pub heads: usize,
    /// How the query heads of a KV head share a score.
    pub pool: HeadPool,
    /// Scale of the partial logits.
    pub scale: LogitScale,
    /// The tokens: u32 `[n, lists, k]` and `[n, lists]`.
    pub among: Among<'a>,
    /// Lists of a sequence: 1, `kv_heads`, or `heads` where the pool leaves every head its own row.
    pub lists: usize,
    /// f32 `[n, rows_per_seq, stride]`, out.
    pub scores: &'a Tensor,
    /// At least `seqs.max_kv` and `among.k`; a multiple of 64.
    pub stride: usize,
}

impl ScoreRows<'_> {
    /// Score rows of each sequence.
    pub fn rows_per_seq(&self) -> usize {
        if self.pool.in_score() { self.cache.kv_heads } else { self.heads }
    }

    /// Parts of a sequence whose query heads share a KV head and a list: KV heads, or query heads with lists of
    /// their own.
    pub fn parts_per_seq(&self) -> usize {
        if self.lists > self.cache.kv_heads { self.heads } else { self.cache.kv_heads }
    }

    /// Dimensions read, and those listed for each slot and KV head where they are not the leading ones.
    pub fn dims(&self) -> (usize, Option<&Tensor>) {
        match &self.source {
            ScoreSource::Lead { n } | ScoreSource::Int8 { n, .. } => (*n, None),
            ScoreSource::Slice(s) => (s.n_dims, Some(s.dims)),
            ScoreSource::Quantised(s) => (s.n_dims, Some(s.dims)),
            ScoreSource::Gather { dims, n } => (*n, Some(dims)),
        }
    }

    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "score_rows";
        self.seqs.check_decode(OP)?;
        self.cache.check(OP)?;
        let (hkv, d) = (self.cache.kv_heads, self.cache.head_dim);
        check_heads(OP, self.q, self.seqs.rows, self.heads, hkv, d)?;
        let paged = matches!(self.source, ScoreSource::Lead { .. } | ScoreSource::Gather { .. });
        ensure(OP, paged, || "listed tokens are scored from the key pages only".into())?;
        let (n, dims) = self.dims();
        check_dims(OP, n, d)?;
        let out = [("scores", self.scores)];
        if let Some(dims) = dims {
            is(OP, "dims", dims, DType::U32)?;
            apart(OP, &out, &[("dims", dims)])?;
        }
        let own = self.lists == self.heads && !self.pool.in_score();
        ensure(OP, self.lists == 1 || self.lists == hkv || own, || {
            format!("{} lists a sequence for {hkv} KV heads and the pool {}", self.lists, self.pool)
        })?;
        self.among.check(OP, self.seqs.n, self.lists, self.stride)?;
        let ([meta, pages], keys) = (self.seqs.named(), self.cache.named()[0]);
        let [indices, counts] = self.among.named();
        apart(OP, &out, &[("q", self.q), keys, indices, counts, meta, pages])?;
        check_scores(OP, self.scores, self.seqs, self.rows_per_seq(), self.stride)
    }
}
