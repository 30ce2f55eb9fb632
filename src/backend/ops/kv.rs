//! The paged KV cache as ops see it, and the ops that write it.

use super::{Named, Rope, apart, ensure, float, holds, holds_rows, is};
use crate::backend::{DType, MAX_HEAD_DIM, PAGE, Result, Tensor};

/// u32 words of one sequence's record in [`Seqs::meta`].
pub const META_WORDS: usize = 8;

/// Word indices of one sequence's record in [`Seqs::meta`].
#[derive(Clone, Copy, Debug)]
pub struct Meta;

impl Meta {
    /// First row of the sequence in the ragged batch.
    pub const Q_START: usize = 0;
    /// Rows of the sequence in this step (1 when decoding).
    pub const Q_LEN: usize = 1;
    /// Cached tokens including this step's.
    pub const KV_LEN: usize = 2;
    /// Start of the sequence's page list in [`Seqs::pages`].
    pub const PAGES: usize = 3;
    /// Slot of the sequence's private state (dimension sets, slices, statistics).
    pub const SLOT: usize = 4;
    /// Decode steps since the prefill ended (0 at the first).
    pub const STEP: usize = 5;
}

/// The sequences of a step (or a group of them), on the device.
///
/// Row `i` of sequence `s` sits at position `kv_len - q_len + i`. Token `j` of a sequence lives in page
/// `pages[meta.PAGES + j / 64]`, row `j % 64`.
#[derive(Debug, Clone, Copy)]
pub struct Seqs<'a> {
    /// u32 `[n, META_WORDS]`; not written by the op right before, which may still run when they are read (an upload may
    /// write them: it has ended by then).
    pub meta: &'a Tensor,
    /// u32 page lists; not written by the op right before either.
    pub pages: &'a Tensor,
    /// Number of sequences.
    pub n: usize,
    /// Upper bound of `kv_len` over the sequences (sizes launches, never indexes).
    pub max_kv: usize,
    /// Upper bound of `q_len` over the sequences.
    pub max_q: usize,
    /// Rows of the whole ragged batch (`q_start + q_len` of every sequence stays below).
    pub rows: usize,
    /// All tokens of a sequence but its last `q_len` were in the cache before this step, so that a backend may read them
    /// while the op before still runs: keys and values, and the int8 copy with its scales, but no slice. `false` is always
    /// right.
    pub settled: bool,
}

impl Seqs<'_> {
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        is(op, "meta", self.meta, DType::U32)?;
        is(op, "pages", self.pages, DType::U32)?;
        holds(op, "meta", self.meta, &[self.n, META_WORDS])
    }

    /// The tensors, for [`apart`].
    pub(crate) fn named(&self) -> [Named<'_>; 2] {
        [("meta", self.meta), ("pages", self.pages)]
    }

    pub(crate) fn check_decode(&self, op: &'static str) -> Result<()> {
        self.check(op)?;
        ensure(op, self.max_q <= 1, || format!("decode only, but max_q = {}", self.max_q))
    }

    /// A slice of `capacity` tokens a slot has room for all sequences.
    pub(crate) fn check_room(&self, op: &'static str, capacity: usize) -> Result<()> {
        ensure(op, self.max_kv <= capacity, || {
            format!("{} tokens, the slice has room for {capacity}", self.max_kv)
        })
    }
}

/// One layer's K and V pages.
///
/// V: `[n_pages, kv_heads, 64, head_dim]`. K: per (page, head) a tile of `64 * head_dim` elements: first the
/// leading dimensions `[64, lead]`, then the rest `[64, head_dim - lead]`, so that scores on the leading
/// dimensions of sorted keys read one contiguous piece. `lead == head_dim` is the plain row layout.
/// Keys are stored after the rotary embedding, pairs interleaved.
#[derive(Debug, Clone, Copy)]
pub struct KvPool<'a> {
    /// kv dtype.
    pub k: &'a Tensor,
    /// Same dtype and size as `k`.
    pub v: &'a Tensor,
    /// Pages of 64 tokens.
    pub n_pages: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Leading dimensions stored as their own piece; a multiple of 8, or `head_dim`.
    pub lead: usize,
}

