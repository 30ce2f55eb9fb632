//! attend_dense, attend_rows, merge.

use super::batch::{Batch, Cache, Shape};
use super::listed::token_lists;
use super::rig::{Outcome, Rig};
use super::{Cases, Types};
use longsight::backend::reference::{self, Cell, Output};
use longsight::backend::{AttendDense, AttendRows, DType, HeadPool, Logits, Merge, Tensor};

#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub shape: Shape,
    pub group: usize,
}

pub(super) const fn heads(d: usize, kv_heads: usize, group: usize, lead: usize) -> Heads {
    Heads { shape: Shape { kv_heads, d, lead }, group }
}

const PREFILL: &[(&str, &[(usize, usize)])] = &[
    ("first", &[(65, 65)]),
    ("middle", &[(70, 200)]),
    ("mixed", &[(1, 65), (33, 200), (1, 1), (64, 64)]),
];
/// More keys than the ring of a prefill kernel holds, and the last tile of rows nearly empty.
const CHUNK: &[(usize, usize)] = &[(130, 1300), (70, 70)];
const DECODE: &[(&str, &[(usize, usize)])] = &[
    ("one", &[(1, 1)]),
    ("edges", &[(1, 63), (1, 64), (1, 65)]),
    ("long", &[(1, 1000), (1, 200), (1, 5000)]),
];
const RAGGED: &[(usize, usize)] = &[(1, 4000), (1, 100), (1, 33), (1, 1000), (1, 2500)];

impl Heads {
    pub fn name(&self) -> String {
        format!("d{}_g{}_lead{}", self.shape.d, self.group, self.shape.lead)
    }
}

