//! What `config.json` becomes.

use serde_json::{Value, json};

use super::*;

fn read(config: Value) -> ModelConfig {
    ModelConfig::from_hf(Path::new("config.json"), &config, None).unwrap()
}

fn llama31() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 131072,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    })
}

fn assert_close(got: f32, want: f32) {
    assert!((got - want).abs() <= 2e-6 * want, "{got} instead of {want}");
}

/// Values of the published formula, computed with numpy in f32.
#[test]
fn llama31_frequencies() {
    let config = read(llama31());
    assert_eq!(config.eos, [128_001, 128_008, 128_009]);
    let f = config.inv_freq();
    assert_eq!(f.len(), 64);
    for (i, want) in [
        (0, 1.0),
        (1, 0.814_617_2),
        (10, 0.128_687_38),
        (28, 0.003_211_446),
        (29, 0.002_166_570_4),
        (30, 0.001_371_893_7),
        (32, 0.000_524_846_1),
        (35, 9.556_213e-5),
        (36, 7.784_655_5e-5),
        (63, 3.068_926e-7),
    ] {
        assert_close(f[i], want);
    }
}

#[test]
fn plain_and_linear_frequencies() {
    let mut json = llama31();
    json["rope_scaling"] = Value::Null;
    json["rope_theta"] = json!(100_000.0);
    json["head_dim"] = json!(64);
    let plain = read(json.clone()).inv_freq();
    for (i, want) in [(0, 1.0), (1, 0.697_830_56), (16, 0.003_162_277_9), (31, 1.433_012_7e-5)] {
        assert_close(plain[i], want);
    }
    // The newer spelling, with the base inside.
    json["rope_theta"] = Value::Null;
    json["rope_parameters"] =
        json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 100_000.0});
    let linear = read(json).inv_freq();
    for (l, p) in linear.iter().zip(&plain) {
        assert_eq!(*l, p / 4.0);
    }
}

#[test]
fn windows_follow_each_architecture() {
    let with = |arch: &str, changes: Value| {
        let mut json = llama31();
        json["rope_scaling"] = Value::Null;
        json["model_type"] = json!(arch);
        json["num_hidden_layers"] = json!(4);
        for (key, value) in changes.as_object().unwrap() {
            json[key] = value.clone();
        }
        read(json).windows
    };
    let none = vec![None; 4];
    let w = Some(512);
    let width = json!({"sliding_window": 512});
    assert_eq!(with("llama", width.clone()), none);
    assert_eq!(with("mistral", width.clone()), vec![w; 4]);
    assert_eq!(with("mistral", json!({})), vec![Some(4096); 4]);
    assert_eq!(with("mistral", json!({"sliding_window": null})), none);
    assert_eq!(with("qwen2", width), none);
    let on = json!({"sliding_window": 512, "use_sliding_window": true,
                    "max_window_layers": 3});
    assert_eq!(with("qwen2", on.clone()), [None, None, None, w]);
    assert_eq!(with("qwen3", on), [None, None, None, w]);
    let listed = json!({"sliding_window": 512, "use_sliding_window": true,
        "layer_types": ["full_attention", "sliding_attention", "full_attention",
                        "full_attention"]});
    assert_eq!(with("qwen2", listed), [None, w, None, None]);
}

#[test]
fn architectures_differ_in_biases_and_norms() {
    let with = |arch: &str| {
        let mut json = llama31();
        json["model_type"] = json!(arch);
        json["rope_scaling"] = Value::Null;
        let c = read(json);
        (c.qkv_bias, c.qk_norm, c.head_dim)
    };
    assert_eq!(with("llama"), (false, false, 128));
    assert_eq!(with("qwen2"), (true, false, 128));
    assert_eq!(with("qwen3"), (false, true, 128));
    // The generation configuration adds the tokens that end an answer.
    let generation = json!({"eos_token_id": [5, 128_001]});
    let path = Path::new("config.json");
    let c = ModelConfig::from_hf(path, &llama31(), Some(&generation)).unwrap();
    assert_eq!(c.eos, [128_001, 128_008, 128_009, 5]);
}

/// Logits of wider heads have the scale of the model's own.
#[test]
fn importance_makes_heads_wider() {
    let path = Path::new("config.json");
    let plain = read(llama31());
    assert_eq!((plain.kv_dim(), plain.query_factor()), (128, 1.0));
    let parameters = plain.parameters();
    let nosa = plain.with_importance(path, &llama31()).unwrap();
    assert_eq!((nosa.kv_dim(), nosa.importance), (136, Some(TrainedBlocks::default())));
    let scale = f64::from(nosa.query_factor()) / 136f64.sqrt();
    assert!((scale * 128f64.sqrt() - 1.0).abs() < 1e-7, "{scale}");
    // 8 KV heads of 128: delta and A of 32 layers.
    assert_eq!(nosa.parameters() - parameters, 32 * (8 * 1024 + 8));
    let mut widest = llama31();
    (widest["head_dim"], widest["rope_scaling"]) = (json!(256), Value::Null);
    let said = read(widest.clone()).with_importance(path, &widest).unwrap_err().to_string();
    assert!(said.contains("256 with content importance") && said.contains("248"), "{said}");
}
