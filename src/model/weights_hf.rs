//! Hugging Face folders: `config.json` and safetensors, in one file or in shards.

use std::collections::{BTreeSet, HashMap};
use std::path::{Component, Path};

use safetensors::tensor::{Dtype, TensorInfo};
use serde::Deserialize;

use super::config::{Arch, ModelConfig};
use super::error::{ModelError, Result};
use super::mapped::{Mapped, read_json};
use super::quant::Quant;
use super::weights::{LayerWeight, Place, Weight};

/// The name Hugging Face checkpoints give a weight.
pub(super) fn name_of(weight: Weight) -> String {
    match weight {
        Weight::Embed => "model.embed_tokens.weight".into(),
        Weight::OutputNorm => "model.norm.weight".into(),
        Weight::Output => "lm_head.weight".into(),
        Weight::Layer(layer, weight) => format!("model.layers.{layer}.{}", layer_name(weight)),
    }
}

fn layer_name(weight: LayerWeight) -> &'static str {
    match weight {
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
    }
}

type Opened = (ModelConfig, Vec<Mapped>, HashMap<Weight, (String, Place)>);

/// Configuration, mapped shards, and the places of the weights they have.
pub(super) fn open(folder: &Path) -> Result<Opened> {
    let config_path = folder.join("config.json");
    let json = read_json(&config_path)?
        .ok_or_else(|| ModelError::Missing { path: config_path.clone() })?;
    let generation = read_json(&folder.join("generation_config.json"))?;
    let mut shards = Vec::new();
    let mut headers = Vec::new();
    for name in shard_names(folder)? {
        let shard = Mapped::open(&folder.join(name))?;
        headers.push(read_header(&shard)?);
        shards.push(shard);
    }
    let mut config = ModelConfig::from_hf(&config_path, &json, generation.as_ref())?;
    // A NOSA model calls itself a Llama model: its tensors say what it is, and its number of blocks where that is there.
    let importance = [LayerWeight::ImportanceScale, LayerWeight::Importance].map(layer_name);
    let grown = |n: &String| importance.iter().any(|i| n.ends_with(i));
    let said = json.pointer("/sparse_config/select_blocks").is_some();
    if config.arch == Arch::Llama && (said || headers.iter().any(|h| h.tensors.keys().any(grown))) {
        config = config.with_importance(&config_path, &json)?;
    }
    if config.name.is_empty() {
        config.name =
            folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    }

    let names: HashMap<String, Weight> = Weight::all(&config).map(|w| (name_of(w), w)).collect();
    let mut places = HashMap::new();
    for (file, (shard, Header { data, tensors, .. })) in shards.iter().zip(headers).enumerate() {
        for (name, info) in tensors {
            let Some(&weight) = names.get(&name) else {
                refuse_leftover(shard.path(), &name, &config)?;
                continue;
            };
            let place = place(shard, file, data, &name, &info)?;
            if places.insert(weight, (name.clone(), place)).is_some() {
                return Err(ModelError::corrupt(
                    shard.path(),
                    format!("the tensor {name} appears in two shards"),
                ));
            }
        }
    }
    Ok((config, shards, places))
}

/// The safetensors files of a folder.
fn shard_names(folder: &Path) -> Result<BTreeSet<String>> {
    let single = "model.safetensors";
    let index_path = folder.join("model.safetensors.index.json");
    if folder.join(single).exists() {
        return Ok(BTreeSet::from([single.to_owned()]));
    }
    let Some(index) = read_json(&index_path)? else {
        return Err(ModelError::Missing { path: folder.join(single) });
    };
    let map = index.get("weight_map").and_then(|m| m.as_object());
    let map = map
        .filter(|m| !m.is_empty())
        .ok_or_else(|| ModelError::corrupt(&index_path, "it has no weight_map"))?;
    let mut names = BTreeSet::new();
    for file in map.values() {
        let name = file.as_str().unwrap_or_default();
        // A shard is a plain file of this folder; anything else could name any file at all.
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(ModelError::corrupt(
                &index_path,
                format!("it names {file} as a file with weights"),
            ));
        }
        names.insert(name.to_owned());
    }
    Ok(names)
}

#[derive(Deserialize)]
struct StoredHeader {
    #[serde(rename = "__metadata__")]
    metadata: Option<HashMap<String, String>>,
    #[serde(flatten)]
    tensors: HashMap<String, TensorInfo>,
}

/// What stands in front of the tensor data of a safetensors file.
pub(super) struct Header {
    /// Start of the tensor data.
    pub data: usize,
    pub metadata: HashMap<String, String>,
    pub tensors: HashMap<String, TensorInfo>,
}

/// Reads the header.
///
/// The header is parsed here rather than by the safetensors crate's reader because that adds up
/// offsets before it compares them with the file, which overflows on a header made to do so.
pub(super) fn read_header(shard: &Mapped) -> Result<Header> {
    let (path, bytes) = (shard.path(), shard.bytes());
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(ModelError::truncated(path, "header"));
    };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    let Some(header) = rest.get(..length) else {
        return Err(ModelError::truncated(path, "header"));
    };
    let header: StoredHeader = serde_json::from_slice(header)
        .map_err(|e| ModelError::corrupt(path, format!("its header cannot be read ({e})")))?;
    let metadata = header.metadata.unwrap_or_default();
    Ok(Header { data: 8 + length, metadata, tensors: header.tensors })
}

/// Where a tensor of the header lies, inside the file for certain.
pub(super) fn place(
    shard: &Mapped,
    file: usize,
    data: usize,
    name: &str,
    info: &TensorInfo,
) -> Result<Place> {
    let path = shard.path();
    let quant = match info.dtype {
        Dtype::F32 => Quant::F32,
        Dtype::F16 => Quant::F16,
        Dtype::BF16 => Quant::BF16,
        other => {
            return Err(ModelError::UnsupportedType {
                path: path.to_owned(),
                name: name.to_owned(),
                dtype: format!("{other:?}"),
            });
        }
    };
    let shape = match info.shape[..] {
        [n] => [1, n],
        [rows, cols] => [rows, cols],
        _ => {
            return Err(ModelError::corrupt(
                path,
                format!("the tensor {name} has {} dimensions", info.shape.len()),
            ));
        }
    };
    let size = shape[0].checked_mul(shape[1]).and_then(|n| quant.bytes_for(n));
    let (start, end) = info.data_offsets;
    if end < start || size != Some(end - start) {
        return Err(ModelError::corrupt(
            path,
            format!("the tensor {name} claims a size that is not that of its shape"),
        ));
    }
    match (data.checked_add(start), data.checked_add(end)) {
        (Some(start), Some(end)) if end <= shard.bytes().len() => {
            Ok(Place { file, quant, shape, bytes: start..end, interleaved: None })
        }
        _ => Err(ModelError::truncated(path, format!("tensor {name}"))),
    }
}

/// A layer tensor nobody reads means a computation nobody does: better refused than wrong.
/// Stored rotary frequencies are derived data, and a tied model may carry its `lm_head` again.
fn refuse_leftover(path: &Path, name: &str, config: &ModelConfig) -> Result<()> {
    let harmless = name.ends_with("rotary_emb.inv_freq")
        || (config.tie_embeddings && name == name_of(Weight::Output));
    if harmless {
        return Ok(());
    }
    Err(ModelError::unsupported(path, format!("a tensor {name}, unknown in its architecture")))
}
