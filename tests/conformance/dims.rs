//! select_dims and rebuild_slice.

use super::batch::{Batch, Cache, Placed, Shape};
use super::errors::{WRAPS, short};
use super::rig::{Outcome, Rig, fail};
use super::{Cases, Types};
use longsight::backend::{
    CHANGED_WORDS, CompactSlice, DIM_STATE_WORDS, DType, DimMetric, HeadPool, KvAppend, LogitScale,
    RebuildSlice, Refresh, ScoreDims, ScoreSource, SelectDims, Tensor, key_stats_len, reference,
};

#[derive(Clone, Copy)]
struct Dims {
    shape: Shape,
    group: usize,
    n_dims: usize,
    unit: usize,
    metric: DimMetric,
    refresh: Refresh,
    steps: usize,
}

const fn every(every: u32, phase: u32) -> Refresh {
    Refresh::Every { every, phase }
}

pub fn cases(c: &mut Cases) {
    use DimMetric::{AbsQ, AbsQk, PairNorm, PairQk};
    let adaptive = |beta, min, max| Refresh::Adaptive { beta, min, max };
    for (name, d, kv_heads, group, n_dims, unit, metric, refresh, steps) in [
        ("first_only", 64, 3, 3, 16, 1, AbsQ, every(0, 0), 3),
        ("each_step", 128, 2, 4, 32, 1, AbsQ, every(1, 0), 4),
        ("every3_phase1", 128, 1, 8, 32, 2, PairNorm, every(3, 1), 6),
        ("abs_qk", 64, 2, 1, 24, 1, AbsQk, every(2, 0), 4),
        ("pair_qk", 96, 2, 3, 32, 2, PairQk, every(2, 1), 4),
        ("groups_of_8", 128, 2, 4, 32, 8, AbsQ, every(1, 0), 3),
        ("groups_of_16", 80, 1, 16, 32, 16, PairNorm, every(1, 0), 3),
        ("pairs_by_abs", 64, 2, 2, 16, 2, AbsQ, every(1, 0), 3),
        ("all_dims", 64, 2, 2, 64, 1, AbsQ, every(1, 0), 2),
        ("adaptive", 128, 2, 4, 32, 2, PairQk, adaptive(0.95, 1, 4), 8),
        ("adaptive_min3", 64, 3, 3, 16, 1, AbsQ, adaptive(0.99, 3, 100), 7),
        ("adaptive_max2", 64, 2, 1, 16, 1, AbsQ, adaptive(0.0001, 1, 2), 6),
    ] {
        let shape = Shape { kv_heads, d, lead: d };
        let case = Dims { shape, group, n_dims, unit, metric, refresh, steps };
        let name = format!("{name}_d{d}_g{group}_n{n_dims}_unit{unit}");
        c.add("select_dims", name, move |rig, t| steps_of(rig, t, case));
    }
    if c.types.w == DType::F32 {
        c.add("select_dims", "bad_arguments", |rig, _| bad_arguments(rig));
    }
    for (name, value) in [("equal_queries", 1.5), ("zero_query", 0.0)] {
        c.add("select_dims", name, move |rig, t| ties(rig, t, value));
    }
    for (lead, d, kv_heads, group) in [(64, 64, 3, 3), (32, 128, 2, 4), (16, 96, 1, 8)] {
        let shape = Shape { kv_heads, d, lead };
        for (how, refresh) in [("every2", every(2, 0)), ("adaptive", adaptive(0.97, 1, 3))] {
            let metric = PairNorm;
            let case = Dims { shape, group, n_dims: 24, unit: 2, metric, refresh, steps: 5 };
            let name = format!("flow_{how}_d{d}_g{group}_lead{lead}");
            c.add("rebuild_slice", name, move |rig, t| flow(rig, t, case));
        }
        let name = format!("mask_d{d}_h{kv_heads}_lead{lead}");
        c.add("rebuild_slice", name, move |rig, t| mask(rig, t, shape));
    }
}

