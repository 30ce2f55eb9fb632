//! `longsight eval`: what sparsity costs in quality.

mod answers;
mod common;
mod loss;
mod recall;
mod report;
mod ruler;
mod tasks;

use anyhow::Result;
use clap::{Args, Subcommand};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Each evaluation decodes the same tokens with every method from forks of one dense prefill, dense first, and prints \
a table. -o writes files too: JSON (everything), Markdown (the tables) or SVG (plots).

Examples:
  longsight eval copy --text a.txt --methods sparcas:dims=16:budget=256
  longsight eval ppl --text a.txt --text b.txt --budget 128,256 -o ppl.svg
  longsight eval needle --text a.txt --lengths 1024,4096 -o needle.svg
  longsight eval recall --text a.txt --methods quest,oracle -o recall.json

`longsight eval <EVALUATION> --help` explains an evaluation and its options; docs/evaluation.md has one run of each.";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct EvalArgs {
    #[command(subcommand)]
    evaluation: Evaluation,
}

#[derive(Subcommand)]
#[command(subcommand_value_name = "EVALUATION", subcommand_help_heading = "Evaluations")]
enum Evaluation {
    /// Prose: NLL of the last tokens of a text, by position, with bootstrap intervals of the difference to dense (a
    /// weak test: distant context barely matters)
    #[command(long_about = loss::PPL)]
    Ppl(loss::PplArgs),
    /// A text given twice: every token must be found half the length back (the strong test)
    #[command(long_about = loss::COPY)]
    Copy(loss::CopyArgs),
    /// Five digits hidden in prose, at five depths
    #[command(long_about = loss::PASSKEY)]
    Passkey(loss::PasskeyArgs),
    /// A grid of lengths and depths: numbers hidden in prose, found or not
    #[command(long_about = tasks::NEEDLE)]
    Needle(tasks::NeedleArgs),
    /// Many keys with a value each in prose, some of which are asked for, by number of keys
    #[command(long_about = tasks::MULTIKEY)]
    Multikey(tasks::MultikeyArgs),
    /// Long answers that have one right form: counting, copying a list, sorting, the states of a lamp
    #[command(long_about = tasks::LONG_OUTPUT)]
    LongOutput(tasks::LongOutputArgs),
    /// The thirteen tasks of RULER on generated texts: needles, variable tracking, word counts, questions
    #[command(long_about = ruler::ABOUT)]
    Ruler(ruler::RulerArgs),
    /// What the selections hold, by layer and KV head: attention mass, top-k recall, and how they change per step
    #[command(long_about = recall::ABOUT)]
    Recall(recall::RecallArgs),
}

pub fn eval(a: EvalArgs) -> Result<ExitCode> {
    match a.evaluation {
        Evaluation::Ppl(a) => loss::ppl(a),
        Evaluation::Copy(a) => loss::copies(a),
        Evaluation::Passkey(a) => loss::passkeys(a),
        Evaluation::Needle(a) => tasks::needles(a),
        Evaluation::Multikey(a) => tasks::multikeys(a),
        Evaluation::LongOutput(a) => tasks::long_outputs(a),
        Evaluation::Ruler(a) => ruler::run(a),
        Evaluation::Recall(a) => recall::run(a),
    }
}
