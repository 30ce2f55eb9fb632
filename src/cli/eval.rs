//! `longsight eval`: what sparsity costs in quality.

use super::args::{Format, ModelArgs, read_plans};
use super::interrupt::{EXIT_CODE, Interrupt};
use super::output::OutputFile;
use super::sweep::Sweep;
use super::table::Table;
use super::ui;
use crate::engine::EngineError;
use crate::eval::{
    DEPTHS, Row, Sample, continuation, copy, evaluate, key_sequence, passkey, start_of_text,
};
use crate::model::Tokenizer;
use crate::select::MethodSpec;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// What is predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Task {
    /// Prose: the last tokens of a text (a weak test: dense context barely matters)
    Ppl,
    /// A text given twice: every token must be found half the length back (the strong test)
    Copy,
    /// Five digits hidden in prose, at several depths
    Passkey,
}

#[derive(Args)]
pub struct EvalArgs {
    /// What is predicted
    #[arg(value_enum)]
    task: Task,
    /// Text to use; may be given several times (passkey takes its filler from the first)
    #[arg(long, value_name = "FILE", required = true)]
    text: Vec<PathBuf>,
    /// Lengths in tokens, comma separated
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "4096")]
    lengths: Vec<usize>,
    /// Methods, comma separated, with options after colons (sparcas:dims=16:budget=256); dense always runs.
    /// For a table over options of all methods, give those lists: --budget 128,256 --dims 16,32
    #[arg(
        long,
        value_name = "METHODS",
        value_delimiter = ',',
        default_value = "sparcas,sparcas-int8"
    )]
    methods: Vec<String>,
    /// Plan files to run beside the methods, comma separated (see `longsight plan --save`)
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    plan: Vec<PathBuf>,
    /// Predicted tokens of each text (ppl and copy)
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    score: usize,
    /// Measure attention mass and output error of every sparse layer in every N-th step; 0 = never
    #[arg(long, value_name = "N", default_value_t = 32)]
    audit: usize,
    /// Print recall per layer as well
    #[arg(long)]
    layers: bool,
    /// How to print
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Write everything as JSON
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    /// Options for all methods; --dense-below is 0 here unless given
    #[command(flatten)]
    options: Sweep,
}

