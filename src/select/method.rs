//! Methods by name: defaults per profile, options on top, turned into a plan for a model.

use super::blocks;
use super::catalog::{METHODS, Variant};
use super::{Budget, Keep, LayerPlan, Plan, Role, Scorer, SelectError};
use crate::backend::{DimMetric, HeadPool, LogitScale, Refresh};
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
        self
    }

    /// Name on the command line.
    pub fn name(&self) -> &'static str {
        METHODS.iter().find(|m| m.variant == self.variant).map_or("dense", |m| m.name)
    }

    /// The plan for a model of `n_layers` layers and `head_dim`, run at up to `context` tokens.
    ///
    /// `windows[l]`: the layer's own sliding window; such layers stay as they are.
    ///
    /// # Errors
    /// [`SelectError::BadPlan`] when options do not fit the model.
    pub fn plan(
        &self,
        model: &str,
        windows: &[Option<usize>],
        head_dim: usize,
        context: usize,
    ) -> Result<Plan, SelectError> {
        let n_layers = windows.len();
        let dense_layers = match self.variant {
            Variant::Dense => n_layers,
            // As published, every layer selects.
            Variant::Infllm2 | Variant::Sparda => self.dense_layers.unwrap_or(0),
            _ => self.dense_layers.unwrap_or(2),
        };
        let layers = (0..n_layers)
            .map(|l| match windows[l] {
                None if l >= dense_layers => self.layer(l, n_layers, head_dim, context),
                _ => LayerPlan::dense(),
            })
            .collect();
        let plan = Plan { method: self.name().into(), model: model.into(), layers };
        plan.check(model, windows, head_dim)?;
        Ok(plan)
    }

    fn layer(&self, l: usize, n_layers: usize, head_dim: usize, context: usize) -> LayerPlan {
        let tokens = (context / 32).clamp(512, 2048);
        if let Some(plan) = blocks::layer(self, tokens) {
            return plan;
        }
        let quarter = (head_dim / 4).next_multiple_of(8).min(head_dim);
        let paper = self.variant == Variant::SparcasPaper;
        let (sinks, recent) = match self.variant {
            Variant::SparcasPaper => (0, 1),
            Variant::SparcasRecommended => (4, 64),
            _ => (4, 32),
        };
        let mut keep =
            Keep { sinks: self.sinks.unwrap_or(sinks), recent: self.recent.unwrap_or(recent) };
        let tokens = self.budget.unwrap_or(tokens);
        if self.variant == Variant::Window {
            // The whole budget is sinks and window, unless a smaller window was asked for.
            keep.recent = self.recent.unwrap_or(tokens.saturating_sub(keep.sinks));
        }
        let budget_tokens = match self.variant {
            Variant::Window => keep.sinks + keep.recent,
            _ => tokens,
        };
        LayerPlan {
            role: Role::Select,
            scorer: self.scorer(l, n_layers, head_dim, quarter),
            pool: match self.variant {
                // No scores to pool.
                Variant::Window => HeadPool::SumLogit,
                Variant::SparcasPaper => self.pool.unwrap_or(HeadPool::SumLogit),
                _ => self.pool.unwrap_or(HeadPool::MaxSoftmax),
            },
            scale: match self.variant {
                Variant::Oracle | Variant::Window => LogitScale::InvSqrtDim,
                _ => LogitScale::Coverage,
            },
            budget: Budget {
                tokens: budget_tokens,
                dense_below: self.dense_below.unwrap_or(if paper { 0 } else { 2048 }),
            },
            keep,
        }
    }

    fn scorer(&self, l: usize, n_layers: usize, head_dim: usize, quarter: usize) -> Scorer {
        let query_chosen = |dims, metric, unit, refresh, slice| {
            let metric = self.metric.unwrap_or(metric);
            let pair = matches!(metric, DimMetric::PairNorm | DimMetric::PairQk);
            let unit = self.unit.unwrap_or(if pair && unit == 1 {
                2
            } else if !pair && unit == 2 {
                1
            } else {
                unit
            });
            // Layers take turns, so that no step rebuilds every slice.
            let refresh = match (self.update, self.beta) {
                (u, Some(beta)) => Refresh::Adaptive { beta, min: 1, max: u.unwrap_or(64) },
                (Some(every), None) => Refresh::Every { every, phase: 0 },
                (None, None) => refresh,
            };
            let refresh = match refresh {
                Refresh::Every { every, .. } => Refresh::Every {
                    every,
                    phase: (l as u64 * u64::from(every) / n_layers as u64) as u32,
                },
                adaptive => adaptive,
            };
            Scorer::Dims { dims: self.dims.unwrap_or(dims), metric, unit, refresh, slice }
        };
        let half = 32.min(head_dim);
        match self.variant {
            Variant::Oracle => Scorer::Exact,
            Variant::Sparcas => Scorer::Sorted { dims: self.dims.unwrap_or(quarter), int8: false },
            Variant::SparcasInt8 => {
                Scorer::Sorted { dims: self.dims.unwrap_or(quarter), int8: true }
            }
            Variant::SparcasPaper => {
                let every = Refresh::Every { every: 64, phase: 0 };
                query_chosen(half, DimMetric::AbsQ, 1, every, true)
            }
            Variant::SparcasRecommended => {
                let adaptive = Refresh::Adaptive { beta: 0.9, min: 1, max: 64 };
                query_chosen(half, DimMetric::PairQk, 2, adaptive, true)
            }
            Variant::SparcasGroups => {
                let every = Refresh::Every { every: 1, phase: 0 };
                query_chosen(quarter, DimMetric::PairQk, 8, every, false)
            }
            // Those that select blocks have plans of their own.
            _ => Scorer::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::KvReads;

    fn plan(name: &str) -> Plan {
        let spec: MethodSpec = name.parse().unwrap();
        spec.plan("m", &[None; 6], 64, 8192).unwrap()
    }

    #[test]
    fn every_method_makes_a_valid_plan_that_survives_json() {
        for m in METHODS {
            let p = plan(m.name);
            let json = serde_json::to_string(&p).unwrap();
            assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), p, "{}", m.name);
        }
    }

    #[test]
    fn dense_layers_and_sliding_windows_stay_dense() {
        let spec: MethodSpec = "sparcas".parse().unwrap();
        let p = spec.plan("m", &[None, None, Some(128), None], 64, 8192).unwrap();
        let roles: Vec<_> = p.layers.iter().map(|l| l.role).collect();
        assert_eq!(roles, [Role::Dense, Role::Dense, Role::Dense, Role::Select]);
    }

    #[test]
    fn options_in_the_name_are_read_and_checked() {
        let spec: MethodSpec = "sparcas-paper:dims=16:metric=pair-qk:update=8".parse().unwrap();
        assert_eq!(
            (spec.dims, spec.update, spec.metric),
            (Some(16), Some(8), Some(DimMetric::PairQk))
        );
        for bad in ["sparcas:dims", "sparcas:dims=x", "sparcas:size=3", "sparc"] {
            assert!(bad.parse::<MethodSpec>().is_err(), "{bad}");
        }
        for (unread, key) in [
            ("dense:budget=5", "budget"),
            ("sparcas:update=8:metric=abs-qk", "update"),
            ("oracle:dims=16", "dims"),
            ("window:pool=max-softmax", "pool"),
        ] {
            let e = unread.parse::<MethodSpec>().unwrap_err().to_string();
            assert!(e.contains(&format!("{key:?} is no option of this method")), "{e}");
        }
    }

    /// An option that a method lists changes its plan, and one that it does not list changes nothing.
    #[test]
    fn methods_read_the_options_they_list() {
        let values = [
            ("budget", "640"),
            ("dims", "48"),
            ("update", "7"),
            ("beta", "0.5"),
            ("metric", "abs-qk"),
            ("unit", "16"),
            ("pool", "mean-softmax"),
            ("sinks", "7"),
            ("recent", "9"),
            ("dense-layers", "3"),
            ("dense-below", "99"),
        ];
        for m in METHODS {
            for (key, value) in values {
                let value = match (key, m.variant) {
                    ("unit", Variant::Quest | Variant::Arkvale) => "32",
                    _ => value,
                };
                let mut spec: MethodSpec = m.variant.into();
                let base = spec.plan("m", &[None; 6], 64, 8192).unwrap();
                assert!(spec.set(key, value), "{key}={value}");
                let changed = spec.plan("m", &[None; 6], 64, 8192).unwrap() != base;
                assert_eq!(changed, m.options.contains(&key), "{} {key}", m.name);
            }
        }
    }

    #[test]
    fn a_budget_smaller_than_the_kept_tokens_is_refused() {
        let spec = MethodSpec { budget: Some(16), ..Variant::Sparcas.into() };
        let e = spec.plan("m", &[None; 4], 64, 8192).unwrap_err().to_string();
        assert!(e.contains("budget of 16"), "{e}");
    }

    #[test]
    fn layers_take_turns_at_rebuilding() {
        let phases: Vec<_> = plan("sparcas-paper")
            .layers
            .iter()
            .filter_map(|l| match l.scorer {
                Scorer::Dims { refresh: Refresh::Every { phase, .. }, .. } => Some(phase),
                _ => None,
            })
            .collect();
        assert_eq!(phases, [21, 32, 42, 53]);
    }

    #[test]
    fn bytes_follow_the_formula_of_the_spec() {
        // Llama-3.1-8B at 32K, D_b = 32, U = 64, T_b = 1024: 937 MB a step.
        let spec =
            MethodSpec { budget: Some(1024), dims: Some(32), ..Variant::SparcasPaper.into() };
        let p = spec.plan("m", &[None; 32], 128, 32768).unwrap();
        let windows = [None; 32];
        let shape = KvReads { windows: &windows, heads: 32, kv_heads: 8, head_dim: 128, elem: 2 };
        let mb = p.bytes_read(32768, &shape) as f64 / 1e6;
        assert!((mb - 937.0).abs() < 15.0, "{mb}");
        let dense = Plan::dense(32).bytes_read(32768, &shape) as f64 / 1e6;
        assert!((dense - 4295.0).abs() < 1.0, "{dense}");
    }
}
