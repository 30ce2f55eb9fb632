//! `longsight eval ruler`: RULER-style problems.

use super::answers::{HaystackArgs, score_frontier, score_table};
use super::report::Report;
use crate::cli::args::at_least_one;
use crate::cli::lists::once;
use crate::eval::{Answer, RULER_TASKS, RulerTask, ruler};
use anyhow::{Context, Result};
use clap::Args;
use std::process::ExitCode;

/// What `--help` says of it.
pub const ABOUT: &str = "\
Texts, words and encyclopaedia entries are generated or come from the given prose, so scores are not comparable \
with published ones. The question is decoded token by token, the answer is written greedily; the score is the \
share of the right strings that it holds.";

#[derive(Args)]
pub struct RulerArgs {
    /// Tasks, comma separated: niah_single_1 to _3, niah_multikey_1 to _3, niah_multivalue, niah_multiquery, vt, cwe,
    /// fwe, qa_1, qa_2 [default: all]
    #[arg(long, value_name = "TASKS", value_delimiter = ',', value_parser = task)]
    tasks: Vec<RulerTask>,
    /// Problems of each task and length
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_least_one)]
    samples: usize,
    #[command(flatten)]
    haystack: HaystackArgs,
}

fn task(name: &str) -> Result<RulerTask, String> {
    let found = RULER_TASKS.iter().find(|t| t.0 == name.trim());
    let names: Vec<&str> = RULER_TASKS.iter().map(|t| t.0).collect();
    found.map(|t| t.1).ok_or_else(|| format!("no such task; there are {}", names.join(", ")))
}

pub fn run(a: RulerArgs) -> Result<ExitCode> {
    once("--tasks", &a.tasks.iter().map(|t| t.name()).collect::<Vec<_>>())?;
    let all: Vec<RulerTask> = RULER_TASKS.iter().map(|t| t.1).collect();
    let tasks = if a.tasks.is_empty() { &all } else { &a.tasks };
    let make = |source: &crate::eval::TaskSource<'_>| {
        let mut problems = Vec::new();
        for &tokens in &a.haystack.texts.lengths {
            for &task in tasks {
                for number in 0..a.samples as u64 {
                    let problem = ruler(source, task, tokens, number);
                    problems.push(
                        problem
                            .with_context(|| format!("{} of --lengths {tokens}", task.name()))?,
                    );
                }
            }
        }
        Ok(problems)
    };
    a.haystack.run(make, report)
}

fn report(answers: &[Answer]) -> Result<Report> {
    Ok(Report {
        task: "ruler",
        json: vec![("rows", serde_json::to_value(answers)?)],
        tables: vec![score_table("task", answers, |a| a.task.to_string())],
        note: "RULER-style tasks on generated texts; not comparable with published RULER scores.\n"
            .into(),
        panels: vec![score_frontier("ruler", answers)],
    })
}
