//! rope_append: the same bits as rope, and kv_append of its keys.

use super::batch::{Batch, Cache, Shape};
use super::dense::frequencies;
use super::rig::{Outcome, Rig};
use super::{Cases, Types};
use longsight::backend::{
    CompactSlice, DType, Int8Keys, KvAppend, PAGE, QkNorm, Rope, Tensor, reference,
};

#[derive(Clone, Copy)]
struct Rotate {
    shape: Shape,
    group: usize,
    norm: bool,
    /// An int8 copy, and a slice with room for so many tokens.
    kept: Option<usize>,
}

pub fn cases(c: &mut Cases) {
    let mixes: [(&str, &[(usize, usize)]); 3] = [
        ("one", &[(1, 130)]),
        ("decode", &[(1, 1), (1, 1000), (1, 64), (1, 129)]),
        ("rows", &[(1, 65), (5, 200), (1, 64)]),
    ];
    let shapes =
        [(2, 64, 64, 3), (8, 128, 128, 4), (2, 128, 32, 16), (1, 96, 16, 1), (2, 256, 256, 2)];
    for (kv_heads, d, lead, group) in shapes {
        for (mix, seqs) in mixes {
            for norm in [false, true] {
                for kept in [None, Some(199)] {
                    let shape = Shape { kv_heads, d, lead };
                    let how = if norm { "_norm" } else { "" };
                    let with = if kept.is_some() { "_int8_slice" } else { "" };
                    let name = format!("d{d}_h{kv_heads}_g{group}_lead{lead}_{mix}{how}{with}");
                    let r = Rotate { shape, group, norm, kept };
                    c.add("rope_append", name, move |rig, t| rope_append(rig, t, r, seqs));
                }
            }
        }
    }
    c.add("rope_append", "bad_arguments", |rig, _| refused(rig));
}

/// What both embeddings of a case read and write.
struct Sides {
    x: Tensor,
    positions: Tensor,
    freq: Tensor,
    weight: Tensor,
    q: Tensor,
    k: Tensor,
}

impl Sides {
    fn new(rig: &mut Rig, t: Types, r: Rotate, b: &Batch) -> Outcome<Self> {
        let Shape { kv_heads, d, .. } = r.shape;
        let (heads, width) = (r.group * kv_heads, (r.group + 2) * kv_heads * d);
        let values = b.row_values(rig, width, width);
        let at: Vec<u32> = (0..b.rows).map(|_| rig.below(130_000) as u32).collect();
        let freq = frequencies(rig, kv_heads, d);
        let weight: Vec<f64> = rig.normal(heads * d, 0.3).iter().map(|w| 1.0 + w).collect();
        Ok(Sides {
            x: rig.input(t.act, &values)?,
            positions: rig.words(&at)?,
            freq: rig.input(DType::F32, &freq)?,
            weight: rig.input(DType::F32, &weight)?,
            q: rig.output(t.act, b.rows * heads * d)?,
            k: rig.output(t.act, b.rows * kv_heads * d)?,
        })
    }

    /// Of the queries, and of the keys, which lie behind them at `x`.
    fn ropes<'a>(&'a self, r: Rotate, rows: usize, k_x: &'a Tensor) -> [Rope<'a>; 2] {
        let Shape { kv_heads, d, .. } = r.shape;
        let side = |x: &'a Tensor, out: &'a Tensor, heads_per_freq: usize, factor: f32| Rope {
            x,
            x_stride: (r.group + 2) * kv_heads * d,
            positions: &self.positions,
            inv_freq: &self.freq,
            heads_per_freq,
            norm: r.norm.then_some(QkNorm { weight: &self.weight, eps: 1e-6 }),
            factor,
            out,
            rows,
            heads: heads_per_freq * kv_heads,
            head_dim: d,
        };
        [side(&self.x, &self.q, r.group, 1.25), side(k_x, &self.k, 1, 1.0)]
    }

    /// `x` from column `at` of a row on.
    fn from(&self, at: usize) -> Tensor {
        self.x.slice(at, self.x.len() - at)
    }
}