pub fn eval(a: EvalArgs) -> Result<ExitCode> {
    let interrupt = Interrupt::install();
    let mut specs = a.options.specs(&a.methods)?;
    for (_, spec) in &mut specs {
        // Below the default threshold nothing would be sparse, and nothing measured.
        spec.dense_below.get_or_insert(0);
    }
    let files = read_plans(&a.plan)?;
    let output = a.output.as_deref().map(OutputFile::create).transpose()?;
    let (checkpoint, tokenizer) = a.model.open()?;
    let samples = samples(&a, &tokenizer)?;
    let longest = samples.iter().map(|s| s.tokens.len()).max().unwrap_or(1);
    let kinds: Vec<MethodSpec> = specs.iter().map(|s| s.1.clone()).collect();
    let context = a.model.size.ctx.unwrap_or(longest);
    let mut engine = a
        .model
        .builder()
        .checkpoint(checkpoint)
        .tokenizer(tokenizer)
        .context(context)
        .method("dense".parse()?)
        .summaries_for(&kinds)
        .summaries_for_plans(&files.iter().map(|f| f.1.clone()).collect::<Vec<_>>())
        .sequences(2)
        // Both sequences share the prompt's pages; the second adds what it decodes.
        .kv_tokens(context + longest.min(context) / 4 + 1024)
        .build()?;
    for note in engine.notes() {
        ui::note(format!("note: {note}"));
    }
    let c = engine.decoder().config().clone();
    let mut plans = specs
        .iter()
        .map(|(name, spec)| {
            let plan = spec.plan(&c.plan_shape(engine.fingerprint()), context)?;
            Ok((name.clone(), plan))
        })
        .collect::<Result<Vec<_>>>()?;
    plans.extend(files.iter().cloned());
    let bar = ui::bar("evaluating", "tokens", 0);
    let cancel = interrupt.arm();
    let progress = |done, all| {
        bar.set_length(all);
        bar.set_position(done);
        !cancel.load(Ordering::Relaxed)
    };
    let audit = (a.audit > 0).then_some(a.audit);
    let rows = match evaluate(&mut engine, &samples, &plans, audit, progress, |_| ()) {
        Ok(rows) => rows,
        Err(EngineError::Interrupted) => {
            bar.finish_and_clear();
            ui::note("interrupted; nothing was written");
            return Ok(ExitCode::from(EXIT_CODE));
        }
        Err(e) => return Err(e.into()),
    };
    bar.finish_and_clear();
    let report = serde_json::json!({
        "task": format!("{:?}", a.task).to_lowercase(),
        "model": c.name,
        "fingerprint": engine.fingerprint(),
        "dtype": engine.cache().shape().dtype,
        "environment": crate::bench::Environment::of(engine.backend()),
        "methods": specs.iter().map(|(name, options)| {
            serde_json::json!({ "method": name, "options": options })
        }).collect::<Vec<_>>(),
        "plans": files.iter().map(|(name, plan)| {
            serde_json::json!({ "method": name, "plan": plan })
        }).collect::<Vec<_>>(),
        "rows": rows,
    });
    if let Some(file) = output {
        file.finish(&serde_json::to_vec(&report)?)?;
    }
    match a.format {
        Format::Json => ui::print(&(serde_json::to_string_pretty(&report)? + "\n"))?,
        Format::Table => ui::print(&tables(&a, &rows))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn samples(a: &EvalArgs, tokenizer: &Tokenizer) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let start = start_of_text(tokenizer)?;
    for path in &a.text {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the text {}", path.display()))?;
        let ids = tokenizer.encode(&text, false)?;
        let name = path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned());
        let mut keys = key_sequence();
        for &n in &a.lengths {
            match a.task {
                Task::Ppl => samples.push(continuation(&name, &start, &ids, n, a.score)?),
                Task::Copy => samples.push(copy(&name, &start, &ids, n, a.score)?),
                Task::Passkey => {
                    for (tenths, key) in DEPTHS.into_iter().zip(keys.by_ref()) {
                        samples.push(passkey(tokenizer, &name, &ids, n, tenths, key)?);
                    }
                }
            }
        }
        if a.task == Task::Passkey {
            break;
        }
    }
    if samples.is_empty() {
        bail!("nothing to evaluate; give --text and --lengths");
    }
    Ok(samples)
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

fn tables(a: &EvalArgs, rows: &[Row]) -> String {
    let hits = if a.task == Task::Passkey { ">found" } else { ">top-1" };
    let columns = ["sample", "method", ">NLL", ">to dense", hits, ">mass kept", ">KV read/token"];
    let mut table = Table::new(&columns);
    // A pass key's depths of one length belong together.
    let group = |r: &Row| match a.task {
        Task::Passkey => r.sample.split(' ').next().unwrap_or_default().to_string(),
        _ => r.sample.clone(),
    };
    let mut groups: Vec<String> = Vec::new();
    let mut methods: Vec<&str> = Vec::new();
    for r in rows {
        if !groups.contains(&group(r)) {
            groups.push(group(r));
        }
        if !methods.contains(&r.method.as_str()) {
            methods.push(&r.method);
        }
    }
    let several = groups.len() > 1;
    for g in groups.iter().map(Some).chain(several.then_some(None)) {
        for m in &methods {
            let of: Vec<&Row> = rows
                .iter()
                .filter(|r| r.method == **m && g.is_none_or(|g| group(r) == *g))
                .collect();
            table.row(cells(a.task, g.map_or("mean", String::as_str), m, &of));
        }
    }
    let mut text = format!("{table}\n");
    if a.layers {
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
        text += &format!("{table}\n");
    }
    text
}
