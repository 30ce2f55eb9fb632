//! Runs samples through methods.

use super::Sample;
use crate::engine::{AuditConfig, AuditSummary, Engine, EngineError, SeqId, WantLogits};
use crate::select::Plan;
use serde::Serialize;

/// Paired difference to dense, mean and standard error over the scored tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Mean of the differences.
    pub mean: f64,
    /// Standard error of the mean; none for a single value, which says nothing about it.
    pub error: Option<f64>,
}

impl Difference {
    /// Of `a - b`, pair by pair.
    pub fn paired(a: &[f32], b: &[f32]) -> Self {
        let d: Vec<f64> = a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
        Difference::of(&d)
    }

    /// Of differences to 0.
    pub fn of(d: &[f64]) -> Self {
        let n = d.len().max(1) as f64;
        let mean = d.iter().sum::<f64>() / n;
        let squares = d.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
        Difference { mean, error: (d.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt()) }
    }
}

/// One sample under one method.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Name of the sample.
    pub sample: String,
    /// Method with its options, as given.
    pub method: String,
    /// Mean NLL of the scored tokens in nats.
    pub nll: f64,
    /// To the dense run of the same sample.
    pub nll_difference: Difference,
    /// Share of scored tokens that were the most likely one.
    pub top1: f64,
    /// Every scored token was the most likely one: greedy decoding would have written them all.
    pub exact: bool,
    /// NLL per scored token.
    pub nlls: Vec<f32>,
    /// KV bytes that the last decode step read under the plan.
    pub kv_bytes: u64,
    /// Seconds of the decode steps.
    pub seconds: f64,
    /// What the audited steps found.
    pub audit: AuditSummary,
}

/// NLL of `target` in nats and whether it has the largest logit.
fn score(logits: &[f32], target: u32) -> (f32, bool) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    let own = logits.get(target as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let nll = sum.ln() + f64::from(max) - f64::from(own);
    (nll as f32, crate::engine::greedy(logits) == Some(target))
}

/// Decodes every sample with every plan, dense first. The engine needs two sequences and a cache that was built
/// for all plans.
///
/// `audit`: measure the selections of every sparse layer in the first step of each method and every n-th after it.
/// `progress` gets (decode steps done, all) and answers whether to go on; `each` gets the rows of every finished sample.
///
/// # Errors
/// Any [`EngineError`]; [`EngineError::Interrupted`] when `progress` says so.
pub fn evaluate(
    engine: &mut Engine,
    samples: &[Sample],
    plans: &[(String, Plan)],
    audit: Option<usize>,
    mut progress: impl FnMut(u64, u64) -> bool,
    mut each: impl FnMut(Vec<Row>),
) -> Result<(), EngineError> {
    let plans = dense_first(engine, plans);
    let steps = |s: &Sample| s.tokens.len() - s.decode_from;
    let all: u64 = samples.iter().map(|s| (s.decode_from + plans.len() * steps(s)) as u64).sum();
    let mut done = 0;
    for sample in samples {
        let mut rows = Vec::with_capacity(plans.len());
        let prefilled = done + sample.decode_from as u64;
        let mut reference: Option<Vec<f32>> = None;
        let text = &sample.tokens[..sample.decode_from];
        let on = |p: Progress| {
            let before = p.branch.map_or(done, |(i, _)| prefilled + (i * steps(sample)) as u64);
            progress(before + p.tokens as u64, all)
        };
        let outcome = continued(engine, text, &plans, 1, on, |engine, branch, step| {
            // Sets the count of steps back, so that every method is audited at the same ones.
            engine.set_audit(audit.map(AuditConfig::every));
            let mut row = decoded(engine, branch.seq, sample, step)?;
            row.method = branch.plan.into();
            let dense = reference.get_or_insert_with(|| row.nlls.clone());
            row.nll_difference = Difference::paired(&row.nlls, dense);
            rows.push(row);
            Ok(())
        });
        engine.stop_audit();
        outcome?;
        each(rows);
        done = prefilled + (plans.len() * steps(sample)) as u64;
    }
    Ok(())
}

/// The plans in order, after a dense one; other dense ones are left out.
pub(super) fn dense_first(engine: &Engine, plans: &[(String, Plan)]) -> Vec<(String, Plan)> {
    let dense = ("dense".to_string(), Plan::dense(engine.plan().layers.len()));
    let others = plans.iter().filter(|(_, p)| p.method != "dense").cloned();
    std::iter::once(dense).chain(others).collect()
}

