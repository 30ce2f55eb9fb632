//! Prefill and decode speed of a whole model: prompt length x depth x method x budget.

use super::arithmetic;
use super::report::{EndToEndReport, ModelFacts, Row, Traffic};
use super::{BenchError, Environment, INTERRUPTED, Result, Summary, bad};
use crate::engine::{Engine, EngineError, SeqId, WantLogits};
use crate::select::{MethodSpec, Plan, Variant};
use serde::Serialize;
use std::time::Instant;

/// The opening of Sense and Sensibility (public domain), repeated as often as needed.
const TEXT: &str = include_str!("../../assets/calibration.txt");

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct EndToEnd {
    /// Prompt lengths; 0 measures no prefill.
    pub prompts: Vec<usize>,
    /// Tokens to decode; 0 measures no decode.
    pub generate: Vec<usize>,
    /// Tokens that are in the cache before.
    pub depths: Vec<usize>,
    /// Methods with their options under the names of their rows; dense attention is always measured too, before them.
    pub methods: Vec<(String, MethodSpec)>,
    /// Finished plans under their names, measured after the methods.
    pub plans: Vec<(String, Plan)>,
    /// Samples per test.
    pub repeats: usize,
    /// Decode steps before the clock starts, in every repetition (they also hold a method's first choice of
    /// dimensions).
    pub warmup: usize,
}

/// What is going on.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// Filling the cache: tokens so far, of all.
    Fill(usize, usize),
    /// Measuring the named thing: measurements so far, of all.
    Measure(&'a str, usize, usize),
}

/// A method with its plan at one depth.
struct Contender {
    name: String,
    budget: Option<usize>,
    plan: Plan,
}

impl EndToEnd {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`BenchError::BadOption`](super::BenchError::BadOption).
    pub fn validate(&self) -> Result<()> {
        if self.repeats == 0 {
            return bad("give at least one repetition (-r 1)");
        }
        let any = |v: &[usize]| v.iter().any(|&n| n > 0);
        if self.depths.is_empty() || !(any(&self.prompts) || any(&self.generate)) {
            return bad(
                "nothing to measure: give a prompt length (-p), tokens to decode (-n), or both",
            );
        }
        Ok(())
    }

    /// Tokens that the longest test holds in one sequence.
    pub fn context(&self) -> usize {
        let most = |v: &[usize]| v.iter().copied().max().unwrap_or(0);
        let decode = match most(&self.generate) {
            0 => 0,
            n => n.saturating_add(self.warmup),
        };
        most(&self.depths).saturating_add(decode.max(most(&self.prompts)))
    }

    /// Tokens of KV cache that the run needs: the filled sequence and a second one that shares its full pages.
    pub fn kv_tokens(&self) -> usize {
        const PARTIAL_PAGES: usize = 3 * crate::backend::PAGE;
        self.context().saturating_add(PARTIAL_PAGES)
    }

    /// Measures on an engine built with [`EndToEnd::context`], [`EndToEnd::kv_tokens`], two sequences, and
    /// summaries for the methods.
    ///
    /// # Errors
    /// Any [`BenchError`](super::BenchError). `progress` answers whether to go on; where it says no, the report has the
    /// tests that were done, and an error comes only where there are none.
    pub fn run(
        &self,
        engine: &mut Engine,
        progress: &mut dyn FnMut(Progress<'_>) -> bool,
    ) -> Result<EndToEndReport> {
        self.validate()?;
        let bandwidth = engine.backend().bandwidth()?;
        let text = text(engine, self.context())?;
        let dtype = engine.decoder().weight_dtype();
        let mut run = Run {
            o: self,
            text,
            weight_bytes: arithmetic::weight_bytes(engine.decoder().config(), dtype),
            device_read: bandwidth.device_read,
            rows: Vec::new(),
            notes: Vec::new(),
            done: 0,
            all: 0,
            engine: &mut *engine,
            progress,
        };
        let outcome = run.depths();
        let (rows, mut notes) = (run.rows, run.notes);
        let interrupted = matches!(outcome, Err(BenchError::Engine(EngineError::Interrupted)));
        match outcome {
            Err(_) if interrupted && !rows.is_empty() => {
                notes.push(format!("{INTERRUPTED}: not all tests are here"));
            }
            outcome => outcome?,
        }
        let config = engine.decoder().config().clone();
        let prefill = rows.iter().find(|r| r.phase == "prefill");
        let prefill_arithmetic = if engine.backend().name() == "cpu" && !interrupted {
            let n = engine.chunk().min(prefill.map_or(usize::MAX, |r| r.tokens));
            let speed = prefill.map(|r| r.tokens_per_second.mean);
            let b = engine.backend();
            Some(arithmetic::measure(b, &config, dtype, n, self.repeats.max(5), speed)?)
        } else {
            None
        };
        Ok(EndToEndReport {
            kind: "end_to_end",
            environment: Environment::of(engine.backend()),
            model: ModelFacts {
                name: config.name.clone(),
                fingerprint: engine.fingerprint().to_owned(),
                parameters: config.parameters(),
                dtype,
                kv_dtype: engine.cache().shape().dtype,
                chunk: engine.chunk(),
                config,
            },
            settings: self.clone(),
            bandwidth_gb_s: bandwidth,
            rows,
            prefill_arithmetic,
            notes,
        })
    }
}

