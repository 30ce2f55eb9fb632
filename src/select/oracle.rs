//! Oracle top-k: exact logits of every token. Reads all keys; the bound for every cheaper scorer.

use super::pick::score_and_pick;
use super::{LayerContext, LayerPlan, SelectError, Selection, Selector};
use crate::backend::{ScoreSource, Tensor};

/// Scores with all dimensions.
#[derive(Debug)]
pub struct ExactSelector {
    plan: LayerPlan,
}

impl ExactSelector {
    /// For a plan with [`Scorer::Exact`](super::Scorer::Exact).
    pub fn new(plan: &LayerPlan) -> Self {
        ExactSelector { plan: plan.clone() }
    }
}

impl Selector for ExactSelector {
    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError> {
        let source = ScoreSource::Lead { n: cx.shape.head_dim };
        score_and_pick(cx, &self.plan, q, source, out)
    }
}
