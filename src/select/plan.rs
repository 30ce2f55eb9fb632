//! Plans: a sparse method as data.

use super::blocks::{self, Query};
use super::{Budget, Follow, Keep, Role, Scorer, TrainedBlocks};
use crate::backend::{HeadPool, LogitScale, Refresh, SummaryKind};
use serde::{Deserialize, Serialize};

/// Sizes that decide how many bytes attention reads.
#[derive(Clone, Copy, Debug)]
pub struct KvReads<'a> {
    /// Per layer: the sliding window, if it has one.
    pub windows: &'a [Option<usize>],
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head as the cache holds it.
    pub head_dim: usize,
    /// Bytes of one cached number.
    pub elem: usize,
}

/// What a plan must know of the model it is for.
#[derive(Clone, Copy, Debug)]
pub struct ModelShape<'a> {
    /// Fingerprint of the model's files.
    pub model: &'a str,
    /// Per layer: the sliding window, if it has one; such a layer must be dense.
    pub windows: &'a [Option<usize>],
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Blocks that the model was trained to attend to, where its tokens have a content importance (NOSA).
    pub importance: Option<TrainedBlocks>,
}

#[cfg(test)]
impl<'a> ModelShape<'a> {
    /// A model of 32 heads over 8.
    pub(super) fn of_layers(windows: &'a [Option<usize>], head_dim: usize) -> Self {
        ModelShape { model: "m", windows, heads: 32, kv_heads: 8, head_dim, importance: None }
    }
}

/// What one layer does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerPlan {
    /// Dense, selecting, or with the tokens of another layer.
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
    /// Rows of a prompt that share a choice of tokens, their own tile included; None: prompts are read densely.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tile: Option<usize>,
    /// The mean of all values stands for the tokens that are left out, by their estimated share of the attention
    /// (SparQ).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub correct: bool,
    /// Decode steps that share a choice of tokens; the tokens that are appended meanwhile are attended to as well.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub reuse: usize,
}

