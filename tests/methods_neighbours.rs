//! Neighbours of SparCas (random tokens, SparQ, Double Sparsity, Loki, OmniKV, LessIsMore) and budgets that follow the
//! scores, over one layer of random keys on every backend under test: the lists of their selectors and SparQ's
//! corrected output are those of the formulas, written out here once more in f64.

mod common;

use common::cache::{Data, Heads, Layer, backends};
use common::pick::{best, best_first, ends, in_turns, largest, softmax};
use common::profile;
use common::select::{attend, select};
use longsight::select::{MethodSpec, Variant, noise};

const HEADS: Heads = Heads { query: 6, kv: 2, dim: 32 };
const DIMS: usize = 8;
const LENGTHS: [usize; 5] = [90, 128, 129, 200, 333];

fn spec(variant: Variant, budget: usize) -> MethodSpec {
    MethodSpec {
        budget: Some(budget),
        dims: Some(DIMS),
        dense_layers: Some(0),
        dense_below: Some(0),
        ..variant.into()
    }
}

fn heads_of(kv: usize) -> std::ops::Range<usize> {
    kv * HEADS.group()..(kv + 1) * HEADS.group()
}

fn query(data: &Data, h: usize) -> &[f32] {
    &data.q[h * HEADS.dim..][..HEADS.dim]
}

fn key(data: &Data, j: usize, kv: usize) -> &[f32] {
    &data.k[j][kv * HEADS.dim..][..HEADS.dim]
}

/// The `DIMS` dimensions of the largest importance.
fn dimensions(importance: &[f64]) -> Vec<usize> {
    let list = best(importance, DIMS, |_| false);
    list.into_iter().map(|i| i as usize).collect()
}

/// Partial logits of head `h` on `dims`, with the temperature of their share of `|q|`.
fn partial(data: &Data, h: usize, dims: &[usize]) -> Vec<f64> {
    let q = query(data, h);
    let of = |i: &usize| f64::from(q[*i]).abs();
    let all: f64 = (0..HEADS.dim).map(|i| of(&i)).sum();
    let scale = 1.0 / (HEADS.dim as f64 * dims.iter().map(of).sum::<f64>() / all).sqrt();
    let kv = h / HEADS.group();
    let logit = |j: usize| -> f64 {
        let k = key(data, j, kv);
        scale * dims.iter().map(|&i| f64::from(q[i]) * f64::from(k[i])).sum::<f64>()
    };
    (0..data.k.len()).map(logit).collect()
}

/// Runs `spec` on every backend and compares its lists.
fn expect(data: &Data, spec: &MethodSpec, want: &[Vec<u32>]) {
    for dev in backends() {
        let l = Layer::filled(&dev, data, 16);
        let got = select(&l, &data.q, spec).lists;
        assert_eq!(got, want, "{spec:?}, {} tokens on {}", data.k.len(), dev.name());
    }
}

#[test]
fn random_tokens_are_those_of_the_hash() {
    for n in LENGTHS {
        let data = Data::random(n as u64, HEADS, n);
        let list = |kv| {
            let scores: Vec<f64> = (0..n).map(|j| f64::from(noise(0, 0, kv, j))).collect();
            best(&scores, 60, ends(n, 4, 32))
        };
        let want: Vec<_> = (0..HEADS.kv).map(list).collect();
        assert_ne!(want[0], want[1]);
        expect(&data, &spec(Variant::Random, 60), &want);
        // Neither the query nor the keys have a say.
        let other = Data::random(1000 + n as u64, HEADS, n);
        expect(&other, &spec(Variant::Random, 60), &want);
    }
}

/// SparQ's dimensions for a KV head: the largest sums of `|q|`.
fn sparq_dims(data: &Data, kv: usize) -> Vec<usize> {
    let sum = |i| heads_of(kv).map(|h| f64::from(query(data, h)[i]).abs()).sum();
    dimensions(&(0..HEADS.dim).map(sum).collect::<Vec<f64>>())
}

