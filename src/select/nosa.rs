//! NOSA (arXiv 2510.13602): blocks of 64 tokens in two stages, some by the query, the rest by what the tokens hold.
//!
//! Stage one is InfLLM-V2's choice, of a part of the budget. Stage two ranks the other blocks by the content importance
//! of their tokens (the mean over each window of 32 keys every 16, the largest of the five windows that touch a block),
//! which no query changes: from one step to the next that part of the choice stays as it is, but for blocks that a
//! query takes or frees. With `query=forecast` SparDA's Forecast makes the first choice.

use super::blocks::{Query, forced};
use super::infllm::BLOCK;
use super::quest::whole_blocks;
use super::{Keep, LayerPlan, MethodSpec, Scorer, infllm, sparda};
use crate::backend::HeadPool;
use serde::{Deserialize, Serialize};

/// Blocks of 64 tokens that a NOSA model was trained to attend to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainedBlocks {
    /// Of a query, all in all.
    pub total: usize,
    /// Of these those that the query chooses, forced ones included.
    pub by_query: usize,
    /// First blocks of the text, always in.
    pub sinks: usize,
    /// Blocks before the query's own that are always in, like that.
    pub local: usize,
}

impl Default for TrainedBlocks {
    /// NOSA-8B: 1 + 16 + 24 of 96.
    fn default() -> Self {
        TrainedBlocks { total: 96, by_query: 41, sinks: 1, local: 16 }
    }
}

/// More blocks than any text has are a mistake.
const MOST: usize = 1 << 25;

impl TrainedBlocks {
    /// What is wrong with the numbers, if anything.
    pub(crate) fn fault(&self) -> Option<String> {
        let TrainedBlocks { total, by_query, sinks, local } = *self;
        let forced = sinks.checked_add(local).and_then(|n| n.checked_add(1));
        let fine = total <= MOST && by_query <= total && forced.is_some_and(|n| n <= by_query);
        (!fine).then(|| {
            format!(
                "it says that a query chooses {by_query} of {total} blocks, {sinks} of the first and {local} before \
                 its own among them"
            )
        })
    }
}

/// `trained`: of the model, where it is one of NOSA's. A smaller budget is shared as the trained one was.
pub(super) fn layer(spec: &MethodSpec, trained: Option<TrainedBlocks>) -> LayerPlan {
    let trained = trained.unwrap_or_default();
    let tokens = spec.budget.unwrap_or(trained.total * BLOCK);
    let mut plan = match spec.query {
        Some(Query::Forecast) => sparda::layer(spec, tokens),
        _ => infllm::layer(spec, tokens),
    };
    let blocks = whole_blocks(tokens, BLOCK) / BLOCK;
    let part = |of: usize| (blocks as u128 * of as u128 / trained.total.max(1) as u128) as usize;
    let sinks = if blocks > 1 { part(trained.sinks).max(trained.sinks.min(1)) } else { 0 };
    plan.keep = Keep {
        sinks: spec.sinks.unwrap_or(sinks.saturating_mul(BLOCK)),
        recent: spec.recent.unwrap_or(part(trained.local).saturating_mul(BLOCK).saturating_add(1)),
    };
    let least = forced(&plan.keep, BLOCK).max(1);
    let chosen = spec.by_query.map(|tokens| tokens.div_ceil(BLOCK));
    if let Scorer::Blocks { by_query, .. } = &mut plan.scorer {
        *by_query = Some(chosen.unwrap_or_else(|| part(trained.by_query).max(least)));
    }
    plan
}

