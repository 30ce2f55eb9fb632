//! union_ranks, hold_lists.

use super::Cases;
use super::batch::Batch;
use super::rig::{Outcome, Rig};
use longsight::backend::{Among, DType, HELD_WORDS, HoldLists, Seqs, UnionRanks, reference};

const EDGES: &[usize] = &[1, 63, 64, 65];
const LONG: &[usize] = &[1000, 200, 5000];

pub fn cases(c: &mut Cases) {
    for (heads, k) in [(1, 5), (9, 100), (32, 40), (6, 700)] {
        for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
            let name = format!("heads{heads}_k{k}_{mix}");
            c.add("union_ranks", &name, move |rig, _| unite(rig, kv, heads, k, false));
            c.add("union_ranks", format!("ties_{name}"), move |rig, _| {
                unite(rig, kv, heads, k, true)
            });
        }
    }
    for (rows, k, room) in [(1, 40, 40), (3, 1, 9), (2, 300, 364), (8, 64, 70)] {
        for fresh in [0, 1, 3] {
            for (mix, kv) in [("edges", EDGES), ("long", LONG)] {
                let name = format!("rows{rows}_k{k}_room{room}_fresh{fresh}_{mix}");
                c.add("hold_lists", name, move |rig, _| hold(rig, kv, rows, [k, room], fresh));
            }
        }
    }
    c.add("union_ranks", "bad_arguments", |rig, _| bad_unions(rig));
    c.add("hold_lists", "bad_arguments", |rig, _| bad_lists(rig));
}

/// Best tokens of every head as `top_k` gives them; with `ties` most scores are the same, and zeros have signs.
fn unite(rig: &mut Rig, kv: &[usize], heads: usize, k: usize, ties: bool) -> Outcome {
    let b = Batch::decode(rig, kv)?;
    let stride = b.stride();
    let mut scores = b.scores(rig, heads, 1.0);
    let (mut lists, mut counts) = (vec![u32::MAX; b.n() * heads * k], Vec::new());
    for (row, v) in scores.chunks_exact_mut(stride).enumerate() {
        let kv_len = b.seqs[row / heads].kv_len;
        for (j, x) in v[..kv_len].iter_mut().enumerate() {
            // Forced tokens, and one that is never chosen.
            *x = match j {
                _ if j + 2 >= kv_len => f64::INFINITY,
                3 => f64::NEG_INFINITY,
                _ if ties => [-0.0, 0.0, 1.0, -1.0][(j + row) % 4],
                _ => *x,
            };
        }
        let mut best: Vec<usize> = (0..kv_len).filter(|j| v[*j] > f64::NEG_INFINITY).collect();
        best.sort_by(|i, j| (v[*j] + 0.0).total_cmp(&(v[*i] + 0.0)));
        // A full list, an empty one, and a short one.
        best.truncate(if row % 7 == 5 { 0 } else { k - row % 2 * (k / 3) });
        best.sort_unstable();
        lists[row * k..].iter_mut().zip(&best).for_each(|(to, j)| *to = *j as u32);
        counts.push(best.len() as u32);
    }
    let scores = rig.input(DType::F32, &scores)?;
    let (indices, counts) = (rig.words(&lists)?, rig.words(&counts)?);
    let out = rig.output(DType::F32, b.n() * stride)?;
    let listed = Among { indices: &indices, counts: &counts, k };
    let p = UnionRanks { scores: &scores, seqs: b.seqs(), heads, stride, listed, out: &out };
    let outs = reference::union_ranks(&p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.union_ranks(&p))
}

/// Some sequences have just chosen; the others hold lists that are 0, 1 or more tokens old.
fn hold(rig: &mut Rig, kv: &[usize], rows: usize, [k, room]: [usize; 2], fresh: usize) -> Outcome {
    let b = Batch::decode(rig, kv)?;
    let list = |rig: &mut Rig, tokens: usize, want: usize| {
        let mut list: Vec<f64> = rig.shuffled(tokens).into_iter().map(|j| j as f64).collect();
        list.truncate(want.min(k));
        list.sort_by(f64::total_cmp);
        list
    };
    let (mut chosen, mut counts) = (vec![u32::MAX; fresh * rows * k], Vec::new());
    let mut held = vec![f64::from(u32::MAX); b.slots * rows * k];
    let mut marks = vec![f64::from(u32::MAX); b.slots * rows * HELD_WORDS];
    for (i, s) in b.seqs.iter().enumerate() {
        for r in 0..rows {
            let want = [k, k / 2 + 1, 0][(i + r) % 3];
            if i < fresh {
                let new = list(rig, s.kv_len, want);
                let at = (i * rows + r) * k;
                chosen[at..].iter_mut().zip(&new).for_each(|(to, j)| *to = *j as u32);
                // More than its room counts as its room.
                counts.push(if new.len() == k { k as u32 + 5 } else { new.len() as u32 });
            } else {
                let since = [1, 7, 0, 80][(i + r) % 4].min(s.kv_len);
                let old = list(rig, s.kv_len - since, want);
                let own = s.slot * rows + r;
                held[own * k..][..old.len()].copy_from_slice(&old);
                let mark = [old.len() as f64, (s.kv_len - since) as f64];
                marks[own * HELD_WORDS..][..HELD_WORDS].copy_from_slice(&mark);
            }
        }
    }
    counts.push(0);
    chosen.push(0);
    let (chosen, chosen_counts) = (rig.words(&chosen)?, rig.words(&counts)?);
    let (old, marked) = (held, marks);
    let held = rig.output(DType::U32, old.len())?;
    let marks = rig.output(DType::U32, marked.len())?;
    rig.write(&held, &old)?;
    rig.write(&marks, &marked)?;
    let indices = rig.output(DType::U32, b.n() * rows * room)?;
    let counts = rig.output(DType::U32, b.n() * rows)?;
    let p = HoldLists {
        chosen: &chosen,
        chosen_counts: &chosen_counts,
        seqs: b.seqs(),
        fresh,
        rows_per_seq: rows,
        k,
        held: &held,
        marks: &marks,
        slots: b.slots,
        room,
        indices: &indices,
        counts: &counts,
    };
    let outs = reference::hold_lists(&p, &*rig.dev)?;
    rig.check(DType::U32, &outs, &|dev| dev.hold_lists(&p))
}

