//! NOSA: content importance and the choice of blocks in two stages, op by op and in a whole tiny model, on every backend
//! under test, against the formulas in f64 (`common/nosa.rs`).

mod common;

use common::cache::{Data, Heads, Layer, backends, upload};
use common::forecast;
use common::model::{Model, nmse, on_both, prompt};
use common::nosa::{Choice, Reference, dot, importance, means, softmax, tokens_of, two_stages};
use common::select::{mean_queries, select};
use common::tiny::Tiny;
use longsight::backend::reference::floats;
use longsight::backend::{Backend, ContentBias, DType, PAGE};
use longsight::engine::{Engine, WantLogits};
use longsight::model::{Checkpoint, LayerWeight, ModelError, Quant, Weight};
use longsight::select::{MethodSpec, Query, Variant};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::sync::Arc;

const LAYERS: usize = 3;
const SEED: u64 = 3;
const CONTEXT: usize = 448;
/// Of these the last `STEPS` are decoded.
const TOKENS: usize = 400;
const STEPS: usize = 20;
/// Of seven blocks five: the first, the last two, one by the query, one by importance.
const CHOICE: Choice = Choice { total: 5, by_query: 4, sinks: 64, recent: 65 };

fn spec() -> MethodSpec {
    MethodSpec {
        budget: Some(64 * CHOICE.total),
        by_query: Some(64 * CHOICE.by_query),
        sinks: Some(CHOICE.sinks),
        recent: Some(CHOICE.recent),
        dense_layers: Some(0),
        dense_below: Some(0),
        ..Variant::Nosa.into()
    }
}

fn text() -> Vec<u32> {
    prompt(17, TOKENS as u32)
}

fn engine(model: &Model, dev: &Arc<dyn Backend>, spec: &MethodSpec, dtype: DType) -> Engine {
    model.builder(dev, spec).dtype(dtype).context(CONTEXT).chunk(96).build().unwrap()
}

/// Logits of every row of a prompt, and of the decode steps after it.
fn logits(engine: &mut Engine, text: &[u32], steps: usize) -> Vec<f32> {
    let seq = engine.open_sequence().unwrap();
    let (prompt, rest) = text.split_at(text.len() - steps);
    let mut all = Vec::new();
    let each = |_: usize, l: &[f32]| all.extend_from_slice(l);
    engine.prefill(seq, prompt, WantLogits::All, each, |_| true).unwrap();
    rest.iter().for_each(|t| all.extend(engine.decode(seq, *t).unwrap()));
    engine.close(seq);
    all
}

/// As in the table of methods: one rounding of keys and values that goes the other way.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-10,
        DType::F16 => 2e-7,
        _ => 1.3e-5,
    }
}

#[test]
fn a_whole_model_computes_what_the_formulas_say() {
    let tiny = Tiny::nosa(SEED, LAYERS);
    let model = Model::of(&tiny);
    // The one that the model's folder has.
    let matrices = forecast::random(&tiny.config, 11);
    let text = text();
    let all = [Query::Own, Query::Forecast].map(|q| [(q, None), (q, Some(1))]).concat();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        // In 16 bits one of each.
        let some: Vec<_> = all.iter().step_by(if dtype == DType::F32 { 1 } else { 3 }).collect();
        for &(query, tile) in some {
            let forecast = (query == Query::Forecast).then_some(&matrices);
            let reference = Reference { tiny: &tiny, dtype, forecast };
            let dense =
                |i: usize| i + 1 <= 64 * CHOICE.total || tile.is_none() && i < TOKENS - STEPS;
            let want = reference.read(&text, |i| (!dense(i)).then_some(CHOICE));
            let exact: Vec<f32> = want.logits.iter().map(|x| *x as f32).collect();
            let spec = MethodSpec { query: Some(query), tile, ..spec() };
            // What a choice by the query alone would give.
            let alone = Choice { by_query: CHOICE.total, ..CHOICE };
            let other = reference.read(&text, |i| (!dense(i)).then_some(alone));
            let other: Vec<f32> = other.logits.iter().map(|x| *x as f32).collect();
            for dev in backends() {
                let what = format!("{dtype}, {query:?}, tile {tile:?} on {}", dev.name());
                let mut engine = engine(&model, &dev, &spec, dtype);
                let got = logits(&mut engine, &text, STEPS);
                let far = nmse(&got, &exact);
                assert!(far <= tolerance(dtype), "{what}: {far:e}");
                // The decode steps by themselves, where most rows of the prompt are dense.
                let last = exact.len() / TOKENS * STEPS;
                let tail = |x: &[f32]| x[x.len() - last..].to_vec();
                let far = nmse(&tail(&got), &tail(&exact));
                assert!(far <= tolerance(dtype), "{what}, decode steps: {far:e}");
                assert!(nmse(&tail(&other), &tail(&exact)) > 10.0 * tolerance(dtype), "{what}");
            }
        }
    }
}