/// The device state of a [`SelectDims`] call.
struct State {
    dims: Tensor,
    state: Tensor,
    changed: Tensor,
    coverage: Tensor,
    stats: Tensor,
    q: Tensor,
    heads: usize,
}

impl State {
    /// Fresh state for the slots in use, poison in the other one.
    fn new(rig: &mut Rig, t: Types, b: &Batch, c: &Dims) -> Outcome<State> {
        let kv_heads = c.shape.kv_heads;
        let heads = kv_heads * c.group;
        let fresh = |per: usize| {
            let mut words = vec![u32::MAX; b.slots * kv_heads * per];
            for s in &b.seqs {
                words[s.slot * kv_heads * per..][..kv_heads * per].fill(0);
            }
            words
        };
        // Sums that belong to keys of random mean and deviation.
        let (d, len) = (c.shape.d, key_stats_len(c.shape.d));
        let mut sums = vec![f64::NAN; b.slots * kv_heads * len];
        for s in &b.seqs {
            for h in 0..kv_heads {
                let one = &mut sums[(s.slot * kv_heads + h) * len..][..len];
                let (sum, pair) = one.split_at_mut(2 * d);
                for (part, n) in [(sum, d), (pair, d / 2)] {
                    let (mean, spread) = (rig.normal(n, 0.5), rig.normal(n, 1.0));
                    for i in 0..n {
                        let count = s.kv_len as f64;
                        part[i] = mean[i].abs() * count;
                        part[n + i] = (mean[i] * mean[i] + spread[i] * spread[i] + 0.01) * count;
                    }
                }
            }
        }
        Ok(State {
            dims: rig.words(&fresh(c.n_dims))?,
            state: rig.words(&fresh(DIM_STATE_WORDS))?,
            changed: rig.output(DType::U32, b.slots * kv_heads * CHANGED_WORDS)?,
            coverage: rig.output(DType::F32, b.slots * kv_heads * 2)?,
            stats: rig.input(DType::F32, &sums)?,
            q: rig.output(t.act, b.rows * heads * d)?,
            heads,
        })
    }

    fn params<'a>(&'a self, b: &'a Batch, c: &Dims) -> SelectDims<'a> {
        SelectDims {
            q: &self.q,
            seqs: b.seqs(),
            stats: c.metric.needs_stats().then_some(&self.stats),
            dims: &self.dims,
            state: &self.state,
            changed: &self.changed,
            coverage: &self.coverage,
            heads: self.heads,
            kv_heads: c.shape.kv_heads,
            head_dim: c.shape.d,
            slots: b.slots,
            n_dims: c.n_dims,
            unit: c.unit,
            metric: c.metric,
            refresh: c.refresh,
        }
    }

    /// Writes a query near the last one for which every decision is clear of f32 rounding.
    fn query(&self, rig: &mut Rig, b: &Batch, c: &Dims, last: &mut Vec<f64>) -> Outcome {
        let width = self.heads * c.shape.d;
        for _ in 0..100 {
            let mut q = b.row_values(rig, width, width);
            q.resize(b.rows * width, f64::NAN);
            if last.len() == q.len() {
                q.iter_mut().zip(&*last).for_each(|(q, l)| *q = 0.6 * *q + 0.8 * l);
            }
            rig.write(&self.q, &q)?;
            if reference::decision_margin(&self.params(b, c), &*rig.dev)? > 1e-4 {
                *last = q;
                return Ok(());
            }
        }
        fail("no query with clear decisions in 100 tries")
    }
}

fn steps_of(rig: &mut Rig, t: Types, c: Dims) -> Outcome {
    let mut b = Batch::decode(rig, &[65, 200, 3])?;
    let s = State::new(rig, t, &b, &c)?;
    let mut last = Vec::new();
    for _ in 0..c.steps {
        s.query(rig, &b, &c, &mut last)?;
        let p = s.params(&b, &c);
        let outs = reference::select_dims(&p, &*rig.dev)?;
        rig.check(t.act, &outs, &|dev| dev.select_dims(&p))?;
        b.advance(rig)?;
    }
    Ok(())
}

