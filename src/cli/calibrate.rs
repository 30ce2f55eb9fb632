//! `longsight calibrate`: which layers reuse the token lists of which.

use super::args::{Format, ModelArgs, at_least_one};
use super::interrupt::{EXIT_CODE, Interrupt};
use super::output::{OutputFile, Written};
use super::progress::Bar;
use super::table::Table;
use super::texts::{encoded, fits, state_of};
use super::ui;
use crate::calibrate::{
    CalibrateError, Calibration, Choice, Objective, OwnTile, Settings, gather, pieces,
};
use crate::engine::EngineError;
use crate::eval::start_of_text;
use crate::select::{MethodSpec, parse_name};
use anyhow::{Result, bail, ensure};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

const CTX: &str = "Tokens that the plan is made for, at most [default: the model's limit]";

/// 0 to 1.
fn part(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(x) if (0.0..=1.0).contains(&x) => Ok(x),
        _ => Err("a share from 0 to 1".into()),
    }
}

#[derive(Args)]
#[command(mut_arg("ctx", |a| a.help(CTX)))]
pub struct CalibrateArgs {
    /// Text to read; may be given several times [default: a built-in text of about 5,000 tokens, enough for a trial]
    #[arg(long, value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Pieces of text that are read
    #[arg(long, default_value_t = 2, value_name = "N")]
    prompts: usize,
    /// Tokens of a piece
    #[arg(long, default_value_t = 2048, value_name = "TOKENS")]
    tokens: usize,
    /// Number of layers that make lists [default: the fewest that --within allows]
    #[arg(long, value_name = "M", value_parser = at_least_one)]
    anchors: Option<usize>,
    /// Without --anchors: the fewest that keep this share of what every layer for itself would have
    #[arg(long, default_value_t = 0.95, value_name = "SHARE", value_parser = part)]
    within: f64,
    /// How the tiles of a piece become one number: min (as published), mean, low (fifth percentile)
    #[arg(long, default_value = "low", value_parser = parse_name::<Objective>, value_name = "OBJECTIVE")]
    objective: Objective,
    /// Weigh layers by how far their attention turns the residual stream (as published)
    #[arg(long)]
    weigh: bool,
    /// Tokens of a tile: queries that share a list
    #[arg(long, default_value_t = 32, value_name = "TOKENS")]
    tile: usize,
    /// Keys that a list holds at least, beside the tile itself
    #[arg(long, default_value_t = 32, value_name = "KEYS")]
    keys: usize,
    /// Thousandths of the earlier keys that a list holds where that is more than --keys
    #[arg(long, default_value_t = 0, value_name = "PERMILLE")]
    permille: usize,
    /// Tokens that the model writes after each piece, each of which counts as a tile of its own [default: 32 as published,
    /// or what the model's limit leaves]
    #[arg(long, value_name = "TOKENS")]
    generate: Option<usize>,
    /// Whose mass inside the tile counts: right, or published (a slip in the published code)
    #[arg(long, default_value = "right", value_parser = parse_name::<OwnTile>, value_name = "FORM")]
    own_tile: OwnTile,
    /// What the plan is for: kascade, kascade-pooled or refined, with options after colons (kascade:percent=5). The
    /// plan is made for contexts up to --ctx [default: the model's limit]
    #[arg(long, default_value = "kascade", value_name = "METHOD")]
    method: MethodSpec,
    /// Write the similarities and everything else behind the plan here (JSON)
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Where the plan goes (for --plan); statistics are kept beside it (FILE.state), so that an interrupted run goes on and
    /// another --anchors or --objective takes no time
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

/// Tokens written after a piece (as published).
const GENERATED: usize = 32;

pub fn calibrate(a: CalibrateArgs) -> Result<ExitCode> {
    let interrupt = Interrupt::install();
    ensure!(
        a.method.variant.takes("anchors"),
        "--method {}: its layers share no lists; take kascade, kascade-pooled or refined",
        a.method.name()
    );
    let output = OutputFile::create(&a.output)?;
    let state = state_of(&a.output);
    let (checkpoint, tokenizer) = a.model.open()?;
    fits(a.tokens, &checkpoint)?;
    let most = checkpoint.config().windows.iter().filter(|w| w.is_none()).count();
    if let Some(anchors) = a.anchors.filter(|m| !(1..=most).contains(m)) {
        bail!("--anchors {anchors}: this model can have 1 to {most}");
    }
    let start = start_of_text(&tokenizer)?;
    let texts = pieces(&encoded(&a.text, &tokenizer)?, &start, a.tokens, a.prompts)?;
    let report = a.report.as_deref().map(OutputFile::create).transpose()?;
    let left = checkpoint.config().max_context.saturating_sub(a.tokens);
    let generated = a.generate.unwrap_or(GENERATED.min(left));
    let mut engine = a.model.reader(checkpoint, tokenizer, a.tokens.saturating_add(generated))?;
    let settings = Settings {
        tile: a.tile,
        keys: a.keys,
        permille: a.permille,
        own: a.own_tile,
        generated,
        ..Settings::of(&engine)
    };
    let bar = Bar::new("calibrating", "tokens");
    let cancel = interrupt.arm();
    let progress = |done, all| bar.go_on(&cancel, done, all);
    let found = gather(&mut engine, &texts, &settings, Some(&state), &progress);
    bar.end();
    let statistics = match found {
        Err(CalibrateError::Engine(EngineError::Interrupted)) => {
            ui::note(match state.exists() {
                true => format!(
                    "interrupted; the same command goes on after the last whole piece ({})",
                    state.display()
                ),
                false => "interrupted before the first piece was done; nothing was written".into(),
            });
            return Ok(ExitCode::from(EXIT_CODE));
        }
        other => other?,
    };
    let choice =
        Choice { objective: a.objective, weigh: a.weigh, anchors: a.anchors, share: a.within };
    let calibration = Calibration::new(engine.fingerprint(), &statistics, choice)?;
    let c = engine.decoder().config();
    let context = a.model.size.ctx.unwrap_or(c.max_context);
    let plan = calibration.plan(&a.method, &c.plan_shape(engine.fingerprint()), context)?;
    let written = output.finish(&serde_json::to_vec_pretty(&plan)?)?;
    let report = report.map(|f| f.finish(&serde_json::to_vec_pretty(&calibration)?));
    let report = report.transpose()?;
    match a.format {
        Format::Json => ui::print(&(serde_json::to_string_pretty(&calibration)? + "\n"))?,
        Format::Table => ui::print(&tables(&calibration, a.weigh))?,
    }
    report.iter().for_each(Written::tell);
    written.tell_use(&a.model.size.model, "--plan");
    // Nothing but this command reads it.
    ui::note(format!(
        "{} keeps the statistics, so that other --anchors or more --prompts take less time; it may be removed",
        state.display()
    ));
    Ok(ExitCode::SUCCESS)
}

/// Layers to an anchor where anchors are few (Kascade has 5 of 32).
const LAYERS_AN_ANCHOR: usize = 6;
/// Rows of the table of anchors beyond the chosen number.
const MORE_ROWS: usize = 4;

fn numbers<T: ToString>(values: &[T], between: &str) -> String {
    values.iter().map(T::to_string).collect::<Vec<_>>().join(between)
}

fn tables(c: &Calibration, weighed: bool) -> String {
    let mut worth = Table::new(&[">anchors", ">of all", "layers"]);
    for (anchors, share) in c.table.iter().take((c.anchors.len() + MORE_ROWS).max(8)) {
        worth.row([
            anchors.len().to_string(),
            format!("{:.2} %", 100.0 * share),
            numbers(anchors, " "),
        ]);
    }
    let mut layers = Table::new(&[">layer", "lists of", ">similarity", "heads", ">turn"]);
    for (b, &layer) in c.layers.iter().enumerate() {
        let a = c.layers.iter().position(|&l| l == c.from[b]).unwrap_or(b);
        let own = a == b;
        // The weight is a factor of the whole column.
        let similarity =
            if weighed { c.similarity[a][b] / c.similarity[b][b] } else { c.similarity[a][b] };
        layers.row([
            layer.to_string(),
            if own { "itself".into() } else { c.from[b].to_string() },
            if own { "-".into() } else { format!("{:.2} %", 100.0 * similarity) },
            if own { "-".into() } else { numbers(&c.head_maps[b], " ") },
            format!("{:.4}", c.importance[b]),
        ]);
    }
    let (chosen, n, of) = (numbers(&c.anchors, " "), c.anchors.len(), c.layers.len());
    let few = of.div_ceil(LAYERS_AN_ANCHOR);
    let saves_little = match c.table.get(few - 1) {
        Some((_, share)) if 2 * n > of => format!(
            "more than half of the layers choose their own tokens, which saves little time; --anchors {few} keeps {:.2} %\n",
            100.0 * share
        ),
        _ => String::new(),
    };
    format!(
        "{worth}\n{n} anchors of {of} layers, from {} pieces: {chosen}\n{saves_little}\n{layers}",
        c.texts
    )
}
