//! Methods whose layers share token lists: a few anchors choose, the layers after them reuse (Kascade, OmniKV,
//! LessIsMore), and may score what they are handed once more.
//!
//! Without a calibrated plan the anchors are spaced evenly and every KV head takes the list of its namesake.

use super::blocks::Query;
use super::catalog::Variant;
use super::quest::whole_blocks;
use super::{Budget, Keep, LayerPlan, MethodSpec, ModelShape, Refine, Role, Scorer, SelectError};
use crate::backend::{DimMetric, HeadPool, LogitScale, Refresh, Share, SummaryKind};
use serde::{Deserialize, Serialize};

/// Which layers are anchors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Anchors {
    /// So many, evenly spaced from the first layer on.
    Count(usize),
    /// These, ascending.
    Layers(Vec<usize>),
}

impl std::str::FromStr for Anchors {
    type Err = String;

    /// A number of anchors (`5`), or their layers (`0+2+8+13+14`).
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = |_| format!("{s:?} is no number of anchors and no list of layers (0+2+8)");
        if !s.contains('+') {
            return s.parse().map(Anchors::Count).map_err(bad);
        }
        let layers = s.split('+').map(str::parse).collect::<Result<_, _>>();
        layers.map(Anchors::Layers).map_err(bad)
    }
}

/// How anchors score tokens, where they do not take the exact logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnchorScorer {
    /// Exact logits.
    Exact,
    /// The leading dimensions of energy-sorted keys.
    Sorted,
    /// Their int8 copy.
    Int8,
    /// Dimensions that the query chooses in every step, read from the keys (SparQ).
    Dims,
    /// Pages of 16 tokens by the bounds of their keys (Quest).
    Blocks,
}

/// Layers as options name them: `0+2+8`.
fn listed(layers: &[usize]) -> String {
    layers.iter().map(usize::to_string).collect::<Vec<_>>().join("+")
}

/// The layers of a published list, given for 32 layers, among those that are free. Few layers have one filter.
fn spread(free: &[usize], of_32: &[usize]) -> Vec<usize> {
    let at = |&f: &usize| free[(f * free.len() + 16) / 32];
    match free.len() {
        0 => Vec::new(),
        1..8 => vec![free[0]],
        _ => of_32.iter().map(at).collect(),
    }
}

impl MethodSpec {
    fn bad(&self, reason: String) -> SelectError {
        SelectError::BadPlan { method: self.name().into(), reason }
    }

