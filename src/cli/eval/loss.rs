//! Evaluations that score given tokens: prose, copying, pass keys.

use super::common::{AuditArgs, Common, Setup, TextArgs};
use super::report::{Quality, Report, frontier, mass_kept};
use crate::cli::args::at_least_one;
use crate::cli::plot::{Line, LinePoint, Panel};
use crate::cli::table::{Table, distinct};
use crate::cli::ui;
use crate::eval::{
    Bootstrap, DEPTHS, Interval, Paired, PairedConfig, Row, Sample, continuation, copy, evaluate,
    key_sequence, paired, passkey, start_of_text,
};
use crate::model::Tokenizer;
use anyhow::Result;
use clap::Args;
use std::process::ExitCode;

/// The samples and how they are audited.
#[derive(Args)]
pub struct LossArgs {
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    audit: AuditArgs,
    /// Print recall per layer as well
    #[arg(long)]
    layers: bool,
    #[command(flatten)]
    common: Common,
}

/// What `--help` says of it.
pub const PPL: &str = "\
The last --score tokens of the first --lengths tokens of each text are decoded one by one and scored.

The mean difference to dense comes with two 95 % intervals from a paired bootstrap: over positions (blocks of \
--block neighbouring tokens drawn inside each text: what other tokens of these texts would give) and over texts \
(whole texts drawn: what other texts would give; give several). Both are repeated for --buckets parts of the \
scored tokens, so that a difference that grows while decoding shows. Perplexity is exp(NLL).";

#[derive(Args)]
pub struct PplArgs {
    /// Predicted tokens of each text
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = at_least_one)]
    score: usize,
    /// Parts of the scored tokens that are compared on their own
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_least_one)]
    buckets: usize,
    /// Neighbouring tokens that the bootstrap draws together
    #[arg(long, value_name = "TOKENS", default_value_t = 16, value_parser = at_least_one)]
    block: usize,
    /// Resampled means of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = at_least_one)]
    resamples: usize,
    /// Seed of the bootstrap
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    loss: LossArgs,
}

/// What `--help` says of it.
pub const COPY: &str = "\
Half the length of each text is given twice; the last --score tokens are decoded one by one and scored. Each \
stands half the length back, so a selection that does not find it cannot predict it.";

#[derive(Args)]
pub struct CopyArgs {
    /// Predicted tokens of each text
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = at_least_one)]
    score: usize,
    #[command(flatten)]
    loss: LossArgs,
}

/// What `--help` says of it.
pub const PASSKEY: &str = "\
A sentence with five digits is hidden in the first text at a tenth, three, five, seven and nine tenths of its \
length; the question is decoded token by token, then the digits are scored.";

#[derive(Args)]
pub struct PasskeyArgs {
    #[command(flatten)]
    loss: LossArgs,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    Ppl,
    Copy,
    Passkey,
}

pub fn ppl(a: PplArgs) -> Result<ExitCode> {
    let config = PairedConfig {
        buckets: a.buckets,
        block: a.block,
        bootstrap: Bootstrap { resamples: a.resamples, seed: a.seed },
    };
    run(&a.loss, Task::Ppl, Some(config), |loss, tokenizer| {
        cut(loss, tokenizer, |name, start, ids, n| continuation(name, start, ids, n, a.score))
    })
}

pub fn copies(a: CopyArgs) -> Result<ExitCode> {
    run(&a.loss, Task::Copy, None, |loss, tokenizer| {
        cut(loss, tokenizer, |name, start, ids, n| copy(name, start, ids, n, a.score))
    })
}

pub fn passkeys(a: PasskeyArgs) -> Result<ExitCode> {
    run(&a.loss, Task::Passkey, None, |loss, tokenizer| {
        let texts = loss.texts.encoded(tokenizer)?;
        let mut samples = Vec::new();
        let mut keys = key_sequence();
        for (name, ids) in texts.iter().take(1) {
            for &n in &loss.texts.lengths {
                for (tenths, key) in DEPTHS.into_iter().zip(keys.by_ref()) {
                    samples.push(passkey(tokenizer, name, ids, n, tenths, key)?);
                }
            }
        }
        Ok(samples)
    })
}

