//! kv_summaries, score_summaries, pool_blocks, expand_blocks.

use super::batch::{Batch, Cache, Shape};
use super::rig::{Outcome, Rig, fail};
use super::{Cases, Types};
use longsight::backend::reference::{self, Cell};
use longsight::backend::{
    DType, ExpandBlocks, HeadPool, KvSummaries, PAGE, PoolBlocks, ScoreSummaries, Summaries,
    SummaryKind,
};

const WINDOWS: SummaryKind = SummaryKind::Windows { size: 32, stride: 16 };
const KINDS: &[(&str, SummaryKind)] = &[
    ("bounds16", SummaryKind::Bounds { page: 16 }),
    ("bounds64", SummaryKind::Bounds { page: 64 }),
    ("cuboid16", SummaryKind::Cuboid { page: 16 }),
    ("cuboid32", SummaryKind::Cuboid { page: 32 }),
    ("windows32_16", WINDOWS),
    ("windows64_16", SummaryKind::Windows { size: 64, stride: 16 }),
    ("windows32_32", SummaryKind::Windows { size: 32, stride: 32 }),
];

/// (rows, cached tokens): first chunks, chunks that start inside a run and cross pages, single tokens that start,
/// continue and complete runs.
const MIXES: &[(&str, &[(usize, usize)])] = &[
    ("first", &[(63, 63), (15, 15), (200, 200)]),
    ("chunk", &[(100, 165), (64, 128), (1, 65)]),
    ("decode", &[(1, 1), (1, 31), (1, 32), (1, 64), (1, 80), (1, 1000)]),
];

const EDGES: &[usize] = &[1, 15, 31, 32, 63, 64, 65, 80];
const LONG: &[usize] = &[1000, 200, 5000];

pub fn cases(c: &mut Cases) {
    let shapes = [
        (Shape { kv_heads: 3, d: 64, lead: 64 }, 3),
        (Shape { kv_heads: 2, d: 128, lead: 32 }, 4),
        (Shape { kv_heads: 1, d: 96, lead: 16 }, 16),
        (Shape { kv_heads: 2, d: 80, lead: 80 }, 1),
        (Shape { kv_heads: 1, d: 256, lead: 256 }, 8),
    ];
    for (shape, group) in shapes {
        for (name, kind) in KINDS.iter().copied() {
            let Shape { kv_heads, d, lead } = shape;
            for (mix, seqs) in MIXES {
                let name = format!("{name}_d{d}_h{kv_heads}_lead{lead}_{mix}");
                c.add("kv_summaries", name, move |rig, t| {
                    summaries(rig, t, shape, kind, seqs, |_, _, _| ())
                });
            }
            for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
                let name = format!("{name}_d{d}_h{kv_heads}_g{group}_{mix}");
                let whole = (0, d);
                c.add("score_summaries", name, move |rig, t| {
                    score(rig, t, kv, shape, group, kind, whole, false)
                });
            }
            // A part of the dimensions: the first, the last, some between.
            for (from, dims) in [(0, d - 8), (d - 8, 8), (16, 24)] {
                let name = format!("{name}_d{d}_h{kv_heads}_g{group}_{dims}_from{from}");
                c.add("score_summaries", name, move |rig, t| {
                    score(rig, t, EDGES, shape, group, kind, (from, dims), false)
                });
            }
        }
    }
    let shape = Shape { kv_heads: 2, d: 64, lead: 32 };
    for (name, kind) in KINDS.iter().copied() {
        let case = format!("nonfinite_keys_{name}");
        c.add("kv_summaries", case, move |rig, t| {
            summaries(rig, t, shape, kind, &[(150, 165), (1, 100)], spoil)
        });
        let case = format!("nonfinite_{name}");
        c.add("score_summaries", case, move |rig, t| {
            score(rig, t, LONG, shape, 3, kind, (0, shape.d), true)
        });
    }
    c.add("kv_summaries", "a_chunk_gives_what_single_tokens_give", chunk_or_tokens);
    // No dtype but f32 takes part in what follows.
    if c.types.w != DType::F32 {
        return;
    }
    use HeadPool::{MaxLogit, MaxSoftmax, MeanSoftmax, None, SumLogit};
    for (heads, kv_heads, pool, scale) in [
        (9, 3, MeanSoftmax, 1.0),
        (8, 2, MeanSoftmax, 40.0),
        (16, 1, MaxSoftmax, 200.0),
        (8, 2, SumLogit, 1.0),
        (8, 1, MaxLogit, 3.0),
        (6, 2, None, 1.0),
    ] {
        for (name, kind, unit) in [
            ("windows_unit64", WINDOWS, 64),
            ("windows_unit16", WINDOWS, 16),
            ("bounds16_unit16", SummaryKind::Bounds { page: 16 }, 16),
            ("bounds16_unit64", SummaryKind::Bounds { page: 16 }, 64),
            ("cuboid32_unit32", SummaryKind::Cuboid { page: 32 }, 32),
        ] {
            for (sinks, recent) in [(0, 0), (64, 129), (1, 1), (5000, 70)] {
                for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
                    let name = format!(
                        "{name}_h{heads}_kv{kv_heads}_{pool:?}_sinks{sinks}_recent{recent}_{mix}"
                    );
                    c.add("pool_blocks", name.to_lowercase(), move |rig, _| {
                        let forced = (sinks, recent);
                        blocks(rig, kv, [heads, kv_heads], kind, unit, (pool, scale), forced)
                    });
                }
            }
        }
    }
    c.add("pool_blocks", "five_windows_a_block", five_windows);
    for (unit, k, rows) in [(16, 5, 3), (64, 1, 2), (64, 96, 2), (32, 7, 1)] {
        for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
            let name = format!("unit{unit}_k{k}_rows{rows}_{mix}");
            c.add("expand_blocks", name, move |rig, _| expand(rig, kv, rows, k, unit));
        }
    }
}

