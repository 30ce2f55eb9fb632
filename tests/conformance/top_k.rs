//! top_k: exact sets, ties, values that may not be chosen.

use super::Cases;
use super::batch::Batch;
use super::errors::{WRAPS, short};
use super::rig::{Outcome, Rig};
use longsight::backend::{Among, DType, Force, Seqs, Share, TopK, reference};

/// Changes the scores of one row.
type Edit = fn(&mut [f64]);

fn quantise(v: &mut [f64]) {
    v.iter_mut().for_each(|x| *x = (*x * 2.0).round() / 2.0);
}

fn equal(v: &mut [f64]) {
    v.fill(-1.25);
}

/// Signed zeros are equal: the smaller index wins whatever its sign.
fn zeros(v: &mut [f64]) {
    v.iter_mut().enumerate().for_each(|(i, x)| *x = if i % 3 == 0 { 0.0 } else { -0.0 });
}

fn spoilt(v: &mut [f64]) {
    for (i, x) in v.iter_mut().enumerate() {
        match i % 4 {
            0 => *x = f64::NAN,
            1 => *x = f64::NEG_INFINITY,
            // NaN with the sign bit set.
            2 if i % 8 == 2 => *x = -f64::NAN,
            _ => {}
        }
    }
}

fn hopeless(v: &mut [f64]) {
    v.iter_mut().enumerate().for_each(|(i, x)| {
        *x = if i % 2 == 0 { f64::NAN } else { f64::NEG_INFINITY };
    });
}

/// More +infinity than most k: ties among them too.
fn forced(v: &mut [f64]) {
    v.iter_mut().enumerate().filter(|(i, _)| i % 5 == 1).for_each(|(_, x)| *x = f64::INFINITY);
}

/// Values that share their upper 16 or 24 bits, and denormals.
fn close(v: &mut [f64]) {
    for (i, x) in v.iter_mut().enumerate() {
        let bits = (i as u32).wrapping_mul(2_654_435_761) >> 20;
        *x = f64::from(match i % 3 {
            0 => f32::from_bits(0x3F80_0000 | bits),
            1 => -f32::from_bits(0x3F80_0000 | (bits & 0xFF)),
            _ => f32::from_bits(bits),
        });
    }
}

fn huge(v: &mut [f64]) {
    v.iter_mut().for_each(|x| *x = f64::from((*x * 3e38) as f32).clamp(-3.4e38, 3.4e38));
}

/// The largest are all in a few places, or at the end: what a sample of the row says is wrong.
fn islands(v: &mut [f64]) {
    v.iter_mut().enumerate().filter(|(i, _)| i % 3000 > 2700).for_each(|(_, x)| *x += 20.0);
}
fn rising(v: &mut [f64]) {
    v.iter_mut().enumerate().for_each(|(i, x)| *x += f64::from(i as f32 * 1e-3));
}

/// Probabilities of a softmax that one token has nearly all of: scores over forty orders of magnitude.
fn peaked(v: &mut [f64]) {
    v.iter_mut().for_each(|x| *x = f64::from((12.0 * *x - 40.0).min(0.0).exp() as f32));
}
/// One score far above and some far below the others.
fn outliers(v: &mut [f64]) {
    v.iter_mut().enumerate().for_each(|(i, x)| match i % 5000 {
        7 => *x = 3e30,
        1000..1010 => *x = -3e30,
        _ => {}
    });
}

fn none(_: &mut [f64]) {}

