//! Selection of whole blocks of tokens by summaries of their keys: what Quest, ArkVale, InfLLM-V2, SparDA and NOSA share.

use super::{
    Keep, LayerContext, LayerPlan, LayerShape, Scorer, SelectError, Selection, Selector,
    TrainedBlocks, infllm, nosa, quest, sparda,
};
use crate::backend::{
    Among, Backend, DType, ExpandBlocks, ForceBlocks, HeadPool, PoolBlocks, ScoreSummaries, Share,
    Summaries, SummaryKind, Tensor, TopK,
};
use crate::select::{MethodSpec, Variant};
use serde::{Deserialize, Serialize};
use std::ops::Range;

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
/// options name none; `trained`: blocks of a NOSA model.
pub(super) fn layer(
    spec: &MethodSpec,
    tokens: usize,
    trained: Option<TrainedBlocks>,
) -> Option<LayerPlan> {
    let tokens = spec.budget.unwrap_or(tokens);
    match spec.variant {
        Variant::Quest | Variant::Arkvale => Some(quest::layer(spec, tokens)),
        Variant::Infllm2 => Some(infllm::layer(spec, tokens)),
        Variant::Sparda => Some(sparda::layer(spec, tokens)),
        Variant::Nosa => Some(nosa::layer(spec, trained)),
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
    let Scorer::Blocks { summary, unit, query, by_query } = plan.scorer else { return Ok(()) };
    if !summary.is_sound() || !matches!(unit, 16 | 32 | 64) || !unit.is_multiple_of(summary.run()) {
        return Err(format!(
            "{summary} in blocks of {unit} tokens: give blocks of 16, 32 or 64 tokens, each a whole number of \
             summaries of 16, 32 or 64"
        ));
    }
    if query == Query::Forecast && plan.lists(2, 1) != 1 {
        return Err("a Forecast has one vector per KV head; take the pool sum-logit".into());
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
    by_query.map_or(Ok(()), |n| nosa::check(plan, n, unit))
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
    by_query: Option<usize>,
    /// u32 `[slots, lists, budget / unit]`, and how many of them are chosen.
    blocks: Tensor,
    counts: Tensor,
}

/// What summaries are multiplied with.
struct Asked<'a> {
    /// act `[rows, heads, head_dim]`.
    q: &'a Tensor,
    heads: usize,
    scale: f32,
    /// Dimensions that count.
    dims: Range<usize>,
    pool: HeadPool,
}

impl BlockSelector {
    /// For a plan with [`Scorer::Blocks`]; allocates the block lists.
    ///
    /// # Errors
    /// [`SelectError::BadPlan`] for any other scorer, and for one that ranks by content importance where keys hold
    /// none; [`SelectError::Backend`] when the device is full.
    pub fn new(b: &dyn Backend, shape: &LayerShape, plan: &LayerPlan) -> Result<Self, SelectError> {
        let bad = |reason: String| SelectError::BadPlan { method: "blocks".into(), reason };
        check(plan).map_err(bad)?;
        let Scorer::Blocks { summary, unit, query, by_query } = plan.scorer else {
            return Err(bad("the plan has no scorer of blocks".into()));
        };
        if by_query.is_some() && shape.plain_dim == shape.head_dim {
            return Err(bad("keys hold no content importance to rank blocks by".into()));
        }
        let lists = shape.at_once * plan.lists(shape.heads, shape.kv_heads);
        let tokens = plan.budget.tokens.min(shape.stride());
        let blocks = b.alloc(DType::U32, lists * (tokens / unit), "block lists")?;
        let counts = b.alloc(DType::U32, lists, "block counts")?;
        Ok(BlockSelector { plan: plan.clone(), summary, unit, query, by_query, blocks, counts })
    }

    /// Leaves the scores of blocks in the shared buffer; returns the elements between its rows.
    fn score(&self, cx: &LayerContext<'_>, asked: Asked<'_>) -> Result<usize, SelectError> {
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
        let Asked { q, heads, scale, dims, pool } = asked;
        // Both fit the score buffers: those have room for a score per token.
        let stride = self.summary.count(cx.scratch.stride);
        let block_stride = cx.scratch.stride.div_ceil(unit).next_multiple_of(64);
        cx.backend.score_summaries(&ScoreSummaries {
            q,
            seqs,
            summaries,
            n_pages: cx.cache.n_pages,
            heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            from: dims.start,
            dims: dims.len(),
            scale,
            scores: head_scores,
            stride,
        })?;
        cx.backend.pool_blocks(&PoolBlocks {
            scores: head_scores,
            seqs,
            kind: self.summary,
            heads,
            kv_heads: shape.kv_heads,
            pool,
            stride,
            unit,
            sinks: self.plan.keep.sinks,
            recent: self.plan.keep.recent,
            out: &cx.scratch.scores,
            block_stride,
        })?;
        Ok(block_stride)
    }

    /// The `k` blocks of each list with the best scores.
    fn take(
        &self,
        cx: &LayerContext<'_>,
        rows_per_seq: usize,
        stride: usize,
        k: usize,
    ) -> Result<(), SelectError> {
        Ok(cx.backend.top_k(&TopK {
            scores: &cx.scratch.scores,
            seqs: cx.seqs,
            rows_per_seq,
            stride,
            k,
            unit: self.unit,
            share: Share::ALL,
            among: None,
            indices: &self.blocks,
            counts: &self.counts,
        })?)
    }
}

impl Selector for BlockSelector {
    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError> {
        let LayerShape { heads, kv_heads, head_dim, plain_dim, .. } = cx.shape;
        let (rows, k) = (out.rows_per_seq, out.k / self.unit);
        let scale = 1.0 / (head_dim as f32).sqrt();
        // As published, the query of a choice in two stages knows nothing of the importance.
        let dims = 0..if self.by_query.is_some() { plain_dim } else { head_dim };
        let pool = self.plan.pool;
        let asked = match self.query {
            Query::Own => Asked { q, heads, scale, dims, pool },
            Query::Forecast => {
                let missing =
                    || SelectError::MissingSummary { method: "blocks".into(), what: "a Forecast" };
                Asked {
                    q: cx.forecast.ok_or_else(missing)?,
                    heads: kv_heads,
                    scale: 1.0,
                    dims,
                    pool,
                }
            }
        };
        let stride = self.score(cx, asked)?;
        if let Some(by_query) = self.by_query.map(|n| n.min(k)) {
            self.take(cx, rows, stride, by_query)?;
            // The rest of every query is the same: what the keys' importance is multiplied with.
            let (dims, pool) = (plain_dim..head_dim, HeadPool::MaxLogit);
            self.score(cx, Asked { q, heads, scale, dims, pool })?;
            cx.backend.force_blocks(&ForceBlocks {
                scores: &cx.scratch.scores,
                seqs: cx.seqs,
                rows_per_seq: rows,
                stride,
                unit: self.unit,
                listed: Among { indices: &self.blocks, counts: &self.counts, k: by_query },
            })?;
        }
        self.take(cx, rows, stride, k)?;
        Ok(cx.backend.expand_blocks(&ExpandBlocks {
            blocks: &self.blocks,
            block_counts: &self.counts,
            seqs: cx.seqs,
            rows_per_seq: rows,
            k,
            unit: self.unit,
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
        let plan = layer(&spec(Variant::Sparda), 2048, None).unwrap();
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
