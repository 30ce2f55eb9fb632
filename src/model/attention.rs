//! One layer's attention: where selection and cache meet.

use super::attend::{Dense, Partials};
use super::audit::{LayerAudit, audit};
use super::clock::Clock;
use super::lists::{LayerLists, layer_lists};
use super::paces::{Paces, pace};
use super::prefill::{Run, Tiles, densely, for_prompts, prefill, room, tile_of, tilings};
use super::probe::Probe;
use super::step::{Cut, GroupSeqs, Step, StepSeq, Tiling};
use super::workspace::{Growing, Workspace};
use crate::backend::{Backend, DType, HeadPool, Result, Rope, Seqs, Tensor};
use crate::kv::KvCache;
use crate::select::{
    Given, LayerContext, LayerPlan, LayerShape, Plan, Role, Scratch, SelectError, Selection,
    Selector, build, correct, hand_down, logits, pool_and_pick, refine,
};

/// A plan made runnable on a device: selectors, their buffers, and the audit.
pub struct Attention {
    plan: Plan,
    paces: Paces,
    tilings: Vec<Tiling>,
    selectors: Vec<Option<Box<dyn Selector>>>,
    lists: Vec<Option<LayerLists>>,
    tiles: Tiles,
    scratch: Option<Scratch>,
    partials: Partials,
    audit_out: Growing,
    audit_lse: Growing,
    /// Audit the sparse layers of the next step.
    pub audit: bool,
    /// Results, appended per step.
    pub audits: Vec<LayerAudit>,
    /// Looks at what sparse layers select, where somebody wants to know.
    pub(crate) probe: Option<Probe>,
    /// Times the phases of prompts, where somebody wants to know.
    pub(crate) clock: Clock,
}

impl std::fmt::Debug for Attention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attention").field("method", &self.plan.method).finish_non_exhaustive()
    }
}

impl Attention {
    /// Allocates what `plan` needs for up to `shape.slots` sequences of `shape.capacity` tokens.
    ///
    /// # Errors
    /// [`SelectError::BadPlan`] for a plan that does not fit, [`SelectError::Backend`] when the device is full.
    pub fn new(
        b: &dyn Backend,
        plan: Plan,
        shape: LayerShape,
        given: Given<'_>,
    ) -> std::result::Result<Self, SelectError> {
        let not_dense = || plan.layers.iter().filter(|p| p.role != Role::Dense);
        let stride = shape.stride();
        let rows = not_dense().map(|p| p.lists(shape.heads, shape.kv_heads)).max().unwrap_or(0);
        let united = not_dense().filter(|p| p.pool == HeadPool::Union && p.selects());
        let united = united.map(|p| p.budget.tokens.min(stride)).max();
        let per_head = united.is_some()
            || not_dense().any(|p| p.pool.softmax() || p.correct || p.summary().is_some());
        // What a sequence or a tile needs for its scores; scores of tiles by their rows need none per head.
        let by_head = not_dense().any(|p| p.tile.is_some() && p.selects() && !p.scores_tiles());
        let head_rows = if per_head && by_head { shape.heads } else { 0 };
        let tile_bytes = (rows + head_rows) * stride * 4;
        let (most_tiles, batch) = room(&plan, &shape, tile_bytes);
        let shape = LayerShape { at_once: shape.slots.max(batch), ..shape };
        let mut selectors = Vec::with_capacity(plan.layers.len());
        for (layer, p) in plan.layers.iter().enumerate() {
            let selector = build(b, &LayerShape { layer, ..shape }, p, given);
            selectors.push(selector.map_err(|e| e.of_method(&plan.method))?);
        }
        let lists = layer_lists(b, &plan, &shape, stride)?;
        let mut tiles = Tiles { lists: Vec::new(), batch };
        if most_tiles > 0 {
            let shape = LayerShape { slots: most_tiles, ..shape };
            tiles.lists = layer_lists(b, &for_prompts(&plan), &shape, stride)?;
        }
        let scratch = (rows > 0)
            .then(|| -> Result<Scratch> {
                let scores =
                    |n: usize, rows: usize| b.alloc(DType::F32, n * rows * stride, "token scores");
                let per_head_of = if by_head { shape.at_once } else { shape.slots };
                let head_lists = |k: usize| -> Result<(Tensor, Tensor)> {
                    let n = per_head_of * shape.heads;
                    let words = |n| b.alloc(DType::U32, n, "token lists of all heads");
                    Ok((words(n * k)?, words(n)?))
                };
                Ok(Scratch {
                    scores: scores(shape.at_once, rows)?,
                    head_scores: per_head.then(|| scores(per_head_of, shape.heads)).transpose()?,
                    head_lists: united.map(head_lists).transpose()?,
                    stride,
                })
            })
            .transpose()?;
        let paces = Paces::new(&plan, shape.slots);
        let tilings = tilings(&plan);
        Ok(Attention {
            plan,
            paces,
            tilings,
            selectors,
            lists,
            tiles,
            scratch,
            partials: Partials::new(),
            audit_out: Growing::new(DType::F32, "audit"),
            audit_lse: Growing::new(DType::F32, "audit"),
            audit: false,
            audits: Vec::new(),
            probe: None,
            clock: Clock::default(),
        })
    }