pub fn cases(c: &mut Cases) {
    c.add("top_k", "bad_arguments", |rig, _| bad_arguments(rig));
    let edges: &[usize] = &[1, 63, 64, 65, 200];
    let long: &[usize] = &[1000, 5000];
    let far: &[usize] = &[40_000, 3];
    for (name, kv, rows, edit) in [
        ("random", edges, 3, none as Edit),
        ("random", long, 2, none),
        ("random", far, 1, none),
        ("random", &[70_000], 1, none),
        ("random", &[140_000, 3], 1, none),
        ("random", &[300_000], 1, none),
        ("random", &[9000], 150, none),
        ("coarse", long, 3, quantise),
        ("coarse", far, 1, quantise),
        ("equal", long, 1, equal),
        ("equal", edges, 2, equal),
        ("signed_zeros", long, 2, zeros),
        ("nan_and_minus_inf", long, 2, spoilt),
        ("nothing_to_choose", edges, 1, hopeless),
        ("many_forced", long, 2, forced),
        ("close", long, 2, close),
        ("huge", long, 1, huge),
        // More rows than there are blocks for several each.
        ("random", &[40_000], 70, none),
        ("islands", &[40_000], 70, islands),
        ("rising", &[40_000], 70, rising),
        ("coarse", &[40_000], 70, quantise),
        ("forced", &[40_000], 70, forced),
        ("rising", &[300_000], 1, rising),
        // More candidates than there is room for.
        ("equal", far, 1, equal),
        ("equal", &[300_000], 1, equal),
        ("signed_zeros", far, 1, zeros),
        ("close", far, 1, close),
        ("peaked", far, 2, peaked),
        ("outliers", far, 2, outliers),
    ] {
        for k in [1, 8, 64, 256, 2048, 6000] {
            let longest = kv.iter().max().copied().unwrap_or(0);
            let skewed = matches!(name, "islands" | "rising");
            if k == 2048 && longest < 1000 || k == 6000 && name != "random" && !skewed {
                continue;
            }
            if rows == 70 && k < 256 {
                continue;
            }
            let name = format!("{name}_kv{longest}_rows{rows}_k{k}");
            c.add("top_k", name, move |rig, _| top_k(rig, kv, rows, k, edit));
        }
    }
    for (name, kv, k, edit) in [
        ("random", &[40_000, 15_000], 20_000, none as Edit),
        ("forced", &[40_000, 15_000], 39_999, forced),
        ("random", &[300_000, 15_000], 90_000, none),
    ] {
        let name = format!("{name}_kv{}_rows1_k{k}", kv[0]);
        c.add("top_k", name, move |rig, _| top_k(rig, kv, 1, k, edit));
    }
    // Blocks of tokens, shares of the length, candidates; the batch's stride leaves room behind every row.
    let ragged: &[usize] = &[1, 64, 1000, 40_000];
    for (unit, permille, at_least, k) in
        [(1, 100, 128, 4000), (1, 25, 0, 300), (64, 0, 96, 96), (16, 1000, 0, 3), (3, 0, 7, 40)]
    {
        let name = format!("unit{unit}_permille{permille}_least{at_least}_k{k}");
        let share = Share { permille, at_least };
        c.add("top_k", name, move |rig, _| pick(rig, ragged, 2, k, share, unit, quantise));
    }
    for (room, k) in [(1, 1), (500, 100), (500, 600), (3000, 256)] {
        c.add("top_k", format!("among_{room}_k{k}"), move |rig, _| among(rig, ragged, room, k));
    }
    for (sinks, recent, k) in [(4, 32, 100), (0, 1, 1), (64, 1000, 256), (9000, 1, 50)] {
        for (name, kv) in [("edges", edges), ("long", long), ("far", &[40_000, 300, 100_000])] {
            let name = format!("{name}_sinks{sinks}_recent{recent}_k{k}");
            c.add("force_top_k", name, move |rig, _| force_top_k(rig, kv, (sinks, recent), k));
        }
    }
    c.add("force_top_k", "bad_arguments", |rig, _| forced_badly(rig));
    c.add("top_k", "forced_then_smallest", |rig, _| {
        let b = Batch::decode(rig, &[300, 64, 5])?;
        let (stride, rows_per_seq, k) = (b.stride(), 2, 100);
        let scores = rig.input(DType::F32, &vec![2.5; b.n() * rows_per_seq * stride])?;
        let indices = rig.output(DType::U32, b.n() * rows_per_seq * k)?;
        let counts = rig.output(DType::U32, b.n() * rows_per_seq)?;
        let (seqs, scores) = (b.seqs(), &scores);
        let p = Force { scores, seqs, rows_per_seq, stride, sinks: 4, recent: 16, among: None };
        let outs = reference::force(&p, &*rig.dev)?;
        rig.check(DType::F32, &outs, &|dev| dev.force(&p))?;
        let p = TopK {
            scores,
            seqs,
            rows_per_seq,
            stride,
            k,
            unit: 1,
            share: Share::ALL,
            among: None,
            indices: &indices,
            counts: &counts,
        };
        let mut outs = reference::top_k(&p, &*rig.dev)?;
        // Written out once by hand: sinks and the smallest indices, then the recent ones.
        let want: Vec<f64> = (0..84).chain(284..300).map(f64::from).collect();
        outs[0].cells[..100].iter_mut().zip(want).for_each(|(c, w)| *c = reference::Cell::Is(w));
        rig.check(DType::F32, &outs, &|dev| dev.top_k(&p))
    });
}

