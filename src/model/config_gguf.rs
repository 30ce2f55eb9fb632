//! The configuration in a GGUF file's metadata.

use super::config::{Arch, ModelConfig, RopeScaling, Scales, long_rope};
use super::error::{ModelError, Result};
use super::gguf::Gguf;

/// Per-pair divisors of the rotary frequencies, in files of Llama 3.x models.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";
/// The same within the original context and beyond it, in files of models with LongRoPE.
pub(super) const ROPE_FACTORS: [&str; 2] =
    ["rope_factors_short.weight", "rope_factors_long.weight"];

/// Metadata of one architecture: keys are prefixed with its name.
struct Keys<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn uint(&self, key: &str) -> Result<Option<usize>> {
        let key = self.key(key);
        if !self.gguf.has(&key) {
            return Ok(None);
        }
        // Some writers give one value per layer; only equal ones can be used.
        let value = self.gguf.uint(&key).or_else(|| {
            let list = self.gguf.ints(&key)?;
            let first = *list.first()?;
            let same = list.iter().all(|v| *v == first);
            same.then(|| u64::try_from(first).ok()).flatten()
        });
        value.and_then(|v| usize::try_from(v).ok()).map(Some).ok_or_else(|| {
            ModelError::corrupt(self.gguf.path(), format!("its {key} is not a single number"))
        })
    }

    fn need_uint(&self, key: &str) -> Result<usize> {
        self.uint(key)?.ok_or_else(|| {
            ModelError::corrupt(self.gguf.path(), format!("it does not say {}", self.key(key)))
        })
    }

    fn float(&self, key: &str) -> Option<f64> {
        self.gguf.float(&self.key(key))
    }
}

impl ModelConfig {
    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// As [`ModelConfig::from_hf`].
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let path = gguf.path();
        let name = gguf
            .string("general.architecture")
            .ok_or_else(|| ModelError::corrupt(path, "it does not say general.architecture"))?;
        let arch = match name {
            "llama" => Arch::Llama,
            "mistral" => Arch::Mistral,
            "qwen2" => Arch::Qwen2,
            "qwen3" => Arch::Qwen3,
            "minicpm" => Arch::MiniCpm,
            other => {
                return Err(ModelError::UnknownArchitecture {
                    path: path.to_owned(),
                    arch: other.chars().take(60).collect(),
                });
            }
        };
        let k = Keys { gguf, arch: name };
        if k.uint("expert_count")?.unwrap_or(0) > 0 {
            return Err(ModelError::unsupported(path, "a mixture of experts"));
        }
        let n_layers = k.need_uint("block_count")?;
        let hidden = k.need_uint("embedding_length")?;
        let n_heads = k.need_uint("attention.head_count")?;
        let head_dim = match k.uint("attention.key_length")? {
            Some(d) => d,
            None if n_heads > 0 && hidden.is_multiple_of(n_heads) => hidden / n_heads,
            None => {
                return Err(ModelError::corrupt(
                    path,
                    format!("its hidden size {hidden} does not divide into {n_heads} heads"),
                ));
            }
        };
        let value_dim = k.uint("attention.value_length")?;
        let rotary_dim = k.uint("rope.dimension_count")?;
        if value_dim.is_some_and(|d| d != head_dim) || rotary_dim.is_some_and(|d| d != head_dim) {
            return Err(ModelError::unsupported(
                path,
                "heads whose keys, values and rotary part differ in size",
            ));
        }
        // A padded embedding may have more rows than the tokenizer has tokens.
        let rows = gguf.tensors().get("token_embd.weight").and_then(|t| t.dims.get(1)).copied();
        let vocab = rows
            .or(k.uint("vocab_size")?)
            .or(gguf.array_len("tokenizer.ggml.tokens"))
            .ok_or_else(|| ModelError::corrupt(path, "it has neither embedding nor vocabulary"))?;

