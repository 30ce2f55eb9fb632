//! What `longsight eval` shows and writes.

use super::eval::Task;
use super::plot::{Point, frontier};
use super::table::{Table, distinct};
use super::ui;
use crate::eval::{Answer, Difference, Row};
use anyhow::Result;
use std::path::PathBuf;

/// What a file holds.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Everything.
    Json,
    /// The table.
    Markdown,
    /// The plot.
    Svg,
}

/// A file to write, its kind by its ending.
#[derive(Clone, Debug)]
pub struct Output {
    pub kind: Kind,
    pub path: PathBuf,
}

impl Output {
    pub fn parse(name: &str) -> Result<Output, String> {
        let path = PathBuf::from(name);
        let kind = match path.extension().and_then(|e| e.to_str()) {
            Some("json") => Kind::Json,
            Some("md") => Kind::Markdown,
            Some("svg") => Kind::Svg,
            _ => return Err("name a .json, .md or .svg file".into()),
        };
        Ok(Output { kind, path })
    }
}

/// What came out, by the kind of task.
#[derive(serde::Serialize)]
#[serde(untagged)]
pub enum Outcome {
    Rows(Vec<Row>),
    Answers(Vec<Answer>),
}

impl Outcome {
    /// Quality against bytes read, one point a method, means over samples.
    pub fn plot(&self, task: Task) -> Result<String> {
        // (method, bytes, quality) of every sample.
        let samples: Vec<(&str, u64, f64)> = match self {
            Outcome::Rows(rows) => {
                let quality = |r: &Row| match task {
                    Task::Ppl => r.nll_difference.mean,
                    Task::Passkey => 100.0 * f64::from(u8::from(r.exact)),
                    _ => 100.0 * r.top1,
                };
                rows.iter().map(|r| (r.method.as_str(), r.kv_bytes, quality(r))).collect()
            }
            Outcome::Answers(all) => {
                all.iter().map(|a| (a.method.as_str(), a.kv_bytes, 100.0 * a.score)).collect()
            }
        };
        let methods = distinct(samples.iter().map(|s| s.0));
        let bytes = |method: &str| -> f64 {
            samples.iter().filter(|s| s.0 == method).map(|s| s.1 as f64).sum()
        };
        let all = bytes("dense").max(1.0);
        let points = methods.iter().map(|method| {
            let of: Vec<f64> = samples.iter().filter(|s| s.0 == *method).map(|s| s.2).collect();
            let Difference { mean: y, error } = Difference::of(&of);
            Point { name: (*method).to_string(), x: 100.0 * bytes(method) / all, y, error }
        });
        let quality = match task {
            Task::Ppl => "NLL difference to dense, nats",
            Task::Copy => "top-1, %",
            Task::Passkey => "found, %",
            Task::Ruler => "score, %",
        };
        let title = format!("{task:?}: quality against KV bytes read per token");
        frontier(&title, ["KV bytes read, % of dense", quality], &points.collect::<Vec<_>>())
    }
}

fn cells(task: Task, group: &str, method: &str, rows: &[&Row]) -> Vec<String> {
    let n = rows.len().max(1) as f64;
    let mean = |f: &dyn Fn(&Row) -> f64| rows.iter().map(|r| f(r)).sum::<f64>() / n;
    // Independent samples: variances add.
    let error = rows.iter().map(|r| r.nll_difference.error.powi(2)).sum::<f64>().sqrt() / n;
    let found = rows.iter().filter(|r| r.exact).count();
    let audited: Vec<f64> =
        rows.iter().filter(|r| !r.audit.is_empty()).map(|r| r.audit.recall()).collect();
    let recall = audited.iter().sum::<f64>() / audited.len().max(1) as f64;
    vec![
        group.to_string(),
        method.to_string(),
        format!("{:.4}", mean(&|r| r.nll)),
        format!("{:+.4} +- {error:.4}", mean(&|r| r.nll_difference.mean)),
        match task {
            Task::Passkey => format!("{found}/{}", rows.len()),
            _ => format!("{:.2} %", 100.0 * mean(&|r| r.top1)),
        },
        if audited.is_empty() { "-".into() } else { format!("{:.2} %", 100.0 * recall) },
        ui::bytes(mean(&|r| r.kv_bytes as f64) as u64),
    ]
}

/// One table of all samples, and one of all layers where it is asked for.
pub fn tables(task: Task, layers: bool, rows: &[Row]) -> Vec<Table> {
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
        let mut table = Table::new(&[
            "sample",
            "method",
            ">layer",
            ">mass kept",
            ">worst head",
            ">output error",
        ]);
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
        tables.push(table);
    }
    tables
}
