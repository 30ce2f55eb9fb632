//! Methods by name, with the options that override their defaults. `profile.rs` and `anchors.rs` turn them into
//! plans.

use super::SelectError;
use super::anchors::{AnchorScorer, Anchors};
use super::catalog::{METHODS, Variant};
use crate::backend::{DimMetric, HeadPool};
use serde::{Deserialize, Serialize};

/// A method and the options that override its defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodSpec {
    /// The method whose defaults hold where nothing else is said.
    pub variant: Variant,
    /// T_b, tokens attended to per KV head. Default: context / 32, at least 512, at most 2048.
    pub budget: Option<usize>,
    /// D_b, key dimensions scored. Default: a quarter of the head dimension (SparCas profiles: 32).
    pub dims: Option<usize>,
    /// Refresh interval U of query-chosen dimensions; 0 = once.
    pub update: Option<u32>,
    /// Adaptive refresh when coverage falls below this share of a fresh choice.
    pub beta: Option<f32>,
    /// Importance of a key dimension, for query-chosen dimensions.
    pub metric: Option<DimMetric>,
    /// Dimensions chosen together; tokens of a page for Quest and ArkVale.
    pub unit: Option<usize>,
    /// How the query heads of a KV head share a token set.
    pub pool: Option<HeadPool>,
    /// First tokens that are always attended to.
    pub sinks: Option<usize>,
    /// Last tokens that are always attended to.
    pub recent: Option<usize>,
    /// Leading layers that stay dense. Default 2.
    pub dense_layers: Option<usize>,
    /// N_min: stay dense up to this many tokens.
    pub dense_below: Option<usize>,
    /// Share of a sequence's tokens that is attended to, in percent, where the budget follows the length.
    #[serde(default)]
    pub percent: Option<f32>,
    /// Least tokens of such a share.
    #[serde(default)]
    pub budget_min: Option<usize>,
    /// Layers whose tokens the layers after them reuse.
    #[serde(default)]
    pub anchors: Option<Anchors>,
    /// Tokens that an anchor hands down to layers that score them once more.
    #[serde(default)]
    pub candidates: Option<usize>,
    /// Rows of a prompt that share a choice of tokens; 0, the default: prompts are read densely.
    #[serde(default)]
    pub tile: Option<usize>,
    /// Leading layers that read prompts densely all the same. Default 0.
    #[serde(default)]
    pub prompt_dense: Option<usize>,
    /// Share of the estimated softmax mass at which a list ends, in front of its budget.
    #[serde(default)]
    pub mass: Option<f32>,
    /// The KV heads of a layer share their budgets; each is sure of this share of its own.
    #[serde(default)]
    pub floor: Option<f32>,
    /// The mean value stands for the tokens that are left out.
    #[serde(default)]
    pub correct: Option<bool>,
    /// How anchors score tokens.
    #[serde(default)]
    pub scorer: Option<AnchorScorer>,
}

impl Default for MethodSpec {
    fn default() -> Self {
        Variant::Sparcas.into()
    }
}

impl From<Variant> for MethodSpec {
    fn from(variant: Variant) -> Self {
        MethodSpec {
            variant,
            budget: None,
            dims: None,
            update: None,
            beta: None,
            metric: None,
            unit: None,
            pool: None,
            sinks: None,
            recent: None,
            dense_layers: None,
            dense_below: None,
            percent: None,
            budget_min: None,
            anchors: None,
            candidates: None,
            tile: None,
            prompt_dense: None,
            mass: None,
            floor: None,
            correct: None,
            scorer: None,
        }
    }
}

impl std::str::FromStr for MethodSpec {
    type Err = SelectError;

    /// A method's name, with options where wanted: `sparcas:dims=16:budget=256`.
    fn from_str(s: &str) -> Result<Self, SelectError> {
        let mut parts = s.split(':');
        let name = parts.next().unwrap_or_default();
        let Some(info) = METHODS.iter().find(|m| m.name == name) else {
            let known: Vec<_> = METHODS.iter().map(|m| m.name).collect();
            return Err(SelectError::UnknownMethod { name: name.into(), known: known.join(", ") });
        };
        let mut spec: MethodSpec = info.variant.into();
        for part in parts {
            let bad = |what: String| SelectError::BadPlan { method: name.into(), reason: what };
            let read = || match info.options {
                [] => "none".to_owned(),
                options => options.join(", "),
            };
            let Some((key, value)) = part.split_once('=') else {
                return Err(bad(format!("{part:?} is no option; write key=value ({})", read())));
            };
            if !info.options.contains(&key) {
                return Err(bad(format!(
                    "{key:?} is no option of this method; it reads {}",
                    read()
                )));
            }
            if !spec.set(key, value) {
                return Err(bad(format!("{value:?} is no value for {key}")));
            }
        }
        Ok(spec)
    }
}

