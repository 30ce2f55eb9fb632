//! The device pools of all layers and the summaries that are written with them.

use super::{PageAllocator, PageError, PageTable};
use crate::backend::{
    Backend, BackendError, CompactSlice, DType, Int8Keys, KeyStats, KvAppend, KvPool, KvSummaries,
    PAGE, Result, Rope, Seqs, Summaries, SummaryKind, Tensor, key_stats_len,
};

/// Sizes of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers, each with pools of its own.
    pub n_layers: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Leading key dimensions stored as one piece per page; see [`KvPool`].
    pub lead: usize,
    /// Dtype of keys and values.
    pub dtype: DType,
    /// Pages in each layer's pool.
    pub n_pages: usize,
    /// Sequences that may hold private state at once.
    pub slots: usize,
    /// Leading dimensions of the int8 key copy, 0 for none.
    pub int8_dims: usize,
    /// Keep running key statistics for the `*_qk` metrics.
    pub key_stats: bool,
    /// Keep running sums of the values for the mean-value correction.
    pub value_stats: bool,
}

#[derive(Clone)]
struct Layer {
    k: Tensor,
    v: Tensor,
    int8: Option<(Tensor, Tensor)>,
    stats: Option<Tensor>,
    value_stats: Option<Tensor>,
}

/// K and V pages of every layer on one device. A page number means the same tokens in every layer.
pub struct KvCache {
    shape: KvShape,
    layers: Vec<Layer>,
    /// For each kind that is kept, the summaries of every layer.
    summaries: Vec<(SummaryKind, Vec<Tensor>)>,
    allocator: PageAllocator,
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvCache").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl KvShape {
    /// Bytes of keys, values and int8 keys of all layers.
    pub fn bytes(&self) -> u64 {
        let int8 = if self.int8_dims > 0 { self.int8_dims + DType::F32.bytes() } else { 0 };
        let row = 2 * self.head_dim * self.dtype.bytes() + int8;
        let sizes = [self.n_layers, self.n_pages, PAGE, self.kv_heads, row];
        sizes.iter().fold(1, |n: u64, &size| n.saturating_mul(size as u64))
    }

    /// Refuses a cache that the ops of a device could not read: a layer's keys, like its values, are one binding.
    ///
    /// # Errors
    /// [`BackendError::BufferLimit`].
    pub fn check(&self, b: &dyn Backend) -> Result<()> {
        let sizes = [self.n_pages, self.kv_heads, PAGE, self.head_dim, self.dtype.bytes()];
        let need = sizes.iter().fold(1u64, |n, &size| n.saturating_mul(size as u64));
        let limit = b.caps().max_binding;
        if need <= limit {
            return Ok(());
        }
        let what = format!("a layer's keys of {} tokens", self.n_pages.saturating_mul(PAGE));
        let remedy = "use a shorter context (--ctx) or a 16-bit KV cache (--kv-dtype)".into();
        Err(BackendError::BufferLimit { what, need, limit, remedy })
    }
}

impl KvCache {
    /// Allocates all pools.
    ///
    /// # Errors
    /// As [`KvShape::check`], and when the device is full.
    pub fn new(b: &dyn Backend, shape: KvShape) -> Result<Self> {
        shape.check(b)?;
        let rows = shape.n_pages * shape.kv_heads * PAGE;
        let layer = |l: usize| -> Result<Layer> {
            let pool = |n: &str| {
                b.alloc(shape.dtype, rows * shape.head_dim, &format!("{n} cache of layer {l}"))
            };
            let (k, v) = (pool("key")?, pool("value")?);
            let int8 = (shape.int8_dims > 0)
                .then(|| -> Result<_> {
                    Ok((
                        b.alloc(DType::I8, rows * shape.int8_dims, "int8 keys")?,
                        b.alloc(DType::F32, rows, "int8 key scales")?,
                    ))
                })
                .transpose()?;
            let sums = |kept: bool, what: &str| {
                let n = shape.slots * shape.kv_heads * key_stats_len(shape.head_dim);
                kept.then(|| b.alloc(DType::F32, n, what)).transpose()
            };
            let stats = sums(shape.key_stats, "key statistics")?;
            let value_stats = sums(shape.value_stats, "sums of values")?;
            Ok(Layer { k, v, int8, stats, value_stats })
        };
        let layers = (0..shape.n_layers).map(layer).collect::<Result<_>>()?;
        let allocator = PageAllocator::new(shape.n_pages);
        Ok(KvCache { shape, layers, summaries: Vec::new(), allocator })
    }

