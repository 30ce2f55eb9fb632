//! Tiny random models in every file format, for tests that need a model but not its sense:
//! 2 layers, hidden 64, 4 heads sharing 2 KV heads, head dimension 16, and a byte-level tokenizer
//! of 260 ids (the 256 bytes and four special tokens).

use std::path::Path;

use half::{bf16, f16};
use longsight::model::quant::Quant;
use longsight::model::{Arch, LayerWeight, ModelConfig, RopeScaling, Scales, Weight};
use longsight::select::TrainedBlocks;
use serde_json::{Map, Value, json};

use super::gguf_file::{self, Meta, Tensor};

pub const VOCAB: usize = 260;
pub const SPECIAL: [&str; 4] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"];
pub const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A tiny model: its configuration and its weights as f32 in the library's row order.
pub struct Tiny {
    pub config: ModelConfig,
    pub weights: Vec<(Weight, Vec<f32>)>,
}

/// Reproducible numbers in -1..1 (a 64-bit linear congruential generator).
fn noise(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    ((*state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
}

impl Tiny {
    pub fn new(arch: Arch, tied: bool, seed: u64) -> Tiny {
        Tiny::deep(arch, tied, seed, 2)
    }

    /// The same with `n_layers` layers.
    pub fn deep(arch: Arch, tied: bool, seed: u64, n_layers: usize) -> Tiny {
        let config = ModelConfig {
            arch,
            name: "tiny".into(),
            n_layers,
            hidden: 64,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 16,
            ffn: 96,
            vocab: VOCAB,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            norm_eps: 1e-5,
            scales: Scales::default(),
            tie_embeddings: tied,
            qkv_bias: arch == Arch::Qwen2,
            qk_norm: arch == Arch::Qwen3,
            importance: None,
            windows: vec![None; n_layers],
            max_context: 512,
            bos: Some(256),
            eos: vec![258],
        };
        Tiny::of(config, seed)
    }

    /// With heads of 64 dimensions, which is what kernels on tensor cores take.
    pub fn wide(seed: u64, n_layers: usize) -> Tiny {
        let config = Tiny::deep(Arch::Llama, false, seed, n_layers).config;
        Tiny::of(ModelConfig { head_dim: 64, ..config }, seed)
    }

    /// With content importance, as NOSA models have it.
    pub fn nosa(seed: u64, n_layers: usize) -> Tiny {
        let config = Tiny::deep(Arch::Llama, false, seed, n_layers).config;
        let importance = Some(TrainedBlocks { total: 5, by_query: 4, sinks: 1, local: 1 });
        Tiny::of(ModelConfig { importance, ..config }, seed)
    }

    fn of(config: ModelConfig, seed: u64) -> Tiny {
        let mut state = seed;
        let mut weights = Vec::new();
        for weight in Weight::all(&config) {
            let [rows, cols] = weight.expected_shape(&config).unwrap();
            let is_norm = matches!(
                weight,
                Weight::OutputNorm
                    | Weight::Layer(
                        _,
                        LayerWeight::AttnNorm
                            | LayerWeight::FfnNorm
                            | LayerWeight::QNorm
                            | LayerWeight::KNorm
                    )
            );
            let scale = if is_norm { 0.1 } else { 1.5 / (cols as f32).sqrt() };
            let offset = if is_norm { 1.0 } else { 0.0 };
            let values = (0..rows * cols).map(|_| offset + scale * noise(&mut state));
            weights.push((weight, values.collect()));
        }
        Tiny { config, weights }
    }

    /// A Hugging Face folder in `dtype` (F32, F16 or BF16) with `shards` safetensors files.
    pub fn write_hf(&self, dir: &Path, dtype: Quant, shards: usize) {
        std::fs::create_dir_all(dir).unwrap();
        let write = |name: &str, json: &Value| {
            std::fs::write(dir.join(name), json.to_string()).unwrap();
        };
        write("config.json", &self.hf_config());
        write("generation_config.json", &json!({"eos_token_id": [258]}));
        write("tokenizer.json", &tokenizer_json());
        write(
            "tokenizer_config.json",
            &json!({"bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[2]},
                    "chat_template": TEMPLATE}),
        );
        let mut weight_map = Map::new();
        for shard in 0..shards {
            let name = match shards {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{shards:05}.safetensors", shard + 1),
            };
            let mut header = Map::new();
            let mut data = Vec::new();
            for (weight, values) in self.weights.iter().skip(shard).step_by(shards) {
                let start = data.len();
                data.extend(encode(dtype, values));
                let [rows, cols] = weight.expected_shape(&self.config).unwrap();
                let shape = if rows == 1 { json!([cols]) } else { json!([rows, cols]) };
                let tensor = hf_name(*weight);
                header.insert(
                    tensor.clone(),
                    json!({"dtype": dtype.name(), "shape": shape,
                           "data_offsets": [start, data.len()]}),
                );
                weight_map.insert(tensor, name.clone().into());
            }
            let header = Value::Object(header).to_string();
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend(header.as_bytes());
            file.extend(data);
            std::fs::write(dir.join(name), file).unwrap();
        }
        if shards > 1 {
            write("model.safetensors.index.json", &json!({"weight_map": weight_map}));
        }
    }

    /// What `config.json` says.
    pub fn hf_config(&self) -> Value {
        let c = &self.config;
        let Scales { embedding, residual, logits } = c.scales;
        let rotary = match &c.rope_scaling {
            RopeScaling::Long { short, long, original_max_position, .. } => json!({
                "rope_type": "longrope", "short_factor": short, "long_factor": long,
                "original_max_position_embeddings": original_max_position}),
            RopeScaling::Factors(factors) => json!({"rope_type": "longrope",
                "short_factor": factors, "long_factor": factors,
                "original_max_position_embeddings": c.max_context}),
            _ => Value::Null,
        };
        let sparse = c.importance.map(|b| {
            json!({"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "init_blocks": b.sinks,
                   "window_size": 64 * b.local, "select_blocks": b.by_query - b.sinks - b.local,
                   "topk": b.total - b.local, "use_nope": false, "dense_len": 8192})
        });
        json!({
            "sparse_config": sparse, "scale_emb": embedding, "scale_depth": residual * (c.n_layers as f64).sqrt(),
            "dim_model_base": logits * c.hidden as f64, "rope_scaling": rotary,
            "model_type": arch_name(c.arch), "num_hidden_layers": c.n_layers,
            "hidden_size": c.hidden, "num_attention_heads": c.n_heads,
            "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim,
            "intermediate_size": c.ffn, "vocab_size": c.vocab, "rope_theta": c.rope_theta,
            "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_embeddings,
            "hidden_act": "silu", "max_position_embeddings": c.max_context,
            "sliding_window": null, "bos_token_id": 256, "eos_token_id": 258,
        })
    }

    /// A GGUF file with matrices in `dtype` (F32, F16, BF16 or Q8_0) and vectors in F32; returns
    /// where its tensor data begins.
    pub fn write_gguf(&self, path: &Path, dtype: Quant) -> usize {
        gguf_file::write(path, &self.gguf_metadata(), &self.gguf_tensors(dtype))
    }

    pub fn gguf_metadata(&self) -> Vec<(&'static str, Meta)> {
        let c = &self.config;
        let arch = arch_name(c.arch);
        let key = |k: &str| -> &'static str { format!("{arch}.{k}").leak() };
        let size = |n: usize| Meta::U32(n as u32);
        let types = (0..VOCAB).map(|i| if i < 256 { 1 } else { 3 });
        let mut own = Vec::new();
        if c.arch == Arch::MiniCpm {
            own.push((key("embedding_scale"), Meta::F32(c.scales.embedding as f32)));
            own.push((key("residual_scale"), Meta::F32(c.scales.residual as f32)));
            own.push((key("logit_scale"), Meta::F32((1.0 / c.scales.logits) as f32)));
        }
        if let RopeScaling::Long { original_max_position, .. } = c.rope_scaling {
            let original = size(original_max_position);
            own.push((key("rope.scaling.type"), Meta::Str("longrope".into())));
            own.push((key("rope.scaling.original_context_length"), original));
        }
        own.extend([
            ("general.architecture", Meta::Str(arch.into())),
            ("general.name", Meta::Str("tiny".into())),
            (key("block_count"), size(c.n_layers)),
            (key("embedding_length"), size(c.hidden)),
            (key("feed_forward_length"), size(c.ffn)),
            (key("attention.head_count"), size(c.n_heads)),
            (key("attention.head_count_kv"), size(c.n_kv_heads)),
            (key("attention.key_length"), size(c.head_dim)),
            (key("rope.freq_base"), Meta::F32(c.rope_theta as f32)),
            (key("attention.layer_norm_rms_epsilon"), Meta::F32(c.norm_eps as f32)),
            (key("context_length"), size(c.max_context)),
            ("tokenizer.ggml.model", Meta::Str("gpt2".into())),
            ("tokenizer.ggml.pre", Meta::Str("gpt-2".into())),
            ("tokenizer.ggml.tokens", Meta::Strs(tokens())),
            ("tokenizer.ggml.token_type", Meta::I32s(types.collect())),
            ("tokenizer.ggml.merges", Meta::Strs(Vec::new())),
            ("tokenizer.ggml.bos_token_id", Meta::U32(256)),
            ("tokenizer.ggml.eos_token_id", Meta::U32(258)),
            ("tokenizer.ggml.add_bos_token", Meta::Bool(false)),
            ("tokenizer.chat_template", Meta::Str(TEMPLATE.into())),
        ]);
        own
    }

    pub fn gguf_tensors(&self, dtype: Quant) -> Vec<Tensor> {
        let interleave = matches!(self.config.arch, Arch::Llama | Arch::Mistral | Arch::MiniCpm);
        let own = self.weights.iter().map(|(weight, values)| {
            let [rows, cols] = weight.expected_shape(&self.config).unwrap();
            let rotary = matches!(weight, Weight::Layer(_, LayerWeight::Q | LayerWeight::K));
            let values = if rotary && interleave {
                interleaved(values, cols, self.config.head_dim)
            } else {
                values.clone()
            };
            let quant = if rows == 1 { Quant::F32 } else { dtype };
            Tensor {
                name: gguf_name(*weight),
                dims: if rows == 1 { vec![cols] } else { vec![cols, rows] },
                quant,
                bytes: encode(quant, &values),
            }
        });
        let factors = match &self.config.rope_scaling {
            RopeScaling::Long { short, long, .. } => vec![("short", short), ("long", long)],
            _ => Vec::new(),
        };
        let factors = factors.into_iter().map(|(name, values)| Tensor {
            name: format!("rope_factors_{name}.weight"),
            dims: vec![values.len()],
            quant: Quant::F32,
            bytes: encode(Quant::F32, values),
        });
        own.chain(factors).collect()
    }
}

/// Rows in the order llama files store them: a head's halves zipped together.
fn interleaved(values: &[f32], cols: usize, head_dim: usize) -> Vec<f32> {
    let rows: Vec<&[f32]> = values.chunks_exact(cols).collect();
    let mut out = Vec::with_capacity(values.len());
    for head in rows.chunks_exact(head_dim) {
        let (first, second) = head.split_at(head_dim / 2);
        for (a, b) in first.iter().zip(second) {
            out.extend_from_slice(a);
            out.extend_from_slice(b);
        }
    }
    out
}

fn encode(dtype: Quant, values: &[f32]) -> Vec<u8> {
    let mut out = Vec::new();
    match dtype {
        Quant::F32 => values.iter().for_each(|v| out.extend(v.to_le_bytes())),
        Quant::F16 => values.iter().for_each(|v| out.extend(f16::from_f32(*v).to_le_bytes())),
        Quant::BF16 => values.iter().for_each(|v| out.extend(bf16::from_f32(*v).to_le_bytes())),
        Quant::Q8_0 => {
            for block in values.chunks_exact(32) {
                let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                let d = f16::from_f32(largest / 127.0);
                out.extend(d.to_le_bytes());
                let scale = if largest > 0.0 { 1.0 / d.to_f32() } else { 0.0 };
                out.extend(block.iter().map(|v| (v * scale).round() as i8 as u8));
            }
        }
        other => panic!("{} is not written here", other.name()),
    }
    out
}

pub fn arch_name(arch: Arch) -> &'static str {
    match arch {
        Arch::Llama => "llama",
        Arch::Mistral => "mistral",
        Arch::Qwen2 => "qwen2",
        Arch::Qwen3 => "qwen3",
        Arch::MiniCpm => "minicpm",
    }
}

/// The tokenizer's vocabulary: byte `b` is id `b`.
pub fn tokens() -> Vec<String> {
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let bytes = (0..256u32).map(|b| {
        let code = if printable(b) {
            b
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap().to_string()
    });
    let mut all: Vec<String> = bytes.collect();
    all.extend(SPECIAL.map(String::from));
    all
}

fn tokenizer_json() -> Value {
    let vocab: Map<String, Value> =
        tokens().into_iter().enumerate().map(|(i, t)| (t, i.into())).collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(i, t)| {
            json!({"id": 256 + i, "content": t, "special": true, "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                       "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

/// Names as Hugging Face checkpoints spell them, written out apart from the library's own table.
pub fn hf_name(weight: Weight) -> String {
    let (layer, weight) = match weight {
        Weight::Embed => return "model.embed_tokens.weight".into(),
        Weight::OutputNorm => return "model.norm.weight".into(),
        Weight::Output => return "lm_head.weight".into(),
        Weight::Layer(layer, weight) => (layer, weight),
    };
    let name = match weight {
        LayerWeight::AttnNorm => "input_layernorm.weight",
        LayerWeight::Q => "self_attn.q_proj.weight",
        LayerWeight::K => "self_attn.k_proj.weight",
        LayerWeight::V => "self_attn.v_proj.weight",
        LayerWeight::O => "self_attn.o_proj.weight",
        LayerWeight::QBias => "self_attn.q_proj.bias",
        LayerWeight::KBias => "self_attn.k_proj.bias",
        LayerWeight::VBias => "self_attn.v_proj.bias",
        LayerWeight::QNorm => "self_attn.q_norm.weight",
        LayerWeight::KNorm => "self_attn.k_norm.weight",
        LayerWeight::FfnNorm => "post_attention_layernorm.weight",
        LayerWeight::Gate => "mlp.gate_proj.weight",
        LayerWeight::Up => "mlp.up_proj.weight",
        LayerWeight::Down => "mlp.down_proj.weight",
        LayerWeight::ImportanceScale => "self_attn.A",
        LayerWeight::Importance => "self_attn.delta.weight",
    };
    format!("model.layers.{layer}.{name}")
}

/// Names as GGUF files spell them.
pub fn gguf_name(weight: Weight) -> String {
    let (layer, weight) = match weight {
        Weight::Embed => return "token_embd.weight".into(),
        Weight::OutputNorm => return "output_norm.weight".into(),
        Weight::Output => return "output.weight".into(),
        Weight::Layer(layer, weight) => (layer, weight),
    };
    let name = match weight {
        LayerWeight::AttnNorm => "attn_norm.weight",
        LayerWeight::Q => "attn_q.weight",
        LayerWeight::K => "attn_k.weight",
        LayerWeight::V => "attn_v.weight",
        LayerWeight::O => "attn_output.weight",
        LayerWeight::QBias => "attn_q.bias",
        LayerWeight::KBias => "attn_k.bias",
        LayerWeight::VBias => "attn_v.bias",
        LayerWeight::QNorm => "attn_q_norm.weight",
        LayerWeight::KNorm => "attn_k_norm.weight",
        LayerWeight::FfnNorm => "ffn_norm.weight",
        LayerWeight::Gate => "ffn_gate.weight",
        LayerWeight::Up => "ffn_up.weight",
        LayerWeight::Down => "ffn_down.weight",
        other => panic!("{other:?} is in no GGUF file"),
    };
    format!("blk.{layer}.{name}")
}
