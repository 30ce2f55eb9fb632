//! score_dims, pool_scores, force.

use super::batch::{Batch, Cache, Shape};
use super::rig::{Outcome, Rig, fail};
use super::{Cases, Types};
use longsight::backend::reference::{self, Cell};
use longsight::backend::{
    CompactSlice, DType, Force, HeadPool, Int8Keys, LogitScale, PoolScores, ScoreDims, ScoreSource,
    Seqs,
};

#[derive(Clone, Copy, Debug)]
enum Kind {
    Lead,
    Int8,
    Slice,
    Gather,
}

#[derive(Clone, Copy)]
struct Score {
    shape: Shape,
    group: usize,
    from: Kind,
    n: usize,
    pool: HeadPool,
    scale: LogitScale,
    /// Logits of every head, pooled so afterwards.
    then: Option<HeadPool>,
}

const EDGES: &[usize] = &[1, 63, 64, 65];
const LONG: &[usize] = &[1000, 200, 5000];

pub fn cases(c: &mut Cases) {
    use HeadPool::{AllSoftmax, AnySoftmax, MaxLogit, MaxSoftmax, MeanSoftmax, None, SumLogit};
    use Kind::{Gather, Int8, Lead, Slice};
    use LogitScale::{Coverage, InvSqrtDim};
    for (d, kv_heads, group, lead, from, n, pool, scale) in [
        // Leading dimensions of the tile: exactly `lead`, fewer, more than the first piece, all (exact logits).
        (64, 3, 3, 32, Lead, 32, MaxSoftmax, InvSqrtDim),
        (64, 3, 3, 64, Lead, 16, SumLogit, Coverage),
        (128, 2, 4, 32, Lead, 32, SumLogit, InvSqrtDim),
        (128, 2, 4, 32, Lead, 16, MaxLogit, Coverage),
        (128, 1, 8, 16, Lead, 48, MeanSoftmax, InvSqrtDim),
        (128, 1, 16, 128, Lead, 128, MaxSoftmax, InvSqrtDim),
        // 32, 64 and 128 dimensions, up to 8 heads and up to 16, pooled and not: kernels of their own.
        (128, 2, 4, 32, Lead, 128, MaxLogit, InvSqrtDim),
        (64, 2, 8, 32, Lead, 64, None, Coverage),
        (64, 1, 12, 32, Lead, 64, SumLogit, InvSqrtDim),
        (128, 1, 9, 64, Lead, 32, MaxLogit, Coverage),
        (128, 2, 4, 64, Int8, 64, MaxLogit, Coverage),
        (128, 1, 16, 128, Int8, 128, None, InvSqrtDim),
        (128, 2, 2, 128, Int8, 128, SumLogit, Coverage),
        (64, 1, 16, 64, Int8, 64, SumLogit, InvSqrtDim),
        (128, 1, 16, 64, Slice, 64, MaxLogit, Coverage),
        (128, 2, 4, 64, Slice, 128, None, InvSqrtDim),
        (64, 1, 12, 64, Int8, 32, MaxLogit, InvSqrtDim),
        (64, 2, 3, 64, Slice, 64, SumLogit, InvSqrtDim),
        (64, 1, 16, 32, Slice, 32, None, InvSqrtDim),
        (128, 1, 10, 128, Slice, 128, MaxLogit, InvSqrtDim),
        (96, 2, 1, 16, Lead, 96, None, InvSqrtDim),
        (80, 1, 4, 80, Lead, 24, SumLogit, InvSqrtDim),
        (64, 3, 3, 64, Int8, 32, SumLogit, InvSqrtDim),
        (128, 2, 4, 32, Int8, 32, MaxSoftmax, Coverage),
        (128, 1, 16, 32, Int8, 16, MaxLogit, InvSqrtDim),
        (96, 2, 1, 96, Int8, 8, None, InvSqrtDim),
        (64, 3, 3, 64, Slice, 32, MaxSoftmax, InvSqrtDim),
        (128, 2, 4, 32, Slice, 32, SumLogit, Coverage),
        (128, 1, 8, 16, Slice, 48, MaxLogit, InvSqrtDim),
        (96, 2, 1, 96, Slice, 8, None, Coverage),
        (64, 3, 3, 64, Gather, 16, SumLogit, InvSqrtDim),
        (128, 2, 4, 32, Gather, 32, MaxSoftmax, Coverage),
        (128, 1, 16, 16, Gather, 64, MaxLogit, InvSqrtDim),
        (80, 2, 3, 16, Gather, 80, None, InvSqrtDim),
    ] {
        let shape = Shape { kv_heads, d, lead };
        let case = Score { shape, group, from, n, pool, scale, then: Option::None };
        for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
            let name = format!("{from:?}_d{d}_g{group}_lead{lead}_n{n}_{pool:?}_{scale:?}_{mix}");
            c.add("score_dims", name.to_lowercase(), move |rig, t| {
                score(rig, t, kv, case, |_, _, _| ())
            });
            for (nr, then) in [MaxSoftmax, MeanSoftmax, AllSoftmax, AnySoftmax].iter().enumerate() {
                if !(n + group + nr + kv.len()).is_multiple_of(2) {
                    continue;
                }
                let case = Score { pool: HeadPool::None, then: Some(*then), ..case };
                let name =
                    format!("{from:?}_d{d}_g{group}_lead{lead}_n{n}_{then:?}_{scale:?}_{mix}");
                c.add("score_pool", name.to_lowercase(), move |rig, t| {
                    score(rig, t, kv, case, |_, _, _| ())
                });
            }
        }
    }
    for (from, pool) in
        [(Lead, SumLogit), (Lead, MaxLogit), (Slice, None), (Gather, MaxLogit), (Slice, SumLogit)]
    {
        let shape = Shape { kv_heads: 2, d: 64, lead: 32 };
        let case =
            Score { shape, group: 3, from, n: 32, pool, scale: InvSqrtDim, then: Option::None };
        let name = format!("nonfinite_keys_{from:?}_{pool:?}").to_lowercase();
        c.add("score_dims", name, move |rig, t| score(rig, t, LONG, case, spoil));
    }
    c.add("score_dims", "zero_query_coverage", zero_query);
    c.add("score_pool", "bad_arguments", pooled_badly);
    // No dtype but f32 takes part in what follows.
    if c.types.w != DType::F32 {
        return;
    }
    for (heads, kv_heads, scale) in
        [(9, 3, 1.0), (8, 2, 40.0), (8, 1, 3.0), (16, 1, 200.0), (2, 2, 1.0)]
    {
        let all = [AllSoftmax, AnySoftmax, SumLogit, MaxLogit];
        let all = all.into_iter().flat_map(|pool| [(pool, EDGES), (pool, LONG)]);
        let group = [(MaxSoftmax, EDGES), (MeanSoftmax, LONG), (MaxSoftmax, LONG)];
        for (pool, kv) in group.into_iter().chain(all) {
            let mix = if kv == EDGES { "edges" } else { "long" };
            let name = format!("h{heads}_kv{kv_heads}_scale{scale}_{pool:?}_{mix}").to_lowercase();
            c.add("pool_scores", name, move |rig, _| {
                pool_scores(rig, kv, [heads, kv_heads], pool, scale)
            });
        }
    }
    for (sinks, recent, rows) in [(0, 1, 3), (4, 64, 2), (1, 65, 1), (70, 100, 9), (10_000, 1, 2)] {
        for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
            let name = format!("sinks{sinks}_recent{recent}_rows{rows}_{mix}");
            c.add("force", name, move |rig, _| force(rig, kv, rows, sinks, recent));
        }
    }
}

