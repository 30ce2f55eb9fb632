//! Forecast files for tests.

use std::collections::HashMap;
use std::path::Path;

use longsight::model::{Checkpoint, ModelConfig};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView, serialize};

/// Name and f32 numbers of each matrix.
pub type Matrices = Vec<(String, Vec<f32>)>;

/// Random matrices under the published names, the last layer's without a use among them.
pub fn random(c: &ModelConfig, seed: u64) -> Matrices {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n = c.n_kv_heads * c.head_dim * c.hidden;
    let mut one = |layer: usize, name: &str| {
        let values = (0..n).map(|_| rng.random_range(-0.5f32..0.5)).collect();
        (format!("model.layers.{layer}.self_attn.{name}.weight"), values)
    };
    let mut all = vec![one(0, "q_curr_proj")];
    all.extend((0..c.n_layers).map(|l| one(l, "q_future_proj")));
    all
}

/// Writes matrices of `shape` as trained for `model`.
pub fn write(path: &Path, shape: [usize; 2], model: Option<&str>, matrices: &Matrices) {
    let bytes: Vec<Vec<u8>> =
        matrices.iter().map(|(_, m)| m.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = matrices.iter().zip(&bytes).map(|((name, _), b)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.to_vec(), b).unwrap())
    });
    let about = model.map(|m| HashMap::from([("model".to_string(), m.to_string())]));
    std::fs::write(path, serialize(views.collect::<Vec<_>>(), about).unwrap()).unwrap();
}

/// Sizes of a model's Forecast matrices.
pub fn shape(c: &ModelConfig) -> [usize; 2] {
    [c.n_kv_heads * c.head_dim, c.hidden]
}

/// A random Forecast of a model's own.
pub fn write_random(path: &Path, model: &Path) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let c = checkpoint.config();
    write(path, shape(c), Some(&checkpoint.fingerprint()), &random(c, 11));
}