/// A sample of every text and length.
fn cut(
    a: &LossArgs,
    tokenizer: &Tokenizer,
    make: impl Fn(&str, &[u32], &[u32], usize) -> Result<Sample, crate::eval::SampleError>,
) -> Result<Vec<Sample>> {
    let start = start_of_text(tokenizer)?;
    let mut samples = Vec::new();
    for (name, ids) in a.texts.encoded(tokenizer)? {
        for &n in &a.texts.lengths {
            samples.push(make(&name, &start, &ids, n)?);
        }
    }
    Ok(samples)
}

fn run(
    a: &LossArgs,
    task: Task,
    config: Option<PairedConfig>,
    make: impl FnOnce(&LossArgs, &Tokenizer) -> Result<Vec<Sample>>,
) -> Result<ExitCode> {
    let setup = Setup::new(&a.common)?;
    let samples = setup.samples(&a.texts, make(a, &setup.tokenizer))?;
    let longest = samples.iter().map(|s| s.tokens.len()).max().unwrap_or(1);
    let audit = a.audit.every();
    setup.bench(longest, "--lengths")?.report(
        |engine, plans, on, rows| {
            evaluate(engine, &samples, plans, audit, on, |mut done| rows.append(&mut done))
        },
        |rows| {
            let mut report = report(task, a.layers, config, rows)?;
            report.note += &a.audit.legend();
            Ok(report)
        },
    )
}

fn report(task: Task, layers: bool, config: Option<PairedConfig>, rows: &[Row]) -> Result<Report> {
    let (name, axis) = match task {
        Task::Ppl => ("ppl", "NLL difference to dense, nats"),
        Task::Copy => ("copy", "top-1, %"),
        Task::Passkey => ("passkey", "found, %"),
    };
    let quality = rows.iter().map(|r| Quality {
        method: &r.method,
        kv_bytes: r.kv_bytes,
        value: match task {
            Task::Ppl => r.nll_difference.mean,
            Task::Copy => 100.0 * r.top1,
            Task::Passkey => 100.0 * f64::from(u8::from(r.exact)),
        },
    });
    let quality: Vec<Quality<'_>> = quality.collect();
    let mut report = Report {
        task: name,
        json: vec![("rows", serde_json::to_value(rows)?)],
        tables: tables(task, layers, rows),
        note: String::new(),
        panels: vec![frontier(name, axis, &quality)],
    };
    if let Some(config) = config {
        let compared = paired(rows, &config);
        report.json.push(("bootstrap", serde_json::to_value(config)?));
        report.json.push(("paired", serde_json::to_value(&compared)?));
        report.tables.extend(paired_tables(&compared));
        report.panels.push(by_position(&compared));
        report.note = format!(
            "Intervals hold 95 % of {} resampled means (seed {}); blocks of {} tokens.\n",
            config.bootstrap.resamples, config.bootstrap.seed, config.block
        );
    }
    Ok(report)
}

fn cells(task: Task, group: &str, method: &str, rows: &[&Row]) -> Vec<String> {
    let n = rows.len().max(1) as f64;
    let mean = |f: &dyn Fn(&Row) -> f64| rows.iter().map(|r| f(r)).sum::<f64>() / n;
    // Independent samples: variances add.
    let squares: Option<f64> = rows.iter().map(|r| r.nll_difference.error.map(|e| e.powi(2))).sum();
    let error = squares.map(|s| s.sqrt() / n);
    let found = rows.iter().filter(|r| r.exact).count();
    vec![
        group.to_string(),
        method.to_string(),
        format!("{:.4}", mean(&|r| r.nll)),
        format!("{:+.4}{}", mean(&|r| r.nll_difference.mean), ui::plus_minus(error, 4)),
        match task {
            Task::Passkey => format!("{found}/{}", rows.len()),
            _ => format!("{:.2} %", 100.0 * mean(&|r| r.top1)),
        },
        mass_kept(rows.iter().map(|r| &r.audit)),
        ui::bytes(mean(&|r| r.kv_bytes as f64) as u64),
    ]
}