/// The lists of every layer and decode step are those of the formulas, token by token.
#[test]
fn a_whole_model_sees_the_tokens_that_the_formulas_choose() {
    let tiny = Tiny::nosa(SEED, LAYERS);
    let model = Model::of(&tiny);
    let matrices = forecast::random(&tiny.config, 11);
    let text = text();
    for query in [Query::Own, Query::Forecast] {
        let forecast = (query == Query::Forecast).then_some(&matrices);
        let reference = Reference { tiny: &tiny, dtype: DType::F32, forecast };
        let want = reference.read(&text, |i| (i >= TOKENS - STEPS).then_some(CHOICE));
        for dev in backends() {
            let spec = MethodSpec { query: Some(query), ..spec() };
            let mut engine = engine(&model, &dev, &spec, DType::F32);
            engine.set_probe(true);
            logits(&mut engine, &text, STEPS);
            let probes = engine.take_probes();
            assert_eq!(probes.len(), STEPS * LAYERS);
            for (at, probe) in probes.iter().enumerate() {
                let row = TOKENS - STEPS + at / LAYERS;
                let what = format!("{query:?} on {}, row {row}, layer {}", dev.name(), probe.layer);
                assert_eq!(probe.selected, want.seen[probe.layer][row], "{what}");
            }
        }
    }
}

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
        ..spec()
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

#[test]
fn the_order_of_keys_leaves_importance_alone() {
    let model = Model::nosa(2);
    let text = prompt(31, 220);
    for dev in backends() {
        for spec in
            [common::model::sparse(Variant::Nosa, 80), common::model::sparse(Variant::Sparq, 80)]
        {
            let dir = tempfile::tempdir().unwrap();
            let mut plain = model.engine(&dev, &spec);
            let sorted = model.builder(&dev, &spec).calibrate(true).key_order_dir(dir.path());
            let others = [common::model::sparse(Variant::Sparcas, 80)];
            let mut sorted = sorted.summaries_for(&others).build().unwrap();
            let order = |e: &Engine| e.decoder().key_order().pairs.clone();
            assert_ne!(order(&sorted), order(&plain), "nothing was sorted");
            let (a, b) = (logits(&mut plain, &text, 40), logits(&mut sorted, &text, 40));
            assert!(nmse(&a, &b) < 1e-10, "{} on {}: {:e}", spec.name(), dev.name(), nmse(&a, &b));
        }
    }
}

/// Importance changes what a model says, however it attends: its factor set to 0 gives the Llama model of the same weights.
#[test]
fn without_a_factor_it_is_the_llama_model() {
    let mut tiny = Tiny::nosa(SEED, 2);
    let with = Model::of(&tiny);
    for (weight, values) in &mut tiny.weights {
        if matches!(weight, Weight::Layer(_, LayerWeight::ImportanceScale)) {
            values.fill(0.0);
        }
    }
    let without = Model::of(&tiny);
    tiny.config.importance = None;
    tiny.weights.retain(|(w, _)| w.expected_shape(&tiny.config).is_some());
    let llama = Model::of(&tiny);
    let text = prompt(5, 180);
    for dev in backends() {
        for variant in [Variant::Dense, Variant::Infllm2, Variant::Oracle, Variant::Quest] {
            let spec = common::model::sparse(variant, 80);
            let [a, b, c] =
                [&with, &without, &llama].map(|m| logits(&mut m.engine(&dev, &spec), &text, 40));
            let what = format!("{variant:?} on {}", dev.name());
            assert!(nmse(&b, &c) < 1e-10, "{what}: {:e}", nmse(&b, &c));
            assert!(nmse(&a, &c) > 1e-3, "{what}: importance changes nothing");
        }
    }
}

