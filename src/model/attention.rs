//! One layer's attention: where selection and cache meet.

use super::attend::{Dense, Partials};
use super::audit::{LayerAudit, audit};
use super::lists::{LayerLists, layer_lists};
use super::step::{GroupSeqs, Step};
use super::workspace::{Growing, Workspace};
use crate::backend::{AttendRows, Backend, DType, KeyStats, KvAppend, KvSummaries, Result, Tensor};
use crate::kv::KvCache;
use crate::select::{
    Given, LayerContext, LayerPlan, LayerShape, Plan, Role, Scratch, SelectError, Selector, build,
    correct, hand_down, refine,
};

/// A plan made runnable on a device: selectors, their buffers, and the audit.
pub struct Attention {
    plan: Plan,
    thresholds: Vec<usize>,
    selectors: Vec<Option<Box<dyn Selector>>>,
    lists: Vec<Option<LayerLists>>,
    scratch: Option<Scratch>,
    partials: Partials,
    audit_out: Growing,
    audit_lse: Growing,
    /// Layers to audit in the next step.
    pub audit_layers: Vec<usize>,
    /// Results, appended per step.
    pub audits: Vec<LayerAudit>,
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
        let mut selectors = Vec::with_capacity(plan.layers.len());
        let not_dense = || plan.layers.iter().filter(|p| p.role != Role::Dense);
        for (layer, p) in plan.layers.iter().enumerate() {
            let selector = build(b, &LayerShape { layer, ..shape }, p, given);
            selectors.push(selector.map_err(|e| e.of_method(&plan.method))?);
        }
        let stride = shape.capacity.next_multiple_of(64);
        let lists = layer_lists(b, &plan, &shape, stride)?;
        let rows = not_dense().map(|p| p.lists(shape.heads, shape.kv_heads)).max().unwrap_or(0);
        let per_head = not_dense().any(|p| p.pool.softmax() || p.correct || p.summary().is_some());
        let scratch = (rows > 0)
            .then(|| -> Result<Scratch> {
                let scores =
                    |rows: usize| b.alloc(DType::F32, shape.slots * rows * stride, "token scores");
                Ok(Scratch {
                    scores: scores(rows)?,
                    head_scores: per_head.then(|| scores(shape.heads)).transpose()?,
                    stride,
                })
            })
            .transpose()?;
        let mut thresholds: Vec<usize> = not_dense().map(|p| p.budget.dense_until()).collect();
        thresholds.sort_unstable();
        thresholds.dedup();
        Ok(Attention {
            plan,
            thresholds,
            selectors,
            lists,
            scratch,
            partials: Partials::new(),
            audit_out: Growing::new(DType::F32, "audit"),
            audit_lse: Growing::new(DType::F32, "audit"),
            audit_layers: Vec::new(),
            audits: Vec::new(),
        })
    }

    /// The plan that runs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Distinct lengths up to which layers stay dense.
    pub fn thresholds(&self) -> &[usize] {
        &self.thresholds
    }

    /// Layer `layer` is there and is scored with a Forecast.
    pub fn wants_forecast(&self, layer: usize) -> bool {
        self.plan.layers.get(layer).is_some_and(LayerPlan::wants_forecast)
    }

    /// Forgets private state of a slot.
    pub fn reset(&mut self, b: &dyn Backend, slot: usize) -> std::result::Result<(), SelectError> {
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
        self.selectors.iter_mut().flatten().try_for_each(|s| s.fork(b, from, to, tokens))
    }

    /// Appends the step's keys and values to the cache of layer `shape.layer`, then attends: `ws.q`, `ws.k` and
    /// the v part of `ws.qkv` in, `ws.attn` out. `forecast`: act `[decode rows, kv_heads, head_dim]`, where the layer is
    /// scored with it.
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
        let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let v_start = (shape.heads + shape.kv_heads) * shape.head_dim;
        let v = ws.qkv.slice(v_start, ws.qkv.len() - v_start);
        b.kv_append(&KvAppend {
            k: &ws.k,
            k_stride: shape.kv_heads * shape.head_dim,
            v: &v,
            v_stride: width,
            seqs: all.seqs(),
            cache: pool,
            int8: cache.int8(l),
            slice: self.selectors[l].as_ref().and_then(|s| s.slice()),
        })?;
        if let Some(stats) = cache.stats(l) {
            let slots = cache.shape().slots;
            b.key_stats(&KeyStats { seqs: all.seqs(), cache: pool, stats, slots })?;
        }
        if let Some(stats) = cache.value_stats(l) {
            let (slots, cache) = (cache.shape().slots, pool.of_values());
            b.key_stats(&KeyStats { seqs: all.seqs(), cache, stats, slots })?;
        }
        for summaries in cache.summaries(l) {
            b.kv_summaries(&KvSummaries { seqs: all.seqs(), cache: pool, summaries })?;
        }

        let dense = Dense { b, step, cache, shape, window, q: &ws.q };
        dense.attend(step.prefill, 1, &ws.attn, None)?;
        let p = &self.plan.layers[l];
        let Some(lists) = &self.lists[l] else {
            return Ok(dense.decode(step.decode, &mut self.partials, &ws.attn, &ws.lse)?);
        };
        let missing = |what: &str| SelectError::BadPlan {
            method: self.plan.method.clone(),
            reason: format!("there is no {what}"),
        };
        let threshold = p.budget.dense_until();
        let split = step.split(threshold).ok_or_else(|| missing("split of the step"))?;
        let densely = if p.sparse() { split.dense } else { step.decode };
        dense.decode(densely, &mut self.partials, &ws.attn, &ws.lse)?;
        if split.sparse.n == 0 {
            return Ok(());
        }

        let group = GroupSeqs::new(step, split.sparse);
        let seqs = group.seqs();
        let scratch = self.scratch.as_ref().ok_or_else(|| missing("score buffer"))?;
        let cx = LayerContext {
            backend: b,
            seqs,
            cache: pool,
            int8: cache.int8(l),
            stats: cache.stats(l),
            value_stats: cache.value_stats(l),
            summaries: p.summary().and_then(|kind| cache.summaries(l).find(|s| s.kind == kind)),
            forecast,
            shape,
            scratch,
        };
        choose(&cx, p, lists, self.selectors[l].as_deref_mut(), &ws.q)
            .map_err(|e| e.of_method(&self.plan.method))?;
        if !p.sparse() {
            return Ok(());
        }
        let out = &*lists.attend;
        let splits = b.splits(seqs.n * shape.kv_heads, out.k);
        let attend = |o: &Tensor, lse: &Tensor, splits: usize| {
            b.attend_rows(&AttendRows {
                q: &ws.q,
                seqs,
                cache: pool,
                heads: shape.heads,
                scale: dense.scale(),
                indices: &out.indices,
                counts: &out.counts,
                k: out.k,
                rows_per_seq: out.rows_per_seq,
                head_map: lists.head_map.as_ref(),
                splits,
                out: o,
                lse: Some(lse),
            })
        };
        self.partials.run(b, &group, splits, shape, &ws.attn, &ws.lse, attend)?;
        correct(&cx, p, out, &ws.attn)?;
        if self.audit_layers.contains(&l) {
            let members = step.sparse_members(threshold);
            let exact_out = self.audit_out.at_least(b, seqs.rows * shape.heads * shape.head_dim)?;
            let exact_lse = self.audit_lse.at_least(b, seqs.rows * shape.heads)?;
            dense.decode(split.sparse, &mut self.partials, &exact_out, &exact_lse)?;
            let rows: Vec<(usize, usize)> =
                members.iter().map(|&i| (i, step.first_row[i])).collect();
            let sparse = (&ws.attn, &ws.lse);
            audit(b, shape, &rows, sparse, (&exact_out, &exact_lse), &mut self.audits)?;
        }
        Ok(())
    }
}

/// Records what fills the layer's lists: its own choice, and what it hands down; or its choice among an anchor's
/// candidates; nothing where the anchor's lists are taken as they are.
fn choose(
    cx: &LayerContext<'_>,
    plan: &LayerPlan,
    lists: &LayerLists,
    selector: Option<&mut (dyn Selector + 'static)>,
    q: &Tensor,
) -> std::result::Result<(), SelectError> {
    if let Some(selector) = selector {
        selector.select(cx, q, &lists.attend)?;
        if let Some(candidates) = &lists.candidates {
            hand_down(cx, candidates)?;
        }
    } else if let Some(handed) = &lists.handed {
        let candidates = handed.arrange(cx.backend, cx.seqs)?;
        refine(cx, plan, &handed.refine, q, candidates, &lists.attend)?;
    }
    Ok(())
}
