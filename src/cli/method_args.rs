//! Which method, with which options.

use super::args::read_plan;
use crate::backend::{DimMetric, HeadPool};
use crate::engine::EngineBuilder;
use crate::select::{AnchorScorer, Anchors, METHODS, MethodSpec, Variant, parse_name};
use anyhow::{Result, bail};
use clap::Args;
use std::path::PathBuf;

fn method_help() -> String {
    let lines: Vec<_> = METHODS.iter().map(|m| format!("  {:<20} {}", m.name, m.about)).collect();
    format!("Which tokens each decode step attends to:\n{}", lines.join("\n"))
}

/// Arguments that a finished plan leaves nothing to decide for.
const PLANNED: [&str; 22] = [
    "method",
    "budget",
    "dims",
    "update",
    "metric",
    "beta",
    "unit",
    "pool",
    "sinks",
    "recent",
    "dense_layers",
    "dense_below",
    "percent",
    "budget_min",
    "anchors",
    "candidates",
    "tile",
    "prompt_dense",
    "mass",
    "floor",
    "correct",
    "scorer",
];

/// Which tokens are attended to.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sparse attention")]
pub struct MethodArgs {
    /// Method; --help lists them
    #[arg(long, default_value = "sparcas", long_help = method_help())]
    pub method: MethodSpec,
    /// A plan file instead of --method and its options (see `longsight plan --save`)
    #[arg(long, value_name = "FILE", conflicts_with_all = PLANNED)]
    pub plan: Option<PathBuf>,
    #[command(flatten)]
    pub options: MethodOptions,
}

/// Options on top of a method's defaults.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sparse attention")]
pub struct MethodOptions {
    /// Tokens attended to per KV head [default: context / 32, 512 to 2048]
    #[arg(long, value_name = "TOKENS")]
    pub budget: Option<usize>,
    /// Key dimensions scored [default: a quarter of the head dimension; 32 for the query-chosen profiles]
    #[arg(long, value_name = "DIMS")]
    pub dims: Option<usize>,
    /// Steps between two choices of dimensions (query-chosen profiles); 0 = once
    #[arg(long, value_name = "STEPS")]
    pub update: Option<u32>,
    /// Importance of a dimension: abs-q, pair-norm, abs-qk, pair-qk
    #[arg(long, value_parser = parse_name::<DimMetric>, value_name = "METRIC")]
    pub metric: Option<DimMetric>,
    #[command(flatten)]
    pub others: OtherOptions,
}

/// Options of which `longsight eval`, too, takes one value each.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sparse attention")]
pub struct OtherOptions {
    /// Choose dimensions anew when coverage falls below this share of a fresh choice
    #[arg(long, value_name = "SHARE")]
    pub beta: Option<f32>,
    /// Dimensions chosen together: 1, 2, 8 or 16; for quest and arkvale tokens of a page: 16, 32 or 64
    #[arg(long, value_name = "DIMS")]
    pub unit: Option<usize>,
    /// How query heads share a token set: sum-logit, max-logit, max-softmax, mean-softmax, none; one for all heads:
    /// all-softmax, any-softmax
    #[arg(long, value_parser = parse_name::<HeadPool>, value_name = "POOL")]
    pub pool: Option<HeadPool>,
    /// First tokens that are always attended to
    #[arg(long, value_name = "TOKENS")]
    pub sinks: Option<usize>,
    /// Last tokens that are always attended to
    #[arg(long, value_name = "TOKENS")]
    pub recent: Option<usize>,
    /// Leading layers that stay dense [default: 2]
    #[arg(long, value_name = "LAYERS")]
    pub dense_layers: Option<usize>,
    /// Stay dense up to this many tokens [default: 2048; sparcas-paper: 0]
    #[arg(long, value_name = "TOKENS")]
    pub dense_below: Option<usize>,
    /// Share of a text's tokens attended to, where the budget follows the length (kascade) [default: 10]
    #[arg(long, value_name = "PERCENT")]
    pub percent: Option<f32>,
    /// Least tokens of such a share [default: 128]
    #[arg(long, value_name = "TOKENS")]
    pub budget_min: Option<usize>,
    /// Layers whose choice the layers after them reuse: how many, or which (0+2+8) [default: one in seven]
    #[arg(long, value_name = "LAYERS")]
    pub anchors: Option<Anchors>,
    /// Tokens that an anchor hands down, to be scored once more [default: refined: 4 times the budget; else none]
    #[arg(long, value_name = "TOKENS")]
    pub candidates: Option<usize>,
    /// Let the prompt, too, be read sparsely: so many of its tokens share a choice (kascade, oracle and window: 32 as
    /// published by Kascade; other methods: 1) [default: 0, prompts are read densely]
    #[arg(long, value_name = "TOKENS")]
    pub tile: Option<usize>,
    /// Leading layers that read the prompt densely all the same [default: 0]
    #[arg(long, value_name = "LAYERS")]
    pub prompt_dense: Option<usize>,
    /// End a list where its tokens hold this share of the estimated softmax mass (top-p), at the budget at the latest
    #[arg(long, value_name = "SHARE")]
    pub mass: Option<f32>,
    /// Let the KV heads of a layer share their budgets by the scores; each is sure of this share of its own
    #[arg(long, value_name = "SHARE", conflicts_with = "mass")]
    pub floor: Option<f32>,
    /// Let the mean of all values stand for the tokens left out: true or false [default: sparq: true; else false]
    #[arg(long, value_name = "BOOL")]
    pub correct: Option<bool>,
    /// How anchors score tokens: exact, sorted, int8, dims, blocks [default: exact]
    #[arg(long, value_parser = parse_name::<AnchorScorer>, value_name = "SCORER")]
    pub scorer: Option<AnchorScorer>,
}

