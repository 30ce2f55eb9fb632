//! The answer to one request, as an iterator.

use super::{AuditSummary, Engine, EngineError, Event, Finish, Piece, Request, Scheduler, Stats};
use std::collections::VecDeque;

/// The answer to one request, token by token.
#[derive(Debug)]
pub struct Generation<'e> {
    scheduler: Scheduler<'e>,
    ready: VecDeque<Piece>,
    stats: Option<Stats>,
    failed: bool,
    on_prefill: Option<PrefillHook>,
}

struct PrefillHook(Box<dyn FnMut(usize, usize)>);

impl std::fmt::Debug for PrefillHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrefillHook")
    }
}

impl Engine {
    /// Generates an answer; iterate over the result for its pieces.
    ///
    /// # Errors
    /// As [`Scheduler::submit`].
    pub fn generate(&mut self, request: Request) -> Result<Generation<'_>, EngineError> {
        let mut scheduler = Scheduler::new(self);
        scheduler.submit(request)?;
        Ok(Generation {
            scheduler,
            ready: VecDeque::new(),
            stats: None,
            failed: false,
            on_prefill: None,
        })
    }
}

impl Generation<'_> {
    /// Hears of prompt tokens cached (done, of).
    pub fn on_prefill(mut self, f: impl FnMut(usize, usize) + 'static) -> Self {
        self.on_prefill = Some(PrefillHook(Box::new(f)));
        self
    }

    /// Measurements, once the answer has ended.
    pub fn stats(&self) -> Option<&Stats> {
        self.stats.as_ref()
    }

    /// Audit results so far (taken from the engine).
    pub fn audit(&mut self) -> AuditSummary {
        let engine = self.scheduler.engine();
        let doubling = engine.take_doubling();
        AuditSummary { doubling, ..AuditSummary::new(&engine.take_audits()) }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Some(Ok(piece));
            }
            if self.failed {
                return None;
            }
            if let Some(stats) = &self.stats {
                self.failed = stats.finish == Some(Finish::NoFiniteLogit);
                return self.failed.then_some(Err(EngineError::NoFiniteLogit));
            }
            let events = match self.scheduler.step() {
                Ok(events) => events,
                Err(e) => {
                    self.failed = true;
                    return Some(Err(e));
                }
            };
            for event in events {
                match event {
                    Event::Prefilled { done, of, .. } => {
                        if let Some(hook) = &mut self.on_prefill {
                            (hook.0)(done, of);
                        }
                    }
                    Event::Piece { piece, .. } => self.ready.push_back(piece),
                    Event::Finished { text, stats, .. } => {
                        if !text.is_empty() {
                            self.ready.push_back(Piece { token: None, text });
                        }
                        self.stats = Some(stats);
                    }
                }
            }
        }
    }
}
