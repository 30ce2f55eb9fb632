//! What all evaluations share: options, the engine with every method's plan, and the report.

use super::report::{Kind, Output, Report};
use crate::cli::args::{AUDIT_EVERY, Format, ModelArgs, at_least_one, check_plans, read_plans};
use crate::cli::forecast_args::ForecastArgs;
use crate::cli::interrupt::{EXIT_CODE, Interrupt};
use crate::cli::lists::{different_texts, once, path, short_names};
use crate::cli::output::{OutputFile, Written};
use crate::cli::progress::Bar;
use crate::cli::sweep::{Sweep, method_name};
use crate::cli::{texts, ui};
use crate::engine::{Engine, EngineError};
use crate::eval::SampleError;
use crate::model::{Checkpoint, Tokenizer};
use crate::select::{MethodSpec, Plan};
use anyhow::{Result, bail};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

const CTX: &str = "Most tokens of a sequence [default: those of the longest sample]";

/// Which methods run where, and where the results go.
#[derive(Args)]
#[command(mut_arg("ctx", |a| a.help(CTX)))]
pub struct Common {
    /// Methods, comma separated, with options after colons (sparcas:dims=16:budget=256); dense always runs.
    /// For a table over options of all methods, give those lists: --budget 128,256 --dims 16,32
    #[arg(
        long,
        value_name = "METHODS",
        value_delimiter = ',',
        value_parser = method_name,
        default_value = "sparcas,sparcas-int8"
    )]
    methods: Vec<String>,
    /// Plan files to run beside the methods, comma separated (see `longsight plan --save`)
    #[arg(long, value_name = "FILES", value_delimiter = ',', value_parser = path())]
    plan: Vec<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Write to a file, by its ending: .json everything, .md the tables, .svg plots; may be given several times
    #[arg(short, long, value_name = "FILE", value_parser = Output::parse)]
    output: Vec<Output>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    forecast: ForecastArgs,
    /// Options for all methods; --dense-below is 0 here unless given
    #[command(flatten)]
    options: Sweep,
}

/// Texts and lengths.
#[derive(Args)]
pub struct TextArgs {
    /// Text to use; may be given several times: ppl, copy and recall read each for itself, passkey hides its key in the
    /// first, the other evaluations in all of them together
    #[arg(long, value_name = "FILE", required = true)]
    pub text: Vec<PathBuf>,
    /// Lengths in tokens, comma separated; question and answer are part of them
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "4096", value_parser = at_least_one)]
    pub lengths: Vec<usize>,
}

impl TextArgs {
    /// The texts, each of which is there once, as are the lengths.
    pub fn read(&self) -> Result<Vec<String>> {
        once("--lengths", &self.lengths)?;
        let contents: Vec<String> =
            self.text.iter().map(|path| texts::read(path)).collect::<Result<_>>()?;
        different_texts(&self.text, &contents)?;
        Ok(contents)
    }

    /// Name and token ids of each text.
    pub fn encoded(&self, tokenizer: &Tokenizer) -> Result<Vec<(String, Vec<u32>)>> {
        let contents = self.read()?;
        let names = short_names(&self.text, true);
        let texts = names.into_iter().zip(&contents);
        texts.map(|(name, text)| Ok((name, tokenizer.encode(text, false)?))).collect()
    }
}

/// Measuring selections on the way.
#[derive(Args)]
pub struct AuditArgs {
    /// Measure attention mass and output error of every sparse layer in the first decode step of each sample and method
    /// and in every N-th after it; 0 = never
    #[arg(long, value_name = "N", default_value_t = AUDIT_EVERY)]
    audit: usize,
}

impl AuditArgs {
    pub fn every(&self) -> Option<usize> {
        (self.audit > 0).then_some(self.audit)
    }

    /// A line below tables with a column of mass kept: what it holds, and why it may be empty.
    pub fn legend(&self) -> String {
        match self.every() {
            Some(n) => format!(
                "Mass kept: attention mass on the chosen tokens in the first decode step of a sample and each {n} steps \
                 later; - where these attended to all tokens.\n"
            ),
            None => "Mass kept was not measured (--audit 0).\n".into(),
        }
    }
}

