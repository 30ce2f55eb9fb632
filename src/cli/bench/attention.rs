//! `longsight bench attention`.

use super::{On, ReportArgs, opened, origin, percent, refuse_wrong, slow, with_bar};
use crate::backend::{Backend, DType};
use crate::bench::Environment;
use crate::bench::attention::{
    AttentionBench, AttentionReport, AttentionRow, PromptBench, PromptReport, PromptRow, Subject,
};
use crate::bench::kernels::Check;
use crate::cli::args::{at_least_one, read_plans};
use crate::cli::lists::{item, path};
use crate::cli::sweep::{Sweep, method_name};
use crate::cli::table::Table;
use crate::cli::ui;
use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

/// What `--help` says of it.
pub const ABOUT: &str = "\
Times the attention of all layers of a decode step without the rest of the model: scoring, selection and \
attention of every method beside dense attention, as the mean layer. Keys and values are random, in mixed pages; \
layers take turns with a few KV pools, so that a batch of long sequences fits one GPU and caches do not help. \
One sequence and KV head of the last layer is compared with f64 attention over the tokens that it chose; a wrong \
one ends the command with an error.

With -p the same of whole prompts, read chunk by chunk as the engine reads them: what goes into the cache, \
selection and attention, as the mean layer of a prompt. The last layer is checked at a few rows of the last \
chunk. Methods choose for prompts where they have a tile (--tile: so many rows share a choice). One more reading, \
in which the device waits in between, tells the parts, for each role that a layer may have:
  dense          attends to every token
  dense anchor   does so too, and chooses for the layers that reuse its choice
  anchor         attends to its own choice, which others reuse
  reuse          attends to an anchor's choice
  select         attends to its own choice, which nobody reuses
append is what goes into the cache, dense and listed are attention to every and to the chosen tokens; an anchor \
takes the softmax that it scores with from a dense pass. sparda gets random Forecasts; their projection (of heads \
x head dimension numbers, the hidden size of many models) is measured as forecast.

The default shape is Llama 3.1 8B.";

const EXAMPLES: &str = "\
A decode step at 131,072 tokens:
  longsight bench attention -D 131072 -b 1,32 --budget 2048
Prompts, 10 % of each tile's own length:
  longsight bench attention -p 8192,32768,131072 -o prompts.json
Blocks chosen by every query head, and by Forecasts:
  longsight bench attention -p 32768 --methods infllm2,sparda --tile 1";

/// Methods where none are named.
const DECODE: [&str; 2] = ["sparcas", "kascade"];
const PROMPTS: [&str; 1] = ["kascade:tile=32"];

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct AttentionArgs {
    /// auto, cpu, wgpu, wgpu:<part of an adapter's name>, cuda, cuda:<number>
    #[arg(short, long, default_value = "auto")]
    device: String,
    /// Cached tokens of every sequence
    #[arg(short = 'D', long, default_value_t = 32768, value_name = "TOKENS")]
    depth: usize,
    /// Prompt lengths to read, instead of decode steps
    #[arg(
        short,
        long,
        value_delimiter = ',',
        value_parser = item::<usize>,
        value_name = "TOKENS,...",
        conflicts_with_all = ["depth", "steps"]
    )]
    prompt: Vec<usize>,
    /// Prompt tokens of a sequence per step [default: 4096 on CUDA, else 512]
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one, requires = "prompt")]
    chunk: Option<usize>,
    /// Times that every prompt is read
    #[arg(short, long, default_value_t = 3, value_name = "N", requires = "prompt")]
    repeats: usize,
    /// Sequences of a step [default: 1,8; with -p 1]
    #[arg(short, long, value_delimiter = ',', value_parser = item::<usize>, value_name = "N,...")]
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
    /// `longsight run --help` lists them [default: sparcas,kascade; with -p kascade:tile=32]
    #[arg(long, value_delimiter = ',', value_parser = method_name, value_name = "METHOD,...")]
    methods: Vec<String>,
    /// Plan files to measure beside the methods (see `longsight plan --save`)
    #[arg(long, value_delimiter = ',', value_parser = path(), value_name = "FILE,...")]
    plan: Vec<PathBuf>,
    /// Decode steps that are timed
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

