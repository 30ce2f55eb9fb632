//! Problems with written answers: the question is decoded token by token, the answer is generated greedily.

use super::Difference;
use super::runner::{continued, dense_first};
use crate::engine::{Engine, EngineError, SeqId, greedy};
use crate::select::Plan;
use serde::Serialize;

/// A question whose answer is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Name of the task.
    pub task: &'static str,
    /// Task, length and number.
    pub name: String,
    /// The prompt, with the start of the answer.
    pub tokens: Vec<u32>,
    /// First token that is fed in a decode step, so that the question itself selects.
    pub decode_from: usize,
    /// Most tokens of the answer.
    pub answer_tokens: usize,
    /// Strings that a right answer holds, whatever their case.
    pub references: Vec<String>,
    /// One of them is enough.
    pub any: bool,
}

impl Problem {
    /// Share of the references that `answer` holds, or 1 for any of them where one is enough.
    pub fn score(&self, answer: &str) -> f64 {
        let answer = answer.to_lowercase();
        let found = self.references.iter().filter(|r| answer.contains(&r.to_lowercase())).count();
        match self.any {
            true => f64::from(u8::from(found > 0)),
            false => found as f64 / self.references.len().max(1) as f64,
        }
    }
}

/// One problem under one method.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Name of the task.
    pub task: &'static str,
    /// Name of the problem.
    pub problem: String,
    /// Method with its options, as given.
    pub method: String,
    /// 0 to 1.
    pub score: f64,
    /// What was written.
    pub text: String,
    /// KV bytes that the last decode step read under the plan.
    pub kv_bytes: u64,
    /// Decode steps, those of the question included.
    pub steps: usize,
    /// Their seconds.
    pub seconds: f64,
}

/// Answers every problem with every plan, dense first, from one dense prefill each. The engine needs two
/// sequences and a cache that was built for all plans.
///
/// `progress` gets (tokens done, all, at most) and answers whether to go on; `each` gets finished answers.
///
/// # Errors
/// Any [`EngineError`]; [`EngineError::Interrupted`] when `progress` says so.
pub fn solve(
    engine: &mut Engine,
    problems: &[Problem],
    plans: &[(String, Plan)],
    mut progress: impl FnMut(u64, u64) -> bool,
    mut each: impl FnMut(&Answer),
) -> Result<Vec<Answer>, EngineError> {
    let plans = dense_first(engine, plans);
    let steps = |p: &Problem| p.tokens.len() - p.decode_from + p.answer_tokens;
    let work = |p: &Problem| (p.decode_from + plans.len() * steps(p)) as u64;
    let all: u64 = problems.iter().map(work).sum();
    let mut done = 0;
    let mut answers = Vec::new();
    for problem in problems {
        let text = &problem.tokens[..problem.decode_from];
        let on = |i: Option<usize>, n: usize| {
            let before = i.map_or(0, |i| problem.decode_from + i * steps(problem));
            progress(done + (before + n) as u64, all)
        };
        continued(engine, text, &plans, on, |engine, seq, name, step| {
            let answer = answered(engine, seq, problem, step)?;
            let answer = Answer { method: name.into(), ..answer };
            each(&answer);
            answers.push(answer);
            Ok(())
        })?;
        done += work(problem);
    }
    Ok(answers)
}

fn answered(
    engine: &mut Engine,
    seq: SeqId,
    problem: &Problem,
    step: &mut dyn FnMut(usize) -> bool,
) -> Result<Answer, EngineError> {
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
    while written.len() < problem.answer_tokens {
        let token = greedy(&logits).ok_or(EngineError::NoFiniteLogit)?;
        if ends.contains(&token) {
            break;
        }
        written.push(token);
        if written.len() < problem.answer_tokens {
            logits = engine.decode(seq, token)?;
            go_on(&mut steps)?;
        }
    }
    let text = engine.tokenizer().decode(&written);
    Ok(Answer {
        task: problem.task,
        problem: problem.name.clone(),
        method: String::new(),
        score: problem.score(&text),
        text,
        kv_bytes: engine.bytes_read(engine.cached(seq)?),
        steps,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Mean score of some answers in percent, and its paired difference to the dense answers of the same problems.
pub fn mean_score(of: &[&Answer], dense: &[&Answer]) -> (f64, Difference) {
    let scores = |a: &[&Answer]| -> Vec<f32> { a.iter().map(|a| 100.0 * a.score as f32).collect() };
    let (a, d) = (scores(of), scores(dense));
    let mean = a.iter().map(|&x| f64::from(x)).sum::<f64>() / a.len().max(1) as f64;
    (mean, Difference::paired(&a, &d))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_references_count_or_any_of_them() {
        let mut p = Problem {
            task: "t",
            name: "t".into(),
            tokens: vec![],
            decode_from: 0,
            answer_tokens: 1,
            references: vec!["Blue".into(), "red".into()],
            any: false,
        };
        assert_eq!(p.score("It is blue."), 0.5);
        assert_eq!(p.score("BLUE and Red"), 1.0);
        p.any = true;
        assert_eq!(p.score("reddish"), 1.0);
        assert_eq!(p.score("green"), 0.0);
    }
}
