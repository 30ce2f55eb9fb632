//! quantise_keys, and score_dims on what it leaves.

use super::batch::{Batch, Cache, Shape};
use super::rig::{Outcome, Rig};
use super::{Cases, Types};
use longsight::backend::{
    DType, HeadPool, LogitScale, QuantiseKeys, QuantisedSlice, ScoreDims, ScoreSource, SliceBits,
    reference,
};

const EDGES: &[usize] = &[1, 63, 64, 65];
const LONG: &[usize] = &[1000, 200, 517];

#[derive(Clone, Copy)]
struct Slice {
    shape: Shape,
    group: usize,
    n: usize,
    bits: SliceBits,
    pool: HeadPool,
    scale: LogitScale,
}

pub fn cases(c: &mut Cases) {
    use HeadPool::{MaxLogit, MaxSoftmax, None, SumLogit};
    use LogitScale::{Coverage, InvSqrtDim};
    for (d, kv_heads, group, lead, n, pool, scale) in [
        (64, 3, 3, 64, 16, MaxSoftmax, Coverage),
        (128, 2, 4, 32, 32, SumLogit, InvSqrtDim),
        (128, 1, 16, 16, 64, MaxLogit, Coverage),
        (64, 2, 4, 64, 64, SumLogit, InvSqrtDim),
        (128, 1, 6, 32, 128, None, InvSqrtDim),
        (64, 1, 9, 32, 32, MaxLogit, InvSqrtDim),
        (128, 1, 16, 128, 128, MaxSoftmax, Coverage),
        (80, 2, 1, 80, 8, None, InvSqrtDim),
        (96, 1, 2, 16, 96, SumLogit, Coverage),
    ] {
        for bits in [SliceBits::Four, SliceBits::Eight] {
            let case = Slice { shape: Shape { kv_heads, d, lead }, group, n, bits, pool, scale };
            for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
                let name = format!("{bits:?}_d{d}_kv{kv_heads}_lead{lead}_n{n}_{mix}");
                let name = name.to_lowercase();
                c.add("quantise_keys", &name, move |rig, t| {
                    quantise(rig, t, kv, case, true, false)
                });
                let name = format!("{name}_g{group}_{pool:?}_{scale:?}").to_lowercase();
                c.add("score_dims", format!("slice_{name}"), move |rig, t| {
                    quantise(rig, t, kv, case, false, true)
                });
            }
        }
    }
    if c.types.w == DType::F32 {
        c.add("quantise_keys", "bad_arguments", |rig, _| bad_arguments(rig));
    }
}

