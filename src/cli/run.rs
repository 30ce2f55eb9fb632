//! `longsight run`: one prompt, one answer.

use super::args::{AnswerArgs, ModelArgs};
use super::interrupt::{EXIT_CODE, Interrupt};
use super::method_args::MethodArgs;
use super::ui;
use crate::engine::{AuditSummary, Engine, Finish, Generation, Request, Stats};
use crate::model::{Checkpoint, Tokenizer};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args)]
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

pub fn run(a: RunArgs) -> Result<ExitCode> {
    a.answer.sampling().check()?;
    let interrupt = Interrupt::install();
    let text = prompt_text(&a)?;
    // A text without a question is continued; a question is put to the model as a user would.
    let question = a.ask.is_some() || a.prompt.is_some() || a.file.is_none();
    let builder = a.method.apply(a.model.builder())?.audit(a.answer.audit());
    let (checkpoint, tokenizer) = a.model.open()?;
    let builder = match a.model.size.ctx {
        Some(_) => builder,
        None => {
            builder.context(needed_context(&checkpoint, &tokenizer, &text, a.answer.max_tokens)?)
        }
    };
    let model = checkpoint.config().name.clone();
    let mut engine = builder.checkpoint(checkpoint).tokenizer(tokenizer).build()?;
    ui::notes(&engine);
    let chat = question && !a.raw && engine.template().is_some();
    let request = if chat { Request::chat(text) } else { Request::text(text) };
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
    let cancelled = answer.stats.finish == Some(Finish::Cancelled);
    Ok(if cancelled { ExitCode::from(EXIT_CODE) } else { ExitCode::SUCCESS })
}

fn prompt_text(a: &RunArgs) -> Result<String> {
    if a.ask.is_some() && a.file.is_none() && a.prompt.is_none() {
        bail!(
            "--ask puts a question about a text: name the text with -f FILE, or give the question without --ask"
        );
    }
    let file = a
        .file
        .as_ref()
        .map(|p| {
            let bytes = std::fs::read(p)
                .with_context(|| format!("cannot read the text {}", p.display()))?;
            String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", p.display()))
        })
        .transpose()?;
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

/// Room for the prompt and the answer, so that a long model does not take memory for its whole context.
fn needed_context(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    text: &str,
    max_tokens: usize,
) -> Result<usize> {
    let tokens = tokenizer.encode(text, true)?.len();
    // The template's own tokens: a system line and role marks.
    const TEMPLATE: usize = 192;
    let need = tokens.saturating_add(max_tokens).saturating_add(TEMPLATE);
    Ok(need.min(checkpoint.config().max_context))
}

/// A finished answer.
pub struct Answer {
    pub text: String,
    pub stats: Stats,
    pub audit: AuditSummary,
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

/// One line: sizes, speeds, bytes, and what the audit found.
pub fn statistics(a: &Answer, method: &str) -> String {
    let s = &a.stats;
    let rate = |n: usize, t: f64| if t > 0.0 { n as f64 / t } else { 0.0 };
    let reused = match s.reused_tokens {
        0 => String::new(),
        n => format!(" ({} still cached)", ui::thousands(n as u64)),
    };
    let read = s.prefill_tokens + s.reused_tokens;
    let of = match s.prompt_tokens {
        n if n > read => format!("{} of ", ui::thousands(read as u64)),
        _ => String::new(),
    };
    let mut parts = vec![
        format!(
            "{of}{} prompt tokens{reused}, {:.1} s ({:.0}/s)",
            ui::thousands(s.prompt_tokens as u64),
            s.prefill_seconds,
            rate(s.prefill_tokens, s.prefill_seconds)
        ),
        format!(
            "{} answer tokens, {:.1}/s",
            s.generated_tokens,
            rate(s.decode_steps, s.decode_seconds)
        ),
    ];
    let (kv, dense) = (ui::bytes(s.kv_bytes), ui::bytes(s.kv_bytes_dense));
    let share = 100.0 * s.kv_bytes as f64 / s.kv_bytes_dense as f64;
    match s.kv_bytes < s.kv_bytes_dense {
        // Nothing was decoded, so nothing was selected.
        _ if s.decode_steps == 0 => {}
        true => {
            parts.push(format!("{method}: {kv} of KV a token instead of {dense} ({share:.0} %)"))
        }
        false => parts.push(format!("{method}: every token attended to ({kv} of KV)")),
    }
    if let Some((layer, worst)) = a.audit.worst_layer() {
        parts.push(format!(
            "attention mass kept {:.1} % (worst layer, {layer}: {:.1} %), output error {:.1} %, in {} steps",
            100.0 * a.audit.recall(),
            100.0 * worst,
            100.0 * a.audit.output_error(),
            a.audit.layers.iter().map(|l| l.samples).max().unwrap_or(0)
        ));
    }
    if s.finish == Some(Finish::Cancelled) {
        parts.push("interrupted".into());
    }
    parts.join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_prompt_claims_no_more_than_was_read() {
        let stats = Stats {
            prompt_tokens: 3822,
            prefill_tokens: 2560,
            prefill_seconds: 10.0,
            kv_bytes: 1,
            kv_bytes_dense: 2,
            finish: Some(Finish::Cancelled),
            ..Stats::default()
        };
        let line =
            statistics(&Answer { text: String::new(), stats, audit: AuditSummary::default() }, "m");
        let want =
            "2,560 of 3,822 prompt tokens, 10.0 s (256/s) | 0 answer tokens, 0.0/s | interrupted";
        assert_eq!(line, want);
    }

    #[test]
    fn speeds_are_of_what_was_run() {
        let stats = Stats {
            prompt_tokens: 1100,
            reused_tokens: 1000,
            prefill_tokens: 100,
            prefill_seconds: 2.0,
            generated_tokens: 8,
            decode_steps: 8,
            decode_seconds: 2.0,
            ..Stats::default()
        };
        let line =
            statistics(&Answer { text: String::new(), stats, audit: AuditSummary::default() }, "m");
        assert!(
            line.starts_with(
                "1,100 prompt tokens (1,000 still cached), 2.0 s (50/s) | 8 answer tokens, 4.0/s"
            ),
            "{line}"
        );
    }
}
