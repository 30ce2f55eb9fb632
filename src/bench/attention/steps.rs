//! Decode steps of a rig's sequences.

use super::check::{Asked, Head};
use super::rig::{GoOn, Rig, unless_ended};
use crate::backend::{DType, Result, Tensor};
use crate::bench::kernels::Check;
use crate::bench::random::Values;
use crate::bench::{self, Summary};
use crate::kv::pages_for;
use crate::model::{Attention, GroupSeqs, Step, StepSeq};
use crate::select::{KvReads, Plan};

/// Rows that are appended at a time.
const CHUNK: usize = 4096;
/// Steps before the clock starts: kernels compile, methods choose, a graph is made.
pub(super) const WARM_UP: usize = 4;

impl Rig<'_> {
    /// Appends random rows to every sequence of every pool, up to the end.
    pub fn fill(&mut self, go_on: &mut GoOn<'_>) -> bench::Result<()> {
        let width = self.of.kv_heads * self.of.head_dim;
        let new = || self.b.alloc(self.ws.k.dtype(), CHUNK * width, "new keys and values");
        let (keys, values) = (new()?, new()?);
        let tokens = vec![0; CHUNK];
        let depth = self.tokens;
        let words = Step::words(CHUNK, 1, pages_for(depth), 0, &[]);
        let buffer = self.b.alloc(DType::U32, words, "step")?;
        for pool in 0..self.pools {
            for (slot, table) in self.tables.iter().enumerate() {
                for start in (0..depth).step_by(CHUNK) {
                    unless_ended(go_on)?;
                    let seq = StepSeq {
                        tokens: &tokens[..CHUNK.min(depth - start)],
                        cached: start,
                        pages: table.pages(),
                        slot,
                        decode: None,
                    };
                    for t in [&keys, &values] {
                        self.random.fill(self.b, t, Values::Normal)?;
                    }
                    let step = Step::upload(self.b, &buffer, &[seq], depth, &[], &[])?;
                    let group = GroupSeqs::new(&step, step.all);
                    let rows = [&keys, &values].map(|t| (t, width));
                    self.cache.append(self.b, pool, group.seqs(), rows, None, None)?;
                }
            }
        }
        Ok(self.b.sync()?)
    }

    /// Runs `steps` steps of `plan`: milliseconds of a step's mean layer, and the last layer's result against the
    /// reference.
    pub fn decode(
        &mut self,
        plan: &Plan,
        steps: usize,
        go_on: &mut GoOn<'_>,
    ) -> bench::Result<(Summary, Check)> {
        let (b, layers) = (self.b, self.of.layers);
        let mut attention = self.attention(plan)?;
        let mut buffer: Option<Tensor> = None;
        let mut samples = Vec::with_capacity(steps);
        let steps = WARM_UP + steps;
        for i in 0..steps {
            unless_ended(go_on)?;
            // The sequences grow to their depth.
            let cached = self.tokens - steps + i;
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
            let buffer = match &buffer {
                Some(b) => b,
                None => buffer.insert(self.step_buffer(&attention, cuts.len())?),
            };
            let step = Step::upload(b, buffer, &seqs, self.tokens, &cuts, &[])?;
            let mut outcome = Ok(());
            let ms = b.time(&mut || {
                b.replayable(&mut || {
                    outcome = self.layers(&mut attention, &step);
                    outcome.is_ok()
                })
            })?;
            outcome?;
            attention.ran(&seqs, &cuts);
            if i >= WARM_UP {
                samples.push(ms / layers as f64);
            }
        }
        Ok((Summary::of(samples), self.last_step(&attention)?))
    }

    /// The check of the last layer, sequence and KV head of the last step.
    fn last_step(&self, attention: &Attention) -> Result<Check> {
        let (layer, sequence) = (self.of.layers - 1, self.batch - 1);
        let plan = &attention.plan().layers[layer];
        let sparse = plan.sparse() && self.tokens > plan.budget.dense_until();
        let lists = attention.attended(layer).filter(|_| sparse);
        let asked = Asked {
            row: sequence,
            seen: self.tokens,
            chosen: lists.map(|(chosen, map)| (sequence, chosen, map)),
        };
        Head::of(self, layer, sequence)?.check(self, &asked)
    }

    /// Bytes that a step of `plan` must read of the cache, over all layers and sequences.
    pub fn bytes(&self, plan: &Plan) -> u64 {
        let (of, windows) = (self.of, vec![None; self.of.layers]);
        let reads = KvReads {
            windows: &windows,
            heads: of.heads,
            kv_heads: of.kv_heads,
            head_dim: of.head_dim,
            elem: of.dtype.bytes(),
        };
        self.batch as u64 * plan.bytes_read(self.tokens, &reads)
    }
}
