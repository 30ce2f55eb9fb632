//! Whether a plan can run: each layer by itself, and layers that use each other's tokens.

use super::{Follow, Keep, LayerPlan, ModelShape, Plan, Refine, Role, Scorer, SelectError, blocks};
use crate::backend::{DimMetric, HeadPool, Refresh};

/// What is wrong, as the end of a sentence.
type Checked = Result<(), String>;

fn ensure(ok: bool, reason: impl FnOnce() -> String) -> Checked {
    if ok { Ok(()) } else { Err(reason()) }
}

impl LayerPlan {
    /// The layer by itself, against the model's head dimension and the layer's sliding window.
    fn check_alone(&self, head_dim: usize, window: Option<usize>) -> Checked {
        if self.role == Role::Dense {
            return Ok(());
        }
        if let Some(w) = window {
            return Err(format!(
                "it selects tokens in a layer that the model itself limits to its last {w}; make that layer dense"
            ));
        }
        let refine = match &self.role {
            Role::Reuse { refine, .. } => {
                ensure(self.scorer == Scorer::None, || {
                    "a layer that reuses tokens has a scorer of its own; give it the scorer none"
                        .into()
                })?;
                refine.as_ref()
            }
            _ => {
                ensure(self.scorer != Scorer::None || !self.pool.softmax(), || {
                    "it pools scores but makes none; take the pool sum-logit".into()
                })?;
                None
            }
        };
        check_scorer(&self.scorer, head_dim)?;
        self.check_tile()?;
        let token_logits = matches!(
            self.scorer,
            Scorer::Exact
                | Scorer::Sorted { .. }
                | Scorer::Dims { .. }
                | Scorer::Static { .. }
                | Scorer::Components { .. }
        );
        ensure(!self.correct || (self.role == Role::Select && token_logits), || {
            "the mean value can only stand for tokens that the layer itself has scored one by one"
                .into()
        })?;
        self.check_follow()?;
        self.check_reuse()?;
        self.check_union()?;
        if self.summary().is_some() {
            return blocks::check(self);
        }
        let Keep { sinks, recent } = self.keep;
        let budget = &self.budget;
        if let Some(s) = budget.share {
            ensure(s.permille <= 1000, || format!("a share of {} thousandths", s.permille))?;
        }
        let least = budget.least();
        let forced = sinks.checked_add(recent);
        ensure(recent > 0, || {
            "0 recent tokens: the newest one is always kept, take 1 or more".into()
        })?;
        ensure(forced.is_some_and(|n| n <= least), || {
            format!(
                "{sinks} sinks and {recent} recent tokens do not fit a budget of {least} tokens: {}",
                forced.map_or_else(
                    || "keep fewer".into(),
                    |n| format!("give {n} or more, or keep fewer")
                )
            )
        })?;
        let Some(Refine { candidates, scorer }) = refine else { return Ok(()) };
        check_scorer(scorer, head_dim)?;
        ensure(matches!(scorer, Scorer::Exact | Scorer::Sorted { int8: false, .. }), || {
            "candidates are scored exactly or on leading dimensions of the keys, nothing else"
                .into()
        })?;
        ensure(*candidates > budget.tokens, || {
            format!("{candidates} candidates for a budget of {} tokens: give more", budget.tokens)
        })
    }
}

/// Most rows of a prompt's tile.
const MAX_TILE: usize = 256;

impl LayerPlan {
    /// What can choose tokens for the rows of a prompt.
    fn check_tile(&self) -> Checked {
        let Some(tile) = self.tile else { return Ok(()) };
        ensure((1..=MAX_TILE).contains(&tile), || {
            format!("tiles of {tile} prompt tokens: give 1 to {MAX_TILE}")
        })?;
        if let Role::Reuse { refine, .. } = &self.role {
            return ensure(refine.is_none(), || {
                "layers that refine candidates read prompts densely; leave the tile out".into()
            });
        }
        let rows = matches!(
            self.scorer,
            Scorer::None | Scorer::Exact | Scorer::Sorted { .. } | Scorer::Blocks { .. }
        );
        ensure(rows, || {
            "its scorer works for the queries of decode steps only; leave the tile out".into()
        })?;
        ensure(!self.correct && self.budget.follow.is_none(), || {
            "mean values and budgets that follow the scores are for decode steps; leave the tile out".into()
        })?;
        let shared = self.scorer == Scorer::None || self.scores_tiles();
        ensure(tile == 1 || shared, || {
            "only exact scores pooled by mean-softmax or all-softmax are shared by the rows of a tile; take tile 1"
                .into()
        })?;
        let (Keep { sinks, .. }, least) = (self.keep, self.budget.least());
        ensure(sinks.saturating_add(tile) <= least, || {
            format!("{sinks} sinks and a tile of {tile} do not fit a budget of {least} tokens")
        })
    }
}

