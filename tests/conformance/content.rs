//! content_bias, force_blocks.

use super::batch::Batch;
use super::rig::{Outcome, Rig};
use super::{Cases, Types};
use longsight::backend::{Among, ContentBias, DType, ForceBlocks, Seqs, reference};

pub fn cases(c: &mut Cases) {
    // Query heads, KV heads, dimensions of a head, and where those of the bias begin.
    for shape in [
        [6, 2, 24, 16],
        [32, 2, 136, 128],
        [9, 3, 72, 64],
        [16, 1, 256, 248],
        [4, 4, 16, 13],
        [8, 2, 40, 38],
    ] {
        for rows in [1, 7, 130] {
            // Sums of either sign; beyond what exp takes; and so small that e is lost in 1 + e.
            for (name, scale, shift) in [
                ("plain", 1.0, 0.0),
                ("large", 500.0, 0.0),
                ("small", 0.1, -12.0),
                ("huge", 1.0, 3000.0),
            ] {
                // A single importance that underflows has no digits to compare.
                if name == "large" && rows == 1 {
                    continue;
                }
                let [heads, kv_heads, d, at] = shape;
                let name = format!("{name}_h{heads}_kv{kv_heads}_d{d}_at{at}_rows{rows}");
                c.add("content_bias", name, move |rig, t| {
                    bias(rig, t, shape, rows, (scale, shift))
                });
            }
        }
    }
    // No dtype but f32 takes part in what follows.
    if c.types.w != DType::F32 {
        return;
    }
    for (unit, k, rows) in [(64, 3, 2), (64, 41, 2), (16, 5, 6), (32, 200, 1)] {
        for (mix, kv) in [("edges", &[1, 63, 64, 65, 128][..]), ("long", &[1000, 200, 5000])] {
            let name = format!("unit{unit}_k{k}_rows{rows}_{mix}");
            c.add("force_blocks", name, move |rig, _| force(rig, kv, rows, k, unit));
        }
    }
    c.add("content_bias", "bad_arguments", |rig, _| bad_biases(rig));
    c.add("force_blocks", "bad_arguments", |rig, _| bad_blocks(rig));
}

fn bias(
    rig: &mut Rig,
    t: Types,
    shape: [usize; 4],
    rows: usize,
    (scale, shift): (f64, f64),
) -> Outcome {
    let [heads, kv_heads, d, at] = shape;
    let (width, v_stride) = (kv_heads * d, kv_heads * d + 8);
    let mut values = vec![f64::NAN; (rows - 1) * v_stride + width];
    for row in values.chunks_mut(v_stride) {
        row[..width].copy_from_slice(&rig.normal(width, scale));
        // Every sum is moved by the first value.
        row[0] = 1.0;
    }
    let mut weights = rig.normal(kv_heads * width, 1.0 / (width as f64).sqrt());
    weights.chunks_exact_mut(width).for_each(|w| w[0] += shift);
    // Small sums are multiplied back into the normal range of f16.
    let mut a = rig.normal(kv_heads, if shift < 0.0 { 1000.0 } else { 1.0 });
    // A head without importance, as an untrained one is.
    if kv_heads > 1 {
        a[0] = 0.0;
    }
    let v = rig.input(t.act, &values)?;
    let (delta, a) = (rig.input(DType::F32, &weights)?, rig.input(DType::F32, &a)?);
    let q = rig.output(t.act, rows * heads * d)?;
    let k = rig.output(t.act, rows * width)?;
    let p = ContentBias {
        v: &v,
        v_stride,
        delta: &delta,
        a: &a,
        q: &q,
        k: &k,
        rows,
        heads,
        kv_heads,
        head_dim: d,
        at,
    };
    let outs = reference::content_bias(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.content_bias(&p))
}

fn force(rig: &mut Rig, kv: &[usize], rows: usize, k: usize, unit: usize) -> Outcome {
    let b = Batch::decode(rig, kv)?;
    let stride = b.max_kv.div_ceil(unit);
    let (mut lists, mut counts) = (vec![u32::MAX; b.n() * rows * k], Vec::new());
    for (row, list) in lists.chunks_exact_mut(k).enumerate() {
        let there = b.seqs[row / rows].kv_len.div_ceil(unit);
        // Blocks behind the query's among them; a full list (that says it is longer), a part of one, an empty one.
        let some = rig.shuffled(there + 2);
        let n = [k, k / 2, 0][row % 3].min(some.len());
        list.iter_mut().zip(&some[..n]).for_each(|(to, b)| *to = *b as u32);
        counts.push(if n == k { k as u32 + 3 } else { n as u32 });
    }
    let values: Vec<f64> = (0..b.n() * rows * stride)
        .map(|i| match i % 5 {
            4 => f64::NEG_INFINITY,
            _ => i as f64,
        })
        .collect();
    let scores = rig.input(DType::F32, &values)?;
    let (indices, counts) = (rig.words(&lists)?, rig.words(&counts)?);
    let listed = Among { indices: &indices, counts: &counts, k };
    let p =
        ForceBlocks { scores: &scores, seqs: b.seqs(), rows_per_seq: rows, stride, unit, listed };
    let outs = reference::force_blocks(&p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.force_blocks(&p))
}