/// What does not fit in a second stage: `by_query` blocks of the first.
pub(super) fn check(plan: &LayerPlan, by_query: usize, unit: usize) -> Result<(), String> {
    let (total, least) = (plan.budget.tokens / unit.max(1), forced(&plan.keep, unit.max(1)));
    if by_query == 0 || by_query < least || by_query > total {
        return Err(format!(
            "{by_query} blocks of {unit} by the query, of {total} in all: give {} to {total}, blocks that are always \
             in included",
            least.max(1)
        ));
    }
    // One importance per KV head.
    if plan.pool == HeadPool::None {
        return Err("content importance is that of a KV head, not of a query head".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::{ModelShape, Plan, SelectError};

    fn plan(name: &str, importance: Option<TrainedBlocks>) -> Result<Plan, SelectError> {
        let spec: MethodSpec = name.parse().unwrap();
        let windows = [None; 2];
        spec.plan(&ModelShape { importance, ..ModelShape::of_layers(&windows, 128) }, 65536)
    }

    fn layer_of(name: &str, importance: TrainedBlocks) -> LayerPlan {
        plan(name, Some(importance)).unwrap().layers[1].clone()
    }

    fn by_query(plan: &LayerPlan) -> Option<usize> {
        match plan.scorer {
            Scorer::Blocks { by_query, .. } => by_query,
            _ => None,
        }
    }

    #[test]
    fn blocks_are_those_that_the_model_was_trained_with() {
        let p = layer_of("nosa", TrainedBlocks::default());
        assert_eq!((p.budget.tokens, by_query(&p)), (96 * 64, Some(41)));
        assert_eq!((p.keep, forced(&p.keep, 64)), (Keep { sinks: 64, recent: 1025 }, 18));
        // The first version: 33 of 64.
        let first = TrainedBlocks { total: 64, by_query: 33, ..TrainedBlocks::default() };
        let p = layer_of("nosa", first);
        assert_eq!((p.budget.tokens, by_query(&p), p.keep.recent), (64 * 64, Some(33), 1025));
    }

    #[test]
    fn other_budgets_are_shared_likewise() {
        for blocks in 1..200 {
            let p = layer_of(&format!("nosa:budget={}", blocks * 64), TrainedBlocks::default());
            let (chosen, least) = (by_query(&p).unwrap(), forced(&p.keep, 64));
            assert!(least <= chosen && chosen <= blocks, "{least} {chosen} {blocks}");
            assert!(blocks < 12 || chosen.abs_diff(blocks * 41 / 96) <= 1, "{chosen} of {blocks}");
        }
        let p =
            layer_of("nosa:budget=1000:by-query=400:sinks=0:recent=70", TrainedBlocks::default());
        assert_eq!((p.budget.tokens, by_query(&p)), (1024, Some(7)));
    }

    #[test]
    fn the_forecast_changes_nothing_but_the_query_of_stage_one() {
        let (own, forecast) = (
            layer_of("nosa", TrainedBlocks::default()),
            layer_of("nosa:query=forecast", TrainedBlocks::default()),
        );
        assert!(forecast.wants_forecast() && !own.wants_forecast());
        assert_eq!(
            (own.keep, own.budget, by_query(&own)),
            (forecast.keep, forecast.budget, by_query(&forecast))
        );
        assert_eq!(layer_of("nosa:query=own", TrainedBlocks::default()), own);
    }

    #[test]
    fn plans_that_cannot_run_are_refused() {
        let said = |name: &str, importance| plan(name, importance).unwrap_err().to_string();
        let none = said("nosa", None);
        assert!(none.contains("NOSA") && none.contains("infllm2"), "{none}");
        let own = Some(TrainedBlocks::default());
        assert!(
            said("nosa:budget=1024:by-query=2048", own)
                .contains("32 blocks of 64 by the query, of 16")
        );
        assert!(said("nosa:budget=1024:by-query=64", own).contains("always in included"));
        assert!(said("nosa:budget=1024:by-query=0", own).contains("0 blocks"));
    }

    #[test]
    fn numbers_that_cannot_be_are_faults() {
        let own = TrainedBlocks::default();
        assert_eq!(own.fault(), None);
        for wrong in [
            TrainedBlocks { by_query: 97, ..own },
            TrainedBlocks { by_query: 17, ..own },
            TrainedBlocks { local: usize::MAX, ..own },
            TrainedBlocks { total: usize::MAX, ..own },
            TrainedBlocks { total: 0, by_query: 0, sinks: 0, local: 0 },
        ] {
            assert!(wrong.fault().is_some(), "{wrong:?}");
        }
    }
}
