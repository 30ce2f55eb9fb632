//! The command line: parses, shows, measures; no tensor code.

mod args;
mod bench;
mod calibrate;
mod chat;
mod devices;
mod eval;
mod forecast_args;
mod hint;
mod interrupt;
mod lists;
mod method_args;
mod output;
mod plan;
mod plot;
mod progress;
mod run;
mod statistics;
mod sweep;
mod table;
mod texts;
mod train_forecast;
mod ui;

use clap::{Arg, ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  longsight run \"Name three rivers.\"
  longsight run -f book.txt --ask \"Who is the heroine?\" --audit 4
  longsight run -f book.txt --ask \"Who is the heroine?\" --method dense
  longsight chat -m path/to/model.gguf --device wgpu
  longsight devices
  longsight plan --method sparcas --budget 1024
  longsight eval copy --text a.txt --methods sparcas:dims=16:budget=256
  longsight eval copy --text a.txt --budget 128,256,512 --dims 16,32
  longsight eval needle --text a.txt --lengths 1024,2048 -o needle.svg
  longsight calibrate --text a.txt --prompts 16 -o kascade.plan.json
  longsight bench -D 4096 --methods sparcas,sparcas-int8";

#[derive(Parser)]
#[command(version, about, after_help = EXAMPLES, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer a prompt, or a question about a long text
    Run(run::RunArgs),
    /// Talk to a model; the conversation stays in the KV cache
    Chat(chat::ChatArgs),
    /// List the devices of this machine and measure their bandwidth
    Devices(devices::DevicesArgs),
    /// Print (or save) what a method does in each layer, and the bytes it reads
    Plan(plan::PlanArgs),
    /// Measure prefill and decode speed, dense and sparse; `bench kernels` measures single ops
    Bench(bench::BenchArgs),
    /// Find the layers whose token lists other layers can use (Kascade)
    Calibrate(calibrate::CalibrateArgs),
    /// Train the matrices that predict which blocks the next layer reads (SparDA's Forecast)
    TrainForecast(train_forecast::TrainForecastArgs),
    /// Measure what sparsity costs: prose, copying, needles, long answers, RULER-style tasks, recall of the selection
    Eval(eval::EvalArgs),
}

/// Lets every command with `--format` take `--json` as well: nobody remembers which has which.
fn with_json(command: clap::Command) -> clap::Command {
    let command = command.mut_subcommands(with_json);
    if command.get_arguments().all(|a| a.get_id() != "format") {
        return command;
    }
    let json = Arg::new("json")
        .long("json")
        .action(ArgAction::SetTrue)
        .conflicts_with("format")
        .help_heading(None::<&'static str>)
        .help("The same as --format json");
    command.mut_arg("format", |format| format.default_value_if("json", "true", "json")).arg(json)
}

/// Lets options take -5 as a value, so that what is said of it names the option and what it takes.
fn with_negative_numbers(command: clap::Command) -> clap::Command {
    let takes_one = |arg: &Arg| !arg.is_positional() && arg.get_action().takes_values();
    command
        .mut_args(|arg| if takes_one(&arg) { arg.allow_negative_numbers(true) } else { arg })
        .mut_subcommands(with_negative_numbers)
}

fn parsed() -> Cli {
    let matches = with_negative_numbers(with_json(Cli::command())).get_matches();
    Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit())
}

/// Parses the command line and runs it. Errors go to stderr as one sentence with their causes.
pub fn main() -> ExitCode {
    let cli = parsed();
    let calibrates = matches!(cli.command, Command::Calibrate(_));
    let result = match cli.command {
        Command::Run(a) => run::run(a),
        Command::Chat(a) => chat::chat(a),
        Command::Devices(a) => devices::devices(a),
        Command::Plan(a) => plan::plan(a),
        Command::Calibrate(a) => calibrate::calibrate(a),
        Command::TrainForecast(a) => train_forecast::train_forecast(a),
        Command::Eval(a) => eval::eval(a),
        Command::Bench(a) => bench::bench(a),
    };
    match result {
        Ok(code) => code,
        Err(e) if ui::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            ui::note(format!("error: {}", ui::sentence(&e)));
            if let Some(hint) = hint::hint(&e, calibrates) {
                ui::note(format!("hint: {hint}"));
            }
            ExitCode::FAILURE
        }
    }
}
