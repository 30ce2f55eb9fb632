//! Plans: a sparse method as data.

use super::SelectError;
use super::blocks::{self, Query};
use crate::backend::{DimMetric, HeadPool, LogitScale, Refresh, SummaryKind};
use serde::{Deserialize, Serialize};

/// What a layer does in a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Attends to every cached token.
    Dense,
    /// Chooses tokens with its own scorer, then attends to them exactly.
    Select,
}

/// How tokens are scored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Scorer {
    /// No scores: only the kept tokens (StreamingLLM).
    None,
    /// Exact logits (oracle).
    Exact,
    /// The leading dimensions of energy-sorted keys.
    Sorted {
        /// D_b, dimensions read per token.
        dims: usize,
        /// Read the int8 copy instead of the keys.
        int8: bool,
    },
    /// Dimensions chosen by the query (SparCas and its neighbours).
    Dims {
        /// D_b.
        dims: usize,
        /// Importance rule.
        metric: DimMetric,
        /// Dimensions chosen together: 1, 2 (rotary pairs), 8 or 16.
        unit: usize,
        /// When the set is chosen anew.
        refresh: Refresh,
        /// Keep a compact copy of the chosen dimensions; else read them from the keys.
        slice: bool,
    },
    /// Whole blocks by summaries of their keys (Quest, ArkVale, InfLLM-V2, SparDA).
    Blocks {
        /// What stands for a run of keys.
        summary: SummaryKind,
        /// Tokens of a block: 16, 32 or 64.
        unit: usize,
        /// Whose query the summaries are scored with.
        query: Query,
    },
    /// A selector that the program brought along.
    Custom {
        /// Its name.
        name: String,
    },
}

/// How many tokens are attended to, forced ones included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub struct Budget {
    /// T_b: tokens per KV head.
    pub tokens: usize,
    /// The layer stays dense while a sequence has at most this many tokens (never below `tokens`).
    pub dense_below: usize,
}

impl Budget {
    /// Longest sequence that is still attended to densely.
    pub fn dense_until(&self) -> usize {
        self.dense_below.max(self.tokens)
    }
}

/// Tokens that are always selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// First tokens of the sequence.
    pub sinks: usize,
    /// Last tokens, the newest included.
    pub recent: usize,
}

/// Sizes that decide how many bytes attention reads.
#[derive(Clone, Copy, Debug)]
pub struct KvReads<'a> {
    /// Per layer: the sliding window, if it has one.
    pub windows: &'a [Option<usize>],
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Bytes of one cached number.
    pub elem: usize,
}

/// What one layer does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Dense or selecting.
    pub role: Role,
    /// How tokens are scored.
    pub scorer: Scorer,
    /// How query heads share a token set.
    pub pool: HeadPool,
    /// Scale of partial logits.
    pub scale: LogitScale,
    /// How many tokens are attended to.
    pub budget: Budget,
    /// Which tokens always are.
    pub keep: Keep,
}

impl LayerPlan {
    /// A layer that attends to everything.
    pub fn dense() -> Self {
        LayerPlan {
            role: Role::Dense,
            scorer: Scorer::None,
            pool: HeadPool::SumLogit,
            scale: LogitScale::InvSqrtDim,
            budget: Budget { tokens: 0, dense_below: 0 },
            keep: Keep { sinks: 0, recent: 1 },
        }
    }

    /// Token lists of one sequence: one per KV head, or one per query head without pooling.
    pub fn lists(&self, heads: usize, kv_heads: usize) -> usize {
        if self.pool == HeadPool::None { heads } else { kv_heads }
    }

    /// Summaries of keys that the layer's scorer reads.
    pub fn summary(&self) -> Option<SummaryKind> {
        match self.scorer {
            Scorer::Blocks { summary, .. } => Some(summary),
            _ => None,
        }
    }

    /// The layer is scored with the Forecast of the one before.
    pub fn wants_forecast(&self) -> bool {
        matches!(self.scorer, Scorer::Blocks { query: Query::Forecast, .. })
    }

    /// Bytes that a decode step reads from the cache of this layer, whose sliding window is `window`, for one
    /// sequence of `n` tokens.
    ///
    /// `row` = bytes of one key (or value) of one KV head: dense `2 min(n, window) row` per KV head; else the score
    /// reads and a rebuild's key read over U per KV head, and `2 T_b row` per token list.
    pub fn bytes_read(&self, n: usize, shape: &KvReads<'_>, window: Option<usize>) -> u64 {
        let KvReads { heads, kv_heads, head_dim, elem, .. } = *shape;
        let row = head_dim * elem;
        if self.role == Role::Dense || n <= self.budget.dense_until() {
            let seen = window.map_or(n, |w| w.min(n));
            return (2 * seen * row * kv_heads) as u64;
        }
        let score = match &self.scorer {
            Scorer::None => 0.0,
            Scorer::Exact | Scorer::Custom { .. } => (n * row) as f64,
            Scorer::Sorted { dims, int8: true } => (n * (dims + 4)) as f64,
            Scorer::Sorted { dims, int8: false } => (n * dims * elem) as f64,
            Scorer::Blocks { summary, .. } => blocks::bytes_read(*summary, n, row) as f64,
            Scorer::Dims { dims, refresh, slice, .. } => {
                let every = match refresh {
                    Refresh::Every { every, .. } => *every,
                    Refresh::Adaptive { max, .. } => *max,
                };
                let rebuild = if *slice && every > 0 {
                    (n * (row + dims * elem)) as f64 / f64::from(every)
                } else {
                    0.0
                };
                (n * dims * elem) as f64 + rebuild
            }
        };
        let attended = 2 * self.budget.tokens.min(n) * row * self.lists(heads, kv_heads);
        (score * kv_heads as f64) as u64 + attended as u64
    }