#[test]
fn sparq_sums_logits_on_the_largest_queries_and_keeps_a_recent_quarter() {
    for n in LENGTHS {
        let data = Data::random(n as u64, HEADS, n);
        let list = |kv| {
            let dims = sparq_dims(&data, kv);
            let rows: Vec<_> = heads_of(kv).map(|h| partial(&data, h, &dims)).collect();
            let scores: Vec<f64> = (0..n).map(|j| rows.iter().map(|r| r[j]).sum()).collect();
            best(&scores, 48, ends(n, 0, 12))
        };
        let want: Vec<_> = (0..HEADS.kv).map(list).collect();
        for correct in [true, false] {
            let spec = MethodSpec { correct: Some(correct), ..spec(Variant::Sparq, 48) };
            expect(&data, &spec, &want);
        }
    }
}

/// Attention over a list, blended with the mean of all values.
fn corrected(data: &Data, h: usize, list: &[u32], estimate: &[f64]) -> Vec<f64> {
    let (n, kv) = (data.k.len(), h / HEADS.group());
    let exact = data.logits(h);
    let p = softmax(&list.iter().map(|j| exact[*j as usize]).collect::<Vec<_>>());
    let value = |j: usize, i: usize| f64::from(data.v[j][kv * HEADS.dim + i]);
    let estimate = softmax(estimate);
    let alpha: f64 = list.iter().map(|j| estimate[*j as usize]).sum();
    let dim = |i: usize| -> f64 {
        let kept: f64 = list.iter().zip(&p).map(|(j, p)| p * value(*j as usize, i)).sum();
        let mean = (0..n).map(|j| value(j, i)).sum::<f64>() / n as f64;
        alpha * kept + (1.0 - alpha) * mean
    };
    (0..HEADS.dim).map(dim).collect()
}

#[test]
fn the_mean_value_stands_for_the_tokens_left_out() {
    use longsight::backend::HeadPool::{MaxSoftmax, None as PerHead, SumLogit};
    for n in LENGTHS {
        let data = Data::random(n as u64, HEADS, n);
        for pool in [SumLogit, MaxSoftmax, PerHead] {
            let spec = MethodSpec { pool: Some(pool), ..spec(Variant::Sparq, 48) };
            let plain = MethodSpec { correct: Some(false), ..spec.clone() };
            for dev in backends() {
                let l = Layer::filled(&dev, &data, 16);
                let (picked, got) = attend(&l, &data.q, &spec);
                let (same, without) = attend(&l, &data.q, &plain);
                assert_eq!(picked.lists, same.lists, "{pool:?}");
                let mut far = 0;
                for h in 0..HEADS.query {
                    let dims = sparq_dims(&data, h / HEADS.group());
                    let list = &picked.lists[h * picked.lists.len() / HEADS.query];
                    let want = corrected(&data, h, list, &partial(&data, h, &dims));
                    for (i, want) in want.iter().enumerate() {
                        let at = h * HEADS.dim + i;
                        let what = format!("{pool:?}, {n} tokens, head {h} on {}", dev.name());
                        assert!((got[at] - want).abs() < 1e-5, "{what}: {} {want}", got[at]);
                        far += usize::from((without[at] - want).abs() > 1e-2);
                    }
                }
                assert!(far > 20, "{pool:?}: the correction changes {far} numbers");
            }
        }
    }
}

