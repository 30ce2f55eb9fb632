//! Models of a known shape whose weights are drawn at random: for timing without a model file.

use super::error::{ModelError, Result};
use super::weights::{LayerWeight, Weight};
use super::{Arch, ModelConfig, RopeScaling, Scales};
use crate::names::did_you_mean;
use crate::select::TrainedBlocks;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::path::Path;

/// What a model's name begins with to ask for one: `random:llama-3.1-8b`.
pub const RANDOM: &str = "random:";

/// Values drawn once; every row of every matrix begins somewhere else among them.
const VALUES: usize = 1 << 20;
/// Random weights were not trained for any length.
const CONTEXT: usize = 1 << 20;
/// Elements that a thread fills at a time.
const PIECE: usize = 1 << 18;

/// The shape whose tokens have a content importance.
const NOSA: &str = "nosa-8b";

/// Layers, hidden, heads, KV heads, head dimension, MLP, vocabulary.
type Sizes = [usize; 7];

/// Name, architecture, sizes, rotary base.
const SHAPES: [(&str, Arch, Sizes, f64); 5] = [
    ("llama-3.1-8b", Arch::Llama, [32, 4096, 32, 8, 128, 14336, 128_256], 5e5),
    ("qwen3-8b", Arch::Qwen3, [36, 4096, 32, 8, 128, 12288, 151_936], 1e6),
    ("minicpm4.1-8b", Arch::MiniCpm, [32, 4096, 32, 2, 128, 16384, 73_448], 1e4),
    (NOSA, Arch::Llama, [32, 4096, 32, 2, 128, 16384, 73_448], 1e4),
    ("smollm2-135m", Arch::Llama, [30, 576, 9, 3, 64, 1536, 49_152], 1e5),
];

/// The configuration of a named shape.
///
/// # Errors
/// [`ModelError::UnknownShape`] with the names that are known.
pub(super) fn config(shape: &str) -> Result<ModelConfig> {
    let Some((name, arch, sizes, rope_theta)) = SHAPES.into_iter().find(|s| s.0 == shape) else {
        let known: Vec<String> = SHAPES.iter().map(|s| format!("{RANDOM}{}", s.0)).collect();
        let name = format!("{RANDOM}{shape}");
        let meant = did_you_mean(shape, SHAPES.iter().map(|s| s.0));
        return Err(ModelError::UnknownShape { name, known: known.join(", "), meant });
    };
    let [n_layers, hidden, n_heads, n_kv_heads, head_dim, ffn, vocab] = sizes;
    let scales = match arch {
        Arch::MiniCpm => Scales {
            embedding: 12.0,
            residual: 1.4 / (n_layers as f64).sqrt(),
            logits: 256.0 / hidden as f64,
        },
        _ => Scales::default(),
    };
    let config = ModelConfig {
        arch,
        name: format!("{RANDOM}{name}"),
        n_layers,
        hidden,
        n_heads,
        n_kv_heads,
        head_dim,
        ffn,
        vocab,
        rope_theta,
        rope_scaling: RopeScaling::None,
        norm_eps: 1e-5,
        scales,
        tie_embeddings: name == "smollm2-135m",
        qkv_bias: false,
        qk_norm: arch == Arch::Qwen3,
        importance: (name == NOSA).then(TrainedBlocks::default),
        windows: vec![None; n_layers],
        max_context: CONTEXT,
        bos: None,
        eos: Vec::new(),
    };
    config.validate(Path::new(name))
}

/// Rows on demand. Matrices have variance 1 / inputs, so that activations keep their size; norms are ones, biases zero.
#[derive(Debug)]
pub(super) struct RandomWeights(Vec<f32>);

impl RandomWeights {
    pub fn new() -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        // A sum of uniform values is normal enough here: mean 0, variance 1.
        let mut one = || (0..3).map(|_| rng.random::<f32>() * 2.0 - 1.0).sum();
        RandomWeights((0..VALUES).map(|_| one()).collect())
    }

    /// Fills rows `from..` of `cols` elements.
    pub fn read(&self, weight: Weight, from: usize, cols: usize, out: &mut [f32]) {
        use LayerWeight as L;
        let number = match weight {
            Weight::OutputNorm
            | Weight::Layer(_, L::AttnNorm | L::FfnNorm | L::QNorm | L::KNorm) => {
                return out.fill(1.0);
            }
            Weight::Layer(_, L::ImportanceScale) => return out.fill(1.0),
            Weight::Layer(_, L::QBias | L::KBias | L::VBias) => return out.fill(0.0),
            Weight::Embed => 1,
            Weight::Output => 2,
            Weight::Layer(layer, kind) => 3 + layer * L::ALL.len() + kind as usize,
        };
        let scale = 1.0 / (cols as f32).sqrt();
        let rows = (PIECE / cols).max(1);
        out.par_chunks_mut(rows * cols).enumerate().for_each(|(piece, out)| {
            for (i, row) in out.chunks_mut(cols).enumerate() {
                let at = (number * 1_000_003 + (from + piece * rows + i)) * 7919;
                let values = self.0.iter().cycle().skip(at % VALUES);
                for (o, v) in row.iter_mut().zip(values) {
                    *o = v * scale;
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::Checkpoint;
    use super::*;

    #[test]
    fn every_shape_reads_and_rows_differ() {
        for (name, ..) in SHAPES {
            let c = Checkpoint::random(name).expect("shape");
            let q = Weight::Layer(1, LayerWeight::Q);
            let [rows, cols] = c.shape(q).expect("q");
            let mut out = vec![0.0; 2 * cols];
            c.read_rows(q, rows - 2..rows, &mut out).expect("rows");
            let (a, b) = out.split_at(cols);
            assert_ne!(a, b, "{name}");
            let mean_square = a.iter().map(|v| v * v).sum::<f32>() / cols as f32;
            assert!((mean_square * cols as f32 - 1.0).abs() < 0.2, "{name}: {mean_square}");
            // Read row by row it is the same.
            let mut last = vec![0.0; cols];
            c.read_rows(q, rows - 1..rows, &mut last).expect("row");
            assert_eq!(last, b, "{name}");
            assert_eq!(c.fingerprint().len(), 16);
        }
        let error = Checkpoint::random("llama-9b").expect_err("no such shape").to_string();
        assert!(error.contains("random:llama-3.1-8b"), "{error}");
    }
}