/// `some`: a part of the tokens is there already, and must be left alone.
fn quantise(
    rig: &mut Rig,
    t: Types,
    kv: &[usize],
    c: Slice,
    some: bool,
    then_score: bool,
) -> Outcome {
    let Shape { kv_heads, d, lead } = c.shape;
    let (n, heads) = (c.n, kv_heads * c.group);
    let b = Batch::decode(rig, kv)?;
    let mut keys = Cache::values(rig, &b, c.shape, lead, &|s| s.kv_len);
    // A key of zeros has no scale.
    for s in b.seqs.iter().filter(|s| s.kv_len > 50) {
        for (h, i) in (0..kv_heads).flat_map(|h| (0..d).map(move |i| (h, i))) {
            keys[Cache::at(s, c.shape, h, 50, i)] = 0.0;
        }
    }
    let cache = Cache::of(rig, &b, c.shape, t.w, &keys, &vec![f64::NAN; keys.len()])?;
    let (capacity, slots) = (b.max_kv, b.slots);
    let mut dims = vec![u32::MAX; slots * kv_heads * n];
    let mut done = vec![u32::MAX; slots * kv_heads];
    for (i, s) in b.seqs.iter().enumerate() {
        for h in 0..kv_heads {
            let head = s.slot * kv_heads + h;
            let order = rig.shuffled(d);
            let of = order[..n].iter().map(|i| *i as u32);
            dims[head * n..][..n].iter_mut().zip(of).for_each(|(to, i)| *to = i);
            let there = [0, s.kv_len - 1, s.kv_len, s.kv_len / 3][(i + h) % 4];
            done[head] = if some { there as u32 } else { 0 };
        }
    }
    let rows = slots * kv_heads * capacity;
    let data = rig.output(DType::I8, rows * c.bits.row(n))?;
    let scale = rig.output(DType::F32, rows)?;
    let (dims, done_before) = (rig.words(&dims)?, done);
    let done = rig.output(DType::U32, done_before.len())?;
    let before: Vec<f64> = done_before.into_iter().map(f64::from).collect();
    rig.write(&done, &before)?;
    let slice = QuantisedSlice {
        data: &data,
        scale: &scale,
        dims: &dims,
        n_dims: n,
        bits: c.bits,
        capacity,
        slots,
    };
    let p = QuantiseKeys { seqs: b.seqs(), cache: cache.pool(), slice, done: &done };
    let outs = reference::quantise_keys(&p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.quantise_keys(&p))?;
    if !then_score {
        return Ok(());
    }
    let q = b.queries(rig, t.act, heads * d)?;
    let rows = if c.pool.in_score() { kv_heads } else { heads };
    let scores = rig.output(DType::F32, b.n() * rows * b.stride())?;
    let p = ScoreDims {
        q: &q,
        seqs: b.seqs(),
        cache: cache.pool(),
        source: ScoreSource::Quantised(slice),
        heads,
        pool: c.pool,
        scale: c.scale,
        scores: &scores,
        stride: b.stride(),
    };
    let outs = reference::score_dims(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.score_dims(&p))
}

fn bad_arguments(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[65, 3])?;
    let cache =
        Cache::new(rig, &b, Shape { kv_heads: 2, d: 64, lead: 32 }, DType::F32, |s| s.kv_len)?;
    let (n, slots, capacity) = (16, b.slots, b.max_kv);
    let rows = slots * 2 * capacity;
    let data = rig.zeros(DType::I8, rows * n / 2)?;
    let scale = rig.zeros(DType::F32, rows)?;
    let dims = rig.words(&vec![0; slots * 2 * n])?;
    let done = rig.words(&vec![0; slots * 2])?;
    let bits = SliceBits::Four;
    let slice = QuantisedSlice {
        data: &data,
        scale: &scale,
        dims: &dims,
        n_dims: n,
        bits,
        capacity,
        slots,
    };
    let p = || QuantiseKeys { seqs: b.seqs(), cache: cache.pool(), slice, done: &done };
    let with = |slice| QuantiseKeys { slice, ..p() };
    let eight = QuantisedSlice { bits: SliceBits::Eight, ..slice };
    rig.refuses("8 bits in the room of 4", dev.quantise_keys(&with(eight)))?;
    for n_dims in [0, 12, 72] {
        let slice = QuantisedSlice { n_dims, ..slice };
        rig.refuses(&format!("{n_dims} columns"), dev.quantise_keys(&with(slice)))?;
    }
    let slice_of = |capacity| QuantisedSlice { capacity, ..slice };
    rig.refuses("too few tokens", dev.quantise_keys(&with(slice_of(b.max_kv - 1))))?;
    rig.refuses("too many tokens", dev.quantise_keys(&with(slice_of(b.max_kv + 1))))?;
    rig.refuses("more slots", dev.quantise_keys(&with(QuantisedSlice { slots: 9, ..slice })))?;
    rig.refuses("f32 numbers", dev.quantise_keys(&with(QuantisedSlice { data: &scale, ..slice })))?;
    rig.refuses(
        "integer scales",
        dev.quantise_keys(&with(QuantisedSlice { scale: &dims, ..slice })),
    )?;
    let short = done.slice(0, 1);
    rig.refuses("short marks", dev.quantise_keys(&QuantiseKeys { done: &short, ..p() }))?;
    rig.refuses("marks over dims", dev.quantise_keys(&QuantiseKeys { done: &dims, ..p() }))
}
