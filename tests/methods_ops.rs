//! What a sparse method must satisfy, op by op, on every backend under test: the cpu, and those that
//! `LONGSIGHT_REQUIRE` lists. Repeated runs of a whole model are in `methods_engine.rs`.
//!
//! The lists of single methods are compared with formulas in `methods_blocks.rs` and `methods_neighbours.rs`.

mod common;

use HeadPool::{MaxLogit, MaxSoftmax, MeanSoftmax, SumLogit};
use common::cache::{Data, Heads, Layer, Rule, backends, upload};
use common::dims::Dims;
use common::select::select;
use longsight::backend::reference::{floats, words};
use longsight::backend::{Backend, DType, DimMetric, HeadPool, LogitScale, Rope, ScoreSource};
use longsight::select::{METHODS, MethodSpec, ModelShape, Scorer, TrainedBlocks, Variant};
use std::sync::Arc;

const HEADS: Heads = Heads { query: 4, kv: 2, dim: 32 };
const TOKENS: usize = 200;
const POOLS: [HeadPool; 5] = [SumLogit, MaxLogit, MaxSoftmax, MeanSoftmax, HeadPool::None];
/// Metrics and the units they choose.
const METRICS: [(DimMetric, usize); 4] =
    [(DimMetric::AbsQ, 1), (DimMetric::PairNorm, 2), (DimMetric::AbsQk, 1), (DimMetric::PairQk, 2)];

fn rule(pool: HeadPool, k: usize) -> Rule {
    Rule { pool, scale: LogitScale::Coverage, k, forced: None }
}

/// The `k` largest scores as ascending indices, ties to the smaller index.
fn top(scores: &[f64], k: usize) -> Vec<u32> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let mut list: Vec<u32> = order[..k].iter().map(|j| *j as u32).collect();
    list.sort_unstable();
    list
}

fn assert_close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance, "{what}: element {i} is {g} instead of {w}");
    }
}

#[test]
fn all_dimensions_give_exact_logits_and_the_true_top_k() {
    let data = Data::random(1, HEADS, TOKENS);
    for dev in backends() {
        let l = Layer::filled(&dev, &data, 16);
        let d = Dims::new(&l, HEADS.dim);
        d.choose(&l, DimMetric::AbsQ, 1);
        let n = HEADS.dim;
        let sources = [
            ScoreSource::Lead { n },
            ScoreSource::Gather { dims: &d.dims, n },
            ScoreSource::Slice(d.slice()),
        ];
        for source in sources {
            for scale in [LogitScale::Coverage, LogitScale::InvSqrtDim] {
                let r = Rule { scale, ..rule(HeadPool::None, 20) };
                let scores = floats(&*dev, &l.scores(source, r)).unwrap();
                let picked = l.pick(source, r);
                for h in 0..HEADS.query {
                    let exact = data.logits(h);
                    let got = &scores[h * l.capacity..][..TOKENS];
                    assert_close(got, &exact, 1e-5, dev.name());
                    assert_eq!(picked.lists[h], top(&exact, 20), "{} head {h}", dev.name());
                }
            }
        }
    }
}

#[test]
fn a_budget_of_all_tokens_gives_dense_attention() {
    let data = Data::random(2, HEADS, TOKENS);
    let all: Vec<u32> = (0..TOKENS as u32).collect();
    for dev in backends() {
        let l = Layer::filled(&dev, &data, HEADS.dim);
        let dense = l.attend_dense();
        for m in METHODS.iter().filter(|m| m.variant != Variant::Dense) {
            let spec = |budget| MethodSpec {
                budget: Some(budget),
                dims: Some(8),
                dense_layers: Some(0),
                dense_below: Some(0),
                ..m.variant.into()
            };
            let what = format!("{} on {}", m.name, dev.name());
            let picked = select(&l, &data.q, &spec(256));
            assert!(picked.lists.iter().all(|list| *list == all), "{what}");
            assert_close(&l.attend(&picked), &dense, 1e-5, &what);
            // The comparison can fail: fewer tokens give fewer tokens and another output.
            let fewer = select(&l, &data.q, &spec(80));
            // Lists of blocks may end with the last, shorter block of the text.
            let Heads { query: heads, kv: kv_heads, dim: head_dim } = HEADS;
            let model = ModelShape {
                model: "m",
                windows: &[None],
                heads,
                kv_heads,
                head_dim,
                importance: Some(TrainedBlocks::default()),
            };
            let least = match spec(80).plan(&model, 4096).unwrap().layers[0].scorer {
                Scorer::Blocks { unit, .. } => fewer.k - unit + 1,
                _ => 80,
            };
            let full = |list: &Vec<u32>| (least..=fewer.k).contains(&list.len());
            assert!(fewer.lists.iter().all(full), "{what}");
            let far = l.attend(&fewer).iter().zip(&dense).any(|(a, b)| (a - b).abs() > 1e-3);
            assert!(far, "{what}: 80 of {TOKENS} tokens are as good as all");
        }
    }
}