#[test]
fn only_models_with_importance_choose_by_it() {
    for (model, dev) in on_both(1) {
        let built = model.builder(&dev, &spec()).context(CONTEXT).build();
        match (model.kind(), built) {
            ("nosa", Ok(engine)) => assert_eq!(engine.plan().method, "nosa"),
            ("llama", Err(e)) => {
                let said = e.to_string();
                assert!(
                    said.contains("only NOSA models have") && said.contains("infllm2"),
                    "{said}"
                );
            }
            (kind, built) => {
                panic!("{kind}: {:?}", built.map(|_| "built").map_err(|e| e.to_string()))
            }
        }
    }
}

/// A folder as published says nothing of importance but by its tensors; what it says of blocks is read.
#[test]
fn folders_are_read_by_their_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::nosa(SEED, 2);
    let config = dir.path().join("config.json");
    let write = |tiny: &Tiny, shards: usize, edit: &dyn Fn(&mut Value)| {
        tiny.write_hf(dir.path(), Quant::BF16, shards);
        let mut json: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        edit(&mut json);
        std::fs::write(&config, json.to_string()).unwrap();
    };
    let opened = |tiny: &Tiny, edit: &dyn Fn(&mut Value)| {
        write(tiny, 1, edit);
        Checkpoint::open(dir.path())
    };
    let said = |tiny: &Tiny, edit: &dyn Fn(&mut Value)| match opened(tiny, edit) {
        Err(e) => e.to_string(),
        Ok(_) => panic!("opened"),
    };
    let same = |_: &mut Value| ();
    let silent = |json: &mut Value| json["sparse_config"] = Value::Null;

    let own = opened(&tiny, &same).unwrap();
    assert_eq!(own.config().importance, tiny.config.importance);
    let delta = Weight::Layer(1, LayerWeight::Importance);
    assert_eq!(own.shape(delta).unwrap(), [2, 32]);
    let published = opened(&tiny, &silent).unwrap();
    assert_eq!(published.config().importance, Some(Default::default()));
    assert_ne!(own.fingerprint(), published.fingerprint());
    write(&tiny, 3, &silent);
    let _ = std::fs::remove_file(dir.path().join("model.safetensors"));
    assert!(Checkpoint::open(dir.path()).unwrap().has(delta), "in three files");

    for (layer, weight, name) in [
        (0, LayerWeight::ImportanceScale, "model.layers.0.self_attn.A"),
        (1, LayerWeight::Importance, "model.layers.1.self_attn.delta.weight"),
    ] {
        let mut some = Tiny::nosa(SEED, 2);
        some.weights.retain(|(w, _)| *w != Weight::Layer(layer, weight));
        for edit in [&same as &dyn Fn(&mut Value), &silent] {
            match opened(&some, edit) {
                Err(ModelError::MissingTensor { name: n, .. }) => assert_eq!(n, name),
                other => panic!("{name}: {:?}", other.map(|_| "opened")),
            }
        }
    }
    let none = Tiny::deep(longsight::model::Arch::Llama, false, SEED, 2);
    let blocks = json!({"select_blocks": 24});
    let promised = said(&none, &|json| json["sparse_config"] = blocks.clone());
    assert!(promised.contains("model.layers.0.self_attn."), "{promised}");

    let with = |key: &'static str, value: Value| {
        said(&tiny, &move |json| json["sparse_config"][key] = value.clone())
    };
    assert!(with("kernel_size", json!(64)).contains("kernel_size of 64"));
    assert!(with("use_nope", json!(true)).contains("without rotary embedding"));
    assert!(with("select_blocks", json!(1000)).contains("1002 of 5 blocks"));
    assert!(with("topk", json!(-4)).contains("topk"));
    assert!(with("window_size", json!(u64::MAX)).contains("blocks"));
    let biased = said(&tiny, &|json| json["attention_bias"] = json!(true));
    assert!(biased.contains("attention biases"), "{biased}");
}
