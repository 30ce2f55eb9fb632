//! Options shared by commands.

use super::hint::bad_plan;
use super::lists::{once, short_names};
use super::progress::build_progress;
use super::ui;
use crate::backend::DType;
use crate::engine::{AuditConfig, Engine, EngineBuilder, Progress, Sampling};
use crate::model::{Checkpoint, Tokenizer};
use crate::select::{Plan, Variant};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use std::io::Read;
use std::path::{Path, PathBuf};

/// The model where none is named.
pub const DEFAULT_MODEL: &str = "smollm2";

/// Which model, and what it takes in memory.
#[derive(Args, Clone, Debug)]
pub struct SizeArgs {
    /// Model folder, .gguf file, hub id (org/name or org/name:file.gguf), `smollm2` (fetched once), `tiny`
    /// (built in, for tests), or random weights for timing: random:llama-3.1-8b, random:qwen3-8b,
    /// random:minicpm4.1-8b, random:nosa-8b, random:smollm2-135m
    #[arg(short, long, default_value = DEFAULT_MODEL, value_name = "MODEL")]
    pub model: String,
    /// Dtype of the weights on the device: f32, f16 or bf16 [default: bf16 for bf16 checkpoints and on
    /// CUDA, else f16]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<DType>,
    /// Dtype of the KV cache [default: that of the weights]
    #[arg(long, value_name = "DTYPE")]
    pub kv_dtype: Option<DType>,
    /// Most tokens of a sequence [default: the model's limit]
    #[arg(long, value_name = "TOKENS")]
    pub ctx: Option<usize>,
}

/// Which model runs where.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    #[command(flatten)]
    pub size: SizeArgs,
    /// auto, cpu, wgpu, wgpu:<part of an adapter's name>, cuda, cuda:<number>
    #[arg(short, long, default_value = "auto")]
    pub device: String,
    /// Prompt tokens per step [default: 4096 on CUDA, else 512]
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one)]
    pub chunk: Option<usize>,
}

/// A number from 1 on.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    text.trim()
        .parse()
        .ok()
        .filter(|&n| n > 0)
        .ok_or_else(|| "give a whole number from 1 on".into())
}

/// A temperature.
fn temperature(text: &str) -> Result<f32, String> {
    let t = text.parse().ok().filter(|t: &f32| t.is_finite() && *t >= 0.0);
    t.ok_or_else(|| "give 0 (the most likely token) or a number above it, such as 0.7".into())
}

/// From 0 to 1.
fn probability(text: &str) -> Result<f32, String> {
    let p = text.parse().ok().filter(|p| (0.0..=1.0).contains(p));
    p.ok_or_else(|| "give a number from 0 to 1".into())
}

/// The empty text is in every answer, so it cannot end one.
fn some_text(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("give some text".into()) } else { Ok(text.into()) }
}

impl SizeArgs {
    /// Opens the model's files without loading weights, fetching them first where needed.
    ///
    /// # Errors
    /// A model that cannot be found, fetched or read.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let progress = std::cell::RefCell::new(build_progress());
        Ok(Checkpoint::named(&self.model, &|done, all| {
            (progress.borrow_mut())(Progress::Fetch(done, all));
        })?)
    }
}

impl ModelArgs {
    /// The opened files and their tokenizer, for [`EngineBuilder::checkpoint`] and [`EngineBuilder::tokenizer`].
    ///
    /// # Errors
    /// As [`SizeArgs::checkpoint`].
    pub fn open(&self) -> Result<(Checkpoint, Tokenizer)> {
        let checkpoint = self.size.checkpoint()?;
        let tokenizer = Tokenizer::for_checkpoint(&checkpoint)?;
        Ok((checkpoint, tokenizer))
    }

    /// An engine that reads one text of `context` tokens densely; what it says while it is built is shown.
    ///
    /// # Errors
    /// Any [`EngineError`](crate::engine::EngineError).
    pub fn reader(
        &self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        context: usize,
    ) -> Result<Engine> {
        let builder = self.builder().checkpoint(checkpoint).tokenizer(tokenizer);
        let engine = builder.context(context).method(Variant::Dense.into()).build()?;
        ui::notes(&engine);
        Ok(engine)
    }

    /// A builder with these options and progress bars.
    pub fn builder(&self) -> EngineBuilder<'static> {
        Engine::builder()
            .model(&self.size.model)
            .device(&self.device)
            .dtype(self.size.dtype)
            .kv_dtype(self.size.kv_dtype)
            .context(self.size.ctx)
            .chunk(self.chunk)
            .on_progress(build_progress())
    }
}

