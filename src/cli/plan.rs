//! `longsight plan`: a method as data.

use super::args::{Format, MethodArgs, SizeArgs, read_plan};
use super::output::OutputFile;
use super::ui;
use crate::select::{LayerPlan, Plan, Query, Role, Scorer};
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args)]
pub struct PlanArgs {
    /// Write the plan here (for --plan)
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    #[command(flatten)]
    model: SizeArgs,
    #[command(flatten)]
    method: MethodArgs,
}

pub fn plan(a: PlanArgs) -> Result<ExitCode> {
    let checkpoint = a.model.checkpoint()?;
    let c = checkpoint.config();
    let context = a.model.ctx.unwrap_or(c.max_context);
    let print = checkpoint.fingerprint();
    let plan = match &a.method.plan {
        Some(path) => read_plan(path)?,
        None => a.method.spec()?.plan(&print, &c.windows, c.head_dim, context)?,
    };
    plan.check(&print, &c.windows, c.head_dim)?;
    if let Some(path) = &a.save {
        OutputFile::create(path)?.finish(&serde_json::to_vec_pretty(&plan)?)?;
    }
    if a.format == Format::Json {
        ui::print(&(serde_json::to_string_pretty(&plan)? + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text =
        format!("{} on {} ({} layers, {} tokens)\n", plan.method, c.name, c.n_layers, context);
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
    let (sparse, dense) = (bytes(&plan), bytes(&Plan::dense(c.n_layers)));
    text += &format!(
        "KV read per decode step at {} tokens: {} of {} dense ({:.1} %)\n",
        ui::thousands(context as u64),
        ui::bytes(sparse),
        ui::bytes(dense),
        100.0 * sparse as f64 / dense as f64
    );
    ui::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn describe(l: &LayerPlan) -> String {
    if l.role == Role::Dense {
        return "dense".into();
    }
    let scorer = match &l.scorer {
        Scorer::None => "no scores".into(),
        Scorer::Exact => "exact logits".into(),
        Scorer::Sorted { dims, int8 } => {
            format!(
                "leading {dims} dimensions of sorted keys{}",
                if *int8 { " in int8" } else { "" }
            )
        }
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
            format!("{dims} dimensions by {metric:?} in units of {unit}, {when}, {from}")
        }
        Scorer::Blocks { summary, unit, query } => {
            let from = match query {
                Query::Own => "",
                Query::Forecast => " and the Forecast of the layer before",
            };
            format!("blocks of {unit} tokens by {summary:?}{from}")
        }
        Scorer::Custom { name } => format!("custom scorer {name}"),
    };
    format!(
        "{scorer}; {:?}; top {} with {} sinks and {} recent; dense up to {} tokens",
        l.pool,
        l.budget.tokens,
        l.keep.sinks,
        l.keep.recent,
        l.budget.dense_until()
    )
}
