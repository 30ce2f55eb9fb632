//! `longsight plan`: a method as data.

use super::args::{Format, SizeArgs, read_file, read_plan};
use super::method_args::MethodArgs;
use super::output::OutputFile;
use super::ui;
use crate::engine::EngineError;
use crate::model::Checkpoint;
use crate::select::{Budget, Follow, LayerPlan, Plan, Query, Role, Scorer, read_head_maps};
use anyhow::{Context, Result};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

const CTX: &str = "Tokens that the plan is made for [default: the model's limit; random weights, which have none: 32,768]";

/// Random weights were trained for no length.
const RANDOM_CTX: usize = 32_768;

#[derive(Args)]
#[command(mut_arg("ctx", |a| a.help(CTX)))]
pub struct PlanArgs {
    /// Write the plan here (for --plan)
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Head maps in the format of Kascade's authors (.npy); takes --method kascade --anchors 0+2+8+...
    #[arg(long, value_name = "FILE", conflicts_with = "plan")]
    head_maps: Option<PathBuf>,
    #[command(flatten)]
    model: SizeArgs,
    #[command(flatten)]
    method: MethodArgs,
}

pub fn plan(a: PlanArgs) -> Result<ExitCode> {
    let checkpoint = a.model.checkpoint()?;
    let c = checkpoint.config();
    let most = c.max_context;
    let default = if checkpoint.is_random() { most.min(RANDOM_CTX) } else { most };
    let context = a.model.ctx.unwrap_or(default);
    if context == 0 || context > most {
        return Err(EngineError::BadContext { context, most }.into());
    }
    let print = checkpoint.fingerprint();
    let shape = c.plan_shape(&print);
    let plan = match (&a.method.plan, &a.head_maps) {
        (Some(path), _) => read_plan(path)?,
        (None, None) => a.method.spec()?.plan(&shape, context)?,
        (None, Some(path)) => {
            let maps = read_head_maps(&read_file(path, "the head maps")?)
                .with_context(|| path.display().to_string())?;
            Plan::with_head_maps(&a.method.spec()?, &maps, &shape, context)?
        }
    };
    plan.check(&shape).map_err(|e| a.method.about(e))?;
    let wanted = plan.wants_forecast();
    a.method.forecast.read_by_one(&[(&plan.method, wanted)])?;
    let given = a.method.forecast.check(&checkpoint)?;
    let saved = a
        .save
        .as_deref()
        .map(|path| OutputFile::create(path)?.finish(&serde_json::to_vec_pretty(&plan)?));
    let saved = saved.transpose()?;
    match a.format {
        Format::Json => ui::print(&(serde_json::to_string_pretty(&plan)? + "\n"))?,
        Format::Table => {
            ui::print(&table(&a, &checkpoint, &plan, context))?;
            if wanted && !given {
                ui::print(&format!("{NO_FORECAST}\n"))?;
            }
        }
    }
    if let Some(file) = saved {
        let forecast = match &a.method.forecast {
            _ if !wanted => String::new(),
            f => format!("{} ", f.option()),
        };
        file.tell_use(&a.model.model, &format!("{forecast}--plan"));
    }
    Ok(ExitCode::SUCCESS)
}

const NO_FORECAST: &str = "To run it, name a Forecast: --forecast FILE (made by `longsight train-forecast`), or --forecast lookahead.";

fn table(a: &PlanArgs, checkpoint: &Checkpoint, plan: &Plan, context: usize) -> String {
    let c = checkpoint.config();
    let mut text = format!(
        "{} on {} ({} layers, {} tokens{})\n",
        plan.method,
        c.name,
        c.n_layers,
        ui::thousands(context as u64),
        if a.model.ctx.is_none() { "; --ctx says otherwise" } else { "" }
    );
    // Neighbouring layers that do the same share a line.
    let mut start = 0;
    while start < plan.layers.len() {
        let layer = &plan.layers[start];
        let what = describe(layer);
        let end = (start..plan.layers.len()).take_while(|&l| describe(&plan.layers[l]) == what);
        let last = end.last().unwrap_or(start);
        let range = if last == start { format!("{start}") } else { format!("{start}-{last}") };
        text += &format!("  layer {range:<7} {what}\n");
        start = last + 1;
    }
    let elem = a.model.kv_dtype.or(a.model.dtype).map_or(2, |d| d.bytes());
    let bytes = |p: &Plan| p.bytes_read(context, &c.kv_reads(elem));
    let (sparse, dense) = (bytes(plan), bytes(&Plan::dense(c.n_layers)));
    text += &format!(
        "KV read per decode step at {} tokens: {}{} of {} dense ({:.1} %)\n",
        ui::thousands(context as u64),
        if plan.reads_at_most() { "at most " } else { "" },
        ui::bytes(sparse),
        ui::bytes(dense),
        100.0 * sparse as f64 / dense as f64
    );
    text
}