    /// Layers of a method with anchors.
    ///
    /// The first anchor attends to everything (its attention is the flattest), the others to what they choose; every
    /// layer in between reuses the nearest anchor before it. The filter layers of OmniKV and LessIsMore are all dense.
    pub(super) fn anchored(
        &self,
        m: &ModelShape<'_>,
        context: usize,
    ) -> Result<Vec<LayerPlan>, SelectError> {
        let anchors = self.anchor_layers(m.windows)?;
        let refined = self.variant == Variant::Refined;
        let filters = self.variant.filters();
        let scorer = self.anchor_scorer(m.head_dim);
        let mut budget = self.anchor_budget(context)?;
        let blocks = matches!(scorer, Scorer::Blocks { .. });
        if let Scorer::Blocks { unit, .. } = scorer {
            budget = Budget::fixed(whole_blocks(budget.tokens, unit), budget.dense_below);
        }
        let pool = match self.variant {
            Variant::KascadePooled => HeadPool::AllSoftmax,
            Variant::Omnikv => HeadPool::AnySoftmax,
            Variant::Lessismore => self.pool.unwrap_or(HeadPool::AnySoftmax),
            _ => {
                self.pool.unwrap_or(if blocks { HeadPool::SumLogit } else { HeadPool::MeanSoftmax })
            }
        };
        let (sinks, recent) = match self.variant {
            Variant::Refined => (4, 32),
            // A quarter of the budget, the sinks in it.
            Variant::Lessismore => (4, (budget.tokens / 4).saturating_sub(4).max(1)),
            // As published, no token is forced but the newest, which is what `Keep` asks for at least.
            _ => (0, 1),
        };
        let anchor = LayerPlan {
            role: Role::Select,
            tile: None,
            pool,
            scale: match scorer {
                Scorer::Exact | Scorer::Blocks { .. } => LogitScale::InvSqrtDim,
                _ => LogitScale::Coverage,
            },
            scorer,
            budget,
            keep: Keep {
                sinks: self.sinks.unwrap_or(sinks),
                recent: self.recent.unwrap_or(recent),
            },
            correct: false,
            reuse: 1,
        };
        let tokens = anchor.budget.tokens;
        let refine = match self.variant {
            Variant::Refined => Some(Refine {
                candidates: self.candidates.unwrap_or(tokens.saturating_mul(4)),
                scorer: Scorer::Sorted { dims: self.leading_dims(m.head_dim), int8: false },
            }),
            v => {
                let candidates = self.candidates.filter(|_| v.takes("candidates"));
                candidates.map(|candidates| Refine { candidates, scorer: Scorer::Exact })
            }
        };
        let scale = if refined { LogitScale::Coverage } else { LogitScale::InvSqrtDim };
        let head_map = self.head_map(&anchor, m)?;
        let layer = |l: usize| {
            let before = anchors.iter().copied().take_while(|&a| a <= l).last();
            match before {
                // OmniKV: the layer behind a filter hides the time that fetching takes.
                Some(from) if self.variant == Variant::Omnikv && from + 1 == l => {
                    LayerPlan::dense()
                }
                Some(from) if m.windows[l].is_none() => {
                    let first = anchors.first() == Some(&l);
                    let role = match from == l {
                        true if (first || filters.is_some()) && !blocks => {
                            // It has the exact logits of every token anyway.
                            let (scorer, scale) = (Scorer::Exact, LogitScale::InvSqrtDim);
                            let role = Role::DenseAnchor;
                            return LayerPlan { role, scorer, scale, ..anchor.clone() };
                        }
                        true if first => Role::DenseAnchor,
                        true => Role::Select,
                        false => {
                            let (head_map, refine) = (head_map.clone(), refine.clone());
                            let role = Role::Reuse { from, head_map, refine };
                            return LayerPlan {
                                role,
                                scorer: Scorer::None,
                                scale,
                                ..anchor.clone()
                            };
                        }
                    };
                    LayerPlan { role, ..anchor.clone() }
                }
                _ => LayerPlan::dense(),
            }
        };
        Ok((0..m.windows.len()).map(layer).collect())
    }

    /// Every KV head takes the list of its namesake, or the one that there is.
    fn head_map(&self, anchor: &LayerPlan, m: &ModelShape<'_>) -> Result<Vec<u8>, SelectError> {
        let lists = anchor.lists(m.heads, m.kv_heads);
        let map: Result<Vec<u8>, _> =
            (0..m.kv_heads).map(|h| u8::try_from(h * lists / m.kv_heads)).collect();
        map.map_err(|_| self.bad(format!("{lists} token lists; head maps name 256 at most")))
    }

    /// How anchors score tokens.
    fn anchor_scorer(&self, head_dim: usize) -> Scorer {
        let dims = self.leading_dims(head_dim);
        let given = self.scorer.filter(|_| self.variant.takes("scorer"));
        match given.unwrap_or(AnchorScorer::Exact) {
            AnchorScorer::Exact => Scorer::Exact,
            AnchorScorer::Sorted => Scorer::Sorted { dims, int8: false },
            AnchorScorer::Int8 => Scorer::Sorted { dims, int8: true },
            AnchorScorer::Dims => Scorer::Dims {
                dims,
                metric: DimMetric::AbsQ,
                unit: 1,
                refresh: Refresh::Every { every: 1, phase: 0 },
                slice: false,
            },
            AnchorScorer::Blocks => Scorer::Blocks {
                summary: SummaryKind::Bounds { page: 16 },
                unit: 16,
                query: Query::Own,
                by_query: None,
            },
        }
    }

