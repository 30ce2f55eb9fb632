//! Quest (arXiv 2406.10774) and ArkVale (NeurIPS 2024): pages of keys behind two vectors each.
//!
//! A page's score bounds (Quest) or estimates (ArkVale) the largest logit of its keys. As published both choose pages
//! per query head (`pool=none`); by default the query heads of a KV head choose together, by the sum of their
//! scores. The budget in tokens is pages times page size.

use super::blocks::Query;
use super::{Budget, Keep, LayerPlan, MethodSpec, Role, Scorer, Variant};
use crate::backend::{HeadPool, LogitScale, SummaryKind};

/// Tokens of a page where the options name none: that of Quest's code, and half of ArkVale's.
const PAGE: usize = 16;

pub(super) fn layer(spec: &MethodSpec, tokens: usize) -> LayerPlan {
    let page = spec.unit.unwrap_or(PAGE);
    let arkvale = spec.variant == Variant::Arkvale;
    // Quest's code keeps the newest page (`recent=0` lets it go), ArkVale's two pages at either end.
    let (sinks, recent) =
        if arkvale { (page.saturating_mul(2), page.saturating_add(1)) } else { (0, 1) };
    LayerPlan {
        role: Role::Select,
        tile: None,
        scorer: Scorer::Blocks {
            summary: if arkvale {
                SummaryKind::Cuboid { page }
            } else {
                SummaryKind::Bounds { page }
            },
            unit: page,
            query: Query::Own,
            by_query: None,
        },
        pool: spec.pool.unwrap_or(HeadPool::SumLogit),
        scale: LogitScale::InvSqrtDim,
        budget: Budget::fixed(whole_blocks(tokens, page), spec.dense_below.unwrap_or(2048)),
        keep: Keep { sinks: spec.sinks.unwrap_or(sinks), recent: spec.recent.unwrap_or(recent) },
        correct: false,
        reuse: 1,
    }
}

/// `tokens` up to the next whole block; as it is where there is none.
pub(super) fn whole_blocks(tokens: usize, unit: usize) -> usize {
    if unit == 0 { tokens } else { tokens.checked_next_multiple_of(unit).unwrap_or(tokens) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::ModelShape;

    fn plan(name: &str) -> LayerPlan {
        let spec: MethodSpec = name.parse().unwrap();
        spec.plan(&ModelShape::of_layers(&[None; 3], 64), 65536).unwrap().layers[2].clone()
    }

    #[test]
    fn budgets_are_whole_pages() {
        assert_eq!(plan("quest").budget.tokens, 2048);
        assert_eq!(plan("quest:budget=1000").budget.tokens, 1008);
        assert_eq!(plan("quest:budget=1000:unit=64").budget.tokens, 1024);
    }

    #[test]
    fn the_published_form_chooses_per_query_head_and_may_let_the_newest_page_go() {
        let p = plan("quest:pool=none:recent=0");
        assert_eq!((p.pool, p.keep), (HeadPool::None, Keep { sinks: 0, recent: 0 }));
        assert_eq!(super::super::blocks::forced(&plan("arkvale").keep, 16), 4);
    }

    #[test]
    fn pages_that_do_not_divide_a_kv_page_are_refused() {
        for unit in ["0", "8", "48", "128"] {
            let spec: MethodSpec = format!("quest:unit={unit}").parse().unwrap();
            let e =
                spec.plan(&ModelShape::of_layers(&[None; 3], 64), 65536).unwrap_err().to_string();
            assert!(e.contains("16, 32 or 64"), "{e}");
        }
    }
}
