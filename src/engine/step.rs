//! Ragged steps over open sequences: prefill and decode.

use super::{Engine, EngineError, SeqId};
use crate::backend::Backend;
use crate::model::{Observer, StepSeq};

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// The sequence.
    pub seq: SeqId,
    /// New tokens; exactly one when `decode` is set.
    pub tokens: &'a [u32],
    /// A decode step: sparse layers select. Otherwise the tokens are prefilled: densely, or in the tiles of the plan.
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

impl Engine {
    /// Runs one ragged step. `each` gets (index in `work`, row inside that work's tokens, logits `[vocab]`).
    ///
    /// # Errors
    /// Before anything has run: [`EngineError::NoSequence`], [`EngineError::ContextTooLong`],
    /// [`EngineError::Cache`], and [`EngineError::BadOption`] for tokens outside the vocabulary, a sequence that
    /// occurs twice, and wrong numbers of tokens. [`EngineError::Backend`] and
    /// [`EngineError::Select`] when the device fails, in the step or while the budget is doubled after it
    /// ([`AuditConfig::min_recall`](super::AuditConfig::min_recall)): the step's sequences should then be closed.
    pub fn step(
        &mut self,
        work: &[Work<'_>],
        each: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.step_observed(work, None, each)
    }

    /// [`Engine::step`] with somebody who looks into the layers.
    pub(super) fn step_observed(
        &mut self,
        work: &[Work<'_>],
        observer: Option<&mut Observer<'_>>,
        mut each: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.check_work(work)?;
        let b = self.decoder.backend().clone();
        self.make_room(&*b, work)?;
        let decodes = work.iter().any(|w| w.decode);
        let audit = self.audit.filter(|a| decodes && a.due(self.audit_steps));
        let audited = self.attention.audits.len();
        self.attention.audit = audit.is_some();
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
        if let Some(probe) = &mut self.attention.probe {
            probe.begin(&seqs);
        }
        let (cache, attention) = (&self.cache, &mut self.attention);
        let step = self.decoder.forward_observed(&seqs, cache, attention, observer)?;
        for w in work.iter().filter(|w| w.decode) {
            if let Some(s) = self.sequences[w.seq.0].as_mut() {
                s.decode_steps += 1;
            }
        }
        self.audit_steps += usize::from(decodes);

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
        let found = &self.attention.audits[audited..];
        self.doubling.unmeasured &= found.is_empty();
        match audit {
            Some(a) if a.too_little(found) => self.double_budget(),
            _ => Ok(()),
        }
    }

    fn double_budget(&mut self) -> Result<(), EngineError> {
        let audits = self.take_audits();
        let widened = self.set_plan(self.plan().doubled(self.context()));
        self.attention.audits = audits;
        match widened {
            Ok(()) => {
                self.doubling.doubled += 1;
                self.doubling.unmeasured = true;
            }
            // A smaller budget still answers.
            Err(e) if e.is_full() => self.doubling.no_room += 1,
            Err(e) => return Err(e),
        }
        Ok(())
    }

    fn check_work(&self, work: &[Work<'_>]) -> Result<(), EngineError> {
        let bad = |what: String| Err(EngineError::BadOption(what));
        for (i, w) in work.iter().enumerate() {
            if w.tokens.is_empty() {
                return bad("a step needs a token of each of its sequences".into());
            }
            if w.decode && w.tokens.len() != 1 {
                return bad(format!("a decode step takes one token, not {}", w.tokens.len()));
            }
            if work[..i].iter().any(|other| other.seq == w.seq) {
                return bad("a step takes each sequence once".into());
            }
            self.check_tokens(w.tokens)?;
            let tokens = self.cached(w.seq)?.saturating_add(w.tokens.len());
            if tokens > self.context() {
                return Err(self.too_long(tokens, 0));
            }
        }
        let rows: usize = work.iter().map(|w| w.tokens.len()).sum();
        let most = self.decoder.limits().rows;
        if rows > most {
            return bad(format!("a step of {rows} rows, at most {most} fit; use smaller chunks"));
        }
        Ok(())
    }

    pub(super) fn check_tokens(&self, tokens: &[u32]) -> Result<(), EngineError> {
        let vocab = self.decoder.config().vocab;
        match tokens.iter().find(|&&t| t as usize >= vocab) {
            Some(t) => Err(EngineError::BadOption(format!(
                "token {t} lies outside the vocabulary of {vocab} tokens"
            ))),
            None => Ok(()),
        }
    }

    /// Gives every sequence of a step its pages, or none of them any. Kept sequences make way.
    fn make_room(&mut self, b: &dyn Backend, work: &[Work<'_>]) -> Result<(), EngineError> {
        for (i, w) in work.iter().enumerate() {
            if let Err(e) = self.extend(b, w.seq, w.tokens.len()) {
                for w in &work[..i] {
                    self.shrink(w.seq, w.tokens.len());
                }
                return Err(e);
            }
        }
        Ok(())
    }

    fn extend(&mut self, b: &dyn Backend, seq: SeqId, n: usize) -> Result<(), EngineError> {
        loop {
            let s = self.sequences[seq.0].as_mut().ok_or(EngineError::NoSequence(seq.0))?;
            match self.cache.extend(b, &mut s.table, n) {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(device)) => {
                    // Pages are taken, their copies are not: give them back as well.
                    self.shrink(seq, n);
                    return Err(device.into());
                }
                Err(full) if !self.evict_oldest_kept() => return Err(full.into()),
                Err(_) => {}
            }
        }
    }

    fn shrink(&mut self, seq: SeqId, n: usize) {
        if let Some(s) = self.sequences[seq.0].as_mut() {
            let before = s.table.tokens() - n;
            self.cache.truncate(&mut s.table, before);
        }
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
        let all = self.cached(seq)?.saturating_add(tokens.len());
        if all > self.context() {
            return Err(self.too_long(all, 0));
        }
        let mut done = 0;
        for chunk in tokens.chunks(self.chunk()) {
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
    /// As [`Engine::step`]; [`EngineError::EmptyPrompt`], [`EngineError::NoFiniteLogit`].
    pub fn greedy_tokens(&mut self, prompt: &[u32], n: usize) -> Result<Vec<u32>, EngineError> {
        if prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        let seq = self.open_sequence()?;
        let tokens = self.greedy_from(seq, prompt, n);
        self.close(seq);
        tokens
    }

    fn greedy_from(
        &mut self,
        seq: SeqId,
        prompt: &[u32],
        n: usize,
    ) -> Result<Vec<u32>, EngineError> {
        let mut logits = Vec::new();
        let last = |_: usize, l: &[f32]| logits = l.to_vec();
        self.prefill(seq, prompt, WantLogits::Last, last, |_| true)?;
        let mut out = Vec::with_capacity(n.min(self.context()));
        while out.len() < n {
            if let Some(&last) = out.last() {
                logits = self.decode(seq, last)?;
            }
            out.push(super::greedy(&logits).ok_or(EngineError::NoFiniteLogit)?);
        }
        Ok(out)
    }
}
