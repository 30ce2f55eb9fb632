//! mean_value, trim_scores and project.

use super::batch::{Batch, Cache, Shape};
use super::errors::{WRAPS, short};
use super::listed::token_lists;
use super::rig::{Outcome, Rig, fail};
use super::{Cases, Types};
use longsight::backend::reference::{self, Cell};
use longsight::backend::{Among, DType, MeanValue, Project, Seqs, Trim, TrimScores, key_stats_len};

const EDGES: &[usize] = &[1, 63, 64, 65];
const LONG: &[usize] = &[1000, 200, 5000];

pub fn cases(c: &mut Cases) {
    for (heads, kv_heads, d, lists, scale) in
        [(9, 3, 64, 3, 1.0), (8, 2, 128, 8, 3.0), (4, 1, 80, 1, 1.0), (16, 1, 256, 1, 20.0)]
    {
        for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
            let name = format!("h{heads}_kv{kv_heads}_d{d}_lists{lists}_scale{scale}_{mix}");
            let sizes = [heads, kv_heads, d, lists];
            c.add("mean_value", name, move |rig, t| mean_value(rig, t, kv, sizes, scale));
        }
    }
    for (d, kv_heads, group, lead, n) in
        [(64, 3, 3, 64, 16), (128, 2, 4, 32, 32), (80, 1, 4, 16, 80), (256, 1, 2, 256, 8)]
    {
        for (mix, kv) in [("edges", EDGES), ("long", &[1000, 200, 517])] {
            let shape = Shape { kv_heads, d, lead };
            let name = format!("d{d}_kv{kv_heads}_g{group}_lead{lead}_n{n}_{mix}");
            c.add("project", name, move |rig, t| project(rig, t, kv, shape, group, n));
        }
    }
    // No dtype but f32 takes part in what follows.
    if c.types.w != DType::F32 {
        return;
    }
    let mass = |permille, at_least| Trim::Mass { permille, at_least };
    let together = |tokens, at_least| Trim::Together { tokens, at_least };
    for (trim, rows, scale) in [
        (mass(850, 1), 3, 1.0),
        (mass(500, 40), 1, 4.0),
        (mass(990, 0), 2, 0.1),
        (mass(1000, 5), 2, 1.0),
        (mass(1, 2), 4, 30.0),
        (together(100, 0), 1, 1.0),
        (together(100, 20), 4, 1.0),
        (together(64, 64), 2, 1.0),
        (together(3000, 10), 3, 5.0),
        (together(u32::MAX, 1), 2, 1.0),
        (together(1, 0), 9, 1.0),
    ] {
        for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
            let name = format!("{trim:?}_rows{rows}_scale{scale}_{mix}");
            let name = name.to_lowercase().replace([' ', '{', '}', ':', ','], "_");
            c.add("trim_scores", name, move |rig, _| trim_scores(rig, kv, rows, scale, trim));
        }
    }
    c.add("mean_value", "bad_arguments", |rig, _| bad_arguments(rig));
}

fn mean_value(
    rig: &mut Rig,
    t: Types,
    kv: &[usize],
    [heads, kv_heads, d, lists]: [usize; 4],
    scale: f64,
) -> Outcome {
    const K: usize = 90;
    let b = Batch::decode(rig, kv)?;
    let stride = b.stride();
    let mut values = b.scores(rig, heads, scale);
    for (row, v) in values.chunks_exact_mut(stride).enumerate() {
        let kv_len = b.seqs[row / heads].kv_len;
        if kv_len > 60 {
            v[20] = f64::NEG_INFINITY;
            // A head that has seen nothing but bad keys is left alone.
            if row % heads == 1 {
                v[..kv_len].fill(f64::NEG_INFINITY);
            }
        }
    }
    let scores = rig.input(DType::F32, &values)?;
    let (indices, counts) = token_lists(rig, &b, lists, K)?;
    let mut sums = vec![f64::NAN; b.slots * kv_heads * key_stats_len(d)];
    for s in &b.seqs {
        for h in 0..kv_heads {
            let at = (s.slot * kv_heads + h) * key_stats_len(d);
            let total = rig.normal(d, s.kv_len as f64);
            sums[at..at + d].copy_from_slice(&total);
        }
    }
    let sums = rig.input(DType::F32, &sums)?;
    let out = b.queries(rig, t.act, heads * d)?;
    let p = MeanValue {
        scores: &scores,
        seqs: b.seqs(),
        listed: Among { indices: &indices, counts: &counts, k: K },
        lists,
        sums: &sums,
        slots: b.slots,
        heads,
        kv_heads,
        head_dim: d,
        stride,
        out: &out,
    };
    let outs = reference::mean_value(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.mean_value(&p))
}

