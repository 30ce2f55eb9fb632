//! Selection by blocks of tokens: summaries of runs of keys, their scores, scores of blocks, and the tokens of
//! chosen blocks.

use super::kv::check_head_dim;
use super::score::check_heads;
use super::{HeadPool, KvPool, Seqs, apart, ensure, holds, is};
use crate::backend::{DType, PAGE, Result, Tensor};

/// What stands for a run of keys. Keys are those of the pages: after the rotary embedding, rounded to the kv dtype.
///
/// Summary `g` of a sequence belongs to tokens `g * run .. (g + 1) * run` and is stored with the page that holds
/// them, so sequences that share a full page share its summaries too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum SummaryKind {
    /// Element-wise smallest and largest key of the run (Quest, arXiv 2406.10774, section 3.3).
    Bounds {
        /// Tokens of a run: 16, 32 or 64.
        page: usize,
    },
    /// `c - r` and `c + r`, with `c` the middle between the smallest and the largest key of the run and `r` the mean
    /// of `|key - c|`, all element-wise: the cuboid of means (ArkVale, NeurIPS 2024).
    Cuboid {
        /// Tokens of a run: 16, 32 or 64.
        page: usize,
    },
    /// Mean of the `size` keys that end with the run of `stride` tokens; complete windows only (InfLLM-V2, arXiv
    /// 2509.24663). Window `j` of the paper (`stride * j .. stride * j + size`) is summary `j + size / stride - 1`.
    Windows {
        /// Tokens of a window: a multiple of `stride`, at most 64.
        size: usize,
        /// Tokens between windows: 16, 32 or 64.
        stride: usize,
    },
}

impl std::fmt::Display for SummaryKind {
    /// In words.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bounds { page } => write!(f, "bounds of {page} keys"),
            Self::Cuboid { page } => write!(f, "cuboids of {page} keys"),
            Self::Windows { size, stride } => write!(f, "means of {size} keys every {stride}"),
        }
    }
}

impl SummaryKind {
    /// Tokens from one summary to the next.
    pub const fn run(self) -> usize {
        match self {
            SummaryKind::Bounds { page } | SummaryKind::Cuboid { page } => page,
            SummaryKind::Windows { stride, .. } => stride,
        }
    }

    /// Tokens that a summary covers before its own run.
    pub const fn before(self) -> usize {
        match self {
            SummaryKind::Windows { size, stride } => size.saturating_sub(stride),
            _ => 0,
        }
    }

    /// Vectors of `head_dim` numbers that a summary holds.
    pub const fn vectors(self) -> usize {
        match self {
            SummaryKind::Windows { .. } => 1,
            _ => 2,
        }
    }

    /// Summaries of one KV page; the kind is sound ([`SummaryKind::is_sound`]).
    pub const fn per_page(self) -> usize {
        PAGE / self.run()
    }

    /// Numbers of one (page, KV head): `[per_page, vectors, head_dim]`.
    pub const fn page_len(self, head_dim: usize) -> usize {
        self.per_page() * self.vectors() * head_dim
    }

    /// Summaries of a sequence of `kv_len` tokens, those that do not exist included.
    pub const fn count(self, kv_len: usize) -> usize {
        kv_len.div_ceil(self.run())
    }

    /// Whether summary `g` of a sequence of `kv_len` tokens exists: bounds do from their first token on, windows when
    /// they are complete.
    pub const fn exists(self, g: usize, kv_len: usize) -> bool {
        match self {
            SummaryKind::Windows { size, stride } => {
                (g + 1) * stride >= size && (g + 1) * stride <= kv_len
            }
            _ => g * self.run() < kv_len,
        }
    }

    /// Its sizes fit pages of 64 tokens.
    pub const fn is_sound(self) -> bool {
        let run = matches!(self.run(), 16 | 32 | 64);
        match self {
            SummaryKind::Windows { size, stride } => {
                run && size >= stride && size <= PAGE && size.is_multiple_of(stride)
            }
            _ => run,
        }
    }
}

/// The summaries of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Summaries<'a> {
    /// kv dtype `[n_pages, kv_heads, per_page, vectors, head_dim]`.
    pub data: &'a Tensor,
    /// What they are.
    pub kind: SummaryKind,
}

fn check_kind(op: &'static str, kind: SummaryKind) -> Result<()> {
    ensure(op, kind.is_sound(), || format!("{kind} do not fit pages of 64 tokens"))
}

/// Makes the summaries that the step's new keys complete or change, from the pages (after
/// [`KvAppend`](super::KvAppend)): bounds of every run that holds a new token, windows whose last token is new.
/// All other entries are left alone. Arithmetic in f32; a run that holds a key that is not finite has unspecified
/// entries.
#[derive(Debug)]
pub struct KvSummaries<'a> {
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The layer's pages.
    pub cache: KvPool<'a>,
    /// The summaries, out.
    pub summaries: Summaries<'a>,
}

