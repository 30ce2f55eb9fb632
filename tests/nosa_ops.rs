//! NOSA op by op, on every backend under test: content importance, the choice of blocks in two stages, and what follows
//! from it, against the formulas in f64 (`common/nosa.rs`). A whole model: `nosa.rs`.

mod common;

use common::cache::{Data, Heads, Layer, backends, upload};
use common::nosa::{Choice, dot, importance, means, tokens_of, two_stages};
use common::pick::softmax;
use common::select::{mean_queries, select};
use longsight::backend::reference::floats;
use longsight::backend::{Backend, ContentBias, PAGE};
use longsight::select::{MethodSpec, Query, Variant};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// Query and key after the op give the logit that they gave before, and the importance: whatever it is, in every dtype.
#[test]
fn logits_grow_by_the_importance() {
    let (rows, heads, kv_heads, d, plain) = (5, 6, 2, 40, 32);
    let width = kv_heads * d;
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let mut numbers = |n: usize, wide: usize, scale: f32| -> Vec<f32> {
        let one =
            |i: usize| if i % d < wide { scale * rng.random_range(-1.0f32..1.0) } else { 0.0 };
        (0..n).map(one).collect()
    };
    let (q, k) = (numbers(rows * heads * d, plain, 1.0), numbers(rows * width, plain, 1.0));
    let (v, delta) = (numbers(rows * width, plain, 1.0), numbers(kv_heads * width, plain, 1.0));
    for scale in [0.01, 1.0, 30.0, 1e4] {
        let delta: Vec<f32> = delta.iter().map(|x| x * scale).collect();
        let a = [0.75, -0.5];
        for dev in backends() {
            let [qs, ks, vs] = [&q, &k, &v].map(|x| upload(&*dev, x));
            let [deltas, factors] = [&delta[..], &a].map(|x| upload(&*dev, x));
            dev.content_bias(&ContentBias {
                v: &vs,
                v_stride: width,
                delta: &deltas,
                a: &factors,
                q: &qs,
                k: &ks,
                rows,
                heads,
                kv_heads,
                head_dim: d,
                at: plain,
            })
            .unwrap();
            let (q_now, k_now) = (floats(&*dev, &qs).unwrap(), floats(&*dev, &ks).unwrap());
            let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<f64>>();
            for row in 0..rows {
                for h in 0..heads {
                    let m = h / (heads / kv_heads);
                    let (q_at, k_at) = ((row * heads + h) * d, (row * kv_heads + m) * d);
                    let x =
                        dot(&wide(&delta[m * width..][..width]), &wide(&v[row * width..][..width]));
                    let want = importance(f64::from(a[m]), x);
                    let before = dot(&wide(&q[q_at..][..d]), &wide(&k[k_at..][..d]));
                    let after = dot(&q_now[q_at..][..d], &k_now[k_at..][..d]);
                    let grown = (after - before) / (d as f64).sqrt();
                    let error = (grown - want).abs();
                    assert!(
                        want.is_finite() && error <= 1e-5 * want.abs().max(0.1),
                        "{scale} on {}: {grown} instead of {want}",
                        dev.name()
                    );
                }
            }
        }
    }
}

const HEADS: Heads = Heads { query: 6, kv: 2, dim: 40 };
const PLAIN: usize = 32;

/// Random keys with an importance, and a query that knows it.
fn data(seed: u64, tokens: usize, scale: f32) -> Data {
    let mut data = Data::random(seed, HEADS, tokens);
    for k in &mut data.k {
        for head in k.chunks_exact_mut(HEADS.dim) {
            let cis = scale * head[PLAIN];
            head[PLAIN..].fill(0.0);
            head[PLAIN..PLAIN + 2].fill(cis);
        }
    }
    with_units(&mut data.q);
    data
}

fn with_units(q: &mut [f32]) {
    let whole = (HEADS.dim as f64).sqrt();
    for head in q.chunks_exact_mut(HEADS.dim) {
        head[PLAIN..].fill(0.0);
        head[PLAIN] = whole as f32;
        head[PLAIN + 1] = (whole - f64::from(whole as f32)) as f32;
    }
}

fn layer(dev: &Arc<dyn Backend>, data: &Data) -> Layer {
    let mut l = Layer::filled(dev, data, HEADS.dim);
    l.plain_dim = PLAIN;
    l
}

fn choice_spec(c: Choice, query: Query) -> MethodSpec {
    MethodSpec {
        budget: Some(64 * c.total),
        by_query: Some(64 * c.by_query),
        sinks: Some(c.sinks),
        recent: Some(c.recent),
        query: Some(query),
        dense_layers: Some(0),
        dense_below: Some(0),
        ..Variant::Nosa.into()
    }
}

