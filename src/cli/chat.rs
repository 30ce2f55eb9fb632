//! `longsight chat`: a conversation on the terminal.

use super::args::{AnswerArgs, ModelArgs};
use super::interrupt::Interrupt;
use super::method_args::MethodArgs;
use super::run::answer;
use super::statistics::{statistics, unaudited};
use super::ui;
use crate::engine::{EngineError, Prompt, Request};
use crate::model::Message;
use anyhow::{Result, bail};
use clap::Args;
use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;

/// What a line can say beside a message.
const COMMANDS: &str = "Ctrl-C stops an answer; Ctrl-D, /quit or /exit leaves; /new starts over; /help says this again.";

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
    let mut engine = a.method.builder(&a.model)?.audit(a.answer.audit()).build()?;
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
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if terminal {
            std::io::stderr().write_all(b"> ")?;
            std::io::stderr().flush()?;
        }
        let Some(line) = lines.next() else { break };
        let line = line?;
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => break,
            "/help" => {
                ui::note(COMMANDS);
                continue;
            }
            "/new" => {
                messages.retain(|m| m.role == "system");
                continue;
            }
            text => messages.push(Message::new("user", text)),
        }
        let mut request = Request::chat("");
        request.prompt = Prompt::Chat(messages.clone());
        request = request.max_tokens(a.answer.max_tokens).sampling(a.answer.sampling());
        request.stop = a.answer.stop.clone();
        request.keep = true;
        request.cancel = interrupt.arm();
        let result = answer(&mut engine, request, true);
        interrupt.disarm();
        match result {
            Ok(done) => {
                ui::note(statistics(&done, &engine.plan().method));
                if let Some(why) = unaudited(&done, engine.plan(), a.answer.audit()) {
                    ui::note(why);
                }
                messages.push(Message::new("assistant", done.text));
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
