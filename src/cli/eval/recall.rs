//! `longsight eval recall`: what the selections of each layer and KV head hold.

use super::common::{Common, Setup, TextArgs};
use super::report::Report;
use crate::cli::args::at_least_one;
use crate::cli::plot::{Heat, Line, LinePoint, Panel};
use crate::cli::table::{Table, distinct};
use crate::cli::ui;
use crate::eval::{HeadRecall, RecallRow, continuation, recall, start_of_text};
use anyhow::{Result, bail};
use clap::Args;
use std::process::ExitCode;

/// What `--help` says of it.
pub const ABOUT: &str = "\
The last --steps tokens of the first --lengths tokens of each text are decoded with every method; in each step \
every sparse layer's selection is compared with the exact attention of the same queries (mean over the query \
heads of a KV head).

mass: share of that attention on the selected tokens; best: the same for as many tokens with the most attention, \
which no selection of this size exceeds; top-k: share of those tokens that are selected; churn: share of the \
selected tokens that were not selected a step before (the new token always counts); dims churn: the same for key \
dimensions, where the query chooses them. Nothing is sampled, so the seed of this evaluation is the text.";

#[derive(Args)]
pub struct RecallArgs {
    /// Decode steps of each text
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    steps: usize,
    /// Print every layer and KV head
    #[arg(long)]
    layers: bool,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    common: Common,
}

/// What is measured of a KV head; none where there is nothing to measure.
type Measure = fn(&HeadRecall) -> Option<f64>;

const MEASURES: [(&str, Measure); 4] = [
    ("attention mass", |h| Some(h.mass)),
    ("top-k recall", |h| Some(h.topk)),
    ("churn", |h| Some(h.churn)),
    ("churn of dimensions", |h| h.dims_churn),
];

pub fn run(a: RecallArgs) -> Result<ExitCode> {
    let setup = Setup::new(&a.common)?;
    let start = start_of_text(&setup.tokenizer)?;
    let mut samples = Vec::new();
    for (name, ids) in a.texts.encoded(&setup.tokenizer)? {
        for &n in &a.texts.lengths {
            let sample = continuation(&name, &start, &ids, n, a.steps);
            samples.push(setup.samples(&a.texts, sample.map_err(Into::into))?);
        }
    }
    let longest = samples.iter().map(|s| s.tokens.len()).max().unwrap_or(1);
    let bench = setup.bench(longest, "--lengths")?;
    if bench.plans.iter().all(|(_, p)| p.method == "dense") {
        bail!("dense attention selects nothing; name another method in --methods");
    }
    bench.report(
        |engine, plans, on, rows| {
            recall(engine, &samples, plans, on, |mut done| rows.append(&mut done))
        },
        |rows| report(a.layers, rows),
    )
}

fn report(layers: bool, rows: &[RecallRow]) -> Result<Report> {
    if rows.iter().all(|r| r.layers.is_empty()) {
        bail!(
            "no layer was sparse: every sample fits into the budget; give a smaller --budget or more --lengths"
        );
    }
    let methods = distinct(rows.iter().map(|r| r.method.as_str()));
    let mut panels: Vec<Panel> = methods
        .iter()
        .flat_map(|m| MEASURES.iter().filter_map(move |measure| heat(m, measure, rows)))
        .map(Panel::Heat)
        .collect();
    panels.push(by_step(&methods, rows));
    let mut tables = vec![method_table(rows)];
    if layers {
        tables.push(head_table(rows));
    }
    let json = vec![("rows", serde_json::to_value(rows)?)];
    Ok(Report { task: "recall", json, tables, note: LEGEND.into(), panels })
}

/// Below the tables.
const LEGEND: &str = "\
Mass: attention on the selected tokens; best: on as many tokens of the most attention; top-k: share of these that are selected.
Churn: share of the selected tokens that were not a step before; dims churn: of the scored dimensions, where queries choose \
them.
Worst head: the KV head with the least mass.
";

fn percent(x: f64) -> String {
    format!("{:.2} %", 100.0 * x)
}

fn optional(x: Option<f64>) -> String {
    x.map_or("-".into(), percent)
}

