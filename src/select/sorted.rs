//! Sorted keys, the default: scores read the leading dimensions of energy-sorted keys.
//!
//! The rotary pairs of each KV head are permuted once at load by key energy, so every prefix of a row is the best
//! static choice of dimensions: no slice, no refresh, nothing that depends on the query.

use super::pick::score_and_pick;
use super::{LayerContext, LayerPlan, Scorer, SelectError, Selection, Selector};
use crate::backend::{ScoreSource, Tensor};

/// Scores tokens on the leading dimensions, from the keys or their int8 copy.
#[derive(Debug)]
pub struct SortedSelector {
    plan: LayerPlan,
    dims: usize,
    int8: bool,
}

impl SortedSelector {
    /// For a plan with [`Scorer::Sorted`].
    ///
    /// # Errors
    /// [`SelectError::BadPlan`] for any other scorer.
    pub fn new(plan: &LayerPlan) -> Result<Self, SelectError> {
        let Scorer::Sorted { dims, int8 } = plan.scorer else {
            return Err(SelectError::BadPlan {
                method: "sorted".into(),
                reason: "the plan has no scorer of sorted keys".into(),
            });
        };
        Ok(SortedSelector { plan: plan.clone(), dims, int8 })
    }
}

impl Selector for SortedSelector {
    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError> {
        let source = if self.int8 {
            let keys = cx.int8.ok_or_else(|| SelectError::MissingSummary {
                method: "sorted".into(),
                what: "the int8 key copy",
            })?;
            ScoreSource::Int8 { keys, n: self.dims }
        } else {
            ScoreSource::Lead { n: self.dims }
        };
        score_and_pick(cx, &self.plan, q, source, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_without_sorted_keys_is_refused() {
        let e = SortedSelector::new(&LayerPlan::dense()).unwrap_err();
        assert!(matches!(e, SelectError::BadPlan { .. }), "{e}");
    }
}
