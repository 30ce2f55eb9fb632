//! Selection of whole blocks of tokens by summaries of their keys: what Quest, ArkVale, InfLLM-V2 and SparDA share.

use super::{
    Keep, LayerContext, LayerPlan, LayerShape, Scorer, SelectError, Selection, Selector, infllm,
    quest, sparda,
};
use crate::backend::{
    Backend, DType, ExpandBlocks, PoolBlocks, ScoreSummaries, Share, Summaries, SummaryKind,
    Tensor, TopK,
};
use crate::select::{MethodSpec, Variant};
use serde::{Deserialize, Serialize};

/// Whose query the summaries are scored with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Query {
    /// The layer's own query heads.
    Own,
    /// The Forecast of the layer before: one vector per KV head, not scaled (SparDA).
    Forecast,
}

/// The layer plan of a method that selects blocks; `None` for every other method. `tokens`: the budget where the
/// options name none.
pub(super) fn layer(spec: &MethodSpec, tokens: usize) -> Option<LayerPlan> {
    let tokens = spec.budget.unwrap_or(tokens);
    match spec.variant {
        Variant::Quest | Variant::Arkvale => Some(quest::layer(spec, tokens)),
        Variant::Infllm2 => Some(infllm::layer(spec, tokens)),
        Variant::Sparda => Some(sparda::layer(spec, tokens)),
        _ => None,
    }
}

/// Blocks of `unit` tokens that are selected whatever their score is, at most: a sequence may end anywhere in a block.
pub(super) fn forced(keep: &Keep, unit: usize) -> usize {
    let recent = match keep.recent {
        0 => 0,
        n => (n - 1).div_ceil(unit).saturating_add(1),
    };
    keep.sinks.div_ceil(unit).saturating_add(recent)
}

/// What does not fit in a plan with [`Scorer::Blocks`].
pub(super) fn check(plan: &LayerPlan) -> Result<(), String> {
    let Scorer::Blocks { summary, unit, query } = plan.scorer else { return Ok(()) };
    if !summary.is_sound() || !matches!(unit, 16 | 32 | 64) || !unit.is_multiple_of(summary.run()) {
        return Err(format!(
            "{summary:?} in blocks of {unit} tokens: give blocks of 16, 32 or 64 tokens, each a whole number of \
             summaries of 16, 32 or 64"
        ));
    }
    if query == Query::Forecast && plan.lists(2, 1) != 1 {
        return Err("a Forecast has one vector per KV head; take the pool sum_logit".into());
    }
    if matches!(summary, SummaryKind::Windows { .. }) && plan.keep.recent == 0 {
        return Err("the newest tokens are in no window yet; keep at least 1 recent token".into());
    }
    if plan.pool.shared() {
        return Err(
            "blocks are chosen for KV heads or query heads, not for all heads at once".into()
        );
    }
    if plan.budget.share.is_some() {
        return Err("a budget of blocks is a number of tokens, not a share of the length".into());
    }
    let (tokens, Keep { sinks, recent }) = (plan.budget.tokens, plan.keep);
    if tokens == 0 || !tokens.is_multiple_of(unit) {
        return Err(format!("a budget of {tokens} tokens is no number of blocks of {unit}"));
    }
    let n = forced(&plan.keep, unit);
    if n > tokens / unit {
        return Err(format!(
            "{sinks} sinks and {recent} recent tokens may take {n} blocks of {unit}, more than a budget of {tokens} \
             tokens has"
        ));
    }
    Ok(())
}

/// Bytes of summaries that a decode step reads per KV head of a sequence of `n` tokens; `row`: bytes of one key.
pub(super) fn bytes_read(summary: SummaryKind, n: usize, row: usize) -> usize {
    summary.count(n) * summary.vectors() * row
}

/// Scores summaries, pools them to blocks and lists the tokens of the best blocks.
#[derive(Debug)]
pub struct BlockSelector {
    plan: LayerPlan,
    summary: SummaryKind,
    unit: usize,
    query: Query,
    /// u32 `[slots, lists, budget / unit]`, and how many of them are chosen.
    blocks: Tensor,
    counts: Tensor,
}

impl BlockSelector {
    /// For a plan with [`Scorer::Blocks`]; allocates the block lists.
    ///
    /// # Errors
    /// [`SelectError::BadPlan`] for any other scorer, [`SelectError::Backend`] when the device is full.
    pub fn new(b: &dyn Backend, shape: &LayerShape, plan: &LayerPlan) -> Result<Self, SelectError> {
        let bad = |reason: String| SelectError::BadPlan { method: "blocks".into(), reason };
        check(plan).map_err(bad)?;
        let Scorer::Blocks { summary, unit, query } = plan.scorer else {
            return Err(bad("the plan has no scorer of blocks".into()));
        };
        let lists = shape.at_once * plan.lists(shape.heads, shape.kv_heads);
        let blocks = b.alloc(DType::U32, lists * (plan.budget.tokens / unit), "block lists")?;
        let counts = b.alloc(DType::U32, lists, "block counts")?;
        Ok(BlockSelector { plan: plan.clone(), summary, unit, query, blocks, counts })
    }
}

