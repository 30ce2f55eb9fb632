//! Tiles of prompt rows: score_tiles, and force, top_k and attend_rows over sequences of several rows.

use super::attend::{Heads, Lists, Rows, heads, rows};
use super::batch::{Batch, Cache, Shape};
use super::errors::{WRAPS, short};
use super::rig::{Outcome, Rig};
use super::{Cases, Types};
use longsight::backend::reference;
use longsight::backend::{DType, Force, HeadPool, ScoreTiles, Seqs, Share, Tensor, TopK};

/// (rows, tokens) of each tile.
type Tiles = &'static [(usize, usize)];
const TILES: [(&str, Tiles); 4] = [
    ("first", &[(32, 32)]),
    ("rows", &[(1, 1), (1, 65), (1, 300)]),
    ("ragged", &[(32, 64), (17, 81), (1, 128), (32, 500)]),
    ("long", &[(32, 1100), (64, 500)]),
];

pub fn cases(c: &mut Cases) {
    let set = [
        heads(64, 3, 3, 64),
        heads(64, 2, 1, 32),
        heads(128, 2, 4, 32),
        heads(128, 1, 16, 128),
        heads(96, 2, 3, 96),
        heads(80, 1, 4, 16),
        heads(256, 1, 2, 64),
    ];
    for (n, h) in set.into_iter().enumerate() {
        // Every shape of batch on the first two; the ragged one on all.
        for (mix, tiles) in TILES.into_iter().filter(|t| n < 2 || t.0 == "ragged") {
            for (pool, name) in [(HeadPool::MeanSoftmax, "kv"), (HeadPool::AllSoftmax, "all")] {
                let name = format!("{}_{mix}_{name}", h.name());
                c.add("score_tiles", name, move |rig, t| score(rig, t, tiles, None, h, pool));
            }
            let lists = [Lists::PerHead, Lists::Mapped(2)][n % 2];
            for (k, lists, splits) in [(300, Lists::PerKvHead, 1 + n % 3), (70, lists, 1)] {
                let r = Rows { h, lists, k, splits, lse: true };
                let name = format!("{}_tiles_{mix}_k{k}_s{splits}_{lists:?}", h.name());
                c.add("attend_rows", name, move |rig, t| rows(rig, t, tiles, r));
            }
        }
    }
    // As prompts are read: tiles of one sequence, more and fewer of them than a kernel takes at a time.
    for h in set.into_iter().take(4) {
        let name = format!("{}_cut_kv", h.name());
        let cut = Some(128 / h.group.max(4));
        c.add("score_tiles", name, move |rig, t| {
            score(rig, t, &[(80, 700), (9, 9), (64, 200)], cut, h, HeadPool::MeanSoftmax)
        });
    }
    if c.types.w != DType::F32 {
        return;
    }
    for (mix, tiles) in TILES {
        c.add("top_k", format!("tiles_{mix}"), move |rig, _| pick(rig, tiles));
    }
    c.add("score_tiles", "bad_arguments", |rig, _| bad_arguments(rig));
}

/// `cut`: rows of a tile where the sequences are to be cut into tiles.
fn score(
    rig: &mut Rig,
    t: Types,
    tiles: Tiles,
    cut: Option<usize>,
    h: Heads,
    pool: HeadPool,
) -> Outcome {
    let Shape { kv_heads, d, .. } = h.shape;
    let heads = kv_heads * h.group;
    let mut b = Batch::new(rig, tiles)?;
    if let Some(tile) = cut {
        b = b.cut(rig, tile)?;
    }
    let keys = Cache::values(rig, &b, h.shape, h.shape.lead, &|s| s.kv_len);
    // Values are never read.
    let cache = Cache::of(rig, &b, h.shape, t.w, &keys, &vec![f64::NAN; keys.len()])?;
    let q = b.queries(rig, t.act, heads * d)?;
    // About the log-sum-exp of so many normal logits.
    let mut lse = b.row_values(rig, heads, heads);
    for s in &b.seqs {
        let rows = s.q_start * heads..(s.q_start + s.q_len) * heads;
        lse[rows].iter_mut().for_each(|l| *l = 0.5 + (s.kv_len as f64).ln() + 0.3 * *l);
    }
    let lse = rig.input(DType::F32, &lse)?;
    let stride = b.stride();
    let scores = rig.output(DType::F32, b.n() * pool.lists(heads, kv_heads) * stride)?;
    let p = ScoreTiles {
        q: &q,
        lse: &lse,
        seqs: b.seqs(),
        cache: cache.pool(),
        heads,
        scale: 1.0 / (d as f32).sqrt(),
        pool,
        scores: &scores,
        stride,
    };
    let outs = reference::score_tiles(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.score_tiles(&p))
}

