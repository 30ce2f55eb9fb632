//! Choosing key dimensions by the query.

use super::kv::{check_dims, check_head_dim};
use super::score::check_heads;
use super::{CompactSlice, KvPool, Seqs, apart, ensure, holds, is, key_stats_len};
use crate::backend::{DType, Result, Tensor};

/// u32 words of [`SelectDims::state`] per (slot, KV head).
pub const DIM_STATE_WORDS: usize = 4;
/// u32 words of [`SelectDims::changed`] per (slot, KV head): a bit mask over columns.
pub const CHANGED_WORDS: usize = 8;

/// Importance of a key dimension (docs/methods.md, SparCas). Sums run over the query heads of the KV head's group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DimMetric {
    /// `sum_h |q_{h,i}|`: the published rule.
    AbsQ,
    /// `sum_h sqrt(q_{h,2p}^2 + q_{h,2p+1}^2)` for both coordinates of pair `p`.
    PairNorm,
    /// `sum_h |q_{h,i}| * sigma_{k,i}` with the running deviation of the key coordinate.
    AbsQk,
    /// `sum_h n_{h,p} * (sigma_{k,p} + mean_{k,p})` with the pair norm's running deviation and mean.
    PairQk,
}

impl std::fmt::Display for DimMetric {
    /// The name in options.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&crate::names::option_name(self))
    }
}

impl DimMetric {
    /// Needs [`KeyStats`](super::KeyStats).
    pub const fn needs_stats(self) -> bool {
        matches!(self, DimMetric::AbsQk | DimMetric::PairQk)
    }
}

/// When the dimension set of a (sequence, KV head) is chosen anew (docs/methods.md, SparCas).
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refresh {
    /// At decode steps with `(step + phase) % every == 0` and at the first one. `every = 0`: first only.
    Every {
        /// U.
        every: u32,
        /// Stagger of the layer: `layer * U / layers`.
        phase: u32,
    },
    /// When coverage falls: `rho < beta * rho_best`, at least `min` and at most `max` steps after the last.
    Adaptive {
        /// beta, 0.9 by default.
        beta: f32,
        /// Fewest steps between two choices.
        min: u32,
        /// Most steps between two choices.
        max: u32,
    },
}

/// Chooses `n_dims` key dimensions per (sequence, KV head) from the current query (decode).
///
/// Importance `a_i` by `metric`; `unit` consecutive dimensions are summed and chosen together (1, or 2 for the
/// pair metrics, or groups of 8 or 16); the `n_dims / unit` best units, ties to the smaller index. Surviving
/// dimensions keep their columns, new ones fill the freed columns in ascending order (all columns ascending at
/// the first choice). `rho = sum_{i in D} a_i / sum a_i`, `rho_best` the same for a fresh choice; both are 1 when
/// every `a_i` is 0. [`Refresh::Adaptive`] compares the set held before the call; `coverage` reports the set held
/// after it (so a fresh choice gives rho = rho_best). Means and deviations are over `kv_len` keys,
/// `sigma = sqrt(max(0, mean of squares - squared mean))`.
///
/// State words: 0 = chosen before (1) or not (0); 1 = step of the last choice; 2 = choices so far;
/// 3 = dimensions replaced so far (the first choice replaces none). `changed` is rewritten each call: the columns
/// whose dimension changed (bit `c % 32` of word `c / 32`; all `n_dims` columns at the first choice, none where the
/// set was kept). Slots that no sequence of the call has are left alone. Steps since the last choice are
/// `meta.STEP - state[1]`, wrapping.
#[derive(Debug)]
pub struct SelectDims<'a> {
    /// act `[rows, heads, head_dim]`.
    pub q: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// f32 `[slots, kv_heads, key_stats_len(head_dim)]`, for the `*_qk` metrics.
    pub stats: Option<&'a Tensor>,
    /// u32 `[slots, kv_heads, n_dims]`, in and out.
    pub dims: &'a Tensor,
    /// u32 `[slots, kv_heads, DIM_STATE_WORDS]`, in and out.
    pub state: &'a Tensor,
    /// u32 `[slots, kv_heads, CHANGED_WORDS]`, out.
    pub changed: &'a Tensor,
    /// f32 `[slots, kv_heads, 2]`: rho and rho_best of this step's query, out.
    pub coverage: &'a Tensor,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Slots of per-sequence state.
    pub slots: usize,
    /// Dimensions to choose per KV head; a multiple of 8 and of `unit`.
    pub n_dims: usize,
    /// Consecutive dimensions chosen together: 1, 2, 8 or 16.
    pub unit: usize,
    /// Importance of a dimension.
    pub metric: DimMetric,
    /// When a set is chosen anew.
    pub refresh: Refresh,
}

