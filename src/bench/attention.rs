//! Attention of all layers of a model, without the rest of the model: every method against dense attention. In decode
//! steps beside the bytes that it must read, in prompts beside the time of its parts ([`PromptBench`]).
//!
//! The layers take turns with a few KV pools, enough to keep caches from helping. Keys and values go through what the
//! decoder appends with, so that int8 copies and summaries are those of the keys. What the last layer gave is compared
//! with float64 attention over the tokens that it chose.

mod check;
mod passes;
mod prompts;
mod rig;
mod steps;
mod subject;
#[cfg(test)]
mod tests;

pub use prompts::{PromptBench, PromptReport, PromptRow, RoleTime};
pub use subject::Subject;

use super::kernels::Check;
use super::{Environment, Result, Summary, bad};
use crate::backend::{Backend, Bandwidth};
use crate::select::Plan;
use serde::Serialize;
use subject::{Case, Line, MAX_TOKENS, Progress};

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionBench {
    /// Whose attention.
    #[serde(flatten)]
    pub of: Subject,
    /// Cached tokens of every sequence.
    pub depth: usize,
    /// Steps that are timed; methods that refresh their choice every so many steps are right in the mean.
    pub steps: usize,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionRow {
    /// Method as it was asked for.
    pub method: String,
    /// Sequences decoded together.
    pub batch: usize,
    /// Milliseconds of a step's attention over its layers: the mean layer, Forecasts included. A
    /// sample is a step.
    pub ms: Summary,
    /// Dense attention's mean layer over this one's, where dense attention was measured.
    pub x_dense: Option<f64>,
    /// Bytes of the KV cache that the mean layer must read.
    pub bytes: u64,
    /// bytes / mean.
    pub gb_s: f64,
    /// Share of the device-read bandwidth.
    pub share: f64,
    /// What was run.
    pub plan: Plan,
    /// The last layer's result against the reference.
    pub check: Check,
}

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionReport {
    /// `attention`.
    pub kind: &'static str,
    /// Device, driver, system, date and commit.
    pub environment: Environment,
    /// What was asked for.
    pub settings: AttentionBench,
    /// Measured in this run, before the methods.
    pub bandwidth_gb_s: Bandwidth,
    /// One line per method and batch.
    pub rows: Vec<AttentionRow>,
    /// What could not be measured, in sentences.
    pub notes: Vec<String>,
}

impl Line for AttentionRow {
    fn ms(&self) -> f64 {
        self.ms.mean
    }

    fn x_dense(&mut self) -> &mut Option<f64> {
        &mut self.x_dense
    }
}

impl AttentionReport {
    /// Rows whose result was wrong.
    pub fn failures(&self) -> impl Iterator<Item = &AttentionRow> {
        self.rows.iter().filter(|r| !r.check.passed)
    }
}

impl AttentionBench {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`BenchError::BadOption`](super::BenchError::BadOption).
    pub fn validate(&self) -> Result<()> {
        if !(2..=MAX_TOKENS).contains(&self.depth) {
            return bad(format!(
                "{} tokens a sequence: give 2 to {MAX_TOKENS} (--depth)",
                self.depth
            ));
        }
        self.of.validate()?;
        if self.steps == 0 || self.steps > 1 << 16 {
            return bad("give 1 to 65536 steps (--steps)");
        }
        if self.depth <= self.steps + steps::WARM_UP {
            return bad(format!(
                "{} steps do not fit {} tokens: give fewer --steps",
                self.steps, self.depth
            ));
        }
        Ok(())
    }

    /// Measures on `b`. `progress` hears of (what is measured, measurements done, all) and answers whether to go on.
    ///
    /// # Errors
    /// Any [`BenchError`](super::BenchError).
    pub fn run(&self, b: &dyn Backend, progress: &mut Progress<'_>) -> Result<AttentionReport> {
        self.validate()?;
        let mut notes = Vec::new();
        let shortest = self.depth - self.steps + 1;
        let plans = self.of.sparse_plans(self.depth, shortest, &mut notes)?;
        progress("device read", 0, self.of.batches.len() * plans.len());
        let bandwidth = b.bandwidth()?;
        let case = |&batch: &usize| Case {
            what: format!("batch {batch}"),
            tokens: self.depth,
            batch,
            rows: batch,
            filled: true,
            plans: plans.clone(),
        };
        let cases: Vec<Case> = self.of.batches.iter().map(case).collect();
        let (rows, left_out) =
            self.of.measure(b, &cases, progress, |rig, case, (name, plan), go_on| {
                let (ms, check) = rig.decode(plan, self.steps, go_on)?;
                let bytes = rig.bytes(plan) / self.of.layers as u64;
                let gb_s = bytes as f64 / 1e6 / ms.mean;
                Ok(AttentionRow {
                    method: name.to_owned(),
                    batch: case.batch,
                    x_dense: None,
                    ms,
                    bytes,
                    gb_s,
                    share: gb_s / bandwidth.device_read,
                    plan: plan.clone(),
                    check,
                })
            });
        notes.extend(left_out);
        Ok(AttentionReport {
            kind: "attention",
            environment: Environment::of(b),
            settings: self.clone(),
            bandwidth_gb_s: bandwidth,
            rows,
            notes,
        })
    }
}