/// A tile's own tokens are forced, the rest goes to the best of a share of its length.
fn pick(rig: &mut Rig, tiles: Tiles) -> Outcome {
    let b = Batch::new(rig, tiles)?;
    let (stride, rows_per_seq, k) = (b.stride(), 2, 200);
    let values = b.scores(rig, rows_per_seq, 1.0);
    let scores = rig.input(DType::F32, &values)?;
    let seqs = b.seqs();
    let (sinks, recent) = (1, 32);
    let p = Force { scores: &scores, seqs, rows_per_seq, stride, sinks, recent, among: None };
    let outs = reference::force(&p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.force(&p))?;
    let indices = rig.output(DType::U32, b.n() * rows_per_seq * k)?;
    let counts = rig.output(DType::U32, b.n() * rows_per_seq)?;
    let p = TopK {
        scores: &scores,
        seqs,
        rows_per_seq,
        stride,
        k,
        unit: 1,
        share: Share { permille: 100, at_least: 64 },
        among: None,
        indices: &indices,
        counts: &counts,
    };
    let outs = reference::top_k(&p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.top_k(&p))
}

fn bad_arguments(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let shape = Shape { kv_heads: 2, d: 64, lead: 32 };
    let b = Batch::new(rig, &[(4, 100), (1, 64)])?;
    let cache = Cache::new(rig, &b, shape, DType::F32, |s| s.kv_len)?;
    let (heads, stride) = (4, b.stride());
    let q = b.queries(rig, DType::F32, heads * shape.d)?;
    let lse = rig.zeros(DType::F32, b.rows * heads)?;
    let scores = rig.output(DType::F32, b.n() * 2 * stride)?;
    let words = rig.words(&vec![0; b.rows * heads])?;
    let p = || ScoreTiles {
        q: &q,
        lse: &lse,
        seqs: b.seqs(),
        cache: cache.pool(),
        heads,
        scale: 1.0,
        pool: HeadPool::MeanSoftmax,
        scores: &scores,
        stride,
    };
    let tiles = |p: &ScoreTiles<'_>| dev.score_tiles(p);
    for pool in [HeadPool::SumLogit, HeadPool::MaxSoftmax, HeadPool::None] {
        rig.refuses("a pool that does not sum", tiles(&ScoreTiles { pool, ..p() }))?;
    }
    rig.refuses("heads in no groups", tiles(&ScoreTiles { heads: 3, ..p() }))?;
    rig.refuses("short lse", tiles(&ScoreTiles { lse: &short_of(&lse, heads), ..p() }))?;
    rig.refuses("lse as u32", tiles(&ScoreTiles { lse: &words, ..p() }))?;
    rig.refuses("short q", tiles(&ScoreTiles { q: &short(&q), ..p() }))?;
    rig.refuses("short scores", tiles(&ScoreTiles { scores: &short(&scores), ..p() }))?;
    rig.refuses("short rows", tiles(&ScoreTiles { stride: 64, ..p() }))?;
    rig.refuses("an odd stride", tiles(&ScoreTiles { stride: stride + 1, ..p() }))?;
    rig.refuses("sizes that wrap", tiles(&ScoreTiles { stride: WRAPS, ..p() }))?;
    rig.refuses("scores in q", tiles(&ScoreTiles { scores: &q, ..p() }))?;
    let seqs = Seqs { n: 3, ..b.seqs() };
    rig.refuses("a tile without record", tiles(&ScoreTiles { seqs, ..p() }))
}

/// `t` without the `n` elements of its last row, which no tile has.
fn short_of(t: &Tensor, n: usize) -> Tensor {
    t.slice(0, t.len() - n)
}