/// Opened files, before the samples are known.
pub struct Setup<'a> {
    common: &'a Common,
    interrupt: Interrupt,
    specs: Vec<(String, MethodSpec)>,
    files: Vec<(String, Plan)>,
    outputs: Vec<(Kind, OutputFile)>,
    pub checkpoint: Checkpoint,
    pub tokenizer: Tokenizer,
}

impl<'a> Setup<'a> {
    /// Reads the options and opens the model's files.
    pub fn new(common: &'a Common) -> Result<Setup<'a>> {
        let interrupt = Interrupt::install();
        let mut specs = common.options.specs(&common.methods)?;
        for (_, spec) in &mut specs {
            // Below the default threshold nothing would be sparse, and nothing measured.
            spec.dense_below.get_or_insert(0);
        }
        let files = read_plans(&common.plan)?;
        let names: Vec<&str> =
            specs.iter().map(|s| &*s.0).chain(files.iter().map(|f| &*f.0)).collect();
        once("--methods and --plan together", &names)?;
        common.forecast.read_by_one_of(&specs, &files)?;
        let outputs = common.output.iter().map(|o| Ok((o.kind, OutputFile::create(&o.path)?)));
        let outputs = outputs.collect::<Result<_>>()?;
        let (checkpoint, tokenizer) = common.model.open()?;
        check_plans(&files, &checkpoint)?;
        Ok(Setup { common, interrupt, specs, files, outputs, checkpoint, tokenizer })
    }

    /// Refuses samples longer than what the model was trained for, which the option `by` sets.
    ///
    /// # Errors
    /// Such samples.
    fn fits(&self, longest: usize, by: &str) -> Result<()> {
        let most = self.checkpoint.config().max_context;
        if longest > most {
            bail!(
                "a sample of {longest} tokens: this model was trained for {most}; give less {by}"
            );
        }
        Ok(())
    }

    /// Samples of `texts`; where those are too short for what the model could not read anyway, that is the error.
    ///
    /// # Errors
    /// That of the samples, or [`Setup::fits`].
    pub fn samples<T>(&self, texts: &TextArgs, made: Result<T>) -> Result<T> {
        made.map_err(|e| match e.downcast_ref() {
            Some(SampleError::TextTooShort { .. }) => {
                let longest = texts.lengths.iter().copied().max().unwrap_or(0);
                self.fits(longest, "--lengths").err().unwrap_or(e)
            }
            _ => e,
        })
    }

    /// Builds the engine for sequences of up to `longest` tokens, which the option `by` sets.
    pub fn bench(self, longest: usize, by: &str) -> Result<Bench<'a>> {
        self.fits(longest, by)?;
        let Setup { common, interrupt, specs, files, outputs, checkpoint, tokenizer } = self;
        let kinds: Vec<MethodSpec> = specs.iter().map(|s| s.1.clone()).collect();
        let context = common.model.size.ctx.unwrap_or(longest);
        if longest > context {
            bail!(
                "a sample of {longest} tokens: --ctx {context} does not hold it; leave --ctx out, or give less {by}"
            );
        }
        // Sequences share the prompt's pages, the second adds what it decodes; unless a plan reads the prompt for itself.
        let own = kinds.iter().any(|k| k.tile.is_some_and(|t| t > 0))
            || files.iter().any(|f| f.1.reads_prompts_sparsely());
        let second = if own { context } else { longest / 4 };
        let engine = common
            .forecast
            .set(common.model.builder())
            .checkpoint(checkpoint)
            .tokenizer(tokenizer)
            .context(context)
            .method("dense".parse()?)
            .summaries_for(&kinds)
            .summaries_for_plans(&files.iter().map(|f| f.1.clone()).collect::<Vec<_>>())
            .sequences(2)
            .kv_tokens(context + second + 1024)
            .build()?;
        ui::notes(&engine);
        let shape = engine.decoder().config().plan_shape(engine.fingerprint());
        let mut plans = specs
            .iter()
            .map(|(name, spec)| Ok((name.clone(), spec.plan(&shape, context)?)))
            .collect::<Result<Vec<_>>>()?;
        plans.extend(files.iter().cloned());
        for (name, plan) in plans.iter().filter(|(_, p)| p.method != "dense") {
            if let Some(why) = plan.all_dense(longest) {
                ui::note(format!(
                    "note: {name} chooses nothing in these samples of at most {longest} tokens ({by}): {why}"
                ));
            }
        }
        Ok(Bench { common, interrupt, specs, files, outputs, engine, plans })
    }
}