impl KvSummaries<'_> {
    /// Most summaries that one sequence writes.
    pub fn most_written(&self) -> usize {
        self.seqs.max_q.div_ceil(self.summaries.kind.run()) + 1
    }

    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "kv_summaries";
        self.seqs.check(OP)?;
        self.cache.check(OP)?;
        let (s, c) = (&self.summaries, &self.cache);
        check_kind(OP, s.kind)?;
        is(OP, "summaries", s.data, c.k.dtype())?;
        holds(OP, "summaries", s.data, &[c.n_pages, c.kv_heads, s.kind.page_len(c.head_dim)])?;
        let [meta, pages] = self.seqs.named();
        apart(OP, &[("summaries", s.data)], &[c.named()[0], meta, pages])
    }
}

/// Logits of a decode query against the summaries of its sequence, per query head:
/// windows: `scale * q . mean`; bounds and cuboids: `scale * sum_i max(q_i lo_i, q_i hi_i)`, which for bounds is at
/// least every `scale * q . k` of the run. The products are those of `dims` dimensions from dimension `from` on.
///
/// A summary that does not exist, and a logit that is not finite, gives -infinity; one that holds a number that is
/// not finite may give that too. Row `h` of sequence `s` starts at
/// `(s * heads + h) * stride`; entries from [`SummaryKind::count`] of its `kv_len` on are left alone.
#[derive(Debug)]
pub struct ScoreSummaries<'a> {
    /// act `[rows, heads, head_dim]`.
    pub q: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The layer's summaries.
    pub summaries: Summaries<'a>,
    /// Pages of the pool.
    pub n_pages: usize,
    /// Query heads: those of the model, or one per KV head (Forecast).
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// First dimension that counts; a multiple of 8.
    pub from: usize,
    /// Dimensions that count; a multiple of 8.
    pub dims: usize,
    /// Logit scale.
    pub scale: f32,
    /// f32 `[n, heads, stride]`, out.
    pub scores: &'a Tensor,
    /// At least the summaries of `seqs.max_kv` tokens.
    pub stride: usize,
}

impl ScoreSummaries<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "score_summaries";
        self.seqs.check_decode(OP)?;
        let (s, hkv, d) = (&self.summaries, self.kv_heads, self.head_dim);
        check_kind(OP, s.kind)?;
        check_head_dim(OP, d)?;
        let (from, dims) = (self.from, self.dims);
        let fits = dims > 0 && from.checked_add(dims).is_some_and(|end| end <= d);
        ensure(OP, fits && from.is_multiple_of(8) && dims.is_multiple_of(8), || {
            format!("{dims} dimensions of {d} from {from} on: must be multiples of 8")
        })?;
        check_heads(OP, self.q, self.seqs.rows, self.heads, hkv, d)?;
        ensure(OP, s.data.dtype().is_float(), || format!("summaries of {}", s.data.dtype()))?;
        holds(OP, "summaries", s.data, &[self.n_pages, hkv, s.kind.page_len(d)])?;
        check_rows(OP, "scores", self.scores, self.seqs, self.heads, self.stride, s.kind.run())?;
        let [meta, pages] = self.seqs.named();
        apart(OP, &[("scores", self.scores)], &[("q", self.q), ("summaries", s.data), meta, pages])
    }
}

/// Scores of blocks of `unit` tokens from scores of summaries.
///
/// First the heads of a KV head are pooled, summary by summary: [`HeadPool::SumLogit`] and [`HeadPool::MaxLogit`] as
/// in [`ScoreDims`](super::ScoreDims), [`HeadPool::MaxSoftmax`] and [`HeadPool::MeanSoftmax`] as in
/// [`PoolScores`](super::PoolScores) (in the log domain, softmax over the summaries; the mean orders like the sum of
/// probabilities of InfLLM-V2), [`HeadPool::None`] keeps a row per query head. Then block `b` gets the largest value
/// of the summaries that share a token with it, `g` in `unit / run * b ..= unit / run * (b + 1) - 1 + before / run`
/// as far as the sequence has them: for windows of 32 every 16 tokens and blocks of 64 the five that overlap it.
/// Last, blocks that hold one of the first `sinks` or of the last `recent` tokens are set to +infinity.
///
/// A row holds `ceil(kv_len / unit)` blocks, so none starts behind the query; further entries are left alone.
#[derive(Debug)]
pub struct PoolBlocks<'a> {
    /// f32 `[n, heads, stride]`, from [`ScoreSummaries`].
    pub scores: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// What the scores stand for.
    pub kind: SummaryKind,
    /// Score rows of a sequence.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// How the heads of a KV head share a score.
    pub pool: HeadPool,
    /// Elements between score rows.
    pub stride: usize,
    /// Tokens of a block: a multiple of the kind's run that divides 64.
    pub unit: usize,
    /// First tokens whose blocks are forced.
    pub sinks: usize,
    /// Last tokens whose blocks are forced, the newest included; may be 0.
    pub recent: usize,
    /// f32 `[n, rows_per_seq, block_stride]`, out.
    pub out: &'a Tensor,
    /// Elements between block rows: at least the blocks of `seqs.max_kv` tokens.
    pub block_stride: usize,
}

