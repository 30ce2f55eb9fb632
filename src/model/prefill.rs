//! One layer's attention of the prefilling rows, where the layer reads prompts sparsely: tiles of rows choose tokens and
//! attend to those. Scores are made for some tiles at a time, so no buffer grows with the square of the prompt.

use super::attend::{Dense, Partials};
use super::clock::Clock;
use super::lists::LayerLists;
use super::step::{GroupSeqs, StepSeq, Tiling};
use super::workspace::Workspace;
use crate::backend::{BackendError, Result as Done};
use crate::select::{
    LayerContext, LayerPlan, LayerShape, Plan, Role, Scorer, SelectError, Selector, select_tiles,
};

/// Bytes that the scores of a batch of tiles may take, where a batch has more than [`LEAST`] tiles.
const SCORE_BYTES: usize = 256 << 20;
/// Batches are multiples of this, so that their records and lists begin where every device can bind them.
const LEAST: usize = 64;

/// What layers run with, whatever they choose.
pub(super) struct Run<'a> {
    pub ws: &'a Workspace,
    pub partials: &'a mut Partials,
    pub clock: &'a mut Clock,
}

/// Room for the tiles of prompts.
#[derive(Debug)]
pub(super) struct Tiles {
    /// Lists of each layer that reads prompts sparsely.
    pub lists: Vec<Option<LayerLists>>,
    /// Tiles whose scores are made at once.
    pub batch: usize,
}

/// The plan's distinct tilings.
pub(super) fn tilings(plan: &Plan) -> Vec<Tiling> {
    let mut all: Vec<Tiling> = Vec::new();
    for t in plan.layers.iter().filter_map(tiling) {
        if !all.contains(&t) {
            all.push(t);
        }
    }
    all
}

/// The tile of a step of these prompts, counted over all of them, that holds `token` of sequence `i`; None where a layer
/// of this plan reads the token densely.
pub(super) fn tile_of(
    p: &LayerPlan,
    seqs: &[StepSeq<'_>],
    (i, token): (usize, usize),
) -> Option<usize> {
    tiling(p)?.tile_of(seqs, i, token)
}

fn tiling(p: &LayerPlan) -> Option<Tiling> {
    p.tile.map(|tile| Tiling { tile, threshold: p.budget.dense_until() })
}

/// The part of a plan that prompts are read with: layers that read them densely are dense.
pub(super) fn for_prompts(plan: &Plan) -> Plan {
    let layer = |p: &LayerPlan| match p.tile {
        // What is held is held from decode step to decode step.
        Some(_) => LayerPlan { reuse: 1, ..p.clone() },
        None => LayerPlan::dense(),
    };
    Plan { layers: plan.layers.iter().map(layer).collect(), ..plan.clone() }
}

/// Most tiles that a step of `shape.rows` rows may have, and how many of them are scored at once: `row_bytes` each.
pub(super) fn room(plan: &Plan, shape: &LayerShape, row_bytes: usize) -> (usize, usize) {
    let most = tilings(plan).into_iter().map(|t| t.most(shape.rows, shape.slots)).max();
    let most = most.unwrap_or(0);
    let fit = (SCORE_BYTES / row_bytes.max(1) / LEAST * LEAST).max(LEAST);
    (most, fit.min(most))
}

/// Attends the step's prefilling rows of the layer of `cx`, into `run.ws.attn`. `lists`: the layer's lists for tiles, a
/// batch of which is scored at once.
///
/// # Errors
/// [`SelectError::Backend`], and whatever a selector answers.
pub(super) fn prefill(
    dense: &Dense<'_>,
    cx: &LayerContext<'_>,
    plan: &LayerPlan,
    (lists, batch): (Option<&LayerLists>, usize),
    mut selector: Option<&mut (dyn Selector + 'static)>,
    run: Run<'_>,
) -> Result<(), SelectError> {
    let (step, b, l) = (dense.step, cx.backend, cx.shape.layer);
    let (Some(tiling), Some(lists)) = (tiling(plan), lists) else {
        return Ok(densely(dense, run)?);
    };
    let Run { ws, partials, clock } = run;
    if step.prefill.n == 0 {
        return Ok(());
    }
    let split = step.tiled(tiling).ok_or_else(|| BackendError::BadArgument {
        op: "prefill",
        reason: "the step was made for another plan".into(),
    })?;
    let all = split.tiles;
    // Tiles are scored with each row's softmax over all its tokens; a dense anchor attends to them anyway.
    let densely = || match plan.role {
        Role::DenseAnchor => dense.attend(step.prefill, 1, &ws.attn, Some(&ws.lse)),
        _ => {
            if plan.scores_tiles() {
                dense.sums(split.sparse, &ws.attn, &ws.lse)?;
            }
            dense.attend(split.dense, 1, &ws.attn, None)
        }
    };
    clock.time(b, l, |t| &mut t.dense, densely)?;
    for first in (0..all.n).step_by(batch.max(1)) {
        let group = GroupSeqs::new(step, all.part(first, batch.min(all.n - first)));
        let cx = LayerContext { seqs: group.seqs(), ..*cx };
        let chosen = lists.attend.part(first, cx.seqs.n);
        if plan.selects() {
            clock.time(
                b,
                l,
                |t| &mut t.select,
                || match &mut selector {
                    Some(selector) if plan.scorer != Scorer::None && !plan.scores_tiles() => {
                        selector.select(&cx, &ws.q, &chosen)
                    }
                    _ => select_tiles(&cx, plan, (&ws.q, &ws.lse), &chosen),
                },
            )?;
        }
        if plan.sparse() {
            let map = lists.head_map.as_ref();
            let mut attend =
                || dense.listed(&group, &chosen, (map, false), partials, &ws.attn, &ws.lse);
            clock.time(b, l, |t| &mut t.listed, &mut attend)?;
        }
    }
    Ok(())
}

/// Attends the step's prefilling rows to every token.
pub(super) fn densely(dense: &Dense<'_>, run: Run<'_>) -> Done<()> {
    let attend = || dense.attend(dense.step.prefill, 1, &run.ws.attn, None);
    run.clock.time(dense.b, dense.shape.layer, |t| &mut t.dense, attend)
}