pub fn cases(c: &mut Cases) {
    let set = [
        heads(64, 3, 3, 64),
        heads(64, 2, 1, 32),
        heads(128, 2, 4, 32),
        heads(128, 1, 8, 16),
        heads(128, 1, 16, 128),
        heads(96, 2, 3, 96),
        heads(80, 1, 4, 16),
        heads(256, 1, 16, 64),
    ];
    for h in set {
        for (mix, seqs) in PREFILL.iter().chain(DECODE) {
            for splits in [1, 3, 7] {
                // Prefill takes one split; the mixed batch must still work with more.
                let prefill = seqs.iter().any(|s| s.0 > 1);
                if splits == 7 && (prefill || *mix == "one") || splits == 3 && *mix == "first" {
                    continue;
                }
                let name = format!("{}_{mix}_s{splits}", h.name());
                let d = Dense { h, window: None, splits, wide: splits > 1, logits: None };
                c.add("attend_dense", name, move |rig, t| dense(rig, t, seqs, d));
            }
        }
    }
    // Keys in one piece come by the copy engine on Hopper; more tiles of them than its rings hold.
    let whole = heads(128, 2, 4, 128);
    for (h, window, splits) in [
        (set[0], None, 1),
        (set[0], None, 3),
        (whole, None, 1),
        (whole, Some(300), 1),
        (set[1], Some(300), 1),
        (set[2], None, 1),
        (set[2], Some(150), 2),
        (set[3], None, 1),
    ] {
        let name = format!("{}_chunk_window{}_s{splits}", h.name(), window.unwrap_or(0));
        let d = Dense { h, window, splits, wide: splits > 1, logits: None };
        c.add("attend_dense", name, move |rig, t| dense(rig, t, CHUNK, d));
    }
    let windows = [heads(64, 2, 3, 32), set[0], whole].into_iter();
    for (h, window) in windows.flat_map(|h| [1, 64, 100, 10_000].map(|w| (h, w))) {
        for (mix, splits) in [("middle", 1), ("mixed", 1), ("long", 1), ("long", 7)] {
            let find = |m: &[(&str, &'static [(usize, usize)])]| {
                m.iter().find(|x| x.0 == mix).map(|x| x.1)
            };
            let Some(seqs) = find(PREFILL).or_else(|| find(DECODE)) else { continue };
            let name = format!("{}_{mix}_window{window}_s{splits}", h.name());
            let d = Dense { h, window: Some(window), splits, wide: true, logits: None };
            c.add("attend_dense", name, move |rig, t| dense(rig, t, seqs, d));
        }
    }
    // Logits of each head, their sum and their largest: of short sequences, and of such as blocks share.
    for h in set {
        for pool in [HeadPool::None, HeadPool::SumLogit, HeadPool::MaxLogit] {
            let seqs = DECODE.iter().copied().chain([("ragged", RAGGED)]);
            for (mix, seqs) in seqs.filter(|s| s.0 != "one") {
                for splits in if mix == "long" { vec![1, 3] } else { vec![1] } {
                    let name = format!("{}_{mix}_logits_{pool}_s{splits}", h.name());
                    let d = Dense { h, window: None, splits, wide: splits > 1, logits: Some(pool) };
                    c.add("attend_dense", name, move |rig, t| dense(rig, t, seqs, d));
                }
            }
        }
    }
    for h in set {
        for (lists, per_head) in [("kv", false), ("q", true)] {
            if h.group == 1 && per_head {
                continue;
            }
            for (mix, seqs) in DECODE {
                for (k, splits) in [(64, 1), (256, 3), (40, 7)] {
                    if *mix != "long" && k == 256 || *mix == "one" && k == 40 {
                        continue;
                    }
                    let name = format!("{}_{mix}_k{k}_{lists}lists_s{splits}", h.name());
                    let lists = if per_head { Lists::PerHead } else { Lists::PerKvHead };
                    let r = Rows { h, lists, k, splits, lse: true };
                    c.add("attend_rows", &name, move |rig, t| rows(rig, t, seqs, r));
                    if splits == 1 && *mix == "edges" {
                        let r = Rows { lse: false, ..r };
                        let name = format!("{name}_nolse");
                        c.add("attend_rows", name, move |rig, t| rows(rig, t, seqs, r));
                    }
                }
            }
        }
    }
    // Lists by a map: one for all, as many as KV heads, more than heads.
    for (h, lists) in [(set[0], 1), (set[0], 3), (set[1], 5), (set[2], 2), (set[3], 4), (set[6], 1)]
    {
        for (mix, seqs) in DECODE {
            for (k, splits) in [(64, 1), (40, 7)] {
                let name = format!("{}_{mix}_k{k}_map{lists}_s{splits}", h.name());
                let r = Rows { h, lists: Lists::Mapped(lists), k, splits, lse: true };
                c.add("attend_rows", name, move |rig, t| rows(rig, t, seqs, r));
            }
        }
    }
    // As many pairs of sequence and list, and lists as long, as decide what reads one on a GPU with clusters of blocks:
    // a cluster, a block, or all blocks.
    for (h, seqs, per_head, k) in [
        (set[2], RAGGED, false, 300),
        (set[2], RAGGED, false, 3000),
        (set[0], RAGGED, false, 3000),
        (set[2], &RAGGED[..1], false, 3500),
        (set[4], &RAGGED[..1], true, 1500),
        (heads(128, 4, 4, 32), RAGGED, true, 300),
    ] {
        let lists = if per_head { Lists::PerHead } else { Lists::PerKvHead };
        let name = format!(
            "{}_{}_ragged_k{k}_{}lists",
            h.name(),
            seqs.len(),
            if per_head { "q" } else { "kv" }
        );
        let r = Rows { h, lists, k, splits: 1, lse: true };
        c.add("attend_rows", name, move |rig, t| rows(rig, t, seqs, r));
    }
    for (d, heads, splits, wide) in [
        (64, 9, 1, false),
        (64, 9, 3, false),
        (128, 32, 7, true),
        (96, 4, 16, false),
        (80, 2, 64, true),
    ] {
        let name = format!("d{d}_h{heads}_s{splits}{}", if wide { "_f32" } else { "" });
        c.add("merge", name, move |rig, t| merge_alone(rig, t, d, heads, splits, wide));
    }
}

#[derive(Clone, Copy)]
struct Dense {
    h: Heads,
    window: Option<usize>,
    splits: usize,
    /// f32 output.
    wide: bool,
    /// Logits are wanted, pooled like this.
    logits: Option<HeadPool>,
}

fn dense(rig: &mut Rig, t: Types, seqs: &[(usize, usize)], c: Dense) -> Outcome {
    let Shape { kv_heads, d, .. } = c.h.shape;
    let heads = kv_heads * c.h.group;
    let b = Batch::new(rig, seqs)?;
    let cache = Cache::new(rig, &b, c.h.shape, t.w, |s| s.kv_len)?;
    let q = b.queries(rig, t.act, heads * d)?;
    let room = c.splits * b.rows * heads;
    let out = rig.output(if c.wide { DType::F32 } else { t.act }, room * d)?;
    let lse = rig.output(DType::F32, room)?;
    let (seqs, cache) = (b.seqs(), cache.pool());
    let scale = 1.0 / (d as f32).sqrt();
    // Without splits lse is optional: one batch in three asks for none.
    let lse = (c.splits > 1 || b.n() != 3).then_some(&lse);
    let (window, splits) = (c.window, c.splits);
    let stride = b.stride();
    let room = |pool: HeadPool| b.n() * pool.lists(heads, kv_heads) * stride;
    let scores = c.logits.map(|pool| rig.output(DType::F32, room(pool))).transpose()?;
    let logits = c.logits.zip(scores.as_ref());
    let logits = logits.map(|(pool, scores)| Logits { scores, stride, pool });
    let p = AttendDense {
        q: &q,
        seqs,
        cache,
        heads,
        scale,
        window,
        splits,
        out: &out,
        lse,
        values: true,
        logits,
    };
    let outs = match (splits, lse) {
        (2.., Some(lse)) => {
            let mut outs = partials("attend_dense", &b, &out, lse, [splits, heads, d]);
            if let Some(scoring) = p.scoring() {
                outs.extend(reference::score_dims(&scoring, &*rig.dev)?);
            }
            outs
        }
        _ => reference::attend_dense(&p, &*rig.dev)?,
    };
    rig.check(t.act, &outs, &|dev| dev.attend_dense(&p))?;
    if splits == 1 && lse.is_some() && seqs.max_q > 64 {
        let p = AttendDense { values: false, ..p };
        let outs = reference::attend_dense(&p, &*rig.dev)?;
        rig.check(t.act, &outs, &|dev| dev.attend_dense(&p))?;
    }
    let Some(lse) = lse.filter(|_| splits > 1) else { return Ok(()) };
    let whole = merged(rig, t, &b, &out, lse, [splits, heads, d])?;
    let p = AttendDense { splits: 1, out: &whole.0, lse: Some(&whole.1), logits: None, ..p };
    let outs = reference::attend_dense(&p, &*rig.dev)?;
    rig.expect(t.act, &outs)
}

/// Lists of a sequence.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lists {
    PerKvHead,
    PerHead,
    /// So many, of which each KV head takes one by a random map, the last entry of which names none where there is
    /// more than one list.
    Mapped(usize),
}