    /// Keeps these summaries of the keys as well; the cache is still empty.
    ///
    /// # Errors
    /// When the device is full.
    pub fn with_summaries(mut self, b: &dyn Backend, kinds: &[SummaryKind]) -> Result<Self> {
        let s = self.shape;
        for kind in kinds.iter().copied().filter(|k| k.is_sound()) {
            if self.keeps(kind) {
                continue;
            }
            let len = s.n_pages * s.kv_heads * kind.page_len(s.head_dim);
            let layer = |l| b.alloc(s.dtype, len, &format!("key summaries of layer {l}"));
            self.summaries.push((kind, (0..s.n_layers).map(layer).collect::<Result<_>>()?));
        }
        Ok(self)
    }

    /// The cache of a deeper model whose layers take turns with the pools of this one: the attention of many layers is
    /// timed without their memory.
    pub(crate) fn in_turn(mut self, n_layers: usize) -> Self {
        self.layers = self.layers.iter().cycle().take(n_layers).cloned().collect();
        for (_, layers) in &mut self.summaries {
            *layers = layers.iter().cycle().take(n_layers).cloned().collect();
        }
        self.shape.n_layers = n_layers;
        self
    }

    /// Whether the cache keeps summaries of this kind.
    pub fn keeps(&self, kind: SummaryKind) -> bool {
        self.summaries.iter().any(|(k, _)| *k == kind)
    }