/// How far [`continued`] is.
pub(super) struct Progress {
    /// Numbers of the plan and of the branch that is decoded; none while the text is read.
    pub branch: Option<(usize, usize)>,
    /// Tokens done of it.
    pub tokens: usize,
}

/// A fork of a text under a plan.
pub(super) struct Branch<'a> {
    pub seq: SeqId,
    /// Name of the plan.
    pub plan: &'a str,
    /// Number of the branch, from 0.
    pub number: usize,
}

/// Prefills `text` densely, then hands `f` `branches` forks of it under each plan (a plan that reads prompts sparsely
/// prefills it for itself), one at a time, with a report of the steps done that answers whether to go on. `progress` answers that as well.
pub(super) fn continued(
    engine: &mut Engine,
    text: &[u32],
    plans: &[(String, Plan)],
    branches: usize,
    mut progress: impl FnMut(Progress) -> bool,
    mut f: impl FnMut(&mut Engine, Branch<'_>, &mut dyn FnMut(usize) -> bool) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    engine.set_audit(None);
    engine.set_plan(Plan::dense(engine.plan().layers.len()))?;
    let base = engine.open_sequence()?;
    with(engine, base, |engine| {
        let read = |tokens| progress(Progress { branch: None, tokens });
        engine.prefill(base, text, WantLogits::None, |_, _| (), read)?;
        for (i, (plan, p)) in plans.iter().enumerate() {
            engine.set_plan(p.clone())?;
            for number in 0..branches {
                let branch = Some((i, number));
                let own = p.reads_prompts_sparsely();
                let seq = if own { engine.open_sequence()? } else { engine.fork(base)? };
                with(engine, seq, |engine| {
                    if own {
                        let go_on = |_| progress(Progress { branch, tokens: 0 });
                        engine.prefill(seq, text, WantLogits::None, |_, _| (), go_on)?;
                    }
                    let mut step = |tokens| progress(Progress { branch, tokens });
                    f(engine, Branch { seq, plan, number }, &mut step)
                })?;
            }
        }
        Ok(())
    })
}

/// Runs `f` and closes `seq` whatever comes out.
fn with<T>(
    engine: &mut Engine,
    seq: SeqId,
    f: impl FnOnce(&mut Engine) -> Result<T, EngineError>,
) -> Result<T, EngineError> {
    let outcome = f(engine);
    engine.close(seq);
    outcome
}

/// Decodes and scores the end of `sample` in `seq`, which holds what comes before, under the engine's plan. `step`
/// gets the decode steps done and answers whether to go on.
fn decoded(
    engine: &mut Engine,
    seq: SeqId,
    sample: &Sample,
    step: &mut dyn FnMut(usize) -> bool,
) -> Result<Row, EngineError> {
    let start = std::time::Instant::now();
    let (mut nlls, mut hits) = (Vec::new(), 0);
    for t in sample.decode_from..sample.tokens.len() - 1 {
        let logits = engine.decode(seq, sample.tokens[t])?;
        if t + 1 >= sample.score_from {
            let (nll, hit) = score(&logits, sample.tokens[t + 1]);
            nlls.push(nll);
            hits += usize::from(hit);
        }
        if !step(t + 1 - sample.decode_from) {
            return Err(EngineError::Interrupted);
        }
    }
    let tokens = engine.cached(seq)?;
    let n = nlls.len().max(1) as f64;
    Ok(Row {
        sample: sample.name.clone(),
        method: String::new(),
        nll: nlls.iter().map(|&x| f64::from(x)).sum::<f64>() / n,
        nll_difference: Difference { mean: 0.0, error: None },
        top1: hits as f64 / n,
        exact: hits == nlls.len(),
        kv_bytes: engine.bytes_read(tokens),
        seconds: start.elapsed().as_secs_f64(),
        audit: AuditSummary::new(&engine.take_audits()),
        nlls,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_log_probabilities() {
        let (nll, hit) = score(&[0.0, 3f32.ln()], 1);
        assert!((nll - (4f32 / 3.0).ln()).abs() < 1e-6 && hit);
        assert!(!score(&[1.0, 0.0], 1).1);
    }

    #[test]
    fn differences_are_paired() {
        let d = Difference::paired(&[1.0, 2.0, 3.0], &[0.5, 1.5, 2.5]);
        assert_eq!((d.mean, d.error), (0.5, Some(0.0)));
        let d = Difference::paired(&[1.0, 3.0], &[1.0, 1.0]);
        assert!((d.error.unwrap() - 1.0).abs() < 1e-12);
        assert_eq!(Difference::of(&[0.5]), Difference { mean: 0.5, error: None });
    }
}
