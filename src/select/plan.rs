//! Plans: a sparse method as data.

use super::SelectError;
use crate::backend::{DimMetric, HeadPool, LogitScale, Refresh};
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

    /// Bytes that a decode step reads from this layer's cache for one sequence of `n` tokens.
    ///
    /// `row` = bytes of one key (or value) of one KV head: dense `2 n row`; else the score reads plus
    /// `2 T_b row`, plus a rebuild's key read over U.
    pub fn bytes_read(&self, n: usize, kv_heads: usize, head_dim: usize, elem: usize) -> u64 {
        let row = head_dim * elem;
        if self.role == Role::Dense || n <= self.budget.dense_until() {
            return (2 * n * row * kv_heads) as u64;
        }
        let score = match &self.scorer {
            Scorer::None => 0.0,
            Scorer::Exact | Scorer::Custom { .. } => (n * row) as f64,
            Scorer::Sorted { dims, int8: true } => (n * (dims + 4)) as f64,
            Scorer::Sorted { dims, int8: false } => (n * dims * elem) as f64,
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
        ((score + (2 * self.budget.tokens.min(n) * row) as f64) * kv_heads as f64) as u64
    }

    /// Checks the plan against the model's head dimension and group size.
    pub fn check(&self, method: &str, head_dim: usize) -> Result<(), SelectError> {
        let bad = |reason: String| Err(SelectError::BadPlan { method: method.into(), reason });
        if self.role == Role::Dense {
            return Ok(());
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
            if !matches!(unit, 1 | 2 | 8 | 16) || dims % unit != 0 || (pair && *unit < 2) {
                return bad(format!("unit {unit} does not fit {dims} dimensions and this metric"));
            }
            if let Refresh::Adaptive { beta, min, max } = refresh
                && !(*beta > 0.0 && *beta <= 1.0 && min <= max)
            {
                return bad("adaptive refresh needs 0 < beta <= 1 and min <= max".into());
            }
        }
        let forced = self.keep.sinks + self.keep.recent;
        if self.keep.recent == 0 || forced > self.budget.tokens {
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

    /// Checks that the plan fits a model.
    pub fn check(&self, model: &str, n_layers: usize, head_dim: usize) -> Result<(), SelectError> {
        if self.layers.len() != n_layers || (!self.model.is_empty() && self.model != model) {
            return Err(SelectError::WrongModel {
                plan_model: self.model.clone(),
                plan_layers: self.layers.len(),
                model: model.into(),
                layers: n_layers,
            });
        }
        self.layers.iter().try_for_each(|l| l.check(&self.method, head_dim))
    }

    /// Bytes that one decode step reads from the cache for one sequence of `n` tokens.
    pub fn bytes_read(&self, n: usize, kv_heads: usize, head_dim: usize, elem: usize) -> u64 {
        self.layers.iter().map(|l| l.bytes_read(n, kv_heads, head_dim, elem)).sum()
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