#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub h: Heads,
    pub lists: Lists,
    pub k: usize,
    pub splits: usize,
    /// With `lse`, which splits need.
    pub lse: bool,
}

pub(super) fn rows(rig: &mut Rig, t: Types, seqs: &[(usize, usize)], c: Rows) -> Outcome {
    let Shape { kv_heads, d, .. } = c.h.shape;
    let heads = kv_heads * c.h.group;
    let b = Batch::new(rig, seqs)?;
    let cache = Cache::new(rig, &b, c.h.shape, t.w, |s| s.kv_len)?;
    let q = b.queries(rig, t.act, heads * d)?;
    let rows_per_seq = match c.lists {
        Lists::PerKvHead => kv_heads,
        Lists::PerHead => heads,
        Lists::Mapped(n) => n,
    };
    let head_map = match c.lists {
        Lists::Mapped(n) => {
            let mut map: Vec<u32> = (0..kv_heads).map(|_| rig.below(n) as u32).collect();
            if n > 1 && kv_heads > 1 {
                map[kv_heads - 1] = if c.k == 64 { n as u32 } else { u32::MAX };
            }
            Some(rig.words(&map)?)
        }
        _ => None,
    };
    let (indices, counts) = token_lists(rig, &b, rows_per_seq, c.k)?;
    let room = c.splits * b.rows * heads;
    let out = rig.output(if c.splits > 1 { DType::F32 } else { t.act }, room * d)?;
    let lse = rig.output(DType::F32, room)?;
    let p = AttendRows {
        q: &q,
        seqs: b.seqs(),
        cache: cache.pool(),
        heads,
        scale: 1.0 / (d as f32).sqrt(),
        indices: &indices,
        counts: &counts,
        k: c.k,
        rows_per_seq,
        head_map: head_map.as_ref(),
        settled: true,
        splits: c.splits,
        out: &out,
        lse: c.lse.then_some(&lse),
    };
    let outs = match c.splits {
        1 => reference::attend_rows(&p, &*rig.dev)?,
        splits => partials("attend_rows", &b, &out, &lse, [splits, heads, d]),
    };
    rig.check(t.act, &outs, &|dev| dev.attend_rows(&p))?;
    if c.splits == 1 {
        return Ok(());
    }
    let whole = merged(rig, t, &b, &out, &lse, [c.splits, heads, d])?;
    let p = AttendRows { splits: 1, out: &whole.0, lse: Some(&whole.1), ..p };
    let outs = reference::attend_rows(&p, &*rig.dev)?;
    rig.expect(t.act, &outs)
}