fn one() -> usize {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde calls it
fn is_one(n: &usize) -> bool {
    *n == 1
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde calls it
fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl LayerPlan {
    /// A layer that attends to everything.
    pub fn dense() -> Self {
        LayerPlan {
            role: Role::Dense,
            scorer: Scorer::None,
            pool: HeadPool::SumLogit,
            scale: LogitScale::InvSqrtDim,
            budget: Budget::fixed(0, 0),
            keep: Keep { sinks: 0, recent: 1 },
            tile: None,
            correct: false,
            reuse: 1,
        }
    }

    /// A prompt's tiles are scored together, after a softmax per row, and not row by row as a decode step's queries.
    pub fn scores_tiles(&self) -> bool {
        let sums = matches!(self.pool, HeadPool::MeanSoftmax | HeadPool::AllSoftmax);
        self.selects() && self.scorer == Scorer::Exact && sums
    }

    /// The layer has every logit at hand that it chooses by: attention to every token has just made them.
    pub fn scores_densely(&self) -> bool {
        self.role == Role::DenseAnchor && self.scorer == Scorer::Exact
    }

    /// The layer attends to some of the tokens only, in sequences longer than its budget's
    /// [`dense_until`](Budget::dense_until).
    pub fn sparse(&self) -> bool {
        !matches!(self.role, Role::Dense | Role::DenseAnchor)
    }

    /// The layer makes token lists with a scorer of its own.
    pub fn selects(&self) -> bool {
        matches!(self.role, Role::Select | Role::DenseAnchor)
    }

    /// Token lists that the layer makes for one sequence: one per KV head, one per query head without pooling, or
    /// one for all.
    pub fn lists(&self, heads: usize, kv_heads: usize) -> usize {
        self.pool.lists(heads, kv_heads)
    }

    /// Its own scorer, and that of what it is handed.
    pub fn scorers(&self) -> impl Iterator<Item = &Scorer> {
        let refine = match &self.role {
            Role::Reuse { refine, .. } => refine.as_ref(),
            _ => None,
        };
        std::iter::once(&self.scorer).chain(refine.map(|r| &r.scorer))
    }

    /// Summaries of keys that the layer's scorer reads.
    pub fn summary(&self) -> Option<SummaryKind> {
        match self.scorer {
            Scorer::Blocks { summary, .. } => Some(summary),
            _ => None,
        }
    }

    /// The layer ranks blocks by the content importance of their tokens.
    pub fn wants_importance(&self) -> bool {
        matches!(self.scorer, Scorer::Blocks { by_query: Some(_), .. })
    }

    /// The layer is scored with the Forecast of the one before.
    pub fn wants_forecast(&self) -> bool {
        matches!(self.scorer, Scorer::Blocks { query: Query::Forecast, .. })
    }

    /// Bytes that a decode step reads from the cache of this layer, whose sliding window is `window`, for one
    /// sequence of `n` tokens.
    ///
    /// `row` = bytes of one key (or value) of one KV head: dense `2 min(n, window) row` per KV head; else the score
    /// reads and a rebuild's key read over U per KV head, and `2 T_b row` per token list (per KV head where lists
    /// are shared). A layer that refines reads the scored dimensions of its candidates. Where the mass of the scores
    /// ends a list, this is the most that it can be. Where steps share a choice: the mean over these steps.
    pub fn bytes_read(&self, n: usize, shape: &KvReads<'_>, window: Option<usize>) -> u64 {
        let KvReads { heads, kv_heads, head_dim, elem, .. } = *shape;
        let row = head_dim * elem;
        let seen = window.map_or(n, |w| w.min(n));
        let dense = (2 * seen * row * kv_heads) as u64;
        if self.role == Role::Dense || n <= self.budget.dense_until() {
            return dense;
        }
        let refine = match &self.role {
            Role::Reuse { refine, .. } => refine.as_ref(),
            _ => None,
        };
        // Between two choices lists grow by a token a step.
        let grown = |tokens: usize| tokens.saturating_add((self.reuse.max(1) - 1) / 2).min(n);
        let score = match refine {
            Some(refine) => score_bytes(&refine.scorer, grown(refine.candidates), row, elem),
            // The logits of its attention.
            None if self.scores_densely() => 0.0,
            None => score_bytes(&self.scorer, n, row, elem) / self.reuse.max(1) as f64,
        };
        // The mean value is kept in f32.
        let mean = if self.correct { 4 * head_dim } else { 0 };
        let score = ((score + mean as f64) * kv_heads as f64) as u64;
        if self.role == Role::DenseAnchor {
            return dense + score;
        }
        let per_head = self.pool == HeadPool::None && (self.selects() || refine.is_some());
        let lists = if per_head { heads } else { kv_heads };
        let tokens = self.budget.tokens_at(n);
        let tokens = if refine.is_some() { tokens } else { grown(tokens) };
        score + (2 * tokens * row * lists) as u64
    }
}

/// Bytes of one KV head's keys that scoring `n` tokens reads; `row` bytes a key, `elem` a number.
fn score_bytes(scorer: &Scorer, n: usize, row: usize, elem: usize) -> f64 {
    match scorer {
        // The hash of a position does not depend on its key.
        Scorer::None | Scorer::Random { .. } => 0.0,
        Scorer::Static { dims, bits: 16 } | Scorer::Components { dims } => (n * dims * elem) as f64,
        // And the scale.
        Scorer::Static { dims, bits } => (n * (dims * bits / 8 + 4)) as f64,
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
    }
}

/// A method for a whole model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Method name, as on the command line.
    pub method: String,
    /// Fingerprint of the model it was made for; empty fits any model with as many layers.
    pub model: String,
    /// Longest text that it was made for, by which budgets go; 0: not said.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub context: usize,
    /// One for each layer of the model.
    pub layers: Vec<LayerPlan>,
}

impl Plan {
    /// Every layer dense.
    pub fn dense(n_layers: usize) -> Self {
        Plan {
            method: "dense".into(),
            model: String::new(),
            context: 0,
            layers: vec![LayerPlan::dense(); n_layers],
        }
    }

    /// Bytes that one decode step reads from the cache for one sequence of `n` tokens.
    pub fn bytes_read(&self, n: usize, shape: &KvReads<'_>) -> u64 {
        let window = |l: usize| shape.windows.get(l).copied().flatten();
        self.layers.iter().enumerate().map(|(l, p)| p.bytes_read(n, shape, window(l))).sum()
    }

    /// [`Plan::bytes_read`] is a bound: in some layer the mass of the scores ends lists before their budget.
    pub fn reads_at_most(&self) -> bool {
        self.layers.iter().any(|l| matches!(l.budget.follow, Some(Follow::Mass { .. })))
    }

    fn scorers(&self) -> impl Iterator<Item = &Scorer> {
        self.layers.iter().flat_map(LayerPlan::scorers)
    }

    /// Dimensions of the int8 key copy that the plan reads, 0 for none.
    pub fn int8_dims(&self) -> usize {
        let dims = |s: &Scorer| match s {
            Scorer::Sorted { dims, int8: true } => *dims,
            _ => 0,
        };
        self.scorers().map(dims).max().unwrap_or(0)
    }

    /// Leading dimensions worth storing as their own piece: those that 16-bit sorted scores read.
    pub fn lead(&self) -> Option<usize> {
        let dims = |s: &Scorer| match s {
            Scorer::Sorted { dims, int8: false } => Some(*dims),
            _ => None,
        };
        self.scorers().filter_map(dims).max()
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

    /// Some layer reads prompts sparsely.
    pub fn reads_prompts_sparsely(&self) -> bool {
        self.layers.iter().any(|l| l.tile.is_some())
    }

    /// Some layer is scored with a Forecast.
    pub fn wants_forecast(&self) -> bool {
        self.layers.iter().any(LayerPlan::wants_forecast)
    }

    /// Some layer reads key statistics.
    pub fn key_stats(&self) -> bool {
        self.scorers().any(|s| matches!(s, Scorer::Dims { metric, .. } if metric.needs_stats()))
    }

    /// Some layer needs the sums of all values.
    pub fn value_stats(&self) -> bool {
        self.layers.iter().any(|l| l.correct)
    }

    /// Some layer reads what was measured of the model's queries and keys ([`KeyProfile`](super::KeyProfile)).
    pub fn wants_profile(&self) -> bool {
        self.scorers().any(|s| matches!(s, Scorer::Static { .. } | Scorer::Components { .. }))
    }

    /// Some layer relies on the energy order of key pairs.
    pub fn wants_key_order(&self) -> bool {
        self.scorers().any(|s| match s {
            Scorer::Sorted { .. } => true,
            Scorer::Dims { unit, .. } => *unit >= 8,
            _ => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::{MethodSpec, Refine, Variant};

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
        let model = ModelShape::of_layers(&half, 128);
        let plan = spec.plan(&model, 32768).unwrap();
        let row = 8 * 128 * 2;
        // Layer 1 is one of the two leading dense layers; 15 others select 1,024 tokens on 32 dimensions.
        let want =
            16 * 2 * 4096 * row + 2 * 32768 * row + 15 * (32768 * 8 * 32 * 2 + 2 * 1024 * row);
        assert_eq!(plan.bytes_read(32768, &shape), want as u64);
        // Where lists may end sooner, that is a bound.
        let trimmed = MethodSpec { mass: Some(0.9), ..spec }.plan(&model, 32768).unwrap();
        assert_eq!(trimmed.bytes_read(32768, &shape), want as u64);
        assert!(trimmed.reads_at_most() && !plan.reads_at_most());
    }

    /// 8 query heads over 2 KV heads of 16 f32 numbers: rows of 64 bytes.
    #[test]
    fn every_role_reads_what_it_says() {
        let shape = KvReads { windows: &[None], heads: 8, kv_heads: 2, head_dim: 16, elem: 4 };
        let select = LayerPlan {
            role: Role::Select,
            scorer: Scorer::Exact,
            budget: Budget::fixed(64, 0),
            keep: Keep { sinks: 4, recent: 32 },
            ..LayerPlan::dense()
        };
        let read = |l: &LayerPlan| l.bytes_read(100, &shape, None);
        let pooled = |pool| LayerPlan { pool, ..select.clone() };
        assert_eq!(read(&select), 100 * 64 * 2 + 2 * 64 * 64 * 2);
        assert_eq!(read(&pooled(HeadPool::AllSoftmax)), read(&select));
        assert_eq!(read(&pooled(HeadPool::None)), 100 * 64 * 2 + 2 * 64 * 64 * 8);
        let anchor = LayerPlan { role: Role::DenseAnchor, ..select.clone() };
        assert_eq!(read(&anchor), 2 * 100 * 64 * 2);
        let sorted = Scorer::Sorted { dims: 8, int8: false };
        assert_eq!(read(&LayerPlan { scorer: sorted, ..anchor }), 2 * 100 * 64 * 2 + 100 * 32 * 2);
        let reuse = |refine, budget| LayerPlan {
            role: Role::Reuse { from: 0, head_map: vec![0, 1], refine },
            scorer: Scorer::None,
            budget,
            ..select.clone()
        };
        assert_eq!(read(&reuse(None, select.budget)), 2 * 64 * 64 * 2);
        // A choice for five steps: a fifth of the scores, two tokens more on average.
        let held = LayerPlan { reuse: 5, ..select.clone() };
        assert_eq!(read(&held), 100 * 64 * 2 / 5 + 2 * 66 * 64 * 2);
        let refine = Refine { candidates: 80, scorer: Scorer::Sorted { dims: 8, int8: false } };
        assert_eq!(read(&reuse(Some(refine), select.budget)), 80 * 8 * 4 * 2 + 2 * 64 * 64 * 2);
        let share = Some(crate::backend::Share { permille: 500, at_least: 10 });
        assert_eq!(read(&reuse(None, Budget { share, ..select.budget })), 2 * 50 * 64 * 2);
    }
}
