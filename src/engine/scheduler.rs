//! Runs requests together, step by step.

use super::{
    Engine, EngineError, Event, Finish, Piece, Request, Sampler, SeqId, Stats, StopFilter,
    WantLogits, Work,
};
use crate::model::{DecodeStream, Tokenizer};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

struct Running {
    request: usize,
    seq: SeqId,
    prompt: Vec<u32>,
    fed: usize,
    /// Answer tokens that are in the cache.
    fed_answer: Vec<u32>,
    /// Drawn, not yet fed.
    next: Option<u32>,
    spec: Request,
    sampler: Sampler,
    stop: StopFilter,
    text: DecodeStream<Arc<Tokenizer>>,
    started: Instant,
    stats: Stats,
}

/// Runs requests together: every step decodes one token of each running request and prefills a chunk of one that
/// waits.
pub struct Scheduler<'e> {
    engine: &'e mut Engine,
    waiting: VecDeque<(usize, Request, Vec<u32>)>,
    running: Vec<Running>,
    submitted: usize,
}

impl std::fmt::Debug for Scheduler<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scheduler").field("waiting", &self.waiting.len()).finish_non_exhaustive()
    }
}

impl<'e> Scheduler<'e> {
    /// No request yet.
    pub fn new(engine: &'e mut Engine) -> Self {
        Scheduler { engine, waiting: VecDeque::new(), running: Vec::new(), submitted: 0 }
    }

    /// The engine behind it.
    pub fn engine(&mut self) -> &mut Engine {
        self.engine
    }

    /// Queues a request; returns its number in events.
    ///
    /// # Errors
    /// From [`Request::encode`]; [`EngineError::ContextTooLong`] when prompt and one token do not fit.
    pub fn submit(&mut self, request: Request) -> Result<usize, EngineError> {
        let tokens = request.encode(self.engine)?;
        if tokens.len() >= self.engine.context() {
            return Err(self.engine.too_long(tokens.len(), 1));
        }
        let id = self.submitted;
        self.submitted += 1;
        self.waiting.push_back((id, request, tokens));
        Ok(id)
    }

