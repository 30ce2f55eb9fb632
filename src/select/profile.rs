//! Plans of methods whose layers all choose for themselves: defaults per profile, options on top.

use super::catalog::Variant;
use super::{
    Budget, Follow, Keep, LayerPlan, MethodSpec, ModelShape, Plan, Role, Scorer, SelectError,
    blocks,
};
use crate::backend::{DimMetric, HeadPool, LogitScale, Refresh};

impl MethodSpec {
    /// The plan for a model, run at up to `context` tokens. Layers with a sliding window of the model's own stay as
    /// they are.
    ///
    /// # Errors
    /// [`SelectError::BadPlan`] when options do not fit the model.
    pub fn plan(&self, m: &ModelShape<'_>, context: usize) -> Result<Plan, SelectError> {
        let n_layers = m.windows.len();
        let mut layers = match self.variant {
            Variant::Dense => vec![LayerPlan::dense(); n_layers],
            v if v.anchored() => self.anchored(m, context)?,
            _ => {
                // As published, InfLLM-V2, SparDA and NOSA select in every layer.
                let every =
                    matches!(self.variant, Variant::Infllm2 | Variant::Sparda | Variant::Nosa);
                let dense_layers = self.dense_layers.unwrap_or(if every { 0 } else { 2 });
                let layer = |l: usize| match m.windows[l] {
                    None if l >= dense_layers => self.layer(l, m, context),
                    _ => Ok(LayerPlan::dense()),
                };
                (0..n_layers).map(layer).collect::<Result<_, _>>()?
            }
        };
        self.read_prompts(&mut layers);
        if let Some(steps) = self.reuse.filter(|_| self.variant.takes("reuse")) {
            layers.iter_mut().filter(|p| p.role != Role::Dense).for_each(|p| p.reuse = steps);
        }
        let plan = Plan { method: self.name().into(), model: m.model.into(), context, layers };
        plan.check(m)?;
        Ok(plan)
    }

    /// Lets layers read prompts sparsely, where that is asked for.
    fn read_prompts(&self, layers: &mut [LayerPlan]) {
        let reads = self.variant.takes("tile");
        let Some(tile) = self.tile.filter(|t| *t > 0 && reads) else { return };
        let dense = self.prompt_dense.unwrap_or(0);
        for p in layers.iter_mut().skip(dense).filter(|p| p.role != Role::Dense) {
            p.tile = Some(tile);
        }
        // An anchor that none of them reuses need not choose.
        for l in 0..layers.len() {
            let reused = |p: &LayerPlan| match p.role {
                Role::Reuse { from, .. } => from == l && p.tile.is_some(),
                _ => false,
            };
            let used = layers.iter().any(reused);
            let p = &mut layers[l];
            if p.role == Role::DenseAnchor || p.role == Role::Select && l < dense {
                p.tile = used.then_some(tile);
            }
        }
    }

    /// T_b where the budget does not follow the length.
    pub(super) fn budget_tokens(&self, context: usize) -> usize {
        self.budget.unwrap_or_else(|| (context / 32).clamp(512, 2048))
    }

    /// D_b of sorted keys.
    pub(super) fn leading_dims(&self, head_dim: usize) -> usize {
        self.dims.unwrap_or_else(|| (head_dim / 4).next_multiple_of(8).min(head_dim))
    }

