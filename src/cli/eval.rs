//! `longsight eval`: what sparsity costs in quality.

use super::args::{Format, ModelArgs, read_plans};
use super::eval_report::{Kind, Outcome, Output, tables};
use super::interrupt::{EXIT_CODE, Interrupt};
use super::output::OutputFile;
use super::ruler::{self, RulerArgs};
use super::sweep::Sweep;
use super::{texts, ui};
use crate::engine::EngineError;
use crate::eval::{
    DEPTHS, Sample, continuation, copy, evaluate, key_sequence, passkey, solve, start_of_text,
};
use crate::model::Tokenizer;
use crate::select::MethodSpec;
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;

/// What is predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Task {
    /// Prose: the last tokens of a text (a weak test: dense context barely matters)
    Ppl,
    /// A text given twice: every token must be found half the length back (the strong test)
    Copy,
    /// Five digits hidden in prose, at several depths
    Passkey,
    /// The thirteen tasks of RULER on generated texts: needles, variable tracking, word counts, questions
    Ruler,
}

#[derive(Args)]
pub struct EvalArgs {
    /// What is predicted
    #[arg(value_enum)]
    task: Task,
    /// Text to use; may be given several times (passkey takes its filler from the first)
    #[arg(long, value_name = "FILE", required = true)]
    pub text: Vec<PathBuf>,
    /// Lengths in tokens, comma separated
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "4096")]
    pub lengths: Vec<usize>,
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
    /// Write to a file, by its ending: .json everything, .md the table, .svg a plot of quality against bytes read;
    /// may be given several times
    #[arg(short, long, value_name = "FILE", value_parser = Output::parse)]
    output: Vec<Output>,
    #[command(flatten)]
    pub ruler: RulerArgs,
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
    let outputs = a.output.iter().map(|o| Ok((o.kind, OutputFile::create(&o.path)?)));
    let outputs = outputs.collect::<Result<Vec<_>>>()?;
    let (checkpoint, tokenizer) = a.model.open()?;
    let (samples, problems) = match a.task {
        Task::Ruler => (Vec::new(), ruler::problems(&a, &checkpoint, &tokenizer)?),
        _ => (samples(&a, &tokenizer)?, Vec::new()),
    };
    let lengths = samples.iter().map(|s| s.tokens.len());
    let longest = lengths.chain(problems.iter().map(|p| p.tokens.len() + p.answer_tokens));
    let longest = longest.max().unwrap_or(1);
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
    ui::notes(&engine);
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
    let progress = |done, all| ui::go_on(&bar, &cancel, done, all);
    let audit = (a.audit > 0).then_some(a.audit);
    let outcome = match a.task {
        Task::Ruler => {
            solve(&mut engine, &problems, &plans, progress, |_| ()).map(Outcome::Answers)
        }
        _ => evaluate(&mut engine, &samples, &plans, audit, progress, |_| ()).map(Outcome::Rows),
    };
    let outcome = match outcome {
        Ok(outcome) => outcome,
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
        "rows": outcome,
    });
    let (tables, note) = match &outcome {
        Outcome::Rows(rows) => (tables(a.task, a.layers, rows), ""),
        Outcome::Answers(answers) => (vec![ruler::table(answers)], ruler::NOTE),
    };
    for (kind, file) in outputs {
        let contents = match kind {
            Kind::Json => serde_json::to_string(&report)?,
            Kind::Markdown => tables.iter().map(|t| t.markdown() + "\n").collect::<String>() + note,
            Kind::Svg => outcome.plot(a.task)?,
        };
        file.finish(contents.as_bytes())?;
    }
    match a.format {
        Format::Json => ui::print(&(serde_json::to_string_pretty(&report)? + "\n"))?,
        Format::Table => {
            let tables: String = tables.iter().map(|t| format!("{t}\n")).collect();
            ui::print(&(tables + note))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn samples(a: &EvalArgs, tokenizer: &Tokenizer) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let start = start_of_text(tokenizer)?;
    for path in &a.text {
        let ids = tokenizer.encode(&texts::read(path)?, false)?;
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
                Task::Ruler => {}
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