/// The first `n` tokens of the built-in text, repeated.
fn text(engine: &Engine, n: usize) -> Result<Vec<u32>> {
    let t = engine.tokenizer();
    let once = t.encode(TEXT, t.adds_bos()).map_err(EngineError::from)?;
    if once.is_empty() {
        return bad("the model's tokenizer makes no tokens of the built-in text");
    }
    Ok(once.iter().copied().cycle().take(n).collect())
}

struct Run<'a, 'e> {
    o: &'a EndToEnd,
    engine: &'e mut Engine,
    text: Vec<u32>,
    weight_bytes: u64,
    device_read: f64,
    rows: Vec<Row>,
    notes: Vec<String>,
    done: usize,
    all: usize,
    progress: &'a mut dyn FnMut(Progress<'_>) -> bool,
}

impl Run<'_, '_> {
    fn depths(&mut self) -> Result<()> {
        let mut depths = self.o.depths.clone();
        depths.sort_unstable();
        depths.dedup();
        let tests = |v: &[usize]| v.iter().filter(|&&n| n > 0).count();
        self.all = depths.len()
            * self.o.repeats
            * (tests(&self.o.prompts)
                + tests(&self.o.generate) * (1 + self.methods().count() + self.o.plans.len()));
        let dense = self.plan(&Variant::Dense.into(), 0)?;
        let base = self.engine.open_sequence()?;
        let outcome = depths.into_iter().try_for_each(|depth| self.depth(base, depth, &dense));
        self.engine.close(base);
        outcome
    }

    fn depth(&mut self, base: SeqId, depth: usize, dense: &Plan) -> Result<()> {
        // Prefill is dense whatever the plan; the dense plan keeps other methods' state out of it.
        self.engine.set_plan(dense.clone())?;
        self.fill(base, depth)?;
        for &n in self.o.prompts.iter().filter(|&&n| n > 0) {
            self.prefill(base, depth, n)?;
        }
        for &n in self.o.generate.iter().filter(|&&n| n > 0) {
            self.decode(base, depth, n)?;
        }
        Ok(())
    }

    fn plan(&self, spec: &MethodSpec, tokens: usize) -> Result<Plan> {
        let model = self.engine.decoder().config().plan_shape(self.engine.fingerprint());
        Ok(spec.plan(&model, tokens).map_err(EngineError::from)?)
    }

