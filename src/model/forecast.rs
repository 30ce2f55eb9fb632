//! Forecast projections (SparDA): a file of weights beside a model's own, trained for that model alone, or the model's
//! own query projections in their place.
//!
//! The matrix for layer `l >= 1` belongs to layer `l - 1`: `q_future_proj`; that for layer 0 to layer 0 itself:
//! `q_curr_proj`. Each is `[kv_heads * head_dim, hidden]`, rows in the checkpoint's rotary order, without bias.

use std::path::Path;

use super::config::ModelConfig;
use super::error::{ModelError, Result};
use super::lookahead::mean_projection;
use super::mapped::Mapped;
use super::weights::{Checkpoint, Place};
use super::weights_hf::{place, read_header};

/// Key of the model's fingerprint in the file's metadata.
pub(crate) const MODEL: &str = "model";

/// The name of the matrix that forecasts the query of a layer.
pub(crate) fn name_of(layer: usize) -> String {
    match layer.checked_sub(1) {
        Some(before) => format!("model.layers.{before}.self_attn.q_future_proj.weight"),
        None => "model.layers.0.self_attn.q_curr_proj.weight".into(),
    }
}

/// A matrix for every layer.
#[derive(Debug)]
pub struct Forecast(Source);

#[derive(Debug)]
enum Source {
    /// An opened file; the matrices stay mapped.
    File { file: Mapped, places: Vec<Place> },
    /// Made from the model.
    Made(Vec<Vec<f32>>),
}

impl Forecast {
    /// Opens a safetensors file (F32, F16 or BF16) and checks that it has a matrix for every layer in the model's
    /// sizes. Other tensors are passed over: the last layer's own projection has no use.
    ///
    /// # Errors
    /// [`ModelError::WrongForecast`] when the file says that it was trained for a model other than `fingerprint`;
    /// [`ModelError::NoForecast`], [`ModelError::NotAForecast`], [`ModelError::MissingTensor`],
    /// [`ModelError::ShapeMismatch`] and every variant that speaks of a file.
    pub fn open(path: &Path, config: &ModelConfig, fingerprint: &str) -> Result<Self> {
        if !path.exists() {
            return Err(ModelError::NoForecast { path: path.to_owned() });
        }
        let file = Mapped::open(path)?;
        let not = |what: String| ModelError::NotAForecast { path: path.to_owned(), what };
        let header =
            read_header(&file).map_err(|e| not(format!("it is no safetensors file: {e}")))?;
        if (0..config.n_layers).all(|l| !header.tensors.contains_key(&name_of(l))) {
            return Err(not(format!("no tensor is called like {}", name_of(1))));
        }
        let trained_for = header.metadata.get(MODEL);
        if let Some(trained_for) = trained_for.filter(|m| *m != fingerprint) {
            return Err(ModelError::WrongForecast {
                path: path.to_owned(),
                trained_for: trained_for.clone(),
                model: fingerprint.into(),
            });
        }
        let shape = [config.n_kv_heads * config.head_dim, config.hidden];
        let one = |layer: usize| {
            let name = name_of(layer);
            let Some(info) = header.tensors.get(&name) else {
                return Err(ModelError::MissingTensor { path: path.to_owned(), name });
            };
            let place = place(&file, 0, header.data, &name, info)?;
            if place.shape != shape {
                return Err(ModelError::ShapeMismatch {
                    path: path.to_owned(),
                    name,
                    expected: shape.to_vec(),
                    found: place.shape.to_vec(),
                });
            }
            Ok(place)
        };
        let places = (0..config.n_layers).map(one).collect::<Result<_>>()?;
        Ok(Forecast(Source::File { file, places }))
    }

    /// Without training: the mean query projection of each KV head's group in the layer that is forecast, for the
    /// input of the layer before (InfiniGen's speculation, one vector per KV head).
    ///
    /// # Errors
    /// A checkpoint that cannot be read.
    pub fn lookahead(checkpoint: &Checkpoint) -> Result<Self> {
        let layers = 0..checkpoint.config().n_layers;
        let made = layers.map(|l| mean_projection(checkpoint, l)).collect::<Result<_>>()?;
        Ok(Forecast(Source::Made(made)))
    }

    /// One matrix per layer, f32 `[kv_heads * head_dim, hidden]`: for those who measure time and not what is chosen.
    pub(crate) fn of(matrices: Vec<Vec<f32>>) -> Self {
        Forecast(Source::Made(matrices))
    }

    /// The matrix for the query of `layer` as f32, row-major.
    ///
    /// # Errors
    /// [`ModelError::Request`] for a layer that the model does not have.
    pub fn matrix(&self, layer: usize) -> Result<Vec<f32>> {
        let missing = |layers: usize| ModelError::Request {
            name: "the Forecast".into(),
            what: format!("layer {layer} of {layers}"),
        };
        match &self.0 {
            Source::File { file, places } => {
                let place = places.get(layer).ok_or_else(|| missing(places.len()))?;
                let mut values = vec![0.0; place.shape[0] * place.shape[1]];
                place.quant.dequantize(&file.bytes()[place.bytes.clone()], &mut values);
                Ok(values)
            }
            Source::Made(made) => made.get(layer).cloned().ok_or_else(|| missing(made.len())),
        }
    }
}
