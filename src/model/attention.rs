//! One layer's attention: where selection and cache meet.

use super::audit::{LayerAudit, audit};
use super::step::{Group, GroupSeqs, Step};
use super::workspace::{Growing, Workspace};
use crate::backend::{
    AttendDense, AttendRows, Backend, DType, HeadPool, KeyStats, KvAppend, KvSummaries, Merge,
    Result, Tensor,
};
use crate::kv::KvCache;
use crate::select::{
    LayerContext, LayerPlan, LayerShape, Plan, Role, Scorer, Scratch, SelectError, Selection,
    Selector, SelectorFactory, build,
};

/// A plan made runnable on a device: selectors, their buffers, and the audit.
pub struct Attention {
    plan: Plan,
    thresholds: Vec<usize>,
    selectors: Vec<Option<Box<dyn Selector>>>,
    selections: Vec<Selection>,
    scratch: Option<Scratch>,
    partials: Partials,
    audit_out: Growing,
    audit_lse: Growing,
    /// Layers to audit in the next step.
    pub audit_layers: Vec<usize>,
    /// Results, appended per step.
    pub audits: Vec<LayerAudit>,
}

struct Partials {
    out: Growing,
    lse: Growing,
}

impl std::fmt::Debug for Attention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attention").field("method", &self.plan.method).finish_non_exhaustive()
    }
}

fn lists_per_seq(p: &LayerPlan, s: &LayerShape) -> usize {
    p.lists(s.heads, s.kv_heads)
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
        custom: Option<&SelectorFactory>,
    ) -> std::result::Result<Self, SelectError> {
        let mut selectors = Vec::with_capacity(plan.layers.len());
        let mut selections: Vec<Selection> = Vec::new();
        let (mut rows, mut per_head) = (0, false);
        for (layer, p) in plan.layers.iter().enumerate() {
            let shape = LayerShape { layer, ..shape };
            let selector = build(b, &shape, p, custom);
            selectors.push(selector.map_err(|e| e.of_method(&plan.method))?);
            if p.role == Role::Dense {
                continue;
            }
            let per_seq = lists_per_seq(p, &shape);
            rows = rows.max(per_seq);
            per_head |= matches!(p.pool, HeadPool::MaxSoftmax | HeadPool::MeanSoftmax)
                || matches!(p.scorer, Scorer::Blocks { .. });
            let k = p.budget.tokens;
            if !selections.iter().any(|s| (s.k, s.rows_per_seq) == (k, per_seq)) {
                let n = shape.slots * per_seq;
                selections.push(Selection {
                    indices: b.alloc(DType::U32, n * k, "token lists")?,
                    counts: b.alloc(DType::U32, n, "token counts")?,
                    k,
                    rows_per_seq: per_seq,
                });
            }
        }
        let scratch = (rows > 0)
            .then(|| -> Result<Scratch> {
                let stride = shape.capacity.next_multiple_of(64);
                let scores =
                    |rows: usize| b.alloc(DType::F32, shape.slots * rows * stride, "token scores");
                Ok(Scratch {
                    scores: scores(rows)?,
                    head_scores: per_head.then(|| scores(shape.heads)).transpose()?,
                    stride,
                })
            })
            .transpose()?;
        let mut thresholds: Vec<usize> = plan
            .layers
            .iter()
            .filter(|p| p.role != Role::Dense)
            .map(|p| p.budget.dense_until())
            .collect();
        thresholds.sort_unstable();
        thresholds.dedup();
        Ok(Attention {
            plan,
            thresholds,
            selectors,
            selections,
            scratch,
            partials: Partials {
                out: Growing::new(DType::F32, "attention splits"),
                lse: Growing::new(DType::F32, "attention splits"),
            },
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
        for summaries in cache.summaries(l) {
            b.kv_summaries(&KvSummaries { seqs: all.seqs(), cache: pool, summaries })?;
        }

        let dense = Dense { b, step, cache, shape, window, q: &ws.q };
        dense.attend(step.prefill, 1, &ws.attn, None)?;
        let p = &self.plan.layers[l];
        let Some(selector) = self.selectors[l].as_mut() else {
            return Ok(dense.decode(step.decode, &mut self.partials, &ws.attn, &ws.lse)?);
        };
        let missing = |what: &str| SelectError::BadPlan {
            method: self.plan.method.clone(),
            reason: format!("there is no {what}"),
        };
        let threshold = p.budget.dense_until();
        let split = step.split(threshold).ok_or_else(|| missing("split of the step"))?;
        dense.decode(split.dense, &mut self.partials, &ws.attn, &ws.lse)?;
        if split.sparse.n == 0 {
            return Ok(());
        }

        let group = GroupSeqs::new(step, split.sparse);
        let seqs = group.seqs();
        let per_seq = lists_per_seq(p, &shape);
        let out = self
            .selections
            .iter()
            .find(|s| (s.k, s.rows_per_seq) == (p.budget.tokens, per_seq))
            .ok_or_else(|| missing("token list"))?;
        let scratch = self.scratch.as_ref().ok_or_else(|| missing("score buffer"))?;
        let cx = LayerContext {
            backend: b,
            seqs,
            cache: pool,
            int8: cache.int8(l),
            stats: cache.stats(l),
            summaries: p.summary().and_then(|kind| cache.summaries(l).find(|s| s.kind == kind)),
            forecast,
            shape,
            scratch,
        };
        selector.select(&cx, &ws.q, out).map_err(|e| e.of_method(&self.plan.method))?;
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
                rows_per_seq: per_seq,
                splits,
                out: o,
                lse: Some(lse),
            })
        };
        self.partials.run(b, &group, splits, shape, &ws.attn, &ws.lse, attend)?;
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

