//! The RULER-style part of `longsight eval`: problems with written answers.

use super::eval::EvalArgs;
use super::table::{Table, distinct};
use super::{texts, ui};
use crate::eval::{Answer, Problem, RULER_TASKS, RulerSource, RulerTask, mean_score, ruler};
use crate::model::{ChatTemplate, Checkpoint, EncodeOptions, Message, ModelError, Tokenizer};
use anyhow::{Context, Result, bail};
use clap::Args;

#[derive(Args)]
#[command(next_help_heading = "RULER-style tasks")]
pub struct RulerArgs {
    /// Tasks of `eval ruler`, comma separated: niah_single_1 to _3, niah_multikey_1 to _3, niah_multivalue,
    /// niah_multiquery, vt, cwe, fwe, qa_1, qa_2 [default: all]
    #[arg(long, value_name = "TASKS", value_delimiter = ',', value_parser = task)]
    pub tasks: Vec<RulerTask>,
    /// Problems of each task and length
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub samples: u64,
    /// Put the task before the model as plain text, without its chat template
    #[arg(long)]
    pub raw: bool,
}

fn task(name: &str) -> Result<RulerTask, String> {
    let found = RULER_TASKS.iter().find(|t| t.0 == name);
    found.map(|t| t.1).ok_or_else(|| format!("no such task; there are {}", names().join(", ")))
}

fn names() -> Vec<&'static str> {
    RULER_TASKS.iter().map(|t| t.0).collect()
}

/// The problems that the options ask for.
pub fn problems(
    a: &EvalArgs,
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
) -> Result<Vec<Problem>> {
    let prose = a.text.iter().map(|path| texts::read(path));
    let prose = prose.collect::<Result<Vec<_>>>()?.join("\n");
    let (before, after) = frame(a, checkpoint, tokenizer)?;
    let source = RulerSource { tokenizer, prose: &prose, before: &before, after: &after };
    let all: Vec<RulerTask> = RULER_TASKS.iter().map(|t| t.1).collect();
    let tasks = if a.ruler.tasks.is_empty() { &all } else { &a.ruler.tasks };
    let mut problems = Vec::new();
    for &tokens in &a.lengths {
        for &task in tasks {
            for number in 0..a.ruler.samples {
                let problem = ruler(&source, task, tokens, number);
                problems.push(
                    problem.with_context(|| format!("{} of --lengths {tokens}", task.name()))?,
                );
            }
        }
    }
    if problems.is_empty() {
        bail!("nothing to evaluate; give --samples 1 or more");
    }
    Ok(problems)
}

/// What the chat template puts before and after a question, or nothing.
fn frame(
    a: &EvalArgs,
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
) -> Result<(Vec<u32>, Vec<u32>)> {
    const MARK: &str = "[the question]";
    let plain = || Ok((crate::eval::start_of_text(tokenizer)?, Vec::new()));
    if a.ruler.raw {
        return plain();
    }
    let template = match ChatTemplate::for_checkpoint(checkpoint, tokenizer) {
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

/// Said below the table.
pub const NOTE: &str =
    "RULER-style tasks on generated texts; not comparable with published RULER scores.\n";

/// Scores per task and method, and their mean over tasks.
pub fn table(answers: &[Answer]) -> Table {
    let mut table = Table::new(&["task", "method", ">score", ">to dense", ">KV read/token"]);
    let tasks = distinct(answers.iter().map(|a| a.task));
    let methods = distinct(answers.iter().map(|a| a.method.as_str()));
    let of = |task: Option<&str>, method: &str| -> Vec<&Answer> {
        let wanted = |a: &&Answer| a.method == method && task.is_none_or(|t| a.task == t);
        answers.iter().filter(wanted).collect()
    };
    let several = tasks.len() > 1;
    for task in tasks.iter().copied().map(Some).chain(several.then_some(None)) {
        for method in &methods {
            let (of, dense) = (of(task, method), of(task, "dense"));
            let (score, difference) = mean_score(&of, &dense);
            let bytes = of.iter().map(|a| a.kv_bytes).sum::<u64>() / of.len().max(1) as u64;
            table.row([
                task.unwrap_or("mean").to_string(),
                (*method).to_string(),
                format!("{score:.1}"),
                format!("{:+.1} +- {:.1}", difference.mean, difference.error),
                ui::bytes(bytes),
            ]);
        }
    }
    table
}
