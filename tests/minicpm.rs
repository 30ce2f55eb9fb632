//! MiniCPM4's scaled residual stream: the same function as a Llama model whose weights carry the scales.

mod common;

use common::cache::backends;
use common::model::{nmse, prompt};
use common::tiny::Tiny;
use longsight::backend::DType;
use longsight::engine::{Engine, EngineError, WantLogits};
use longsight::model::{Arch, LayerWeight, Quant, RopeScaling, Scales, Weight};
use longsight::select::Variant;
use serde_json::{Value, json};
use std::path::Path;

/// As MiniCPM4.1 has them: 12, 1.4 / sqrt(layers), 1 / 16.
const SCALES: Scales = Scales { embedding: 12.0, residual: 0.99, logits: 0.0625 };

fn logits(dir: &Path, device: &std::sync::Arc<dyn longsight::backend::Backend>) -> Vec<f32> {
    let mut engine = Engine::builder()
        .model(dir.display().to_string())
        .backend(device.clone())
        .dtype(DType::F32)
        .method(Variant::Dense.into())
        .context(128)
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
    let long = refused(&|c| c["max_position_embeddings"] = json!(100_000));
    assert!(long.contains("beyond its original context"), "{long}");
    let missing = refused(&|c| c["rope_scaling"]["short_factor"] = Value::Null);
    assert!(missing.contains("short_factor"), "{missing}");
    let few = refused(&|c| c["rope_scaling"]["short_factor"] = json!([1.0, 2.0]));
    assert!(few.contains("2 rotary factors"), "{few}");
    let scale = refused(&|c| c["scale_emb"] = json!(0.0));
    assert!(scale.contains("embedding scale"), "{scale}");
}