fn method_table(rows: &[RecallRow]) -> Table {
    let mut table = Table::new(&[
        "sample",
        "method",
        ">selected",
        ">mass",
        ">best",
        ">top-k",
        ">churn",
        ">dims churn",
        ">worst head: mass",
        ">KV read/token",
    ]);
    for r in rows {
        let heads = r
            .layers
            .iter()
            .flat_map(|l| l.heads.iter().enumerate().map(move |(h, head)| (head.mass, l.layer, h)));
        let worst = heads.min_by(|a, b| a.0.total_cmp(&b.0));
        table.row([
            r.sample.clone(),
            r.method.clone(),
            format!("{:.1}", r.mean(|h| h.selected)),
            percent(r.mean(|h| h.mass)),
            percent(r.mean(|h| h.best_mass)),
            percent(r.mean(|h| h.topk)),
            percent(r.mean(|h| h.churn)),
            optional(r.dims_churn()),
            worst.map_or("-".into(), |(m, l, h)| format!("layer {l}, head {h}: {}", percent(m))),
            ui::bytes(r.kv_bytes),
        ]);
    }
    table
}

fn head_table(rows: &[RecallRow]) -> Table {
    let mut table = Table::new(&[
        "sample",
        "method",
        ">layer",
        ">KV head",
        ">steps",
        ">mass",
        ">best",
        ">top-k",
        ">churn",
        ">dims churn",
    ]);
    for r in rows {
        for l in &r.layers {
            for (head, h) in l.heads.iter().enumerate() {
                table.row([
                    r.sample.clone(),
                    r.method.clone(),
                    l.layer.to_string(),
                    head.to_string(),
                    h.steps.to_string(),
                    percent(h.mass),
                    percent(h.best_mass),
                    percent(h.topk),
                    percent(h.churn),
                    optional(h.dims_churn),
                ]);
            }
        }
    }
    table
}

/// One measure of a method by layer and KV head, means over texts; none where nothing was measured.
fn heat(method: &str, (name, measure): &(&str, Measure), rows: &[RecallRow]) -> Option<Heat> {
    let of: Vec<&RecallRow> = rows.iter().filter(|r| r.method == method).collect();
    let mut layers = distinct(of.iter().flat_map(|r| r.layers.iter().map(|l| l.layer)));
    layers.sort_unstable();
    let heads = of.iter().flat_map(|r| &r.layers).map(|l| l.heads.len()).max()?;
    let mean = |layer: usize, head: usize| -> Option<f64> {
        let all = of.iter().flat_map(|r| r.layers.iter().filter(|l| l.layer == layer));
        let values: Vec<f64> = all.filter_map(|l| l.heads.get(head)).filter_map(measure).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let values: Vec<Vec<Option<f64>>> =
        (0..heads).map(|h| layers.iter().map(|&l| mean(l, h)).collect()).collect();
    values.iter().flatten().any(Option::is_some).then(|| Heat {
        title: format!("{method}: {name}"),
        axes: ["layer", "KV head"],
        columns: layers.iter().map(usize::to_string).collect(),
        rows: (0..heads).map(|h| h.to_string()).collect(),
        values: values.clone(),
    })
}

/// Mass by decode step, mean over texts.
fn by_step(methods: &[&str], rows: &[RecallRow]) -> Panel {
    let line = |method: &&str| {
        let of: Vec<&RecallRow> = rows.iter().filter(|r| r.method == *method).collect();
        let steps = of.iter().map(|r| r.mass_by_step.len()).max().unwrap_or(0);
        let point = |step: usize| {
            let at: Vec<f64> =
                of.iter().filter_map(|r| r.mass_by_step.get(step).copied()).collect();
            let y = 100.0 * at.iter().sum::<f64>() / at.len().max(1) as f64;
            LinePoint { x: step as f64, y, low: y, high: y }
        };
        Line { name: (*method).to_string(), points: (0..steps).map(point).collect() }
    };
    Panel::Lines {
        title: "recall: attention mass on the selected tokens by decode step".into(),
        axes: ["decode step", "mass, %"],
        lines: methods.iter().map(line).collect(),
    }
}
