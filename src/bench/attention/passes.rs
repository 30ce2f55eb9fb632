//! Passes over a rig's sequences as prompts: chunk by chunk, all layers of a chunk one after the other, as the engine
//! reads them.

use super::check::{Asked, Head};
use super::rig::{GoOn, Rig, unless_ended};
use crate::backend::{Result, Tensor};
use crate::bench;
use crate::bench::kernels::Check;
use crate::model::{Attention, Clock, PhaseTimes, Step, StepSeq};
use crate::select::Plan;
use std::ops::Range;

/// Rows of the last chunk that are compared with the reference.
const SAMPLED: usize = 4;

/// What was found of one plan.
pub(super) struct Passes {
    /// Milliseconds of each pass, over all layers.
    pub ms: Vec<f64>,
    /// By layer, of one more pass in which the device waits between phases.
    pub phases: Vec<PhaseTimes>,
    /// Device bytes that the plan took besides the pools and activations of the rig, where the device tells.
    pub taken: Option<u64>,
    /// All bytes that were held, the rig's as well.
    pub held: Option<u64>,
    /// As the last chunk has left it.
    pub attention: Attention,
}

impl Rig<'_> {
    /// Tokens of a sequence that a step adds.
    fn chunk(&self) -> usize {
        self.rows / self.batch
    }

    /// The chunks of every sequence.
    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (tokens, chunk) = (self.tokens, self.chunk());
        (0..tokens).step_by(chunk).map(move |at| at..(at + chunk).min(tokens))
    }

    /// The step that reads one chunk of every sequence. `ids`: at least as many tokens.
    fn prompts<'s>(&'s self, chunk: &Range<usize>, ids: &'s [u32]) -> Vec<StepSeq<'s>> {
        let seq = |(slot, table): (usize, &'s crate::kv::PageTable)| StepSeq {
            tokens: &ids[..chunk.len()],
            cached: chunk.start,
            pages: table.pages(),
            slot,
            decode: None,
        };
        self.tables.iter().enumerate().map(seq).collect()
    }

    /// Reads one chunk; milliseconds of all layers where they are timed as one.
    fn read(
        &mut self,
        attention: &mut Attention,
        buffer: &Tensor,
        chunk: &Range<usize>,
        whole: bool,
    ) -> bench::Result<f64> {
        self.draw()?;
        let ids = vec![0; chunk.len()];
        let seqs = self.prompts(chunk, &ids);
        let (b, cuts) = (self.b, attention.cuts(&seqs));
        let step = Step::upload(b, buffer, &seqs, self.capacity(), &cuts, attention.tilings())?;
        let mut outcome = Ok(());
        let ms = if whole {
            b.time(&mut || {
                outcome = self.layers(attention, &step);
                Ok(())
            })?
        } else {
            outcome = self.layers(attention, &step);
            0.0
        };
        outcome?;
        attention.ran(&seqs, &cuts);
        Ok(ms)
    }

    /// Reads the whole prompts.
    fn pass(
        &mut self,
        attention: &mut Attention,
        buffer: &Tensor,
        whole: bool,
        go_on: &mut GoOn<'_>,
    ) -> bench::Result<f64> {
        (0..self.batch).try_for_each(|slot| attention.reset(self.b, slot))?;
        let chunks = self.chunks();
        let read = |chunk| {
            unless_ended(go_on)?;
            self.read(attention, buffer, &chunk, whole)
        };
        chunks.map(read).sum()
    }

    /// Reads the prompts with `plan`: the first and the last chunk to warm up, once phase by phase, and `repeats` times
    /// as the engine does.
    pub fn prompt(
        &mut self,
        plan: &Plan,
        repeats: usize,
        go_on: &mut GoOn<'_>,
    ) -> bench::Result<Passes> {
        let before = self.b.free_memory();
        let mut attention = self.attention(plan)?;
        let paces = attention.cuts(&[]).len();
        let buffer = self.step_buffer(&attention, paces)?;
        for chunk in self.chunks().take(1).chain(self.chunks().last()) {
            self.read(&mut attention, &buffer, &chunk, false)?;
        }
        self.b.sync()?;
        attention.clock = Clock::running(self.of.layers);
        self.pass(&mut attention, &buffer, false, go_on)?;
        let phases = std::mem::take(&mut attention.clock).found();
        let passes = (0..repeats).map(|_| self.pass(&mut attention, &buffer, true, go_on));
        let ms = passes.collect::<bench::Result<Vec<f64>>>()?;
        // Memory that the host shares is anybody's.
        let own = self.b.caps().topology == crate::backend::Topology::Discrete;
        let free = self.b.free_memory().filter(|_| own);
        let since = |before: Option<u64>| Some(before?.saturating_sub(free?));
        let (taken, held) = (since(before), since(self.free_before));
        Ok(Passes { ms, phases, taken, held, attention })
    }

    /// Compares rows of the last chunk in the last layer, of the last sequence and KV head, with the reference: the
    /// worst of them, and the positions of all.
    pub fn sampled(&self, attention: &Attention) -> Result<(Check, Vec<usize>)> {
        let (layer, sequence) = (self.of.layers - 1, self.batch - 1);
        let chunk = self.chunks().last().unwrap_or(0..self.tokens);
        let ids = vec![0; chunk.len()];
        let seqs = self.prompts(&chunk, &ids);
        let head = Head::of(self, layer, sequence)?;
        let last = chunk.len() - 1;
        let mut tokens: Vec<usize> =
            (0..SAMPLED).map(|i| chunk.start + last * i / (SAMPLED - 1)).collect();
        tokens.dedup();
        let check = |token: usize| {
            let asked = Asked {
                row: sequence * chunk.len() + token - chunk.start,
                seen: token + 1,
                chosen: attention.attended_tile(layer, &seqs, (sequence, token)),
            };
            head.check(self, &asked)
        };
        let mut worst = check(chunk.start)?;
        let mut elements = worst.elements;
        for &token in &tokens[1..] {
            let found = check(token)?;
            elements += found.elements;
            // A NaN is worse than any number.
            let worse = found.value / found.limit > worst.value / worst.limit;
            if worst.passed && (worse || !found.passed) {
                worst = found;
            }
        }
        Ok((Check { elements, ..worst }, tokens))
    }
}