    fn anchor_layers(&self, windows: &[Option<usize>]) -> Result<Vec<usize>, SelectError> {
        let free: Vec<usize> = (0..windows.len()).filter(|&l| windows[l].is_none()).collect();
        if let (None, Some(of_32)) = (&self.anchors, self.variant.filters()) {
            return Ok(spread(&free, of_32));
        }
        match &self.anchors {
            Some(Anchors::Layers(layers)) => {
                if layers.windows(2).any(|w| w[0] >= w[1]) {
                    return Err(self
                        .bad(format!("anchors {}: give them in ascending order", listed(layers))));
                }
                match layers.iter().find(|l| !free.contains(l)) {
                    Some(l) => Err(self.bad(format!(
                        "layer {l} cannot be an anchor: it is no layer of this model, or one with a sliding window"
                    ))),
                    None => Ok(layers.clone()),
                }
            }
            Some(Anchors::Count(n)) if *n == 0 || *n > free.len() => {
                Err(self.bad(format!("{n} anchor layers: give 1 to {}", free.len())))
            }
            // One in seven: 5 of the 32 layers of Llama 3.1 8B, as published.
            count => {
                let n = match count {
                    Some(Anchors::Count(n)) => *n,
                    _ => free.len().div_ceil(7),
                };
                Ok((0..n).map(|i| free[i * free.len() / n]).collect())
            }
        }
    }

