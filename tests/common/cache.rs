//! One layer's paged cache with random contents, and the op chain of a decode step over it, in f32.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use longsight::backend::reference::{floats, words};
use longsight::backend::{
    AttendDense, AttendRows, Backend, CompactSlice, DType, Force, HeadPool, Int8Keys, KeyStats,
    KvAppend, KvPool, LogitScale, META_WORDS, Meta, PAGE, PoolScores, ScoreDims, ScoreSource, Seqs,
    Share, Tensor, TopK, key_stats_len, open,
};
use longsight::select::LayerShape;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// cpu, and every other backend that `LONGSIGHT_REQUIRE` lists.
pub fn backends() -> Vec<Arc<dyn Backend>> {
    static ALL: OnceLock<Vec<Arc<dyn Backend>>> = OnceLock::new();
    let find = || -> Vec<Arc<dyn Backend>> {
        let listed = std::env::var("LONGSIGHT_REQUIRE").unwrap_or_default();
        let others = listed.split(',').map(str::trim).filter(|n| !n.is_empty() && *n != "cpu");
        let opened = std::iter::once("cpu").chain(others).map(|name| match open(name) {
            Ok(dev) => dev,
            Err(e) => panic!("LONGSIGHT_REQUIRE lists {name}: {e}"),
        });
        opened.collect()
    };
    ALL.get_or_init(find).clone()
}

/// Head counts and the head dimension.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub query: usize,
    pub kv: usize,
    pub dim: usize,
}

impl Heads {
    pub fn group(self) -> usize {
        self.query / self.kv
    }
}

/// Keys and values `[tokens][kv * dim]` and one decode query `[query * dim]`, on the host.
#[derive(Clone, Debug)]
pub struct Data {
    pub heads: Heads,
    pub k: Vec<Vec<f32>>,
    pub v: Vec<Vec<f32>>,
    pub q: Vec<f32>,
}