    /// Layer `l`'s summaries of the keys, one of each kind that is kept.
    pub fn summaries(&self, l: usize) -> impl Iterator<Item = Summaries<'_>> {
        self.summaries.iter().map(move |(kind, layers)| Summaries { data: &layers[l], kind: *kind })
    }

    /// Sizes.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// The page allocator.
    pub fn allocator(&self) -> &PageAllocator {
        &self.allocator
    }

    /// Layer `l`'s pools as ops take them.
    pub fn pool(&self, l: usize) -> KvPool<'_> {
        let s = &self.shape;
        KvPool {
            k: &self.layers[l].k,
            v: &self.layers[l].v,
            n_pages: s.n_pages,
            kv_heads: s.kv_heads,
            head_dim: s.head_dim,
            lead: s.lead,
        }
    }

    /// Layer `l`'s int8 key copy.
    pub fn int8(&self, l: usize) -> Option<Int8Keys<'_>> {
        let (data, scale) = self.layers[l].int8.as_ref()?;
        Some(Int8Keys { data, scale, dims: self.shape.int8_dims })
    }

    /// Layer `l`'s running key statistics, `[slots, kv_heads, key_stats_len(head_dim)]`.
    pub fn stats(&self, l: usize) -> Option<&Tensor> {
        self.layers[l].stats.as_ref()
    }

    /// Layer `l`'s running sums of the values, likewise; the first `head_dim` of a head are the sums themselves.
    pub fn value_stats(&self, l: usize) -> Option<&Tensor> {
        self.layers[l].value_stats.as_ref()
    }

    /// Writes a step's keys and values into layer `l`, and what the cache keeps of them besides: `k` and `v` are tensors
    /// with the elements between their rows, `slice` a compact slice that a method keeps, `ropes` what makes the queries and
    /// keys of a decode step.
    ///
    /// # Errors
    /// When the device fails.
    pub(crate) fn append(
        &self,
        b: &dyn Backend,
        l: usize,
        seqs: Seqs<'_>,
        [k, v]: [(&Tensor, usize); 2],
        slice: Option<CompactSlice<'_>>,
        ropes: Option<[&Rope<'_>; 2]>,
    ) -> Result<()> {
        let (cache, slots) = (self.pool(l), self.shape.slots);
        let append = KvAppend {
            k: k.0,
            k_stride: k.1,
            v: v.0,
            v_stride: v.1,
            seqs,
            cache,
            int8: self.int8(l),
            slice,
        };
        match ropes {
            Some(ropes) => b.rope_append(ropes, &append)?,
            None => b.kv_append(&append)?,
        }
        if let Some(stats) = self.stats(l) {
            b.key_stats(&KeyStats { seqs, cache, stats, slots })?;
        }
        if let Some(stats) = self.value_stats(l) {
            b.key_stats(&KeyStats { seqs, cache: cache.of_values(), stats, slots })?;
        }
        for summaries in self.summaries(l) {
            b.kv_summaries(&KvSummaries { seqs, cache, summaries })?;
        }
        Ok(())
    }

    /// Makes room for `n` tokens of a sequence, copying a shared last page where needed.
    ///
    /// # Errors
    /// Outside: [`PageError`] where pages run out, and nothing has changed. Inside: the device failed at the copy, and
    /// the sequence is not to be used further.
    pub fn extend(
        &mut self,
        b: &dyn Backend,
        table: &mut PageTable,
        n: usize,
    ) -> std::result::Result<Result<()>, PageError> {
        let copies = table.extend(n, &mut self.allocator)?;
        Ok(copies.into_iter().try_for_each(|(from, to)| self.copy_page(b, from, to)))
    }

    fn copy_page(&self, b: &dyn Backend, from: u32, to: u32) -> Result<()> {
        let rows = self.shape.kv_heads * PAGE;
        let page =
            |t: &Tensor, width: usize, p: u32| t.slice(p as usize * rows * width, rows * width);
        for l in &self.layers {
            let d = self.shape.head_dim;
            for t in [&l.k, &l.v] {
                b.copy(&page(t, d, from), &page(t, d, to))?;
            }
            if let Some((data, scale)) = &l.int8 {
                let w = self.shape.int8_dims;
                b.copy(&page(data, w, from), &page(data, w, to))?;
                b.copy(&page(scale, 1, from), &page(scale, 1, to))?;
            }
        }
        for (kind, layers) in &self.summaries {
            let len = self.shape.kv_heads * kind.page_len(self.shape.head_dim);
            let page = |t: &Tensor, p: u32| t.slice(p as usize * len, len);
            layers.iter().try_for_each(|t| b.copy(&page(t, from), &page(t, to)))?;
        }
        Ok(())
    }

    /// A second page table over the same pages; the private statistics of slot `from` go to slot `to`.
    ///
    /// # Errors
    /// Those of [`Backend::copy`](crate::backend::Backend::copy); no page is shared then.
    pub fn fork(
        &mut self,
        b: &dyn Backend,
        t: &PageTable,
        from: usize,
        to: usize,
    ) -> Result<PageTable> {
        let n = self.shape.kv_heads * key_stats_len(self.shape.head_dim);
        for s in self.layers.iter().flat_map(|l| l.stats.iter().chain(&l.value_stats)) {
            b.copy(&s.slice(from * n, n), &s.slice(to * n, n))?;
        }
        Ok(t.fork(&mut self.allocator))
    }

    /// Drops all tokens of a sequence from `tokens` on and frees pages nobody else holds. Statistics of keys and values
    /// cannot forget: where the cache has them, only `tokens = 0` leaves them right.
    pub fn truncate(&mut self, table: &mut PageTable, tokens: usize) {
        table.truncate(tokens, &mut self.allocator);
    }
}
