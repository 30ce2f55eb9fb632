//! Tensor names and row order of GGUF files.

use std::collections::HashMap;

use super::config::{Arch, ModelConfig};
use super::config_gguf::{ROPE_FACTORS, ROPE_FREQS};
use super::error::{ModelError, Result};
use super::gguf::Gguf;
use super::weights::{LayerWeight, Place, Weight};

/// The name GGUF files give a weight.
pub(super) fn name_of(weight: Weight) -> String {
    match weight {
        Weight::Embed => "token_embd.weight".into(),
        Weight::OutputNorm => "output_norm.weight".into(),
        Weight::Output => "output.weight".into(),
        Weight::Layer(layer, weight) => format!("blk.{layer}.{}", layer_name(weight)),
    }
}

fn layer_name(weight: LayerWeight) -> &'static str {
    match weight {
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
        // No converter writes these two.
        LayerWeight::ImportanceScale => "attn_importance_scale.weight",
        LayerWeight::Importance => "attn_importance.weight",
        LayerWeight::Down => "ffn_down.weight",
    }
}

/// The places of the weights that the file has.
pub(super) fn places(
    gguf: &Gguf,
    config: &ModelConfig,
) -> Result<HashMap<Weight, (String, Place)>> {
    let mut known = 0;
    let mut places = HashMap::new();
    for weight in Weight::all(config) {
        let name = name_of(weight);
        let Some(entry) = gguf.tensors().get(&name) else {
            continue;
        };
        known += 1;
        let shape = match entry.dims[..] {
            [n] => [1, n],
            [cols, rows] => [rows, cols],
            _ => {
                return Err(ModelError::ShapeMismatch {
                    path: gguf.path().to_owned(),
                    name,
                    expected: weight.expected_shape(config).unwrap_or_default().to_vec(),
                    found: entry.dims.clone(),
                });
            }
        };
        // Files of the llama architecture and its kin store q and k for interleaved rotary pairs.
        let permuted = matches!(config.arch, Arch::Llama | Arch::Mistral | Arch::MiniCpm)
            && matches!(
                weight,
                Weight::Layer(
                    _,
                    LayerWeight::Q | LayerWeight::K | LayerWeight::QBias | LayerWeight::KBias
                )
            );
        let place = Place {
            file: 0,
            quant: entry.quant,
            shape,
            bytes: entry.bytes.clone(),
            interleaved: permuted.then_some(config.head_dim),
        };
        places.insert(weight, (name, place));
    }
    refuse_leftovers(gguf, config, known)?;
    Ok(places)
}

/// A tensor nobody reads means a computation nobody does: better refused than wrong.
fn refuse_leftovers(gguf: &Gguf, config: &ModelConfig, known: usize) -> Result<()> {
    if gguf.tensors().len() == known {
        return Ok(());
    }
    let names: std::collections::HashSet<String> =
        Weight::all(config).chain([Weight::Output]).map(name_of).collect();
    // Divisors of frequencies are read with the configuration.
    let read = |n: &String| {
        names.contains(n)
            || n == ROPE_FREQS
            || config.arch == Arch::MiniCpm && ROPE_FACTORS.contains(&n.as_str())
    };
    let mut unknown: Vec<&String> = gguf.tensors().keys().filter(|n| !read(n)).collect();
    unknown.sort();
    match unknown.first() {
        None => Ok(()),
        Some(name) => Err(ModelError::unsupported(
            gguf.path(),
            format!("a tensor {name}, unknown in its architecture"),
        )),
    }
}

/// Row of the interleaved order (pairs `2i, 2i + 1`) that holds row `r` of the half-split order
/// (pairs `i, i + head_dim / 2`), head by head.
pub(super) fn interleaved_row(r: usize, head_dim: usize) -> usize {
    let (head, within) = (r / head_dim, r % head_dim);
    let half = head_dim / 2;
    head * head_dim + 2 * (within % half) + within / half
}
