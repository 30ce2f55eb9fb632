//! The recorded reference of SmolLM2 and engines to compare with it.

use longsight::backend::{DType, open_all};
use longsight::engine::{Engine, EngineBuilder};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// `tests/data/reference_smollm2.*`.
pub struct Reference {
    tensors: Vec<u8>,
    json: serde_json::Value,
}

fn data(name: &str) -> PathBuf {
    // A test binary carried to another machine runs in the root of a checkout there.
    let here = PathBuf::from("tests/data").join(name);
    if here.exists() { here } else { PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(here) }
}

impl Reference {
    pub fn load() -> Self {
        let read = |n: &str| std::fs::read(data(n)).unwrap_or_else(|e| panic!("{n}: {e}"));
        Reference {
            tensors: read("reference_smollm2.safetensors"),
            json: serde_json::from_slice(&read("reference_smollm2.json")).unwrap(),
        }
    }

    fn bytes(&self, name: &str) -> Vec<[u8; 4]> {
        let all = SafeTensors::deserialize(&self.tensors).unwrap();
        let t = all.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        t.data().chunks_exact(4).map(|c| [c[0], c[1], c[2], c[3]]).collect()
    }

    pub fn u32(&self, name: &str) -> Vec<u32> {
        self.bytes(name).into_iter().map(u32::from_le_bytes).collect()
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name).into_iter().map(f32::from_le_bytes).collect()
    }

    pub fn nll_mean(&self) -> f64 {
        self.json["emma"]["nll_mean"].as_f64().unwrap()
    }

    /// Mean over the predictions of the first `n` tokens (n - 1 of them).
    pub fn nll_mean_of(&self, n: usize) -> f64 {
        let nll = self.f32("emma.nll");
        nll[..n - 1].iter().map(|&x| f64::from(x)).sum::<f64>() / (n - 1) as f64
    }
}

/// Backends of this machine: (name, is a software renderer). `LONGSIGHT_BACKENDS` restricts them.
pub fn backends() -> Vec<(String, bool)> {
    let only = std::env::var("LONGSIGHT_BACKENDS").ok();
    open_all()
        .into_iter()
        .filter(|(name, _)| only.as_ref().is_none_or(|o| o.split(',').any(|n| n == name)))
        .filter_map(|(name, b)| match b {
            Ok(b) => Some((name, b.caps().software)),
            Err(e) => {
                println!("{name} is not compared: {e}");
                None
            }
        })
        .collect()
}

/// A folder that holds the order of the keys, measured once on the cpu: neither the user's own order is used nor is
/// one left there, and a software renderer need not measure it.
fn key_order_dir() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let first = builder("cpu", DType::F32, 64, true).key_order_dir(dir.path()).build();
        first.unwrap_or_else(|e| panic!("the order of the keys: {e}"));
        dir
    })
    .path()
}

fn builder(device: &str, dtype: DType, context: usize, sorted: bool) -> EngineBuilder<'static> {
    let model = std::env::var("LONGSIGHT_TEST_MODEL").unwrap_or_else(|_| "smollm2".into());
    Engine::builder().model(model).device(device).dtype(dtype).context(context).calibrate(sorted)
}

/// The demo model (or `LONGSIGHT_TEST_MODEL`) on a device; dense below 2,048 tokens.
pub fn engine(device: &str, dtype: DType, context: usize, sorted: bool) -> Engine {
    builder(device, dtype, context, sorted)
        .key_order_dir(key_order_dir())
        .build()
        .unwrap_or_else(|e| panic!("{device} {dtype}: {e}"))
}