/// `edit` may change the keys (host values, their shape, the batch) before they are uploaded.
fn summaries(
    rig: &mut Rig,
    t: Types,
    shape: Shape,
    kind: SummaryKind,
    seqs: &[(usize, usize)],
    edit: impl Fn(&mut [f64], Shape, &Batch),
) -> Outcome {
    let b = Batch::new(rig, seqs)?;
    let mut keys = Cache::values(rig, &b, shape, shape.lead, &|s| s.kv_len);
    edit(&mut keys, shape, &b);
    // Summaries never read V.
    let cache = Cache::of(rig, &b, shape, t.w, &keys, &vec![f64::NAN; keys.len()])?;
    let data = rig.output(t.w, b.n_pages * shape.kv_heads * kind.page_len(shape.d))?;
    let summaries = Summaries { data: &data, kind };
    let p = KvSummaries { seqs: b.seqs(), cache: cache.pool(), summaries };
    let outs = reference::kv_summaries(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.kv_summaries(&p))
}

/// NaN and infinities in a few keys.
fn spoil(keys: &mut [f64], shape: Shape, b: &Batch) {
    for s in &b.seqs {
        for h in 0..shape.kv_heads {
            for (j, x) in [(20, f64::NAN), (70, f64::INFINITY), (99, f64::NEG_INFINITY)] {
                keys[Cache::at(s, shape, h, j, 5)] = x;
            }
        }
    }
}