fn bad_unions(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[65, 3])?;
    let (heads, stride, k) = (4, b.stride(), 16);
    let scores = rig.zeros(DType::F32, b.n() * heads * stride)?;
    let out = rig.output(DType::F32, b.n() * stride)?;
    let indices = rig.words(&vec![0; b.n() * heads * k])?;
    let counts = rig.words(&vec![0; b.n() * heads])?;
    let listed = Among { indices: &indices, counts: &counts, k };
    let (scores, seqs, out) = (&scores, b.seqs(), &out);
    let p = || UnionRanks { scores, seqs, heads, stride, listed, out };
    let short = counts.slice(0, 3);
    let with = |listed| UnionRanks { listed, ..p() };
    rig.refuses("short counts", dev.union_ranks(&with(Among { counts: &short, ..listed })))?;
    rig.refuses("k beyond indices", dev.union_ranks(&with(Among { k: 17, ..listed })))?;
    rig.refuses("no ranks", dev.union_ranks(&with(Among { k: 0, ..listed })))?;
    rig.refuses("too many ranks", dev.union_ranks(&with(Among { k: 1 << 22, ..listed })))?;
    rig.refuses("no heads", dev.union_ranks(&UnionRanks { heads: 0, ..p() }))?;
    rig.refuses("odd stride", dev.union_ranks(&UnionRanks { stride: stride + 1, ..p() }))?;
    rig.refuses("short out", dev.union_ranks(&UnionRanks { out: &out.slice(0, 64), ..p() }))?;
    rig.refuses("scores over scores", dev.union_ranks(&UnionRanks { out: scores, ..p() }))?;
    let seqs = Seqs { max_q: 2, ..seqs };
    rig.refuses("prefill", dev.union_ranks(&UnionRanks { seqs, ..p() }))
}

fn bad_lists(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[65, 3])?;
    let (rows, k, room, slots) = (2, 8, 10, b.slots);
    let words = |n: usize| vec![0; n];
    let chosen = rig.words(&words(2 * rows * k))?;
    let chosen_counts = rig.words(&words(2 * rows))?;
    let held = rig.words(&words(slots * rows * k))?;
    let marks = rig.words(&words(slots * rows * HELD_WORDS))?;
    let indices = rig.words(&words(2 * rows * room))?;
    let counts = rig.words(&words(2 * rows))?;
    let floats = rig.zeros(DType::F32, 2 * rows * room)?;
    let p = || HoldLists {
        chosen: &chosen,
        chosen_counts: &chosen_counts,
        seqs: b.seqs(),
        fresh: 2,
        rows_per_seq: rows,
        k,
        held: &held,
        marks: &marks,
        slots,
        room,
        indices: &indices,
        counts: &counts,
    };
    rig.refuses("less room than tokens", dev.hold_lists(&HoldLists { room: 7, ..p() }))?;
    rig.refuses("no tokens", dev.hold_lists(&HoldLists { k: 0, ..p() }))?;
    rig.refuses("3 of 2 are fresh", dev.hold_lists(&HoldLists { fresh: 3, ..p() }))?;
    rig.refuses("more slots", dev.hold_lists(&HoldLists { slots: slots + 1, ..p() }))?;
    rig.refuses("more room", dev.hold_lists(&HoldLists { room: 11, ..p() }))?;
    rig.refuses("more rows", dev.hold_lists(&HoldLists { rows_per_seq: 3, ..p() }))?;
    rig.refuses("f32 lists", dev.hold_lists(&HoldLists { indices: &floats, ..p() }))?;
    rig.refuses("lists over lists", dev.hold_lists(&HoldLists { indices: &held, ..p() }))?;
    let seqs = Seqs { max_q: 2, ..b.seqs() };
    rig.refuses("prefill", dev.hold_lists(&HoldLists { seqs, ..p() }))
}