fn uniform(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

impl Data {
    pub fn random(seed: u64, heads: Heads, tokens: usize) -> Data {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let width = heads.kv * heads.dim;
        let k = (0..tokens).map(|_| uniform(&mut rng, width)).collect();
        let v = (0..tokens).map(|_| uniform(&mut rng, width)).collect();
        let q = uniform(&mut rng, heads.query * heads.dim);
        Data { heads, k, v, q }
    }

    /// The same keys and values under another query.
    pub fn with_query(&self, seed: u64) -> Data {
        let q = uniform(&mut ChaCha8Rng::seed_from_u64(seed), self.q.len());
        Data { q, ..self.clone() }
    }

    /// Token `i` of the result is token `order[i]` of this.
    pub fn tokens(&self, order: &[usize]) -> Data {
        let take =
            |x: &[Vec<f32>]| -> Vec<Vec<f32>> { order.iter().map(|&j| x[j].clone()).collect() };
        Data { k: take(&self.k), v: take(&self.v), ..self.clone() }
    }

    /// Some KV heads with their query heads.
    pub fn shard(&self, kv: Range<usize>) -> Data {
        let Heads { dim, .. } = self.heads;
        let group = self.heads.group();
        let cut = |x: &[Vec<f32>]| -> Vec<Vec<f32>> {
            x.iter().map(|r| r[kv.start * dim..kv.end * dim].to_vec()).collect()
        };
        Data {
            heads: Heads { query: kv.len() * group, kv: kv.len(), dim },
            k: cut(&self.k),
            v: cut(&self.v),
            q: self.q[kv.start * group * dim..kv.end * group * dim].to_vec(),
        }
    }

    /// Exact logits of query head `h` over all tokens.
    pub fn logits(&self, h: usize) -> Vec<f64> {
        let d = self.heads.dim;
        let (q, at) = (&self.q[h * d..][..d], h / self.heads.group() * d);
        let dot = |k: &Vec<f32>| -> f64 {
            q.iter().zip(&k[at..at + d]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        self.k.iter().map(|k| dot(k) / (d as f64).sqrt()).collect()
    }
}

/// How tokens are picked.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    pub pool: HeadPool,
    pub scale: LogitScale,
    pub k: usize,
    /// Sinks and recent tokens.
    pub forced: Option<(usize, usize)>,
}

/// Token lists, on the device and on the host.
pub struct Picked {
    pub indices: Tensor,
    pub counts: Tensor,
    pub k: usize,
    pub lists: Vec<Vec<u32>>,
}

impl Picked {
    /// Reads `[rows, k]` lists back.
    pub fn read(dev: &dyn Backend, indices: Tensor, counts: Tensor, k: usize) -> Picked {
        let (all, n) = (words(dev, &indices).unwrap(), words(dev, &counts).unwrap());
        let lists = all.chunks_exact(k).zip(&n).map(|(list, n)| list[..*n as usize].to_vec());
        Picked { lists: lists.collect(), indices, counts, k }
    }
}

/// One layer's cache of one sequence on a device.
pub struct Layer {
    pub dev: Arc<dyn Backend>,
    pub heads: Heads,
    /// f32 `[query, dim]`.
    pub q: Tensor,
    /// Tokens that there is room for; a multiple of a page.
    pub capacity: usize,
    /// Dimensions of a head that are no bias.
    pub plain_dim: usize,
    pub stats: Tensor,
    /// Sums of the values, likewise.
    pub value_stats: Tensor,
    lead: usize,
    n_pages: usize,
    k: Tensor,
    v: Tensor,
    int8: (Tensor, Tensor),
    meta: Tensor,
    pages: Tensor,
    kv_len: usize,
    q_len: usize,
}

impl Layer {
    /// Holds all tokens of `data` and its query.
    pub fn filled(dev: &Arc<dyn Backend>, data: &Data, lead: usize) -> Layer {
        let mut layer = Layer::empty(dev, data, lead);
        layer.append(data, 0..data.k.len(), None);
        layer
    }

    /// Has room for all tokens of `data`, and holds its query.
    pub fn empty(dev: &Arc<dyn Backend>, data: &Data, lead: usize) -> Layer {
        let heads = data.heads;
        let capacity = data.k.len().next_multiple_of(PAGE);
        let n_pages = capacity / PAGE + 2;
        let rows = n_pages * heads.kv * PAGE;
        let alloc = |dtype, len| dev.alloc(dtype, len, "test").unwrap();
        // From the end of the pool: no token lies where a plain array would have it.
        let list: Vec<u32> = (0..n_pages as u32).rev().collect();
        let pages = alloc(DType::U32, n_pages);
        dev.upload(&pages, bytemuck::cast_slice(&list)).unwrap();
        Layer {
            q: upload(&**dev, &data.q),
            stats: alloc(DType::F32, heads.kv * key_stats_len(heads.dim)),
            value_stats: alloc(DType::F32, heads.kv * key_stats_len(heads.dim)),
            k: alloc(DType::F32, rows * heads.dim),
            v: alloc(DType::F32, rows * heads.dim),
            int8: (alloc(DType::I8, rows * heads.dim), alloc(DType::F32, rows)),
            meta: alloc(DType::U32, META_WORDS),
            dev: dev.clone(),
            heads,
            capacity,
            plain_dim: heads.dim,
            lead,
            n_pages,
            pages,
            kv_len: 0,
            q_len: 1,
        }
    }

    /// Appends tokens of `data` in one step; afterwards the newest one is decoded.
    pub fn append(&mut self, data: &Data, new: Range<usize>, slice: Option<CompactSlice<'_>>) {
        let width = self.heads.kv * self.heads.dim;
        let k = upload(&*self.dev, &data.k[new.clone()].concat());
        let v = upload(&*self.dev, &data.v[new.clone()].concat());
        self.set(new.len(), new.end);
        let (seqs, cache) = (self.seqs(), self.pool());
        let (k_stride, v_stride) = (width, width);
        let int8 = Some(self.int8());
        let p = KvAppend { k: &k, k_stride, v: &v, v_stride, seqs, cache, int8, slice };
        self.dev.kv_append(&p).unwrap();
        self.dev.key_stats(&KeyStats { seqs, cache, stats: &self.stats, slots: 1 }).unwrap();
        let (cache, stats) = (cache.of_values(), &self.value_stats);
        self.dev.key_stats(&KeyStats { seqs, cache, stats, slots: 1 }).unwrap();
        self.set(1, new.end);
    }

    fn set(&mut self, q_len: usize, kv_len: usize) {
        (self.q_len, self.kv_len) = (q_len, kv_len);
        let mut record = [0u32; META_WORDS];
        record[Meta::Q_LEN] = q_len as u32;
        record[Meta::KV_LEN] = kv_len as u32;
        self.dev.upload(&self.meta, bytemuck::cast_slice(&record)).unwrap();
    }

    pub fn seqs(&self) -> Seqs<'_> {
        let (meta, pages) = (&self.meta, &self.pages);
        Seqs {
            meta,
            pages,
            n: 1,
            max_kv: self.kv_len,
            max_q: self.q_len,
            rows: self.q_len,
            settled: false,
        }
    }

    pub fn pool(&self) -> KvPool<'_> {
        KvPool {
            k: &self.k,
            v: &self.v,
            n_pages: self.n_pages,
            kv_heads: self.heads.kv,
            head_dim: self.heads.dim,
            lead: self.lead,
        }
    }

    pub fn int8(&self) -> Int8Keys<'_> {
        Int8Keys { data: &self.int8.0, scale: &self.int8.1, dims: self.heads.dim }
    }

    pub fn shape(&self) -> LayerShape {
        LayerShape {
            layer: 0,
            heads: self.heads.query,
            kv_heads: self.heads.kv,
            head_dim: self.heads.dim,
            plain_dim: self.plain_dim,
            kv_dtype: DType::F32,
            slots: 1,
            at_once: 1,
            rows: 1,
            capacity: self.capacity,
        }
    }

    pub fn alloc(&self, dtype: DType, len: usize) -> Tensor {
        self.dev.alloc(dtype, len, "test").unwrap()
    }

    /// Lists of a sequence.
    pub fn rows(&self, pool: HeadPool) -> usize {
        pool.lists(self.heads.query, self.heads.kv)
    }

    /// Scores `[rows, capacity]`, pooled as `rule` says.
    pub fn scores(&self, source: ScoreSource<'_>, rule: Rule) -> Tensor {
        let (heads, stride, pool) = (self.heads, self.capacity, rule.pool);
        let rows = if pool.in_score() { heads.kv } else { heads.query };
        let scores = self.alloc(DType::F32, rows * stride);
        let p = ScoreDims {
            q: &self.q,
            seqs: self.seqs(),
            cache: self.pool(),
            source,
            heads: heads.query,
            pool,
            scale: rule.scale,
            scores: &scores,
            stride,
        };
        self.dev.score_dims(&p).unwrap();
        if !pool.softmax() {
            return scores;
        }
        let out = self.alloc(DType::F32, self.rows(pool) * stride);
        let p = PoolScores {
            scores: &scores,
            out: &out,
            seqs: self.seqs(),
            heads: heads.query,
            kv_heads: heads.kv,
            stride,
            pool,
            lengths: None,
        };
        self.dev.pool_scores(&p).unwrap();
        out
    }

    /// Scores, forces, takes the top-k.
    pub fn pick(&self, source: ScoreSource<'_>, rule: Rule) -> Picked {
        let pooled = self.scores(source, rule);
        let (scores, seqs, stride) = (&pooled, self.seqs(), self.capacity);
        let (rows_per_seq, k) = (self.rows(rule.pool), rule.k);
        if let Some((sinks, recent)) = rule.forced {
            let p = Force { scores, seqs, rows_per_seq, stride, sinks, recent, among: None };
            self.dev.force(&p).unwrap();
        }
        let indices = self.alloc(DType::U32, rows_per_seq * k);
        let counts = self.alloc(DType::U32, rows_per_seq);
        let p = TopK {
            scores,
            seqs,
            rows_per_seq,
            stride,
            k,
            unit: 1,
            share: Share::ALL,
            among: None,
            indices: &indices,
            counts: &counts,
        };
        self.dev.top_k(&p).unwrap();
        Picked::read(&*self.dev, indices, counts, k)
    }

    /// Attention `[query, dim]` over the picked tokens.
    pub fn attend(&self, picked: &Picked) -> Vec<f64> {
        let out = self.alloc(DType::F32, self.heads.query * self.heads.dim);
        // One list for all heads needs a map that says so.
        let zeros = self.alloc(DType::U32, self.heads.kv);
        let head_map = (picked.lists.len() == 1).then_some(&zeros);
        let p = AttendRows {
            q: &self.q,
            seqs: self.seqs(),
            cache: self.pool(),
            heads: self.heads.query,
            scale: 1.0 / (self.heads.dim as f32).sqrt(),
            indices: &picked.indices,
            counts: &picked.counts,
            k: picked.k,
            rows_per_seq: picked.lists.len(),
            head_map,
            settled: false,
            splits: 1,
            out: &out,
            lse: None,
        };
        self.dev.attend_rows(&p).unwrap();
        floats(&*self.dev, &out).unwrap()
    }

    /// Attention `[query, dim]` over all tokens.
    pub fn attend_dense(&self) -> Vec<f64> {
        let out = self.alloc(DType::F32, self.heads.query * self.heads.dim);
        let p = AttendDense {
            q: &self.q,
            seqs: self.seqs(),
            cache: self.pool(),
            heads: self.heads.query,
            scale: 1.0 / (self.heads.dim as f32).sqrt(),
            window: None,
            splits: 1,
            out: &out,
            lse: None,
            values: true,
            logits: None,
        };
        self.dev.attend_dense(&p).unwrap();
        floats(&*self.dev, &out).unwrap()
    }
}

/// `values` as an f32 tensor.
pub fn upload(dev: &dyn Backend, values: &[f32]) -> Tensor {
    let t = dev.alloc(DType::F32, values.len(), "test").unwrap();
    dev.upload(&t, bytemuck::cast_slice(values)).unwrap();
    t
}
