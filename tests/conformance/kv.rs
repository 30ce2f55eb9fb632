//! kv_append and key_stats.

use super::batch::{Batch, Cache, Shape};
use super::rig::{Outcome, Rig};
use super::{Cases, Types};
use longsight::backend::{
    CompactSlice, DType, Int8Keys, KeyStats, KvAppend, PAGE, key_stats_len, reference,
};

/// (rows, cached tokens): first chunks, chunks that start inside a page and cross it, single tokens.
const MIXES: &[(&str, &[(usize, usize)])] = &[
    ("first", &[(63, 63)]),
    ("page", &[(64, 64)]),
    ("middle", &[(100, 165)]),
    ("mixed", &[(1, 65), (70, 200), (1, 64)]),
    ("decode", &[(1, 1), (1, 1000), (1, 64)]),
];

pub fn cases(c: &mut Cases) {
    let shapes = [
        Shape { kv_heads: 3, d: 64, lead: 64 },
        Shape { kv_heads: 2, d: 128, lead: 32 },
        Shape { kv_heads: 1, d: 96, lead: 16 },
        Shape { kv_heads: 2, d: 80, lead: 80 },
    ];
    for shape in shapes {
        for (mix, seqs) in MIXES {
            let name = format!("d{}_h{}_lead{}_{mix}", shape.d, shape.kv_heads, shape.lead);
            c.add("kv_append", &name, move |rig, t| append(rig, t, shape, seqs, None));
            if shape.d != 80 {
                let with = format!("{name}_int8_slice");
                let room = 256;
                c.add("kv_append", with, move |rig, t| append(rig, t, shape, seqs, Some(room)));
            }
            c.add("key_stats", &name, move |rig, t| stats(rig, t, shape, seqs));
        }
    }
    // Slice rooms around the lengths of the batch: exactly full, and one token too few for the longest.
    let shape = Shape { kv_heads: 2, d: 64, lead: 32 };
    for room in [64, 200, 199] {
        let seqs = &[(1, 200), (70, 200), (64, 64), (3, 65)];
        let name = format!("d64_lead32_slice_room{room}");
        c.add("kv_append", name, move |rig, t| append(rig, t, shape, seqs, Some(room)));
    }
}

fn append(
    rig: &mut Rig,
    t: Types,
    shape: Shape,
    seqs: &[(usize, usize)],
    room: Option<usize>,
) -> Outcome {
    let b = Batch::new(rig, seqs)?;
    let cache = Cache::new(rig, &b, shape, t.w, |s| s.kv_len - s.q_len)?;
    let width = shape.kv_heads * shape.d;
    let (k_stride, v_stride) = (width, width + 192);
    let mut values = b.row_values(rig, width, k_stride);
    // A key of zeros in the leading dimensions has int8 scale 0.
    values[b.seqs[0].q_start * k_stride..][..shape.d].fill(0.0);
    let k = rig.input(t.act, &values)?;
    let values = b.row_values(rig, width, v_stride);
    let v = rig.input(t.act, &values)?;
    let (n_dims, i8_dims) = (24, 32);
    let capacity = room.unwrap_or(0);
    let rows = b.n_pages * shape.kv_heads * PAGE;
    let data = rig.output(DType::I8, rows * i8_dims)?;
    let scale = rig.output(DType::F32, rows)?;
    let slice = rig.output(t.w, b.slots * shape.kv_heads * capacity * n_dims)?;
    // Any order of distinct dimensions is legal in a slice.
    let mut list = vec![u32::MAX; b.slots * shape.kv_heads * n_dims];
    for s in &b.seqs {
        for h in 0..shape.kv_heads {
            let order = rig.shuffled(shape.d);
            let at = (s.slot * shape.kv_heads + h) * n_dims;
            list[at..at + n_dims].iter_mut().zip(order).for_each(|(d, i)| *d = i as u32);
        }
    }
    let dims = rig.words(&list)?;
    let p = KvAppend {
        k: &k,
        k_stride,
        v: &v,
        v_stride,
        seqs: b.seqs(),
        cache: cache.pool(),
        int8: room.map(|_| Int8Keys { data: &data, scale: &scale, dims: i8_dims }),
        slice: room.map(|capacity| CompactSlice {
            data: &slice,
            dims: &dims,
            n_dims,
            capacity,
            slots: b.slots,
        }),
    };
    let outs = reference::kv_append(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.kv_append(&p))
}

fn stats(rig: &mut Rig, t: Types, shape: Shape, seqs: &[(usize, usize)]) -> Outcome {
    let b = Batch::new(rig, seqs)?;
    let cache = Cache::new(rig, &b, shape, t.w, |s| s.kv_len)?;
    // Sums of earlier tokens; NaN where the sequence starts and in the slot of nobody.
    let len = shape.kv_heads * key_stats_len(shape.d);
    let mut sums = vec![f64::NAN; b.slots * len];
    for s in b.seqs.iter().filter(|s| s.kv_len > s.q_len) {
        sums[s.slot * len..][..len].copy_from_slice(&rig.normal(len, 10.0));
    }
    let stats = rig.input(DType::F32, &sums)?;
    let p = KeyStats { seqs: b.seqs(), cache: cache.pool(), stats: &stats, slots: b.slots };
    let outs = reference::key_stats(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.key_stats(&p))
}
