//! StreamingLLM at original positions: the first tokens and the most recent ones, nothing between.

use super::pick::pool_and_pick;
use super::{LayerContext, LayerPlan, SelectError, Selection, Selector};
use crate::backend::Tensor;

/// Keeps sinks and recent tokens.
///
/// The scores stay at zero, so that `force` puts the kept tokens first; the budget equals their number, so nothing
/// else is chosen.
#[derive(Debug)]
pub struct WindowSelector {
    plan: LayerPlan,
}

impl WindowSelector {
    /// For a plan with [`Scorer::None`](super::Scorer::None).
    pub fn new(plan: &LayerPlan) -> Self {
        WindowSelector { plan: plan.clone() }
    }
}

impl Selector for WindowSelector {
    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        _q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError> {
        cx.backend.zero(&cx.scratch.scores)?;
        pool_and_pick(cx, &self.plan, out)
    }
}