/// `edit` may change the keys (host values, their shape, the batch) before they are uploaded.
fn score(
    rig: &mut Rig,
    t: Types,
    kv: &[usize],
    c: Score,
    edit: impl Fn(&mut [f64], Shape, &Batch),
) -> Outcome {
    let Shape { kv_heads, d, lead } = c.shape;
    let heads = kv_heads * c.group;
    let b = Batch::decode(rig, kv)?;
    let q = b.queries(rig, t.act, heads * d)?;
    let mut keys = Cache::values(rig, &b, c.shape, lead, &|s| s.kv_len);
    edit(&mut keys, c.shape, &b);
    // Scores never read V.
    let cache = Cache::of(rig, &b, c.shape, t.w, &keys, &vec![f64::NAN; keys.len()])?;
    let i8_dims = 32.max(c.n.next_multiple_of(8)).min(d);
    let one = |d: usize| Shape { kv_heads, d, lead: d };
    let (mut data, mut scale) = (vec![0.0; 0], vec![f64::NAN; 0]);
    if matches!(c.from, Kind::Int8) {
        data = vec![-128.0; keys.len() / d * i8_dims];
        scale = vec![f64::NAN; keys.len() / d];
        for s in &b.seqs {
            for (j, h) in (0..s.kv_len).flat_map(|j| (0..kv_heads).map(move |h| (j, h))) {
                for i in 0..i8_dims {
                    data[Cache::at(s, one(i8_dims), h, j, i)] = rig.below(255) as f64 - 127.0;
                }
                let step = rig.normal(1, 0.01)[0].abs();
                // A zero row of the original has scale 0.
                scale[Cache::at(s, one(1), h, j, 0)] = if j % 50 == 7 { 0.0 } else { step };
            }
        }
    }
    let (data, scale) = (rig.input(DType::I8, &data)?, rig.input(DType::F32, &scale)?);
    // Chosen dimensions of each (slot, KV head), and a slice with exactly room for the longest sequence.
    let capacity = b.max_kv;
    let mut dims = vec![u32::MAX; b.slots * kv_heads * c.n];
    let mut slice = vec![f64::NAN; b.slots * kv_heads * capacity * c.n];
    for s in &b.seqs {
        for h in 0..kv_heads {
            let at = s.slot * kv_heads + h;
            let order = rig.shuffled(d);
            for (col, i) in order[..c.n].iter().enumerate() {
                dims[at * c.n + col] = *i as u32;
                for j in 0..s.kv_len {
                    slice[(at * capacity + j) * c.n + col] = keys[Cache::at(s, c.shape, h, j, *i)];
                }
            }
        }
    }
    let dims = rig.words(&dims)?;
    let slice = if matches!(c.from, Kind::Slice) { slice } else { Vec::new() };
    let slice = rig.input(t.w, &slice)?;
    let keys = Int8Keys { data: &data, scale: &scale, dims: i8_dims };
    let (n, slots) = (c.n, b.slots);
    let rows = if c.pool.in_score() { kv_heads } else { heads };
    let scores = rig.output(DType::F32, b.n() * rows * b.stride())?;
    let p = ScoreDims {
        q: &q,
        seqs: b.seqs(),
        cache: cache.pool(),
        source: match c.from {
            Kind::Lead => ScoreSource::Lead { n },
            Kind::Int8 => ScoreSource::Int8 { keys, n },
            Kind::Slice => ScoreSource::Slice(CompactSlice {
                data: &slice,
                dims: &dims,
                n_dims: n,
                capacity,
                slots,
            }),
            Kind::Gather => ScoreSource::Gather { dims: &dims, n },
        },
        heads,
        pool: c.pool,
        scale: c.scale,
        scores: &scores,
        stride: b.stride(),
    };
    let Some(pool) = c.then else {
        let outs = reference::score_dims(&p, &*rig.dev)?;
        return rig.check(t.act, &outs, &|dev| dev.score_dims(&p));
    };
    let out = rig.output(DType::F32, b.n() * pool.lists(heads, kv_heads) * b.stride())?;
    let pool = PoolScores {
        scores: &scores,
        out: &out,
        seqs: b.seqs(),
        heads,
        kv_heads,
        stride: b.stride(),
        pool,
        lengths: None,
    };
    let outs = reference::score_pool(&p, &pool, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.score_pool(&p, &pool))
}