/// Which keys a split takes is the backend's choice: partial results must be finite and partial lse not NaN, for
/// every row of the batch in every split; the merged result is compared.
fn partials<'a>(
    op: &'static str,
    b: &Batch,
    out: &'a Tensor,
    lse: &'a Tensor,
    [splits, heads, d]: [usize; 3],
) -> Vec<Output<'a>> {
    let one = |name, tensor: &'a Tensor, width: usize, far: f64| {
        let mut cells = vec![Cell::Keep; tensor.len()];
        for split in cells.chunks_exact_mut(b.rows * width).take(splits) {
            for s in &b.seqs {
                split[s.q_start * width..(s.q_start + s.q_len) * width].fill(Cell::Near(0.0, far));
            }
        }
        Output { op, name, tensor, cells, exact: false }
    };
    vec![one("out", out, heads * d, 1e30), one("lse", lse, heads, f64::INFINITY)]
}

/// Merges partial results on the device (checked by itself) into f32 `out` and `lse`.
fn merged(
    rig: &mut Rig,
    t: Types,
    b: &Batch,
    part: &Tensor,
    part_lse: &Tensor,
    [splits, heads, head_dim]: [usize; 3],
) -> Outcome<(Tensor, Tensor)> {
    let out = rig.output(DType::F32, b.rows * heads * head_dim)?;
    let lse = rig.output(DType::F32, b.rows * heads)?;
    let seqs = b.seqs();
    let p = Merge { part, part_lse, seqs, splits, heads, head_dim, out: &out, lse: Some(&lse) };
    let outs = reference::merge(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.merge(&p))?;
    Ok((out, lse))
}

fn merge_alone(
    rig: &mut Rig,
    t: Types,
    head_dim: usize,
    heads: usize,
    splits: usize,
    wide: bool,
) -> Outcome {
    let b = Batch::new(rig, &[(1, 100), (5, 70), (1, 1)])?;
    let n = splits * b.rows * heads;
    let (part, mut lse) = (rig.normal(n * head_dim, 1.0), rig.normal(n, 20.0));
    for (i, l) in lse.iter_mut().enumerate() {
        // Some splits are empty; for one row all are.
        let row = i / heads % b.rows;
        if i % 3 == 0 || row == b.seqs[0].q_start {
            *l = f64::NEG_INFINITY;
        }
    }
    let part = rig.input(DType::F32, &part)?;
    let part_lse = rig.input(DType::F32, &lse)?;
    let out = rig.output(if wide { DType::F32 } else { t.act }, b.rows * heads * head_dim)?;
    let lse = rig.output(DType::F32, b.rows * heads)?;
    let p = Merge {
        part: &part,
        part_lse: &part_lse,
        seqs: b.seqs(),
        splits,
        heads,
        head_dim,
        out: &out,
        lse: wide.then_some(&lse),
    };
    let outs = reference::merge(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.merge(&p))
}
