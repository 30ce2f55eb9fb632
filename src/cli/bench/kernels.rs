//! `longsight bench kernels`.

use super::{ReportArgs, opened, origin, percent, refuse_wrong, with_bar};
use crate::backend::DType;
use crate::bench::kernels::{KernelBench, KernelReport};
use crate::cli::lists::item;
use crate::cli::table::Table;
use crate::cli::ui;
use anyhow::Result;
use clap::Args;
use std::process::ExitCode;

/// What `--help` says of it.
pub const ABOUT: &str = "\
Times one layer's decode ops at one shape and says how many bytes a second of what they must move they reach, as \
a share of the device-read bandwidth measured first. Inputs are random, in pages of random order, and launches \
take turns over several of them so that caches do not help. One sequence and KV head of every result is compared \
with an f64 reference; a wrong one ends the command with an error. Shapes that do not fit are skipped with a \
note.

The default shape is one layer of Llama 3.1 8B at 32,768 tokens; batch 64 needs 9 GB of device memory.";

#[derive(Args)]
pub struct KernelArgs {
    /// auto, cpu, wgpu, wgpu:<part of an adapter's name>, cuda, cuda:<number>
    #[arg(short, long, default_value = "auto")]
    device: String,
    /// Cached tokens of every sequence
    #[arg(short = 'D', long, default_value_t = 32768, value_name = "TOKENS")]
    depth: usize,
    /// Sequences decoded together
    #[arg(short, long, value_delimiter = ',', value_parser = item::<usize>, default_value = "1,8,64", value_name = "N,...")]
    batch: Vec<usize>,
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
    /// Key dimensions that score_dims reads
    #[arg(long, default_value_t = 32)]
    dims: usize,
    /// Leading key dimensions stored in front of a page [default: --dims, as for sorted keys]
    #[arg(long, value_name = "DIMS")]
    lead: Option<usize>,
    /// Percent of the tokens that attend_rows reads and top_k picks
    #[arg(long, value_delimiter = ',', value_parser = item::<f64>, default_value = "1,10", value_name = "PERCENT,...")]
    share: Vec<f64>,
    /// Samples of every op
    #[arg(short, long, default_value_t = 20, value_name = "N")]
    repeats: usize,
    /// Seed of the random inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    report: ReportArgs,
}

pub fn run(a: KernelArgs) -> Result<ExitCode> {
    let bench = KernelBench {
        depth: a.depth,
        batches: a.batch,
        heads: a.heads,
        kv_heads: a.kv_heads,
        head_dim: a.head_dim,
        dtype: a.dtype,
        dims: a.dims,
        lead: a.lead.unwrap_or(a.dims),
        shares: a.share.iter().map(|p| p / 100.0).collect(),
        repeats: a.repeats,
        seed: a.seed,
    };
    bench.validate()?;
    let file = a.report.file()?;
    let device = opened(&a.device)?;
    let (report, code) = with_bar(|on| Ok(bench.run(&*device, on)?))?;
    a.report.finish(file, &report, || table(&report))?;
    let wrong: Vec<String> = report
        .failures()
        .map(|r| {
            let c = &r.check;
            format!(
                "{} {} at batch {}: {} {:.2e}, at most {:.0e} is right",
                r.op, r.variant, r.batch, c.metric, c.value, c.limit
            )
        })
        .collect();
    refuse_wrong(&report.environment, &wrong)?;
    Ok(code)
}

fn table(r: &KernelReport) -> String {
    let mut t = Table::new(&[
        "op",
        "variant",
        ">batch",
        ">splits",
        ">bytes",
        ">median ms",
        ">sd",
        ">GB/s",
        ">of read",
        "check",
    ]);
    for row in &r.rows {
        let c = &row.check;
        let found = match c.metric {
            "nmse" => format!("NMSE {:.1e}", c.value),
            other => format!("{} {other}", c.value),
        };
        t.row([
            row.op.to_owned(),
            row.variant.clone(),
            row.batch.to_string(),
            row.splits.map_or_else(|| "-".into(), |s| s.to_string()),
            ui::bytes(row.bytes),
            format!("{:.4}", row.ms.median),
            row.ms.sd.map_or_else(|| "-".into(), |sd| format!("{sd:.4}")),
            format!("{:.1}", row.gb_s),
            percent(row.share),
            format!("{found} {}", if c.passed { "ok" } else { "WRONG" }),
        ]);
    }
    let s = &r.settings;
    let mut text = format!(
        "{}\n{} tokens, {} heads over {} KV heads, head dimension {}, KV in {}; device read {:.1} GB/s in this run\n\n{t}",
        origin(&r.environment),
        ui::thousands(s.depth as u64),
        s.heads,
        s.kv_heads,
        s.head_dim,
        s.dtype,
        r.bandwidth_gb_s.device_read
    );
    if r.cached().next().is_some() {
        let ops: Vec<String> = r
            .cached()
            .map(|c| format!("{} {} x{} {}", c.op, c.variant, c.batch, ui::bytes(c.rotated_bytes)))
            .collect();
        text +=
            &format!("note: caches may have helped where inputs are small: {}\n", ops.join(", "));
    }
    for s in &r.skipped {
        text += &format!("skipped: {} {} at batch {}: {}\n", s.op, s.variant, s.batch, s.why);
    }
    text
}