/// NaN, +Inf and -Inf in one dimension of a few keys, and in all of them for one.
pub fn spoil(keys: &mut [f64], shape: Shape, b: &Batch) {
    for s in &b.seqs {
        for h in 0..shape.kv_heads {
            for (j, x) in [(3, f64::NAN), (64, f64::INFINITY), (70, f64::NEG_INFINITY)] {
                keys[Cache::at(s, shape, h, j, 5)] = x;
            }
            (0..shape.d).for_each(|i| keys[Cache::at(s, shape, h, 99, i)] = f64::NAN);
            // Both infinities in one key: their sum is NaN.
            keys[Cache::at(s, shape, h, 100, 0)] = f64::INFINITY;
            keys[Cache::at(s, shape, h, 100, 1)] = f64::NEG_INFINITY;
        }
    }
}

fn zero_query(rig: &mut Rig, t: Types) -> Outcome {
    let shape = Shape { kv_heads: 2, d: 64, lead: 32 };
    let b = Batch::decode(rig, &[65, 3])?;
    let cache = Cache::new(rig, &b, shape, t.w, |s| s.kv_len)?;
    // Zero in the leading dimensions only, then zero everywhere.
    let mut q: Vec<f64> = (0..b.rows * 2 * 64).map(|i| f64::from(i as u32 % 64 / 32)).collect();
    q[b.seqs[1].q_start * 128..][..128].fill(0.0);
    let q = rig.input(t.act, &q)?;
    let scores = rig.output(DType::F32, b.n() * 2 * b.stride())?;
    let p = ScoreDims {
        q: &q,
        seqs: b.seqs(),
        cache: cache.pool(),
        source: ScoreSource::Lead { n: 32 },
        heads: 2,
        pool: HeadPool::SumLogit,
        scale: LogitScale::Coverage,
        scores: &scores,
        stride: b.stride(),
    };
    let outs = reference::score_dims(&p, &*rig.dev)?;
    if outs[0].cells.iter().any(|c| !matches!(c, Cell::Keep | Cell::Is(0.0))) {
        return fail("the reference itself is not zero");
    }
    rig.check(t.act, &outs, &|dev| dev.score_dims(&p))
}

