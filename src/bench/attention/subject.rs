//! Whose attention is measured, and the order of measurements: one rig after the other, and in each of them every plan.

use super::rig::{GoOn, Rig};
use crate::backend::{Backend, DType};
use crate::bench::{INTERRUPTED, Result, bad, check_heads};
use crate::select::{MethodSpec, ModelShape, Plan, TrainedBlocks, Variant};
use serde::Serialize;

/// Most tokens of a sequence.
pub(super) const MAX_TOKENS: usize = 1 << 24;

/// A model's shape, and the methods that are compared.
#[derive(Clone, Debug, Serialize)]
pub struct Subject {
    /// Sequences of a step.
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
    /// Of the random inputs.
    pub seed: u64,
}

/// A plan under the name of its row.
pub(super) type Named = (String, Plan);

/// One rig, and what is measured in it.
pub(super) struct Case {
    /// What it is, in words: `batch 8`.
    pub what: String,
    /// Tokens of every sequence at the end.
    pub tokens: usize,
    /// Sequences.
    pub batch: usize,
    /// Rows of the largest step.
    pub rows: usize,
    /// The tokens are cached before anything is measured.
    pub filled: bool,
    /// Named; dense attention first.
    pub plans: Vec<Named>,
}

/// One line of a result.
pub(super) trait Line {
    /// Milliseconds of the mean layer.
    fn ms(&self) -> f64;
    /// Where dense attention's over this one's goes.
    fn x_dense(&mut self) -> &mut Option<f64>;
}

/// Who hears of (what is measured, measurements done, all).
pub(super) type Progress<'p> = dyn FnMut(&str, usize, usize) -> bool + 'p;

impl Subject {
    /// Checks the numbers.
    pub(super) fn validate(&self) -> Result<()> {
        if self.batches.is_empty() || self.batches.iter().any(|&b| b == 0 || b > 1024) {
            return bad("give batch sizes from 1 to 1024 (--batch)");
        }
        if self.layers == 0 || self.layers > 1024 {
            return bad("give 1 to 1024 layers (--layers)");
        }
        check_heads(self.heads, self.kv_heads)?;
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(8) || self.head_dim > 256 {
            return bad("give a head dimension that is a multiple of 8 up to 256 (--head-dim)");
        }
        if !self.dtype.is_float() {
            return bad(format!("the KV cache holds floats, not {}", self.dtype));
        }
        Ok(())
    }

    /// Dense attention; the methods, and the plans, for sequences of `tokens` tokens.
    fn named_plans(&self, tokens: usize) -> Result<(Named, Vec<Named>)> {
        let windows = vec![None; self.layers];
        let model = ModelShape {
            model: "",
            windows: &windows,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            // Plans of NOSA are made and then left out with a note: its keys are no plain ones.
            importance: Some(TrainedBlocks::default()),
        };
        let dense = MethodSpec::from(Variant::Dense);
        let dense = (dense.name().to_owned(), dense.plan(&model, tokens)?);
        let mut all = Vec::new();
        for (name, spec) in self.methods.iter().filter(|(_, m)| m.variant != Variant::Dense) {
            all.push((name.clone(), spec.plan(&model, tokens)?));
        }
        for (name, plan) in &self.plans {
            let plan = Plan { model: String::new(), ..plan.clone() };
            plan.check(&model)?;
            all.push((name.clone(), plan));
        }
        Ok((dense, all))
    }

    /// [`Subject::named_plans`] for sequences of `tokens` tokens, dense attention first, without those that attend to
    /// every token of the shortest that is timed: a note for each goes to `notes`.
    pub(super) fn sparse_plans(
        &self,
        tokens: usize,
        shortest: usize,
        notes: &mut Vec<String>,
    ) -> Result<Vec<Named>> {
        let (dense, mut plans) = self.named_plans(tokens)?;
        plans.retain(|(name, plan)| {
            let why = plan.all_dense(shortest);
            notes.extend(why.map(|why| format!("{name}, {tokens} tokens, is left out: {why}")));
            why.is_none()
        });
        plans.insert(0, dense);
        Ok(plans)
    }

    /// Measures every plan of every case: the lines in this order, each against the case's first, and a note for each
    /// that is left out, as all are that are left when `progress` says no. `measure`: of one plan under its name;
    /// it asks, too.
    pub(super) fn measure<'a, L: Line>(
        &'a self,
        b: &'a dyn Backend,
        cases: &[Case],
        progress: &mut Progress<'_>,
        mut measure: impl FnMut(&mut Rig<'a>, &Case, (&str, &Plan), &mut GoOn<'_>) -> Result<L>,
    ) -> (Vec<L>, Vec<String>) {
        let all = cases.iter().map(|c| c.plans.len()).sum();
        let (mut lines, mut notes, mut done) = (Vec::new(), Vec::new(), 0);
        let mut go_on = true;
        for case in cases {
            if !go_on {
                notes.push(format!("{} is left out: {INTERRUPTED}", case.what));
                continue;
            }
            let mut filling = || progress(&case.what, done, all);
            let mut rig = match Rig::new(b, self, case, &mut filling) {
                Ok(rig) => rig,
                Err(e) => {
                    notes.push(format!("{} is left out: {e}", case.what));
                    done += case.plans.len();
                    continue;
                }
            };
            let mut dense = None;
            for (at, (name, plan)) in case.plans.iter().enumerate() {
                let what = format!("{name}, {}", case.what);
                let at_hand = done;
                go_on = go_on && progress(&what, at_hand, all);
                done += 1;
                if !go_on {
                    notes.push(format!("{what} is left out: {INTERRUPTED}"));
                    continue;
                }
                let mut step = || progress(&what, at_hand, all);
                match measure(&mut rig, case, (name, plan), &mut step) {
                    Ok(mut line) => {
                        let ms = line.ms();
                        if at == 0 {
                            dense = Some(ms);
                        }
                        *line.x_dense() = dense.map(|d| d / ms);
                        lines.push(line);
                    }
                    Err(e) => notes.push(format!("{what} is left out: {e}")),
                }
            }
        }
        progress("done", all, all);
        (lines, notes)
    }
}