fn project(rig: &mut Rig, t: Types, kv: &[usize], shape: Shape, group: usize, n: usize) -> Outcome {
    let Shape { kv_heads, d, .. } = shape;
    let heads = kv_heads * group;
    let b = Batch::decode(rig, kv)?;
    let cache = Cache::new(rig, &b, shape, t.w, |s| s.kv_len)?;
    let q = b.queries(rig, t.act, heads * d)?;
    let basis = rig.normal(kv_heads * n * d, 0.2);
    let basis = rig.input(DType::F32, &basis)?;
    let capacity = b.max_kv;
    let out = rig.output(DType::F32, b.rows * heads * d)?;
    let slice = rig.output(t.w, b.slots * kv_heads * capacity * n)?;
    // Nothing, some, all but the newest, and more than there are now.
    let mut before = vec![u32::MAX; b.slots * kv_heads];
    for (i, s) in b.seqs.iter().enumerate() {
        for h in 0..kv_heads {
            let some = rig.below(s.kv_len + 1);
            let done = [0, s.kv_len - 1, some, s.kv_len + 7][(i + h) % 4];
            before[s.slot * kv_heads + h] = done as u32;
        }
    }
    let done = rig.words(&before)?;
    let p = Project {
        q: &q,
        seqs: b.seqs(),
        cache: cache.pool(),
        basis: &basis,
        n,
        heads,
        out: &out,
        slice: &slice,
        done: &done,
        capacity,
        slots: b.slots,
    };
    let outs = reference::project(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.project(&p))
}

fn trim_scores(rig: &mut Rig, kv: &[usize], rows: usize, scale: f64, trim: Trim) -> Outcome {
    let b = Batch::decode(rig, kv)?;
    let stride = b.stride();
    let mut values = b.scores(rig, rows, scale);
    for (row, v) in values.chunks_exact_mut(stride).enumerate() {
        let kv_len = b.seqs[row / rows].kv_len;
        if kv_len > 60 {
            v[7] = f64::NEG_INFINITY;
            // Ties, of values and of zeros.
            (v[3], v[30], v[31]) = (v[2], 0.0, -0.0);
            if matches!(trim, Trim::Together { .. }) {
                v[..4].fill(f64::INFINITY);
            }
        }
    }
    let scores = rig.input(DType::F32, &values)?;
    let seqs = b.seqs();
    let p = TrimScores { scores: &scores, seqs, rows_per_seq: rows, stride, trim };
    let outs = reference::trim_scores(&p, &*rig.dev)?;
    let doubtful = outs[0].cells.iter().filter(|c| **c == Cell::Any).count();
    if doubtful > b.n() * rows * 4 {
        return fail(format!("the reference leaves {doubtful} scores open"));
    }
    rig.check(DType::F32, &outs, &|dev| dev.trim_scores(&p))
}