    fn fill(&mut self, seq: SeqId, depth: usize) -> Result<()> {
        let from = self.engine.cached(seq)?;
        if depth > from {
            let on = |done: usize| (self.progress)(Progress::Fill(from + done, depth));
            let tokens = &self.text[from..depth];
            self.engine.prefill(seq, tokens, WantLogits::None, |_, _| (), on)?;
        }
        Ok(())
    }

    fn measuring(&mut self, what: &str) -> Result<()> {
        let go_on = (self.progress)(Progress::Measure(what, self.done, self.all));
        self.done += 1;
        if go_on { Ok(()) } else { Err(EngineError::Interrupted.into()) }
    }

    /// Dense prompts, and those of plans that read prompts sparsely (`--tile`).
    fn prefill(&mut self, base: SeqId, depth: usize, n: usize) -> Result<()> {
        let test = name("pp", n, depth);
        let mut contenders = vec![(dense_name(), self.plan(&Variant::Dense.into(), depth + n)?)];
        let plans = self.sparse(depth + n)?;
        let tiled = plans.into_iter().filter(|(_, plan)| plan.reads_prompts_sparsely()).collect();
        contenders.extend(self.choosing(&test, depth + n, tiled));
        self.all += self.o.repeats * (contenders.len() - 1);
        let mut speeds = vec![Vec::with_capacity(self.o.repeats); contenders.len()];
        // One repetition more, not counted: it allocates and warms caches.
        for i in 0..=self.o.repeats {
            for ((method, plan), speeds) in contenders.iter().zip(&mut speeds) {
                if i > 0 {
                    self.measuring(&format!("{test} {method}"))?;
                }
                self.engine.set_plan(plan.clone())?;
                let seq = self.engine.fork(base)?;
                let start = Instant::now();
                let tokens = &self.text[depth..depth + n];
                self.engine.prefill(seq, tokens, WantLogits::Last, |_, _| (), |_| true)?;
                let seconds = start.elapsed().as_secs_f64();
                self.engine.close(seq);
                if i > 0 {
                    speeds.push(n as f64 / seconds);
                }
            }
        }
        let mut dense_speed = None;
        for ((method, plan), speeds) in contenders.into_iter().zip(speeds) {
            let speed = Summary::of(speeds);
            let sparse = dense_speed.is_some();
            let dense = *dense_speed.get_or_insert(speed.mean);
            self.rows.push(Row {
                test: test.clone(),
                phase: "prefill",
                tokens: n,
                depth,
                method,
                budget: sparse.then(|| most_tokens(&plan, depth + n)).flatten(),
                x_dense: sparse.then_some(speed.mean / dense),
                tokens_per_second: speed,
                traffic: None,
                plan: sparse.then_some(plan),
            });
        }
        Ok(())
    }

    /// Methods beside dense attention.
    fn methods(&self) -> impl Iterator<Item = &(String, MethodSpec)> {
        self.o.methods.iter().filter(|(_, m)| m.variant != Variant::Dense)
    }

    /// Those that do not attend to every one of `tokens` tokens; a note names the others.
    fn choosing(
        &mut self,
        test: &str,
        tokens: usize,
        mut plans: Vec<(String, Plan)>,
    ) -> Vec<(String, Plan)> {
        let mut left_out = Vec::new();
        plans.retain(|(name, plan)| {
            let why = plan.all_dense(tokens);
            left_out.extend(why.map(|why| format!("{name}: {why}")));
            why.is_none()
        });
        if !left_out.is_empty() {
            self.notes.push(format!("{test}: left out: {}", left_out.join("; ")));
        }
        plans
    }

    /// Every method and the plans, for sequences of `tokens` tokens.
    fn sparse(&self, tokens: usize) -> Result<Vec<(String, Plan)>> {
        let named = self.methods().map(|(name, m)| Ok((name.clone(), self.plan(m, tokens)?)));
        named.chain(self.o.plans.iter().cloned().map(Ok)).collect()
    }

