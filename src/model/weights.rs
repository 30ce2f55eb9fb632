//! Checkpoints: weights under canonical names, mapped, read as f32 rows.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::config::ModelConfig;
use super::error::{ModelError, Result};
use super::random::{self, RandomWeights};
use super::{gguf::Gguf, mapped::Mapped, quant::Quant};
use super::{weights_gguf, weights_hf};
use crate::files::hex;

/// A weight of the whole model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Weight {
    /// Token embedding, `[vocab, hidden]`.
    Embed,
    /// Final RMS norm, `[1, hidden]`.
    OutputNorm,
    /// Logit projection, `[vocab, hidden]`; the embedding where the two are tied.
    Output,
    /// A weight of a layer, numbered from 0.
    Layer(usize, LayerWeight),
}

/// A weight of one layer. Projections are `[outputs, inputs]`, vectors `[1, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerWeight {
    /// RMS norm before attention, `[1, hidden]`.
    AttnNorm,
    /// `[n_heads * head_dim, hidden]`.
    Q,
    /// `[n_kv_heads * head_dim, hidden]`.
    K,
    /// `[n_kv_heads * head_dim, hidden]`.
    V,
    /// `[hidden, n_heads * head_dim]`.
    O,
    /// `[1, n_heads * head_dim]`.
    QBias,
    /// `[1, n_kv_heads * head_dim]`.
    KBias,
    /// `[1, n_kv_heads * head_dim]`.
    VBias,
    /// RMS norm of every query head, `[1, head_dim]`.
    QNorm,
    /// RMS norm of every key head, `[1, head_dim]`.
    KNorm,
    /// RMS norm before the MLP, `[1, hidden]`.
    FfnNorm,
    /// `[ffn, hidden]`.
    Gate,
    /// `[ffn, hidden]`.
    Up,
    /// `[hidden, ffn]`.
    Down,
    /// NOSA's A: factor of a KV head's content importance, `[1, n_kv_heads]`.
    ImportanceScale,
    /// NOSA's delta: content importance from the values of all KV heads, `[n_kv_heads, n_kv_heads * head_dim]`.
    Importance,
}

impl LayerWeight {
    /// All of them, in the order of the forward pass.
    pub const ALL: [LayerWeight; 16] = [
        LayerWeight::AttnNorm,
        LayerWeight::Q,
        LayerWeight::K,
        LayerWeight::V,
        LayerWeight::QBias,
        LayerWeight::KBias,
        LayerWeight::VBias,
        LayerWeight::QNorm,
        LayerWeight::KNorm,
        LayerWeight::O,
        LayerWeight::FfnNorm,
        LayerWeight::Gate,
        LayerWeight::Up,
        LayerWeight::Down,
        LayerWeight::ImportanceScale,
        LayerWeight::Importance,
    ];
}

impl Weight {
    /// `[rows, cols]` in a model of this configuration; `None` where it has no such weight.
    pub fn expected_shape(self, c: &ModelConfig) -> Option<[usize; 2]> {
        use LayerWeight as L;
        let (q, kv) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        let (layer, weight) = match self {
            Weight::Embed | Weight::Output => return Some([c.vocab, c.hidden]),
            Weight::OutputNorm => return Some([1, c.hidden]),
            Weight::Layer(layer, weight) => (layer, weight),
        };
        let there = layer < c.n_layers
            && match weight {
                L::QBias | L::KBias | L::VBias => c.qkv_bias,
                L::QNorm | L::KNorm => c.qk_norm,
                L::ImportanceScale | L::Importance => c.importance.is_some(),
                _ => true,
            };
        there.then_some(match weight {
            L::AttnNorm | L::FfnNorm => [1, c.hidden],
            L::Q => [q, c.hidden],
            L::K | L::V => [kv, c.hidden],
            L::O => [c.hidden, q],
            L::QBias => [1, q],
            L::KBias | L::VBias => [1, kv],
            L::QNorm | L::KNorm => [1, c.head_dim],
            L::Gate | L::Up => [c.ffn, c.hidden],
            L::Down => [c.hidden, c.ffn],
            L::ImportanceScale => [1, c.n_kv_heads],
            L::Importance => [c.n_kv_heads, kv],
        })
    }

    /// Every weight that a model of this configuration stores, `Output` last and only when untied.
    pub fn all(c: &ModelConfig) -> impl Iterator<Item = Weight> + '_ {
        let layers = (0..c.n_layers)
            .flat_map(|l| LayerWeight::ALL.map(|w| Weight::Layer(l, w)))
            .filter(|w| w.expected_shape(c).is_some());
        let output = (!c.tie_embeddings).then_some(Weight::Output);
        [Weight::Embed].into_iter().chain(layers).chain([Weight::OutputNorm]).chain(output)
    }
}