/// Both stages of a KV head by brute force.
fn stages(data: &Data, m: usize, query: Query, c: Choice) -> [Vec<usize>; 2] {
    let (n, d) = (data.k.len(), HEADS.dim);
    let rows: Vec<Vec<f64>> =
        data.k.iter().map(|k| k[m * d..][..d].iter().copied().map(f64::from).collect()).collect();
    let pooled = means(n, |j| &rows[j]);
    let cis: Vec<f64> = pooled.iter().map(|k| k[PLAIN]).collect();
    let logits = |q: &[f32]| -> Vec<f64> {
        let q: Vec<f64> = q[..PLAIN].iter().copied().map(f64::from).collect();
        pooled.iter().map(|k| dot(&q, &k[..PLAIN])).collect()
    };
    let scores = match query {
        Query::Forecast => logits(&mean_queries(&data.q, HEADS.kv, d)[m * d..][..d]),
        Query::Own => {
            let mut sum = vec![0.0; pooled.len()];
            for h in m * HEADS.group()..(m + 1) * HEADS.group() {
                let scaled: Vec<f64> =
                    logits(&data.q[h * d..][..d]).iter().map(|s| s / (d as f64).sqrt()).collect();
                sum.iter_mut().zip(softmax(&scaled)).for_each(|(s, p)| *s += p);
            }
            sum
        }
    };
    two_stages(&scores, &cis, n, c)
}

#[test]
fn blocks_are_those_of_both_stages() {
    let mut differ = 0;
    for n in [66, 128, 129, 320, 333, 640, 1000] {
        let data = data(n as u64, n, 1.0);
        for query in [Query::Own, Query::Forecast] {
            for (total, by_query, sinks, recent) in [
                (1, 1, 0, 1),
                (2, 1, 0, 1),
                (4, 3, 64, 65),
                (5, 2, 0, 65),
                (6, 4, 64, 1),
                (96, 41, 64, 1025),
            ] {
                let c = Choice { total, by_query, sinks, recent };
                let want: Vec<_> = (0..HEADS.kv).map(|m| stages(&data, m, query, c)).collect();
                let alone = Choice { by_query: total, ..c };
                differ += usize::from(
                    (0..HEADS.kv).any(|m| stages(&data, m, query, alone)[1] != want[m][1]),
                );
                let want: Vec<_> = want.iter().map(|[_, all]| tokens_of(all, n)).collect();
                for dev in backends() {
                    let got = select(&layer(&dev, &data), &data.q, &choice_spec(c, query)).lists;
                    assert_eq!(got, want, "{query:?}, {c:?} of {n} tokens on {}", dev.name());
                }
            }
        }
    }
    assert!(differ > 20, "importance decided in {differ} cases");
}

/// Where the query chooses every block, and tokens have no importance, this is InfLLM-V2 (and SparDA).
#[test]
fn without_importance_blocks_are_those_of_infllm() {
    for n in [129, 333, 1000] {
        let data = data(n as u64, n, 0.0);
        for (total, sinks, recent) in [(2, 0, 1), (4, 64, 65), (7, 64, 129)] {
            for (query, variant) in
                [(Query::Own, Variant::Infllm2), (Query::Forecast, Variant::Sparda)]
            {
                let own = choice_spec(Choice { total, by_query: total, sinks, recent }, query);
                let other = MethodSpec { variant, ..own.clone() };
                for dev in backends() {
                    let l = layer(&dev, &data);
                    let [a, b] = [&own, &other].map(|spec| select(&l, &data.q, spec).lists);
                    assert_eq!(a, b, "{variant:?}, {total} of {n} tokens on {}", dev.name());
                }
            }
        }
    }
}

/// The paper's guarantee: with `k_e` of `k` blocks chosen regardless of the query, at least `k_e / k` of the blocks of one
/// step are those of the next, whatever the queries are and although the text grows into new blocks.
#[test]
fn steps_share_what_no_query_chooses() {
    const FIRST: usize = 700;
    let c = Choice { total: 8, by_query: 4, sinks: 64, recent: 65 };
    for dev in backends() {
        for query in [Query::Own, Query::Forecast] {
            let all = data(5, FIRST + 150, 1.0);
            let mut l = Layer::empty(&dev, &all, HEADS.dim);
            l.plain_dim = PLAIN;
            l.append(&all, 0..FIRST, None);
            let (mut before, mut least, mut changed): (Option<Vec<Vec<u32>>>, _, _) =
                (None, c.total, 0);
            for n in FIRST + 1..=all.k.len() {
                l.append(&all, n - 1..n, None);
                // Nothing in common with the query of the step before.
                let mut q = all.with_query(n as u64).q;
                with_units(&mut q);
                l.q = upload(&*dev, &q);
                let lists = select(&l, &q, &choice_spec(c, query)).lists;
                let blocks = |list: &Vec<u32>| -> Vec<u32> {
                    let mut all: Vec<u32> = list.iter().map(|j| j / PAGE as u32).collect();
                    all.dedup();
                    all
                };
                let now: Vec<Vec<u32>> = lists.iter().map(blocks).collect();
                assert!(now.iter().all(|b| b.len() == c.total));
                for (old, new) in before.iter().flatten().zip(&now) {
                    let shared = new.iter().filter(|b| old.contains(b)).count();
                    least = least.min(shared);
                    changed += usize::from(shared < c.total);
                }
                before = Some(now);
            }
            let sure = c.total - c.by_query;
            assert!(
                least >= sure,
                "{query:?} on {}: {least} of {} blocks stay",
                dev.name(),
                c.total
            );
            assert!(changed > 50, "{query:?} on {}: choices hardly change", dev.name());
        }
    }
}