fn top_k(rig: &mut Rig, kv: &[usize], rows: usize, k: usize, edit: Edit) -> Outcome {
    pick(rig, kv, rows, k, Share::ALL, 1, edit)
}

/// Rows with a score for every `unit` tokens.
fn pick(
    rig: &mut Rig,
    kv: &[usize],
    rows: usize,
    k: usize,
    share: Share,
    unit: usize,
    edit: Edit,
) -> Outcome {
    let b = Batch::decode(rig, kv)?;
    let stride = b.stride();
    let mut values = b.scores(rig, rows, 1.0);
    for (row, v) in values.chunks_exact_mut(stride).enumerate() {
        edit(&mut v[..b.seqs[row / rows].kv_len]);
    }
    let scores = rig.input(DType::F32, &values)?;
    let indices = rig.output(DType::U32, b.n() * rows * k)?;
    let counts = rig.output(DType::U32, b.n() * rows)?;
    let p = TopK {
        scores: &scores,
        seqs: b.seqs(),
        rows_per_seq: rows,
        stride,
        unit,
        k,
        share,
        among: None,
        indices: &indices,
        counts: &counts,
    };
    let outs = reference::top_k(&p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.top_k(&p))
}

/// Both in one call: the scores with the forced ones in place, and the lists.
fn force_top_k(rig: &mut Rig, kv: &[usize], (sinks, recent): (usize, usize), k: usize) -> Outcome {
    const ROWS: usize = 2;
    let b = Batch::decode(rig, kv)?;
    let (stride, seqs, share) = (b.stride(), b.seqs(), Share { permille: 100, at_least: 60 });
    let values = b.scores(rig, ROWS, 1.0);
    let scores = &rig.input(DType::F32, &values)?;
    let indices = &rig.output(DType::U32, b.n() * ROWS * k)?;
    let counts = &rig.output(DType::U32, b.n() * ROWS)?;
    let (rows_per_seq, unit, among) = (ROWS, 1, None);
    let f = Force { scores, seqs, rows_per_seq, stride, sinks, recent, among };
    let p = TopK { scores, seqs, rows_per_seq, stride, unit, k, share, among, indices, counts };
    let outs = reference::force_top_k(&f, &p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.force_top_k(&f, &p))
}

fn forced_badly(rig: &mut Rig) -> Outcome {
    let b = Batch::decode(rig, &[100, 30])?;
    let (seqs, stride, share, among) = (b.seqs(), b.stride(), Share::ALL, None);
    let scores = &rig.output(DType::F32, b.n() * stride)?;
    let other = &rig.output(DType::F32, b.n() * stride)?;
    let indices = &rig.output(DType::U32, b.n() * 8)?;
    let counts = &rig.output(DType::U32, b.n())?;
    let f = || Force { scores, seqs, rows_per_seq: 1, stride, sinks: 1, recent: 1, among };
    let (rows_per_seq, unit, k) = (1, 1, 8);
    let p = || TopK { scores, seqs, rows_per_seq, stride, unit, k, share, among, indices, counts };
    let dev = rig.dev.clone();
    rig.refuses("other scores", dev.force_top_k(&Force { scores: other, ..f() }, &p()))?;
    let fewer = Seqs { max_kv: 50, ..seqs };
    rig.refuses("other lengths", dev.force_top_k(&Force { seqs: fewer, ..f() }, &p()))?;
    rig.refuses("no recent token", dev.force_top_k(&Force { recent: 0, ..f() }, &p()))?;
    rig.refuses("blocks of tokens", dev.force_top_k(&f(), &TopK { unit: 2, ..p() }))?;
    rig.refuses("no list", dev.force_top_k(&f(), &TopK { k: 0, ..p() }))
}

