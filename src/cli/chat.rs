//! `longsight chat`: a conversation on the terminal.

use super::args::{AnswerArgs, ModelArgs};
use super::interrupt::Interrupt;
use super::method_args::MethodArgs;
use super::run::answer;
use super::statistics::{statistics, unaudited};
use super::ui;
use crate::engine::{EngineError, Finish, Prompt, Request};
use crate::model::Message;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;

/// What a line can say beside a message.
const COMMANDS: &str = "Ctrl-C stops an answer; Ctrl-D, /quit, /exit or Ctrl-C twice leaves; /new starts over; /help says this again.";

/// The answer to a Ctrl-C at the prompt, which may have been meant for an answer that had just ended.
const LEAVING: &str = "Ctrl-C again, /exit or Ctrl-D leaves; what was typed on this line is gone";

const CTX: &str = "Most tokens of the conversation [default: the model's limit, at most 32,768]";

#[derive(Args)]
#[command(after_help = COMMANDS, mut_arg("ctx", |a| a.help(CTX)))]
pub struct ChatArgs {
    /// First message of the system, instead of the template's own
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    answer: AnswerArgs,
}

pub fn chat(a: ChatArgs) -> Result<ExitCode> {
    a.answer.sampling().check()?;
    let interrupt = Interrupt::install();
    let builder = a.method.builder(&a.model)?.audit(a.answer.audit());
    let mut engine = builder.build().map_err(|e| a.method.about(e))?;
    ui::notes(&engine);
    if engine.template().is_none() {
        bail!("this model brings no chat template; use `longsight run --raw`");
    }
    let mut messages: Vec<Message> =
        a.system.iter().map(|s| Message::new("system", s.clone())).collect();
    let terminal = std::io::stdin().is_terminal();
    if terminal {
        ui::note(COMMANDS);
    }
    let mut input = std::io::stdin().lock();
    loop {
        if terminal {
            std::io::stderr().write_all(b"> ")?;
            std::io::stderr().flush()?;
            interrupt.arm_with(Some(LEAVING));
        }
        let mut line = Vec::new();
        if input.read_until(b'\n', &mut line).context("cannot read standard input")? == 0 {
            break;
        }
        let Ok(line) = String::from_utf8(line) else {
            ui::note("this line is not UTF-8 text and was not sent");
            continue;
        };
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => break,
            "/help" => {
                ui::note(COMMANDS);
                continue;
            }
            "/new" => {
                messages.retain(|m| m.role == "system");
                ui::note("a new conversation");
                continue;
            }
            text if looks_like_a_command(text) => {
                ui::note(format!("{text} is no command. {COMMANDS}"));
                continue;
            }
            text => messages.push(Message::new("user", text)),
        }
        let mut request = Request::chat("");
        request.prompt = Prompt::Chat(messages.clone());
        request = request.max_tokens(a.answer.max_tokens).sampling(a.answer.sampling());
        request.stop = a.answer.stop.clone();
        request.keep = true;
        request.cancel = interrupt.arm_with(None);
        let result = answer(&mut engine, request, true);
        interrupt.disarm();
        match result {
            Ok(done) => {
                ui::note(statistics(&done, engine.plan()));
                if let Some(why) = unaudited(&done, engine.plan(), a.answer.audit()) {
                    ui::note(why);
                }
                match done.stats.finish {
                    // Stopped before it began: the conversation goes on as if nothing had been asked.
                    Some(Finish::Cancelled) if done.text.is_empty() => drop(messages.pop()),
                    _ => messages.push(Message::new("assistant", done.text)),
                }
            }
            Err(e) if matches!(e.downcast_ref(), Some(EngineError::ContextTooLong { .. })) => {
                messages.pop();
                ui::note(format!("{e:#}\n/new starts over with an empty conversation."));
            }
            Err(e) => return Err(e),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A slash and one word of letters, or a command with something after it: a mistyped command rather than a message.
fn looks_like_a_command(text: &str) -> bool {
    let Some(text) = text.strip_prefix('/') else { return false };
    let (word, rest) = text.trim_start().split_once(' ').unwrap_or((text.trim_start(), ""));
    let known = ["quit", "exit", "new", "help"].contains(&word);
    known || rest.is_empty() && !word.is_empty() && word.chars().all(|c| c.is_ascii_alphabetic())
}

#[cfg(test)]
mod tests {
    use super::looks_like_a_command;

    #[test]
    fn mistyped_commands_are_no_messages() {
        for text in ["/nwe", "/quit now", "/ help"] {
            assert!(looks_like_a_command(text), "{text}");
        }
        for text in ["/", "new", "/etc/passwd: what is it?", "/idea of mine", "1/2"] {
            assert!(!looks_like_a_command(text), "{text}");
        }
    }
}