    /// Checks the plan against a layer's head dimension and sliding window.
    ///
    /// # Errors
    /// [`SelectError::BadPlan`].
    pub fn check(
        &self,
        method: &str,
        head_dim: usize,
        window: Option<usize>,
    ) -> Result<(), SelectError> {
        let bad = |reason: String| Err(SelectError::BadPlan { method: method.into(), reason });
        if self.role == Role::Dense {
            return Ok(());
        }
        if let Some(w) = window {
            return bad(format!(
                "it selects tokens in a layer that the model itself limits to its last {w}; make that layer dense"
            ));
        }
        if matches!(self.scorer, Scorer::None)
            && matches!(self.pool, HeadPool::MaxSoftmax | HeadPool::MeanSoftmax)
        {
            return bad("it pools scores but makes none; take the pool sum_logit".into());
        }
        let dims = match &self.scorer {
            Scorer::Sorted { dims, .. } | Scorer::Dims { dims, .. } => Some(*dims),
            _ => None,
        };
        if let Some(d) = dims
            && (d == 0 || d > head_dim || d % 8 != 0)
        {
            return bad(format!(
                "{d} key dimensions of {head_dim}: give a multiple of 8 up to {head_dim}"
            ));
        }
        if let Scorer::Dims { unit, dims, metric, refresh, .. } = &self.scorer {
            let pair = matches!(metric, DimMetric::PairNorm | DimMetric::PairQk);
            let fits = matches!(unit, 1 | 2 | 8 | 16)
                && dims.is_multiple_of(*unit)
                && head_dim.is_multiple_of(*unit);
            if !fits || (pair && *unit < 2) {
                return bad(format!(
                    "unit {unit} does not fit {dims} of {head_dim} dimensions and this metric"
                ));
            }
            if let Refresh::Adaptive { beta, min, max } = refresh
                && !(*beta > 0.0 && *beta <= 1.0 && min <= max)
            {
                return bad("adaptive refresh needs 0 < beta <= 1 and min <= max".into());
            }
        }
        if let Scorer::Blocks { .. } = &self.scorer {
            return blocks::check(self).or_else(bad);
        }
        let forced = self.keep.sinks.checked_add(self.keep.recent);
        if self.keep.recent == 0 || forced.is_none_or(|n| n > self.budget.tokens) {
            return bad(format!(
                "{} sinks and {} recent tokens do not fit a budget of {} tokens",
                self.keep.sinks, self.keep.recent, self.budget.tokens
            ));
        }
        Ok(())
    }
}

/// A method for a whole model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Method name, as on the command line.
    pub method: String,
    /// Fingerprint of the model it was made for; empty fits any model with as many layers.
    pub model: String,
    /// One for each layer of the model.
    pub layers: Vec<LayerPlan>,
}

impl Plan {
    /// Every layer dense.
    pub fn dense(n_layers: usize) -> Self {
        Plan {
            method: "dense".into(),
            model: String::new(),
            layers: vec![LayerPlan::dense(); n_layers],
        }
    }

    /// Checks that the plan fits a model. `windows[l]`: the layer's sliding window; such a layer must be dense.
    ///
    /// # Errors
    /// [`SelectError::WrongModel`], [`SelectError::BadPlan`].
    pub fn check(
        &self,
        model: &str,
        windows: &[Option<usize>],
        head_dim: usize,
    ) -> Result<(), SelectError> {
        let n_layers = windows.len();
        if self.layers.len() != n_layers || (!self.model.is_empty() && self.model != model) {
            return Err(SelectError::WrongModel {
                plan_model: self.model.clone(),
                plan_layers: self.layers.len(),
                model: model.into(),
                layers: n_layers,
            });
        }
        let mut layers = self.layers.iter().zip(windows);
        layers.try_for_each(|(l, window)| l.check(&self.method, head_dim, *window))
    }

    /// Bytes that one decode step reads from the cache for one sequence of `n` tokens.
    pub fn bytes_read(&self, n: usize, shape: &KvReads<'_>) -> u64 {
        let window = |l: usize| shape.windows.get(l).copied().flatten();
        self.layers.iter().enumerate().map(|(l, p)| p.bytes_read(n, shape, window(l))).sum()
    }

    /// Dimensions of the int8 key copy that the plan reads, 0 for none.
    pub fn int8_dims(&self) -> usize {
        let dims = |l: &LayerPlan| match l.scorer {
            Scorer::Sorted { dims, int8: true } => dims,
            _ => 0,
        };
        self.layers.iter().map(dims).max().unwrap_or(0)
    }

