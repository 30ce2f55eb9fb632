//! Attention and the merge of its splits.

use super::score::check_heads;
use super::{HeadPool, KvPool, LogitScale, Named, ScoreDims, ScoreSource, Seqs};
use super::{apart, ensure, float, holds, is};
use crate::backend::{DType, Result, Tensor};

/// Where a decode attention leaves its logits, for those who choose tokens by them: as [`ScoreDims`] over all
/// dimensions would, which reads the keys once more.
#[derive(Debug, Clone, Copy)]
pub struct Logits<'a> {
    /// f32 `[n, rows_per_seq, stride]`, see [`ScoreDims::scores`].
    pub scores: &'a Tensor,
    /// At least `seqs.max_kv`; a multiple of 64.
    pub stride: usize,
    /// How the query heads of a KV head share a score.
    pub pool: HeadPool,
}

/// Causal softmax attention of every row over its sequence's cached tokens.
///
/// Row at position `p` attends to `j <= p`, and to `j > p - window` where a window is set:
/// `out = sum_j softmax_j(scale * q . K[j]) V[j]`, `lse = log sum_j exp(scale * q . K[j])`.
///
/// With `splits > 1` the keys are cut into that many contiguous ranges (page aligned; which ranges is the
/// backend's choice): `out` is then f32 `[splits, rows, heads, head_dim]` of per-split results and `lse`
/// (required) f32 `[splits, rows, heads]`, -infinity where a split is empty (its `out` is then ignored by
/// [`Merge`], but finite). Rows outside the group's sequences are left alone, in every split. With `splits == 1`
/// the layout is that of the final result. `lse` is a natural logarithm.
///
/// Values of a sequence's tokens are finite: one that a row does not see (a later row's, or before its window) may be
/// multiplied by a weight of 0, and that row's `out` is unspecified where the value is not finite. What lies behind
/// `kv_len` reaches nothing.
#[derive(Debug)]
pub struct AttendDense<'a> {
    /// act `[rows, heads, head_dim]`.
    pub q: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The layer's pages.
    pub cache: KvPool<'a>,
    /// Query heads.
    pub heads: usize,
    /// Logit scale, `1 / sqrt(head_dim)` in all supported models.
    pub scale: f32,
    /// Sliding window in tokens.
    pub window: Option<usize>,
    /// Ranges that the keys are cut into, at least 1.
    pub splits: usize,
    /// act or f32 `[rows, heads, head_dim]`, or f32 partials.
    pub out: &'a Tensor,
    /// f32 `[rows, heads]`, or partials.
    pub lse: Option<&'a Tensor>,
    /// `out` is wanted. Without it only `lse` is, and what lies in `out` afterwards is unspecified.
    pub values: bool,
    /// The logits are wanted too: in decode, without a window, with a `scale` of `1 / sqrt(head_dim)`.
    pub logits: Option<Logits<'a>>,
}

impl<'a> AttendDense<'a> {
    /// What fills `logits` where attention itself does not.
    pub fn scoring(&self) -> Option<ScoreDims<'a>> {
        let Logits { scores, stride, pool } = self.logits?;
        Some(ScoreDims {
            q: self.q,
            seqs: self.seqs,
            cache: self.cache,
            source: ScoreSource::Lead { n: self.cache.head_dim },
            heads: self.heads,
            pool,
            scale: LogitScale::InvSqrtDim,
            scores,
            stride,
        })
    }

    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "attend_dense";
        self.seqs.check(OP)?;
        self.cache.check(OP)?;
        let d = self.cache.head_dim;
        check_heads(OP, self.q, self.seqs.rows, self.heads, self.cache.kv_heads, d)?;
        ensure(OP, self.window != Some(0), || "a window holds at least one token".into())?;
        ensure(OP, self.values || self.lse.is_some(), || "neither out nor lse is wanted".into())?;
        let shape = [self.splits, self.seqs.rows, self.heads, d];
        let ([k, v], [meta, pages]) = (self.cache.named(), self.seqs.named());
        check_out(OP, self.out, self.lse, shape, &[("q", self.q), k, v, meta, pages])?;
        let Some(scoring) = self.scoring() else { return Ok(()) };
        ensure(OP, self.window.is_none(), || "logits of a window".into())?;
        let whole = 1.0 / (d as f32).sqrt();
        ensure(OP, self.scale == whole, || format!("logits at a scale of {}", self.scale))?;
        let lse = ("lse", self.lse.unwrap_or(self.out));
        apart(OP, &[("logits", scoring.scores)], &[("out", self.out), lse, v])?;
        scoring.check()
    }
}

