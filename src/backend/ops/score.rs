//! Scoring tokens on key dimensions, and exact top-k.

use super::kv::{check_dims, check_int8};
use super::{
    CompactSlice, Int8Keys, KvPool, Named, QuantisedSlice, Seqs, apart, ensure, float, holds, is,
};
use crate::backend::{DType, MAX_GROUP, PAGE, Result, Tensor};

/// Where [`ScoreDims`] reads the chosen dimensions of the keys.
#[derive(Debug, Clone, Copy)]
pub enum ScoreSource<'a> {
    /// The leading `n` dimensions of the K tiles (sorted keys). `n == head_dim` gives exact logits.
    Lead {
        /// Dimensions read; a multiple of 8.
        n: usize,
    },
    /// The leading `n` dimensions of the int8 copy.
    Int8 {
        /// The copy.
        keys: Int8Keys<'a>,
        /// Dimensions read; a multiple of 8, at most `keys.dims`.
        n: usize,
    },
    /// The compact slice of the sequence's slot.
    Slice(CompactSlice<'a>),
    /// The quantised slice of the sequence's slot.
    Quantised(QuantisedSlice<'a>),
    /// Listed dimensions, read from the K tiles themselves (query-chosen groups, U = 1).
    Gather {
        /// u32 `[slots, kv_heads, n]`.
        dims: &'a Tensor,
        /// Dimensions read; a multiple of 8.
        n: usize,
    },
}

/// How per-head partial logits become one score per KV head (docs/methods.md, SparCas).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadPool {
    /// Sum of the group's scaled logits.
    SumLogit,
    /// Largest of the group's scaled logits.
    MaxLogit,
    /// Largest probability of the group, softmax per query head over all tokens.
    MaxSoftmax,
    /// Mean probability of the group.
    MeanSoftmax,
    /// One selection for all heads: probabilities summed over every query head, softmax per query head.
    AllSoftmax,
    /// One selection for all heads: the largest probability of any query head, softmax per query head.
    AnySoftmax,
    /// One selection for all heads: the query heads' rankings of raw logits in turn, each token once
    /// ([`UnionRanks`](super::UnionRanks)).
    Union,
    /// One selection per query head.
    None,
}

impl std::fmt::Display for HeadPool {
    /// The name in options.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&crate::names::option_name(self))
    }
}

impl HeadPool {
    /// Can be pooled inside [`ScoreDims`]; the softmax modes need [`PoolScores`](super::PoolScores) after it.
    pub const fn in_score(self) -> bool {
        matches!(self, HeadPool::SumLogit | HeadPool::MaxLogit)
    }

    /// Pooled by [`PoolScores`](super::PoolScores), after a softmax per query head.
    pub const fn softmax(self) -> bool {
        matches!(
            self,
            HeadPool::MaxSoftmax
                | HeadPool::MeanSoftmax
                | HeadPool::AllSoftmax
                | HeadPool::AnySoftmax
        )
    }

    /// One selection for all heads.
    pub const fn shared(self) -> bool {
        matches!(self, HeadPool::AllSoftmax | HeadPool::AnySoftmax | HeadPool::Union)
    }

    /// Heads are pooled by the largest of them, else by their sum.
    pub const fn largest(self) -> bool {
        matches!(self, HeadPool::MaxLogit | HeadPool::MaxSoftmax | HeadPool::AnySoftmax)
    }

    /// Token lists of a sequence: one per KV head, one per query head, or one for all.
    pub const fn lists(self, heads: usize, kv_heads: usize) -> usize {
        match self {
            HeadPool::None => heads,
            _ if self.shared() => 1,
            _ => kv_heads,
        }
    }
}

/// Scale `c_h` of partial logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogitScale {
    /// `1 / sqrt(head_dim)`.
    InvSqrtDim,
    /// `1 / sqrt(head_dim * sum_{i in D} |q_i| / sum_i |q_i|)` (SparQ's coverage rule); 0 where the sum over D is 0.
    Coverage,
}

