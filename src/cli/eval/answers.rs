//! What evaluations with written answers share: prompts in the model's chat template, tables, plots.

use super::common::{AuditArgs, Bench, Common, Setup, TextArgs};
use super::report::{Quality, Report, frontier, mass_kept};
use crate::cli::args::at_least_one;
use crate::cli::plot::{Line, LinePoint, Panel};
use crate::cli::table::{Table, distinct};
use crate::cli::ui;
use crate::eval::{Answer, Difference, Problem, TaskSource, mean_score, solve, start_of_text};
use crate::model::{ChatTemplate, EncodeOptions, Message, ModelError};
use anyhow::{Result, bail};
use clap::Args;
use std::process::ExitCode;

/// Problems in haystacks of prose.
#[derive(Args)]
pub struct HaystackArgs {
    #[command(flatten)]
    pub texts: TextArgs,
    /// Put the task before the model as plain text, without its chat template
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub audit: AuditArgs,
    #[command(flatten)]
    pub common: Common,
}

/// How many problems, and from which random numbers.
#[derive(Args)]
pub struct SampleArgs {
    /// Texts of each kind
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    pub samples: usize,
    /// Seed of the texts; the same seed gives the same problems
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl HaystackArgs {
    /// Makes problems and lets all methods solve them; `report` shows the answers.
    pub fn run(
        &self,
        make: impl FnOnce(&TaskSource<'_>) -> Result<Vec<Problem>>,
        report: impl FnOnce(&[Answer]) -> Result<Report>,
    ) -> Result<ExitCode> {
        let setup = Setup::new(&self.common)?;
        let prose = self.texts.read()?.join("\n");
        let (before, after) = frame(&setup, self.raw)?;
        let tokenizer = &setup.tokenizer;
        let made = make(&TaskSource { tokenizer, prose: &prose, before: &before, after: &after });
        let problems = setup.samples(&self.texts, made)?;
        let bench = setup.bench(longest(&problems), "--lengths")?;
        solved(bench, &problems, &self.audit, |answers| {
            let mut report = report(answers)?;
            report.note += &self.audit.legend();
            Ok(report)
        })
    }
}

/// Tokens that the longest problem needs.
pub fn longest(problems: &[Problem]) -> usize {
    problems.iter().map(|p| p.tokens.len() + p.answer_tokens).max().unwrap_or(1)
}

/// Lets all methods solve the problems and finishes the evaluation.
pub fn solved(
    bench: Bench<'_>,
    problems: &[Problem],
    audit: &AuditArgs,
    report: impl FnOnce(&[Answer]) -> Result<Report>,
) -> Result<ExitCode> {
    let audit = audit.every();
    bench.report(
        |engine, plans, on, rows| {
            solve(engine, problems, plans, audit, on, |mut answers| rows.append(&mut answers))
        },
        report,
    )
}

/// What the chat template puts before and after a question, or nothing.
fn frame(setup: &Setup<'_>, raw: bool) -> Result<(Vec<u32>, Vec<u32>)> {
    const MARK: &str = "[the question]";
    let tokenizer = &setup.tokenizer;
    let plain = || Ok((start_of_text(tokenizer)?, Vec::new()));
    if raw {
        return plain();
    }
    let template = match ChatTemplate::for_checkpoint(&setup.checkpoint, tokenizer) {
        Ok(t) => t,
        Err(ModelError::NoTemplate) => return plain(),
        Err(e) => return Err(e.into()),
    };
    let text = template.render(&[Message::new("user", MARK)], true)?;
    let Some((before, after)) = text.split_once(MARK) else {
        bail!("the chat template of this model leaves the question out; give --raw");
    };
    let options = EncodeOptions { add_bos: false, parse_special: true };
    Ok((tokenizer.encode_with(before, options)?, tokenizer.encode_with(after, options)?))
}

/// The answers of one method in one group, and the dense ones beside them.
pub struct Part<'a> {
    pub group: String,
    pub method: &'a str,
    pub answers: Vec<&'a Answer>,
    pub dense: Vec<&'a Answer>,
}

/// The answers of each group and method in order, and of all groups together where there are several.
pub fn parts(answers: &[Answer], group: impl Fn(&Answer) -> String) -> Vec<Part<'_>> {
    let groups = distinct(answers.iter().map(&group));
    let methods = distinct(answers.iter().map(|a| a.method.as_str()));
    let several = groups.len() > 1;
    let mut parts = Vec::new();
    for g in groups.iter().map(Some).chain(several.then_some(None)) {
        let of = |method: &str| -> Vec<&Answer> {
            let wanted = |a: &&Answer| a.method == method && g.is_none_or(|g| group(a) == *g);
            answers.iter().filter(wanted).collect()
        };
        for &method in &methods {
            let group = g.cloned().unwrap_or_else(|| "mean".into());
            parts.push(Part { group, method, answers: of(method), dense: of("dense") });
        }
    }
    parts
}

impl Part<'_> {
    pub fn mean(&self, of: impl Fn(&Answer) -> f64) -> f64 {
        self.answers.iter().map(|a| of(a)).sum::<f64>() / self.answers.len().max(1) as f64
    }

    /// Mean score in percent, and its difference to dense.
    pub fn score(&self) -> [String; 2] {
        let (score, Difference { mean, error }) = mean_score(&self.answers, &self.dense);
        [format!("{score:.1}"), format!("{mean:+.1}{}", ui::plus_minus(error, 1))]
    }

    pub fn kv_bytes(&self) -> String {
        ui::bytes(self.mean(|a| a.kv_bytes as f64) as u64)
    }
}

/// Scores per group and method, and their mean over groups.
pub fn score_table(name: &str, answers: &[Answer], group: impl Fn(&Answer) -> String) -> Table {
    let columns =
        [name, "method", ">answers", ">score", ">to dense", ">mass kept", ">KV read/token"];
    let mut table = Table::new(&columns);
    for part in parts(answers, group) {
        let [score, to_dense] = part.score();
        table.row([
            part.group.clone(),
            part.method.to_string(),
            part.answers.len().to_string(),
            score,
            to_dense,
            mass_kept(part.answers.iter().map(|a| &a.audit)),
            part.kv_bytes(),
        ]);
    }
    table
}

fn quality(a: &Answer) -> Quality<'_> {
    Quality { method: &a.method, kv_bytes: a.kv_bytes, value: 100.0 * a.verdict.score }
}

/// Score against bytes read.
pub fn score_frontier(task: &str, answers: &[Answer]) -> Panel {
    let all: Vec<Quality<'_>> = answers.iter().map(quality).collect();
    frontier(task, "score, %", &all)
}

/// Mean score by size, a line for each method.
pub fn by_size(task: &str, axis: &'static str, answers: &[Answer]) -> Panel {
    let sizes = distinct(answers.iter().filter_map(|a| a.cell.size));
    let point = |method: &str, size: usize| {
        let of = answers.iter().filter(|a| a.method == method && a.cell.size == Some(size));
        let scores: Vec<f64> = of.map(|a| 100.0 * a.verdict.score).collect();
        let Difference { mean: y, error } = Difference::of(&scores);
        let error = error.unwrap_or(0.0);
        LinePoint { x: size as f64, y, low: y - error, high: y + error }
    };
    let methods = distinct(answers.iter().map(|a| a.method.as_str()));
    let lines = methods.iter().map(|method| Line {
        name: (*method).to_string(),
        points: sizes.iter().map(|&size| point(method, size)).collect(),
    });
    Panel::Lines {
        title: format!("{task}: score with its standard error"),
        axes: [axis, "score, %"],
        lines: lines.collect(),
    }
}