    /// The plan that runs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The lists that layer `layer` has attended with, and the list of each of its KV heads where they are not in order.
    pub(crate) fn attended(&self, layer: usize) -> Option<(&Selection, Option<&Tensor>)> {
        let lists = self.lists.get(layer)?.as_ref()?;
        Some((&*lists.attend, lists.head_map.as_ref()))
    }

    /// The lists that layer `layer` has attended with in a step of these prompts, likewise, and which tile's of them are
    /// those of `token` of sequence `i`; None where the layer has read the token densely.
    pub(crate) fn attended_tile(
        &self,
        layer: usize,
        seqs: &[StepSeq<'_>],
        (i, token): (usize, usize),
    ) -> Option<(usize, &Selection, Option<&Tensor>)> {
        let plan = self.plan.layers.get(layer).filter(|p| p.sparse())?;
        let tile = tile_of(plan, seqs, (i, token))?;
        let lists = self.tiles.lists.get(layer)?.as_ref()?;
        Some((tile, &*lists.attend, lists.head_map.as_ref()))
    }

    /// Which sequences of the step that is about to run choose tokens, for each pace of the layers.
    pub(crate) fn cuts(&self, seqs: &[StepSeq<'_>]) -> Vec<Cut> {
        self.paces.cut(seqs)
    }

    /// The step of these cuts has run.
    pub(crate) fn ran(&mut self, seqs: &[StepSeq<'_>], cuts: &[Cut]) {
        self.paces.ran(seqs, cuts);
    }

    /// How layers cut the rows of prompts that they read sparsely.
    pub fn tilings(&self) -> &[Tiling] {
        &self.tilings
    }

    /// Layer `layer` is there and reads prompts sparsely.
    pub fn reads_prompts_sparsely(&self, layer: usize) -> bool {
        self.plan.layers.get(layer).is_some_and(|p| p.tile.is_some())
    }

    /// Layer `layer` is there and is scored with a Forecast.
    pub fn wants_forecast(&self, layer: usize) -> bool {
        self.plan.layers.get(layer).is_some_and(LayerPlan::wants_forecast)
    }

    /// Forgets private state of a slot.
    pub fn reset(&mut self, b: &dyn Backend, slot: usize) -> std::result::Result<(), SelectError> {
        self.paces.reset(slot);
        self.selectors.iter_mut().flatten().try_for_each(|s| s.reset(b, slot))
    }

    /// Copies private state of slot `from`, whose sequence holds `tokens` tokens, to slot `to`.
    pub fn fork(
        &mut self,
        b: &dyn Backend,
        from: usize,
        to: usize,
        tokens: usize,
    ) -> std::result::Result<(), SelectError> {
        self.paces.fork(from, to);
        self.lists.iter().flatten().try_for_each(|l| l.fork(b, from, to))?;
        self.selectors.iter_mut().flatten().try_for_each(|s| s.fork(b, from, to, tokens))
    }

    /// Appends the step's keys and values to the cache of layer `shape.layer`: `ws.k`, which `ropes` make with `ws.q`,
    /// and the v part of `ws.qkv`.
    pub(crate) fn append(
        &mut self,
        b: &dyn Backend,
        step: &Step,
        cache: &KvCache,
        shape: LayerShape,
        ws: &Workspace,
        ropes: Option<[&Rope<'_>; 2]>,
    ) -> Result<()> {
        let l = shape.layer;
        let all = GroupSeqs::new(step, step.all);
        let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let v_start = (shape.heads + shape.kv_heads) * shape.head_dim;
        let v = ws.qkv_from(v_start);
        let slice = self.selectors[l].as_ref().and_then(|s| s.slice());
        let k = (&ws.k, shape.kv_heads * shape.head_dim);
        let append = || cache.append(b, l, all.seqs(), [k, (&v, width)], slice, ropes);
        self.clock.time(b, l, |t| &mut t.append, append)
    }

    /// Attends in layer `shape.layer`, whose keys and values have been appended: `ws.q` in, `ws.attn` out. `forecast`: act
    /// `[rows, kv_heads, head_dim]`, where the layer is scored with it.
    #[allow(clippy::too_many_arguments)]
    pub fn layer(
        &mut self,
        b: &dyn Backend,
        step: &Step,
        cache: &KvCache,
        shape: LayerShape,
        window: Option<usize>,
        ws: &Workspace,
        forecast: Option<&Tensor>,
    ) -> std::result::Result<(), SelectError> {
        let l = shape.layer;
        let pool = cache.pool(l);
        let all = GroupSeqs::new(step, step.all);
        let dense = Dense { b, step, cache, shape, window, q: &ws.q };
        let p = &self.plan.layers[l];
        let run = Run { ws, partials: &mut self.partials, clock: &mut self.clock };
        let Some(lists) = &self.lists[l] else {
            densely(&dense, run)?;
            return Ok(dense.decode(step.decode, &mut self.partials, (&ws.attn, &ws.lse), None)?);
        };
        let missing = |what: &str| SelectError::BadPlan {
            method: self.plan.method.clone(),
            reason: format!("there is no {what}"),
        };
        let cx = LayerContext {
            backend: b,
            seqs: all.seqs(),
            cache: pool,
            int8: cache.int8(l),
            stats: cache.stats(l),
            value_stats: cache.value_stats(l),
            summaries: p.summary().and_then(|kind| cache.summaries(l).find(|s| s.kind == kind)),
            forecast,
            shape,
            scratch: self.scratch.as_ref().ok_or_else(|| missing("score buffer"))?,
        };
        let tiles = (self.tiles.lists.get(l).and_then(Option::as_ref), self.tiles.batch);
        let selector = self.selectors[l].as_deref_mut();
        prefill(&dense, &cx, p, tiles, selector, run)
            .map_err(|e| e.of_method(&self.plan.method))?;

        let pace = pace(p);
        let split = step.split(pace).ok_or_else(|| missing("split of the step"))?;
        let densely = if p.sparse() { split.dense } else { step.decode };
        // Sequences of both are in the same order; where only some choose, they are scored by themselves.
        let scored = p.scores_densely() && window.is_none() && split.fresh.n == step.decode.n;
        let kept = scored.then(|| logits(&cx, p)).transpose()?;
        dense.decode(densely, &mut self.partials, (&ws.attn, &ws.lse), kept)?;
        if split.sparse.n == 0 {
            return Ok(());
        }
        let group = GroupSeqs::new(step, split.sparse);
        let cx = LayerContext { seqs: group.seqs(), ..cx };
        let fresh = GroupSeqs::new(step, split.fresh);
        let selector = self.selectors[l].as_deref_mut();
        choose(&cx, fresh.seqs(), p, lists, selector, (&ws.q, scored))
            .map_err(|e| e.of_method(&self.plan.method))?;
        if !p.sparse() {
            return Ok(());
        }
        // A layer that takes an anchor's lists as they are: those are long there.
        let settled = self.selectors[l].is_none() && lists.handed.is_none();
        let map = (lists.head_map.as_ref(), settled);
        dense.listed(&group, &lists.attend, map, &mut self.partials, &ws.attn, &ws.lse)?;
        correct(&cx, p, &lists.attend, &ws.attn)?;
        if self.audit {
            let members = step.sparse_members(pace);
            let exact_out =
                self.audit_out.at_least(b, cx.seqs.rows * shape.heads * shape.head_dim)?;
            let exact_lse = self.audit_lse.at_least(b, cx.seqs.rows * shape.heads)?;
            dense.decode(split.sparse, &mut self.partials, (&exact_out, &exact_lse), None)?;
            let rows: Vec<(usize, usize)> =
                members.iter().map(|&i| (i, step.first_row[i])).collect();
            let sparse = (&ws.attn, &ws.lse);
            audit(b, shape, &rows, sparse, (&exact_out, &exact_lse), &mut self.audits)?;
        }
        if let Some(probe) = &mut self.probe {
            probe.look(&cx, &p.role, lists, self.selectors[l].as_deref(), &ws.q)?;
        }
        Ok(())
    }
}

/// Records what fills the layer's lists: its own choice for the sequences in `fresh`, and what it hands down, and what
/// the others hold; or its choice among an anchor's candidates; nothing where the anchor's lists are taken as they are.
/// `scored`: the logits are there.
fn choose(
    cx: &LayerContext<'_>,
    fresh: Seqs<'_>,
    plan: &LayerPlan,
    lists: &LayerLists,
    selector: Option<&mut (dyn Selector + 'static)>,
    (q, scored): (&Tensor, bool),
) -> std::result::Result<(), SelectError> {
    if let Some(selector) = selector {
        if fresh.n > 0 {
            let cx = LayerContext { seqs: fresh, ..*cx };
            match scored {
                true => pool_and_pick(&cx, plan, lists.chosen())?,
                false => selector.select(&cx, q, lists.chosen())?,
            }
            if let Some(candidates) = lists.handed_down() {
                hand_down(&cx, candidates)?;
            }
        }
        lists.hold(cx, fresh.n)?;
    } else if let Some(handed) = &lists.handed {
        let candidates = handed.arrange(cx.backend, cx.seqs)?;
        refine(cx, plan, &handed.refine, q, candidates, &lists.attend)?;
    }
    Ok(())
}