/// Partial logits of one decode query per sequence: `s_{h,j} = c_h * sum_{i in D} q_{h,i} K[j, i]`.
///
/// A score that is not finite (a key holding Inf or NaN) is written as -infinity, so that [`TopK`] never takes it.
///
/// Output rows per sequence: `kv_heads` when `pool.in_score()`, else `heads`. Row `j` of sequence `s` (its index
/// in `seqs`, not its slot) starts at `(s * rows_per_seq + j) * stride`; entries from `kv_len` on are left alone.
#[derive(Debug)]
pub struct ScoreDims<'a> {
    /// act `[rows, heads, head_dim]`.
    pub q: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The layer's pages.
    pub cache: KvPool<'a>,
    /// Which dimensions are read, and from where.
    pub source: ScoreSource<'a>,
    /// Query heads.
    pub heads: usize,
    /// How the query heads of a KV head share a score.
    pub pool: HeadPool,
    /// Scale of the partial logits.
    pub scale: LogitScale,
    /// f32 `[n, rows_per_seq, stride]`, out.
    pub scores: &'a Tensor,
    /// At least `seqs.max_kv`; a multiple of 64.
    pub stride: usize,
}

impl ScoreDims<'_> {
    /// Score rows of each sequence.
    pub fn rows_per_seq(&self) -> usize {
        if self.pool.in_score() { self.cache.kv_heads } else { self.heads }
    }

    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "score_dims";
        self.seqs.check_decode(OP)?;
        self.cache.check(OP)?;
        let (hkv, d) = (self.cache.kv_heads, self.cache.head_dim);
        check_heads(OP, self.q, self.seqs.rows, self.heads, hkv, d)?;
        let out = [("scores", self.scores)];
        let ([meta, pages], keys) = (self.seqs.named(), self.cache.named()[0]);
        apart(OP, &out, &[("q", self.q), keys, meta, pages])?;
        match &self.source {
            ScoreSource::Lead { n } => check_dims(OP, *n, d)?,
            ScoreSource::Int8 { keys, n } => {
                check_int8(OP, keys, &self.cache)?;
                check_dims(OP, *n, keys.dims)?;
                apart(OP, &out, &[("int8 keys", keys.data), ("int8 scales", keys.scale)])?;
            }
            ScoreSource::Slice(s) => {
                s.check(OP, &self.cache)?;
                ensure(OP, self.seqs.max_kv <= s.capacity, || "slice too small".into())?;
                apart(OP, &out, &[("slice", s.data), ("dims", s.dims)])?;
            }
            ScoreSource::Quantised(s) => {
                s.check(OP, &self.cache)?;
                ensure(OP, self.seqs.max_kv <= s.capacity, || "slice too small".into())?;
                let ins = [("slice", s.data), ("slice scales", s.scale), ("dims", s.dims)];
                apart(OP, &out, &ins)?;
            }
            ScoreSource::Gather { dims, n } => {
                is(OP, "dims", dims, DType::U32)?;
                check_dims(OP, *n, d)?;
                apart(OP, &out, &[("dims", dims)])?;
            }
        }
        check_scores(OP, self.scores, self.seqs, self.rows_per_seq(), self.stride)
    }
}

/// A share of a sequence's tokens: `max(at_least, floor(permille * kv_len / 1000))` (Kascade's k: 100 and 128).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Share {
    /// Tokens of each thousand.
    pub permille: u32,
    /// Least tokens.
    pub at_least: u32,
}

impl Share {
    /// Every token.
    pub const ALL: Share = Share { permille: 0, at_least: u32::MAX };

    /// Tokens of a sequence of `kv_len`; may be more than there are.
    pub fn of(self, kv_len: usize) -> usize {
        let share = kv_len as u64 * u64::from(self.permille) / 1000;
        (self.at_least as usize).max(usize::try_from(share).unwrap_or(usize::MAX))
    }
}

/// Candidate lists whose scores a row of [`TopK`] holds, in list order.
#[derive(Clone, Copy, Debug)]
pub struct Among<'a> {
    /// u32 `[n, rows_per_seq, k]`, ascending without duplicates.
    pub indices: &'a Tensor,
    /// u32 `[n, rows_per_seq]`; more than `k` counts as `k`.
    pub counts: &'a Tensor,
    /// Room of a list, at least 1.
    pub k: usize,
}

impl Among<'_> {
    /// Shapes and dtypes fit `rows` lists of each of `n` sequences, and score rows of `stride`.
    pub(crate) fn check(
        &self,
        op: &'static str,
        n: usize,
        rows: usize,
        stride: usize,
    ) -> Result<()> {
        ensure(op, stride >= self.k, || format!("stride {stride} for lists of {}", self.k))?;
        self.check_room(op, n, rows)
    }

    /// As [`Among::check`], whatever the scores are.
    pub(crate) fn check_room(&self, op: &'static str, n: usize, rows: usize) -> Result<()> {
        is(op, "listed indices", self.indices, DType::U32)?;
        is(op, "listed counts", self.counts, DType::U32)?;
        ensure(op, self.k > 0, || "lists without room".into())?;
        holds(op, "listed indices", self.indices, &[n, rows, self.k])?;
        holds(op, "listed counts", self.counts, &[n, rows])
    }

    /// The tensors, for [`apart`].
    pub(crate) fn named(&self) -> [Named<'_>; 2] {
        [("listed indices", self.indices), ("listed counts", self.counts)]
    }
}