/// What was asked for, or what stands in its place.
fn or<T: Clone>(given: &[T], default: Vec<T>) -> Vec<T> {
    if given.is_empty() { default } else { given.to_vec() }
}

pub fn run(a: AttentionArgs) -> Result<ExitCode> {
    let decodes = a.prompt.is_empty();
    let names = if decodes { &DECODE[..] } else { &PROMPTS[..] };
    let of = Subject {
        batches: or(&a.batch, if decodes { vec![1, 8] } else { vec![1] }),
        layers: a.layers,
        heads: a.heads,
        kv_heads: a.kv_heads,
        head_dim: a.head_dim,
        dtype: a.dtype,
        methods: a.method.specs(&or(&a.methods, names.iter().map(|m| m.to_string()).collect()))?,
        plans: read_plans(&a.plan)?,
        seed: a.seed,
    };
    if decodes {
        let bench = AttentionBench { of, depth: a.depth, steps: a.steps };
        bench.validate()?;
        let seconds = read_per_token(&bench.of) * (bench.depth * bench.steps) as f64 / READ;
        let work = format!("{} decode steps at {} tokens", bench.steps, bench.depth);
        return measure(&a.device, &a.report, (seconds, &work), |b, on| Ok(bench.run(b, on)?));
    }
    let bench = PromptBench { of, prompts: a.prompt, chunk: a.chunk, repeats: a.repeats };
    bench.validate()?;
    // A row reads half of the prompt on average; one reading more tells the parts.
    let rows: f64 = bench.prompts.iter().map(|&n| n as f64 * n as f64 / 2.0).sum();
    let readings = (bench.repeats + 1) as f64;
    let seconds = read_per_token(&bench.of) * rows * readings / PROMPT_READ;
    measure(&a.device, &a.report, (seconds, "prompts of these lengths"), |b, on| {
        Ok(bench.run(b, on)?)
    })
}

/// Bytes of the cache that two cores go through in a second: in decode steps, and in prompts, whose rows share them.
const READ: f64 = 6e9;
const PROMPT_READ: f64 = 2e10;

/// Bytes that dense attention of all layers and batches reads of one cached token.
fn read_per_token(of: &Subject) -> f64 {
    let token = 2 * of.kv_heads * of.head_dim * of.dtype.bytes();
    (token * of.layers * of.batches.iter().sum::<usize>()) as f64
}

/// What both kinds of report have.
trait Measured: Serialize {
    fn environment(&self) -> &Environment;
    fn notes(&self) -> &[String];
    /// What every row is, and what its check has found.
    fn checks(&self) -> Vec<(String, &Check)>;
    fn table(&self) -> String;
}

