//! Attention of all layers of a model in whole prompts: every method against dense attention, and what its layers spend
//! their time on.

use super::subject::{Case, Line, MAX_TOKENS, Progress, Subject};
use crate::backend::Backend;
use crate::bench::kernels::Check;
use crate::bench::{Environment, Result, Summary, bad};
use crate::model::PhaseTimes;
use crate::select::{LayerPlan, Plan, Role};
use serde::Serialize;

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct PromptBench {
    /// Whose attention.
    #[serde(flatten)]
    pub of: Subject,
    /// Tokens of a prompt.
    pub prompts: Vec<usize>,
    /// Tokens of a sequence that a step adds; None: as the engine does on the device.
    pub chunk: Option<usize>,
    /// Times that every prompt is read.
    pub repeats: usize,
}

/// The layers of one role.
#[derive(Clone, Debug, Serialize)]
pub struct RoleTime {
    /// `dense`; `dense anchor`, which attends to everything and chooses for others; `anchor`, which attends to its own
    /// choice and hands it down; `select`, which nobody reuses; `reuse`.
    pub role: &'static str,
    /// Their numbers.
    pub layers: Vec<usize>,
    /// Milliseconds of the mean one.
    pub ms: PhaseTimes,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct PromptRow {
    /// Method as it was asked for.
    pub method: String,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Prompts read together.
    pub batch: usize,
    /// Tokens of each that a step adds.
    pub chunk: usize,
    /// Milliseconds of the mean layer in a whole prompt, what goes into the cache and Forecasts included. A sample is
    /// one reading.
    pub ms: Summary,
    /// Dense attention's mean layer over this one's, where dense attention was measured.
    pub x_dense: Option<f64>,
    /// Of dense attention: `4 d heads n (n + 1) / 2` operations a prompt and layer over the mean.
    pub tflop_s: Option<f64>,
    /// Device bytes that the method took besides KV pools and activations: lists, scores, split results. None where the
    /// device does not tell.
    pub taken_bytes: Option<u64>,
    /// All device bytes held.
    pub held_bytes: Option<u64>,
    /// By role, from a reading in which the device waits between phases: the sum is a little more than `ms`.
    pub roles: Vec<RoleTime>,
    /// The same by layer.
    pub layer_ms: Vec<PhaseTimes>,
    /// What was run.
    pub plan: Plan,
    /// The last layer's result against the reference: the worst of the rows compared.
    pub check: Check,
    /// Positions of these rows.
    pub checked_tokens: Vec<usize>,
}

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct PromptReport {
    /// `prompt_attention`.
    pub kind: &'static str,
    /// Device, driver, system, date and commit.
    pub environment: Environment,
    /// What was asked for.
    pub settings: PromptBench,
    /// One line per prompt length, batch and method.
    pub rows: Vec<PromptRow>,
    /// What could not be measured, in sentences.
    pub notes: Vec<String>,
}

impl Line for PromptRow {
    fn ms(&self) -> f64 {
        self.ms.mean
    }

    fn x_dense(&mut self) -> &mut Option<f64> {
        &mut self.x_dense
    }
}

impl PromptReport {
    /// Rows whose result was wrong.
    pub fn failures(&self) -> impl Iterator<Item = &PromptRow> {
        self.rows.iter().filter(|r| !r.check.passed)
    }
}

impl PromptBench {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`BenchError::BadOption`](crate::bench::BenchError::BadOption).
    pub fn validate(&self) -> Result<()> {
        self.of.validate()?;
        if self.prompts.is_empty() {
            return bad("give at least one prompt length (--prompt)");
        }
        if let Some(n) = self.prompts.iter().find(|n| !(1..=MAX_TOKENS).contains(*n)) {
            return bad(format!("a prompt of {n} tokens: give 1 to {MAX_TOKENS} (--prompt)"));
        }
        if self.chunk == Some(0) {
            return bad("give at least one token a step (--chunk)");
        }
        if self.repeats == 0 {
            return bad("give at least one repetition (--repeats)");
        }
        Ok(())
    }

