//! `longsight run`: one prompt, one answer.

use super::args::{AnswerArgs, ModelArgs};
use super::interrupt::{EXIT_CODE, Interrupt};
use super::method_args::MethodArgs;
use super::statistics::{Answer, statistics, unaudited};
use super::{texts, ui};
use crate::engine::{Engine, Finish, Generation, Request};
use crate::model::{ChatTemplate, Checkpoint, Message, ModelError, Tokenizer};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args)]
#[command(mut_arg("ctx", |a| a.help(CTX)))]
pub struct RunArgs {
    /// Prompt; without one (and without -f) it is read from standard input
    prompt: Option<String>,
    /// A text to read before the prompt
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// A question about the text of -f (or about the prompt)
    #[arg(long, value_name = "QUESTION")]
    ask: Option<String>,
    /// Continue the text as it is, without the model's chat template
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    answer: AnswerArgs,
    /// Print the answer and its statistics as JSON
    #[arg(long, help_heading = "Answer")]
    json: bool,
}

const CTX: &str = "Most tokens of prompt and answer together [default: what both need]";

pub fn run(a: RunArgs) -> Result<ExitCode> {
    a.answer.sampling().check()?;
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
    let mut engine = builder.checkpoint(checkpoint).tokenizer(tokenizer).build()?;
    ui::notes(&engine);
    let request = Request::tokens(prompt);
    let mut request = request.max_tokens(a.answer.max_tokens).sampling(a.answer.sampling());
    request.stop = a.answer.stop.clone();
    request.cancel = interrupt.arm();
    let answer = answer(&mut engine, request, !a.json)?;
    if a.json {
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
        ui::note(format!("\n{}", statistics(&answer, &engine.plan().method)));
    }
    if let Some(why) = unaudited(&answer, engine.plan(), a.answer.audit()) {
        ui::note(why);
    }
    let cancelled = answer.stats.finish == Some(Finish::Cancelled);
    Ok(if cancelled { ExitCode::from(EXIT_CODE) } else { ExitCode::SUCCESS })
}

fn prompt_text(a: &RunArgs) -> Result<String> {
    if a.ask.is_some() && a.file.is_none() && a.prompt.is_none() {
        bail!(
            "--ask puts a question about a text: name the text with -f FILE, or give the question without --ask"
        );
    }
    let file = a.file.as_deref().map(texts::read).transpose()?;
    let mut parts: Vec<String> = file.into_iter().collect();
    parts.extend(a.prompt.clone());
    parts.extend(a.ask.clone());
    if parts.is_empty() {
        if std::io::stdin().is_terminal() {
            bail!("give a prompt, a text (-f FILE), or pipe one into standard input");
        }
        let mut s = String::new();
        std::io::stdin().read_to_string(&mut s).context("cannot read standard input")?;
        // The newline that ends the last line is none of the prompt's.
        parts.push(s.trim_end_matches(['\r', '\n']).to_owned());
    }
    let text = parts.join("\n\n");
    if text.trim().is_empty() {
        bail!("the prompt is empty; give some text");
    }
    Ok(text)
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
    let bar = ui::bar("reading", "tokens", 0);
    let b = bar.clone();
    let mut generation: Generation<'_> = engine.generate(request)?.on_prefill(move |done, of| {
        b.set_length(of as u64);
        b.set_position(done as u64);
        if done == of {
            b.finish_and_clear();
        }
    });
    let mut text = String::new();
    let mut out = std::io::stdout().lock();
    for piece in generation.by_ref() {
        let piece = piece?;
        if show {
            out.write_all(piece.text.as_bytes())?;
            out.flush()?;
        }
        text.push_str(&piece.text);
    }
    if show {
        writeln!(out)?;
    }
    bar.finish_and_clear();
    let stats = generation.stats().cloned().unwrap_or_default();
    let audit = generation.audit();
    Ok(Answer { text, stats, audit })
}