/// Where one tensor lies. The byte range is inside file `file`.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub file: usize,
    pub quant: Quant,
    pub shape: [usize; 2],
    pub bytes: Range<usize>,
    /// Head dimension, where rows are stored in interleaved rotary order.
    pub interleaved: Option<usize>,
}

/// Backing storage of the tensors.
#[derive(Debug)]
enum Files {
    Shards(Vec<Mapped>),
    Gguf(Box<Gguf>),
    /// No files: values are drawn.
    Random(RandomWeights),
}

/// An opened model: configuration, and weights that stay mapped in their files.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    files: Files,
    places: HashMap<Weight, Place>,
}

impl Checkpoint {
    /// Settles what depends on the longest text that will be read; see [`RopeScaling::Long`](super::RopeScaling::Long).
    /// The fingerprint stays.
    pub(crate) fn settle(&mut self, context: usize) {
        self.config.settle(context);
    }

    /// Opens a Hugging Face folder or a `.gguf` file and checks that every tensor of the
    /// architecture is there in the shape the configuration asks for.
    ///
    /// # Errors
    /// Every variant of [`ModelError`] that speaks of a file.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| ModelError::io(path, "open", e))?;
        let (config, files, found) = if meta.is_dir() {
            let (config, shards, found) = weights_hf::open(path)?;
            (config, Files::Shards(shards), found)
        } else {
            let gguf = Gguf::open(path)?;
            let config = ModelConfig::from_gguf(&gguf)?;
            let found = weights_gguf::places(&gguf, &config)?;
            (config, Files::Gguf(Box::new(gguf)), found)
        };
        let mut places = HashMap::with_capacity(found.len());
        for weight in Weight::all(&config) {
            let (name, place) = match found.get(&weight) {
                Some((name, place)) => (name.clone(), place.clone()),
                None => {
                    return Err(ModelError::MissingTensor {
                        path: path.to_owned(),
                        name: match files {
                            Files::Gguf(_) => weights_gguf::name_of(weight),
                            _ => weights_hf::name_of(weight),
                        },
                    });
                }
            };
            let expected = weight.expected_shape(&config).unwrap_or_default();
            if place.shape != expected {
                return Err(ModelError::ShapeMismatch {
                    path: path.to_owned(),
                    name,
                    expected: expected.to_vec(),
                    found: place.shape.to_vec(),
                });
            }
            places.insert(weight, place);
        }
        if let (true, Some(embed)) = (config.tie_embeddings, places.get(&Weight::Embed).cloned()) {
            places.insert(Weight::Output, embed);
        }
        Ok(Self { path: path.to_owned(), config, files, places })
    }

    /// A model of a named shape (`llama-3.1-8b`, `qwen3-8b`, `minicpm4.1-8b`, `nosa-8b`,
    /// `smollm2-135m`) with random weights,
    /// always the same ones: for timing.
    ///
    /// # Errors
    /// [`ModelError::UnknownShape`] with the known names for any other.
    pub fn random(shape: &str) -> Result<Self> {
        let config = random::config(shape)?;
        let place = |w: Weight| {
            let shape = w.expected_shape(&config)?;
            let bytes = 0..shape[0] * shape[1] * 2;
            Some((w, Place { file: 0, quant: Quant::BF16, shape, bytes, interleaved: None }))
        };
        let mut places: HashMap<_, _> = Weight::all(&config).filter_map(place).collect();
        places.extend(place(Weight::Output));
        let path = PathBuf::from(&config.name);
        Ok(Self { path, config, files: Files::Random(RandomWeights::new()), places })
    }

    /// The model called `name`: [`resolve`](super::resolve)d and opened, or `random:<shape>`.
    ///
    /// # Errors
    /// As [`resolve`](super::resolve), [`Checkpoint::open`] and [`Checkpoint::random`].
    pub fn named(name: &str, progress: super::fetch::Progress<'_>) -> Result<Self> {
        match name.strip_prefix(random::RANDOM) {
            Some(shape) => Self::random(shape),
            None => Self::open(&super::resolve(name, progress)?),
        }
    }

    /// Its weights are random.
    pub fn is_random(&self) -> bool {
        matches!(self.files, Files::Random(_))
    }

    /// What the model looks like.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The GGUF file behind the checkpoint, if it is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.files {
            Files::Gguf(gguf) => Some(gguf),
            _ => None,
        }
    }

    /// Whether the model has this weight (`Output` always, tied or not).
    pub fn has(&self, weight: Weight) -> bool {
        self.places.contains_key(&weight)
    }

    /// `[rows, cols]`; vectors are `[1, n]`.
    ///
    /// # Errors
    /// `MissingTensor` for a weight this architecture does not have.
    pub fn shape(&self, weight: Weight) -> Result<[usize; 2]> {
        Ok(self.place(weight)?.shape)
    }

    /// How the weight is stored in the file.
    ///
    /// # Errors
    /// `MissingTensor` for a weight this architecture does not have.
    pub fn quant(&self, weight: Weight) -> Result<Quant> {
        Ok(self.place(weight)?.quant)
    }

    /// Converts `rows` of a weight to f32 into `out`, row-major `[rows.len(), cols]`.
    ///
    /// Rows of Q and K (and their biases) come in half-split rotary order whatever the file's
    /// order is: row `i` of a head rotates with row `i + head_dim / 2`.
    ///
    /// # Errors
    /// `MissingTensor`, or `Request` when the rows or the length of `out` do not fit the weight.
    pub fn read_rows(&self, weight: Weight, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let place = self.place(weight)?;
        let [n_rows, cols] = place.shape;
        let request = |what: String| ModelError::Request { name: weight.to_string(), what };
        if rows.start > rows.end || rows.end > n_rows {
            return Err(request(format!("rows {rows:?} of {n_rows}")));
        }
        let wanted = (rows.end - rows.start) * cols;
        if out.len() != wanted {
            return Err(request(format!("a buffer of {} elements for {wanted}", out.len())));
        }
        if wanted == 0 {
            return Ok(());
        }
        if let Files::Random(values) = &self.files {
            values.read(weight, rows.start, cols, out);
            return Ok(());
        }
        let bytes = self.stored(place);
        let row_bytes = bytes.len() / n_rows;
        let stored = |r: Range<usize>| &bytes[r.start * row_bytes..r.end * row_bytes];
        match place.interleaved {
            None => place.quant.dequantize(stored(rows), out),
            // A bias: one row, whose elements are in interleaved order.
            Some(head_dim) if n_rows == 1 => {
                let mut row = vec![0.0; cols];
                place.quant.dequantize(stored(rows), &mut row);
                for (r, o) in out.iter_mut().enumerate() {
                    *o = row[weights_gguf::interleaved_row(r, head_dim)];
                }
            }
            Some(head_dim) => {
                for (r, o) in rows.zip(out.chunks_exact_mut(cols)) {
                    let from = weights_gguf::interleaved_row(r, head_dim);
                    place.quant.dequantize(stored(from..from + 1), o);
                }
            }
        }
        Ok(())
    }

    /// Reads a whole weight as f32, row-major.
    ///
    /// # Errors
    /// `MissingTensor`.
    pub fn read(&self, weight: Weight) -> Result<Vec<f32>> {
        let [rows, cols] = self.shape(weight)?;
        let mut out = vec![0.0; rows * cols];
        self.read_rows(weight, 0..rows, &mut out)?;
        Ok(out)
    }

    /// Bytes of the stored weights, a tied matrix counted once.
    pub fn bytes_total(&self) -> u64 {
        Weight::all(&self.config)
            .filter_map(|w| self.places.get(&w))
            .map(|p| p.bytes.len() as u64)
            .sum()
    }

    /// Sixteen hex digits that name this model: a hash of its configuration, of every tensor's
    /// type and shape, and of a few bytes from the middle of every tensor. Independent of where
    /// the files lie and of the model's display name.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let config = ModelConfig { name: String::new(), ..self.config.clone() };
        hash.update(serde_json::to_string(&config).unwrap_or_default());
        for weight in Weight::all(&self.config) {
            let Some(place) = self.places.get(&weight) else {
                continue;
            };
            hash.update(format!("{} {} {:?}", weight.key(), place.quant.name(), place.shape));
            let bytes = self.stored(place);
            let from = bytes.len() / 2;
            hash.update(&bytes[from..bytes.len().min(from + 64)]);
        }
        hex(&hash.finalize()[..8])
    }

    fn place(&self, weight: Weight) -> Result<&Place> {
        self.places.get(&weight).ok_or_else(|| ModelError::MissingTensor {
            path: self.path.clone(),
            name: weight.to_string(),
        })
    }

    /// A tensor as it lies in its file; empty where there is none.
    fn stored(&self, place: &Place) -> &[u8] {
        let file = match &self.files {
            Files::Gguf(gguf) => gguf.bytes(),
            Files::Shards(shards) => shards[place.file].bytes(),
            Files::Random(_) => return &[],
        };
        &file[place.bytes.clone()]
    }
}
