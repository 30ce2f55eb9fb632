//! `longsight eval needle`, `multikey` and `long-output`.

use super::answers::{
    HaystackArgs, Part, SampleArgs, by_size, longest, parts, score_frontier, score_table, solved,
};
use super::common::{AuditArgs, Common, Setup};
use super::report::Report;
use crate::cli::args::at_least_one;
use crate::cli::lists::once;
use crate::cli::plot::{Heat, Panel};
use crate::cli::table::{Table, distinct};
use crate::eval::{
    Answer, LONG_TASKS, LongTask, MultikeySpec, NeedleSpec, long_output, multikey, needle,
    start_of_text,
};
use anyhow::{Context, Result};
use clap::Args;
use std::process::ExitCode;

/// What `--help` says of it.
pub const NEEDLE: &str = "\
Every cell of the grid has its own texts: prose of a length with a sentence at a depth that gives a seven-digit \
number to a name. The question is decoded token by token, so that it selects; the answer is written greedily and \
is right when its first number is the hidden one.";

#[derive(Args)]
pub struct NeedleArgs {
    /// Where the needle lies, in percent of the text, comma separated
    #[arg(long, value_name = "PERCENT", value_delimiter = ',', default_value = "0,25,50,75,100", value_parser = percent)]
    depths: Vec<usize>,
    /// Needles of a text: the first at the depth, the others evenly between there and the end; each is asked for by
    /// itself
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    needles: usize,
    #[command(flatten)]
    samples: SampleArgs,
    #[command(flatten)]
    haystack: HaystackArgs,
}

/// What `--help` says of it.
pub const MULTIKEY: &str = "\
Prose of --lengths tokens in which lines give seven-digit numbers to --keys names, spread evenly. --asked of \
them are asked for, one by one from the same text; the question is decoded token by token, and an answer is \
right when its first number is the name's. More keys make the right one harder to tell from the others.";

#[derive(Args)]
pub struct MultikeyArgs {
    /// Keys of a text, comma separated: each number makes texts of its own
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "4,16,64", value_parser = at_least_one)]
    keys: Vec<usize>,
    /// Keys that are asked for in each text, spread evenly over it [default: 4, or all of fewer]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    asked: Option<usize>,
    #[command(flatten)]
    samples: SampleArgs,
    #[command(flatten)]
    haystack: HaystackArgs,
}

/// What `--help` says of it.
pub const LONG_OUTPUT: &str = "\
The model sees two solved examples of eight items and one of --items items to solve, and writes freely, so that \
an error changes what comes after it: count (numbers from one to another), copy (a list of words), sort \
(numbers), state (of a lamp after named steps; a step has two items). The answer is compared item by item: how \
many items from the start are right, the score (longest common subsequence over the longer list), and how long \
it is beside the dense one. Lists are short, so give a small --budget; below it every token is attended to.";

#[derive(Args)]
pub struct LongOutputArgs {
    /// Tasks, comma separated: count, copy, sort, state [default: all]
    #[arg(long, value_name = "TASKS", value_delimiter = ',', value_parser = long_task)]
    tasks: Vec<LongTask>,
    /// Items of the right answer, comma separated
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "32,128", value_parser = at_least_one)]
    items: Vec<usize>,
    #[command(flatten)]
    samples: SampleArgs,
    #[command(flatten)]
    audit: AuditArgs,
    #[command(flatten)]
    common: Common,
}

fn percent(text: &str) -> Result<usize, String> {
    let depth = text.trim().parse().ok().filter(|p| (0..=100).contains(p));
    depth.ok_or_else(|| "give percents from 0 to 100".into())
}

fn long_task(name: &str) -> Result<LongTask, String> {
    let names: Vec<&str> = LONG_TASKS.iter().map(|t| t.0).collect();
    let found = LONG_TASKS.iter().find(|t| t.0 == name.trim());
    found.map(|t| t.1).ok_or_else(|| format!("no such task; there are {}", names.join(", ")))
}

pub fn needles(a: NeedleArgs) -> Result<ExitCode> {
    once("--depths", &a.depths)?;
    let make = |source: &crate::eval::TaskSource<'_>| {
        let mut problems = Vec::new();
        for &tokens in &a.haystack.texts.lengths {
            for &depth in &a.depths {
                for number in 0..a.samples.samples as u64 {
                    let (needles, seed) = (a.needles, a.samples.seed);
                    let spec = NeedleSpec { tokens, depth, needles, number, seed };
                    problems.extend(
                        needle(source, &spec).with_context(|| format!("--lengths {tokens}"))?,
                    );
                }
            }
        }
        Ok(problems)
    };
    a.haystack.run(make, needle_report)
}

fn needle_report(answers: &[Answer]) -> Result<Report> {
    let methods = distinct(answers.iter().map(|a| a.method.as_str()));
    let grids: Vec<Heat> = methods.iter().map(|m| grid(m, answers)).collect();
    let mut panels = vec![score_frontier("needle", answers)];
    let mut tables = vec![score_table("tokens", answers, |a| a.cell.tokens.to_string())];
    for grid in grids {
        tables.push(grid.table("depth \\ tokens"));
        panels.push(Panel::Heat(grid));
    }
    let json = vec![("rows", serde_json::to_value(answers)?)];
    let note = "Shares of needles found, in percent.\n".into();
    Ok(Report { task: "needle", json, tables, note, panels })
}

