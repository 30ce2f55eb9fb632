//! Inputs of the measured ops: sequences in shuffled pages of random KV pools.

use super::KernelBench;
use crate::backend::{Backend, DType, KvPool, META_WORDS, Meta, PAGE, Result, Seqs, Tensor};
use crate::bench::random::{Random, Values};

/// Independent inputs together exceed this, where memory allows: four times the largest L2 cache of today.
pub(super) const ROTATE: u64 = 256 << 20;
/// Most input sets of an op.
pub(super) const MAX_SETS: usize = 256;

/// Inputs needed so that launches of `bytes` each, in turn, read [`ROTATE`] bytes.
pub(super) fn sets_for(bytes: u64) -> usize {
    (ROTATE.div_ceil(bytes.max(1)) as usize).clamp(1, MAX_SETS)
}

/// A batch of one layer's decode: options, the device, and what all ops share.
pub(super) struct Rig<'a> {
    pub b: &'a dyn Backend,
    pub o: &'a KernelBench,
    /// Sequences.
    pub batch: usize,
    /// Dtype of queries and results.
    pub act: DType,
    pub random: Random,
    meta: Tensor,
}

/// One KV pool that holds every sequence of the batch, in pages of random order.
pub(super) struct KvSet {
    pub k: Tensor,
    pub v: Tensor,
    pages: Tensor,
    /// `[batch, pages of a sequence]`, as `pages` on the device.
    pub table: Vec<u32>,
}

impl<'a> Rig<'a> {
    pub fn new(b: &'a dyn Backend, o: &'a KernelBench, batch: usize) -> Result<Rig<'a>> {
        let mut meta = vec![0u32; batch * META_WORDS];
        for (s, m) in meta.chunks_exact_mut(META_WORDS).enumerate() {
            m[Meta::Q_START] = s as u32;
            m[Meta::Q_LEN] = 1;
            m[Meta::KV_LEN] = o.depth as u32;
            m[Meta::PAGES] = (s * o.pages()) as u32;
            m[Meta::SLOT] = s as u32;
        }
        let act = if b.caps().activations_follow_weights { o.dtype } else { DType::F32 };
        let random = Random::new(o.seed);
        Ok(Rig { b, o, batch, act, random, meta: words(b, &meta, "sequence records")? })
    }

    /// Elements of one K (or V) pool.
    pub fn pool_len(&self) -> usize {
        self.batch * self.o.pages() * self.o.kv_heads * PAGE * self.o.head_dim
    }

    /// Bytes of one [`KvSet`].
    pub fn set_bytes(&self) -> u64 {
        2 * (self.pool_len() * self.o.dtype.bytes()) as u64
    }

    /// A pool of random keys and values.
    pub fn kv_set(&mut self) -> Result<KvSet> {
        let (b, len) = (self.b, self.pool_len());
        let mut pool = |what| self.random.tensor(b, self.o.dtype, len, what, Values::Normal);
        let (k, v) = (pool("key pool")?, pool("value pool")?);
        let table = self.random.shuffled(self.batch * self.o.pages());
        Ok(KvSet { k, v, pages: words(b, &table, "page table")?, table })
    }

    /// One random query per sequence, `[batch, heads, head_dim]`.
    pub fn query(&mut self) -> Result<Tensor> {
        let len = self.batch * self.o.heads * self.o.head_dim;
        self.random.tensor(self.b, self.act, len, "queries", Values::Normal)
    }

    pub fn seqs<'s>(&'s self, set: &'s KvSet) -> Seqs<'s> {
        Seqs {
            meta: &self.meta,
            pages: &set.pages,
            n: self.batch,
            max_kv: self.o.depth,
            max_q: 1,
            rows: self.batch,
            settled: true,
        }
    }

    /// For ops that read no pages: any page list will do.
    pub fn seqs_without_pages(&self) -> Seqs<'_> {
        Seqs {
            meta: &self.meta,
            pages: &self.meta,
            n: self.batch,
            max_kv: self.o.depth,
            max_q: 1,
            rows: self.batch,
            settled: true,
        }
    }

    pub fn pool<'s>(&self, set: &'s KvSet) -> KvPool<'s> {
        KvPool {
            k: &set.k,
            v: &set.v,
            n_pages: self.batch * self.o.pages(),
            kv_heads: self.o.kv_heads,
            head_dim: self.o.head_dim,
            lead: self.o.lead,
        }
    }
}

/// A u32 tensor of `values`.
pub(super) fn words(b: &dyn Backend, values: &[u32], what: &str) -> Result<Tensor> {
    let t = b.alloc(DType::U32, values.len(), what)?;
    b.upload(&t, bytemuck::cast_slice(values))?;
    Ok(t)
}