/// `data` with the dimensions of KV head `h`, and of its query heads, in the order `order[h]`.
fn reordered(data: &Data, order: &[Vec<usize>]) -> Data {
    let row = |x: &[f32], group: usize| -> Vec<f32> {
        let heads = x.chunks_exact(data.heads.dim).enumerate();
        heads.flat_map(|(h, x)| order[h / group].iter().map(move |i| x[*i])).collect()
    };
    Data {
        k: data.k.iter().map(|x| row(x, 1)).collect(),
        q: row(&data.q, data.heads.group()),
        ..data.clone()
    }
}

#[test]
fn slice_gather_and_sorted_layouts_pick_the_same_tokens() {
    let data = Data::random(3, HEADS, TOKENS);
    let n = 16;
    for dev in backends() {
        let mut l = Layer::filled(&dev, &data, HEADS.dim);
        // Kept from step to step: its columns are replaced.
        let kept = Dims::new(&l, n);
        for step in 0..3 {
            let data = data.with_query(30 + step);
            l.q = upload(&*dev, &data.q);
            let fresh = Dims::new(&l, n);
            for d in [&kept, &fresh] {
                d.choose(&l, DimMetric::AbsQ, 1);
            }
            let order: Vec<Vec<usize>> = fresh.lists(&l).iter().map(|d| leading(d)).collect();
            let sorted = Layer::filled(&dev, &reordered(&data, &order), n);
            for pool in POOLS {
                let r = rule(pool, 24);
                let slice = l.pick(ScoreSource::Slice(kept.slice()), r).lists;
                let gather = l.pick(ScoreSource::Gather { dims: &fresh.dims, n }, r).lists;
                let lead = sorted.pick(ScoreSource::Lead { n }, r).lists;
                assert_eq!(slice, gather, "{} {pool:?} step {step}", dev.name());
                assert_eq!(slice, lead, "{} {pool:?} step {step}", dev.name());
            }
        }
    }
}

/// The chosen dimensions, then the others.
fn leading(chosen: &[u32]) -> Vec<usize> {
    let others = (0..HEADS.dim).filter(|i| !chosen.contains(&(*i as u32)));
    chosen.iter().map(|i| *i as usize).chain(others).collect()
}

/// Rotates `data`'s query to `position` into the layer's query.
fn rotate(l: &Layer, data: &Data, position: u32) {
    let half = HEADS.dim / 2;
    let freq: Vec<f32> = (0..half).map(|p| 10_000f32.powf(-(p as f32) / half as f32)).collect();
    let inv_freq = upload(&*l.dev, &freq.repeat(HEADS.kv));
    let x = upload(&*l.dev, &data.q);
    let positions = l.alloc(DType::U32, 1);
    l.dev.upload(&positions, &position.to_le_bytes()).unwrap();
    let p = Rope {
        x: &x,
        x_stride: HEADS.query * HEADS.dim,
        positions: &positions,
        inv_freq: &inv_freq,
        heads_per_freq: HEADS.group(),
        norm: None,
        factor: 1.0,
        out: &l.q,
        rows: 1,
        heads: HEADS.query,
        head_dim: HEADS.dim,
    };
    l.dev.rope(&p).unwrap();
}

#[test]
fn pair_metrics_choose_the_same_dimensions_at_any_position() {
    let data = Data::random(4, HEADS, TOKENS);
    for dev in backends() {
        let l = Layer::filled(&dev, &data, HEADS.dim);
        for (metric, unit) in METRICS {
            let sets: Vec<_> = [0, 1, 7, 100, 3001, 20_000]
                .map(|position| {
                    rotate(&l, &data, position);
                    let d = Dims::new(&l, 16);
                    d.choose(&l, metric, unit);
                    d.lists(&l)
                })
                .into();
            let same = sets.iter().all(|s| *s == sets[0]);
            // Single coordinates do depend on the phase.
            assert_eq!(same, unit == 2, "{} {metric:?}: {sets:?}", dev.name());
        }
    }
}