impl PoolBlocks<'_> {
    /// Block rows of each sequence.
    pub fn rows_per_seq(&self) -> usize {
        if self.pool == HeadPool::None { self.heads } else { self.kv_heads }
    }

    /// Summaries of a block's own tokens, and how many more reach into it from behind.
    pub fn spread(&self) -> (usize, usize) {
        let run = self.kind.run();
        (self.unit / run, self.kind.before() / run)
    }

    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "pool_blocks";
        self.seqs.check_decode(OP)?;
        check_kind(OP, self.kind)?;
        let run = self.kind.run();
        check_unit(OP, self.unit)?;
        ensure(OP, self.unit.is_multiple_of(run), || {
            format!("blocks of {} tokens from summaries of {run}", self.unit)
        })?;
        ensure(OP, self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), || {
            format!("{} heads over {} KV heads", self.heads, self.kv_heads)
        })?;
        let known = matches!(
            self.pool,
            HeadPool::None
                | HeadPool::SumLogit
                | HeadPool::MaxLogit
                | HeadPool::MaxSoftmax
                | HeadPool::MeanSoftmax
        );
        ensure(OP, known, || format!("blocks are not pooled by {}", self.pool))?;
        check_rows(OP, "scores", self.scores, self.seqs, self.heads, self.stride, run)?;
        let rows = self.rows_per_seq();
        check_rows(OP, "out", self.out, self.seqs, rows, self.block_stride, self.unit)?;
        let [meta, pages] = self.seqs.named();
        apart(OP, &[("out", self.out)], &[("scores", self.scores), meta, pages])
    }
}

pub(super) fn check_unit(op: &'static str, unit: usize) -> Result<()> {
    ensure(op, matches!(unit, 16 | 32 | 64), || format!("blocks of {unit} tokens: 16, 32 or 64"))
}

pub(super) fn check_rows(
    op: &'static str,
    name: &'static str,
    t: &Tensor,
    s: Seqs<'_>,
    rows: usize,
    stride: usize,
    run: usize,
) -> Result<()> {
    is(op, name, t, DType::F32)?;
    ensure(op, stride >= s.max_kv.div_ceil(run), || {
        format!("{name}: a stride of {stride} for {} tokens, {run} a number", s.max_kv)
    })?;
    holds(op, name, t, &[s.n, rows, stride])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows of 32 tokens every 16: window `j` of the paper is stored as summary `j + 1`.
    #[test]
    fn windows_exist_when_they_are_complete_and_lie_with_their_last_token() {
        let kind = SummaryKind::Windows { size: 32, stride: 16 };
        assert!(kind.is_sound());
        // A query at position 30 sees no window, one at 31 sees the first.
        assert!((0..kind.count(31)).all(|g| !kind.exists(g, 31)));
        let there = |kv_len| (0..kind.count(kv_len)).filter(|g| kind.exists(*g, kv_len)).count();
        assert_eq!([there(32), there(47), there(48), there(64), there(65)], [1, 1, 2, 3, 3]);
        for kv_len in 1..300 {
            let paper = if kv_len < 32 { 0 } else { (kv_len - 32) / 16 + 1 };
            assert_eq!(there(kv_len), paper, "{kv_len}");
        }
        // The tokens of page 1 complete windows 3 to 6, whose last tokens are 79, 95, 111 and 127.
        let of_page_1 = |g: &usize| kind.exists(*g, 2 * PAGE) && !kind.exists(*g, PAGE);
        assert_eq!((0..16).filter(of_page_1).collect::<Vec<_>>(), [4, 5, 6, 7]);
    }

    #[test]
    fn kinds_that_do_not_fit_pages_are_unsound() {
        for kind in [
            SummaryKind::Bounds { page: 0 },
            SummaryKind::Bounds { page: 8 },
            SummaryKind::Cuboid { page: 48 },
            SummaryKind::Windows { size: 32, stride: 0 },
            SummaryKind::Windows { size: 40, stride: 16 },
            SummaryKind::Windows { size: 16, stride: 32 },
            SummaryKind::Windows { size: 128, stride: 64 },
        ] {
            assert!(!kind.is_sound(), "{kind:?}");
        }
    }
}
