//! `longsight train-forecast`: trains the matrices that predict the next layer's blocks.

use super::args::{Format, ModelArgs};
use super::interrupt::{EXIT_CODE, Interrupt};
use super::output::{OutputFile, Written};
use super::progress::Bar;
use super::table::Table;
use super::texts::{encoded, fits, state_of};
use super::ui;
use crate::calibrate::{CalibrateError, pieces};
use crate::engine::EngineError;
use crate::eval::start_of_text;
use crate::forecast::{
    AdamW, Decay, Forecast, Grid, LayerRecall, Schedule, Scores, Start, StepReport, Teacher,
    TrainSettings, held_out, train,
};
use crate::select::parse_name;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::cell::Cell;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

const CTX: &str = "Most tokens of a sequence [default: --tokens]";

#[derive(Args)]
#[command(mut_arg("ctx", |a| a.help(CTX)))]
pub struct TrainForecastArgs {
    /// Text to learn from; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    text: Vec<PathBuf>,
    /// Steps in all; an interrupted run goes on, and a finished one with more steps
    #[arg(long, default_value_t = 200, value_name = "N")]
    steps: usize,
    /// Tokens of a piece of text
    #[arg(long, default_value_t = 4096, value_name = "TOKENS")]
    tokens: usize,
    /// Pieces that are learned from, in turn
    #[arg(long, default_value_t = 8, value_name = "N")]
    pieces: usize,
    /// Further pieces that only the final table is measured on
    #[arg(long, default_value_t = 1, value_name = "N")]
    held_out: usize,
    /// Pieces of one step
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch: usize,
    /// Learn from every N-th query only
    #[arg(long, default_value_t = 1, value_name = "N")]
    every: usize,
    /// Step size
    #[arg(long, default_value_t = AdamW::default().rate, value_name = "RATE")]
    rate: f32,
    /// First steps, in which the step size grows from 0
    #[arg(long, default_value_t = 0, value_name = "N")]
    warmup: usize,
    /// The step size after that: constant (as published) or cosine (falls towards 0; such a run ends after --steps)
    #[arg(long, default_value = "constant", value_parser = parse_name::<Decay>, value_name = "SCHEDULE")]
    schedule: Decay,
    /// Memory for texts that were read and compared: each is read once where all fit, else in each of its steps.
    /// A piece takes about 4 bytes x hidden size x layers x queries learned from
    #[arg(long, default_value_t = 8, value_name = "GIB")]
    memory: u64,
    /// What is learned from: fine (as published) or plain
    #[arg(long, default_value = "fine", value_parser = parse_name::<Teacher>, value_name = "TEACHER")]
    teacher: Teacher,
    /// What matrices are before: queries (the next layer's mean query projection) or uniform (as published)
    #[arg(long, default_value = "queries", value_parser = parse_name::<Start>, value_name = "START")]
    start: Start,
    /// Seed of --start uniform
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Blocks read in all
    #[arg(long, default_value_t = Grid::default().budget, value_name = "BLOCKS")]
    blocks: usize,
    /// First blocks that are always read
    #[arg(long, default_value_t = Grid::default().init, value_name = "BLOCKS")]
    init_blocks: usize,
    /// Blocks before the newest that are always read
    #[arg(long, default_value_t = Grid::default().local, value_name = "BLOCKS")]
    local_blocks: usize,
    /// Steps between two saves of the run
    #[arg(long, default_value_t = 20, value_name = "N")]
    save_every: usize,
    /// How to print the final table
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Where the matrices go (safetensors); the run is kept beside it (FILE.state)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

/// Queries of held-out text that are compared: every n-th.
const COMPARED: usize = 8;

pub fn train_forecast(a: TrainForecastArgs) -> Result<ExitCode> {
    let interrupt = Interrupt::install();
    OutputFile::create(&a.output)?;
    if a.held_out == 0 || a.pieces == 0 {
        bail!("give at least one piece to learn from and one to measure on");
    }
    let grid =
        Grid { budget: a.blocks, init: a.init_blocks, local: a.local_blocks, ..Grid::default() };
    let (least, most) = (grid.least(), grid.most(a.tokens));
    grid.check().with_context(|| {
        let fits = format!("with --tokens {} --blocks can be {least} to {most}", a.tokens);
        let short = format!("for --blocks {least} a piece needs longer --tokens than {}", a.tokens);
        let bounds = if least <= most { fits } else { short };
        format!("--blocks, --init-blocks and --local-blocks ({bounds})")
    })?;
    grid.chooses_in(a.tokens)?;
    let state = state_of(&a.output);
    let (checkpoint, tokenizer) = a.model.open()?;
    fits(a.tokens, &checkpoint)?;
    let start = start_of_text(&tokenizer)?;
    let all = a.pieces.saturating_add(a.held_out);
    let mut texts = pieces(&encoded(&a.text, &tokenizer)?, &start, a.tokens, all)?;
    let unseen = texts.split_off(a.pieces);
    let context = a.model.size.ctx.unwrap_or(a.tokens);
    let mut engine = a.model.reader(checkpoint, tokenizer, context)?;
    let settings = TrainSettings {
        grid,
        teacher: a.teacher,
        start: a.start,
        schedule: Schedule {
            warmup: a.warmup,
            decay: a.schedule,
            // A run whose step size does not depend on its end may be prolonged.
            steps: if a.schedule == Decay::Cosine { a.steps } else { 0 },
        },
        memory: a.memory.saturating_mul(1 << 30),
        optimizer: AdamW { rate: a.rate, ..AdamW::default() },
        batch: a.batch,
        every: a.every,
        seed: a.seed,
        save_every: a.save_every,
        ..TrainSettings::of(&engine, &texts)
    };
    let bar = Bar::new("training", "steps");
    let cancel = interrupt.arm();
    let go_on = || !cancel.load(Ordering::Relaxed);
    let ran = Cell::new(false);
    let each = |r: StepReport| {
        ran.set(true);
        bar.at(r.step as u64, a.steps as u64);
        let line = format!("step {}  loss {:.4}  recall {:.2} %", r.step, r.loss, 100.0 * r.recall);
        if r.step.is_multiple_of(10) || r.step == a.steps || r.step == 1 {
            bar.line(&line);
        }
    };
    let trained = train(&mut engine, &texts, a.steps, &settings, Some(&state), each, &go_on);
    bar.end();
    let interrupted =
        |e: &CalibrateError| matches!(e, CalibrateError::Engine(EngineError::Interrupted));
    let (forecast, losses) = match trained {
        Err(e) if interrupted(&e) => {
            ui::note(format!("interrupted; the same command goes on ({})", state.display()));
            return Ok(ExitCode::from(EXIT_CODE));
        }
        other => other?,
    };
    if !ran.get() {
        let (has, state) = (losses.len(), state.display());
        ui::note(format!(
            "{state} has {has} steps already; none was added, ask for more with --steps"
        ));
    }
    let about = [
        ("grid", serde_json::to_string(&settings.grid)?),
        ("steps", losses.len().to_string()),
        ("texts", settings.texts.clone()),
        ("settings", serde_json::to_string(&settings)?),
    ];
    forecast.save(&a.output, engine.decoder().config(), &settings.model, &about)?;
    ui::note("measuring on held-out text");
    let before = Forecast::new(engine.checkpoint(), a.start, a.seed)?;
    let (grid, matrices) = (settings.grid, (&forecast, &before));
    let found = held_out(&mut engine, &unseen, matrices, grid, a.teacher, COMPARED, &go_on);
    let layers = match found {
        Err(e) if interrupted(&e) => {
            ui::note(format!("interrupted; {} is written", a.output.display()));
            return Ok(ExitCode::from(EXIT_CODE));
        }
        other => other?,
    };
    match a.format {
        Format::Table => ui::print(&table(&layers))?,
        Format::Json => {
            let report = serde_json::json!({
                "model": engine.decoder().config().name,
                "settings": settings,
                "losses": losses,
                "layers": layers,
            });
            ui::print(&(serde_json::to_string_pretty(&report)? + "\n"))?;
        }
    }
    let method = match engine.decoder().config().importance {
        Some(_) => "--method nosa --query forecast --forecast",
        None => "--method sparda --forecast",
    };
    Written::at(&a.output).tell_use(&a.model.size.model, method);
    Ok(ExitCode::SUCCESS)
}

type Way = fn(&LayerRecall) -> Scores;

fn table(layers: &[LayerRecall]) -> String {
    const NAMES: [&str; 8] = [
        ">layer",
        ">forecast",
        ">untrained",
        ">lookahead",
        ">own query",
        ">previous",
        ">random",
        ">teacher",
    ];
    let ways: [Way; 7] = [
        |l| l.forecast,
        |l| l.untrained,
        |l| l.lookahead,
        |l| l.own_query,
        |l| l.previous,
        |l| l.random,
        |l| l.teacher,
    ];
    let measured: Vec<&LayerRecall> = layers.iter().filter(|l| l.samples > 0).collect();
    let table = |title: &str, of: fn(Scores) -> f64| {
        let mut t = Table::new(&NAMES).titled(title);
        let share = |x: f64| format!("{:.1} %", 100.0 * x);
        for l in &measured {
            let shares = ways.iter().map(|way| share(of(way(l))));
            t.row(std::iter::once(l.layer.to_string()).chain(shares));
        }
        let n = measured.len().max(1) as f64;
        let mean = |way: &Way| share(measured.iter().map(|l| of(way(l))).sum::<f64>() / n);
        t.row(std::iter::once("mean".to_string()).chain(ways.iter().map(mean)));
        t
    };
    let recall =
        table("recall of the teacher's free picks (lookahead: with all heads)", |s| s.recall);
    format!("{recall}\n{}", table("attention mass on all blocks read", |s| s.mass))
}