/// The best `k` of lists of up to `room` candidates; some lists are empty, some claim to be longer than they are.
fn among(rig: &mut Rig, kv: &[usize], room: usize, k: usize) -> Outcome {
    const ROWS: usize = 2;
    let b = Batch::decode(rig, kv)?;
    let stride = room.next_multiple_of(64);
    let (mut listed, mut lengths) = (Vec::new(), Vec::new());
    for row in 0..b.n() * ROWS {
        let gap = row as u32 + 1;
        listed.extend((0..room as u32).map(|i| i * gap + gap));
        lengths.push([room, 0, room / 2 + 1, room + 7][row % 4] as u32);
    }
    let values = rig.normal(b.n() * ROWS * stride, 1.0);
    let (listed, lengths) = (rig.words(&listed)?, rig.words(&lengths)?);
    let scores = rig.input(DType::F32, &values)?;
    let indices = rig.output(DType::U32, b.n() * ROWS * k)?;
    let counts = rig.output(DType::U32, b.n() * ROWS)?;
    let p = TopK {
        scores: &scores,
        seqs: b.seqs(),
        rows_per_seq: ROWS,
        stride,
        unit: 1,
        k,
        share: Share { permille: 500, at_least: 64 },
        among: Some(Among { indices: &listed, counts: &lengths, k: room }),
        indices: &indices,
        counts: &counts,
    };
    let outs = reference::top_k(&p, &*rig.dev)?;
    rig.check(DType::F32, &outs, &|dev| dev.top_k(&p))
}

fn bad_arguments(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[65, 3])?;
    let (stride, k, rows_per_seq) = (b.stride(), 16, 2);
    let scores = rig.zeros(DType::F32, b.n() * rows_per_seq * stride)?;
    let indices = rig.output(DType::U32, b.n() * rows_per_seq * k)?;
    let counts = rig.output(DType::U32, b.n() * rows_per_seq)?;
    let p = || TopK {
        scores: &scores,
        seqs: b.seqs(),
        rows_per_seq,
        stride,
        unit: 1,
        k,
        share: Share::ALL,
        among: None,
        indices: &indices,
        counts: &counts,
    };
    let (listed, lengths) = (&rig.zeros(DType::U32, 4 * 64)?, &rig.zeros(DType::U32, 4)?);
    let among = |k| Some(Among { indices: listed, counts: lengths, k });
    rig.refuses("unit of 0", dev.top_k(&TopK { unit: 0, ..p() }))?;
    rig.refuses("more than all", {
        let share = Share { permille: 1001, at_least: 0 };
        dev.top_k(&TopK { share, ..p() })
    })?;
    rig.refuses("units of candidates", dev.top_k(&TopK { unit: 2, among: among(64), ..p() }))?;
    rig.refuses("short candidates", dev.top_k(&TopK { among: among(65), ..p() }))?;
    rig.refuses("no candidates", dev.top_k(&TopK { among: among(0), ..p() }))?;
    rig.refuses("k of 0", dev.top_k(&TopK { k: 0, ..p() }))?;
    rig.refuses("k beyond indices", dev.top_k(&TopK { k: 17, ..p() }))?;
    rig.refuses("short counts", dev.top_k(&TopK { counts: &short(&counts), ..p() }))?;
    rig.refuses("f32 indices", dev.top_k(&TopK { indices: &scores, ..p() }))?;
    rig.refuses("u32 scores", dev.top_k(&TopK { scores: &indices, ..p() }))?;
    rig.refuses("stride", dev.top_k(&TopK { stride: 64, ..p() }))?;
    rig.refuses("rows", dev.top_k(&TopK { rows_per_seq: 3, ..p() }))?;
    rig.refuses("k that wraps", dev.top_k(&TopK { k: WRAPS, ..p() }))?;
    rig.refuses("counts in indices", dev.top_k(&TopK { counts: &indices, ..p() }))
}
