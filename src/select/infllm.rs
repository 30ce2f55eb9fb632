//! InfLLM-V2 (arXiv 2509.24663; MiniCPM4): blocks of 64 tokens, scored by the probabilities that the query heads of a
//! KV head give to means of 32 keys every 16, without any training of its own.
//!
//! A block takes the largest of the five windows that overlap it. Always in: the first block, the query's block and
//! the blocks before it, a third of the budget; as published 1 + 33 of 96 (`budget=6144:dense-below=8192`).

use super::blocks::Query;
use super::quest::whole_blocks;
use super::{Budget, Keep, LayerPlan, MethodSpec, Role, Scorer};
use crate::backend::{HeadPool, LogitScale, PAGE, SummaryKind};

/// Tokens of a block.
pub(super) const BLOCK: usize = PAGE;
/// Compressed keys: tokens of a window, and from one to the next.
const WINDOWS: SummaryKind = SummaryKind::Windows { size: 32, stride: 16 };

pub(super) fn layer(spec: &MethodSpec, tokens: usize) -> LayerPlan {
    let tokens = whole_blocks(tokens, BLOCK);
    // `recent = 64 n + 1` keeps the query's block and the n before it, wherever in its block the query is.
    let local = tokens / BLOCK / 3;
    LayerPlan {
        role: Role::Select,
        tile: None,
        scorer: Scorer::Blocks { summary: WINDOWS, unit: BLOCK, query: Query::Own, by_query: None },
        pool: HeadPool::MeanSoftmax,
        scale: LogitScale::InvSqrtDim,
        budget: Budget::fixed(tokens, spec.dense_below.unwrap_or(2048)),
        keep: Keep {
            sinks: spec.sinks.unwrap_or(if tokens > BLOCK { BLOCK } else { 0 }),
            recent: spec.recent.unwrap_or(local * BLOCK + 1),
        },
        correct: false,
        reuse: 1,
    }
}

#[cfg(test)]
mod tests {
    use super::super::blocks::forced;
    use super::*;
    use crate::select::ModelShape;

    /// The forced blocks of MiniCPM4.1 (32 local blocks) and NOSA (16) in a budget of 96.
    #[test]
    fn forced_blocks_are_those_of_the_published_models() {
        let spec: MethodSpec = "infllm2:budget=6144".parse().unwrap();
        let plan = spec.plan(&ModelShape::of_layers(&[None; 2], 128), 65536).unwrap();
        let keep = plan.layers[0].keep;
        assert_eq!((keep, forced(&keep, BLOCK)), (Keep { sinks: 64, recent: 2049 }, 34));
        assert_eq!(forced(&Keep { sinks: 64, recent: 1025 }, BLOCK), 18);
        // However long the sequence is: the query's block and the 32 before it.
        for kv_len in 4000..4200 {
            let first = (kv_len - keep.recent) / BLOCK;
            assert_eq!((kv_len - 1) / BLOCK - first, 32, "{kv_len}");
        }
    }

    #[test]
    fn small_budgets_still_fit_what_is_forced() {
        for tokens in [1, 64, 80, 128, 192, 512] {
            let spec: MethodSpec = format!("infllm2:budget={tokens}").parse().unwrap();
            let plan = spec.plan(&ModelShape::of_layers(&[None; 2], 128), 65536).unwrap();
            assert_eq!(plan.layers[0].budget.tokens, usize::next_multiple_of(tokens, 64));
        }
    }
}
