//! The engine: a model, its cache, and the open sequences.

use super::{AuditConfig, Doubling, EngineError};
use crate::backend::Backend;
use crate::kv::{KvCache, PageTable};
use crate::model::{
    Attention, ChatTemplate, Checkpoint, Decoder, LayerAudit, LayerProbe, Probe, Tokenizer,
};
use crate::select::{Given, KeyProfile, KvReads, Plan, SelectorFactory};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An open sequence: its slot, and a number that no other sequence of the process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeqId(pub(super) usize, pub(super) u64);

impl SeqId {
    fn new(slot: usize) -> Self {
        static OPENED: AtomicU64 = AtomicU64::new(0);
        SeqId(slot, OPENED.fetch_add(1, Ordering::Relaxed))
    }
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: SeqId,
    pub(super) table: PageTable,
    pub(super) decode_steps: usize,
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
    /// What was measured of the model, in the decoder's key order.
    pub(super) profile: Option<KeyProfile>,
    pub(super) audit: Option<AuditConfig>,
    pub(super) fingerprint: String,
    pub(super) notes: Vec<String>,
    /// The keys are sorted by energy, or the caller chose the checkpoint's order.
    pub(super) key_order_settled: bool,
    pub(super) sequences: Vec<Option<Sequence>>,
    /// Sequences kept after their answer, with the tokens they hold, oldest first.
    pub(super) kept: Vec<(SeqId, Vec<u32>)>,
    /// Decode steps since the audit was set.
    pub(super) audit_steps: usize,
    pub(super) doubling: Doubling,
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
        let limits = self.decoder.limits();
        limits.rows - limits.seqs
    }

    /// Bytes of KV cache that one decode step reads for a sequence of `n` tokens under the current plan.
    pub fn bytes_read(&self, n: usize) -> u64 {
        self.plan().bytes_read(n, &self.kv_reads())
    }

    /// Sizes that [`Plan::bytes_read`] counts with.
    pub fn kv_reads(&self) -> KvReads<'_> {
        self.decoder.config().kv_reads(self.cache.shape().dtype.bytes())
    }

    /// Changes the method. Sequences keep their cached tokens; what methods knew about them is forgotten.
    ///
    /// # Errors
    /// [`EngineError::Select`] when the plan does not fit the model or reads a summary that the cache was not
    /// built with.
    pub fn set_plan(&mut self, plan: Plan) -> Result<(), EngineError> {
        let c = self.decoder.config();
        plan.check(&c.plan_shape(&self.fingerprint))?;
        let s = *self.cache.shape();
        let missing =
            |what| crate::select::SelectError::MissingSummary { method: plan.method.clone(), what };
        if plan.int8_dims() > s.int8_dims {
            return Err(missing("the int8 key copy").into());
        }
        if plan.key_stats() && !s.key_stats {
            return Err(missing("key statistics").into());
        }
        if plan.value_stats() && !s.value_stats {
            return Err(missing("the sums of the values").into());
        }
        if plan.summaries().into_iter().any(|kind| !self.cache.keeps(kind)) {
            return Err(missing("summaries of the keys").into());
        }
        if plan.wants_forecast() && !self.decoder.has_forecast() {
            return Err(crate::select::SelectError::NoForecast { method: plan.method }.into());
        }
        if plan.wants_key_order() && !self.key_order_settled {
            return Err(missing("energy-sorted keys").into());
        }
        // What one plan has read sparsely is not what another would have read.
        let old = self.attention.plan();
        let sparsely = old.reads_prompts_sparsely() || plan.reads_prompts_sparsely();
        let stale = sparsely && *old != plan;
        let shape = self.decoder.layer_shape(0, s.dtype);
        let b = self.decoder.backend().clone();
        let given = Given { custom: self.custom.as_ref(), profile: self.profile.as_ref() };
        let attention = Attention::new(&*b, plan, shape, given)?;
        if stale {
            self.forget_kept();
        }
        let before = std::mem::replace(&mut self.attention, attention);
        self.attention.probe = before.probe;
        Ok(())
    }

    /// Audits the selection from now on, the next decode step first, or stops.
    pub fn set_audit(&mut self, audit: Option<AuditConfig>) {
        self.audit = audit;
        self.audit_steps = 0;
    }

    /// Takes the audit results collected so far.
    pub fn take_audits(&mut self) -> Vec<LayerAudit> {
        std::mem::take(&mut self.attention.audits)
    }

    /// Takes what the audit did to the budget since the last call ([`AuditConfig::min_recall`]).
    pub fn take_doubling(&mut self) -> Doubling {
        std::mem::take(&mut self.doubling)
    }

    /// Stops the audit and forgets what it has collected: an engine that goes on must neither measure nor keep it.
    pub fn stop_audit(&mut self) {
        self.set_audit(None);
        self.take_audits();
    }

    /// Looks at the selections of every sparse layer from now on (in steps that decode a single sequence), or stops
    /// and forgets what was found. A look reads every key and copies a score of every token to the host.
    pub fn set_probe(&mut self, on: bool) {
        self.attention.probe = on.then(Probe::new);
    }

    /// Takes what was found since the last call: a [`LayerProbe`] for each sparse layer of each step.
    pub fn take_probes(&mut self) -> Vec<LayerProbe> {
        self.attention.probe.as_mut().map(|p| std::mem::take(&mut p.found)).unwrap_or_default()
    }

    /// Opens an empty sequence. Where every slot is in use, the oldest kept sequence makes way.
    ///
    /// # Errors
    /// [`EngineError::NoSlot`].
    pub fn open_sequence(&mut self) -> Result<SeqId, EngineError> {
        let slot = loop {
            match self.free_slot() {
                Some(slot) => break slot,
                None if self.evict_oldest_kept() => {}
                None => return Err(EngineError::NoSlot(self.sequences.len())),
            }
        };
        let b = self.decoder.backend().clone();
        self.attention.reset(&*b, slot)?;
        let id = SeqId::new(slot);
        self.sequences[slot] = Some(Sequence { id, table: PageTable::default(), decode_steps: 0 });
        Ok(id)
    }

    pub(super) fn free_slot(&self) -> Option<usize> {
        self.sequences.iter().position(Option::is_none)
    }

    /// Closes a sequence and frees its pages. Closing one that is not open is harmless.
    pub fn close(&mut self, seq: SeqId) {
        let open = self.sequences.get_mut(seq.0);
        if let Some(mut s) = open.and_then(|s| s.take_if(|s| s.id == seq)) {
            self.cache.truncate(&mut s.table, 0);
        }
    }

    pub(super) fn sequence(&self, seq: SeqId) -> Result<&Sequence, EngineError> {
        let open = self.sequences.get(seq.0).and_then(Option::as_ref);
        open.filter(|s| s.id == seq).ok_or(EngineError::NoSequence(seq.0))
    }

    /// Tokens cached of a sequence.
    ///
    /// # Errors
    /// [`EngineError::NoSequence`].
    pub fn cached(&self, seq: SeqId) -> Result<usize, EngineError> {
        Ok(self.sequence(seq)?.table.tokens())
    }

    pub(super) fn too_long(&self, tokens: usize, kept: usize) -> EngineError {
        let most = self.decoder.config().max_context;
        EngineError::ContextTooLong {
            tokens,
            room: if kept > 0 { format!(", {kept} more for the answer") } else { String::new() },
            limit: self.context(),
            trained: self.context() >= most,
        }
    }
}