/// A value of an enum by its name in plans; dashes may stand for underscores.
pub fn parse_name<T: serde::de::DeserializeOwned>(s: &str) -> Result<T, String> {
    serde_json::from_value(serde_json::Value::String(s.replace('-', "_")))
        .map_err(|e| e.to_string())
}

impl MethodSpec {
    /// Sets one option by name; false when there is no such option or the value is none.
    fn set(&mut self, key: &str, value: &str) -> bool {
        fn to<T>(slot: &mut Option<T>, value: Option<T>) -> bool {
            *slot = value;
            slot.is_some()
        }
        match key {
            "budget" => to(&mut self.budget, value.parse().ok()),
            "dims" => to(&mut self.dims, value.parse().ok()),
            "update" => to(&mut self.update, value.parse().ok()),
            "beta" => to(&mut self.beta, value.parse().ok()),
            "metric" => to(&mut self.metric, parse_name(value).ok()),
            "unit" => to(&mut self.unit, value.parse().ok()),
            "pool" => to(&mut self.pool, parse_name(value).ok()),
            "sinks" => to(&mut self.sinks, value.parse().ok()),
            "recent" => to(&mut self.recent, value.parse().ok()),
            "dense-layers" => to(&mut self.dense_layers, value.parse().ok()),
            "dense-below" => to(&mut self.dense_below, value.parse().ok()),
            "percent" => to(&mut self.percent, value.parse().ok()),
            "budget-min" => to(&mut self.budget_min, value.parse().ok()),
            "anchors" => to(&mut self.anchors, value.parse().ok()),
            "candidates" => to(&mut self.candidates, value.parse().ok()),
            "tile" => to(&mut self.tile, value.parse().ok()),
            "prompt-dense" => to(&mut self.prompt_dense, value.parse().ok()),
            "mass" => to(&mut self.mass, value.parse().ok()),
            "floor" => to(&mut self.floor, value.parse().ok()),
            "correct" => to(&mut self.correct, value.parse().ok()),
            "scorer" => to(&mut self.scorer, parse_name(value).ok()),
            _ => false,
        }
    }

    /// Options that were set, by name.
    pub fn given(&self) -> impl Iterator<Item = &'static str> {
        [
            ("budget", self.budget.is_some()),
            ("dims", self.dims.is_some()),
            ("update", self.update.is_some()),
            ("beta", self.beta.is_some()),
            ("metric", self.metric.is_some()),
            ("unit", self.unit.is_some()),
            ("pool", self.pool.is_some()),
            ("sinks", self.sinks.is_some()),
            ("recent", self.recent.is_some()),
            ("dense-layers", self.dense_layers.is_some()),
            ("dense-below", self.dense_below.is_some()),
            ("percent", self.percent.is_some()),
            ("budget-min", self.budget_min.is_some()),
            ("anchors", self.anchors.is_some()),
            ("candidates", self.candidates.is_some()),
            ("tile", self.tile.is_some()),
            ("prompt-dense", self.prompt_dense.is_some()),
            ("mass", self.mass.is_some()),
            ("floor", self.floor.is_some()),
            ("correct", self.correct.is_some()),
            ("scorer", self.scorer.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, set)| set.then_some(name))
    }

    /// Without the options that the method does not read.
    pub fn with_read_options_only(mut self) -> Self {
        let v = self.variant;
        fn keep<T>(slot: &mut Option<T>, read: bool) {
            slot.take_if(|_| !read);
        }
        keep(&mut self.budget, v.takes("budget"));
        keep(&mut self.dims, v.takes("dims"));
        keep(&mut self.update, v.takes("update"));
        keep(&mut self.beta, v.takes("beta"));
        keep(&mut self.metric, v.takes("metric"));
        keep(&mut self.unit, v.takes("unit"));
        keep(&mut self.pool, v.takes("pool"));
        keep(&mut self.sinks, v.takes("sinks"));
        keep(&mut self.recent, v.takes("recent"));
        keep(&mut self.dense_layers, v.takes("dense-layers"));
        keep(&mut self.dense_below, v.takes("dense-below"));
        keep(&mut self.percent, v.takes("percent"));
        keep(&mut self.budget_min, v.takes("budget-min"));
        keep(&mut self.anchors, v.takes("anchors"));
        keep(&mut self.candidates, v.takes("candidates"));
        keep(&mut self.tile, v.takes("tile"));
        keep(&mut self.prompt_dense, v.takes("prompt-dense"));
        keep(&mut self.mass, v.takes("mass"));
        keep(&mut self.floor, v.takes("floor"));
        keep(&mut self.correct, v.takes("correct"));
        keep(&mut self.scorer, v.takes("scorer"));
        self
    }

    /// Name on the command line.
    pub fn name(&self) -> &'static str {
        METHODS.iter().find(|m| m.variant == self.variant).map_or("dense", |m| m.name)
    }
}

#[cfg(test)]
#[path = "tests/method.rs"]
mod tests;