impl Selector for BlockSelector {
    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError> {
        let missing = |what| SelectError::MissingSummary { method: "blocks".into(), what };
        let summaries: Summaries<'_> = cx
            .summaries
            .filter(|s| s.kind == self.summary)
            .ok_or_else(|| missing("summaries of the keys"))?;
        let head_scores = cx
            .scratch
            .head_scores
            .as_ref()
            .ok_or_else(|| missing("a score buffer of all heads"))?;
        let (shape, seqs, unit) = (cx.shape, cx.seqs, self.unit);
        let (q, heads, scale) = match self.query {
            Query::Own => (q, shape.heads, 1.0 / (shape.head_dim as f32).sqrt()),
            Query::Forecast => {
                (cx.forecast.ok_or_else(|| missing("a Forecast"))?, shape.kv_heads, 1.0)
            }
        };
        // Both fit the score buffers: those have room for a score per token.
        let stride = self.summary.count(cx.scratch.stride);
        let block_stride = cx.scratch.stride.div_ceil(unit).next_multiple_of(64);
        let (b, kind, kv_heads) = (cx.backend, self.summary, shape.kv_heads);
        b.score_summaries(&ScoreSummaries {
            q,
            seqs,
            summaries,
            n_pages: cx.cache.n_pages,
            heads,
            kv_heads,
            head_dim: shape.head_dim,
            scale,
            scores: head_scores,
            stride,
        })?;
        b.pool_blocks(&PoolBlocks {
            scores: head_scores,
            seqs,
            kind,
            heads,
            kv_heads,
            pool: self.plan.pool,
            stride,
            unit,
            sinks: self.plan.keep.sinks,
            recent: self.plan.keep.recent,
            out: &cx.scratch.scores,
            block_stride,
        })?;
        let k = out.k / unit;
        b.top_k(&TopK {
            scores: &cx.scratch.scores,
            seqs,
            rows_per_seq: out.rows_per_seq,
            stride: block_stride,
            k,
            unit,
            share: Share::ALL,
            among: None,
            indices: &self.blocks,
            counts: &self.counts,
        })?;
        Ok(b.expand_blocks(&ExpandBlocks {
            blocks: &self.blocks,
            block_counts: &self.counts,
            seqs,
            rows_per_seq: out.rows_per_seq,
            k,
            unit,
            indices: &out.indices,
            counts: &out.counts,
        })?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::HeadPool;
    use crate::select::KvReads;
    use crate::select::ModelShape;

    fn spec(variant: Variant) -> MethodSpec {
        let (budget, dense_layers) = (Some(2048), Some(0));
        MethodSpec { budget, dense_layers, dense_below: Some(0), ..variant.into() }
    }

    /// Llama-3.1-8B at 32K in bf16, budget 2048, every layer: Quest reads two vectors per 16 keys, windows one; and then
    /// the keys and values of the chosen tokens.
    #[test]
    fn bytes_read_follow_the_formulas() {
        let windows = [None; 32];
        let shape = KvReads { windows: &windows, heads: 32, kv_heads: 8, head_dim: 128, elem: 2 };
        let read = |spec: &MethodSpec| {
            spec.plan(&ModelShape::of_layers(&windows, 128), 32768)
                .unwrap()
                .bytes_read(32768, &shape)
        };
        let row = 128 * 2;
        let heads = 32 * 8;
        let quest = spec(Variant::Quest);
        assert_eq!(read(&quest), heads * (2 * 32768 / 16 * row + 2 * 2048 * row));
        let per_head = MethodSpec { pool: Some(HeadPool::None), ..quest };
        assert_eq!(read(&per_head), heads * (2 * 32768 / 16 * row + 4 * 2 * 2048 * row));
        for variant in [Variant::Infllm2, Variant::Sparda] {
            let blocks = heads * (32768 / 16 * row + 2 * 2048 * row);
            assert_eq!(read(&spec(variant)), blocks, "{variant:?}");
        }
    }

    #[test]
    fn plans_that_cannot_run_are_refused() {
        let plan = layer(&spec(Variant::Sparda), 2048).unwrap();
        check(&plan).unwrap();
        let reason = |edit: &dyn Fn(&mut LayerPlan)| {
            let mut plan = plan.clone();
            edit(&mut plan);
            check(&plan).unwrap_err()
        };
        assert!(reason(&|p| p.pool = HeadPool::None).contains("one vector per KV head"));
        assert!(reason(&|p| p.budget.tokens = 2000).contains("no number of blocks of 64"));
        assert!(reason(&|p| p.keep.recent = 0).contains("at least 1 recent"));
        // The first block, and 33 that 2,048 tokens may touch.
        assert!(reason(&|p| p.keep.recent = 2048).contains("34 blocks of 64"));
        assert!(reason(&|p| p.keep.sinks = usize::MAX).contains("more than a budget"));
        let unit = |to| {
            reason(&|p: &mut LayerPlan| {
                if let Scorer::Blocks { unit, .. } = &mut p.scorer {
                    *unit = to;
                }
            })
        };
        assert!(unit(0).contains("blocks of 0") && unit(40).contains("blocks of 40"));
    }
}
