//! `longsight bench` without a subcommand.

use super::{ReportArgs, exit_code, opened, origin, percent, slow};
use crate::backend::Capabilities;
use crate::bench::{BenchError, EndToEnd, EndToEndReport, PrefillArithmetic, Progress, Row};
use crate::cli::args::{ModelArgs, check_plans, read_plans};
use crate::cli::forecast_args::ForecastArgs;
use crate::cli::interrupt::Interrupt;
use crate::cli::lists::{item, path};
use crate::cli::progress::Bar;
use crate::cli::sweep::{Sweep, method_name};
use crate::cli::table::Table;
use crate::cli::ui;
use crate::engine::EngineError;
use crate::select::MethodSpec;
use anyhow::{Result, anyhow, bail};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Base sequence, and the one that is measured.
const SEQUENCES: usize = 2;

const CTX: &str = "Most tokens of a sequence [default: what the longest test needs]";

#[derive(Args)]
#[command(mut_arg("ctx", |a| a.help(CTX)))]
pub struct EndToEndArgs {
    /// Prompt lengths to read (prefill speed); 0 for none
    #[arg(
        short,
        long,
        value_delimiter = ',',
        value_parser = item::<usize>,
        default_value = "512",
        value_name = "TOKENS,..."
    )]
    prompt: Vec<usize>,
    /// Tokens to decode (decode speed); 0 for none
    #[arg(
        short = 'n',
        long,
        value_delimiter = ',',
        value_parser = item::<usize>,
        default_value = "128",
        value_name = "TOKENS,..."
    )]
    generate: Vec<usize>,
    /// Tokens of text in the KV cache before each test
    #[arg(
        short = 'D',
        long,
        value_delimiter = ',',
        value_parser = item::<usize>,
        default_value = "0,4096",
        value_name = "TOKENS,..."
    )]
    depth: Vec<usize>,
    /// Methods to compare with dense attention, comma separated, with options after colons (sparcas:dims=16);
    /// `longsight run --help` lists them
    #[arg(long, value_delimiter = ',', value_parser = method_name, default_value = "sparcas", value_name = "METHOD,...")]
    methods: Vec<String>,
    /// Plan files to measure beside the methods (see `longsight plan --save`)
    #[arg(long, value_delimiter = ',', value_parser = path(), value_name = "FILE,...")]
    plan: Vec<PathBuf>,
    /// Repetitions of every test
    #[arg(short, long, default_value_t = 3, value_name = "N")]
    repeats: usize,
    /// Decode steps before the clock starts, in every repetition
    #[arg(long, default_value_t = 2, value_name = "STEPS")]
    warmup: usize,
    #[command(flatten)]
    report: ReportArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    forecast: ForecastArgs,
    #[command(flatten)]
    method: Sweep,
}

pub fn run(a: EndToEndArgs) -> Result<ExitCode> {
    let methods = a.method.specs(&a.methods)?;
    let specs: Vec<MethodSpec> = methods.iter().map(|m| m.1.clone()).collect();
    let bench = EndToEnd {
        prompts: a.prompt,
        generate: a.generate,
        depths: a.depth,
        methods,
        plans: read_plans(&a.plan)?,
        repeats: a.repeats,
        warmup: a.warmup,
    };
    bench.validate()?;
    a.forecast.read_by_one_of(&bench.methods, &bench.plans)?;
    let need = bench.context();
    let context = a.model.size.ctx.unwrap_or(need);
    if context < need {
        bail!("the longest test holds {need} tokens, --ctx {context} does not; leave --ctx out");
    }
    let file = a.report.file()?;
    let each = bench.prompts.iter().sum::<usize>().saturating_mul(bench.depths.len());
    let filled = bench.depths.iter().max().copied().unwrap_or(0);
    let tokens = each.saturating_mul(bench.repeats).saturating_add(filled);
    let checkpoint = a.model.size.checkpoint()?;
    check_plans(&bench.plans, &checkpoint)?;
    let too_long = |e: EngineError| match e {
        e @ (EngineError::BadOption(_) | EngineError::BadContext { .. }) => {
            anyhow!("the longest test holds {need} tokens (-D, and -p or -n on top): {e}")
        }
        e => e.into(),
    };
    // Said before a device is opened and its speed is talked about.
    let most = checkpoint.config().max_context;
    if context > most {
        return Err(too_long(EngineError::BadContext { context, most }));
    }
    let device = opened(&a.model.device)?;
    if let Some(slow) = slow_prompts(checkpoint.config().parameters(), tokens, device.caps()) {
        ui::note(slow);
    }
    let mut engine = a
        .forecast
        .set(a.model.builder())
        .checkpoint(checkpoint)
        .backend(device)
        .context(context)
        .sequences(SEQUENCES)
        .kv_tokens(bench.kv_tokens())
        .method(specs.first().cloned().unwrap_or_default())
        .summaries_for(&specs)
        .summaries_for_plans(&bench.plans.iter().map(|p| p.1.clone()).collect::<Vec<_>>())
        .build()
        .map_err(too_long)?;
    ui::notes(&engine);
    let filling = Bar::new("filling", "tokens");
    let measuring = Bar::new("measuring", "measurements");
    let cancel = Interrupt::install().arm();
    let report = bench.run(&mut engine, &mut |p| match p {
        Progress::Fill(done, all) => filling.go_on(&cancel, done as u64, all as u64),
        Progress::Measure(what, done, all) => {
            measuring.about(what);
            measuring.go_on(&cancel, done as u64, all as u64)
        }
    });
    filling.end();
    measuring.end();
    let report = match report {
        Err(BenchError::Engine(EngineError::Interrupted)) => {
            ui::note("interrupted before a test was finished; nothing was written");
            return Ok(exit_code(&cancel));
        }
        report => report?,
    };
    a.report.finish(file, &report, || table(&report))?;
    Ok(exit_code(&cancel))
}