/// Reads a plan file.
///
/// # Errors
/// A file that cannot be read, is too large for a plan, or is none.
pub fn read_plan(path: &Path) -> Result<Plan> {
    serde_json::from_slice(&read_file(path, "the plan")?).with_context(|| {
        format!(
            "{} is not a plan, or a damaged one; `longsight plan --save` writes one",
            path.display()
        )
    })
}

/// In front of an error about a plan: the file that holds it.
#[derive(Debug)]
pub struct PlanFile(String);

impl std::fmt::Display for PlanFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// `e`, with the file's name in front where it says that a plan does not fit.
pub fn about_plan(file: impl std::fmt::Display, e: impl Into<anyhow::Error>) -> anyhow::Error {
    let e = e.into();
    match bad_plan(&e) {
        Some(_) => e.context(PlanFile(file.to_string())),
        None => e,
    }
}

/// Refuses plans of files that do not fit the model, before its weights are loaded.
///
/// # Errors
/// The first of them.
pub fn check_plans(files: &[(String, Plan)], checkpoint: &Checkpoint) -> Result<()> {
    let print = checkpoint.fingerprint();
    let shape = checkpoint.config().plan_shape(&print);
    files.iter().try_for_each(|(file, p)| p.check(&shape).map_err(|e| about_plan(file, e)))
}

/// Reads plan files; each is called after its file.
///
/// # Errors
/// As [`read_plan`]; a file that is named twice.
pub fn read_plans(paths: &[PathBuf]) -> Result<Vec<(String, Plan)>> {
    once("--plan", &paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>())?;
    let names = short_names(paths, false);
    names.into_iter().zip(paths).map(|(name, p)| Ok((name, read_plan(p)?))).collect()
}

/// Reads a small file; `what` names it in errors.
///
/// # Errors
/// A file that cannot be read or is larger than any plan (a plan has some hundred bytes a layer).
pub fn read_file(path: &Path, what: &str) -> Result<Vec<u8>> {
    const MOST: u64 = 16 << 20;
    let cannot = || format!("cannot read {what} {}", path.display());
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).with_context(cannot)?;
    file.take(MOST + 1).read_to_end(&mut bytes).with_context(cannot)?;
    if bytes.len() as u64 > MOST {
        bail!("{} has more than {MOST} bytes, too many for {what}", path.display());
    }
    Ok(bytes)
}

/// Decode steps from one audit to the next where nothing else is asked for.
pub const AUDIT_EVERY: usize = 32;

/// How an answer is drawn and shown.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Answer")]
pub struct AnswerArgs {
    /// Longest answer in tokens
    #[arg(short = 'n', long, default_value_t = 256, value_name = "TOKENS", value_parser = at_least_one)]
    pub max_tokens: usize,
    /// Temperature; 0 takes the most likely token
    #[arg(long, default_value_t = 0.0, value_parser = temperature)]
    pub temp: f32,
    /// Draw from the K most likely tokens; 0 = all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Draw from the fewest tokens that hold this probability
    #[arg(long, default_value_t = 1.0, value_name = "P", value_parser = probability)]
    pub top_p: f32,
    /// Leave out tokens less likely than this share of the most likely one
    #[arg(long, default_value_t = 0.0, value_name = "P", value_parser = probability)]
    pub min_p: f32,
    /// Seed of the random numbers
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Text that ends the answer; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = some_text)]
    pub stop: Vec<String>,
    /// Every N steps, measure the attention mass and output error of the selection [default: 0, never]
    #[arg(long, value_name = "N")]
    pub audit: Option<usize>,
    /// Double the budget whenever the selection kept less attention mass than this share in an audited step (every
    /// 32nd, unless --audit says)
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub min_recall: Option<f32>,
}

/// More than 0, at most 1.
fn share(s: &str) -> Result<f32, String> {
    match s.parse() {
        Ok(x) if x > 0.0 && x <= 1.0 => Ok(x),
        _ => Err("a share of the attention mass: more than 0, at most 1".into()),
    }
}

impl AnswerArgs {
    /// Sampling settings.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
        }
    }

    /// Audit settings.
    pub fn audit(&self) -> Option<AuditConfig> {
        let every = self.audit.filter(|&n| n > 0).or(self.min_recall.map(|_| AUDIT_EVERY))?;
        Some(AuditConfig { every, min_recall: self.min_recall })
    }
}

/// Output of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns.
    Table,
    /// One JSON document.
    Json,
}
