//! Problems with written answers: the question is decoded token by token, the answer is generated greedily.

use super::check::{Check, Verdict};
use super::runner::{continued, dense_first};
use super::{Difference, Progress};
use crate::engine::{AuditConfig, AuditSummary, Engine, EngineError, SeqId, greedy};
use crate::select::Plan;
use serde::Serialize;

/// Where a problem stands in the table of its task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// Tokens of the prompt and the longest answer.
    pub tokens: usize,
    /// Where the needle lies, in percent of the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
    /// Keys in the text, or items of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<usize>,
}

/// A question whose answer is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Name of the task.
    pub task: &'static str,
    /// Task, length and number.
    pub name: String,
    /// Its place.
    pub cell: Cell,
    /// The prompt, with the start of the answer.
    pub tokens: Vec<u32>,
    /// First token that is fed in a decode step, so that the question itself selects.
    pub decode_from: usize,
    /// Most tokens of the answer.
    pub answer_tokens: usize,
    /// Text that ends the answer and is not part of it.
    pub stop: Option<&'static str>,
    /// What is right.
    pub check: Check,
}

/// One problem under one method.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Name of the task.
    pub task: &'static str,
    /// Name of the problem.
    pub problem: String,
    /// Its place.
    #[serde(flatten)]
    pub cell: Cell,
    /// Method with its options, as given.
    pub method: String,
    /// How right it is.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// What was written.
    pub text: String,
    /// Tokens that were written.
    pub written: usize,
    /// The model ended the answer itself; otherwise it had no room left.
    pub ended: bool,
    /// Leading tokens that dense attention wrote as well.
    pub like_dense: usize,
    /// KV bytes that the last decode step read under the plan.
    pub kv_bytes: u64,
    /// Decode steps, those of the question included.
    pub steps: usize,
    /// Their seconds.
    pub seconds: f64,
    /// What the audited steps found.
    pub audit: AuditSummary,
}

/// Answers every problem with every plan, dense first. The engine needs two sequences and a cache that was built for
/// all plans. Problems in a row with the same tokens before `decode_from` share one dense prefill.
///
/// `audit`: measure the selections of every sparse layer in the first step of each answer and every n-th after it.
/// `progress` gets (tokens done, all, at most) and answers whether to go on; `each` gets the answers to all problems
/// of a prefill once they are there.
///
/// # Errors
/// Any [`EngineError`]; [`EngineError::Interrupted`] when `progress` says so.
pub fn solve(
    engine: &mut Engine,
    problems: &[Problem],
    plans: &[(String, Plan)],
    audit: Option<usize>,
    mut progress: impl FnMut(u64, u64) -> bool,
    mut each: impl FnMut(Vec<Answer>),
) -> Result<(), EngineError> {
    let plans = dense_first(engine, plans);
    let steps = |p: &Problem| p.tokens.len() - p.decode_from + p.answer_tokens;
    let same = |a: &Problem, b: &Problem| a.tokens[..a.decode_from] == b.tokens[..b.decode_from];
    let groups = || problems.chunk_by(same);
    let all_steps = |of: &[Problem]| of.iter().map(steps).sum::<usize>();
    let work = |of: &[Problem]| of[0].decode_from + plans.len() * all_steps(of);
    let all = groups().map(work).sum::<usize>() as u64;
    let mut done = 0;
    for group in groups() {
        let mut answers = Vec::new();
        let text = &group[0].tokens[..group[0].decode_from];
        let on = |p: Progress| {
            let before = match p.branch {
                None => 0,
                Some((plan, i)) => text.len() + plan * all_steps(group) + all_steps(&group[..i]),
            };
            progress((done + before + p.tokens) as u64, all)
        };
        let mut dense: Vec<Vec<u32>> = Vec::with_capacity(group.len());
        let outcome = continued(engine, text, &plans, group.len(), on, |engine, branch, step| {
            // Sets the count of steps back, so that every method is audited at the same ones.
            engine.set_audit(audit.map(AuditConfig::every));
            let problem = &group[branch.number];
            let (mut answer, written) = answered(engine, branch.seq, problem, step)?;
            answer.method = branch.plan.into();
            if dense.len() == branch.number {
                dense.push(written.clone());
            }
            let same = dense[branch.number].iter().zip(&written).take_while(|(a, b)| a == b);
            answer.like_dense = same.count();
            answers.push(answer);
            Ok(())
        });
        engine.stop_audit();
        outcome?;
        each(answers);
        done += work(group);
    }
    Ok(())
}

fn answered(
    engine: &mut Engine,
    seq: SeqId,
    problem: &Problem,
    step: &mut dyn FnMut(usize) -> bool,
) -> Result<(Answer, Vec<u32>), EngineError> {
    let start = std::time::Instant::now();
    let ends = engine.decoder().config().eos.clone();
    let (mut logits, mut written, mut steps) = (Vec::new(), Vec::new(), 0);
    let mut go_on = |steps: &mut usize| {
        *steps += 1;
        if step(*steps) { Ok(()) } else { Err(EngineError::Interrupted) }
    };
    for &token in &problem.tokens[problem.decode_from..] {
        logits = engine.decode(seq, token)?;
        go_on(&mut steps)?;
    }
    let (mut text, mut ended) = (String::new(), false);
    while written.len() < problem.answer_tokens {
        let token = greedy(&logits).ok_or(EngineError::NoFiniteLogit)?;
        ended = ends.contains(&token);
        if ended {
            break;
        }
        written.push(token);
        text = engine.tokenizer().decode(&written);
        if let Some(at) = problem.stop.and_then(|stop| text.find(stop)) {
            text.truncate(at);
            ended = true;
            break;
        }
        if written.len() < problem.answer_tokens {
            logits = engine.decode(seq, token)?;
            go_on(&mut steps)?;
        }
    }
    let answer = Answer {
        task: problem.task,
        problem: problem.name.clone(),
        cell: problem.cell,
        method: String::new(),
        verdict: problem.check.verdict(&text),
        text,
        written: written.len(),
        ended,
        like_dense: 0,
        kv_bytes: engine.bytes_read(engine.cached(seq)?),
        steps,
        seconds: start.elapsed().as_secs_f64(),
        audit: AuditSummary::new(&engine.take_audits()),
    };
    Ok((answer, written))
}

/// Mean score of some answers in percent, and its paired difference to the dense answers of the same problems.
pub fn mean_score(of: &[&Answer], dense: &[&Answer]) -> (f64, Difference) {
    let scores =
        |a: &[&Answer]| -> Vec<f32> { a.iter().map(|a| 100.0 * a.verdict.score as f32).collect() };
    let (a, d) = (scores(of), scores(dense));
    let mean = a.iter().map(|&x| f64::from(x)).sum::<f64>() / a.len().max(1) as f64;
    (mean, Difference::paired(&a, &d))
}