/// Numbers that two cores multiply and add in a second where they read a prompt.
const SPEED: f64 = 4e10;

/// [`slow`] for reading so many tokens, without the attention that long texts add.
fn slow_prompts(parameters: u64, tokens: usize, caps: &Capabilities) -> Option<String> {
    let work = format!(
        "these tests' {} prompt tokens with {:.1} billion parameters",
        ui::thousands(tokens as u64),
        parameters as f64 / 1e9
    );
    let seconds = parameters as f64 * tokens as f64 / SPEED;
    slow(caps, seconds, &work, "-D 0 -p 16 -n 8 -r 1")
}

fn table(r: &EndToEndReport) -> String {
    let mut t = Table::new(&[
        "model",
        "device",
        "dtype",
        "test",
        "method",
        ">budget",
        ">t/s",
        ">KV/token",
        ">x dense",
        ">GB/s",
        ">of read",
    ]);
    for row in &r.rows {
        t.row(cells(r, row));
    }
    let mut text = format!("{}\n\n{t}\n", origin(&r.environment));
    let w = r.bandwidth_gb_s.device_read;
    text += &format!(
        "GB/s: weights and KV that a decoded token reads, over its time; the device reads {w:.1} GB/s in this run.\n"
    );
    if let Some(row) = r.rows.iter().find(|r| r.traffic.is_some())
        && let Some(traffic) = &row.traffic
    {
        text += &format!(
            "{} {}: {} of weights and {} of KV a token, {:.1} GB/s, {} of that.\n",
            row.test,
            row.method,
            ui::bytes(traffic.weight_bytes),
            ui::bytes(traffic.kv_bytes),
            traffic.gb_s,
            percent(traffic.share)
        );
    }
    let counted = r.rows.iter().filter(|row| row.traffic.is_some());
    text += &ui::bounds(counted.filter_map(|row| Some((&*row.method, row.plan.as_ref()?))));
    if let Some(a) = &r.prefill_arithmetic {
        text += &arithmetic(a);
    }
    for note in &r.notes {
        text += &format!("note: {note}\n");
    }
    text
}

fn cells(r: &EndToEndReport, row: &Row) -> Vec<String> {
    let none = || "-".to_owned();
    let s = &row.tokens_per_second;
    vec![
        r.model.name.clone(),
        r.environment.device.backend.into(),
        r.model.dtype.to_string(),
        row.test.clone(),
        row.method.clone(),
        row.budget.map_or_else(none, |b| b.to_string()),
        format!("{:.2}{}", s.mean, ui::plus_minus(s.sd, 2)),
        row.traffic.as_ref().map_or_else(none, |t| ui::bytes(t.kv_bytes)),
        row.x_dense.map_or_else(none, |x| format!("{x:.2}")),
        row.traffic.as_ref().map_or_else(none, |t| format!("{:.1}", t.gb_s)),
        row.traffic.as_ref().map_or_else(none, |t| percent(t.share)),
    ]
}

fn arithmetic(a: &PrefillArithmetic) -> String {
    let mut text = format!(
        "prefill, {} rows: linear layers {:.1} GFLOP/s, the GEMM crate alone {:.1} at the same shapes ({})",
        a.rows,
        a.linear_gflop_s,
        a.gemm_gflop_s,
        percent(a.linear_share)
    );
    if let (Some(p), Some(share)) = (a.prefill_gflop_s, a.prefill_share) {
        text += &format!("; whole prefill {p:.1} ({})", percent(share));
    }
    text + ".\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_long_tests_of_large_models_on_processors_are_called_slow() {
        let cpu = crate::backend::open("cpu").unwrap().caps().clone();
        let gpu = Capabilities { backend: "cuda", ..cpu.clone() };
        let said = |parameters, tokens| slow_prompts(parameters, tokens, &cpu);
        let note = said(8_030_000_000, 5_632).unwrap();
        assert!(note.contains("5,632 prompt tokens with 8.0 billion"), "{note}");
        assert!(note.contains("19 minutes or more"), "{note}");
        assert!(said(8_030_000_000, 56_320).unwrap().contains("188 minutes"));
        assert_eq!(said(8_030_000_000, 16), None);
        assert_eq!(said(134_000_000, 5_632), None);
        assert_eq!(slow_prompts(8_030_000_000, 5_632, &gpu), None);
    }
}