    /// Leading dimensions worth storing as their own piece: those that 16-bit sorted scores read.
    pub fn lead(&self) -> Option<usize> {
        self.layers
            .iter()
            .filter_map(|l| match l.scorer {
                Scorer::Sorted { dims, int8: false } => Some(dims),
                _ => None,
            })
            .max()
    }

    /// Summaries of keys that some layer reads, each once.
    pub fn summaries(&self) -> Vec<SummaryKind> {
        let mut kinds = Vec::new();
        for kind in self.layers.iter().filter_map(LayerPlan::summary) {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        kinds
    }

    /// Some layer is scored with a Forecast.
    pub fn wants_forecast(&self) -> bool {
        self.layers.iter().any(LayerPlan::wants_forecast)
    }

    /// Some layer reads key statistics.
    pub fn key_stats(&self) -> bool {
        self.layers
            .iter()
            .any(|l| matches!(l.scorer, Scorer::Dims { metric, .. } if metric.needs_stats()))
    }

    /// Some layer relies on the energy order of key pairs.
    pub fn wants_key_order(&self) -> bool {
        self.layers.iter().any(|l| match l.scorer {
            Scorer::Sorted { .. } => true,
            Scorer::Dims { unit, .. } => unit >= 8,
            _ => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::{MethodSpec, Variant};

    fn select(pool: HeadPool) -> LayerPlan {
        LayerPlan {
            role: Role::Select,
            scorer: Scorer::Exact,
            pool,
            budget: Budget { tokens: 64, dense_below: 0 },
            keep: Keep { sinks: 4, recent: 32 },
            ..LayerPlan::dense()
        }
    }

    /// Mistral 7B: 32 heads over 8, dimension 128, and a window of 4,096 tokens in every layer.
    #[test]
    fn a_layer_with_a_window_reads_no_more_than_that() {
        let windows = [Some(4096); 32];
        let shape = KvReads { windows: &windows, heads: 32, kv_heads: 8, head_dim: 128, elem: 2 };
        let read = |n| Plan::dense(32).bytes_read(n, &shape);
        assert_eq!(read(4096), 32 * 2 * 4096 * 8 * 128 * 2);
        assert_eq!(read(32768), read(4096));
        assert_eq!(read(1000), 32 * 2 * 1000 * 8 * 128 * 2);
        // A method leaves such layers as they are, and half of the layers free of windows.
        let half: Vec<_> = (0..32).map(|l| (l % 2 == 0).then_some(4096)).collect();
        let shape = KvReads { windows: &half, ..shape };
        let spec: MethodSpec = Variant::Sparcas.into();
        let plan = spec.plan("", &half, 128, 32768).unwrap();
        let row = 8 * 128 * 2;
        // Layer 1 is one of the two leading dense layers; 15 others select 1,024 tokens on 32 dimensions.
        let want =
            16 * 2 * 4096 * row + 2 * 32768 * row + 15 * (32768 * 8 * 32 * 2 + 2 * 1024 * row);
        assert_eq!(plan.bytes_read(32768, &shape), want as u64);
    }

    #[test]
    fn a_list_per_query_head_reads_keys_once_and_rows_per_list() {
        let shape = KvReads { windows: &[None], heads: 8, kv_heads: 2, head_dim: 16, elem: 4 };
        let read = |pool| select(pool).bytes_read(100, &shape, None);
        assert_eq!(read(HeadPool::SumLogit), 100 * 64 * 2 + 2 * 64 * 64 * 2);
        assert_eq!(read(HeadPool::None), 100 * 64 * 2 + 2 * 64 * 64 * 8);
    }

    #[test]
    fn plans_that_cannot_run_are_refused() {
        let layer = select(HeadPool::SumLogit);
        let plan =
            |l: LayerPlan| Plan { method: "m".into(), model: String::new(), layers: vec![l] };
        let check = |l: &LayerPlan, window| plan(l.clone()).check("", &[window], 24);
        check(&layer, None).unwrap();
        let reason = |l: &LayerPlan, window| check(l, window).unwrap_err().to_string();
        assert!(reason(&layer, Some(128)).contains("last 128"));
        check(&LayerPlan::dense(), Some(128)).unwrap();
        let pooled = LayerPlan { scorer: Scorer::None, ..select(HeadPool::MaxSoftmax) };
        assert!(reason(&pooled, None).contains("pools scores"));
        let keep = Keep { sinks: usize::MAX, recent: 2 };
        assert!(reason(&LayerPlan { keep, ..layer.clone() }, None).contains("do not fit a budget"));
        // 24 dimensions are no multiple of 16, though 16 of them are.
        let refresh = Refresh::Every { every: 1, phase: 0 };
        let metric = DimMetric::AbsQ;
        let scorer = Scorer::Dims { dims: 16, metric, unit: 16, refresh, slice: false };
        assert!(reason(&LayerPlan { scorer, ..layer }, None).contains("unit 16"));
    }
}