fn rope_append(rig: &mut Rig, t: Types, r: Rotate, seqs: &[(usize, usize)]) -> Outcome {
    let b = Batch::new(rig, seqs)?;
    let Shape { kv_heads, d, .. } = r.shape;
    let cache = Cache::new(rig, &b, r.shape, t.w, |s| s.kv_len - s.q_len)?;
    let s = Sides::new(rig, t, r, &b)?;
    let (queries, keys) = (r.group * kv_heads * d, kv_heads * d);
    let (k_x, v) = (s.from(queries), s.from(queries + keys));
    let ropes = s.ropes(r, b.rows, &k_x);
    let (n_dims, i8_dims, capacity) = (8, 16, r.kept.unwrap_or(0));
    let rows = b.n_pages * kv_heads * PAGE;
    let data = rig.output(DType::I8, rows * i8_dims)?;
    let scale = rig.output(DType::F32, rows)?;
    let slice = rig.output(t.w, b.slots * kv_heads * capacity * n_dims)?;
    let list: Vec<u32> = (0..b.slots * kv_heads)
        .flat_map(|_| {
            rig.shuffled(d).into_iter().take(n_dims).map(|i| i as u32).collect::<Vec<_>>()
        })
        .collect();
    let dims = rig.words(&list)?;
    let p = KvAppend {
        k: &s.k,
        k_stride: keys,
        v: &v,
        v_stride: queries + 2 * keys,
        seqs: b.seqs(),
        cache: cache.pool(),
        int8: r.kept.map(|_| Int8Keys { data: &data, scale: &scale, dims: i8_dims }),
        slice: r.kept.map(|capacity| CompactSlice {
            data: &slice,
            dims: &dims,
            n_dims,
            capacity,
            slots: b.slots,
        }),
    };
    // Keys as this device's rope leaves them go into the pages to the bit.
    let [q, k] = &ropes;
    let mut outs = reference::rope(q, &*rig.dev)?;
    outs.extend(reference::rope(k, &*rig.dev)?);
    // Rows of nobody may stay as they are.
    for (out, width) in outs.iter_mut().zip([queries, keys]) {
        let of_someone =
            |row| b.seqs.iter().any(|s| (s.q_start..s.q_start + s.q_len).contains(&row));
        let nobody = (0..b.rows).filter(|row| !of_someone(*row));
        nobody.for_each(|row| out.cells[row * width..][..width].fill(reference::Cell::Any));
    }
    rig.check(t.act, &outs, &|dev| dev.rope_both([q, k]))?;
    outs.extend(reference::kv_append(&p, &*rig.dev)?);
    for (out, width) in [(&s.q, queries), (&s.k, keys)] {
        rig.write(out, &vec![f64::NAN; b.rows * width])?;
    }
    rig.check(t.act, &outs, &|dev| dev.rope_append([q, k], &p))
}

fn refused(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let shape = Shape { kv_heads: 2, d: 64, lead: 64 };
    let r = Rotate { shape, group: 2, norm: false, kept: None };
    let t = Types { act: DType::F32, w: DType::F32 };
    let b = Batch::decode(rig, &[65, 3])?;
    let cache = Cache::new(rig, &b, shape, t.w, |s| s.kv_len - 1)?;
    let s = Sides::new(rig, t, r, &b)?;
    let (k_x, v, other) = (s.from(256), s.from(384), rig.zeros(DType::F32, b.rows * 128)?);
    let ropes = || s.ropes(r, b.rows, &k_x);
    let append = |k| KvAppend {
        k,
        k_stride: 128,
        v: &v,
        v_stride: 512,
        seqs: b.seqs(),
        cache: cache.pool(),
        int8: None,
        slice: None,
    };
    let p = || append(&s.k);
    let run = |[q, k]: [Rope<'_>; 2], p: KvAppend<'_>| dev.rope_append([&q, &k], &p);
    rig.refuses("keys of another tensor", run(ropes(), append(&other)))?;
    rig.refuses("keys with gaps", run(ropes(), KvAppend { k_stride: 192, ..p() }))?;
    let [q, k] = ropes();
    rig.refuses("fewer keys", run([q, Rope { heads: 1, ..k }], p()))?;
    let [q, k] = ropes();
    rig.refuses("fewer rows", run([Rope { rows: 1, ..q }, k], p()))?;
    let [q, k] = ropes();
    rig.refuses(
        "queries over keys",
        run([Rope { out: &other, ..q }, Rope { out: &other, ..k }], append(&other)),
    )?;
    let [q, k] = ropes();
    rig.refuses("queries in the pages", run([Rope { out: &cache.k, ..q }, k], p()))?;
    rig.refuses("values over queries", run(ropes(), KvAppend { v: &s.q, v_stride: 128, ..p() }))
}
