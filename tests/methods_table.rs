//! The README's table of methods by backend: a whole (tiny, random) model runs every method on every backend under
//! test, and its logits must be those of the float64 reference ops.
//!
//! cpu and wgpu are what this run finds; the cuda column is the newest `bench/runs/*-methods.json`.
//! Environment: `LONGSIGHT_REQUIRE=cpu,wgpu` names the backends; `LONGSIGHT_METHODS_TABLE=write` writes the table
//! into README.md instead of comparing; `LONGSIGHT_METHODS_JSON=path` writes the results of this run.

mod common;
#[allow(dead_code)]
#[path = "conformance/oracle.rs"]
mod oracle;

use common::cache::backends;
use common::model::{Model, dense, nmse, prompt, sparse};
use common::readme;
use longsight::backend::{Backend, DType};
use longsight::engine::WantLogits;
use longsight::select::{METHODS, MethodInfo, MethodSpec, Variant};
use oracle::{Fault, Oracle};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Tokens of the prompt, in chunks of which the last is ragged.
const PROMPT: usize = 150;
const CHUNK: usize = 64;
/// Decode steps: three refresh intervals of the dimensions chosen by the query.
const STEPS: usize = 13;
const UPDATE: u32 = 4;
/// Tokens attended to, sinks and recent ones (up to 68) among them.
const BUDGET: usize = 80;

/// One method on one backend in one dtype; errors are NMSE over all logits, to the reference ops in that dtype.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Row {
    method: String,
    backend: String,
    dtype: String,
    /// Logits of every prompt token.
    prefill: f64,
    /// Logits of every decode step.
    decode: f64,
    /// Decode steps of the method against those of dense attention, both by the reference.
    to_dense: f64,
    /// Of prefill.
    tolerance: f64,
    decode_tolerance: f64,
}

impl Row {
    fn ok(&self) -> bool {
        let sparse = self.method == "dense" || self.to_dense > 10.0 * self.decode_tolerance;
        // Written so that NaN is not ok.
        sparse && self.prefill <= self.tolerance && self.decode <= self.decode_tolerance
    }
}

