//! Forecast matrices: where training starts, and the file they end in.

use crate::calibrate::CalibrateError;
use crate::calibrate::state::failed;
use crate::model::forecast::{MODEL, name_of};
use crate::model::lookahead::mean_projection;
use crate::model::{Checkpoint, ModelConfig, ModelError};
use crate::tensor_file::TensorFile;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What a matrix is before training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// The mean query projection of each KV head's group in the layer to be predicted, with both layers' norm weights
    /// folded in: training starts from what the next layer would ask, had this layer done nothing.
    #[default]
    Queries,
    /// Uniform in +-1 / sqrt(hidden) (as published).
    Uniform,
}

/// One matrix for each layer whose blocks are predicted, f32 `[kv_heads * head_dim, hidden]`, rows in the checkpoint's
/// rotary order (row `i` of a head rotates with row `i + head_dim / 2`).
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// Entry 0 predicts layer 0 from its own input (`q_curr_proj`), entry l layer l from the input of layer l - 1
    /// (`q_future_proj` of layer l - 1).
    pub matrices: Vec<Vec<f32>>,
}

impl Forecast {
    /// Matrices before training.
    ///
    /// # Errors
    /// A checkpoint that cannot be read.
    pub fn new(checkpoint: &Checkpoint, start: Start, seed: u64) -> Result<Self, CalibrateError> {
        let c = checkpoint.config();
        let matrices: Result<_, ModelError> = match start {
            Start::Queries => (0..c.n_layers).map(|t| mean_projection(checkpoint, t)).collect(),
            Start::Uniform => {
                let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
                let most = 1.0 / (c.hidden as f32).sqrt();
                let count = c.n_kv_heads * c.head_dim * c.hidden;
                let mut matrix =
                    |_| Ok((0..count).map(|_| rng.random_range(-most..most)).collect());
                (0..c.n_layers).map(&mut matrix).collect()
            }
        };
        Ok(Forecast { matrices: matrices? })
    }

    /// Writes the matrices for the model of this fingerprint under the published checkpoint's names, with what they
    /// were made of; [`model::Forecast`](crate::model::Forecast) reads them.
    ///
    /// # Errors
    /// [`CalibrateError::File`].
    pub fn save(
        &self,
        path: &Path,
        c: &ModelConfig,
        fingerprint: &str,
        about: &[(&str, String)],
    ) -> Result<(), CalibrateError> {
        let mut file = TensorFile::default();
        file.about.insert(MODEL.into(), fingerprint.into());
        for (key, value) in about {
            file.about.insert((*key).into(), value.clone());
        }
        let shape = [c.n_kv_heads * c.head_dim, c.hidden];
        for (target, matrix) in self.matrices.iter().enumerate() {
            file.f32s(&name_of(target), shape.to_vec(), matrix.clone());
        }
        file.save(path).map_err(failed("write", path))
    }
}