fn bad_biases(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let (rows, heads, kv_heads, head_dim) = (3, 4, 2, 24);
    let v = rig.zeros(DType::F32, rows * 2 * 24)?;
    let (delta, a) = (rig.zeros(DType::F32, 2 * 2 * 24)?, rig.zeros(DType::F32, 2)?);
    let (q, k) = (rig.zeros(DType::F32, rows * 4 * 24)?, rig.zeros(DType::F32, rows * 2 * 24)?);
    let words = rig.words(&vec![0; rows * 4 * 24])?;
    let p = || ContentBias {
        v: &v,
        v_stride: 48,
        delta: &delta,
        a: &a,
        q: &q,
        k: &k,
        rows,
        heads,
        kv_heads,
        head_dim,
        at: 16,
    };
    rig.refuses("a bias of one dimension", dev.content_bias(&ContentBias { at: 23, ..p() }))?;
    rig.refuses("a bias behind the head", dev.content_bias(&ContentBias { at: 24, ..p() }))?;
    rig.refuses("a bias far behind", dev.content_bias(&ContentBias { at: usize::MAX, ..p() }))?;
    rig.refuses("more rows", dev.content_bias(&ContentBias { rows: 4, ..p() }))?;
    rig.refuses("rows that wrap", dev.content_bias(&ContentBias { rows: usize::MAX, ..p() }))?;
    rig.refuses("wider rows", dev.content_bias(&ContentBias { v_stride: 49, ..p() }))?;
    rig.refuses("no KV head", dev.content_bias(&ContentBias { kv_heads: 0, ..p() }))?;
    rig.refuses("a third of a head", dev.content_bias(&ContentBias { kv_heads: 3, ..p() }))?;
    rig.refuses("odd head_dim", dev.content_bias(&ContentBias { head_dim: 20, ..p() }))?;
    rig.refuses("short a", dev.content_bias(&ContentBias { a: &a.slice(0, 1), ..p() }))?;
    rig.refuses(
        "short delta",
        dev.content_bias(&ContentBias { delta: &delta.slice(0, 64), ..p() }),
    )?;
    rig.refuses("words", dev.content_bias(&ContentBias { q: &words, ..p() }))?;
    rig.refuses("keys over values", dev.content_bias(&ContentBias { k: &v, ..p() }))?;
    rig.refuses("keys over queries", dev.content_bias(&ContentBias { k: &q, ..p() }))
}

fn bad_blocks(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[65, 300])?;
    let (rows, k, unit) = (2, 3, 64);
    let stride = b.max_kv.div_ceil(unit);
    let scores = rig.zeros(DType::F32, 2 * rows * stride)?;
    let indices = rig.words(&vec![0; 2 * rows * k])?;
    let counts = rig.words(&vec![0; 2 * rows])?;
    let listed = Among { indices: &indices, counts: &counts, k };
    let p = || ForceBlocks {
        scores: &scores,
        seqs: b.seqs(),
        rows_per_seq: rows,
        stride,
        unit,
        listed,
    };
    let short = counts.slice(0, 3);
    let with = |listed| ForceBlocks { listed, ..p() };
    rig.refuses("odd blocks", dev.force_blocks(&ForceBlocks { unit: 48, ..p() }))?;
    rig.refuses("small stride", dev.force_blocks(&ForceBlocks { stride: stride - 1, ..p() }))?;
    rig.refuses("more rows", dev.force_blocks(&ForceBlocks { rows_per_seq: 3, ..p() }))?;
    rig.refuses("no lists", dev.force_blocks(&with(Among { k: 0, ..listed })))?;
    rig.refuses("longer lists", dev.force_blocks(&with(Among { k: 4, ..listed })))?;
    rig.refuses("short counts", dev.force_blocks(&with(Among { counts: &short, ..listed })))?;
    rig.refuses("f32 lists", dev.force_blocks(&with(Among { indices: &scores, ..listed })))?;
    let seqs = Seqs { max_q: 2, ..b.seqs() };
    rig.refuses("a prompt", dev.force_blocks(&ForceBlocks { seqs, ..p() }))
}
