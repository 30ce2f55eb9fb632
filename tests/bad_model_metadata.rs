//! Model files that can be read but describe no model, or another one than their weights.

mod common;
#[path = "common/spoil.rs"]
mod spoil;

use std::fs;
use std::path::Path;

use common::gguf_file::{self, Meta, Tensor};
use common::tiny::Tiny;
use longsight::model::Arch;
use longsight::model::quant::Quant;
use serde_json::{Value, json};
use spoil::{Bench, assert_sane_allocations, complaint};

#[test]
fn wrong_configurations_are_refused() {
    let bench = Bench::new();
    let folder = bench.folder();
    let good: Value =
        serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    let huge = u64::MAX;
    for (key, values) in [
        (
            "num_hidden_layers",
            vec![json!(0), json!(-1), json!(huge), json!(1u64 << 32), json!("2")],
        ),
        ("hidden_size", vec![json!(0), json!(huge), json!(1.5), json!(null)]),
        ("num_attention_heads", vec![json!(0), json!(3), json!(huge), json!(1u64 << 19)]),
        ("num_key_value_heads", vec![json!(0), json!(3), json!(8), json!(huge)]),
        ("head_dim", vec![json!(0), json!(15), json!(huge)]),
        ("intermediate_size", vec![json!(0), json!(huge)]),
        ("vocab_size", vec![json!(0), json!(huge), json!(100)]),
        ("max_position_embeddings", vec![json!(0), json!(huge)]),
        ("rms_norm_eps", vec![json!(0), json!(-1e-5), json!(2.0), json!("x")]),
        ("rope_theta", vec![json!(0), json!(-1.0), json!("x")]),
        ("eos_token_id", vec![json!(260), json!(-1), json!([258, "x"])]),
        ("hidden_act", vec![json!("gelu")]),
        ("quantization_config", vec![json!({"bits": 4})]),
        (
            "rope_scaling",
            vec![
                json!({"rope_type": "yarn", "factor": 4.0}),
                json!({"rope_type": "linear"}),
                json!({"rope_type": "linear", "factor": 0.0}),
                json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                   "high_freq_factor": 1.0, "original_max_position_embeddings": 8192}),
            ],
        ),
    ] {
        for value in values {
            let mut config = good.clone();
            config[key] = value;
            fs::write(folder.join("config.json"), config.to_string()).unwrap();
            complaint(&folder, "config.json");
        }
    }
    let mut config = good.clone();
    config["model_type"] = json!("mamba2");
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    assert!(complaint(&folder, "config.json").contains("mamba2"));
    // Sizes that make sense but do not run here, refused before any weight is read.
    for (key, value, names) in [
        ("num_attention_heads", 34, "17 query heads per KV head"),
        ("head_dim", 264, "a head dimension of 264"),
        ("head_dim", 20, "a head dimension of 20"),
        ("hidden_size", 60, "a hidden size of 60"),
        ("intermediate_size", 100, "a MLP width of 100"),
    ] {
        let mut config = good.clone();
        config[key] = json!(value);
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let message = complaint(&folder, "config.json");
        assert!(message.contains(names) && message.contains("run here"), "{message}");
    }
    // Consistent numbers that are not those of the weights.
    for (key, value) in [("intermediate_size", 128), ("vocab_size", 512), ("head_dim", 32)] {
        let mut config = good.clone();
        config[key] = json!(value);
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        assert!(complaint(&folder, "tiny-folder").contains("shape"), "{key}");
    }
    assert_sane_allocations();
}

/// A GGUF file with one metadata value replaced, or removed where there is no new one.
fn gguf_with(path: &Path, key: &str, value: Option<Meta>) {
    let tiny = Tiny::new(Arch::Llama, false, 5);
    let mut metadata = tiny.gguf_metadata();
    let at = metadata.iter().position(|(k, _)| *k == key).unwrap();
    match value {
        Some(value) => metadata[at].1 = value,
        None => drop(metadata.remove(at)),
    }
    gguf_file::write(path, &metadata, &tiny.gguf_tensors(Quant::F32));
}

#[test]
fn wrong_gguf_metadata_is_refused() {
    let bench = Bench::new();
    let (path, _) = bench.gguf();
    for (key, value) in [
        ("general.architecture", Some(Meta::Str("mamba".into()))),
        ("general.architecture", Some(Meta::U32(1))),
        ("general.architecture", None),
        ("llama.block_count", None),
        ("llama.block_count", Some(Meta::U32(u32::MAX))),
        ("llama.block_count", Some(Meta::U32(3))),
        ("llama.block_count", Some(Meta::Str("2".into()))),
        ("llama.attention.head_count", Some(Meta::U32(0))),
        ("llama.attention.head_count_kv", Some(Meta::U32(3))),
        ("llama.attention.key_length", Some(Meta::U32(17))),
        ("llama.embedding_length", Some(Meta::U32(32))),
        ("llama.context_length", Some(Meta::U32(0))),
        ("llama.rope.freq_base", Some(Meta::F32(f32::NAN))),
        ("llama.attention.layer_norm_rms_epsilon", Some(Meta::F32(f32::INFINITY))),
        ("tokenizer.ggml.eos_token_id", Some(Meta::U32(1000))),
        ("tokenizer.ggml.model", None),
        ("tokenizer.ggml.model", Some(Meta::Str("bert".into()))),
        ("tokenizer.ggml.tokens", None),
        ("tokenizer.ggml.tokens", Some(Meta::Strs(vec!["a".into()]))),
        ("tokenizer.ggml.pre", Some(Meta::Str("no-such".into()))),
        ("tokenizer.ggml.merges", None),
        ("tokenizer.ggml.merges", Some(Meta::Strs(vec!["ab".into()]))),
        ("tokenizer.ggml.merges", Some(Meta::Strs(vec!["a zzz".into()]))),
        ("tokenizer.ggml.token_type", Some(Meta::I32s(vec![1, 1]))),
    ] {
        gguf_with(&path, key, value);
        complaint(&path, "tiny.gguf");
    }
}

#[test]
fn wrong_tensor_tables_are_refused() {
    let bench = Bench::new();
    let (path, _) = bench.gguf();
    let tiny = Tiny::new(Arch::Llama, false, 5);
    let write = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let mut tensors = tiny.gguf_tensors(Quant::F32);
        change(&mut tensors);
        gguf_file::write(&path, &tiny.gguf_metadata(), &tensors);
        complaint(&path, "tiny.gguf")
    };
    let message = write(&|t| drop(t.remove(3)));
    assert!(message.contains("blk.0"), "{message}");
    let message = write(&|t| t[1].dims = vec![8, 8]);
    assert!(message.contains("[8, 8]"), "{message}");
    write(&|t| t[3].dims.reverse());
    write(&|t| t[2].dims = vec![4, 4, 4, 64]);
    write(&|t| t[3].name = t[2].name.clone());
    write(&|t| t[3].name = "blk.0.attn_output.bias".into());
    write(&|t| {
        t.push(Tensor {
            name: "blk.0.attn_sinks.weight".into(),
            dims: vec![4],
            quant: Quant::F32,
            bytes: vec![0; 16],
        });
    });
}