/// Random summaries, NaN where there are none; `spoilt`: some of those that exist are not finite.
#[allow(clippy::too_many_arguments)]
fn score(
    rig: &mut Rig,
    t: Types,
    kv: &[usize],
    shape: Shape,
    group: usize,
    kind: SummaryKind,
    (from, dims): (usize, usize),
    spoilt: bool,
) -> Outcome {
    let Shape { kv_heads, d, .. } = shape;
    let heads = kv_heads * group;
    let b = Batch::decode(rig, kv)?;
    let q = b.queries(rig, t.act, heads * d)?;
    let mut values = vec![f64::NAN; b.n_pages * kv_heads * kind.page_len(d)];
    let width = kind.vectors() * d;
    for s in &b.seqs {
        for g in (0..kind.count(s.kv_len)).filter(|g| kind.exists(*g, s.kv_len)) {
            for h in 0..kv_heads {
                let page = s.pages[g * kind.run() / PAGE] as usize;
                let row = (page * kv_heads + h) * kind.per_page() + g % kind.per_page();
                let to = &mut values[row * width..][..width];
                to.copy_from_slice(&rig.normal(width, 1.0));
                if kind.vectors() == 2 {
                    // The smaller one first.
                    let (lo, hi) = to.split_at_mut(d);
                    lo.iter_mut().zip(hi).for_each(|(l, h)| (*l, *h) = (l.min(*h), h.max(*l)));
                }
                if spoilt && g % 7 == 3 {
                    to[d - 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][g % 3];
                }
            }
        }
    }
    let data = rig.input(t.w, &values)?;
    let stride = kind.count(b.max_kv);
    let scores = rig.output(DType::F32, b.n() * heads * stride)?;
    let p = ScoreSummaries {
        q: &q,
        seqs: b.seqs(),
        summaries: Summaries { data: &data, kind },
        n_pages: b.n_pages,
        heads,
        kv_heads,
        head_dim: d,
        from,
        dims,
        scale: 0.3,
        scores: &scores,
        stride,
    };
    let mut outs = reference::score_summaries(&p, &*rig.dev)?;
    if spoilt && kind.vectors() == 2 {
        // With an infinity the product with the other part of the query is 0 or NaN: both are allowed here, and the
        // score may be -infinity although the formula gives a number.
        for cell in &mut outs[0].cells {
            *cell = if *cell == Cell::Keep { Cell::Keep } else { Cell::Any };
        }
        rig.check(t.act, &outs, &|dev| dev.score_summaries(&p))?;
        let got = reference::floats(&*rig.dev, &scores)?;
        let wrong = got
            .iter()
            .zip(&outs[0].cells)
            .any(|(x, c)| *c == Cell::Any && !x.is_finite() && *x != f64::NEG_INFINITY);
        return if wrong { fail("a score is NaN or +infinity") } else { Ok(()) };
    }
    rig.check(t.act, &outs, &|dev| dev.score_summaries(&p))
}

/// Summaries of a text that came in one step, and token by token.
fn chunk_or_tokens(rig: &mut Rig, t: Types) -> Outcome {
    let (shape, n) = (Shape { kv_heads: 2, d: 64, lead: 16 }, 150);
    for (_, kind) in KINDS.iter().copied() {
        let b = Batch::new(rig, &[(n, n)])?;
        let cache = Cache::new(rig, &b, shape, t.w, |s| s.kv_len)?;
        let len = b.n_pages * shape.kv_heads * kind.page_len(shape.d);
        let (at_once, one_by_one) = (rig.output(t.w, len)?, rig.output(t.w, len)?);
        let dev = rig.dev.clone();
        let run = |b: &Batch, data| {
            let summaries = Summaries { data, kind };
            dev.kv_summaries(&KvSummaries { seqs: b.seqs(), cache: cache.pool(), summaries })
        };
        run(&b, &at_once)?;
        let mut step = b;
        step.seqs[0].q_len = 1;
        for kv_len in 1..=n {
            step.seqs[0].kv_len = kv_len;
            step.publish(rig)?;
            run(&step, &one_by_one)?;
        }
        let (a, b) = (reference::floats(&*dev, &at_once)?, reference::floats(&*dev, &one_by_one)?);
        if a.iter().zip(&b).any(|(a, b)| a != b && !(a.is_nan() && b.is_nan())) {
            return fail(format!("{kind:?}: a chunk and single tokens leave different summaries"));
        }
    }
    Ok(())
}