/// Causal attention over listed tokens: as [`AttendDense`] with `j` running over
/// `indices[s, row, ..counts[s, row]]`, where `row` is the KV head (or the query head, see `rows_per_seq`).
/// The rows of a sequence (one in decode, a tile in prefill) share its lists.
///
/// Lists hold no duplicates and, where a sequence has more than one row, are ascending ([`TopK`](super::TopK) makes
/// them so): the last token of a tile decides whether all rows see all of it. An index beyond a row's position is
/// skipped by that row. A row that is left without tokens gets zeros and `lse = -infinity`. With `splits > 1` the list
/// is cut into contiguous pieces, which ones is the backend's choice.
///
/// With a `head_map` the query heads of KV head `h` share list `head_map[h]`, so that one layer can attend with the
/// lists of another. The map is data on the device: an entry from `rows_per_seq` on stands for an empty list.
#[derive(Debug)]
pub struct AttendRows<'a> {
    /// act `[rows, heads, head_dim]`.
    pub q: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The layer's pages.
    pub cache: KvPool<'a>,
    /// Query heads.
    pub heads: usize,
    /// Logit scale.
    pub scale: f32,
    /// u32 `[n, rows_per_seq, k]`.
    pub indices: &'a Tensor,
    /// u32 `[n, rows_per_seq]`.
    pub counts: &'a Tensor,
    /// Room of a list, in tokens.
    pub k: usize,
    /// Lists of a sequence: `kv_heads` (one list for a GQA group) or `heads`; any number of them with a `head_map`.
    pub rows_per_seq: usize,
    /// u32 `[kv_heads]`, the list of each KV head. None: lists are in head order.
    pub head_map: Option<&'a Tensor>,
    /// Lists, their counts and `head_map` were written before the op right before this one, so that a backend may read
    /// them while that op still runs. `false` is always right.
    pub settled: bool,
    /// Pieces that each list is cut into, at least 1.
    pub splits: usize,
    /// act or f32 `[rows, heads, head_dim]`, or f32 partials `[splits, rows, heads, head_dim]`.
    pub out: &'a Tensor,
    /// f32 `[rows, heads]`, or partials `[splits, rows, heads]`.
    pub lse: Option<&'a Tensor>,
}

impl AttendRows<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "attend_rows";
        self.seqs.check(OP)?;
        self.cache.check(OP)?;
        let d = self.cache.head_dim;
        check_heads(OP, self.q, self.seqs.rows, self.heads, self.cache.kv_heads, d)?;
        let r = self.rows_per_seq;
        match self.head_map {
            None => ensure(OP, r == self.cache.kv_heads || r == self.heads, || {
                format!("{r} lists a sequence: one per KV head or one per query head")
            })?,
            Some(map) => {
                ensure(OP, r > 0, || "a map into no lists".into())?;
                is(OP, "head_map", map, DType::U32)?;
                holds(OP, "head_map", map, &[self.cache.kv_heads])?;
            }
        }
        is(OP, "indices", self.indices, DType::U32)?;
        is(OP, "counts", self.counts, DType::U32)?;
        holds(OP, "indices", self.indices, &[self.seqs.n, r, self.k])?;
        holds(OP, "counts", self.counts, &[self.seqs.n, r])?;
        let shape = [self.splits, self.seqs.rows, self.heads, d];
        let ([k, v], [meta, pages]) = (self.cache.named(), self.seqs.named());
        let lists = [("indices", self.indices), ("counts", self.counts)];
        // Without a map this names the counts twice, which changes nothing.
        let map = ("head_map", self.head_map.unwrap_or(self.counts));
        let ins = [("q", self.q), k, v, lists[0], lists[1], map, meta, pages];
        check_out(OP, self.out, self.lse, shape, &ins)
    }

    /// Parts of a sequence that have a list each: KV heads, or query heads with lists of their own.
    pub fn parts_per_seq(&self) -> usize {
        if self.head_map.is_some() { self.cache.kv_heads } else { self.rows_per_seq }
    }
}

/// Merges split results: with `m = max_s lse_s`, `w_s = exp(lse_s - m)`,
/// `out = sum_s w_s part_s / sum_s w_s`, `lse = m + log sum_s w_s`; zeros and -infinity when all are empty.
/// Only rows of the group's sequences are written. `splits == 1` converts.
#[derive(Debug)]
pub struct Merge<'a> {
    /// f32 `[splits, rows, heads, head_dim]`.
    pub part: &'a Tensor,
    /// f32 `[splits, rows, heads]`.
    pub part_lse: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// Results to merge for each row, at least 1.
    pub splits: usize,
    /// Query heads.
    pub heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// act or f32 `[rows, heads, head_dim]`.
    pub out: &'a Tensor,
    /// f32 `[rows, heads]`.
    pub lse: Option<&'a Tensor>,
}

impl Merge<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "merge";
        self.seqs.check(OP)?;
        let (splits, rows, heads) = (self.splits, self.seqs.rows, self.heads);
        is(OP, "part", self.part, DType::F32)?;
        is(OP, "part_lse", self.part_lse, DType::F32)?;
        holds(OP, "part", self.part, &[splits, rows, heads, self.head_dim])?;
        holds(OP, "part_lse", self.part_lse, &[splits, rows, heads])?;
        let [meta, pages] = self.seqs.named();
        let ins = [("part", self.part), ("part_lse", self.part_lse), meta, pages];
        check_out(OP, self.out, self.lse, [1, rows, heads, self.head_dim], &ins)
    }
}

/// `shape`: splits, rows, heads, head_dim.
fn check_out(
    op: &'static str,
    out: &Tensor,
    lse: Option<&Tensor>,
    shape: [usize; 4],
    ins: &[Named<'_>],
) -> Result<()> {
    let splits = shape[0];
    ensure(op, splits >= 1, || "splits must be at least 1".into())?;
    float(op, "out", out)?;
    ensure(op, splits == 1 || (out.dtype() == DType::F32 && lse.is_some()), || {
        "split results are f32 and need lse".into()
    })?;
    holds(op, "out", out, &shape)?;
    match lse {
        Some(l) => {
            is(op, "lse", l, DType::F32)?;
            holds(op, "lse", l, &shape[..3])?;
            apart(op, &[("out", out), ("lse", l)], ins)
        }
        None => apart(op, &[("out", out)], ins),
    }
}