/// Results of one run, with the devices that gave them.
#[derive(Debug, Serialize, Deserialize)]
struct Run {
    version: String,
    /// Older files have none.
    commit: Option<String>,
    devices: Vec<Device>,
    results: Vec<Row>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Device {
    backend: String,
    device: String,
    driver: String,
}

/// Largest NMSE of logits where nothing is selected: the f32 tolerance of one op, as in the conformance test; with
/// narrower storage that of one rounding to it, for keys and values that round the other way. Narrow activations
/// round in each of some twenty ops in a row.
fn tolerance(dtype: DType, activations_follow: bool) -> f64 {
    match (dtype, activations_follow) {
        (DType::F32, _) => 1e-10,
        (DType::F16, false) => 2e-7,
        (DType::F16, true) => 5e-6,
        (_, false) => 1.3e-5,
        (_, true) => 3e-4,
    }
}

/// The same for decode steps. After narrow activations a token at the edge of the budget may be swapped for its
/// neighbour: the reference ops themselves differ by up to 8e-3 between f32 and 16-bit activations. The methods
/// are at 0.2 and more from dense attention.
fn decode_tolerance(variant: Variant, dtype: DType, activations_follow: bool) -> f64 {
    let scores = !matches!(variant, Variant::Dense | Variant::Window | Variant::Random);
    // The same for components of the keys, which are computed and then stored in 16 bits (the other slices are copies):
    // on the cpu one of the 13 steps in f16 is 8e-4 off, the others 1e-9 and less.
    let narrow = activations_follow || variant == Variant::Loki;
    match scores && narrow && dtype != DType::F32 {
        true => 1.5e-2,
        false => tolerance(dtype, activations_follow),
    }
}

/// The method as it is by default, sized for the tiny model.
fn spec(variant: Variant) -> MethodSpec {
    let update = (variant == Variant::SparcasPaper).then_some(UPDATE);
    // The mean value brings SparQ closer to dense attention than 16-bit activations can tell apart.
    if matches!(variant, Variant::Omnikv | Variant::Lessismore | Variant::Sparq) {
        let (sinks, recent) = (Some(0), Some(1));
        return MethodSpec { sinks, recent, ..sparse(variant, BUDGET / 8) };
    }
    if matches!(variant, Variant::Kascade | Variant::KascadePooled | Variant::Refined) {
        // The first layer attends to everything: the others have to leave out more to be as far from dense.
        let (sinks, recent, candidates) = (Some(0), Some(1), Some(BUDGET));
        return MethodSpec { sinks, recent, candidates, ..sparse(variant, BUDGET / 8) };
    }
    MethodSpec { update, ..sparse(variant, BUDGET) }
}

/// Logits of all prompt tokens, and of all decode steps. The tokens are given: a rounding difference moves no
/// later step to another text.
fn logits(
    model: &Model,
    dev: &Arc<dyn Backend>,
    dtype: DType,
    spec: &MethodSpec,
) -> (Vec<f32>, Vec<f32>) {
    let builder = model.builder(dev, spec).dtype(dtype).chunk(CHUNK).sequences(1);
    let mut engine = builder.build().unwrap();
    let tokens = prompt(21, (PROMPT + STEPS) as u32);
    let seq = engine.open_sequence().unwrap();
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    let each = |_: usize, l: &[f32]| prefill.extend_from_slice(l);
    engine.prefill(seq, &tokens[..PROMPT], WantLogits::All, each, |_| true).unwrap();
    for &token in &tokens[PROMPT..] {
        decode.extend(engine.decode(seq, token).unwrap());
    }
    (prefill, decode)
}

/// Every method in every dtype on `devs`: in two layers, or in three where the one behind a filter stays dense; NOSA in
/// a model of its kind.
fn results(devs: &[Arc<dyn Backend>]) -> Vec<Row> {
    let deeper = |m: &&MethodInfo| m.variant == Variant::Omnikv;
    let (own, plain): (Vec<_>, Vec<_>) = METHODS.iter().partition(|m| m.variant == Variant::Nosa);
    let (three, two): (Vec<_>, Vec<_>) = plain.into_iter().partition(deeper);
    let mut rows = results_of(&Model::new(), &two, devs);
    rows.extend(results_of(&Model::deep(3), &three, devs));
    rows.extend(results_of(&Model::nosa(2), &own, devs));
    rows
}

fn results_of(model: &Model, methods: &[&MethodInfo], devs: &[Arc<dyn Backend>]) -> Vec<Row> {
    let mut rows = Vec::new();
    // Backends that keep activations in the same dtype share the reference.
    for follow in [false, true] {
        let devs: Vec<_> =
            devs.iter().filter(|d| d.caps().activations_follow_weights == follow).collect();
        if devs.is_empty() {
            continue;
        }
        let reference: Arc<dyn Backend> =
            Arc::new(Oracle::new(Fault::None, FLOATS.to_vec(), follow));
        for dtype in FLOATS {
            let exact = logits(model, &reference, dtype, &dense());
            for m in methods {
                let spec = spec(m.variant);
                let want = logits(model, &reference, dtype, &spec);
                for dev in devs.iter().filter(|d| d.caps().storage.contains(&dtype)) {
                    let got = logits(model, dev, dtype, &spec);
                    let row = Row {
                        method: m.name.into(),
                        backend: dev.name().into(),
                        dtype: dtype.name().into(),
                        prefill: nmse(&got.0, &want.0),
                        decode: nmse(&got.1, &want.1),
                        to_dense: nmse(&want.1, &exact.1),
                        tolerance: tolerance(dtype, follow),
                        decode_tolerance: decode_tolerance(m.variant, dtype, follow),
                    };
                    eprintln!("{row:?}");
                    rows.push(row);
                }
            }
        }
    }
    rows
}

/// `ok: prefill, decode in f32, f16` when every row of the method on the backend is.
fn cell(rows: &[Row], method: &str, backend: &str) -> String {
    let of: Vec<&Row> =
        rows.iter().filter(|r| r.method == method && r.backend == backend).collect();
    let names = |ok: bool| {
        let some: Vec<&str> =
            of.iter().filter(|r| r.ok() == ok).map(|r| r.dtype.as_str()).collect();
        some.join(", ")
    };
    match (of.is_empty(), of.iter().all(|r| r.ok())) {
        (true, _) => "not run".into(),
        (_, true) => format!("ok: prefill, decode in {}", names(true)),
        _ => format!("fail in {}", names(false)),
    }
}

/// The table, with `old` cells where this run has no such backend.
fn table(rows: &[Row], recorded: Option<&(String, Run)>, old: &str) -> String {
    let cuda: &[Row] = recorded.map_or(&[], |(_, run)| &run.results);
    let device = recorded.and_then(|(_, run)| run.devices.iter().find(|d| d.backend == "cuda"));
    let cuda_title = match (recorded, device) {
        (Some((name, _)), Some(d)) => {
            format!("cuda ([{}, {}](bench/runs/{name}))", d.device, d.driver)
        }
        _ => "cuda".into(),
    };
    let tested = |backend: &str| rows.iter().any(|r| r.backend == backend);
    let here = |method: &str, at: usize, backend: &str| {
        let line = old.lines().find(|l| l.starts_with(&format!("| `{method}` |")));
        // From the end: the second column may hold bars.
        match line.and_then(|l| l.rsplit('|').nth(at)).filter(|_| !tested(backend)) {
            Some(kept) => kept.trim().to_string(),
            None => cell(rows, method, backend),
        }
    };
    let mut text = format!("| method | what each decode step does | cpu | wgpu | {cuda_title} |\n");
    text += "|---|---|---|---|---|\n";
    for m in METHODS {
        let (cpu, wgpu) = (here(m.name, 3, "cpu"), here(m.name, 2, "wgpu"));
        let cuda = cell(cuda, m.name, "cuda");
        // A bar inside a cell would start another one.
        let about = m.about.replace('|', "\\|");
        text += &format!("| `{}` | {about} | {cpu} | {wgpu} | {cuda} |\n", m.name);
    }
    text
}

#[test]
fn every_method_agrees_with_the_reference_and_the_readme_says_so() {
    let devs = backends();
    let rows = results(&devs);
    if let Ok(path) = std::env::var("LONGSIGHT_METHODS_JSON") {
        let devices = devs.iter().map(|d| Device {
            backend: d.name().into(),
            device: d.caps().device.clone(),
            driver: d.caps().driver.clone(),
        });
        let run = Run {
            version: env!("CARGO_PKG_VERSION").into(),
            commit: std::env::var("LONGSIGHT_COMMIT").ok(),
            devices: devices.collect(),
            results: rows.clone(),
        };
        std::fs::write(&path, format!("{:#}\n", serde_json::to_value(&run).unwrap()))
            .unwrap_or_else(|e| panic!("LONGSIGHT_METHODS_JSON: cannot write {path}: {e}"));
    }
    let failed: Vec<&Row> = rows.iter().filter(|r| !r.ok()).collect();
    assert!(failed.is_empty(), "{failed:#?}");

    let write = std::env::var("LONGSIGHT_METHODS_TABLE").is_ok_and(|v| v == "write");
    let wgpu = rows.iter().any(|r| r.backend == "wgpu");
    assert!(wgpu || !write, "add wgpu to LONGSIGHT_REQUIRE: its column is written as well");
    let recorded = readme::newest("-methods.json", |_: &Run| true).unwrap();
    let render = |old: &str| table(&rows, recorded.as_ref(), old);
    let remedy = "run this test with LONGSIGHT_METHODS_TABLE=write";
    let said = readme::table("methods-table", render, write, remedy);
    assert!(said.is_ok(), "{}", said.unwrap_err());
}
