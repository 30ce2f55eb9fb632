//! `longsight run`: one prompt, one answer.

use super::args::{AnswerArgs, ModelArgs};
use super::interrupt::{EXIT_CODE, Interrupt};
use super::method_args::MethodArgs;
use super::progress::Bar;
use super::statistics::{Answer, statistics, unaudited};
use super::{texts, ui};
use crate::engine::{Engine, Finish, Generation, Request};
use crate::model::{ChatTemplate, Checkpoint, Message, ModelError, Tokenizer};
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args)]
#[command(mut_arg("ctx", |a| a.help(CTX)))]
pub struct RunArgs {
    /// Prompt; without one (and without -f) it is read from standard input, which otherwise only -f - reads
    prompt: Option<String>,
    /// A text to read before the prompt; - for standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// A question about the text of -f, about the prompt, or about the text on standard input
    #[arg(long, value_name = "QUESTION")]
    ask: Option<String>,
    /// Continue the text as it is, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// How to print; json: the answer with its statistics, plan and audit
    #[arg(long, value_enum, default_value = "text")]
    format: AnswerFormat,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    answer: AnswerArgs,
}

/// Output of an answer.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AnswerFormat {
    /// The answer as it grows.
    Text,
    /// One JSON document.
    Json,
}

const CTX: &str = "Most tokens of prompt and answer together [default: what both need]";

pub fn run(a: RunArgs) -> Result<ExitCode> {
    a.answer.sampling().check()?;
    let json = a.format == AnswerFormat::Json;
    let interrupt = Interrupt::install();
    let text = prompt_text(&a)?;
    // A text without a question is continued; a question is put to the model as a user would.
    let question = a.ask.is_some() || a.prompt.is_some() || a.file.is_none();
    let builder = a.method.builder(&a.model)?.audit(a.answer.audit());
    let (checkpoint, tokenizer) = a.model.open()?;
    let prompt = prompt_tokens(&checkpoint, &tokenizer, text, question && !a.raw)?;
    let builder = match a.model.size.ctx {
        Some(_) => builder,
        // Room for prompt and answer, so that a long model does not take memory for its whole context.
        None => {
            let need = prompt.len().saturating_add(a.answer.max_tokens);
            builder.context(need.min(checkpoint.config().max_context))
        }
    };
    let model = checkpoint.config().name.clone();
    let builder = builder.checkpoint(checkpoint).tokenizer(tokenizer);
    let mut engine = builder.build().map_err(|e| a.method.about(e))?;
    ui::notes(&engine);
    let request = Request::tokens(prompt);
    let mut request = request.max_tokens(a.answer.max_tokens).sampling(a.answer.sampling());
    request.stop = a.answer.stop.clone();
    request.cancel = interrupt.arm_with(None);
    let answer = answer(&mut engine, request, !json)?;
    if json {
        let report = serde_json::json!({
            "answer": answer.text,
            "stats": answer.stats,
            "audit": answer.audit,
            "model": model,
            "plan": engine.plan(),
            "method": engine.plan().method,
            "device": engine.backend().caps(),
        });
        ui::print(&(serde_json::to_string_pretty(&report)? + "\n"))?;
    } else {
        ui::note(format!("\n{}", statistics(&answer, engine.plan())));
    }
    if let Some(why) = unaudited(&answer, engine.plan(), a.answer.audit()) {
        ui::note(why);
    }
    let cancelled = answer.stats.finish == Some(Finish::Cancelled);
    Ok(if cancelled { ExitCode::from(EXIT_CODE) } else { ExitCode::SUCCESS })
}

fn prompt_text(a: &RunArgs) -> Result<String> {
    let piped = !std::io::stdin().is_terminal();
    let from_input = a.file.as_deref().is_some_and(|path| path.as_os_str() == "-");
    // It is not read unasked: it may be a pipe that a scheduler or a remote shell never closes.
    if !from_input && (a.file.is_some() || a.prompt.is_some()) && holds_text() {
        let beside = if a.file.is_some() { "-f" } else { "a prompt" };
        ui::note(format!(
            "note: beside {beside} standard input is not read; -f - reads it as the text"
        ));
    }
    let text = match a.file.as_deref() {
        Some(_) if from_input => Some(standard_input()?),
        Some(path) => {
            let text = texts::read(path)?;
            ensure!(!text.trim().is_empty(), "the text {} is empty", path.display());
            Some(text)
        }
        None if a.prompt.is_some() => None,
        None => Some(if piped { standard_input()? } else { String::new() }),
    };
    let empty = |s: &Option<String>| s.as_ref().is_some_and(|s| s.trim().is_empty());
    if empty(&text) && a.ask.is_some() {
        bail!(
            "--ask puts a question about a text: name the text with -f FILE, or give the question without --ask"
        );
    }
    if empty(&text) && !piped {
        bail!("give a prompt, a text (-f FILE), or pipe one into standard input");
    }
    if empty(&a.ask) {
        bail!("the question (--ask) is empty; give some text");
    }
    if empty(&text) || empty(&a.prompt) {
        bail!("the prompt is empty; give some text");
    }
    let parts: Vec<String> =
        [text, a.prompt.clone(), a.ask.clone()].into_iter().flatten().collect();
    Ok(parts.join("\n\n"))
}

/// Standard input is a pipe or a file, not a terminal or nothing at all: somebody may have meant it to be read.
fn holds_text() -> bool {
    #[cfg(unix)]
    {
        use std::os::fd::AsFd;
        use std::os::unix::fs::FileTypeExt;
        let input = std::io::stdin().as_fd().try_clone_to_owned();
        let about = input.and_then(|fd| std::fs::File::from(fd).metadata());
        about.is_ok_and(|m| m.file_type().is_fifo() || m.is_file() && m.len() > 0)
    }
    #[cfg(not(unix))]
    !std::io::stdin().is_terminal()
}

/// All of standard input but the newline that ends its last line.
fn standard_input() -> Result<String> {
    let mut s = String::new();
    std::io::stdin().read_to_string(&mut s).context("cannot read standard input")?;
    s.truncate(s.trim_end_matches(['\r', '\n']).len());
    Ok(s)
}

/// Tokens of the prompt: put through the model's chat template, if it has one and `chat` says so.
fn prompt_tokens(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    text: String,
    chat: bool,
) -> Result<Vec<u32>> {
    if chat {
        match ChatTemplate::for_checkpoint(checkpoint, tokenizer) {
            Ok(t) => return Ok(t.encode(tokenizer, &[Message::new("user", text)])?),
            Err(ModelError::NoTemplate) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(tokenizer.encode(&text, tokenizer.adds_bos())?)
}

/// Generates, showing prefill progress and, if `show`, the answer as it grows.
pub fn answer(engine: &mut Engine, request: Request, show: bool) -> Result<Answer> {
    let bar = Bar::new("reading", "tokens");
    let b = bar.clone();
    let mut generation: Generation<'_> = engine.generate(request)?.on_prefill(move |done, of| {
        b.at(done as u64, of as u64);
        if done == of {
            b.end();
        }
    });
    let mut text = String::new();
    for piece in generation.by_ref() {
        let piece = piece?;
        if show {
            ui::print(&piece.text)?;
        }
        text.push_str(&piece.text);
    }
    if show {
        ui::print("\n")?;
    }
    bar.end();
    let stats = generation.stats().cloned().unwrap_or_default();
    let audit = generation.audit();
    Ok(Answer { text, stats, audit })
}