/// Refuses an option that none of the methods, called `names`, reads.
pub fn read_by_one(option: &str, methods: &[MethodSpec], names: &[&str]) -> Result<()> {
    if methods.iter().any(|m| m.variant.takes(option)) {
        return Ok(());
    }
    bail!("--{option} changes nothing in {}; leave it out", names.join(", "))
}

impl MethodOptions {
    /// The methods with these options on top, each with those that it reads.
    ///
    /// # Errors
    /// An option that none of the methods reads.
    pub fn apply(&self, methods: &[MethodSpec]) -> Result<Vec<MethodSpec>> {
        let given = self.on(Variant::Dense.into());
        for option in given.given() {
            let names: Vec<_> = methods.iter().map(MethodSpec::name).collect();
            read_by_one(option, methods, &names)?;
        }
        Ok(methods.iter().map(|m| self.on(m.clone()).with_read_options_only()).collect())
    }

    /// `spec` with all of these options on top.
    fn on(&self, mut spec: MethodSpec) -> MethodSpec {
        let o = &self.others;
        spec.budget = self.budget.or(spec.budget);
        spec.dims = self.dims.or(spec.dims);
        spec.update = self.update.or(spec.update);
        spec.metric = self.metric.or(spec.metric);
        spec.beta = o.beta.or(spec.beta);
        spec.unit = o.unit.or(spec.unit);
        spec.pool = o.pool.or(spec.pool);
        spec.sinks = o.sinks.or(spec.sinks);
        spec.recent = o.recent.or(spec.recent);
        spec.dense_layers = o.dense_layers.or(spec.dense_layers);
        spec.dense_below = o.dense_below.or(spec.dense_below);
        spec.percent = o.percent.or(spec.percent);
        spec.budget_min = o.budget_min.or(spec.budget_min);
        spec.anchors = o.anchors.clone().or(spec.anchors);
        spec.candidates = o.candidates.or(spec.candidates);
        spec.tile = o.tile.or(spec.tile);
        spec.prompt_dense = o.prompt_dense.or(spec.prompt_dense);
        spec.mass = o.mass.or(spec.mass);
        spec.floor = o.floor.or(spec.floor);
        spec.correct = o.correct.or(spec.correct);
        spec.scorer = o.scorer.or(spec.scorer);
        spec
    }
}

impl MethodArgs {
    /// The method with its options.
    ///
    /// # Errors
    /// An option that the method does not read.
    pub fn spec(&self) -> Result<MethodSpec> {
        let specs = self.options.apply(std::slice::from_ref(&self.method))?;
        Ok(specs.into_iter().next().unwrap_or_default())
    }

    /// Sets the method on a builder.
    ///
    /// # Errors
    /// A plan file that cannot be read, or an option that the method does not read.
    pub fn apply<'a>(&self, builder: EngineBuilder<'a>) -> Result<EngineBuilder<'a>> {
        Ok(match &self.plan {
            Some(path) => builder.plan(read_plan(path)?),
            None => builder.method(self.spec()?),
        })
    }
}