    fn anchor_budget(&self, context: usize) -> Result<Budget, SelectError> {
        if matches!(self.variant, Variant::Refined | Variant::Lessismore) {
            let dense_below = self.dense_below.unwrap_or(2048);
            return Ok(Budget::fixed(self.budget_tokens(context), dense_below));
        }
        let dense_below = self.dense_below.unwrap_or(0);
        if let Some(tokens) = self.budget {
            return Ok(Budget::fixed(tokens, dense_below));
        }
        let percent = self.percent.unwrap_or(10.0);
        if !(percent > 0.0 && percent <= 100.0) {
            return Err(
                self.bad(format!("{percent} percent of the tokens: more than 0, at most 100"))
            );
        }
        let least = self.budget_min.unwrap_or(128);
        let share = Share {
            permille: ((percent * 10.0).round() as u32).max(1),
            at_least: u32::try_from(least)
                .map_err(|_| self.bad(format!("at least {least} tokens is too many")))?,
        };
        // A tile finds itself also in a context shorter than it.
        let tile = self.tile.unwrap_or(0).saturating_add(self.sinks.unwrap_or(0));
        let room = Budget::fixed(share.of(context).min(context.max(tile)), dense_below);
        Ok(Budget { share: Some(share), ..room })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::Plan;

    fn plan(spec: &str, windows: &[Option<usize>]) -> Result<Plan, SelectError> {
        let m = ModelShape {
            model: "m",
            windows,
            heads: 8,
            kv_heads: 4,
            head_dim: 64,
            importance: None,
        };
        spec.parse::<MethodSpec>()?.plan(&m, 8192)
    }

    fn roles(spec: &str, windows: &[Option<usize>]) -> Result<Vec<Role>, SelectError> {
        let plan = plan(spec, windows)?;
        Ok(plan.layers.into_iter().map(|l| l.role).collect())
    }

    fn reuse(from: usize) -> Role {
        Role::Reuse { from, head_map: vec![0, 1, 2, 3], refine: None }
    }

    #[test]
    fn layers_reuse_the_nearest_anchor_before_them() {
        use Role::{Dense, DenseAnchor, Select};
        let got = roles("kascade:anchors=0+2", &[None; 4]).unwrap();
        assert_eq!(got, [DenseAnchor, reuse(0), Select, reuse(2)]);
        // Evenly spaced over the layers that have no window; layers before the first anchor stay dense.
        let windows = [Some(64), None, Some(64), None, None, None];
        let got = roles("kascade:anchors=2", &windows).unwrap();
        assert_eq!(got, [Dense, DenseAnchor, Dense, reuse(1), Select, reuse(4)]);
        let got = roles("kascade:anchors=1+2", &[None; 4]).unwrap();
        assert_eq!(got, [Dense, DenseAnchor, Select, reuse(2)]);
        let anchors = |n: usize| {
            let roles = roles("kascade", &vec![None; n]).unwrap();
            roles.iter().filter(|r| matches!(r, Select | DenseAnchor)).count()
        };
        assert_eq!([1, 30, 32, 36].map(anchors), [1, 5, 5, 6]);
        for (spec, part) in [
            ("kascade:anchors=0", "0 anchor layers"),
            ("kascade:anchors=5", "5 anchor layers: give 1 to 4"),
            ("kascade:anchors=0+4", "layer 4 cannot be an anchor"),
            ("kascade:anchors=2+1", "ascending"),
            ("kascade:percent=0", "0 percent"),
            ("kascade:percent=NaN", "NaN percent"),
            ("kascade:candidates=100", "100 candidates"),
        ] {
            let e = roles(spec, &[None; 4]).unwrap_err().to_string();
            assert!(e.contains(part), "{spec}: {e}");
        }
        assert!("kascade:anchors=0+x".parse::<MethodSpec>().is_err());
    }

    #[test]
    fn filter_layers_are_dense_and_choose_for_those_behind_them() {
        let plan = |spec: &str, n: usize| plan(spec, &vec![None; n]).unwrap();
        let layers = |spec: &str, n: usize, role: fn(&Role) -> bool| -> Vec<usize> {
            let p = plan(spec, n);
            (0..n).filter(|l| role(&p.layers[*l].role)).collect()
        };
        let anchor = |r: &Role| *r == Role::DenseAnchor;
        let dense = |r: &Role| *r == Role::Dense;
        assert_eq!(layers("omnikv", 32, anchor), [2, 8, 18]);
        assert_eq!(layers("omnikv", 32, dense), [0, 1, 3, 9, 19]);
        assert_eq!(layers("lessismore", 32, anchor), [2, 13]);
        assert_eq!(layers("lessismore", 32, dense), [0, 1]);
        assert_eq!(layers("omnikv", 30, anchor), [2, 8, 17]);
        assert_eq!(layers("omnikv:anchors=1+4", 6, dense), [0, 2, 5]);
        assert_eq!(layers("lessismore", 3, anchor), [0]);
        let last = &plan("lessismore:budget=400", 32).layers[31];
        assert_eq!((last.keep, last.pool), (Keep { sinks: 4, recent: 96 }, HeadPool::AnySoftmax));
        assert_eq!(last.lists(8, 4), 1);
    }

    #[test]
    fn anchors_may_score_as_other_methods_do() {
        let scorer = |spec: &str| {
            let m = ModelShape {
                model: "m",
                windows: &[None; 14],
                heads: 8,
                kv_heads: 4,
                head_dim: 64,
                importance: None,
            };
            let plan = spec.parse::<MethodSpec>()?.plan(&m, 8192)?;
            let anchors = plan.layers.into_iter().filter(LayerPlan::selects);
            Ok::<_, SelectError>(anchors.map(|l| l.scorer).collect::<Vec<_>>())
        };
        let (exact, int8) = (Scorer::Exact, Scorer::Sorted { dims: 16, int8: true });
        assert_eq!(scorer("kascade:scorer=exact").unwrap(), [exact.clone(), exact.clone()]);
        assert_eq!(scorer("kascade:scorer=int8").unwrap(), [exact, int8]);
        let blocks = scorer("kascade:scorer=blocks").unwrap();
        assert!(blocks.iter().all(|s| matches!(s, Scorer::Blocks { .. })));
        for refused in ["refined:scorer=blocks", "kascade-pooled:scorer=blocks"] {
            assert!(scorer(refused).is_err(), "{refused}");
        }
        assert!(scorer("kascade:scorer=best").is_err());
    }

    #[test]
    fn all_heads_may_share_one_list() {
        let Role::Reuse { head_map, .. } = &roles("kascade-pooled", &[None; 2]).unwrap()[1] else {
            panic!("no layer reuses");
        };
        assert_eq!(*head_map, [0; 4]);
    }

    #[test]
    fn budgets_are_shares_of_the_length() {
        let m = ModelShape {
            model: "m",
            windows: &[None; 2],
            heads: 8,
            kv_heads: 4,
            head_dim: 64,
            importance: None,
        };
        let budget = |spec: &str, context| {
            spec.parse::<MethodSpec>().unwrap().plan(&m, context).unwrap().layers[1].budget
        };
        let b = budget("kascade", 32_768);
        assert_eq!((b.tokens, b.tokens_at(1000), b.dense_until()), (3276, 128, 128));
        // The room of a list is what the longest sequence needs.
        assert_eq!(budget("kascade", 512).tokens, 128);
        assert_eq!(budget("kascade", 100).tokens, 100);
        assert_eq!(budget("kascade:percent=25:budget-min=64", 512).tokens_at(200), 64);
        assert_eq!(budget("kascade:budget=300", 8192), Budget::fixed(300, 0));
        let refined = budget("refined", 32_768);
        assert_eq!(refined, Budget::fixed(1024, 2048));
    }
}