impl SelectDims<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "select_dims";
        self.seqs.check_decode(OP)?;
        check_heads(OP, self.q, self.seqs.rows, self.heads, self.kv_heads, self.head_dim)?;
        check_head_dim(OP, self.head_dim)?;
        check_dims(OP, self.n_dims, self.head_dim)?;
        ensure(
            OP,
            matches!(self.unit, 1 | 2 | 8 | 16)
                && self.n_dims.is_multiple_of(self.unit)
                && self.head_dim.is_multiple_of(self.unit),
            || format!("unit {} of {} dimensions", self.unit, self.n_dims),
        )?;
        let pair = matches!(self.metric, DimMetric::PairNorm | DimMetric::PairQk);
        ensure(OP, !pair || self.unit >= 2, || "pair metrics choose units of 2 or more".into())?;
        is(OP, "dims", self.dims, DType::U32)?;
        is(OP, "state", self.state, DType::U32)?;
        is(OP, "changed", self.changed, DType::U32)?;
        is(OP, "coverage", self.coverage, DType::F32)?;
        let per = |n: usize| [self.slots, self.kv_heads, n];
        holds(OP, "dims", self.dims, &per(self.n_dims))?;
        holds(OP, "state", self.state, &per(DIM_STATE_WORDS))?;
        holds(OP, "changed", self.changed, &per(CHANGED_WORDS))?;
        holds(OP, "coverage", self.coverage, &per(2))?;
        let outs = [
            ("dims", self.dims),
            ("state", self.state),
            ("changed", self.changed),
            ("coverage", self.coverage),
        ];
        let [meta, pages] = self.seqs.named();
        apart(OP, &outs, &[("q", self.q), meta, pages])?;
        match self.stats {
            Some(s) => {
                is(OP, "stats", s, DType::F32)?;
                holds(OP, "stats", s, &per(key_stats_len(self.head_dim)))?;
                apart(OP, &outs, &[("stats", s)])
            }
            None => ensure(OP, !self.metric.needs_stats(), || "this metric needs stats".into()),
        }
    }
}

/// Rewrites the columns of the compact slice that [`SelectDims`] marked, for all `kv_len` tokens. Other columns and
/// rows are left alone.
#[derive(Debug)]
pub struct RebuildSlice<'a> {
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The layer's pages.
    pub cache: KvPool<'a>,
    /// The slice to rewrite.
    pub slice: CompactSlice<'a>,
    /// u32 `[slots, kv_heads, CHANGED_WORDS]`.
    pub changed: &'a Tensor,
}

impl RebuildSlice<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "rebuild_slice";
        self.seqs.check_decode(OP)?;
        self.cache.check(OP)?;
        self.slice.check(OP, &self.cache)?;
        self.seqs.check_room(OP, self.slice.capacity)?;
        is(OP, "changed", self.changed, DType::U32)?;
        let words = [self.slice.slots, self.cache.kv_heads, CHANGED_WORDS];
        holds(OP, "changed", self.changed, &words)?;
        let ([meta, pages], keys) = (self.seqs.named(), self.cache.named()[0]);
        let ins = [keys, ("dims", self.slice.dims), ("changed", self.changed), meta, pages];
        apart(OP, &[("slice", self.slice.data)], &ins)
    }
}