fn bad_arguments(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[65, 3])?;
    let shape = Shape { kv_heads: 2, d: 64, lead: 32 };
    let c = Cache::new(rig, &b, shape, DType::F32, |s| s.kv_len)?;
    let (heads, stride, k, n) = (6, b.stride(), 16, 8);
    let scores = rig.zeros(DType::F32, b.n() * heads * stride)?;
    let indices = rig.words(&vec![0; b.n() * 2 * k])?;
    let counts = rig.words(&vec![0; b.n() * 2])?;
    let sums = rig.zeros(DType::F32, b.slots * 2 * key_stats_len(64))?;
    let out = rig.output(DType::F32, b.rows * heads * 64)?;
    let listed = Among { indices: &indices, counts: &counts, k };
    let p = || MeanValue {
        scores: &scores,
        seqs: b.seqs(),
        listed,
        lists: 2,
        sums: &sums,
        slots: b.slots,
        heads,
        kv_heads: 2,
        head_dim: 64,
        stride,
        out: &out,
    };
    rig.refuses("3 lists", dev.mean_value(&MeanValue { lists: 3, ..p() }))?;
    rig.refuses("a list per head", dev.mean_value(&MeanValue { lists: heads, ..p() }))?;
    rig.refuses("5 heads", dev.mean_value(&MeanValue { heads: 5, ..p() }))?;
    rig.refuses("short sums", dev.mean_value(&MeanValue { sums: &short(&sums), ..p() }))?;
    rig.refuses("slots that wrap", dev.mean_value(&MeanValue { slots: WRAPS, ..p() }))?;
    rig.refuses("short scores", dev.mean_value(&MeanValue { scores: &short(&scores), ..p() }))?;
    rig.refuses("odd stride", dev.mean_value(&MeanValue { stride: stride + 1, ..p() }))?;
    rig.refuses("short out", dev.mean_value(&MeanValue { out: &short(&out), ..p() }))?;
    rig.refuses("out is scores", dev.mean_value(&MeanValue { out: &scores, ..p() }))?;
    let longer = Among { k: k + 1, ..listed };
    rig.refuses("k beyond indices", dev.mean_value(&MeanValue { listed: longer, ..p() }))?;
    let prefill = Seqs { max_q: 2, ..b.seqs() };
    rig.refuses("prefill", dev.mean_value(&MeanValue { seqs: prefill, ..p() }))?;

    let trim = Trim::Mass { permille: 900, at_least: 1 };
    let (seqs, rows_per_seq) = (b.seqs(), heads);
    let p = TrimScores { scores: &scores, seqs, rows_per_seq, stride, trim };
    let trim = |permille| Trim::Mass { permille, at_least: 1 };
    rig.refuses("no share", dev.trim_scores(&TrimScores { trim: trim(0), ..p }))?;
    rig.refuses("more than all", dev.trim_scores(&TrimScores { trim: trim(1001), ..p }))?;
    rig.refuses("257 rows", dev.trim_scores(&TrimScores { rows_per_seq: 257, ..p }))?;
    rig.refuses("7 rows", dev.trim_scores(&TrimScores { rows_per_seq: 7, ..p }))?;
    rig.refuses("short stride", dev.trim_scores(&TrimScores { stride: 64, ..p }))?;
    rig.refuses("u32 scores", dev.trim_scores(&TrimScores { scores: &indices, ..p }))?;
    rig.refuses("prefill", dev.trim_scores(&TrimScores { seqs: prefill, ..p }))?;

    let capacity = b.max_kv;
    let q = rig.zeros(DType::F32, b.rows * heads * 64)?;
    let basis = rig.zeros(DType::F32, 2 * n * 64)?;
    let slice = rig.output(DType::F32, b.slots * 2 * capacity * n)?;
    let done = rig.words(&vec![0; b.slots * 2])?;
    let p = || Project {
        q: &q,
        seqs: b.seqs(),
        cache: c.pool(),
        basis: &basis,
        n,
        heads,
        out: &out,
        slice: &slice,
        done: &done,
        capacity,
        slots: b.slots,
    };
    for n in [0, 12, 72] {
        rig.refuses(&format!("{n} directions"), dev.project(&Project { n, ..p() }))?;
    }
    rig.refuses("short basis", dev.project(&Project { basis: &short(&basis), ..p() }))?;
    rig.refuses("short slice", dev.project(&Project { slice: &short(&slice), ..p() }))?;
    rig.refuses("short done", dev.project(&Project { done: &short(&done), ..p() }))?;
    rig.refuses("no room for max_kv", dev.project(&Project { capacity: capacity - 1, ..p() }))?;
    rig.refuses("slots that wrap", dev.project(&Project { slots: WRAPS, ..p() }))?;
    rig.refuses("out is q", dev.project(&Project { out: &q, ..p() }))?;
    rig.refuses("slice over keys", dev.project(&Project { slice: &c.k, ..p() }))?;
    rig.refuses("f32 done", dev.project(&Project { done: &basis, ..p() }))?;
    rig.refuses("prefill", dev.project(&Project { seqs: prefill, ..p() }))
}