impl LayerPlan {
    /// A budget that follows the scores is that of a layer that has some, and keeps them.
    fn check_follow(&self) -> Checked {
        let Some(follow) = self.budget.follow else { return Ok(()) };
        let scored = !matches!(self.scorer, Scorer::None | Scorer::Blocks { .. });
        ensure(self.role == Role::Select && scored && self.budget.share.is_none(), || {
            "its budget follows scores of tokens, which it does not make for itself alone; give a number of tokens"
                .into()
        })?;
        let tokens = self.budget.tokens;
        match follow {
            Follow::Mass { permille, .. } => ensure((1..=1000).contains(&permille), || {
                format!("{permille} thousandths of the mass of its scores: give 1 to 1000")
            }),
            Follow::Shared { mean, at_least } => {
                ensure(mean <= tokens && at_least as usize <= mean, || {
                    format!("{at_least} tokens at least, {mean} on average, {tokens} at most")
                })
            }
        }
    }
}

/// Most decode steps that share a choice.
const MAX_REUSE: usize = 1024;

impl LayerPlan {
    fn check_reuse(&self) -> Checked {
        let steps = self.reuse;
        ensure((1..=MAX_REUSE).contains(&steps), || {
            format!("{steps} decode steps for a choice of tokens: give 1 to {MAX_REUSE}")
        })?;
        ensure(steps == 1 || !self.correct, || {
            "the mean value needs the scores of every step; choose in every step, or leave the correction out"
                .into()
        })
    }

    /// What can be ranked head by head.
    fn check_union(&self) -> Checked {
        if self.pool != HeadPool::Union {
            return Ok(());
        }
        let ranked = self.budget.follow.is_none() && !self.correct;
        let refines = matches!(self.role, Role::Reuse { refine: Some(_), .. });
        ensure(ranked && !refines && self.scorer != Scorer::None || self.takes_lists(), || {
            "a union of rankings is of scores of all tokens, one by one, and has no shares of mass; take another pool"
                .into()
        })
    }

    /// Another layer's lists as they are.
    fn takes_lists(&self) -> bool {
        matches!(self.role, Role::Reuse { refine: None, .. })
    }
}

fn check_scorer(scorer: &Scorer, head_dim: usize) -> Checked {
    if let Scorer::Sorted { dims, .. }
    | Scorer::Dims { dims, .. }
    | Scorer::Static { dims, .. }
    | Scorer::Components { dims } = scorer
    {
        ensure(*dims > 0 && *dims <= head_dim && dims.is_multiple_of(8), || {
            format!("{dims} key dimensions of {head_dim}: give a multiple of 8 up to {head_dim}")
        })?;
    }
    if let Scorer::Static { bits, .. } = scorer {
        ensure(matches!(bits, 4 | 8 | 16), || {
            format!("a slice of {bits} bits a number: give 4, 8 or 16 (those of the cache)")
        })?;
    }
    let Scorer::Dims { unit, dims, metric, refresh, .. } = scorer else { return Ok(()) };
    let pair = matches!(metric, DimMetric::PairNorm | DimMetric::PairQk);
    let fits = matches!(unit, 1 | 2 | 8 | 16)
        && dims.is_multiple_of(*unit)
        && head_dim.is_multiple_of(*unit);
    ensure(fits && !(pair && *unit < 2), || {
        format!("unit {unit} does not fit {dims} of {head_dim} dimensions and this metric")
    })?;
    let Refresh::Adaptive { beta, min, max } = refresh else { return Ok(()) };
    ensure(*beta > 0.0 && *beta <= 1.0 && min <= max, || {
        "adaptive refresh needs 0 < beta <= 1 and min <= max".into()
    })
}

