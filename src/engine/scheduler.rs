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
    stats: Stats,
}

/// Runs requests together: every step decodes one token of each running request and prefills a chunk of one that
/// waits. Where the KV cache is too small for all of them, the newest make way for the oldest.
pub struct Scheduler<'e> {
    engine: &'e mut Engine,
    waiting: VecDeque<(usize, Request, Vec<u32>)>,
    /// Oldest first.
    running: Vec<Running>,
    submitted: usize,
    /// Not yet handed out.
    events: Vec<Event>,
}

impl std::fmt::Debug for Scheduler<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scheduler").field("waiting", &self.waiting.len()).finish_non_exhaustive()
    }
}

impl<'e> Scheduler<'e> {
    /// No request yet.
    pub fn new(engine: &'e mut Engine) -> Self {
        Scheduler {
            engine,
            waiting: VecDeque::new(),
            running: Vec::new(),
            submitted: 0,
            events: Vec::new(),
        }
    }

    /// The engine behind it.
    pub fn engine(&mut self) -> &mut Engine {
        self.engine
    }

    /// Queues a request; returns its number in events.
    ///
    /// # Errors
    /// From [`Request::encode`]; [`EngineError::ContextTooLong`] when prompt and one token do not fit,
    /// [`EngineError::BadOption`] for tokens outside the vocabulary and from [`Sampling::check`](super::Sampling::check).
    pub fn submit(&mut self, request: Request) -> Result<usize, EngineError> {
        request.sampling.check()?;
        let tokens = request.encode(self.engine)?;
        self.engine.check_tokens(&tokens)?;
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
    /// As [`Engine::step`]; [`EngineError::NoSlot`] when requests wait for slots that other open sequences hold.
    /// Running requests are then closed, with no more events of theirs, waiting ones still wait; what happened before the
    /// error is said by the next call. A request that cannot go on by itself ends alone, see [`Finish`].
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        self.retire_cancelled();
        if let Err(e) = self.admit().and_then(|()| self.run()) {
            for r in self.running.drain(..) {
                self.engine.close(r.seq);
            }
            return Err(e);
        }
        Ok(std::mem::take(&mut self.events))
    }

    fn retire_cancelled(&mut self) {
        let cancelled = |r: &Request| r.cancel.load(Ordering::Relaxed);
        while let Some(i) = self.running.iter().position(|r| cancelled(&r.spec)) {
            self.finish(i, Finish::Cancelled);
        }
        self.waiting.retain(|(request, spec, tokens)| {
            // Read once: a request that leaves the queue is always said to have ended.
            let gone = cancelled(spec);
            if gone {
                let stats = Stats {
                    prompt_tokens: tokens.len(),
                    finish: Some(Finish::Cancelled),
                    ..Stats::default()
                };
                let text = String::new();
                self.events.push(Event::Finished { request: *request, text, stats });
            }
            !gone
        });
    }

    fn admit(&mut self) -> Result<(), EngineError> {
        while let Some((_, _, prompt)) = self.waiting.front() {
            let (seq, reused) = match self.engine.open_for(prompt) {
                Ok(opened) => opened,
                Err(EngineError::NoSlot(_)) if !self.running.is_empty() => break,
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
            });
        }
        Ok(())
    }

    /// One step of as many running requests as the KV cache has pages for, the oldest first.
    fn run(&mut self) -> Result<(), EngineError> {
        let mut n = self.running.len();
        while n > 0 {
            match self.run_first(n) {
                Err(EngineError::Cache(_)) if n > 1 => n -= 1,
                Err(EngineError::Cache(full)) => {
                    self.make_way().ok_or(full)?;
                    n = self.running.len();
                }
                done => return done,
            }
        }
        Ok(())
    }

    /// Takes the pages of the newest request that holds some: one that still reads its prompt waits again, another
    /// ends. `None` when only the oldest holds any.
    fn make_way(&mut self) -> Option<()> {
        let holds = |r: &Running| self.engine.cached(r.seq).is_ok_and(|n| n > 0);
        let i = self.running.iter().rposition(holds).filter(|&i| i > 0)?;
        if self.running[i].next.is_some() {
            self.finish(i, Finish::Context);
        } else {
            let r = self.running.remove(i);
            self.engine.close(r.seq);
            self.waiting.push_front((r.request, r.spec, r.prompt));
        }
        Some(())
    }

    /// One step of the `n` oldest requests.
    fn run_first(&mut self, n: usize) -> Result<(), EngineError> {
        let chunk = self.engine.chunk();
        let mut work = Vec::new();
        let mut owner = Vec::new();
        let mut prefilling = false;
        for (i, r) in self.running[..n].iter().enumerate() {
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
                r.stats.decode_steps += 1;
                r.stats.decode_seconds += seconds;
                r.fed_answer.extend(r.next);
            } else {
                r.fed += n;
                r.stats.prefill_tokens += n;
                r.stats.prefill_seconds += seconds;
                let (request, done, of) = (r.request, r.fed, r.prompt.len());
                self.events.push(Event::Prefilled { request, done, of });
            }
            if let Some(logits) = logits
                && let Some(why) = self.draw(i, &logits)
            {
                finished.push((i, why));
            }
        }
        for (i, why) in finished.into_iter().rev() {
            self.finish(i, why);
        }
        Ok(())
    }

    /// Draws the next token of running request `i`; says why the request ends, if it does.
    fn draw(&mut self, i: usize, logits: &[f32]) -> Option<Finish> {
        let r = &mut self.running[i];
        if r.spec.max_tokens == 0 {
            return Some(Finish::Length);
        }
        let Some(token) = r.sampler.sample(logits) else {
            return Some(Finish::NoFiniteLogit);
        };
        if self.engine.checkpoint.config().eos.contains(&token) {
            return Some(Finish::Eos);
        }
        if r.spec.stop_tokens.contains(&token) {
            return Some(Finish::Stop);
        }
        r.stats.generated_tokens += 1;
        let (text, stopped) = r.stop.push(&r.text.push(token));
        let piece = Piece { token: Some(token), text };
        self.events.push(Event::Piece { request: r.request, piece });
        if stopped {
            // Nothing that follows a stop string is shown, half a character neither.
            r.text = DecodeStream::new(self.engine.tokenizer.clone());
            return Some(Finish::Stop);
        }
        r.next = Some(token);
        if r.stats.generated_tokens >= r.spec.max_tokens {
            return Some(Finish::Length);
        }
        let cached = r.prompt.len() + r.stats.generated_tokens - 1;
        (cached >= self.engine.context()).then_some(Finish::Context)
    }

    fn finish(&mut self, i: usize, why: Finish) {
        let mut r = self.running.remove(i);
        let n = self.engine.cached(r.seq).unwrap_or(0);
        let layers = self.engine.plan().layers.len();
        let dense = crate::select::Plan::dense(layers);
        r.stats.kv_bytes = self.engine.bytes_read(n);
        r.stats.kv_bytes_dense = dense.bytes_read(n, &self.engine.kv_reads());
        r.stats.finish = Some(why);
        if r.spec.keep && n > 0 && why != Finish::NoFiniteLogit {
            r.prompt.truncate(r.fed);
            r.prompt.append(&mut r.fed_answer);
            self.engine.kept.push((r.seq, r.prompt));
        } else {
            self.engine.close(r.seq);
        }
        let text = r.stop.finish() + &r.text.finish();
        self.events.push(Event::Finished { request: r.request, text, stats: r.stats });
    }
}

impl Drop for Scheduler<'_> {
    fn drop(&mut self) {
        for r in self.running.drain(..) {
            self.engine.close(r.seq);
        }
    }
}
