//! The tiny random model on disk, engines over it, and methods that act on texts of a few hundred tokens.

use super::cache::backends;
use super::tiny::Tiny;
use super::{forecast, profile};
use longsight::backend::{Backend, DType};
use longsight::engine::{Engine, EngineBuilder};
use longsight::model::{Arch, Quant};
use longsight::select::{METHODS, MethodInfo, MethodSpec, Variant};
use std::path::PathBuf;
use std::sync::Arc;

/// Most tokens of a sequence.
pub const CONTEXT: usize = 256;

/// The tiny model on disk.
pub struct Model {
    dir: tempfile::TempDir,
    n_layers: usize,
    /// Its tokens have a content importance.
    nosa: bool,
}

impl Model {
    pub fn new() -> Model {
        Model::deep(2)
    }

    /// With so many layers.
    pub fn deep(n_layers: usize) -> Model {
        Model::of(&Tiny::deep(Arch::Llama, false, 3, n_layers))
    }

    /// The same with content importance.
    pub fn nosa(n_layers: usize) -> Model {
        Model::of(&Tiny::nosa(3, n_layers))
    }

    pub fn of(tiny: &Tiny) -> Model {
        let dir = tempfile::tempdir().unwrap();
        tiny.write_hf(&dir.path().join("tiny"), Quant::F32, 1);
        let (n_layers, nosa) = (tiny.config.n_layers, tiny.config.importance.is_some());
        let model = Model { dir, n_layers, nosa };
        forecast::write_random(&model.forecast(), &model.path());
        model
    }

    /// The methods that it can run.
    pub fn methods(&self) -> impl Iterator<Item = &'static MethodInfo> + use<> {
        let nosa = self.nosa;
        METHODS.iter().filter(move |m| nosa || m.variant != Variant::Nosa)
    }

    /// For messages.
    pub fn kind(&self) -> &'static str {
        if self.nosa { "nosa" } else { "llama" }
    }

    /// A random Forecast for it.
    pub fn forecast(&self) -> PathBuf {
        self.dir.path().join("forecast.safetensors")
    }

    /// Folder of the checkpoint.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("tiny")
    }

    /// Three sequences of f32, keys in the checkpoint's order.
    pub fn builder(&self, dev: &Arc<dyn Backend>, spec: &MethodSpec) -> EngineBuilder<'static> {
        Engine::builder()
            .model(self.path().display().to_string())
            .backend(dev.clone())
            .dtype(DType::F32)
            .method(spec.clone())
            .forecast(self.forecast())
            .key_profile(profile::random(self.n_layers, 2, 16))
            .context(CONTEXT)
            .sequences(3)
            .calibrate(false)
    }

    pub fn engine(&self, dev: &Arc<dyn Backend>, spec: &MethodSpec) -> Engine {
        self.builder(dev, spec).build().unwrap()
    }
}

/// A model without and one with content importance, on every backend under test.
pub fn on_both(n_layers: usize) -> Vec<(Arc<Model>, Arc<dyn Backend>)> {
    let models = [Model::deep(n_layers), Model::nosa(n_layers)].map(Arc::new);
    models.iter().flat_map(|m| backends().into_iter().map(move |d| (m.clone(), d))).collect()
}

pub fn dense() -> MethodSpec {
    Variant::Dense.into()
}

/// Sparse in every layer of a sequence longer than `budget`, on half of the 16 dimensions; the first block of those
/// that choose blocks of 64 tokens must win its place.
pub fn sparse(variant: Variant, budget: usize) -> MethodSpec {
    MethodSpec {
        budget: Some(budget),
        dims: Some(8),
        dense_layers: Some(0),
        dense_below: Some(0),
        sinks: matches!(variant, Variant::Infllm2 | Variant::Sparda | Variant::Nosa).then_some(0),
        ..variant.into()
    }
}

/// `n` reproducible bytes.
pub fn prompt(seed: u32, n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i * 7 + i * 13 + seed * 31) % 251).collect()
}

/// `sum (x - want)^2 / sum want^2`.
pub fn nmse(x: &[f32], want: &[f32]) -> f64 {
    assert_eq!(x.len(), want.len());
    let square = |v: f32| f64::from(v).powi(2);
    let error: f64 = x.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    error / want.iter().map(|v| square(*v)).sum::<f64>()
}