#[test]
fn a_group_of_one_is_plain_heads_and_equal_heads_count_as_one() {
    let plain = Data::random(5, Heads { query: 2, kv: 2, dim: 32 }, TOKENS);
    let copies = 4;
    let doubled = Data {
        heads: Heads { query: 2 * copies, ..plain.heads },
        q: plain.q.chunks_exact(32).flat_map(|q| q.repeat(copies)).collect(),
        ..plain.clone()
    };
    for dev in backends() {
        let (one, many) = (Layer::filled(&dev, &plain, 32), Layer::filled(&dev, &doubled, 32));
        for (metric, unit) in METRICS {
            let (d1, d4) = (Dims::new(&one, 16), Dims::new(&many, 16));
            d1.choose(&one, metric, unit);
            d4.choose(&many, metric, unit);
            assert_eq!(d1.lists(&one), d4.lists(&many), "{} {metric:?}", dev.name());
            let per_head = one.pick(ScoreSource::Slice(d1.slice()), rule(HeadPool::None, 24)).lists;
            for pool in POOLS {
                let what = format!("{} {metric:?} {pool:?}", dev.name());
                let alone = one.pick(ScoreSource::Slice(d1.slice()), rule(pool, 24)).lists;
                assert_eq!(alone, per_head, "{what}: a group of one");
                let pooled = many.pick(ScoreSource::Slice(d4.slice()), rule(pool, 24)).lists;
                let repeat = pooled.len() / per_head.len();
                for (i, list) in pooled.iter().enumerate() {
                    assert_eq!(*list, per_head[i / repeat], "{what}: list {i}");
                }
            }
        }
    }
}

#[test]
fn permuting_tokens_permutes_the_selection() {
    let data = Data::random(6, HEADS, TOKENS);
    // 77 and 200 have no common factor: every token once.
    let order: Vec<usize> = (0..TOKENS).map(|i| (i * 77 + 13) % TOKENS).collect();
    let moved = data.tokens(&order);
    for dev in backends() {
        let (a, b) = (Layer::filled(&dev, &data, 16), Layer::filled(&dev, &moved, 16));
        for pool in POOLS {
            let what = format!("{} {pool:?}", dev.name());
            let r = rule(pool, 24);
            let here = a.pick(ScoreSource::Lead { n: 16 }, r);
            let there = b.pick(ScoreSource::Lead { n: 16 }, r);
            assert_ne!(here.lists, there.lists, "{what}");
            for (list, other) in here.lists.iter().zip(&there.lists) {
                let mut back: Vec<u32> = other.iter().map(|i| order[*i as usize] as u32).collect();
                back.sort_unstable();
                assert_eq!(back, *list, "{what}");
            }
            assert_close(&a.attend(&here), &b.attend(&there), 1e-5, &what);
        }
    }
}

#[test]
fn appending_to_the_slice_equals_building_it_from_scratch() {
    let data = Data::random(7, HEADS, TOKENS);
    for dev in backends() {
        let mut grown = Layer::empty(&dev, &data, 16);
        let d = Dims::new(&grown, 16);
        grown.append(&data, 0..100, None);
        d.choose(&grown, DimMetric::AbsQ, 1);
        for j in 100..130 {
            grown.append(&data, j..j + 1, Some(d.slice()));
        }
        grown.append(&data, 130..TOKENS, Some(d.slice()));
        let scratch = Layer::filled(&dev, &data, 16);
        let fresh = Dims::new(&scratch, 16);
        fresh.choose(&scratch, DimMetric::AbsQ, 1);
        assert_eq!(d.lists(&grown), fresh.lists(&scratch), "{}", dev.name());
        let want = fresh.values(&scratch, TOKENS);
        assert!(want.iter().all(|x| *x != 0.0), "{}: a row is missing", dev.name());
        assert_eq!(d.values(&grown, TOKENS), want, "{}: appended", dev.name());
        d.mark_all(&grown);
        d.rebuild(&grown);
        assert_eq!(d.values(&grown, TOKENS), want, "{}: appended, then rebuilt", dev.name());
    }
}