/// The `k` largest scores per row, as ascending indices of tokens, blocks or candidates.
///
/// A row holds a score for each run of `unit` tokens, `ceil(kv_len / unit)` in all, and the results are their
/// numbers; or one for each candidate of `among`, and the results are the candidates themselves. Of a row
/// `min(k, share of its sequence)` are chosen. A sequence's query rows share its scores.
///
/// Exact and deterministic: the order is by (score descending, index ascending); -0 equals +0; NaN and
/// -infinity are never chosen. `counts` = chosen ones = min(that k, scores that may be chosen); entries of
/// `indices` from `counts` on are unspecified.
#[derive(Debug)]
pub struct TopK<'a> {
    /// f32 `[n, rows_per_seq, stride]`.
    pub scores: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// Score rows of a sequence.
    pub rows_per_seq: usize,
    /// Elements between score rows; at least the scores of the longest row, a multiple of 64.
    pub stride: usize,
    /// Tokens that a score stands for, at least 1; 1 with `among`.
    pub unit: usize,
    /// Most entries of a list; at least 1.
    pub k: usize,
    /// A row's own limit below `k`.
    pub share: Share,
    /// What the scores belong to, where it is not the sequence's tokens.
    pub among: Option<Among<'a>>,
    /// u32 `[n, rows_per_seq, k]`, out.
    pub indices: &'a Tensor,
    /// u32 `[n, rows_per_seq]`, out.
    pub counts: &'a Tensor,
}

impl TopK<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "top_k";
        self.seqs.check(OP)?;
        ensure(OP, self.k > 0, || "k must be positive".into())?;
        ensure(OP, self.unit == 1 || self.unit > 1 && self.among.is_none(), || {
            format!("{} tokens a score: at least 1, and 1 for candidates", self.unit)
        })?;
        ensure(OP, self.share.permille <= 1000, || {
            format!("a share of {} thousandths", self.share.permille)
        })?;
        let longest = self.among.map_or(self.seqs.max_kv.div_ceil(self.unit), |a| a.k);
        check_rows(OP, self.scores, self.seqs.n, longest, self.rows_per_seq, self.stride)?;
        is(OP, "indices", self.indices, DType::U32)?;
        is(OP, "counts", self.counts, DType::U32)?;
        let (n, rows) = (self.seqs.n, self.rows_per_seq);
        holds(OP, "indices", self.indices, &[n, rows, self.k])?;
        holds(OP, "counts", self.counts, &[n, rows])?;
        let [meta, pages] = self.seqs.named();
        let outs = [("indices", self.indices), ("counts", self.counts)];
        if let Some(a) = &self.among {
            a.check_room(OP, n, rows)?;
            apart(OP, &outs, &a.named())?;
        }
        apart(OP, &outs, &[("scores", self.scores), meta, pages])
    }
}

pub(super) fn check_scores(
    op: &'static str,
    t: &Tensor,
    s: Seqs<'_>,
    rows: usize,
    stride: usize,
) -> Result<()> {
    check_rows(op, t, s.n, s.max_kv, rows, stride)
}

fn check_rows(
    op: &'static str,
    t: &Tensor,
    n: usize,
    longest: usize,
    rows: usize,
    stride: usize,
) -> Result<()> {
    is(op, "scores", t, DType::F32)?;
    ensure(op, stride >= longest && stride.is_multiple_of(PAGE), || {
        format!("stride {stride} for {longest} scores: must cover them and be a multiple of 64")
    })?;
    holds(op, "scores", t, &[n, rows, stride])
}

pub(crate) fn check_heads(
    op: &'static str,
    q: &Tensor,
    rows: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
) -> Result<()> {
    float(op, "q", q)?;
    let whole = kv_heads > 0 && heads.is_multiple_of(kv_heads);
    ensure(op, whole && heads / kv_heads <= MAX_GROUP, || {
        format!("{heads} heads over {kv_heads} KV heads: groups of 1 to {MAX_GROUP}")
    })?;
    holds(op, "q", q, &[rows, heads, d])
}
