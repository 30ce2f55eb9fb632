//! `config.json` and `generation_config.json` of a Hugging Face folder.

use std::path::Path;

use serde_json::Value;

use super::config::{Arch, ModelConfig, RopeScaling, Scales, long_rope};
use super::error::{ModelError, Result};
use crate::select::TrainedBlocks;

/// A JSON object with the file that messages name.
struct Fields<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl<'a> Fields<'a> {
    /// The value, `None` where it is absent or null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    fn bad(&self, key: &str, value: &Value) -> ModelError {
        let mut shown = value.to_string();
        if let Some((at, _)) = shown.char_indices().nth(60) {
            shown.truncate(at);
        }
        ModelError::corrupt(self.path, format!("its {key} is {shown}"))
    }

    fn uint(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_u64()
            .and_then(|v| usize::try_from(v).ok())
            .map(Some)
            .ok_or_else(|| self.bad(key, value))
    }

    fn need_uint(&self, key: &str) -> Result<usize> {
        self.uint(key)?
            .ok_or_else(|| ModelError::corrupt(self.path, format!("it does not say {key}")))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value.as_f64().map(Some).ok_or_else(|| self.bad(key, value))
    }

    fn need_float(&self, key: &str) -> Result<f64> {
        self.float(key)?
            .ok_or_else(|| ModelError::corrupt(self.path, format!("it does not say {key}")))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        value.as_bool().ok_or_else(|| self.bad(key, value))
    }

    /// A token id or a list of them.
    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = match value {
            Value::Array(list) => list.iter().map(one).collect(),
            single => one(single).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.bad(key, value))
    }
}

impl ModelConfig {
    /// Reads `config.json` (and, for the tokens that end an answer, `generation_config.json`).
    /// Absent keys have the defaults of the reference implementation. `path` is named in errors.
    ///
    /// # Errors
    /// `UnknownArchitecture`, `Unsupported` (a variant that would be computed wrongly) and
    /// `Corrupt` (numbers that cannot be).
    pub fn from_hf(path: &Path, config: &Value, generation: Option<&Value>) -> Result<Self> {
        let f = Fields { path, json: config };
        if !config.is_object() {
            return Err(ModelError::corrupt(path, "it is not a JSON object"));
        }
        let arch = architecture(&f)?;
        refuse_variants(&f, arch)?;

        let n_layers = f.need_uint("num_hidden_layers")?;
        let hidden = f.need_uint("hidden_size")?;
        let n_heads = f.need_uint("num_attention_heads")?;
        let head_dim = match (f.uint("head_dim")?, arch) {
            (Some(d), _) => d,
            (None, Arch::Qwen3) => 128,
            (None, _) if n_heads > 0 && hidden.is_multiple_of(n_heads) => hidden / n_heads,
            (None, _) => {
                return Err(ModelError::corrupt(
                    path,
                    format!("its hidden size {hidden} does not divide into {n_heads} heads"),
                ));
            }
        };
        let (rope_theta, rope_scaling) = rotary(&f)?;
        let max_context = f.uint("max_position_embeddings")?.unwrap_or(match arch {
            Arch::Llama | Arch::MiniCpm => 2048,
            Arch::Mistral => 131_072,
            Arch::Qwen2 | Arch::Qwen3 => 32_768,
        });

        let mut eos = f.ids("eos_token_id")?;
        if let Some(json) = generation {
            for id in (Fields { path, json }).ids("eos_token_id")? {
                if !eos.contains(&id) {
                    eos.push(id);
                }
            }
        }
        let name = f.get("_name_or_path").and_then(Value::as_str).unwrap_or("");
        ModelConfig {
            arch,
            name: name.to_owned(),
            n_layers,
            hidden,
            n_heads,
            n_kv_heads: f.uint("num_key_value_heads")?.unwrap_or(n_heads),
            head_dim,
            ffn: f.need_uint("intermediate_size")?,
            vocab: f.need_uint("vocab_size")?,
            rope_theta,
            rope_scaling,
            norm_eps: f.float("rms_norm_eps")?.unwrap_or(1e-6),
            scales: scales(&f, arch, hidden, n_layers)?,
            tie_embeddings: f.flag("tie_word_embeddings", arch == Arch::MiniCpm)?,
            qkv_bias: arch == Arch::Qwen2,
            qk_norm: arch == Arch::Qwen3,
            importance: None,
            windows: windows(&f, arch, n_layers)?,
            max_context,
            bos: f.ids("bos_token_id")?.first().copied(),
            eos,
        }
        .validate(path)
    }