/// Exactly equal importances: the smallest dimensions.
fn ties(rig: &mut Rig, t: Types, value: f64) -> Outcome {
    let shape = Shape { kv_heads: 2, d: 64, lead: 64 };
    let (metric, refresh) = (DimMetric::AbsQ, every(1, 0));
    let c = Dims { shape, group: 3, n_dims: 16, unit: 1, metric, refresh, steps: 1 };
    let b = Batch::decode(rig, &[65, 1])?;
    let s = State::new(rig, t, &b, &c)?;
    rig.write(&s.q, &vec![value; s.q.len()])?;
    let p = s.params(&b, &c);
    let outs = reference::select_dims(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.select_dims(&p))
}

/// Append, choose, rebuild, score, step after step: the slice always equals one built from scratch.
fn flow(rig: &mut Rig, t: Types, c: Dims) -> Outcome {
    let Shape { kv_heads, d, .. } = c.shape;
    let mut b = Batch::decode(rig, &[64, 130, 1])?;
    let capacity = b.max_kv;
    let cache = Cache::new(rig, &b, c.shape, t.w, |s: &Placed| s.kv_len - 1)?;
    let s = State::new(rig, t, &b, &c)?;
    let data = rig.output(t.w, b.slots * kv_heads * capacity * c.n_dims)?;
    let width = kv_heads * d;
    let (k, v) = (rig.output(t.act, b.rows * width)?, rig.output(t.act, b.rows * width)?);
    let (stride, rows_per_seq) = (b.stride(), kv_heads);
    let scores = rig.output(DType::F32, b.n() * rows_per_seq * stride)?;
    let mut last = Vec::new();
    for step in 0..c.steps {
        if step > 0 {
            b.advance(rig)?;
        }
        for t in [&k, &v] {
            let mut values = b.row_values(rig, width, width);
            values.resize(t.len(), f64::NAN);
            rig.write(t, &values)?;
        }
        s.query(rig, &b, &c, &mut last)?;
        let (seqs, pool, slots) = (b.seqs(), cache.pool(), b.slots);
        let slice = CompactSlice { data: &data, dims: &s.dims, n_dims: c.n_dims, capacity, slots };
        let (k_stride, v_stride) = (width, width);
        let (int8, given) = (None, Some(slice));
        let p =
            KvAppend { k: &k, k_stride, v: &v, v_stride, seqs, cache: pool, int8, slice: given };
        let outs = reference::kv_append(&p, &*rig.dev)?;
        rig.check(t.act, &outs, &|dev| dev.kv_append(&p))?;
        let p = s.params(&b, &c);
        let outs = reference::select_dims(&p, &*rig.dev)?;
        rig.check(t.act, &outs, &|dev| dev.select_dims(&p))?;
        let p = RebuildSlice { seqs, cache: pool, slice, changed: &s.changed };
        let outs = reference::rebuild_slice(&p, &*rig.dev)?;
        rig.check(t.act, &outs, &|dev| dev.rebuild_slice(&p))?;
        let p = ScoreDims {
            q: &s.q,
            seqs,
            cache: pool,
            source: ScoreSource::Slice(slice),
            heads: s.heads,
            pool: HeadPool::SumLogit,
            scale: LogitScale::Coverage,
            scores: &scores,
            stride,
        };
        let outs = reference::score_dims(&p, &*rig.dev)?;
        rig.check(t.act, &outs, &|dev| dev.score_dims(&p))?;
        let p = ScoreDims { source: ScoreSource::Gather { dims: &s.dims, n: c.n_dims }, ..p };
        let outs = reference::score_dims(&p, &*rig.dev)?;
        rig.expect(t.act, &outs)?;
    }
    Ok(())
}