/// Share found by depth and length.
fn grid(method: &str, answers: &[Answer]) -> Heat {
    let lengths = distinct(answers.iter().map(|a| a.cell.tokens));
    let depths = distinct(answers.iter().filter_map(|a| a.cell.depth));
    let value = |depth: usize, tokens: usize| {
        let in_cell = |a: &&Answer| {
            a.method == method && (a.cell.depth, a.cell.tokens) == (Some(depth), tokens)
        };
        let of: Vec<f64> = answers.iter().filter(in_cell).map(|a| a.verdict.score).collect();
        of.iter().sum::<f64>() / of.len().max(1) as f64
    };
    Heat {
        title: format!("needle, {method}: share found"),
        axes: ["tokens", "depth"],
        columns: lengths.iter().map(usize::to_string).collect(),
        rows: depths.iter().map(|d| format!("{d} %")).collect(),
        values: depths
            .iter()
            .map(|&d| lengths.iter().map(|&n| Some(value(d, n))).collect())
            .collect(),
    }
}

pub fn multikeys(a: MultikeyArgs) -> Result<ExitCode> {
    once("--keys", &a.keys)?;
    let make = |source: &crate::eval::TaskSource<'_>| {
        let mut problems = Vec::new();
        for &tokens in &a.haystack.texts.lengths {
            for &keys in &a.keys {
                for number in 0..a.samples.samples as u64 {
                    let (asked, seed) = (a.asked.unwrap_or(keys.min(4)), a.samples.seed);
                    let spec = MultikeySpec { tokens, keys, asked, number, seed };
                    let made = multikey(source, &spec);
                    problems.extend(made.with_context(|| {
                        format!("--keys {keys} --asked {asked} in --lengths {tokens}")
                    })?);
                }
            }
        }
        Ok(problems)
    };
    a.haystack.run(make, |answers| {
        let group = |a: &Answer| format!("{} in {}", a.cell.size.unwrap_or(0), a.cell.tokens);
        Ok(Report {
            task: "multikey",
            json: vec![("rows", serde_json::to_value(answers)?)],
            tables: vec![score_table("keys in tokens", answers, group)],
            note: "Score: share of the asked keys whose number was written, in percent.\n".into(),
            panels: vec![
                score_frontier("multikey", answers),
                by_size("multikey", "keys in the text", answers),
            ],
        })
    })
}

pub fn long_outputs(a: LongOutputArgs) -> Result<ExitCode> {
    once("--items", &a.items)?;
    once("--tasks", &a.tasks.iter().map(|t| t.name()).collect::<Vec<_>>())?;
    let setup = Setup::new(&a.common)?;
    let start = start_of_text(&setup.tokenizer)?;
    let all: Vec<LongTask> = LONG_TASKS.iter().map(|t| t.1).collect();
    let tasks = if a.tasks.is_empty() { &all } else { &a.tasks };
    let most = setup.checkpoint.config().max_context;
    let mut problems = Vec::new();
    for &task in tasks {
        for &items in &a.items {
            // An item has more than one token: longer lists are not worth making.
            if items > most {
                anyhow::bail!("--items {items}: this model was trained for {most} tokens");
            }
            for number in 0..a.samples.samples as u64 {
                let seed = a.samples.seed;
                problems.push(long_output(&setup.tokenizer, &start, task, items, number, seed)?);
            }
        }
    }
    let bench = setup.bench(longest(&problems), "--items")?;
    solved(bench, &problems, &a.audit, |answers| {
        Ok(Report {
            task: "long-output",
            json: vec![("rows", serde_json::to_value(answers)?)],
            tables: vec![long_table(answers)],
            note: "Score: longest common subsequence of the items over the longer list, in percent. Prefix: right \
                   items from the start. As dense: tokens from the start that dense wrote as well.\n"
                .into(),
            panels: vec![
                score_frontier("long-output", answers),
                by_size("long-output", "items of the right answer", answers),
            ],
        })
    })
}

fn long_table(answers: &[Answer]) -> Table {
    let mut table = Table::new(&[
        "task, items",
        "method",
        ">answers",
        ">exact",
        ">prefix",
        ">score",
        ">to dense",
        ">tokens",
        ">of dense",
        ">as dense",
        ">ended",
        ">KV read/token",
    ]);
    let group = |a: &Answer| format!("{} {}", a.task, a.cell.size.unwrap_or(0));
    for part in parts(answers, group) {
        table.row(long_cells(&part));
    }
    table
}

fn long_cells(part: &Part<'_>) -> Vec<String> {
    let [score, to_dense] = part.score();
    let count = |of: &dyn Fn(&Answer) -> bool| {
        format!("{}/{}", part.answers.iter().filter(|a| of(a)).count(), part.answers.len())
    };
    let written = part.mean(|a| a.written as f64);
    let dense =
        part.dense.iter().map(|a| a.written as f64).sum::<f64>() / part.dense.len().max(1) as f64;
    vec![
        part.group.clone(),
        part.method.to_string(),
        part.answers.len().to_string(),
        count(&|a| a.verdict.exact),
        format!("{:.1}", part.mean(|a| a.verdict.items.map_or(0.0, |i| i.prefix as f64))),
        score,
        to_dense,
        format!("{written:.1}"),
        format!("{:.0} %", 100.0 * written / dense.max(1.0)),
        format!("{:.1}", part.mean(|a| a.like_dense as f64)),
        count(&|a| a.ended),
        part.kv_bytes(),
    ]
}