    /// The same of a NOSA model, whose tensors say that it is one. The blocks that it was trained to attend to are in
    /// `sparse_config`, or those of NOSA-8B.
    ///
    /// # Errors
    /// `Unsupported` for blocks or windows of other sizes, `Corrupt` for numbers of blocks that cannot be.
    pub(super) fn with_importance(self, path: &Path, config: &Value) -> Result<Self> {
        let blocks = trained_blocks(&Fields { path, json: config })?;
        ModelConfig { importance: Some(blocks), ..self }.validate(path)
    }
}

/// NOSA's `sparse_config`: `topk` counts what is chosen beside the blocks of the window.
fn trained_blocks(f: &Fields<'_>) -> Result<TrainedBlocks> {
    let none = Value::Null;
    let s = Fields { path: f.path, json: f.get("sparse_config").unwrap_or(&none) };
    for (key, here) in [("kernel_size", 32), ("kernel_stride", 16), ("block_size", 64)] {
        if let Some(n) = s.uint(key)?.filter(|n| *n != here) {
            return Err(ModelError::unsupported(
                f.path,
                format!("a {key} of {n} ({here} runs here)"),
            ));
        }
    }
    if s.flag("use_nope", false)? {
        let what = "blocks that are scored without rotary embedding";
        return Err(ModelError::unsupported(f.path, what));
    }
    let own = TrainedBlocks::default();
    let sinks = s.uint("init_blocks")?.unwrap_or(own.sinks);
    let window = s.uint("window_size")?.unwrap_or(own.local * 64);
    if window % 64 != 0 {
        let what = format!("a window_size of {window}, which is no whole number of blocks of 64");
        return Err(ModelError::unsupported(f.path, what));
    }
    let local = window / 64;
    let more = s.uint("select_blocks")?.unwrap_or(own.by_query - own.sinks - own.local);
    let topk = s.uint("topk")?.unwrap_or(own.total - own.local);
    Ok(TrainedBlocks {
        total: topk.saturating_add(local),
        by_query: sinks.saturating_add(local).saturating_add(more),
        sinks,
        local,
    })
}

fn architecture(f: &Fields<'_>) -> Result<Arch> {
    let listed = f.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
    let name = f.get("model_type").and_then(Value::as_str).or(listed).unwrap_or("unnamed");
    match name {
        "llama" | "LlamaForCausalLM" => Ok(Arch::Llama),
        "mistral" | "MistralForCausalLM" => Ok(Arch::Mistral),
        "qwen2" | "Qwen2ForCausalLM" => Ok(Arch::Qwen2),
        "qwen3" | "Qwen3ForCausalLM" => Ok(Arch::Qwen3),
        "minicpm" | "MiniCPMForCausalLM" => Ok(Arch::MiniCpm),
        other => Err(ModelError::UnknownArchitecture {
            path: f.path.to_owned(),
            arch: other.chars().take(60).collect(),
        }),
    }
}

/// Options of these architectures that change the computation and are not implemented.
fn refuse_variants(f: &Fields<'_>, arch: Arch) -> Result<()> {
    let act = f.get("hidden_act").and_then(Value::as_str);
    if let Some(act) = act.filter(|a| *a != "silu" && *a != "swish") {
        let what = format!("the activation {act}");
        return Err(ModelError::unsupported(f.path, what));
    }
    if f.get("quantization_config").is_some() {
        return Err(ModelError::unsupported(
            f.path,
            "quantized safetensors (use the plain checkpoint or a GGUF file)",
        ));
    }
    // In Llama and Qwen3 this flag puts a bias on the output projection too.
    if arch != Arch::Qwen2 && f.flag("attention_bias", false)? {
        return Err(ModelError::unsupported(f.path, "attention biases"));
    }
    if f.flag("mlp_bias", false)? {
        return Err(ModelError::unsupported(f.path, "MLP biases"));
    }
    if f.float("partial_rotary_factor")?.is_some_and(|v| v != 1.0) {
        return Err(ModelError::unsupported(f.path, "partial rotary embedding"));
    }
    Ok(())
}

