//! The README's table of ops by backend and dtype.
//!
//! The cpu and wgpu columns are what this run finds (a backend that is absent keeps what the table says), the cuda
//! columns are the newest `bench/runs/*-conformance.json`.

use super::readme;
use super::report::Row;
use serde::Deserialize;
use std::collections::HashMap;

const BACKENDS: [&str; 3] = ["cpu", "wgpu", "cuda"];
const DTYPES: [&str; 3] = ["f32", "f16", "bf16"];

/// How one case ended: `pass`, `unsupported` or `fail`.
#[derive(Clone, Debug, Deserialize)]
struct Case {
    backend: String,
    op: String,
    dtype: String,
    outcome: String,
}

/// What the table needs of a recorded run.
#[derive(Debug, Deserialize)]
struct Run {
    devices: Vec<Device>,
    results: Vec<Case>,
}

#[derive(Debug, Deserialize)]
struct Device {
    name: String,
    caps: Caps,
}

#[derive(Debug, Deserialize)]
struct Caps {
    device: String,
    driver: String,
}

/// `pass`, `fail`, `-` where nothing is supported, blank where there is no such case.
fn cell(cases: &[Case], op: &str, backend: &str, dtype: &str) -> String {
    let of = cases.iter().filter(|c| (&*c.backend, &*c.op, &*c.dtype) == (backend, op, dtype));
    let ends: Vec<&str> = of.map(|c| c.outcome.as_str()).collect();
    let passed = ends.iter().filter(|e| **e == "pass").count();
    match (ends.len(), passed) {
        (0, _) => String::new(),
        _ if ends.contains(&"fail") => "fail".into(),
        (n, p) if n == p => "pass".into(),
        (_, 0) => "-".into(),
        (n, p) => format!("pass ({p} of {n})"),
    }
}

/// Cells of a table by (op, `backend dtype`).
fn cells(table: &str) -> HashMap<(&str, &str), &str> {
    let lines = table.lines().filter(|l| l.starts_with('|'));
    let mut rows = lines.map(|l| l.split('|').skip(1).map(str::trim).collect::<Vec<_>>());
    let header = rows.next().unwrap_or_default();
    let mut all = HashMap::new();
    for row in rows {
        let op = row.first().copied().unwrap_or_default().trim_matches('`');
        all.extend(header.iter().zip(&row).skip(1).map(|(column, cell)| ((op, *column), *cell)));
    }
    all
}

fn table(here: &[Case], recorded: Option<&(String, Run)>, old: &str) -> String {
    let old = cells(old);
    let mut text = String::new();
    if let Some((name, run)) = recorded
        && let Some(d) = run.devices.iter().find(|d| d.name == "cuda")
    {
        let (device, driver) = (&d.caps.device, &d.caps.driver);
        text += &format!("`cuda`: [{device}, {driver}](bench/runs/{name})\n\n");
    }
    let mut ops: Vec<&str> = Vec::new();
    for case in here {
        if !ops.contains(&case.op.as_str()) {
            ops.push(&case.op);
        }
    }
    let columns: Vec<_> = BACKENDS.iter().flat_map(|b| DTYPES.map(|d| (*b, d))).collect();
    text += "| op |";
    columns.iter().for_each(|(b, d)| text += &format!(" {b} {d} |"));
    text += &format!("\n|---|{}\n", "---|".repeat(columns.len()));
    for op in ops {
        text += &format!("| `{op}` |");
        for (b, d) in &columns {
            let name = format!("{b} {d}");
            let cell = match recorded {
                Some((_, run)) if *b == "cuda" => cell(&run.results, op, b, d),
                _ if here.iter().any(|c| c.backend == *b) => cell(here, op, b, d),
                _ => old.get(&(op, name.as_str())).copied().unwrap_or_default().to_string(),
            };
            text += &format!(" {cell} |");
        }
        text += "\n";
    }
    text
}

fn of(rows: &[Row]) -> Vec<Case> {
    let one = |r: &Row| Case {
        backend: r.backend.clone(),
        op: r.op.into(),
        dtype: r.dtype.into(),
        outcome: r.end.name().into(),
    };
    rows.iter().map(one).collect()
}

/// Compares README.md with a complete run, or (`write`) writes the table into it. Without a README, as on a machine
/// that got this program only, there is nothing to compare.
pub fn check(rows: &[Row], write: bool) -> Result<(), String> {
    if !readme::file("README.md").exists() {
        return Ok(());
    }
    if write && !rows.iter().any(|r| r.backend == "wgpu") {
        return Err("no wgpu device here: its columns are written as well".into());
    }
    let cuda = |run: &Run| run.results.iter().any(|c| c.backend == "cuda");
    let recorded = readme::newest("-conformance.json", cuda)?;
    let render = |old: &str| table(&of(rows), recorded.as_ref(), old);
    let remedy = "run the whole test with LONGSIGHT_SUPPORT_TABLE=write";
    readme::table("support-table", render, write, remedy)
}

/// The table itself: the columns of this run, of the recorded one, and of a backend that is absent.
pub fn self_test() -> Result<(), String> {
    let case = |backend: &str, op: &str, dtype: &str, outcome: &str| Case {
        backend: backend.into(),
        op: op.into(),
        dtype: dtype.into(),
        outcome: outcome.into(),
    };
    let here = [
        case("cpu", "embed", "f32", "pass"),
        case("cpu", "embed", "f16", "pass"),
        case("cpu", "embed", "f16", "unsupported"),
        case("cpu", "top_k", "f32", "fail"),
        case("cpu", "top_k", "f32", "pass"),
        case("cuda", "embed", "f32", "fail"),
    ];
    let caps = Caps { device: "H1".into(), driver: "CUDA 1".into() };
    let run = Run {
        devices: vec![Device { name: "cuda".into(), caps }],
        results: vec![
            case("cuda", "embed", "f32", "pass"),
            case("cuda", "top_k", "f32", "unsupported"),
        ],
    };
    let header = "| op | cpu f32 | cpu f16 | cpu bf16 | wgpu f32 | wgpu f16 | wgpu bf16 | cuda f32 | cuda f16 | \
                  cuda bf16 |\n|---|---|---|---|---|---|---|---|---|---|\n";
    let old = format!("{header}| `embed` | fail |  |  | kept | too |  | old |  |  |\n");
    let want = format!(
        "`cuda`: [H1, CUDA 1](bench/runs/r.json)\n\n{header}\
         | `embed` | pass | pass (1 of 2) |  | kept | too |  | pass |  |  |\n\
         | `top_k` | fail |  |  |  |  |  | - |  |  |\n"
    );
    let new = table(&here, Some(&("r.json".into(), run)), &old);
    if new == want { Ok(()) } else { Err(format!("got\n{new}\ninstead of\n{want}")) }
}