fn blocks(
    rig: &mut Rig,
    kv: &[usize],
    [heads, kv_heads]: [usize; 2],
    kind: SummaryKind,
    unit: usize,
    (pool, scale): (HeadPool, f64),
    (sinks, recent): (usize, usize),
) -> Outcome {
    let b = Batch::decode(rig, kv)?;
    let stride = kind.count(b.max_kv);
    let mut values = vec![f64::NAN; b.n() * heads * stride];
    for (row, v) in values.chunks_exact_mut(stride).enumerate() {
        let kv_len = b.seqs[row / heads].kv_len;
        for (g, v) in v[..kind.count(kv_len)].iter_mut().enumerate() {
            // Some summaries are out for every head, some for every second one.
            let out = !kind.exists(g, kv_len) || g % 11 == 4 || (g % 13 == 5 && row % 2 == 0);
            *v = if out { f64::NEG_INFINITY } else { rig.normal(1, scale)[0] };
        }
    }
    let scores = rig.input(DType::F32, &values)?;
    let rows = if pool == HeadPool::None { heads } else { kv_heads };
    let block_stride = b.max_kv.div_ceil(unit);
    let out = rig.output(DType::F32, b.n() * rows * block_stride)?;
    let p = PoolBlocks {
        scores: &scores,
        seqs: b.seqs(),
        kind,
        heads,
        kv_heads,
        pool,
        stride,
        unit,
        sinks,
        recent,
        out: &out,
        block_stride,
    };
    let outs = reference::pool_blocks(&p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.pool_blocks(&p))
}

/// Written out once by hand: block `b` of 64 tokens takes windows `4b - 1` to `4b + 3`, and no other.
fn five_windows(rig: &mut Rig, _: Types) -> Outcome {
    let b = Batch::decode(rig, &[64 * 6])?;
    let (n, stride) = (24, WINDOWS.count(b.max_kv));
    for window in 0..n - 1 {
        let mut values = vec![f64::NAN; stride];
        values[..n].fill(-1.0);
        values[0] = f64::NEG_INFINITY;
        values[window + 1] = 2.0;
        let scores = rig.input(DType::F32, &values)?;
        let block_stride = b.max_kv.div_ceil(64);
        let out = rig.output(DType::F32, block_stride)?;
        let p = PoolBlocks {
            scores: &scores,
            seqs: b.seqs(),
            kind: WINDOWS,
            heads: 1,
            kv_heads: 1,
            pool: HeadPool::None,
            stride,
            unit: 64,
            sinks: 0,
            recent: 0,
            out: &out,
            block_stride,
        };
        let mut outs = reference::pool_blocks(&p, &*rig.dev)?;
        for (block, cell) in outs[0].cells[..6].iter_mut().enumerate() {
            let overlaps = (4 * block).saturating_sub(1) <= window && window <= 4 * block + 3;
            *cell = Cell::Is(if overlaps { 2.0 } else { -1.0 });
        }
        rig.check(DType::F32, &outs, &|dev| dev.pool_blocks(&p))?;
    }
    Ok(())
}

fn expand(rig: &mut Rig, kv: &[usize], rows: usize, k: usize, unit: usize) -> Outcome {
    let b = Batch::decode(rig, kv)?;
    let mut lists = vec![u32::MAX; b.n() * rows * k];
    let mut counts = vec![u32::MAX; b.n() * rows];
    for (i, list) in lists.chunks_exact_mut(k).enumerate() {
        let n = b.seqs[i / rows].kv_len.div_ceil(unit);
        let mut chosen: Vec<u32> = rig.shuffled(n).into_iter().map(|b| b as u32).collect();
        // An empty list, one with the last block, and whatever comes.
        chosen.truncate(if i % 5 == 4 { 0 } else { k });
        if let (Some(last), 0) = (chosen.iter_mut().max(), i % 2) {
            *last = n as u32 - 1;
        }
        chosen.sort_unstable();
        list[..chosen.len()].copy_from_slice(&chosen);
        counts[i] = chosen.len() as u32;
    }
    let (blocks, block_counts) = (rig.words(&lists)?, rig.words(&counts)?);
    let indices = rig.output(DType::U32, b.n() * rows * k * unit)?;
    let counts = rig.output(DType::U32, b.n() * rows)?;
    let p = ExpandBlocks {
        blocks: &blocks,
        block_counts: &block_counts,
        seqs: b.seqs(),
        rows_per_seq: rows,
        k,
        unit,
        indices: &indices,
        counts: &counts,
    };
    let outs = reference::expand_blocks(&p, &*rig.dev)?;
    rig.check(DType::U32, &outs, &|dev| dev.expand_blocks(&p))
}