    /// Measures on `b`. `progress` hears of (what is measured, measurements done, all) and answers whether to go on.
    ///
    /// # Errors
    /// Any [`BenchError`](crate::bench::BenchError).
    pub fn run(&self, b: &dyn Backend, progress: &mut Progress<'_>) -> Result<PromptReport> {
        self.validate()?;
        let (mut cases, mut notes) = (Vec::new(), Vec::new());
        for &tokens in &self.prompts {
            let mut plans = self.of.sparse_plans(tokens, tokens, &mut notes)?;
            let dense = plans.remove(0);
            plans.retain(|(name, plan)| {
                if plan.reads_prompts_sparsely() {
                    return true;
                }
                let note = format!(
                    "{name} is left out: it reads prompts densely (--tile lets methods that can choose for them)"
                );
                if !notes.contains(&note) {
                    notes.push(note);
                }
                false
            });
            plans.insert(0, dense);
            let chunk = self.chunk.unwrap_or(b.caps().prompt_rows).min(tokens);
            cases.extend(self.of.batches.iter().map(|&batch| Case {
                what: format!("{tokens} tokens, batch {batch}"),
                tokens,
                batch,
                rows: chunk * batch,
                filled: false,
                plans: plans.clone(),
            }));
        }
        let (rows, left_out) =
            self.of.measure(b, &cases, progress, |rig, case, (name, plan), go_on| {
                let found = rig.prompt(plan, self.repeats, go_on)?;
                let (check, checked_tokens) = rig.sampled(&found.attention)?;
                let samples = found.ms.iter().map(|ms| ms / self.of.layers as f64).collect();
                let ms = Summary::of(samples);
                let all_dense = plan.layers.iter().all(|p| p.role == Role::Dense);
                Ok(PromptRow {
                    method: name.to_owned(),
                    prompt: case.tokens,
                    batch: case.batch,
                    chunk: case.rows / case.batch,
                    x_dense: None,
                    tflop_s: all_dense.then(|| self.flop(case) / ms.mean / 1e9),
                    ms,
                    taken_bytes: found.taken,
                    held_bytes: found.held,
                    roles: by_role(plan, &found.phases),
                    layer_ms: found.phases,
                    plan: plan.clone(),
                    check,
                    checked_tokens,
                })
            });
        notes.extend(left_out);
        Ok(PromptReport {
            kind: "prompt_attention",
            environment: Environment::of(b),
            settings: self.clone(),
            rows,
            notes,
        })
    }

    /// Operations of a layer's causal dense attention.
    fn flop(&self, case: &Case) -> f64 {
        let n = case.tokens as f64;
        let pairs = n * (n + 1.0) / 2.0 * case.batch as f64;
        4.0 * (self.of.head_dim * self.of.heads) as f64 * pairs
    }
}

/// What layer `l` does with prompts.
fn role(plan: &Plan, l: usize) -> &'static str {
    let reuses = |p: &LayerPlan| match p.role {
        Role::Reuse { from, .. } => from == l && p.tile.is_some(),
        _ => false,
    };
    match (&plan.layers[l].role, plan.layers[l].tile) {
        (Role::Dense, _) | (_, None) => "dense",
        (Role::DenseAnchor, _) => "dense anchor",
        (Role::Select, _) if plan.layers.iter().any(reuses) => "anchor",
        (Role::Select, _) => "select",
        (Role::Reuse { .. }, _) => "reuse",
    }
}

/// The mean layer of every role, in the order in which roles come.
fn by_role(plan: &Plan, layers: &[PhaseTimes]) -> Vec<RoleTime> {
    let mut roles: Vec<RoleTime> = Vec::new();
    for (l, ms) in layers.iter().enumerate() {
        let role = role(plan, l);
        match roles.iter_mut().find(|r| r.role == role) {
            Some(r) => {
                r.layers.push(l);
                r.ms.add(ms);
            }
            None => roles.push(RoleTime { role, layers: vec![l], ms: *ms }),
        }
    }
    roles.iter_mut().for_each(|r| r.ms = r.ms.over(r.layers.len()));
    roles
}
