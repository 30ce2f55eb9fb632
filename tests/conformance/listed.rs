//! Scores of listed tokens: score_rows, and pool_scores and force over lists.

use super::batch::{Batch, Cache, Shape};
use super::rig::{Outcome, Rig};
use super::{Cases, Types};
use longsight::backend::reference;
use longsight::backend::{
    Among, DType, Force, HeadPool, LogitScale, PoolScores, ScoreRows, ScoreSource, Tensor,
};

#[derive(Clone, Copy)]
struct Rows {
    shape: Shape,
    group: usize,
    /// Listed dimensions instead of the leading ones.
    gather: bool,
    n: usize,
    pool: HeadPool,
    scale: LogitScale,
    lists: Lists,
    k: usize,
}

/// Lists of a sequence.
#[derive(Clone, Copy, Debug)]
enum Lists {
    One,
    PerKvHead,
    PerHead,
}

const EDGES: &[usize] = &[1, 63, 64, 65];
const LONG: &[usize] = &[1000, 200, 5000];

pub fn cases(c: &mut Cases) {
    use HeadPool::{AllSoftmax, AnySoftmax, MaxLogit, MaxSoftmax, MeanSoftmax, None, SumLogit};
    use Lists::{One, PerHead, PerKvHead};
    use LogitScale::{Coverage, InvSqrtDim};
    for (d, kv_heads, group, lead, gather, n, pool, scale, lists, k) in [
        (64, 3, 3, 32, false, 32, MaxSoftmax, InvSqrtDim, PerKvHead, 100),
        (64, 3, 3, 64, false, 16, SumLogit, Coverage, PerKvHead, 40),
        (128, 2, 4, 32, false, 48, MaxLogit, Coverage, PerKvHead, 300),
        (128, 1, 16, 128, false, 128, MeanSoftmax, InvSqrtDim, PerKvHead, 64),
        (128, 2, 4, 32, false, 128, AllSoftmax, InvSqrtDim, One, 130),
        (64, 1, 16, 64, false, 32, MaxLogit, InvSqrtDim, PerKvHead, 90),
        (64, 1, 12, 32, false, 64, SumLogit, Coverage, PerKvHead, 90),
        (96, 2, 3, 16, false, 96, None, InvSqrtDim, PerHead, 70),
        (80, 2, 4, 80, false, 24, None, Coverage, PerKvHead, 70),
        (64, 2, 3, 32, false, 64, SumLogit, InvSqrtDim, One, 70),
        (64, 3, 3, 64, true, 16, SumLogit, InvSqrtDim, PerKvHead, 100),
        (128, 2, 4, 32, true, 32, MaxSoftmax, Coverage, PerKvHead, 300),
        (128, 1, 16, 16, true, 64, MaxLogit, InvSqrtDim, One, 64),
        (80, 2, 3, 16, true, 80, None, InvSqrtDim, PerHead, 70),
    ] {
        let shape = Shape { kv_heads, d, lead };
        let case = Rows { shape, group, gather, n, pool, scale, lists, k };
        let from = if gather { "gather" } else { "lead" };
        for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
            let name = format!(
                "{from}{n}_d{d}_g{group}_lead{lead}_{pool:?}_{scale:?}_{lists:?}_k{k}_{mix}"
            );
            c.add("score_rows", name.to_lowercase(), move |rig, t| rows(rig, t, kv, case, false));
        }
        if pool.in_score() {
            let name = format!("nonfinite_keys_{from}_{pool:?}_{lists:?}").to_lowercase();
            c.add("score_rows", name, move |rig, t| rows(rig, t, LONG, case, true));
        }
    }
    // No dtype but f32 takes part in what follows.
    if c.types.w != DType::F32 {
        return;
    }
    c.add("score_rows", "bad_arguments", |rig, _| bad_arguments(rig));
    for (heads, kv_heads, scale) in [(9, 3, 1.0), (8, 2, 40.0), (16, 1, 200.0), (2, 2, 1.0)] {
        for pool in [MaxSoftmax, MeanSoftmax, AllSoftmax, AnySoftmax, SumLogit] {
            for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
                let name = format!("listed_h{heads}_kv{kv_heads}_scale{scale}_{pool:?}_{mix}");
                c.add("pool_scores", name.to_lowercase(), move |rig, _| {
                    pooled(rig, kv, [heads, kv_heads], pool, scale)
                });
            }
        }
    }
    for (sinks, recent, rows) in [(0, 1, 3), (4, 64, 2), (1, 65, 1), (10_000, 1, 2)] {
        for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
            let name = format!("listed_sinks{sinks}_recent{recent}_rows{rows}_{mix}");
            c.add("force", name, move |rig, _| force(rig, kv, rows, sinks, recent));
        }
    }
}