/// Random masks over columns, among them none and all; the slice has exactly room for the longest sequence.
fn mask(rig: &mut Rig, t: Types, shape: Shape) -> Outcome {
    let mut b = Batch::decode(rig, &[65, 200, 1, 64])?;
    b.max_kv = 200;
    let cache = Cache::new(rig, &b, shape, t.w, |s| s.kv_len)?;
    let (n_dims, capacity, kv_heads) = (40, 200, shape.kv_heads);
    let data = rig.output(t.w, b.slots * kv_heads * capacity * n_dims)?;
    let mut list = vec![u32::MAX; b.slots * kv_heads * n_dims];
    let mut mask = vec![u32::MAX; b.slots * kv_heads * CHANGED_WORDS];
    for (n, s) in b.seqs.iter().enumerate() {
        for h in 0..kv_heads {
            let at = s.slot * kv_heads + h;
            let order = rig.shuffled(shape.d);
            list[at * n_dims..][..n_dims].iter_mut().zip(order).for_each(|(d, i)| *d = i as u32);
            let words = &mut mask[at * CHANGED_WORDS..][..CHANGED_WORDS];
            words.fill(0);
            let random = [rig.below(1 << 32) as u32, rig.below(256) as u32];
            words[..2].copy_from_slice(match n {
                0 => &[0, 0],
                1 => &[u32::MAX, 0xFF],
                _ => &random,
            });
        }
    }
    let (dims, changed) = (rig.words(&list)?, rig.words(&mask)?);
    let slice = CompactSlice { data: &data, dims: &dims, n_dims, capacity, slots: b.slots };
    let p = RebuildSlice { seqs: b.seqs(), cache: cache.pool(), slice, changed: &changed };
    let outs = reference::rebuild_slice(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.rebuild_slice(&p))
}

fn bad_arguments(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[65, 3])?;
    let per = b.slots * 2;
    let q = rig.zeros(DType::F32, b.rows * 6 * 64)?;
    let list = rig.words(&vec![0; per * 16])?;
    let state = rig.words(&vec![0; per * DIM_STATE_WORDS])?;
    let changed = rig.words(&vec![0; per * CHANGED_WORDS])?;
    let coverage = rig.output(DType::F32, per * 2)?;
    let p = || SelectDims {
        q: &q,
        seqs: b.seqs(),
        stats: None,
        dims: &list,
        state: &state,
        changed: &changed,
        coverage: &coverage,
        heads: 6,
        kv_heads: 2,
        head_dim: 64,
        slots: b.slots,
        n_dims: 16,
        unit: 1,
        metric: DimMetric::AbsQ,
        refresh: Refresh::Every { every: 1, phase: 0 },
    };
    let metric = DimMetric::AbsQk;
    rig.refuses("no stats", dev.select_dims(&SelectDims { metric, ..p() }))?;
    let metric = DimMetric::PairNorm;
    rig.refuses("pairs of 1", dev.select_dims(&SelectDims { metric, ..p() }))?;
    rig.refuses("unit 3", dev.select_dims(&SelectDims { unit: 3, ..p() }))?;
    rig.refuses("12 dimensions", dev.select_dims(&SelectDims { n_dims: 12, ..p() }))?;
    rig.refuses("24 of room for 16", dev.select_dims(&SelectDims { n_dims: 24, ..p() }))?;
    rig.refuses("slots", dev.select_dims(&SelectDims { slots: b.slots + 1, ..p() }))?;
    rig.refuses("slots that wrap", dev.select_dims(&SelectDims { slots: WRAPS, ..p() }))?;
    rig.refuses("changed is state", dev.select_dims(&SelectDims { changed: &list, ..p() }))?;
    rig.refuses("short state", dev.select_dims(&SelectDims { state: &short(&state), ..p() }))?;
    rig.refuses("u32 coverage", dev.select_dims(&SelectDims { coverage: &state, ..p() }))
}