#[test]
fn double_sparsity_scores_the_dimensions_of_the_profile() {
    let known = profile::random(1, HEADS.kv, HEADS.dim);
    for n in LENGTHS {
        let data = Data::random(n as u64, HEADS, n);
        let list = |kv: usize| {
            let of_head = &known.importance(0)[kv * HEADS.dim..][..HEADS.dim];
            let dims = dimensions(&of_head.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
            let scores = largest(heads_of(kv).map(|h| partial(&data, h, &dims)));
            best(&scores, 60, ends(n, 4, 32))
        };
        expect(&data, &spec(Variant::DoubleSparsity, 60), &[list(0), list(1)]);
    }
}

/// The chosen dimensions of a key as small integers with one scale, and the dimensions that are.
fn labels(data: &Data, j: usize, kv: usize, dims: &[usize], most: f32) -> Vec<f64> {
    let key: Vec<f32> = dims.iter().map(|i| key(data, j, kv)[*i]).collect();
    let scale = key.iter().fold(0.0, |m: f32, x| m.max(x.abs())) / most;
    key.iter().map(|x| f64::from((x / scale).round_ties_even()) * f64::from(scale)).collect()
}

#[test]
fn double_sparsity_scores_small_integers_where_asked_to() {
    let known = profile::random(1, HEADS.kv, HEADS.dim);
    for (n, (bits, most)) in LENGTHS.into_iter().flat_map(|n| [(n, (4, 7.0)), (n, (8, 127.0))]) {
        let data = Data::random(n as u64, HEADS, n);
        let list = |kv: usize, small: bool| {
            let of_head = &known.importance(0)[kv * HEADS.dim..][..HEADS.dim];
            let dims = dimensions(&of_head.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
            let mut changed = data.clone();
            for j in (0..n).filter(|_| small) {
                let numbers = labels(&data, j, kv, &dims, most);
                for (i, x) in dims.iter().zip(numbers) {
                    changed.k[j][kv * HEADS.dim + i] = x as f32;
                }
            }
            let scores = largest(heads_of(kv).map(|h| partial(&changed, h, &dims)));
            best(&scores, 60, ends(n, 4, 32))
        };
        let slice_bits = Some(bits);
        let spec = MethodSpec { slice_bits, ..spec(Variant::DoubleSparsity, 60) };
        let want = [list(0, true), list(1, true)];
        if bits == 4 && n > 100 {
            assert_ne!(want, [list(0, false), list(1, false)], "{n} tokens");
        }
        expect(&data, &spec, &want);
    }
}

/// Exact where all components are scored: the directions are orthonormal.
#[test]
fn loki_scores_the_leading_components_of_the_profile() {
    let known = profile::random(1, HEADS.kv, HEADS.dim);
    for (n, dims) in LENGTHS.into_iter().flat_map(|n| [(n, DIMS), (n, HEADS.dim)]) {
        let data = Data::random(n as u64, HEADS, n);
        let along = |kv: usize, c: usize, x: &[f32]| -> f64 {
            let row = &known.basis(0)[(kv * HEADS.dim + c) * HEADS.dim..][..HEADS.dim];
            row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let list = |kv: usize| {
            let logits = |h: usize| -> Vec<f64> {
                let logit = |j: usize| -> f64 {
                    let (q, k) = (query(&data, h), key(&data, j, kv));
                    (0..dims).map(|c| along(kv, c, q) * along(kv, c, k)).sum()
                };
                (0..n).map(|j| logit(j) / (HEADS.dim as f64).sqrt()).collect()
            };
            let scores = largest(heads_of(kv).map(logits));
            if dims == HEADS.dim {
                let exact = largest(heads_of(kv).map(|h| data.logits(h)));
                let near = scores.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 1e-6);
                assert!(near, "all components are not the logits");
            }
            best(&scores, 60, ends(n, 4, 32))
        };
        let spec = MethodSpec { dims: Some(dims), ..spec(Variant::Loki, 60) };
        expect(&data, &spec, &[list(0), list(1)]);
    }
}

#[test]
fn filter_layers_take_the_largest_probability_of_any_head() {
    for n in LENGTHS {
        let data = Data::random(n as u64, HEADS, n);
        let scores = largest((0..HEADS.query).map(|h| data.logits(h)));
        expect(&data, &spec(Variant::Omnikv, 48), &[best(&scores, 48, ends(n, 0, 1))]);
        // Of 48: 4 sinks, 8 recent tokens.
        expect(&data, &spec(Variant::Lessismore, 48), &[best(&scores, 48, ends(n, 4, 8))]);
    }
}

#[test]
fn a_union_of_rankings_goes_through_the_heads_in_turn() {
    let union = Some(longsight::backend::HeadPool::Union);
    for n in LENGTHS {
        let mut data = Data::random(n as u64, HEADS, n);
        // Heads are unlike in sharpness, which is where ranks and probabilities differ.
        for (h, q) in data.q.chunks_exact_mut(HEADS.dim).enumerate() {
            q.iter_mut().for_each(|q| *q *= (1 + h) as f32);
        }
        let exact: Vec<_> = (0..HEADS.query).map(|h| data.logits(h)).collect();
        let lessismore = MethodSpec { pool: union, ..spec(Variant::Lessismore, 48) };
        let want = in_turns(&exact, 48, 4, 8);
        assert_ne!(want, best(&largest(exact.iter().cloned()), 48, ends(n, 4, 8)));
        expect(&data, &lessismore, &[want]);
        // Any scorer of an anchor: the leading dimensions of the keys.
        let scorer = Some(longsight::select::AnchorScorer::Sorted);
        let kascade = MethodSpec { pool: union, scorer, ..spec(Variant::Kascade, 40) };
        let dims: Vec<usize> = (0..HEADS.dim / 4).collect();
        let partial: Vec<_> = (0..HEADS.query).map(|h| partial(&data, h, &dims)).collect();
        let kascade = MethodSpec { dims: None, ..kascade };
        expect(&data, &kascade, &[in_turns(&partial, 40, 0, 1)]);
    }
}

/// Scores of SparCas on the leading dimensions, per KV head.
fn sorted_scores(data: &Data) -> Vec<Vec<f64>> {
    let dims: Vec<usize> = (0..DIMS).collect();
    let head = |kv| largest(heads_of(kv).map(|h| partial(data, h, &dims)));
    (0..HEADS.kv).map(head).collect()
}

#[test]
fn a_list_ends_with_its_share_of_the_mass() {
    for n in LENGTHS {
        // Sharper than random numbers are by themselves.
        let mut data = Data::random(n as u64, HEADS, n);
        data.q.iter_mut().for_each(|q| *q *= 4.0);
        let mut lengths = Vec::new();
        for share in [0.3, 0.6, 0.9, 1.0] {
            let list = |scores: Vec<f64>| {
                let order = best_first(&scores);
                let whole: f64 = scores.iter().sum();
                let mut mass = 0.0;
                let reached = order.iter().position(|j| {
                    mass += scores[*j];
                    mass >= share * whole * (1.0 - 1e-7)
                });
                let kept = order[..=reached.unwrap().max(15).min(n - 1)].to_vec();
                let cut: Vec<f64> = (0..n)
                    .map(|j| if kept.contains(&j) { scores[j] } else { f64::NEG_INFINITY })
                    .collect();
                best(&cut, 80, ends(n, 4, 32))
            };
            let want: Vec<_> = sorted_scores(&data).into_iter().map(list).collect();
            lengths.push(want[0].len());
            let spec = MethodSpec { mass: Some(share as f32), ..spec(Variant::Sparcas, 80) };
            expect(&data, &spec, &want);
        }
        assert!(lengths[0] < lengths[2] && lengths[3] == 80, "{lengths:?}");
    }
}

#[test]
fn kv_heads_share_a_budget_by_their_scores() {
    const MEAN: usize = 64;
    for n in LENGTHS {
        let mut data = Data::random(n as u64, HEADS, n);
        // One KV head is flat, the other is sharp.
        let flat = HEADS.group() * HEADS.dim;
        data.q[..flat].iter_mut().for_each(|q| *q *= 0.2);
        data.q[flat..].iter_mut().for_each(|q| *q *= 6.0);
        let forced = ends(n, 4, 32);
        let rows: Vec<Vec<f64>> = sorted_scores(&data)
            .into_iter()
            .map(|row| {
                row.iter().enumerate().map(|(j, s)| if forced(j) { 9.0 } else { *s }).collect()
            })
            .collect();
        let mut spans = Vec::new();
        for floor in [0.6, 0.8, 1.0] {
            let sure = (floor * MEAN as f64) as usize;
            // Each row is sure of its best; the best of the others fill what is left.
            let mut kept: Vec<Vec<usize>> =
                rows.iter().map(|r| best_first(r)[..sure.min(n)].to_vec()).collect();
            let mut rest: Vec<(f64, usize, usize)> = Vec::new();
            for (r, row) in rows.iter().enumerate() {
                rest.extend(best_first(row)[sure.min(n)..].iter().map(|j| (row[*j], r, *j)));
            }
            rest.sort_by(|a, b| b.0.total_cmp(&a.0));
            let room = (HEADS.kv * MEAN).saturating_sub(HEADS.kv * sure);
            rest.iter().take(room).for_each(|(_, r, j)| kept[*r].push(*j));
            let want: Vec<Vec<u32>> = kept
                .into_iter()
                .map(|mut list| {
                    list.sort_unstable();
                    list.into_iter().map(|j| j as u32).collect()
                })
                .collect();
            spans.push(want[0].len().abs_diff(want[1].len()));
            let spec = MethodSpec { floor: Some(floor as f32), ..spec(Variant::Sparcas, MEAN) };
            expect(&data, &spec, &want);
        }
        assert!(spans[0] > 10 && spans[2] == 0, "{spans:?}");
    }
}