    /// Nothing is queued or running.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Runs one step and says what happened.
    ///
    /// # Errors
    /// As [`Engine::step`]; running requests are then closed.
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        let mut events = Vec::new();
        self.retire_cancelled(&mut events);
        self.admit()?;
        if self.running.is_empty() {
            return Ok(events);
        }
        let result = self.run(&mut events);
        if result.is_err() {
            for r in self.running.drain(..) {
                self.engine.close(r.seq);
            }
        }
        result.map(|()| events)
    }

    fn retire_cancelled(&mut self, events: &mut Vec<Event>) {
        let cancelled = |r: &Request| r.cancel.load(Ordering::Relaxed);
        while let Some(i) = self.running.iter().position(|r| cancelled(&r.spec)) {
            events.push(self.finish(i, Finish::Cancelled));
        }
        self.waiting.retain(|(request, spec, tokens)| {
            if cancelled(spec) {
                let stats = Stats {
                    prompt_tokens: tokens.len(),
                    finish: Some(Finish::Cancelled),
                    ..Stats::default()
                };
                events.push(Event::Finished { request: *request, text: String::new(), stats });
            }
            !cancelled(spec)
        });
    }

    fn admit(&mut self) -> Result<(), EngineError> {
        while !self.waiting.is_empty() {
            let (seq, reused) = match self.engine.open_for(&self.waiting[0].2) {
                Ok(opened) => opened,
                Err(EngineError::NoSlot(_)) => break,
                Err(e) => return Err(e),
            };
            let Some((request, spec, prompt)) = self.waiting.pop_front() else { break };
            self.running.push(Running {
                request,
                seq,
                sampler: Sampler::new(spec.sampling),
                stop: StopFilter::new(&spec.stop),
                stats: Stats {
                    prompt_tokens: prompt.len(),
                    reused_tokens: reused,
                    ..Stats::default()
                },
                prompt,
                fed: reused,
                fed_answer: Vec::new(),
                next: None,
                spec,
                text: DecodeStream::new(self.engine.tokenizer.clone()),
                started: Instant::now(),
            });
        }
        Ok(())
    }

    fn run(&mut self, events: &mut Vec<Event>) -> Result<(), EngineError> {
        let chunk = self.engine.chunk();
        let mut work = Vec::new();
        let mut owner = Vec::new();
        let mut prefilling = false;
        for (i, r) in self.running.iter().enumerate() {
            if let Some(token) = &r.next {
                let tokens = std::slice::from_ref(token);
                work.push(Work { seq: r.seq, tokens, decode: true, logits: WantLogits::Last });
                owner.push(i);
            } else if !prefilling {
                prefilling = true;
                let end = (r.fed + chunk).min(r.prompt.len());
                let last = end == r.prompt.len();
                let logits = if last { WantLogits::Last } else { WantLogits::None };
                let tokens = &r.prompt[r.fed..end];
                work.push(Work { seq: r.seq, tokens, decode: false, logits });
                owner.push(i);
            }
        }
        let t = Instant::now();
        let mut logits: Vec<Option<Vec<f32>>> = vec![None; work.len()];
        self.engine.step(&work, |w, _, l| logits[w] = Some(l.to_vec()))?;
        let seconds = t.elapsed().as_secs_f64();
        let fed: Vec<(usize, usize, bool)> =
            owner.iter().zip(&work).map(|(&i, w)| (i, w.tokens.len(), w.decode)).collect();
        drop(work);
        let mut finished = Vec::new();
        for ((i, n, decode), logits) in fed.into_iter().zip(logits) {
            let r = &mut self.running[i];
            if decode {
                r.stats.decode_seconds += seconds;
                r.fed_answer.extend(r.next);
            } else {
                r.fed += n;
                let (request, done, of) = (r.request, r.fed, r.prompt.len());
                events.push(Event::Prefilled { request, done, of });
                if logits.is_some() {
                    r.stats.prefill_seconds = r.started.elapsed().as_secs_f64();
                }
            }
            if let Some(logits) = logits
                && let Some(why) = self.draw(i, &logits, events)
            {
                finished.push((i, why));
            }
        }
        for (i, why) in finished.into_iter().rev() {
            events.push(self.finish(i, why));
        }
        Ok(())
    }

    /// Draws the next token of running request `i`; says why the request ends, if it does.
    fn draw(&mut self, i: usize, logits: &[f32], events: &mut Vec<Event>) -> Option<Finish> {
        let r = &mut self.running[i];
        if r.spec.max_tokens == 0 {
            return Some(Finish::Length);
        }
        let token = r.sampler.sample(logits);
        if self.engine.checkpoint.config().eos.contains(&token) {
            return Some(Finish::Eos);
        }
        if r.spec.stop_tokens.contains(&token) {
            return Some(Finish::Stop);
        }
        r.stats.generated_tokens += 1;
        let (shown, stopped) = r.stop.push(&r.text.push(token));
        events.push(Event::Piece { request: r.request, piece: Piece { token, text: shown } });
        if stopped {
            return Some(Finish::Stop);
        }
        r.next = Some(token);
        if r.stats.generated_tokens >= r.spec.max_tokens {
            return Some(Finish::Length);
        }
        let cached = r.prompt.len() + r.stats.generated_tokens - 1;
        (cached >= self.engine.context()).then_some(Finish::Context)
    }

    fn finish(&mut self, i: usize, why: Finish) -> Event {
        let mut r = self.running.remove(i);
        let n = self.engine.cached(r.seq).unwrap_or(0);
        let layers = self.engine.plan().layers.len();
        let dense = crate::select::Plan::dense(layers);
        r.stats.kv_bytes = self.engine.bytes_read(n);
        r.stats.kv_bytes_dense = dense.bytes_read(n, &self.engine.kv_reads());
        r.stats.finish = Some(why);
        if r.spec.keep && n > 0 {
            r.prompt.truncate(r.fed);
            r.prompt.append(&mut r.fed_answer);
            self.engine.kept.push((r.seq, r.prompt));
        } else {
            self.engine.close(r.seq);
        }
        let text = match why {
            Finish::Stop => String::new(),
            _ => r.stop.finish() + &r.text.finish(),
        };
        Event::Finished { request: r.request, text, stats: r.stats }
    }
}

impl Drop for Scheduler<'_> {
    fn drop(&mut self) {
        for r in self.running.drain(..) {
            self.engine.close(r.seq);
        }
    }
}