/// `lists` lists of up to `k` tokens a sequence: full ones, an empty one, one token, some; and an index that is not
/// cached yet.
pub fn token_lists(rig: &mut Rig, b: &Batch, lists: usize, k: usize) -> Outcome<(Tensor, Tensor)> {
    let (mut indices, mut counts) = (vec![u32::MAX; b.n() * lists * k], Vec::new());
    for (n, s) in b.seqs.iter().enumerate() {
        for r in 0..lists {
            let mut list = rig.shuffled(s.kv_len);
            let want = [k, 0, 1, k / 2 + 1][(n + r) % 4].min(k).min(s.kv_len);
            list.truncate(want);
            list.sort_unstable();
            if want < k && r % 2 == 0 {
                list.push(s.kv_len + 3);
            }
            let at = (n * lists + r) * k;
            indices[at..].iter_mut().zip(&list).for_each(|(i, j)| *i = *j as u32);
            counts.push(list.len() as u32);
        }
    }
    Ok((rig.words(&indices)?, rig.words(&counts)?))
}

fn rows(rig: &mut Rig, t: Types, kv: &[usize], c: Rows, spoil: bool) -> Outcome {
    let Shape { kv_heads, d, lead } = c.shape;
    let heads = kv_heads * c.group;
    let b = Batch::decode(rig, kv)?;
    let q = b.queries(rig, t.act, heads * d)?;
    let mut keys = Cache::values(rig, &b, c.shape, lead, &|s| s.kv_len);
    if spoil {
        super::score::spoil(&mut keys, c.shape, &b);
    }
    // Scores never read V.
    let cache = Cache::of(rig, &b, c.shape, t.w, &keys, &vec![f64::NAN; keys.len()])?;
    let mut dims = vec![u32::MAX; b.slots * kv_heads * c.n];
    for s in &b.seqs {
        for h in 0..kv_heads {
            // Runs of eight (groups of neighbours), and dimensions from all over.
            let mut list: Vec<usize> = match h % 2 {
                0 => rig.shuffled(d / 8).iter().flat_map(|g| g * 8..g * 8 + 8).collect(),
                _ => rig.shuffled(d),
            };
            list.truncate(c.n);
            let at = (s.slot * kv_heads + h) * c.n;
            dims[at..].iter_mut().zip(&list).for_each(|(to, i)| *to = *i as u32);
        }
    }
    let dims = rig.words(&dims)?;
    let lists = match c.lists {
        Lists::One => 1,
        Lists::PerKvHead => kv_heads,
        Lists::PerHead => heads,
    };
    let (indices, counts) = token_lists(rig, &b, lists, c.k)?;
    let stride = b.stride().max(c.k.next_multiple_of(64));
    let rows = if c.pool.in_score() { kv_heads } else { heads };
    let scores = rig.output(DType::F32, b.n() * rows * stride)?;
    let p = ScoreRows {
        q: &q,
        seqs: b.seqs(),
        cache: cache.pool(),
        source: match c.gather {
            true => ScoreSource::Gather { dims: &dims, n: c.n },
            false => ScoreSource::Lead { n: c.n },
        },
        heads,
        pool: c.pool,
        scale: c.scale,
        among: Among { indices: &indices, counts: &counts, k: c.k },
        lists,
        scores: &scores,
        stride,
    };
    let outs = reference::score_rows(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.score_rows(&p))
}

fn pooled(
    rig: &mut Rig,
    kv: &[usize],
    [heads, kv_heads]: [usize; 2],
    pool: HeadPool,
    scale: f64,
) -> Outcome {
    let b = Batch::decode(rig, kv)?;
    let stride = b.stride();
    let rows = pool.lists(heads, kv_heads);
    let mut values = b.scores(rig, heads, scale);
    let mut lengths = Vec::new();
    for s in &b.seqs {
        for _ in 0..rows {
            let few = rig.below(s.kv_len + 1);
            // None, all, and whatever comes.
            lengths.push([few, s.kv_len, 0, few][lengths.len() % 4] as u32);
        }
    }
    let group = heads / rows;
    for (row, v) in values.chunks_exact_mut(stride).enumerate() {
        // What is beyond the list must not be read.
        v[lengths[row / group] as usize..].fill(f64::NAN);
        if lengths[row / group] > 30 {
            v[20] = if row % 2 == 0 { f64::NEG_INFINITY } else { v[20] };
        }
    }
    let scores = rig.input(DType::F32, &values)?;
    let lengths = rig.words(&lengths)?;
    let out = rig.output(DType::F32, b.n() * rows * stride)?;
    let p = PoolScores {
        scores: &scores,
        out: &out,
        seqs: b.seqs(),
        heads,
        kv_heads,
        stride,
        pool,
        lengths: Some(&lengths),
    };
    let outs = reference::pool_scores(&p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.pool_scores(&p))
}

