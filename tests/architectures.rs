//! Logits of every architecture and of every rotary scaling against an independent implementation: small random
//! checkpoints, run through transformers in float32 by `tools/record_architectures.py`.
//!
//! `LONGSIGHT_WRITE_ARCHITECTURES=FOLDER cargo test --test architectures` writes the checkpoints for that script.

mod common;

use common::cache::backends;
use common::model::prompt;
use common::tiny::{Tiny, VOCAB};
use longsight::backend::{Backend, DType};
use longsight::engine::{Engine, WantLogits};
use longsight::model::{Arch, Quant, Scales};
use longsight::select::Variant;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Tokens of the text; windows are shorter, and so are contexts before scaling.
const TOKENS: u32 = 150;
/// Positions whose logits are recorded.
const POSITIONS: [usize; 10] = [0, 1, 7, 23, 24, 25, 63, 64, 65, 149];
/// Largest difference of a logit; they lie between -3.3 and 3.3.
const TOLERANCE: f32 = 1e-4;

struct Case {
    name: &'static str,
    tiny: Tiny,
    /// What its `config.json` says besides.
    says: Value,
    /// What it must not say for this test to mean anything: the logits are others then.
    unsaid: Value,
}

fn case(name: &'static str, arch: Arch, tied: bool, says: Value, unsaid: Value) -> Case {
    let mut tiny = Tiny::deep(arch, tied, name.len() as u64, 3);
    if arch == Arch::MiniCpm {
        tiny.config.scales = Scales { embedding: 12.0, residual: 0.8, logits: 0.25 };
    }
    Case { name, tiny, says, unsaid }
}

fn cases() -> Vec<Case> {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let factors = |step: f64| (0..8).map(|i| 1.0 + step * f64::from(i)).collect::<Vec<_>>();
    let longrope = json!({"rope_type": "longrope", "short_factor": factors(0.1), "long_factor": factors(0.5),
                          "original_max_position_embeddings": 64});
    let scaling = |s: &Value| json!({"rope_scaling": s});
    let none = || json!({"rope_scaling": null});
    let some_layers =
        json!({"sliding_window": 24, "use_sliding_window": true, "max_window_layers": 1});
    let theta = json!({"rope_theta": 10000.0});
    vec![
        case("llama", Arch::Llama, false, json!({"rope_theta": 500000.0}), theta.clone()),
        case("llama-tied", Arch::Llama, true, json!({}), json!({"rope_theta": 500.0})),
        case("llama3-scaling", Arch::Llama, true, scaling(&llama3), none()),
        case(
            "linear-scaling",
            Arch::Llama,
            false,
            scaling(&json!({"rope_type": "linear", "factor": 4.0})),
            none(),
        ),
        case(
            "mistral",
            Arch::Mistral,
            false,
            json!({"sliding_window": 24}),
            json!({"sliding_window": null}),
        ),
        case("qwen2", Arch::Qwen2, true, json!({"rope_theta": 1e6}), theta.clone()),
        case(
            "qwen2-windows",
            Arch::Qwen2,
            false,
            some_layers,
            json!({"use_sliding_window": false}),
        ),
        case("qwen3", Arch::Qwen3, true, json!({"rope_theta": 1e6}), theta),
        case("minicpm", Arch::MiniCpm, false, json!({}), json!({"scale_depth": 1.0})),
        case("minicpm-longrope", Arch::MiniCpm, false, scaling(&longrope), none()),
    ]
}

impl Case {
    /// Its folder below `dir`, with `more` in its configuration.
    fn write(&self, dir: &Path, more: &[&Value]) -> PathBuf {
        let folder = dir.join(self.name);
        self.tiny.write_hf(&folder, Quant::F32, 1);
        let mut config = self.tiny.hf_config();
        for (key, value) in more.iter().flat_map(|m| m.as_object().unwrap()) {
            config[key] = value.clone();
        }
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        folder
    }
}

fn logits(folder: &Path, device: &Arc<dyn Backend>) -> Vec<f32> {
    let mut engine = Engine::builder()
        .model(folder.display().to_string())
        .backend(device.clone())
        .dtype(DType::F32)
        .method(Variant::Dense.into())
        .context(256)
        .calibrate(false)
        .build()
        .unwrap();
    let seq = engine.open_sequence().unwrap();
    let mut all = Vec::new();
    let mut each = |i: usize, l: &[f32]| {
        if POSITIONS.contains(&i) {
            all.extend_from_slice(l);
        }
    };
    engine.prefill(seq, &prompt(3, TOKENS), WantLogits::All, &mut each, |_| true).unwrap();
    all
}

fn worst(x: &[f32], want: &[f32]) -> f32 {
    assert_eq!(x.len(), want.len());
    x.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn logits_are_those_of_an_independent_implementation() {
    let cases = cases();
    if let Some(dir) = std::env::var_os("LONGSIGHT_WRITE_ARCHITECTURES") {
        let dir = Path::new(&dir);
        cases.iter().for_each(|c| drop(c.write(dir, &[&c.says])));
        let text = json!({"ids": prompt(3, TOKENS), "positions": POSITIONS});
        std::fs::write(dir.join("text.json"), text.to_string()).unwrap();
        return;
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/architectures.safetensors");
    let bytes = std::fs::read(file).unwrap();
    let recorded = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(recorded.len(), cases.len(), "record again: {:?}", recorded.names());
    let dir = tempfile::tempdir().unwrap();
    for case in cases {
        let words = recorded.tensor(case.name).unwrap().data().chunks_exact(4);
        let want: Vec<f32> = words.map(|w| f32::from_le_bytes(w.try_into().unwrap())).collect();
        assert_eq!(want.len(), POSITIONS.len() * VOCAB);
        let folder = case.write(dir.path(), &[&case.says]);
        for dev in backends() {
            let far = worst(&logits(&folder, &dev), &want);
            println!("{}: {} is at most {far:.1e} away", dev.name(), case.name);
            assert!(far <= TOLERANCE, "{}: {} differs by {far}", dev.name(), case.name);
        }
        let cpu = longsight::backend::open("cpu").unwrap();
        let other = case.write(dir.path(), &[&case.says, &case.unsaid]);
        let far = worst(&logits(&other, &cpu), &want);
        assert!(
            far > 100.0 * TOLERANCE,
            "{} shows nothing: {far} without {}",
            case.name,
            case.says
        );
    }
}