impl KvPool<'_> {
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        float(op, "k", self.k)?;
        is(op, "v", self.v, self.k.dtype())?;
        let d = self.head_dim;
        check_head_dim(op, d)?;
        ensure(op, self.lead > 0 && self.lead <= d && self.lead.is_multiple_of(8), || {
            format!("lead = {} of head_dim = {d}", self.lead)
        })?;
        let shape = [self.n_pages, self.kv_heads, PAGE, d];
        holds(op, "k", self.k, &shape)?;
        holds(op, "v", self.v, &shape)
    }

    /// The values in the place of the keys: rows of `head_dim`, for ops that read keys only.
    #[must_use]
    pub const fn of_values(self) -> Self {
        KvPool { k: self.v, v: self.k, lead: self.head_dim, ..self }
    }

    /// The tensors, for [`apart`].
    pub(crate) fn named(&self) -> [Named<'_>; 2] {
        [("key pages", self.k), ("value pages", self.v)]
    }

    /// Offset of dimension `i` of row `row` inside a K tile.
    #[inline]
    pub const fn k_offset(lead: usize, head_dim: usize, row: usize, i: usize) -> usize {
        if i < lead { row * lead + i } else { PAGE * lead + row * (head_dim - lead) + (i - lead) }
    }
}

/// int8 copy of the leading dimensions of every cached key, symmetric per token and KV head.
///
/// `key[i] ~ data[i] * scale` with `scale = max_i |key[i]| / 127` over the leading `dims` dimensions
/// and `data[i]` rounded to nearest, ties to even (scale 0 and data 0 for a zero row). `key` is the key as the
/// page holds it, after rounding to the kv dtype. Rows with values that are not finite have unspecified entries.
#[derive(Debug, Clone, Copy)]
pub struct Int8Keys<'a> {
    /// i8 `[n_pages, kv_heads, 64, dims]`.
    pub data: &'a Tensor,
    /// f32 `[n_pages, kv_heads, 64]`.
    pub scale: &'a Tensor,
    /// Leading dimensions kept; a multiple of 8.
    pub dims: usize,
}

/// Compact key slice (SparCas, layout A): the chosen dimensions of every key of a sequence.
#[derive(Debug, Clone, Copy)]
pub struct CompactSlice<'a> {
    /// kv dtype `[slots, kv_heads, capacity, n_dims]`.
    pub data: &'a Tensor,
    /// u32 `[slots, kv_heads, n_dims]`: the dimension that each column holds.
    pub dims: &'a Tensor,
    /// Columns; a multiple of 8.
    pub n_dims: usize,
    /// Tokens a slot has room for.
    pub capacity: usize,
    /// Sequences that have a slice.
    pub slots: usize,
}

impl CompactSlice<'_> {
    pub(crate) fn check(&self, op: &'static str, pool: &KvPool<'_>) -> Result<()> {
        is(op, "slice", self.data, pool.k.dtype())?;
        is(op, "dims", self.dims, DType::U32)?;
        check_dims(op, self.n_dims, pool.head_dim)?;
        let shape = [self.slots, pool.kv_heads, self.capacity, self.n_dims];
        holds(op, "slice", self.data, &shape)?;
        holds(op, "dims", self.dims, &[self.slots, pool.kv_heads, self.n_dims])
    }
}

pub(crate) fn check_head_dim(op: &'static str, d: usize) -> Result<()> {
    ensure(op, d > 0 && d.is_multiple_of(8) && d <= MAX_HEAD_DIM, || {
        format!("head_dim = {d} must be a multiple of 8, at most {MAX_HEAD_DIM}")
    })
}

pub(crate) fn check_dims(op: &'static str, n: usize, head_dim: usize) -> Result<()> {
    ensure(op, n > 0 && n <= head_dim && n.is_multiple_of(8), || {
        format!("{n} dimensions of {head_dim}: must be a multiple of 8")
    })
}

/// Writes the step's keys and values of every sequence into its pages and into the given summaries.
///
/// With `slice`, the chosen dimensions of the new keys are appended to the compact slice of the sequence's
/// slot (nothing is ever stale in rows). A sequence whose `kv_len` exceeds the slice's
/// capacity is not written to the slice. Entries hold the key as the page holds it.
#[derive(Debug)]
pub struct KvAppend<'a> {
    /// act, row `r`, KV head `h`, dimension `i` at `r * k_stride + h * head_dim + i` (after [`Rope`](super::Rope)).
    pub k: &'a Tensor,
    /// Elements between rows of `k`.
    pub k_stride: usize,
    /// act, like `k`.
    pub v: &'a Tensor,
    /// Elements between rows of `v`.
    pub v_stride: usize,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The layer's pages.
    pub cache: KvPool<'a>,
    /// The int8 key copy, where there is one.
    pub int8: Option<Int8Keys<'a>>,
    /// The compact slice, where there is one.
    pub slice: Option<CompactSlice<'a>>,
}

