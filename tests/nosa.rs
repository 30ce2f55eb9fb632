//! NOSA in a whole tiny model, on every backend under test, against the formulas in f64 (`common/nosa.rs`); its folders.
//! Op by op: `nosa_ops.rs`.

mod common;

use common::cache::backends;
use common::forecast;
use common::model::{Model, nmse, on_both, prompt};
use common::nosa::{Choice, Reference};
use common::tiny::Tiny;
use longsight::backend::{Backend, DType};
use longsight::engine::{Engine, WantLogits};
use longsight::model::{Checkpoint, LayerWeight, ModelError, Quant, Weight};
use longsight::select::{MethodSpec, Query, Variant};
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
            let dense = |i: usize| i < 64 * CHOICE.total || tile.is_none() && i < TOKENS - STEPS;
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
