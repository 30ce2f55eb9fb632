//! MiniCPM4's scaled residual stream: the same function as a Llama model whose weights carry the scales.

mod common;

use common::cache::backends;
use common::model::{nmse, prompt};
use common::tiny::Tiny;
use longsight::backend::{Backend, DType};
use longsight::engine::{Engine, EngineError, WantLogits};
use longsight::model::{Arch, LayerWeight, Quant, RopeScaling, Scales, Weight};
use longsight::select::Variant;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// As MiniCPM4.1 has them: 12, 1.4 / sqrt(layers), 1 / 16.
const SCALES: Scales = Scales { embedding: 12.0, residual: 0.99, logits: 0.0625 };

fn logits(dir: &Path, device: &Arc<dyn Backend>) -> Vec<f32> {
    logits_within(dir, device, 128)
}

/// Of a prompt, by an engine for texts of up to `context` tokens.
fn logits_within(dir: &Path, device: &Arc<dyn Backend>, context: usize) -> Vec<f32> {
    let mut engine = Engine::builder()
        .model(dir.display().to_string())
        .backend(device.clone())
        .dtype(DType::F32)
        .method(Variant::Dense.into())
        .context(context)
        .calibrate(false)
        .build()
        .unwrap();
    let seq = engine.open_sequence().unwrap();
    let mut all = Vec::new();
    let each = |_: usize, l: &[f32]| all.extend_from_slice(l);
    engine.prefill(seq, &prompt(3, 60), WantLogits::All, each, |_| true).unwrap();
    all
}

#[test]
fn scales_may_as_well_be_in_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    let factors: Vec<f32> = (0..8).map(|i| 1.0 + i as f32 / 4.0).collect();
    let make = |arch, name: &str| {
        let mut tiny = Tiny::new(arch, false, 7);
        tiny.config.rope_scaling = RopeScaling::Factors(factors.clone());
        // Large enough for its share in the norm to show.
        tiny.config.norm_eps = 1e-2;
        (tiny, dir.path().join(name))
    };
    let (mut scaled, scaled_dir) = make(Arch::MiniCpm, "minicpm");
    scaled.config.scales = SCALES;
    scaled.write_hf(&scaled_dir, Quant::F32, 1);
    let (mut plain, plain_dir) = make(Arch::Llama, "llama");
    plain.write_hf(&dir.path().join("unscaled"), Quant::F32, 1);
    for (weight, values) in &mut plain.weights {
        let scale = match weight {
            Weight::Embed => SCALES.embedding,
            Weight::Layer(_, LayerWeight::O | LayerWeight::Down) => SCALES.residual,
            Weight::OutputNorm => SCALES.logits,
            _ => 1.0,
        };
        values.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
    }
    plain.write_hf(&plain_dir, Quant::F32, 1);
    for dev in backends() {
        let [got, want, unscaled] =
            [&scaled_dir, &plain_dir, &dir.path().join("unscaled")].map(|d| logits(d, &dev));
        let far = |x: &[f32]| nmse(x, &want);
        assert!(far(&got) < 1e-10, "{}: {}", dev.name(), far(&got));
        assert!(far(&unscaled) > 1e-2, "{}: the scales change nothing", dev.name());
    }
}

/// LongRoPE by what it is made of: other frequencies, and queries and keys that are larger by a factor, which may as well
/// be in the weights. The context of the engine decides between the frequencies, not the length of a prompt.
#[test]
fn long_contexts_have_frequencies_and_a_factor_of_their_own() {
    const ORIGINAL: usize = 64;
    let dir = tempfile::tempdir().unwrap();
    let short: Vec<f32> = (0..8).map(|i| 1.0 + i as f32 / 8.0).collect();
    let long: Vec<f32> = (0..8).map(|i| 1.0 + i as f32 * 2.0).collect();
    let mut tiny = Tiny::new(Arch::MiniCpm, false, 7);
    tiny.config.scales = SCALES;
    let max = tiny.config.max_context;
    let factor = (1.0 + (max as f64 / ORIGINAL as f64).ln() / (ORIGINAL as f64).ln()).sqrt();
    assert!(factor > 1.2, "{factor}");
    let plain = |name: &str, factors: &[f32]| {
        let mut plain = Tiny { config: tiny.config.clone(), weights: tiny.weights.clone() };
        plain.config.rope_scaling = RopeScaling::Factors(factors.to_vec());
        for (weight, values) in &mut plain.weights {
            if matches!(weight, Weight::Layer(_, LayerWeight::Q | LayerWeight::K)) {
                values.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
            }
        }
        plain.write_hf(&dir.path().join(name), Quant::F32, 1);
        dir.path().join(name)
    };
    let (plain_short, plain_long) = (plain("short", &short), plain("long", &long));
    tiny.config.rope_scaling = RopeScaling::Long {
        short,
        long,
        original_max_position: ORIGINAL,
        attention_factor: factor,
        beyond: false,
    };
    let (hf, gguf) = (dir.path().join("hf"), dir.path().join("tiny.gguf"));
    tiny.write_hf(&hf, Quant::F32, 1);
    tiny.write_gguf(&gguf, Quant::F32);
    for dev in backends() {
        let of = |path: &Path, context| logits_within(path, &dev, context);
        let [within, beyond] = [of(&plain_short, ORIGINAL), of(&plain_long, ORIGINAL + 1)];
        assert!(nmse(&within, &beyond) > 1e-2, "{}: the frequencies are alike", dev.name());
        for path in [&hf, &gguf] {
            let far = [nmse(&of(path, ORIGINAL), &within), nmse(&of(path, ORIGINAL + 1), &beyond)];
            assert!(far.iter().all(|f| *f < 1e-10), "{path:?} on {}: {far:?}", dev.name());
        }
    }
}

#[test]
fn configurations_that_cannot_be_computed_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new(Arch::MiniCpm, true, 7);
    tiny.config.scales = SCALES;
    tiny.config.rope_scaling = RopeScaling::Factors(vec![1.0; 8]);
    tiny.write_hf(dir.path(), Quant::F32, 1);
    let file = dir.path().join("config.json");
    let sound: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let refused = |edit: &dyn Fn(&mut Value)| {
        let mut json = sound.clone();
        edit(&mut json);
        std::fs::write(&file, json.to_string()).unwrap();
        let built = Engine::builder().model(dir.path().display().to_string()).device("cpu").build();
        match built {
            Err(e @ EngineError::Model(_)) => e.to_string(),
            other => panic!("{:?}", other.map(|_| "built")),
        }
    };
    // Written for its original context: no factors for a longer one.
    let long = refused(&|c| {
        c["max_position_embeddings"] = json!(100_000);
        c["rope_scaling"]["long_factor"] = Value::Null;
    });
    assert!(long.contains("no long_factor"), "{long}");
    let wild = refused(&|c| c["rope_scaling"]["attention_factor"] = json!(-1.0));
    assert!(wild.contains("longrope scaling makes no sense"), "{wild}");
    let missing = refused(&|c| c["rope_scaling"]["short_factor"] = Value::Null);
    assert!(missing.contains("short_factor"), "{missing}");
    let few = refused(&|c| c["rope_scaling"]["short_factor"] = json!([1.0, 2.0]));
    assert!(few.contains("2 rotary factors"), "{few}");
    let scale = refused(&|c| c["scale_emb"] = json!(0.0));
    assert!(scale.contains("embedding scale"), "{scale}");
}