/// Logits and pools that do not belong together.
fn pooled_badly(rig: &mut Rig, t: Types) -> Outcome {
    let shape = Shape { kv_heads: 2, d: 64, lead: 32 };
    let b = Batch::decode(rig, &[65, 3])?;
    let cache = Cache::new(rig, &b, shape, t.w, |s| s.kv_len)?;
    let q = b.queries(rig, t.act, 4 * 64)?;
    let (seqs, stride) = (b.seqs(), b.stride());
    let scores = &rig.output(DType::F32, b.n() * 4 * stride)?;
    let other = &rig.output(DType::F32, b.n() * 4 * stride)?;
    let out = &rig.output(DType::F32, b.n() * 2 * stride)?;
    let score = || ScoreDims {
        q: &q,
        seqs,
        cache: cache.pool(),
        source: ScoreSource::Lead { n: 32 },
        heads: 4,
        pool: HeadPool::None,
        scale: LogitScale::InvSqrtDim,
        scores,
        stride,
    };
    let pool = || PoolScores {
        scores,
        out,
        seqs,
        heads: 4,
        kv_heads: 2,
        stride,
        pool: HeadPool::MaxSoftmax,
        lengths: None,
    };
    let dev = rig.dev.clone();
    let pooled = ScoreDims { pool: HeadPool::MaxLogit, ..score() };
    rig.refuses("other scores", dev.score_pool(&score(), &PoolScores { scores: other, ..pool() }))?;
    rig.refuses("pooled logits", dev.score_pool(&pooled, &pool()))?;
    rig.refuses("other heads", dev.score_pool(&score(), &PoolScores { heads: 2, ..pool() }))?;
    rig.refuses(
        "no pool",
        dev.score_pool(&score(), &PoolScores { pool: HeadPool::None, ..pool() }),
    )?;
    let fewer = Seqs { max_kv: 50, ..seqs };
    rig.refuses("other lengths", dev.score_pool(&score(), &PoolScores { seqs: fewer, ..pool() }))?;
    rig.refuses("into itself", dev.score_pool(&score(), &PoolScores { out: scores, ..pool() }))
}

fn pool_scores(
    rig: &mut Rig,
    kv: &[usize],
    [heads, kv_heads]: [usize; 2],
    pool: HeadPool,
    scale: f64,
) -> Outcome {
    let b = Batch::decode(rig, kv)?;
    let stride = b.stride();
    let mut values = b.scores(rig, heads, scale);
    for (row, v) in values.chunks_exact_mut(stride).enumerate() {
        let kv_len = b.seqs[row / heads].kv_len;
        if kv_len > 60 {
            // One token is out for every head of its group, another for some heads.
            v[50] = f64::NEG_INFINITY;
            v[20] = if row % 2 == 0 { f64::NEG_INFINITY } else { v[20] };
        }
    }
    let scores = rig.input(DType::F32, &values)?;
    let out = rig.output(DType::F32, b.n() * pool.lists(heads, kv_heads) * stride)?;
    let p = PoolScores {
        scores: &scores,
        out: &out,
        seqs: b.seqs(),
        heads,
        kv_heads,
        stride,
        pool,
        lengths: None,
    };
    let outs = reference::pool_scores(&p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.pool_scores(&p))
}

fn force(rig: &mut Rig, kv: &[usize], rows: usize, sinks: usize, recent: usize) -> Outcome {
    let b = Batch::decode(rig, kv)?;
    let stride = b.stride();
    let values = b.scores(rig, rows, 1.0);
    let scores = rig.input(DType::F32, &values)?;
    let (scores, seqs, among) = (&scores, b.seqs(), None);
    let p = Force { scores, seqs, rows_per_seq: rows, stride, sinks, recent, among };
    let outs = reference::force(&p, &*rig.dev)?;
    // In place: restoring the buffers between the two runs is part of the check.
    rig.check(DType::F32, &outs, &|dev| dev.force(&p))
}