impl Partials {
    /// Runs a decode attention with `splits` key ranges and merges them into `out` and `lse`.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &mut self,
        b: &dyn Backend,
        group: &GroupSeqs,
        splits: usize,
        shape: LayerShape,
        out: &Tensor,
        lse: &Tensor,
        attend: impl Fn(&Tensor, &Tensor, usize) -> Result<()>,
    ) -> Result<()> {
        if splits <= 1 {
            return attend(out, lse, 1);
        }
        let seqs = group.seqs();
        let n = splits * seqs.rows * shape.heads;
        let part = self.out.at_least(b, n * shape.head_dim)?;
        let part_lse = self.lse.at_least(b, n)?;
        attend(&part, &part_lse, splits)?;
        b.merge(&Merge {
            part: &part,
            part_lse: &part_lse,
            seqs,
            splits,
            heads: shape.heads,
            head_dim: shape.head_dim,
            out,
            lse: Some(lse),
        })
    }
}

/// Dense attention of one layer of one step.
struct Dense<'a> {
    b: &'a dyn Backend,
    step: &'a Step,
    cache: &'a KvCache,
    shape: LayerShape,
    window: Option<usize>,
    q: &'a Tensor,
}

impl Dense<'_> {
    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    fn attend(&self, g: Group, splits: usize, out: &Tensor, lse: Option<&Tensor>) -> Result<()> {
        if g.n == 0 {
            return Ok(());
        }
        let group = GroupSeqs::new(self.step, g);
        self.b.attend_dense(&AttendDense {
            q: self.q,
            seqs: group.seqs(),
            cache: self.cache.pool(self.shape.layer),
            heads: self.shape.heads,
            scale: self.scale(),
            window: self.window,
            splits,
            out,
            lse,
        })
    }

    fn decode(&self, g: Group, partials: &mut Partials, out: &Tensor, lse: &Tensor) -> Result<()> {
        if g.n == 0 {
            return Ok(());
        }
        let group = GroupSeqs::new(self.step, g);
        let keys = self.window.map_or(g.max_kv, |w| w.min(g.max_kv));
        let splits = self.b.splits(g.n * self.shape.kv_heads, keys);
        partials.run(self.b, &group, splits, self.shape, out, lse, |o, l, splits| {
            self.attend(g, splits, o, Some(l))
        })
    }
}