#[test]
fn replacing_columns_equals_a_full_rebuild() {
    let data = Data::random(8, HEADS, TOKENS);
    for dev in backends() {
        let mut l = Layer::filled(&dev, &data, 16);
        let d = Dims::new(&l, 16);
        d.choose(&l, DimMetric::PairQk, 2);
        l.q = upload(&*dev, &data.with_query(80).q);
        d.choose(&l, DimMetric::PairQk, 2);
        // Word 3 of the state counts replaced dimensions: some, but not all of them.
        for state in words(&*dev, &d.state).unwrap().chunks_exact(4) {
            assert!((1..16).contains(&state[3]), "{}: {} replaced", dev.name(), state[3]);
        }
        let replaced = d.values(&l, TOKENS);
        let full = Dims::new(&l, 16);
        dev.copy(&d.dims, &full.dims).unwrap();
        full.mark_all(&l);
        full.rebuild(&l);
        assert_eq!(replaced, full.values(&l, TOKENS), "{}", dev.name());
    }
}

#[test]
fn equal_scores_select_the_forced_and_the_first_tokens() {
    // Whole numbers and a scale of 1/8: exact in any order.
    let mut data = Data::random(9, Heads { dim: 64, ..HEADS }, TOKENS);
    data.k.iter_mut().flatten().for_each(|x| *x = 1.0);
    data.q.iter_mut().enumerate().for_each(|(i, x)| *x = (i % 5) as f32 - 1.0);
    let last = TOKENS as u32;
    let want: Vec<u32> = (0..8).chain(last - 4..last).collect();
    for dev in backends() {
        let l = Layer::filled(&dev, &data, 16);
        for pool in POOLS {
            let r = Rule { pool, scale: LogitScale::InvSqrtDim, k: 12, forced: Some((3, 4)) };
            for list in l.pick(ScoreSource::Lead { n: 16 }, r).lists {
                assert_eq!(list, want, "{} {pool:?}", dev.name());
            }
        }
    }
}

#[test]
fn keys_that_are_not_finite_are_never_selected_and_poison_nothing() {
    let clean = Data::random(10, HEADS, TOKENS);
    let bad = [0, 17, 63, 64, 150, TOKENS - 1];
    let mut spoilt = clean.clone();
    for (n, j) in bad.into_iter().enumerate() {
        let x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][n % 3];
        for h in 0..HEADS.kv {
            spoilt.k[j][h * HEADS.dim + 3] = x;
        }
        spoilt.v[j].fill(f32::NAN);
    }
    let good: Vec<usize> = (0..TOKENS).filter(|j| !bad.contains(j)).collect();
    for dev in backends() {
        let l = Layer::filled(&dev, &spoilt, 16);
        let without = Layer::filled(&dev, &clean.tokens(&good), 16);
        for (pool, n) in POOLS.into_iter().flat_map(|p| [(p, 8), (p, HEADS.dim)]) {
            let what = format!("{} {pool:?} on {n} dimensions", dev.name());
            // More than there are good keys: the bad ones are still left out.
            for k in [24, TOKENS] {
                let picked = l.pick(ScoreSource::Lead { n }, rule(pool, k));
                let want = without.pick(ScoreSource::Lead { n }, rule(pool, k));
                for (list, other) in picked.lists.iter().zip(&want.lists) {
                    let other: Vec<u32> = other.iter().map(|i| good[*i as usize] as u32).collect();
                    assert_eq!(*list, other, "{what}");
                }
                assert_close(&l.attend(&picked), &without.attend(&want), 1e-5, &what);
            }
        }
    }
}

/// Dimensions, slice, scores, selection and attention: token lists and output.
fn chain(dev: &Arc<dyn Backend>, data: &Data) -> (Vec<Vec<u32>>, Vec<f64>) {
    let l = Layer::filled(dev, data, 16);
    let d = Dims::new(&l, 16);
    d.choose(&l, DimMetric::PairQk, 2);
    let r = Rule { forced: Some((4, 16)), ..rule(HeadPool::MaxSoftmax, 40) };
    let picked = l.pick(ScoreSource::Slice(d.slice()), r);
    let out = l.attend(&picked);
    (picked.lists, out)
}

#[test]
fn kv_heads_split_over_two_ranks_equal_one_rank() {
    let all = Data::random(11, Heads { query: 8, kv: 4, dim: 32 }, TOKENS);
    for dev in backends() {
        for step in 0..3 {
            let data = all.with_query(110 + step);
            let (lists, out) = chain(&dev, &data);
            let (one, two) = (chain(&dev, &data.shard(0..2)), chain(&dev, &data.shard(2..4)));
            assert_eq!([one.0, two.0].concat(), lists, "{} step {step}", dev.name());
            assert_close(&[one.1, two.1].concat(), &out, 1e-6, dev.name());
        }
    }
}
