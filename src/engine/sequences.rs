//! The engine: open sequences and ragged steps over them.

use super::{AuditConfig, EngineError};
use crate::backend::Backend;
use crate::kv::{KvCache, PageTable};
use crate::model::{Attention, ChatTemplate, Checkpoint, Decoder, LayerAudit, StepSeq, Tokenizer};
use crate::select::{Plan, Role, SelectorFactory};
use std::sync::Arc;

/// An open sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeqId(pub(super) usize);

#[derive(Debug, Default)]
pub(super) struct Sequence {
    pub(super) table: PageTable,
    pub(super) decode_steps: usize,
}

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// The sequence.
    pub seq: SeqId,
    /// New tokens; exactly one when `decode` is set.
    pub tokens: &'a [u32],
    /// A decode step: sparse layers select. Otherwise the tokens are prefilled densely.
    pub decode: bool,
    /// Rows whose logits are wanted: the last one, all, or none.
    pub logits: WantLogits,
}

/// Rows whose logits a step returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WantLogits {
    /// No row.
    None,
    /// The last row of the sequence.
    Last,
    /// Every row of the sequence.
    All,
}

/// A model on a device with a KV cache and a method.
pub struct Engine {
    pub(super) checkpoint: Checkpoint,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) template: Option<ChatTemplate>,
    pub(super) decoder: Decoder,
    pub(super) cache: KvCache,
    pub(super) attention: Attention,
    pub(super) custom: Option<SelectorFactory>,
    pub(super) chunk: usize,
    pub(super) audit: Option<AuditConfig>,
    pub(super) fingerprint: String,
    pub(super) notes: Vec<String>,
    /// The keys are sorted by energy, or the caller chose the checkpoint's order.
    pub(super) key_order_settled: bool,
    pub(super) sequences: Vec<Option<Sequence>>,
    /// Sequences kept after their answer, with the tokens they hold, oldest first.
    pub(super) kept: Vec<(SeqId, Vec<u32>)>,
    pub(super) decode_steps: usize,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("decoder", &self.decoder)
            .field("attention", &self.attention)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// The model's files.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The model's chat template, if it has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The device.
    pub fn backend(&self) -> &dyn Backend {
        &**self.decoder.backend()
    }

    /// The KV cache.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// The plan that runs.
    pub fn plan(&self) -> &Plan {
        self.attention.plan()
    }

    /// Hash that names the model in plans and caches.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// What the user should know about how the engine was built.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Most tokens of a sequence.
    pub fn context(&self) -> usize {
        self.decoder.limits().context
    }

    /// Prompt tokens per step.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// Bytes of KV cache that one decode step reads for a sequence of `n` tokens under the current plan.
    pub fn bytes_read(&self, n: usize) -> u64 {
        let s = self.cache.shape();
        self.plan().bytes_read(n, s.kv_heads, s.head_dim, s.dtype.bytes())
    }

    /// Changes the method. Sequences keep their cached tokens; what methods knew about them is forgotten.
    ///
    /// # Errors
    /// [`EngineError::Select`] when the plan does not fit the model or reads a summary that the cache was not
    /// built with.
    pub fn set_plan(&mut self, plan: Plan) -> Result<(), EngineError> {
        let c = self.decoder.config();
        plan.check(&self.fingerprint, c.n_layers, c.head_dim)?;
        let s = *self.cache.shape();
        let missing =
            |what| crate::select::SelectError::MissingSummary { method: plan.method.clone(), what };
        if plan.int8_dims() > s.int8_dims {
            return Err(missing("the int8 key copy").into());
        }
        if plan.key_stats() && !s.key_stats {
            return Err(missing("key statistics").into());
        }
        if plan.wants_key_order() && !self.key_order_settled {
            return Err(missing("energy-sorted keys").into());
        }
        let shape = self.decoder.layer_shape(0, s.dtype);
        let b = self.decoder.backend().clone();
        self.attention = Attention::new(&*b, plan, shape, self.custom.as_ref())?;
        Ok(())
    }

    /// Audits the selection from now on, or stops.
    pub fn set_audit(&mut self, audit: Option<AuditConfig>) {
        self.audit = audit;
    }

    /// Takes the audit results collected so far.
    pub fn take_audits(&mut self) -> Vec<LayerAudit> {
        std::mem::take(&mut self.attention.audits)
    }

    /// Opens an empty sequence.
    ///
    /// # Errors
    /// [`EngineError::NoSlot`].
    pub fn open_sequence(&mut self) -> Result<SeqId, EngineError> {
        let n = self.sequences.len();
        let slot = self.sequences.iter().position(Option::is_none).ok_or(EngineError::NoSlot(n))?;
        let b = self.decoder.backend().clone();
        self.attention.reset(&*b, slot)?;
        self.sequences[slot] = Some(Sequence::default());
        Ok(SeqId(slot))
    }

    /// Closes a sequence and frees its pages. Closing twice is harmless.
    pub fn close(&mut self, seq: SeqId) {
        if let Some(mut s) = self.sequences[seq.0].take() {
            self.cache.truncate(&mut s.table, 0);
        }
    }

    pub(super) fn sequence(&self, seq: SeqId) -> Result<&Sequence, EngineError> {
        self.sequences.get(seq.0).and_then(Option::as_ref).ok_or(EngineError::NoSequence(seq.0))
    }

    /// Tokens cached of a sequence.
    ///
    /// # Errors
    /// [`EngineError::NoSequence`].
    pub fn cached(&self, seq: SeqId) -> Result<usize, EngineError> {
        Ok(self.sequence(seq)?.table.tokens())
    }

    /// Runs one ragged step. `each` gets (index in `work`, row inside that work's tokens, logits `[vocab]`).
    ///
    /// # Errors
    /// [`EngineError::ContextTooLong`] and [`EngineError::Cache`] before anything has run;
    /// [`EngineError::Backend`] when the device fails, after which the step's sequences should be closed.
    pub fn step(
        &mut self,
        work: &[Work<'_>],
        mut each: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), EngineError> {
        let rows: usize = work.iter().map(|w| w.tokens.len()).sum();
        if rows > self.decoder.limits().rows {
            return Err(EngineError::BadOption(format!(
                "a step of {rows} rows, at most {} fit; use a smaller chunk",
                self.decoder.limits().rows
            )));
        }
        let b = self.decoder.backend().clone();
        for w in work {
            if w.tokens.is_empty() || (w.decode && w.tokens.len() != 1) {
                return Err(EngineError::BadOption("a decode step takes one token".into()));
            }
            let tokens = self.cached(w.seq)? + w.tokens.len();
            if tokens > self.context() {
                return Err(self.too_long(tokens, 0));
            }
        }
        self.make_room(&*b, work)?;
        self.attention.audit_layers = match self.audit {
            Some(a) if work.iter().any(|w| w.decode) => {
                let layers = &self.attention.plan().layers;
                let sparse: Vec<usize> =
                    (0..layers.len()).filter(|&l| layers[l].role != Role::Dense).collect();
                a.layers_at(self.decode_steps, &sparse)
            }
            _ => Vec::new(),
        };
        let mut seqs = Vec::with_capacity(work.len());
        for w in work {
            let id = w.seq.0;
            let s = self.sequences[id].as_ref().ok_or(EngineError::NoSequence(id))?;
            seqs.push(StepSeq {
                tokens: w.tokens,
                cached: s.table.tokens() - w.tokens.len(),
                pages: s.table.pages(),
                slot: w.seq.0,
                decode: w.decode.then_some(s.decode_steps),
            });
        }
        let step = self.decoder.forward(&seqs, &self.cache, &mut self.attention)?;
        for w in work.iter().filter(|w| w.decode) {
            if let Some(s) = self.sequences[w.seq.0].as_mut() {
                s.decode_steps += 1;
            }
        }
        if work.iter().any(|w| w.decode) {
            self.decode_steps += 1;
        }

        let mut wanted = Vec::new();
        for (i, w) in work.iter().enumerate() {
            let n = w.tokens.len();
            let rows = match w.logits {
                WantLogits::None => n..n,
                WantLogits::Last => n - 1..n,
                WantLogits::All => 0..n,
            };
            wanted.extend(rows.map(|r| (i, r, step.first_row[i] + r)));
        }
        let rows: Vec<usize> = wanted.iter().map(|w| w.2).collect();
        self.decoder.logits(&rows, |i, logits| each(wanted[i].0, wanted[i].1, logits))?;
        Ok(())
    }

    /// Gives every sequence of a step its pages, or none of them any.
    fn make_room(&mut self, b: &dyn Backend, work: &[Work<'_>]) -> Result<(), EngineError> {
        for (i, w) in work.iter().enumerate() {
            let id = w.seq.0;
            let s = self.sequences[id].as_mut().ok_or(EngineError::NoSequence(id))?;
            let room = self.cache.extend(b, &mut s.table, w.tokens.len());
            let failed = match room {
                Ok(Ok(())) => continue,
                Ok(Err(device)) => {
                    // Pages are taken, their copies are not: give this one back as well.
                    let before = s.table.tokens() - w.tokens.len();
                    self.cache.truncate(&mut s.table, before);
                    EngineError::Backend(device)
                }
                Err(full) => EngineError::Cache(full),
            };
            for w in &work[..i] {
                if let Some(s) = self.sequences[w.seq.0].as_mut() {
                    let before = s.table.tokens() - w.tokens.len();
                    self.cache.truncate(&mut s.table, before);
                }
            }
            return Err(failed);
        }
        Ok(())
    }

    /// Prefills `tokens` chunk by chunk. `each` gets (position, logits) of the wanted rows;
    /// `progress` gets the tokens done and answers whether to go on.
    ///
    /// # Errors
    /// As [`Engine::step`]; [`EngineError::Interrupted`] when `progress` answers false.
    pub fn prefill(
        &mut self,
        seq: SeqId,
        tokens: &[u32],
        logits: WantLogits,
        mut each: impl FnMut(usize, &[f32]),
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<(), EngineError> {
        let mut done = 0;
        for chunk in tokens.chunks(self.chunk) {
            if !progress(done) {
                return Err(EngineError::Interrupted);
            }
            let last = done + chunk.len() == tokens.len();
            let want = match logits {
                WantLogits::Last if !last => WantLogits::None,
                w => w,
            };
            let at = self.cached(seq)?;
            let work = [Work { seq, tokens: chunk, decode: false, logits: want }];
            self.step(&work, |_, row, l| each(at + row, l))?;
            done += chunk.len();
        }
        self.backend().sync()?;
        progress(done);
        Ok(())
    }

    /// One decode step of one sequence; returns the logits `[vocab]`.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn decode(&mut self, seq: SeqId, token: u32) -> Result<Vec<f32>, EngineError> {
        let mut out = Vec::new();
        let work = [Work { seq, tokens: &[token], decode: true, logits: WantLogits::Last }];
        self.step(&work, |_, _, l| out = l.to_vec())?;
        Ok(out)
    }

    /// The `n` most likely tokens after a prompt, one by one; the model's own end tokens do not end it.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn greedy_tokens(&mut self, prompt: &[u32], n: usize) -> Result<Vec<u32>, EngineError> {
        let seq = self.open_sequence()?;
        let mut out = Vec::with_capacity(n);
        let first = |_: usize, l: &[f32]| out.push(super::greedy(l));
        let result = self.prefill(seq, prompt, WantLogits::Last, first, |_| true).and_then(|()| {
            while out.len() < n {
                let last = *out.last().ok_or(EngineError::EmptyPrompt)?;
                out.push(super::greedy(&self.decode(seq, last)?));
            }
            Ok(())
        });
        self.close(seq);
        result.map(|()| out)
    }

    pub(super) fn too_long(&self, tokens: usize, kept: usize) -> EngineError {
        let most = self.decoder.config().max_context;
        EngineError::ContextTooLong {
            tokens,
            room: if kept > 0 {
                format!(" and {kept} are kept for the answer")
            } else {
                String::new()
            },
            limit: self.context(),
            hint: if self.context() >= most {
                " (the most this model was trained for)".into()
            } else {
                String::new()
            },
        }
    }
}