    /// Dense first, then every method that does not attend to everything at this depth.
    fn contenders(&mut self, test: &str, depth: usize, n: usize) -> Result<Vec<Contender>> {
        let tokens = depth + self.o.warmup + n;
        let mut all = vec![Contender {
            name: dense_name(),
            budget: None,
            plan: self.plan(&Variant::Dense.into(), tokens)?,
        }];
        let plans = self.sparse(tokens)?;
        let every = plans.len();
        // The first step that is timed.
        let plans = self.choosing(test, depth + self.o.warmup + 1, plans);
        self.all -= self.o.repeats * (every - plans.len());
        all.extend(plans.into_iter().map(|(name, plan)| {
            let budget = most_tokens(&plan, tokens);
            Contender { name, budget, plan }
        }));
        Ok(all)
    }

    fn decode(&mut self, base: SeqId, depth: usize, n: usize) -> Result<()> {
        let test = name("tg", n, depth);
        let contenders = self.contenders(&test, depth, n)?;
        let mut speeds = vec![Vec::with_capacity(self.o.repeats); contenders.len()];
        // Methods take turns within a repetition, so that a busy machine slows all of them alike.
        for _ in 0..self.o.repeats {
            for (c, speeds) in contenders.iter().zip(&mut speeds) {
                self.measuring(&format!("{test} {}", c.name))?;
                self.engine.set_plan(c.plan.clone())?;
                speeds.push(n as f64 / self.decode_once(base, depth, n)?);
            }
        }
        let middle = depth + self.o.warmup + n / 2;
        let mut dense_speed = None;
        for (c, speeds) in contenders.into_iter().zip(speeds) {
            self.engine.set_plan(c.plan.clone())?;
            let speed = Summary::of(speeds);
            let kv_bytes = self.engine.bytes_read(middle);
            let gb_s = (self.weight_bytes + kv_bytes) as f64 * speed.mean / 1e9;
            let dense = *dense_speed.get_or_insert(speed.mean);
            self.rows.push(Row {
                test: test.clone(),
                phase: "decode",
                tokens: n,
                depth,
                method: c.name,
                budget: c.budget,
                x_dense: Some(speed.mean / dense),
                tokens_per_second: speed,
                traffic: Some(Traffic {
                    weight_bytes: self.weight_bytes,
                    kv_bytes,
                    gb_s,
                    share: gb_s / self.device_read,
                }),
                plan: Some(c.plan),
            });
        }
        Ok(())
    }

    /// Seconds of `n` decode steps after the warm-up. The tokens are those of the text; the logits of every step
    /// come back to the host, as they do when an answer is drawn.
    fn decode_once(&mut self, base: SeqId, depth: usize, n: usize) -> Result<f64> {
        let seq = self.engine.fork(base)?;
        let (warmup, measured) =
            self.text[depth..depth + self.o.warmup + n].split_at(self.o.warmup);
        for &token in warmup {
            self.engine.decode(seq, token)?;
        }
        let start = Instant::now();
        for &token in measured {
            std::hint::black_box(self.engine.decode(seq, token)?);
        }
        let seconds = start.elapsed().as_secs_f64();
        self.engine.close(seq);
        Ok(seconds)
    }
}

/// Most tokens that a sparse layer attends to.
fn most_tokens(plan: &Plan, tokens: usize) -> Option<usize> {
    plan.layers.iter().filter(|l| l.sparse()).map(|l| l.budget.tokens_at(tokens)).max()
}

/// Name of the baseline.
fn dense_name() -> String {
    MethodSpec::from(Variant::Dense).name().into()
}

fn name(kind: &str, n: usize, depth: usize) -> String {
    if depth == 0 { format!("{kind}{n}") } else { format!("{kind}{n}@d{depth}") }
}

#[cfg(test)]
#[path = "end_to_end_tests.rs"]
mod tests;
