//! `longsight bench attention`.

use super::{ReportArgs, opened, origin, percent, refuse_wrong, with_bar};
use crate::backend::DType;
use crate::bench::attention::{AttentionBench, AttentionReport};
use crate::cli::args::read_plans;
use crate::cli::sweep::Sweep;
use crate::cli::table::Table;
use crate::cli::ui;
use anyhow::{Result, bail};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// What `--help` says of it.
pub const ABOUT: &str = "\
Times the attention of all layers of a decode step without the rest of the model: scoring, selection and \
attention of every method beside dense attention, as the mean layer. Keys and values are random, in mixed pages; \
layers take turns with a few KV pools, so that a batch of long sequences fits one GPU and caches do not help. \
One sequence and KV head of the last layer is compared with f64 attention over the tokens that it chose; a wrong \
one ends the command with an error.

The default shape is Llama 3.1 8B.";

#[derive(Args)]
pub struct AttentionArgs {
    /// auto, cpu, wgpu, wgpu:<part of an adapter's name>, cuda, cuda:<number>
    #[arg(short, long, default_value = "auto")]
    device: String,
    /// Cached tokens of every sequence
    #[arg(short = 'D', long, default_value_t = 32768, value_name = "TOKENS")]
    depth: usize,
    /// Sequences decoded together
    #[arg(short, long, value_delimiter = ',', default_value = "1,8", value_name = "N,...")]
    batch: Vec<usize>,
    /// Layers of the model
    #[arg(long, default_value_t = 32)]
    layers: usize,
    /// Query heads
    #[arg(long, default_value_t = 32)]
    heads: usize,
    /// KV heads
    #[arg(long, default_value_t = 8)]
    kv_heads: usize,
    /// Dimensions of a head
    #[arg(long, default_value_t = 128)]
    head_dim: usize,
    /// Dtype of the KV cache: f32, f16 or bf16
    #[arg(long, default_value = "bf16", value_name = "DTYPE")]
    dtype: DType,
    /// Methods to compare with dense attention, comma separated, with options after colons (sparcas:dims=16);
    /// `longsight run --help` lists them
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "sparcas,kascade",
        value_name = "METHOD,..."
    )]
    methods: Vec<String>,
    /// Plan files to measure beside the methods (see `longsight plan --save`)
    #[arg(long, value_delimiter = ',', value_name = "FILE,...")]
    plan: Vec<PathBuf>,
    /// Steps that are timed
    #[arg(long, default_value_t = 64, value_name = "N")]
    steps: usize,
    /// Seed of the random inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    report: ReportArgs,
    #[command(flatten)]
    method: Sweep,
}

pub fn run(a: AttentionArgs) -> Result<ExitCode> {
    let bench = AttentionBench {
        depth: a.depth,
        batches: a.batch,
        layers: a.layers,
        heads: a.heads,
        kv_heads: a.kv_heads,
        head_dim: a.head_dim,
        dtype: a.dtype,
        methods: a.method.specs(&a.methods)?,
        plans: read_plans(&a.plan)?,
        steps: a.steps,
        seed: a.seed,
    };
    bench.validate()?;
    let file = a.report.file()?;
    let device = opened(&a.device)?;
    let report = with_bar(|on| bench.run(&*device, on))?;
    a.report.finish(file, &report, || table(&report))?;
    if report.rows.is_empty() {
        bail!("nothing was measured: {}", report.notes.join("; "));
    }
    let wrong: Vec<String> = report
        .failures()
        .map(|r| format!("{} at batch {}: NMSE {:.2e}", r.method, r.batch, r.check.value))
        .collect();
    refuse_wrong(&report.environment, &wrong)?;
    Ok(ExitCode::SUCCESS)
}

fn table(r: &AttentionReport) -> String {
    let mut t = Table::new(&[
        "method", ">batch", ">bytes", ">mean ms", ">sd", ">x dense", ">GB/s", ">of read", "check",
    ]);
    for row in &r.rows {
        let c = &row.check;
        t.row([
            row.method.clone(),
            row.batch.to_string(),
            ui::bytes(row.bytes),
            format!("{:.4}", row.ms.mean),
            format!("{:.4}", row.ms.sd),
            row.x_dense.map_or_else(|| "-".into(), |x| format!("{x:.2}")),
            format!("{:.1}", row.gb_s),
            percent(row.share),
            format!("NMSE {:.1e} {}", c.value, if c.passed { "ok" } else { "WRONG" }),
        ]);
    }
    let s = &r.settings;
    let mut text = format!(
        "{}\nmean of {} layers at {} tokens, {} heads over {} KV heads, head dimension {}, KV in {}; device read {:.1} GB/s \
         in this run\n\n{t}",
        origin(&r.environment),
        s.layers,
        ui::thousands(s.depth as u64),
        s.heads,
        s.kv_heads,
        s.head_dim,
        s.dtype,
        r.bandwidth_gb_s.device_read
    );
    for note in &r.notes {
        text += &format!("note: {note}\n");
    }
    text
}
