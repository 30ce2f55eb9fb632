//! A batch of sequences in KV pools that layers take in turn, and the decode steps over them.

use super::AttentionBench;
use super::check;
use crate::backend::{Backend, DType, PAGE, Result, Tensor};
use crate::bench::Summary;
use crate::bench::kernels::Check;
use crate::bench::random::{Random, Values};
use crate::engine::EngineError;
use crate::kv::{KvCache, KvShape, PageTable, pages_for};
use crate::model::{Attention, Checkpoint, GroupSeqs, ModelConfig, Step, StepSeq, Workspace};
use crate::select::{
    Given, KeyProfile, KvReads, LayerShape, ModelShape, Plan, SelectError, TrainedBlocks,
};

type Outcome<T> = std::result::Result<T, SelectError>;

/// Pools together exceed this, where memory allows: several times the largest L2 cache of today.
const ROTATE: u64 = 256 << 20;
/// Share of the free memory that pools may take.
const MEMORY_SHARE: f64 = 0.8;
/// Rows that are appended at a time.
const CHUNK: usize = 4096;
/// Steps before the clock starts: kernels compile, methods choose, a graph is made.
pub(super) const WARM_UP: usize = 4;

/// The model whose attention is measured, as plans see it.
pub(super) fn model_shape<'a>(o: &AttentionBench, windows: &'a [Option<usize>]) -> ModelShape<'a> {
    ModelShape {
        model: "",
        windows,
        heads: o.heads,
        kv_heads: o.kv_heads,
        head_dim: o.head_dim,
        // Plans of NOSA are made and then left out with a note: its keys are no plain ones.
        importance: Some(TrainedBlocks::default()),
    }
}

pub(super) struct Rig<'a> {
    pub b: &'a dyn Backend,
    pub o: &'a AttentionBench,
    pub batch: usize,
    pub cache: KvCache,
    pub tables: Vec<PageTable>,
    pub ws: Workspace,
}

