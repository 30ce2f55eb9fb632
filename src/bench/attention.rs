//! Attention of all layers of a model in a decode step, without the rest of the model: every method against dense
//! attention and the bytes that it must read.
//!
//! The layers take turns with a few KV pools, enough to keep caches from helping. Pools are filled through `kv_append`,
//! so that int8 copies and summaries are those of the keys. What the last layer gave is compared with float64 attention
//! over the tokens that it chose.

mod check;
mod rig;
#[cfg(test)]
mod tests;

use super::kernels::Check;
use super::{Environment, Result, Summary, bad};
use crate::backend::{Backend, Bandwidth, DType};
use crate::select::{MethodSpec, Plan, Variant};
use rig::Rig;
use serde::Serialize;

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionBench {
    /// Cached tokens of every sequence.
    pub depth: usize,
    /// Sequences decoded together.
    pub batches: Vec<usize>,
    /// Layers of the model.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Of the KV cache.
    pub dtype: DType,
    /// Methods with their options under the names of their rows; dense attention is measured before them.
    pub methods: Vec<(String, MethodSpec)>,
    /// Finished plans under their names, measured after the methods.
    pub plans: Vec<(String, Plan)>,
    /// Steps that are timed; methods that refresh their choice every so many steps are right in the mean.
    pub steps: usize,
    /// Of the random inputs.
    pub seed: u64,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionRow {
    /// Method as it was asked for.
    pub method: String,
    /// Sequences decoded together.
    pub batch: usize,
    /// Milliseconds of a step's attention over its layers: the mean layer. A sample is a step.
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
        const MAX: usize = 1 << 24;
        if self.depth < 2 || self.depth > MAX {
            return bad(format!("{} tokens a sequence: give 2 to {MAX} (--depth)", self.depth));
        }
        if self.batches.is_empty() || self.batches.iter().any(|&b| b == 0 || b > 1024) {
            return bad("give batch sizes from 1 to 1024 (--batch)");
        }
        if self.layers == 0 || self.layers > 1024 {
            return bad("give 1 to 1024 layers (--layers)");
        }
        let group = self.heads.checked_div(self.kv_heads).unwrap_or(0);
        if !(1..=16).contains(&group) || group * self.kv_heads != self.heads || self.heads > 1024 {
            return bad(format!(
                "{} query heads over {} KV heads: each KV head serves 1 to 16 of at most 1024 (--heads, --kv-heads)",
                self.heads, self.kv_heads
            ));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(8) || self.head_dim > 256 {
            return bad("give a head dimension that is a multiple of 8 up to 256 (--head-dim)");
        }
        if !self.dtype.is_float() {
            return bad(format!("the KV cache holds floats, not {}", self.dtype));
        }
        if self.steps == 0 || self.steps > 1 << 16 {
            return bad("give 1 to 65536 steps (--steps)");
        }
        if self.depth <= self.steps + rig::WARM_UP {
            return bad(format!(
                "{} steps do not fit {} tokens: give fewer --steps",
                self.steps, self.depth
            ));
        }
        Ok(())
    }

    /// Measures on `b`. `progress` hears of (what is measured, measurements done, all).
    ///
    /// # Errors
    /// Any [`BenchError`](super::BenchError).
    pub fn run(
        &self,
        b: &dyn Backend,
        progress: &mut dyn FnMut(&str, usize, usize),
    ) -> Result<AttentionReport> {
        self.validate()?;
        let all = self.batches.len() * (1 + self.methods.len() + self.plans.len());
        progress("device read", 0, all);
        let bandwidth = b.bandwidth()?;
        let mut report = AttentionReport {
            kind: "attention",
            environment: Environment::of(b),
            settings: self.clone(),
            bandwidth_gb_s: bandwidth,
            rows: Vec::new(),
            notes: Vec::new(),
        };
        let mut done = 0;
        let plans = self.named_plans()?;
        for &batch in &self.batches {
            let mut rig = match Rig::new(b, self, batch, &plans) {
                Ok(rig) => rig,
                Err(e) => {
                    report.notes.push(format!("batch {batch} is left out: {e}"));
                    done += plans.len();
                    continue;
                }
            };
            let mut dense = None;
            for (at, (name, plan)) in plans.iter().enumerate() {
                let until = plan.dense_until();
                if at > 0 && until.is_none_or(|n| n >= self.depth) {
                    done += 1;
                    let why = match until {
                        Some(n) => {
                            format!("it attends to every token up to {n} (--dense-below, --budget)")
                        }
                        None => "no layer of it is sparse (--dense-layers)".into(),
                    };
                    report.notes.push(format!("{name}, batch {batch} is left out: {why}"));
                    continue;
                }
                progress(&format!("{name}, batch {batch}"), done, all);
                done += 1;
                let (ms, check) = match rig.measure(plan) {
                    Ok(found) => found,
                    Err(e) => {
                        report.notes.push(format!("{name}, batch {batch} is left out: {e}"));
                        continue;
                    }
                };
                let bytes = rig.bytes(plan) / self.layers as u64;
                let gb_s = bytes as f64 / 1e6 / ms.mean;
                if at == 0 {
                    dense = Some(ms.mean);
                }
                report.rows.push(AttentionRow {
                    method: name.clone(),
                    batch,
                    x_dense: dense.map(|d| d / ms.mean),
                    ms,
                    bytes,
                    gb_s,
                    share: gb_s / bandwidth.device_read,
                    plan: plan.clone(),
                    check,
                });
            }
        }
        progress("done", all, all);
        Ok(report)
    }

    /// Dense attention, the methods, and the plans.
    fn named_plans(&self) -> Result<Vec<(String, Plan)>> {
        let windows = vec![None; self.layers];
        let model = rig::model_shape(self, &windows);
        let mut all = Vec::new();
        let dense = MethodSpec::from(Variant::Dense);
        let dense = (dense.name().to_owned(), dense);
        let sparse = self.methods.iter().filter(|(_, m)| m.variant != Variant::Dense);
        for (name, spec) in std::iter::once(&dense).chain(sparse) {
            all.push((name.clone(), spec.plan(&model, self.depth)?));
        }
        for (name, plan) in &self.plans {
            let plan = Plan { model: String::new(), ..plan.clone() };
            plan.check(&model)?;
            all.push((name.clone(), plan));
        }
        Ok(all)
    }
}