fn describe(l: &LayerPlan) -> String {
    let tokens = match l.reuse {
        1 => tokens(&l.budget),
        steps => format!("{}, chosen every {steps} steps", tokens(&l.budget)),
    };
    let forced = format!("with {} sinks and {} recent", l.keep.sinks, l.keep.recent);
    let until = l.budget.dense_until();
    match &l.role {
        Role::Dense => "dense".into(),
        Role::Select => format!(
            "{}{}; {tokens} {forced}{}; dense up to {until} tokens",
            scores(&l.scorer),
            pool(l),
            if l.correct { "; mean value for the rest" } else { "" }
        ),
        Role::DenseAnchor => format!(
            "dense; lists for later layers: {}{}; {tokens} {forced}; from {until} tokens on",
            scores(&l.scorer),
            pool(l)
        ),
        Role::Reuse { from, head_map, refine } => {
            let map: Vec<String> = head_map.iter().map(u8::to_string).collect();
            let again = refine.as_ref().map_or(String::new(), |r| {
                let (n, by, pool) = (r.candidates, scores(&r.scorer), l.pool);
                format!("; of {n} candidates by {by}; pool {pool}; {forced}")
            });
            format!(
                "tokens of layer {from}, heads {}{again}; {tokens}; dense up to {until} tokens",
                map.join(" ")
            )
        }
    }
}

/// How query heads share the scores, where there are some.
fn pool(l: &LayerPlan) -> String {
    match l.scorer {
        Scorer::None => String::new(),
        _ => format!("; pool {}", l.pool),
    }
}

fn tokens(b: &Budget) -> String {
    match b.follow {
        Some(Follow::Mass { permille, at_least }) => {
            return format!(
                "top tokens up to {} % of their mass (at least {at_least}, at most {})",
                f64::from(permille) / 10.0,
                b.tokens
            );
        }
        Some(Follow::Shared { mean, at_least }) => {
            return format!(
                "top {mean} on average over the lists of a layer (at least {at_least}, at most {})",
                b.tokens
            );
        }
        None => {}
    }
    match b.share {
        None => format!("top {}", b.tokens),
        Some(s) => format!(
            "top {} % (at least {}, at most {})",
            f64::from(s.permille) / 10.0,
            s.at_least,
            b.tokens
        ),
    }
}

fn scores(scorer: &Scorer) -> String {
    match scorer {
        Scorer::None => "no scores".into(),
        Scorer::Exact => "exact logits".into(),
        Scorer::Sorted { dims, int8 } => {
            format!(
                "leading {dims} dimensions of sorted keys{}",
                if *int8 { " in int8" } else { "" }
            )
        }
        Scorer::Random { seed } => format!("random scores of seed {seed}"),
        Scorer::Static { dims, bits: 16 } => {
            format!("{dims} dimensions chosen offline, compact slice")
        }
        Scorer::Static { dims, bits } => {
            format!("{dims} dimensions chosen offline, slice of {bits} bits")
        }
        Scorer::Components { dims } => format!("{dims} leading principal components, own slice"),
        Scorer::Dims { dims, metric, unit, refresh, slice } => {
            let when = match refresh {
                crate::backend::Refresh::Every { every: 0, .. } => "chosen once".into(),
                crate::backend::Refresh::Every { every: 1, .. } => "chosen every step".into(),
                crate::backend::Refresh::Every { every, .. } => {
                    format!("chosen every {every} steps, layers in turn")
                }
                crate::backend::Refresh::Adaptive { beta, max, .. } => {
                    format!(
                        "chosen when coverage falls below {beta} of the best, or after {max} steps"
                    )
                }
            };
            let from = if *slice { "compact slice" } else { "read from the keys" };
            format!("{dims} dimensions by {metric} in units of {unit}, {when}, {from}")
        }
        Scorer::Blocks { summary, unit, query, by_query } => {
            let from = match query {
                Query::Own => "",
                Query::Forecast => " and the Forecast of the layer before",
            };
            let rest = by_query.map_or(String::new(), |n| {
                format!(", {n} of them; the rest by the content importance of their tokens")
            });
            format!("blocks of {unit} tokens by {summary}{from}{rest}")
        }
        Scorer::Custom { name } => format!("custom scorer {name}"),
    }
}