/// Says how far a measurement is (done, all); answers whether to go on.
pub type On<'a> = dyn FnMut(u64, u64) -> bool + 'a;

/// An engine and the plans that run on it.
pub struct Bench<'a> {
    common: &'a Common,
    interrupt: Interrupt,
    specs: Vec<(String, MethodSpec)>,
    files: Vec<(String, Plan)>,
    outputs: Vec<(Kind, OutputFile)>,
    engine: Engine,
    pub plans: Vec<(String, Plan)>,
}

impl Bench<'_> {
    /// Runs `f`, which adds the rows of every finished sample, with a bar; then writes and prints the report of the rows
    /// that are there. An error or Ctrl-C in a later sample loses none of them.
    pub fn report<T>(
        mut self,
        f: impl FnOnce(
            &mut Engine,
            &[(String, Plan)],
            &mut On<'_>,
            &mut Vec<T>,
        ) -> Result<(), EngineError>,
        report: impl FnOnce(&[T]) -> Result<Report>,
    ) -> Result<ExitCode> {
        let mut rows = Vec::new();
        let bar = Bar::new("evaluating", "tokens");
        let cancel = self.interrupt.arm();
        let mut on = |done, all| bar.go_on(&cancel, done, all);
        let outcome = f(&mut self.engine, &self.plans, &mut on, &mut rows);
        bar.end();
        let ended = outcome.err();
        match ended {
            Some(EngineError::Interrupted) if rows.is_empty() => {
                ui::note("interrupted before a sample was finished; nothing was written");
                return Ok(ExitCode::from(EXIT_CODE));
            }
            Some(e) if rows.is_empty() => return Err(e.into()),
            _ => {}
        }
        let mut report = report(&rows)?;
        report.note += &ui::bounds(self.plans.iter().map(|(name, plan)| (&**name, plan)));
        if let Some(why) = &ended {
            let why = format!("{why}: only the samples that were finished are here");
            report.note += &format!("Not complete: {why}.\n");
            report.json.push(("incomplete", why.into()));
        }
        self.finish(&report)?;
        match ended {
            None => Ok(ExitCode::SUCCESS),
            Some(EngineError::Interrupted) => Ok(ExitCode::from(EXIT_CODE)),
            Some(e) => Err(e.into()),
        }
    }

    /// Writes and prints the report.
    fn finish(self, report: &Report) -> Result<()> {
        let json = self.json(report);
        let mut written = Vec::new();
        for (kind, file) in self.outputs {
            let contents = match kind {
                Kind::Json => serde_json::to_string(&json)?,
                Kind::Markdown => report.text(|t| t.markdown() + "\n"),
                Kind::Svg => report.plot()?,
            };
            written.push(file.finish(contents.as_bytes())?);
        }
        match self.common.format {
            Format::Json => ui::print(&(serde_json::to_string_pretty(&json)? + "\n"))?,
            Format::Table => ui::print(&report.text(|t| format!("{t}\n")))?,
        }
        written.iter().for_each(Written::tell);
        Ok(())
    }

    fn json(&self, report: &Report) -> serde_json::Value {
        let engine = &self.engine;
        let mut json = serde_json::json!({
            "task": report.task,
            "model": engine.decoder().config().name,
            "fingerprint": engine.fingerprint(),
            "dtype": engine.cache().shape().dtype,
            "environment": crate::bench::Environment::of(engine.backend()),
            "methods": self.specs.iter().map(|(name, options)| {
                serde_json::json!({ "method": name, "options": options })
            }).collect::<Vec<_>>(),
            "plans": self.files.iter().map(|(name, plan)| {
                serde_json::json!({ "method": name, "plan": plan })
            }).collect::<Vec<_>>(),
        });
        for (key, value) in &report.json {
            json[*key] = value.clone();
        }
        json
    }
}