    fn layer(
        &self,
        l: usize,
        m: &ModelShape<'_>,
        context: usize,
    ) -> Result<LayerPlan, SelectError> {
        if let Some(plan) = blocks::layer(self, self.budget_tokens(context), m.importance) {
            return Ok(plan);
        }
        let (n_layers, head_dim) = (m.windows.len(), m.head_dim);
        let tokens = self.budget_tokens(context);
        let paper = self.variant == Variant::SparcasPaper;
        let (sinks, recent) = match self.variant {
            Variant::SparcasPaper => (0, 1),
            Variant::SparcasRecommended => (4, 64),
            // As published: a quarter of the budget, no sinks.
            Variant::Sparq => (0, (tokens / 4).max(1)),
            _ => (4, 32),
        };
        let mut keep =
            Keep { sinks: self.sinks.unwrap_or(sinks), recent: self.recent.unwrap_or(recent) };
        if self.variant == Variant::Window {
            // The whole budget is sinks and window, unless a smaller window was asked for.
            keep.recent = self.recent.unwrap_or(tokens.saturating_sub(keep.sinks));
        }
        let budget_tokens = match self.variant {
            Variant::Window => keep.sinks.saturating_add(keep.recent),
            _ => tokens,
        };
        let scored = self.variant.takes("mass");
        let dense_below = self.dense_below.unwrap_or(if paper { 0 } else { 2048 });
        let budget = Budget::fixed(budget_tokens, dense_below);
        Ok(LayerPlan {
            role: Role::Select,
            scorer: self.scorer_of(l, n_layers, head_dim),
            pool: match self.variant {
                // No scores to pool.
                Variant::Window | Variant::Random => HeadPool::SumLogit,
                Variant::SparcasPaper | Variant::Sparq => self.pool.unwrap_or(HeadPool::SumLogit),
                _ => self.pool.unwrap_or(HeadPool::MaxSoftmax),
            },
            scale: match self.variant {
                // Components are no part of the query's own dimensions.
                Variant::Oracle | Variant::Window | Variant::Random | Variant::Loki => {
                    LogitScale::InvSqrtDim
                }
                _ => LogitScale::Coverage,
            },
            budget: if scored { self.following(budget, context)? } else { budget },
            keep,
            tile: None,
            // The mean value needs the scores of every step.
            correct: scored
                && self.correct.unwrap_or(self.variant == Variant::Sparq && self.reuse <= Some(1)),
            reuse: 1,
        })
    }

    /// The budget with what the scores have to say about it.
    fn following(&self, budget: Budget, context: usize) -> Result<Budget, SelectError> {
        /// Least tokens of a list that ends with its mass.
        const LEAST: u32 = 16;
        /// Times the mean that a list has room for where lists share a budget.
        const ROOM: usize = 4;
        let share = |name: &str, x: f32, least: f32| match x {
            x if x >= least && x <= 1.0 => Ok(x),
            _ => {
                // Who gives more than 1 means per cent.
                let meant = match x {
                    x if x > 1.0 && x <= 100.0 => format!("; {x} per cent are {}", x / 100.0),
                    _ => String::new(),
                };
                let reason = format!("{name} of {x}: give a share from {least} to 1{meant}");
                Err(SelectError::BadPlan { method: self.name().into(), reason })
            }
        };
        match (self.mass, self.floor) {
            (None, None) => Ok(budget),
            (Some(mass), None) => {
                let permille = (share("a mass", mass, 0.001)? * 1000.0).round() as u32;
                let follow = Some(Follow::Mass { permille, at_least: LEAST });
                Ok(Budget { follow, ..budget })
            }
            (None, Some(floor)) => {
                let mean = budget.tokens;
                let at_least = (share("a floor", floor, 0.0)? * mean as f32) as u32;
                let follow = Some(Follow::Shared { mean, at_least });
                let tokens = mean.saturating_mul(ROOM).min(context.max(mean));
                Ok(Budget { tokens, follow, ..budget })
            }
            (Some(_), Some(_)) => Err(SelectError::BadPlan {
                method: self.name().into(),
                reason: "a list ends with its mass, or lists share their budgets; give one".into(),
            }),
        }
    }

    fn scorer_of(&self, l: usize, n_layers: usize, head_dim: usize) -> Scorer {
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
        let leading = self.leading_dims(head_dim);
        match self.variant {
            Variant::Oracle => Scorer::Exact,
            Variant::Sparcas => Scorer::Sorted { dims: leading, int8: false },
            Variant::SparcasInt8 => Scorer::Sorted { dims: leading, int8: true },
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
                query_chosen(self.leading_dims(head_dim), DimMetric::PairQk, 8, every, false)
            }
            Variant::Sparq => Scorer::Dims {
                dims: self.dims.unwrap_or(half),
                metric: DimMetric::AbsQ,
                unit: 1,
                refresh: Refresh::Every { every: 1, phase: 0 },
                slice: false,
            },
            Variant::DoubleSparsity => Scorer::Static {
                dims: self.dims.unwrap_or(half),
                bits: self.slice_bits.unwrap_or(16),
            },
            Variant::Loki => Scorer::Components { dims: leading },
            Variant::Random => Scorer::Random { seed: 0 },
            // No scores; methods of anchors and blocks do not come here.
            _ => Scorer::None,
        }
    }
}