        let window = match arch {
            Arch::Llama | Arch::Mistral => k.uint("attention.sliding_window")?.filter(|&w| w > 0),
            Arch::Qwen2 | Arch::Qwen3 | Arch::MiniCpm => None,
        };
        let token = |key: &str| {
            let id = gguf.uint(&format!("tokenizer.ggml.{key}_token_id"))?;
            // 2^32 - 1 stands for "none" in some files.
            u32::try_from(id).ok().filter(|&id| id != u32::MAX)
        };
        let mut eos: Vec<u32> = Vec::new();
        for id in [token("eos"), token("eot")].into_iter().flatten() {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        ModelConfig {
            arch,
            name: gguf.string("general.name").unwrap_or("").to_owned(),
            n_layers,
            hidden,
            n_heads,
            n_kv_heads: k.uint("attention.head_count_kv")?.unwrap_or(n_heads),
            head_dim,
            ffn: k.need_uint("feed_forward_length")?,
            vocab,
            rope_theta: k.float("rope.freq_base").unwrap_or(10_000.0),
            rope_scaling: scaling(&k)?,
            norm_eps: k.float("attention.layer_norm_rms_epsilon").ok_or_else(|| {
                ModelError::corrupt(path, "it does not say attention.layer_norm_rms_epsilon")
            })?,
            scales: scales(&k, arch)?,
            tie_embeddings: !gguf.tensors().contains_key("output.weight"),
            qkv_bias: arch == Arch::Qwen2 || gguf.tensors().contains_key("blk.0.attn_q.bias"),
            qk_norm: arch == Arch::Qwen3,
            importance: None,
            windows: vec![window; n_layers.min(1 << 16)],
            max_context: k.need_uint("context_length")?,
            bos: token("bos"),
            eos,
        }
        .validate(path)
    }
}

/// muP as converters write it: the factors of embeddings and branches, and a divisor of logits.
fn scales(k: &Keys<'_>, arch: Arch) -> Result<Scales> {
    if arch != Arch::MiniCpm {
        return Ok(Scales::default());
    }
    let need = |key: &str| {
        k.float(key).ok_or_else(|| {
            // Older files leave it to the program that reads them.
            let what = format!("it does not say {}; convert the model again", k.key(key));
            ModelError::corrupt(k.gguf.path(), what)
        })
    };
    Ok(Scales {
        embedding: need("embedding_scale")?,
        residual: need("residual_scale")?,
        logits: 1.0 / need("logit_scale")?,
    })
}

/// A tensor of divisors of rotary frequencies, where there is one.
fn factors(k: &Keys<'_>, name: &str) -> Result<Option<Vec<f32>>> {
    let Some(tensor) = k.gguf.tensors().get(name) else { return Ok(None) };
    let n: usize = tensor.dims.iter().product();
    // Longer than any head: the lie is refused before anything is allocated for it.
    if n > 1 << 16 {
        return Err(ModelError::corrupt(k.gguf.path(), format!("its {name} has {n} elements")));
    }
    let mut factors = vec![0.0; n];
    tensor.quant.dequantize(&k.gguf.bytes()[tensor.bytes.clone()], &mut factors);
    Ok(Some(factors))
}

fn scaling(k: &Keys<'_>) -> Result<RopeScaling> {
    let path = k.gguf.path();
    // 0 is none; older files have the second key, and a factor alone means "linear".
    let factor = k.float("rope.scaling.factor").or_else(|| k.float("rope.scale_linear"));
    let factor = factor.filter(|&f| f != 0.0).unwrap_or(1.0);
    let untyped = if factor == 1.0 { "none" } else { "linear" };
    let kind = k.gguf.string(&k.key("rope.scaling.type")).unwrap_or(untyped);
    if let Some(factors) = factors(k, ROPE_FREQS)? {
        if kind != "none" && !(kind == "linear" && factor == 1.0) {
            let what = format!("rotary scaling of the kind {kind} beside {ROPE_FREQS}");
            return Err(ModelError::unsupported(path, what));
        }
        return Ok(RopeScaling::Factors(factors));
    }
    match kind {
        "none" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor }),
        "longrope" => {
            let [short, long] = ROPE_FACTORS;
            let need = |name| {
                let missing = || ModelError::corrupt(path, format!("it has no tensor {name}"));
                factors(k, name)?.ok_or_else(missing)
            };
            let max = k.need_uint("context_length")?;
            let original = k.uint("rope.scaling.original_context_length")?.unwrap_or(max);
            let factor = k.float("rope.scaling.attn_factor");
            Ok(long_rope((need(short)?, need(long)?), (original, max), factor))
        }
        other => Err(ModelError::unsupported(path, format!("rotary scaling of the kind {other}"))),
    }
}