impl KvAppend<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "kv_append";
        float(OP, "k", self.k)?;
        is(OP, "v", self.v, self.k.dtype())?;
        self.seqs.check(OP)?;
        self.cache.check(OP)?;
        let width = [self.cache.kv_heads, self.cache.head_dim];
        holds_rows(OP, "k", self.k, self.seqs.rows, self.k_stride, &width)?;
        holds_rows(OP, "v", self.v, self.seqs.rows, self.v_stride, &width)?;
        let [meta, pages] = self.seqs.named();
        // Without a slice this names `k` again, which changes nothing.
        let (slice, dims) = self.slice.as_ref().map_or((self.k, self.k), |s| (s.data, s.dims));
        let ins = [("k", self.k), ("v", self.v), meta, pages, ("dims", dims)];
        let [keys, values] = self.cache.named();
        apart(OP, &[keys, values], &ins)?;
        if let Some(q) = &self.int8 {
            check_int8(OP, q, &self.cache)?;
            let outs = [("int8 keys", q.data), ("int8 scales", q.scale), keys, values];
            apart(OP, &outs, &ins)?;
            apart(OP, &outs[..2], &[("slice", slice)])?;
        }
        if let Some(s) = &self.slice {
            s.check(OP, &self.cache)?;
            apart(OP, &[("slice", slice), keys, values], &ins)?;
        }
        Ok(())
    }
}

/// What [`Backend::rope_append`](crate::backend::Backend::rope_append) takes: the keys that come out of the second
/// embedding go into the pages.
pub(crate) fn check_rope_append(ropes: [&Rope<'_>; 2], append: &KvAppend<'_>) -> Result<()> {
    const OP: &str = "rope_append";
    ropes.iter().try_for_each(|r| r.check())?;
    append.check()?;
    let [q, k] = ropes;
    ensure(OP, k.out.same_place(append.k) && k.x.dtype() == append.k.dtype(), || {
        "the keys that are appended are not those of rope".into()
    })?;
    ensure(OP, q.x.dtype() == k.x.dtype(), || "queries and keys of two dtypes".into())?;
    let (heads, d) = (append.cache.kv_heads, append.cache.head_dim);
    let sizes = [(k.rows, k.heads, k.head_dim), (q.rows, heads, q.head_dim)];
    let all = (append.seqs.rows, heads, d);
    ensure(OP, sizes == [all; 2] && append.k_stride == heads * d, || {
        format!("rows, KV heads and dimensions {sizes:?} of rope, {all:?} of the cache")
    })?;
    // What is written first is not read, nor written, by what comes behind it in the same launch.
    let [keys, values] = append.cache.named();
    let ins = [("keys before rope", k.x), ("queries before rope", q.x), ("v", append.v)];
    apart(OP, &[("queries", q.out), ("keys", k.out), keys, values], &ins)?;
    apart(OP, &[("queries", q.out)], &[("keys", k.out), keys, values])
}

pub(crate) fn check_int8(op: &'static str, q: &Int8Keys<'_>, pool: &KvPool<'_>) -> Result<()> {
    is(op, "int8 keys", q.data, DType::I8)?;
    is(op, "int8 scales", q.scale, DType::F32)?;
    check_dims(op, q.dims, pool.head_dim)?;
    let (pages, heads) = (pool.n_pages, pool.kv_heads);
    holds(op, "int8 keys", q.data, &[pages, heads, PAGE, q.dims])?;
    holds(op, "int8 scales", q.scale, &[pages, heads, PAGE])
}

/// f32 elements of [`KeyStats::stats`] per slot and KV head.
pub const fn key_stats_len(head_dim: usize) -> usize {
    3 * head_dim
}

/// Adds the step's new keys to running sums: the `sigma` of the `*_qk` metrics; over [`KvPool::of_values`] the sums of
/// the values for [`MeanValue`](super::MeanValue).
///
/// Per (slot, KV head): `sum[head_dim]`, `sum of squares[head_dim]` per coordinate, then
/// `sum[head_dim / 2]`, `sum of squares[head_dim / 2]` of the rotary pair norms. Keys are read back from the
/// pages (dtype kv). A sequence with `kv_len == q_len` starts from zero. The count is `kv_len`.
#[derive(Debug)]
pub struct KeyStats<'a> {
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The layer's pages.
    pub cache: KvPool<'a>,
    /// f32 `[slots, kv_heads, key_stats_len(head_dim)]`.
    pub stats: &'a Tensor,
    /// Slots of per-sequence state.
    pub slots: usize,
}

impl KeyStats<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "key_stats";
        self.seqs.check(OP)?;
        self.cache.check(OP)?;
        is(OP, "stats", self.stats, DType::F32)?;
        let len = key_stats_len(self.cache.head_dim);
        let [meta, pages] = self.seqs.named();
        apart(OP, &[("stats", self.stats)], &[self.cache.named()[0], meta, pages])?;
        holds(OP, "stats", self.stats, &[self.slots, self.cache.kv_heads, len])
    }
}