/// One table of all samples, and one of all layers where it is asked for.
fn tables(task: Task, layers: bool, rows: &[Row]) -> Vec<Table> {
    let hits = if task == Task::Passkey { ">found" } else { ">top-1" };
    let columns = ["sample", "method", ">NLL", ">to dense", hits, ">mass kept", ">KV read/token"];
    let mut table = Table::new(&columns);
    // A pass key's depths of one length belong together.
    let group = |r: &Row| match task {
        Task::Passkey => r.sample.split(' ').next().unwrap_or_default().to_string(),
        _ => r.sample.clone(),
    };
    let groups = distinct(rows.iter().map(group));
    let methods = distinct(rows.iter().map(|r| r.method.as_str()));
    let several = groups.len() > 1;
    for g in groups.iter().map(Some).chain(several.then_some(None)) {
        for m in &methods {
            let of: Vec<&Row> = rows
                .iter()
                .filter(|r| r.method == **m && g.is_none_or(|g| group(r) == *g))
                .collect();
            table.row(cells(task, g.map_or("mean", String::as_str), m, &of));
        }
    }
    let mut tables = vec![table];
    if layers {
        tables.push(layer_table(rows));
    }
    tables
}

fn layer_table(rows: &[Row]) -> Table {
    let mut table =
        Table::new(&["sample", "method", ">layer", ">mass kept", ">worst head", ">output error"]);
    for r in rows {
        for l in &r.audit.layers {
            table.row([
                r.sample.clone(),
                r.method.clone(),
                l.layer.to_string(),
                format!("{:.2} %", 100.0 * l.recall),
                format!("{:.2} %", 100.0 * l.worst_recall),
                format!("{:.2} %", 100.0 * l.output_error),
            ]);
        }
    }
    table
}

fn interval(of: Option<Interval>) -> String {
    of.map_or("-".into(), |i| format!("{:+.4} to {:+.4}", i.low, i.high))
}

/// The difference to dense with its intervals, in all and by position.
fn paired_tables(all: &[Paired]) -> [Table; 2] {
    let mut whole = Table::new(&[
        "method",
        ">tokens",
        ">texts",
        ">to dense",
        ">95 % over positions",
        ">95 % over texts",
    ]);
    let mut parts =
        Table::new(&["decoded tokens", "method", ">NLL", ">to dense", ">95 % over positions"]);
    for p in all {
        whole.row([
            p.method.clone(),
            p.tokens.to_string(),
            p.texts.to_string(),
            format!("{:+.4}", p.difference),
            interval(p.over_positions),
            interval(p.over_texts),
        ]);
    }
    for i in 0..all.iter().map(|p| p.buckets.len()).max().unwrap_or(0) {
        for (p, b) in all.iter().filter_map(|p| Some((p, p.buckets.get(i)?))) {
            parts.row([
                format!("{} to {}", b.from, b.to.saturating_sub(1)),
                p.method.clone(),
                format!("{:.4}", b.nll),
                format!("{:+.4}", b.difference),
                interval(b.interval),
            ]);
        }
    }
    [whole, parts]
}

/// The difference to dense by decoded position, a line for each method.
fn by_position(all: &[Paired]) -> Panel {
    let lines = all.iter().filter(|p| p.method != "dense").map(|p| Line {
        name: p.method.clone(),
        points: p
            .buckets
            .iter()
            .map(|b| LinePoint {
                x: (b.from + b.to) as f64 / 2.0,
                y: b.difference,
                low: b.interval.map_or(b.difference, |i| i.low),
                high: b.interval.map_or(b.difference, |i| i.high),
            })
            .collect(),
    });
    Panel::Lines {
        title: "ppl: NLL difference to dense by decoded position, 95 % intervals".into(),
        axes: ["scored tokens decoded before", "nats"],
        lines: lines.collect(),
    }
}
