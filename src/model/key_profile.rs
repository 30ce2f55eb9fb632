//! A model's [`KeyProfile`] between runs: kept in the checkpoint's order of dimensions, used in that of the keys.

use super::{KeyOrder, ModelConfig, OrderSource};
use crate::files::make_folder_of;
use crate::select::KeyProfile;
use crate::tensor_file::TensorFile;
use std::io;
use std::path::{Path, PathBuf};

/// What the file says it was measured on.
const SOURCE: &str = "source";

/// Where the profile of a model is kept between runs.
pub fn cache_file(dir: &Path, fingerprint: &str) -> PathBuf {
    dir.join(format!("key-profile-{fingerprint}.safetensors"))
}

/// Reads a saved profile; `None` when there is none that was measured as `source` says and fits the model.
pub fn load(path: &Path, source: &OrderSource, c: &ModelConfig) -> Option<KeyProfile> {
    let mut file = TensorFile::load(path).ok()??;
    let measured: OrderSource = serde_json::from_str(file.word(SOURCE)).ok()?;
    let heads = c.n_layers * c.n_kv_heads;
    let profile = KeyProfile {
        kv_heads: c.n_kv_heads,
        head_dim: c.head_dim,
        importance: file.take_f32s("importance", heads * c.head_dim)?,
        basis: file.take_f32s("basis", heads * c.head_dim * c.head_dim)?,
    };
    (measured == *source && profile.fits(c.n_layers)).then_some(profile)
}

/// Saves a profile; an interrupted write leaves no partial file.
pub fn save(profile: &KeyProfile, path: &Path, source: &OrderSource) -> io::Result<()> {
    make_folder_of(path)?;
    let (hkv, d) = (profile.kv_heads, profile.head_dim);
    let layers = profile.importance.len() / (hkv * d).max(1);
    let mut file = TensorFile::default();
    file.about.insert(SOURCE.into(), serde_json::to_string(source)?);
    file.f32s("importance", vec![layers, hkv, d], profile.importance.clone());
    file.f32s("basis", vec![layers, hkv, d, d], profile.basis.clone());
    file.save(path)
}

/// A profile in the checkpoint's order, as the keys of `order` need it, `wide` dimensions each.
pub fn in_order(profile: &KeyProfile, order: &KeyOrder, wide: usize) -> KeyProfile {
    profile.reordered(|layer, head, i| order.source_dim(layer, head, i)).widened(wide)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Arch, RopeScaling};

    #[test]
    fn a_profile_comes_back_only_for_what_it_was_measured_on() {
        let mut c = ModelConfig {
            arch: Arch::Llama,
            name: "tiny".into(),
            n_layers: 2,
            hidden: 64,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 16,
            ffn: 96,
            vocab: 260,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            norm_eps: 1e-5,
            scales: crate::model::Scales::default(),
            tie_embeddings: true,
            qkv_bias: false,
            qk_norm: false,
            importance: None,
            windows: vec![None; 2],
            max_context: 512,
            bos: None,
            eos: Vec::new(),
        };
        let mut profile = KeyProfile::neutral(2, c.n_kv_heads, c.head_dim);
        profile.importance[3] = 7.5;
        let dir = tempfile::tempdir().unwrap();
        let path = cache_file(&dir.path().join("new"), "abc");
        let source = OrderSource { model: "abc".into(), version: 1, ..OrderSource::default() };
        assert!(load(&path, &source, &c).is_none());
        save(&profile, &path, &source).unwrap();
        assert_eq!(load(&path, &source, &c).unwrap(), profile);
        let other = OrderSource { version: 2, ..source.clone() };
        assert!(load(&path, &other, &c).is_none());
        c.n_layers = 3;
        assert!(load(&path, &source, &c).is_none());
    }
}