impl<'a> Rig<'a> {
    /// Pools for `plans`, filled with random keys and values.
    pub fn new(
        b: &'a dyn Backend,
        o: &'a AttentionBench,
        batch: usize,
        plans: &[(String, Plan)],
    ) -> crate::bench::Result<Rig<'a>> {
        let mut random = Random::new(o.seed);
        let all = || plans.iter().map(|p| &p.1);
        let shape = KvShape {
            n_layers: 1,
            kv_heads: o.kv_heads,
            head_dim: o.head_dim,
            lead: all().filter_map(Plan::lead).max().unwrap_or(o.head_dim),
            dtype: o.dtype,
            n_pages: batch * pages_for(o.depth),
            slots: batch,
            int8_dims: all().map(Plan::int8_dims).max().unwrap_or(0),
            key_stats: all().any(Plan::key_stats),
            value_stats: all().any(Plan::value_stats),
        };
        let bytes = 2 * (shape.n_pages * PAGE * o.kv_heads * o.head_dim * o.dtype.bytes()) as u64;
        let fit = b
            .free_memory()
            .map_or(usize::MAX, |f| (f as f64 * MEMORY_SHARE) as usize / bytes as usize);
        let pools = (ROTATE.div_ceil(bytes) as usize).min(fit).clamp(1, o.layers);
        let summaries: Vec<_> = all().flat_map(Plan::summaries).collect();
        let mut cache =
            KvCache::new(b, KvShape { n_layers: pools, ..shape })?.with_summaries(b, &summaries)?;
        let mut tables: Vec<PageTable> = (0..batch).map(|_| PageTable::default()).collect();
        // Page by page in random order of the sequences, so that their pages are mixed.
        for _ in 0..pages_for(o.depth) {
            for s in random.shuffled(batch) {
                let table = &mut tables[s as usize];
                let n = PAGE.min(o.depth - table.tokens());
                let room = cache.extend(b, table, n);
                room.map_err(|e| crate::bench::BenchError::BadOption(e.to_string()))??;
            }
        }
        let config = config(o)?;
        let act = b.caps().activations(o.dtype);
        let ws = Workspace::new(b, &config, act, CHUNK.max(batch))?;
        for t in [&ws.q, &ws.k, &ws.qkv] {
            random.fill(b, t, Values::Normal)?;
        }
        let mut rig = Rig { b, o, batch, cache, tables, ws };
        for pool in 0..pools {
            rig.fill(pool, &mut random)?;
        }
        rig.cache = rig.cache.in_turn(o.layers);
        Ok(rig)
    }

    /// Appends random rows to every sequence, up to the depth.
    fn fill(&mut self, pool: usize, random: &mut Random) -> Result<()> {
        let values = self.b.alloc(self.ws.k.dtype(), self.ws.k.len(), "values")?;
        let rows = [&self.ws.k, &values].map(|t| (t, self.o.kv_heads * self.o.head_dim));
        let tokens = vec![0; CHUNK];
        let depth = self.o.depth;
        let pages = pages_for(depth);
        let buffer = self.b.alloc(DType::U32, Step::words(CHUNK, 1, pages, 0, &[]), "step")?;
        for (slot, table) in self.tables.iter().enumerate() {
            for start in (0..depth).step_by(CHUNK) {
                let seq = StepSeq {
                    tokens: &tokens[..CHUNK.min(depth - start)],
                    cached: start,
                    pages: table.pages(),
                    slot,
                    decode: None,
                };
                for t in [&self.ws.k, &values] {
                    random.fill(self.b, t, Values::Normal)?;
                }
                let step = Step::upload(self.b, &buffer, &[seq], depth, &[], &[])?;
                let group = GroupSeqs::new(&step, step.all);
                self.cache.append(self.b, pool, group.seqs(), rows, None)?;
            }
        }
        self.b.sync()
    }

    /// Runs `plan`: milliseconds of a step's mean layer, and the last layer's result against the reference.
    pub fn measure(&mut self, plan: &Plan) -> Outcome<(Summary, Check)> {
        let (b, o) = (self.b, self.o);
        let shape = |layer| LayerShape {
            layer,
            heads: o.heads,
            kv_heads: o.kv_heads,
            head_dim: o.head_dim,
            plain_dim: o.head_dim,
            kv_dtype: o.dtype,
            slots: self.batch,
            at_once: self.batch,
            rows: self.batch,
            capacity: o.depth.next_multiple_of(PAGE),
        };
        if plan.layers.iter().any(|p| p.correct) {
            return Err(SelectError::BadPlan {
                method: plan.method.clone(),
                reason: "the result is compared with attention alone; give --correct false".into(),
            });
        }
        let profile = KeyProfile::neutral(o.layers, o.kv_heads, o.head_dim);
        let mut attention = Attention::new(
            b,
            plan.clone(),
            shape(0),
            Given { custom: None, profile: Some(&profile) },
        )?;
        let pages = self.batch * pages_for(o.depth);
        let mut buffer: Option<Tensor> = None;
        let mut samples = Vec::with_capacity(o.steps);
        let steps = WARM_UP + o.steps;
        for i in 0..steps {
            // The sequences grow to their depth.
            let cached = o.depth - steps + i;
            let seqs: Vec<StepSeq<'_>> = self
                .tables
                .iter()
                .enumerate()
                .map(|(slot, table)| StepSeq {
                    tokens: &[0],
                    cached,
                    pages: table.pages(),
                    slot,
                    decode: Some(i),
                })
                .collect();
            let cuts = attention.cuts(&seqs);
            let words = Step::words(self.batch, self.batch, pages, cuts.len(), &[]);
            let buffer = match &buffer {
                Some(b) => b,
                None => buffer.insert(b.alloc(DType::U32, words, "step")?),
            };
            let step = Step::upload(b, buffer, &seqs, o.depth, &cuts, &[])?;
            let mut outcome: std::result::Result<(), SelectError> = Ok(());
            let ms = b.time(&mut || {
                b.replayable(&mut || {
                    outcome = (0..o.layers).try_for_each(|l| {
                        let cache = &self.cache;
                        attention.layer(b, &step, cache, shape(l), None, &self.ws, None)?;
                        Ok(b.advance()?)
                    });
                    outcome.is_ok()
                })
            })?;
            outcome?;
            attention.ran(&seqs, &cuts);
            if i >= WARM_UP {
                samples.push(ms / o.layers as f64);
            }
        }
        let found = check::last_layer(self, &attention)?;
        Ok((Summary::of(samples), found))
    }

    /// Bytes that a step of `plan` must read of the cache, over all layers and sequences.
    pub fn bytes(&self, plan: &Plan) -> u64 {
        let (o, windows) = (self.o, vec![None; self.o.layers]);
        let reads = KvReads {
            windows: &windows,
            heads: o.heads,
            kv_heads: o.kv_heads,
            head_dim: o.head_dim,
            elem: o.dtype.bytes(),
        };
        self.batch as u64 * plan.bytes_read(o.depth, &reads)
    }

    /// Query rows of one KV head of a sequence, as bytes.
    pub fn query_bytes(&self, sequence: usize, kv_head: usize) -> Result<Vec<u8>> {
        let (o, q) = (self.o, &self.ws.q);
        let group = o.heads / o.kv_heads;
        let all = self.batch * o.heads * o.head_dim;
        let mut bytes = vec![0; all * q.dtype().bytes()];
        self.b.download(&q.slice(0, all), &mut bytes)?;
        let (at, n) = ((sequence * o.heads + kv_head * group) * o.head_dim, group * o.head_dim);
        let size = q.dtype().bytes();
        Ok(bytes[at * size..(at + n) * size].to_vec())
    }

    /// Keys and values of a layer.
    pub fn kv(&self, layer: usize) -> (&Tensor, &Tensor) {
        let pool = self.cache.pool(layer);
        (pool.k, pool.v)
    }
}

/// A decoder block with these heads; its other widths do not matter here.
fn config(o: &AttentionBench) -> crate::bench::Result<ModelConfig> {
    let some = Checkpoint::random("llama-3.1-8b").map_err(EngineError::from)?.config().clone();
    Ok(ModelConfig {
        n_layers: o.layers,
        hidden: 8,
        n_heads: o.heads,
        n_kv_heads: o.kv_heads,
        head_dim: o.head_dim,
        ffn: 8,
        vocab: 8,
        ..some
    })
}