fn force(rig: &mut Rig, kv: &[usize], rows: usize, sinks: usize, recent: usize) -> Outcome {
    const K: usize = 60;
    let b = Batch::decode(rig, kv)?;
    let stride = b.stride();
    let (indices, counts) = token_lists(rig, &b, rows, K)?;
    let values = b.scores(rig, rows, 1.0);
    let scores = rig.input(DType::F32, &values)?;
    let among = Some(Among { indices: &indices, counts: &counts, k: K });
    let seqs = b.seqs();
    let p = Force { scores: &scores, seqs, rows_per_seq: rows, stride, sinks, recent, among };
    let outs = reference::force(&p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.force(&p))
}

fn bad_arguments(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[65, 3])?;
    let c = Cache::new(rig, &b, Shape { kv_heads: 2, d: 64, lead: 32 }, DType::F32, |s| s.kv_len)?;
    let (heads, stride, k) = (6, b.stride(), 16);
    let q = rig.zeros(DType::F32, b.rows * heads * 64)?;
    let scores = rig.output(DType::F32, b.n() * heads * stride)?;
    let indices = rig.words(&vec![0; b.n() * 2 * k])?;
    let counts = rig.words(&vec![0; b.n() * 2])?;
    let among = Among { indices: &indices, counts: &counts, k };
    let p = || ScoreRows {
        q: &q,
        seqs: b.seqs(),
        cache: c.pool(),
        source: ScoreSource::Lead { n: 32 },
        heads,
        pool: HeadPool::SumLogit,
        scale: LogitScale::InvSqrtDim,
        among,
        lists: 2,
        scores: &scores,
        stride,
    };
    for n in [0, 12, 72] {
        let source = ScoreSource::Lead { n };
        rig.refuses(&format!("{n} dimensions"), dev.score_rows(&ScoreRows { source, ..p() }))?;
    }
    let source = ScoreSource::Gather { dims: &q, n: 8 };
    rig.refuses("f32 dimension list", dev.score_rows(&ScoreRows { source, ..p() }))?;
    let (data, scale) = (rig.zeros(DType::I8, 8)?, rig.zeros(DType::F32, 8)?);
    let keys = longsight::backend::Int8Keys { data: &data, scale: &scale, dims: 8 };
    let source = ScoreSource::Int8 { keys, n: 8 };
    rig.refuses("the int8 copy", dev.score_rows(&ScoreRows { source, ..p() }))?;
    let own = ScoreRows { lists: heads, ..p() };
    rig.refuses("a list per head for pooled scores", dev.score_rows(&own))?;
    rig.refuses("3 lists", dev.score_rows(&ScoreRows { lists: 3, ..p() }))?;
    rig.refuses("no lists", dev.score_rows(&ScoreRows { lists: 0, ..p() }))?;
    let with = |among| ScoreRows { among, ..p() };
    rig.refuses("k beyond indices", dev.score_rows(&with(Among { k: 17, ..among })))?;
    rig.refuses("k beyond stride", dev.score_rows(&with(Among { k: stride + 1, ..among })))?;
    rig.refuses("k of 0", dev.score_rows(&with(Among { k: 0, ..among })))?;
    let short = counts.slice(0, 3);
    rig.refuses("short counts", dev.score_rows(&with(Among { counts: &short, ..among })))?;
    rig.refuses("f32 indices", dev.score_rows(&with(Among { indices: &q, ..among })))?;
    rig.refuses("odd stride", dev.score_rows(&ScoreRows { stride: stride + 1, ..p() }))?;
    rig.refuses("short q", dev.score_rows(&ScoreRows { q: &scale, ..p() }))?;
    rig.refuses("scores over keys", dev.score_rows(&ScoreRows { scores: &c.k, ..p() }))?;
    let seqs = longsight::backend::Seqs { max_q: 2, ..b.seqs() };
    rig.refuses("prefill", dev.score_rows(&ScoreRows { seqs, ..p() }))?;
    let out = rig.output(DType::F32, b.n() * stride)?;
    let pooled = PoolScores {
        scores: &scores,
        out: &out,
        seqs: b.seqs(),
        heads,
        kv_heads: 2,
        stride,
        pool: HeadPool::AllSoftmax,
        lengths: Some(&scale),
    };
    rig.refuses("lengths in f32", dev.pool_scores(&pooled))?;
    let one = counts.slice(0, 1);
    rig.refuses("short lengths", dev.pool_scores(&PoolScores { lengths: Some(&one), ..pooled }))?;
    let (scores, seqs) = (&scores, b.seqs());
    let among = Some(Among { counts: &one, ..among });
    let p = Force { scores, seqs, rows_per_seq: 2, stride, sinks: 0, recent: 1, among };
    rig.refuses("short counts to force", dev.force(&p))
}
