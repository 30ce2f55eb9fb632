//! `longsight bench`: speed of a model, and of single ops.

mod attention;
mod end_to_end;
mod kernels;

use super::args::Format;
use super::interrupt::{EXIT_CODE, Interrupt};
use super::output::{OutputFile, Written};
use super::progress::Bar;
use super::ui;
use crate::backend::{Backend, Capabilities, open};
use crate::bench::Environment;
use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const EXAMPLES: &str = "\
Tests are named as in llama-bench: pp512 reads a prompt of 512 tokens, tg128@d4096 decodes 128 tokens after 4096. \
Dense attention is always measured in the same run, and sparse rows say how many times faster they are. Sparse \
methods stay dense up to --dense-below tokens, so give depths beyond it.

Prefill, dense and sparse decode of the demo model:
  longsight bench
Several methods and budgets, a row for each pair:
  longsight bench -D 8192 --methods sparcas,quest --budget 512,1024
Decoding only, five times, everything to a file:
  longsight bench -p 0 -n 64 -D 4096 -r 5 -o run.json
A model's speed without its file:
  longsight bench -m random:llama-3.1-8b -D 32768 -p 0
Single ops against the device's memory bandwidth:
  longsight bench kernels --device cuda -o kernels.json
The attention of Llama 3.1 8B at 131,072 tokens:
  longsight bench attention --device cuda -D 131072 -b 1,32
The same in prompts:
  longsight bench attention --device cuda -p 8192,32768";

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    end_to_end: end_to_end::EndToEndArgs,
}

#[derive(Subcommand)]
enum What {
    /// Single ops at one shape: milliseconds, GB/s, share of the device-read bandwidth of the same run
    #[command(long_about = kernels::ABOUT)]
    Kernels(kernels::KernelArgs),
    /// The attention of all layers in decode steps or prompts, method by method, without the rest of the model
    #[command(long_about = attention::ABOUT)]
    Attention(attention::AttentionArgs),
}

pub fn bench(a: BenchArgs) -> Result<ExitCode> {
    match a.what {
        Some(What::Kernels(k)) => kernels::run(k),
        Some(What::Attention(a)) => attention::run(a),
        None => end_to_end::run(a.end_to_end),
    }
}

/// A file that may hold JSON by its name.
fn json_file(s: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(s);
    match path.extension() {
        Some(ending) if ending != "json" => Err("it will hold JSON: name a .json file".into()),
        _ => Ok(path),
    }
}

/// How a report leaves the program.
#[derive(Args, Clone, Debug)]
struct ReportArgs {
    /// How to print
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Also write everything (raw samples, settings, device, driver, date, commit) to this file as JSON
    #[arg(short, long, value_name = "FILE", value_parser = json_file)]
    output: Option<PathBuf>,
}

impl ReportArgs {
    /// Opens the result file, before anything is measured.
    fn file(&self) -> Result<Option<OutputFile>> {
        self.output.as_deref().map(OutputFile::create).transpose()
    }

    /// Writes the file and prints the report, as `table` or as JSON.
    fn finish(
        &self,
        file: Option<OutputFile>,
        report: &impl Serialize,
        table: impl FnOnce() -> String,
    ) -> Result<()> {
        let json = serde_json::to_string_pretty(report)? + "\n";
        let written = file.map(|f| f.finish(json.as_bytes())).transpose()?;
        let text = if self.format == Format::Json { json } else { table() };
        ui::print(&text)?;
        written.iter().for_each(Written::tell);
        Ok(())
    }
}

/// A note where a processor is busy for minutes: `work`, which takes two of today's cores so many seconds at least, and
/// the options that ask for `less`.
fn slow(caps: &Capabilities, seconds: f64, work: &str, less: &str) -> Option<String> {
    let processor = caps.backend == "cpu" || caps.software;
    (processor && seconds > 90.0).then(|| {
        let minutes = (seconds / 60.0).round();
        format!(
            "note: {work} keep two CPU cores busy for {minutes} minutes or more; {less} takes less"
        )
    })
}

/// The device of a measurement without an engine.
fn opened(selector: &str) -> Result<Arc<dyn Backend>> {
    let device = open(selector)?;
    ui::about_device(device.caps());
    Ok(device)
}

/// Hears what is measured, how many measurements are done, and of how many; answers whether to go on.
type On<'a> = dyn FnMut(&str, usize, usize) -> bool + 'a;

/// Runs a measurement under a progress bar, to its end or to Ctrl-C: then the exit code says so.
fn with_bar<R>(measure: impl FnOnce(&mut On<'_>) -> Result<R>) -> Result<(R, ExitCode)> {
    let bar = Bar::new("measuring", "measurements");
    let cancel = Interrupt::install().arm();
    let measured = measure(&mut |what, done, all| {
        bar.about(what);
        bar.go_on(&cancel, done as u64, all as u64)
    });
    bar.end();
    Ok((measured?, exit_code(&cancel)))
}

fn exit_code(cancel: &AtomicBool) -> ExitCode {
    let code = if cancel.load(Ordering::Relaxed) { EXIT_CODE } else { 0 };
    ExitCode::from(code)
}

/// An error where results were wrong; `wrong` names each.
fn refuse_wrong(e: &Environment, wrong: &[String]) -> Result<()> {
    if !wrong.is_empty() {
        bail!("wrong results on {}: {}", e.device.device, wrong.join("; "));
    }
    Ok(())
}

/// Two lines on where a table comes from.
fn origin(e: &Environment) -> String {
    format!(
        "{} | {} | {}\nlongsight {} ({}), {}, {}",
        e.device.backend,
        e.device.device,
        e.device.driver,
        e.version,
        e.commit.get(..12).map_or(e.commit.clone(), |short| match e.commit.ends_with("-dirty") {
            true => format!("{short}-dirty"),
            false => short.to_owned(),
        }),
        e.system,
        e.date
    )
}

/// A share in percent.
fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}