impl Plan {
    /// Checks that the plan fits a model.
    ///
    /// # Errors
    /// [`SelectError::WrongModel`], [`SelectError::BadPlan`].
    pub fn check(&self, m: &ModelShape<'_>) -> Result<(), SelectError> {
        let n_layers = m.windows.len();
        if self.layers.len() != n_layers || (!self.model.is_empty() && self.model != m.model) {
            return Err(SelectError::WrongModel {
                plan_model: self.model.clone(),
                plan_layers: self.layers.len(),
                model: m.model.into(),
                layers: n_layers,
            });
        }
        for (l, (layer, window)) in self.layers.iter().zip(m.windows).enumerate() {
            let importance = || {
                ensure(m.importance.is_some() || !layer.wants_importance(), || {
                    "it ranks blocks by the content importance of their tokens, which only NOSA models have; take \
                     infllm2 or sparda"
                        .into()
                })
            };
            let checked = layer.check_alone(m.head_dim, *window);
            checked
                .and_then(|()| importance())
                .map_err(|reason| format!("layer {l}: {reason}"))
                .and_then(|()| self.check_taken(l, m))
                .map_err(|reason| SelectError::BadPlan { method: self.method.clone(), reason })?;
        }
        Ok(())
    }

    /// Layer `l` and the layer whose tokens it takes.
    fn check_taken(&self, l: usize, m: &ModelShape<'_>) -> Checked {
        let layer = &self.layers[l];
        let Role::Reuse { from, head_map, refine } = &layer.role else { return Ok(()) };
        let anchor = self.layers[..l].get(*from).filter(|a| a.selects()).ok_or_else(|| {
            format!("layer {l} reuses layer {from}, which is no earlier layer that selects tokens")
        })?;
        let (own, theirs) = (layer.budget.dense_until(), anchor.budget.dense_until());
        ensure(own == theirs, || {
            format!(
                "layer {l} is dense up to {own} tokens, layer {from}, which it reuses, up to {theirs}; give both the same"
            )
        })?;
        ensure(layer.reuse == anchor.reuse, || {
            format!(
                "layer {l} shares choices over {} steps, layer {from}, which makes them, over {}; give both the same",
                layer.reuse, anchor.reuse
            )
        })?;
        ensure(head_map.len() == m.kv_heads, || {
            format!(
                "the head map of layer {l} has {} entries for {} KV heads",
                head_map.len(),
                m.kv_heads
            )
        })?;
        ensure(layer.tile.is_none() || layer.tile == anchor.tile, || {
            format!("layer {l} reads prompts in other tiles than layer {from}, which it reuses")
        })?;
        let lists = anchor.lists(m.heads, m.kv_heads);
        if let Some(entry) = head_map.iter().find(|&&e| usize::from(e) >= lists) {
            return Err(format!(
                "the head map of layer {l} names list {entry}, layer {from} makes {lists} (numbered from 0)"
            ));
        }
        let Some(refine) = refine else {
            let same = (layer.budget.tokens, layer.budget.share)
                == (anchor.budget.tokens, anchor.budget.share);
            return ensure(same, || {
                format!("layer {l} attends to the tokens of layer {from} and must have its budget")
            });
        };
        let no_ranks =
            matches!(anchor.scorer, Scorer::None | Scorer::Custom { .. } | Scorer::Blocks { .. });
        ensure(!no_ranks, || {
            format!(
                "layer {from} hands down no candidates: it has no built-in scores of tokens to rank them by"
            )
        })?;
        let kept = layer.keep.sinks <= anchor.keep.sinks && layer.keep.recent <= anchor.keep.recent;
        ensure(kept, || {
            format!("layer {l} keeps more sinks or recent tokens than layer {from} hands down")
        })?;
        let one_list = head_map.windows(2).all(|w| w[0] == w[1]);
        ensure(!layer.pool.shared() || one_list, || {
            format!("layer {l} makes one list for all heads, but its head map names several")
        })?;
        // One list of candidates for each anchor.
        let other = self.layers[..l].iter().find_map(|o| match &o.role {
            Role::Reuse { from: f, refine: Some(r), .. } if f == from => Some(r.candidates),
            _ => None,
        });
        ensure(other.is_none_or(|c| c == refine.candidates), || {
            format!(
                "layers that refine the tokens of layer {from} ask for different numbers of candidates"
            )
        })
    }
}

#[cfg(test)]
#[path = "tests/check.rs"]
mod tests;
