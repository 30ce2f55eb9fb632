//! What `longsight eval` shows and writes.

use crate::cli::plot::{Panel, Point, page};
use crate::cli::table::{Table, distinct};
use crate::eval::Difference;
use anyhow::Result;
use std::path::PathBuf;

/// What a file holds.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Everything.
    Json,
    /// The tables.
    Markdown,
    /// The plots.
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

/// Results of an evaluation.
pub struct Report {
    /// Name of the evaluation.
    pub task: &'static str,
    /// What its JSON holds beside what all evaluations say.
    pub json: Vec<(&'static str, serde_json::Value)>,
    pub tables: Vec<Table>,
    /// Lines below the tables.
    pub note: String,
    pub panels: Vec<Panel>,
}

impl Report {
    /// The tables, each as `show` makes it, and the note.
    pub fn text(&self, show: impl Fn(&Table) -> String) -> String {
        self.tables.iter().map(show).collect::<String>() + &self.note
    }

    pub fn plot(&self) -> Result<String> {
        page(&self.panels)
    }
}

/// Quality of one sample under one method.
pub struct Quality<'a> {
    pub method: &'a str,
    pub kv_bytes: u64,
    pub value: f64,
}

/// Quality against bytes read, one point a method, means over samples.
pub fn frontier(task: &str, axis: &'static str, samples: &[Quality<'_>]) -> Panel {
    let methods = distinct(samples.iter().map(|s| s.method));
    let bytes = |method: &str| -> f64 {
        samples.iter().filter(|s| s.method == method).map(|s| s.kv_bytes as f64).sum()
    };
    let all = bytes("dense").max(1.0);
    let points = methods.iter().map(|method| {
        let of: Vec<f64> =
            samples.iter().filter(|s| s.method == *method).map(|s| s.value).collect();
        let Difference { mean: y, error } = Difference::of(&of);
        let error = error.unwrap_or(0.0);
        Point { name: (*method).to_string(), x: 100.0 * bytes(method) / all, y, error }
    });
    Panel::Points {
        title: format!("{task}: quality against KV bytes read per token"),
        axes: ["KV bytes read, % of dense", axis],
        points: points.collect(),
    }
}

/// Mean of audited recalls in percent.
pub fn mass_kept<'a>(audits: impl Iterator<Item = &'a crate::engine::AuditSummary>) -> String {
    let recalls: Vec<f64> = audits.filter(|a| !a.is_empty()).map(|a| a.recall()).collect();
    match recalls.len() {
        0 => "-".into(),
        n => format!("{:.2} %", 100.0 * recalls.iter().sum::<f64>() / n as f64),
    }
}