/// Rotary base and scaling, from `rope_theta` and `rope_scaling` or the newer `rope_parameters`.
fn rotary(f: &Fields<'_>) -> Result<(f64, RopeScaling)> {
    let theta = f.float("rope_theta")?;
    let Some(json) = f.get("rope_parameters").or_else(|| f.get("rope_scaling")) else {
        return Ok((theta.unwrap_or(10_000.0), RopeScaling::None));
    };
    let path = f.path;
    let s = Fields { path, json };
    let theta = s.float("rope_theta")?.or(theta).unwrap_or(10_000.0);
    let kind = s.get("rope_type").or_else(|| s.get("type"));
    let scaling = match kind.and_then(Value::as_str).unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: s.need_float("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: s.need_float("factor")?,
            low_freq_factor: s.need_float("low_freq_factor")?,
            high_freq_factor: s.need_float("high_freq_factor")?,
            original_max_position: s.need_uint("original_max_position_embeddings")?,
        },
        "longrope" => long_factors(f, &s)?,
        other => {
            let what = format!("rotary scaling of the kind {other}");
            return Err(ModelError::unsupported(path, what));
        }
    };
    Ok((theta, scaling))
}

/// LongRoPE: a divisor for each frequency, for texts within the original context and beyond it.
fn long_factors(f: &Fields<'_>, s: &Fields<'_>) -> Result<RopeScaling> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    let original = s.uint(ORIGINAL)?.or(f.uint(ORIGINAL)?);
    let max = f.uint("max_position_embeddings")?;
    let original = original.or(max).unwrap_or(1);
    let list = |key: &str| -> Option<Vec<f32>> {
        let list = s.get(key)?.as_array()?;
        list.iter().map(|v| v.as_f64().map(|v| v as f32)).collect()
    };
    let need = |key: &str| {
        let missing = || ModelError::corrupt(f.path, format!("its longrope scaling has no {key}"));
        list(key).ok_or_else(missing)
    };
    let (max, short) = (max.unwrap_or(original), need("short_factor")?);
    // Models that go no further have no use for the others.
    let long = if max > original { need("long_factor")? } else { short.clone() };
    let factor = s.float("attention_factor")?;
    Ok(long_rope((short, long), (original, max), factor))
}

/// muP as MiniCPM stores it: `scale_emb`, `scale_depth / sqrt(layers)`, `dim_model_base / hidden`.
fn scales(f: &Fields<'_>, arch: Arch, hidden: usize, n_layers: usize) -> Result<Scales> {
    if arch != Arch::MiniCpm {
        return Ok(Scales::default());
    }
    let depth = f.float("scale_depth")?.unwrap_or(1.0);
    Ok(Scales {
        embedding: f.float("scale_emb")?.unwrap_or(1.0),
        residual: depth / (n_layers as f64).sqrt(),
        logits: f.float("dim_model_base")?.unwrap_or(1.0) / hidden as f64,
    })
}

/// The sliding window of each layer.
fn windows(f: &Fields<'_>, arch: Arch, n_layers: usize) -> Result<Vec<Option<usize>>> {
    // The list below is as long as the file says: never longer than a model can be.
    let n_layers = n_layers.min(1 << 16);
    // Absent (but not null) means the reference implementation's default.
    let width = match f.json.get("sliding_window") {
        None => Some(4096),
        Some(_) => f.uint("sliding_window")?,
    };
    let on = match arch {
        Arch::Llama | Arch::MiniCpm => false,
        Arch::Mistral => true,
        Arch::Qwen2 | Arch::Qwen3 => f.flag("use_sliding_window", false)?,
    };
    if !on {
        return Ok(vec![None; n_layers]);
    }
    if let Some(types) = f.get("layer_types").and_then(Value::as_array) {
        return types
            .iter()
            .map(|t| match t.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => Ok(width),
                _ => Err(f.bad("layer_types", t)),
            })
            .collect();
    }
    let first = match arch {
        Arch::Qwen2 | Arch::Qwen3 => f.uint("max_window_layers")?.unwrap_or(28),
        _ => 0,
    };
    Ok((0..n_layers).map(|l| if l >= first { width } else { None }).collect())
}