/// Measures `work` of at least so many seconds on the device and reports; an error where nothing could be measured or something was wrong.
fn measure<R: Measured>(
    device: &str,
    report: &ReportArgs,
    (seconds, work): (f64, &str),
    bench: impl FnOnce(&dyn Backend, &mut On<'_>) -> Result<R>,
) -> Result<ExitCode> {
    let file = report.file()?;
    let device = opened(device)?;
    let less = "a smaller -D or -p, -b 1, fewer --layers or --steps";
    slow(device.caps(), seconds, work, less).iter().for_each(ui::note);
    let (found, code) = with_bar(|on| bench(&*device, on))?;
    let checks = found.checks();
    if checks.is_empty() && code != ExitCode::SUCCESS {
        ui::note("interrupted before a measurement was finished; nothing was written");
        return Ok(code);
    }
    let table = || {
        let notes = found.notes().iter().map(|note| format!("note: {note}\n"));
        found.table() + &notes.collect::<String>()
    };
    report.finish(file, &found, table)?;
    if checks.is_empty() {
        bail!("nothing was measured: {}", found.notes().join("; "));
    }
    let wrong = checks.iter().filter(|(_, c)| !c.passed);
    let wrong: Vec<_> = wrong.map(|(of, c)| format!("{of}: NMSE {:.2e}", c.value)).collect();
    refuse_wrong(found.environment(), &wrong)?;
    Ok(code)
}

fn checked(c: &Check) -> String {
    format!("NMSE {:.1e} {}", c.value, if c.passed { "ok" } else { "WRONG" })
}

fn times(x: Option<f64>) -> String {
    x.map_or_else(|| "-".into(), |x| format!("{x:.2}"))
}

/// The model in words.
fn shape(s: &Subject) -> String {
    format!(
        "{} heads over {} KV heads, head dimension {}, KV in {}",
        s.heads, s.kv_heads, s.head_dim, s.dtype
    )
}

impl Measured for AttentionReport {
    fn environment(&self) -> &Environment {
        &self.environment
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn checks(&self) -> Vec<(String, &Check)> {
        let of = |r: &AttentionRow| format!("{} at batch {}", r.method, r.batch);
        self.rows.iter().map(|r| (of(r), &r.check)).collect()
    }

    fn table(&self) -> String {
        let mut t = Table::new(&[
            "method", ">batch", ">bytes", ">mean ms", ">sd", ">x dense", ">GB/s", ">of read",
            "check",
        ]);
        for row in &self.rows {
            t.row([
                row.method.clone(),
                row.batch.to_string(),
                ui::bytes(row.bytes),
                format!("{:.4}", row.ms.mean),
                row.ms.sd.map_or_else(|| "-".into(), |sd| format!("{sd:.4}")),
                times(row.x_dense),
                format!("{:.1}", row.gb_s),
                percent(row.share),
                checked(&row.check),
            ]);
        }
        let s = &self.settings;
        format!(
            "{}\nmean of {} layers at {} tokens, {}; device read {:.1} GB/s in this run\n\n{t}{}",
            origin(&self.environment),
            s.of.layers,
            ui::thousands(s.depth as u64),
            shape(&s.of),
            self.bandwidth_gb_s.device_read,
            ui::bounds(self.rows.iter().map(|r| (&*r.method, &r.plan)))
        )
    }
}

impl Measured for PromptReport {
    fn environment(&self) -> &Environment {
        &self.environment
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn checks(&self) -> Vec<(String, &Check)> {
        let of = |r: &PromptRow| format!("{} at {} tokens, batch {}", r.method, r.prompt, r.batch);
        self.rows.iter().map(|r| (of(r), &r.check)).collect()
    }

    fn table(&self) -> String {
        let mut t = Table::new(&[
            "method", ">prompt", ">batch", ">chunk", ">mean ms", ">sd", ">x dense", ">TFLOP/s",
            ">buffers", "check",
        ]);
        let mut parts = Table::new(&[
            "method",
            ">prompt",
            ">batch",
            "role",
            ">layers",
            ">ms",
            ">append",
            ">forecast",
            ">dense",
            ">select",
            ">listed",
            ">select + attend",
        ]);
        let ms = |x: f64| format!("{x:.3}");
        for row in &self.rows {
            let of = [row.method.clone(), ui::thousands(row.prompt as u64), row.batch.to_string()];
            let line = [
                ui::thousands(row.chunk as u64),
                ms(row.ms.mean),
                row.ms.sd.map_or_else(|| "-".into(), ms),
                times(row.x_dense),
                row.tflop_s.map_or_else(|| "-".into(), |f| format!("{f:.1}")),
                row.taken_bytes.map_or_else(|| "-".into(), ui::bytes),
                checked(&row.check),
            ];
            t.row(of.iter().cloned().chain(line));
            for role in &row.roles {
                let p = &role.ms;
                let line = [
                    role.role.to_owned(),
                    role.layers.len().to_string(),
                    ms(p.total()),
                    ms(p.append),
                    ms(p.forecast),
                    ms(p.dense),
                    ms(p.select),
                    ms(p.listed),
                    ms(p.attention()),
                ];
                parts.row(of.iter().cloned().chain(line));
            }
        }
        let s = &self.settings;
        format!(
            "{}\nmean of {} layers over a prompt, {}; times read: {}\n\n{t}\nthe mean layer of each role, from one more \
             reading in which the device waits between the parts\n\n{parts}",
            origin(&self.environment),
            s.of.layers,
            shape(&s.of),
            s.repeats
        )
    }
}
