//! What can go wrong between a model's name and its weights.

use crate::names::did_you_mean;
use std::path::{Path, PathBuf};

/// Every failure of the model-file layer. Each message names the file (or the
/// name that was asked for) and says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// No file with Forecast projections.
    #[error("there is no Forecast in {}; `train-forecast` makes one, `lookahead` needs none", .path.display())]
    NoForecast {
        /// File that was asked for.
        path: PathBuf,
    },
    /// A file without Forecast projections.
    #[error(
        "{} holds no Forecast ({what}); `train-forecast` makes one for this model, `lookahead` needs none",
        .path.display()
    )]
    NotAForecast {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        what: String,
    },
    /// Nothing under this name.
    #[error(
        "there is no {}; give a model folder, a .gguf file, a hub id such as org/name, `smollm2` or `tiny`{}",
        .path.display(),
        meant(.path)
    )]
    Missing {
        /// File or folder.
        path: PathBuf,
    },

    /// No such shape of random weights.
    #[error("there is no {name}; models with random weights are {known}{meant}")]
    UnknownShape {
        /// What was asked for.
        name: String,
        /// Comma-separated names.
        known: String,
        /// "; did you mean `x`?", or nothing.
        meant: String,
    },

    /// The file is too short.
    #[error("{} ends before its {what}; the download was probably cut short, fetch the file again", .path.display())]
    Truncated {
        /// File or folder.
        path: PathBuf,
        /// What is cut off.
        what: String,
    },

    /// The file contradicts itself or its format.
    #[error("{} is damaged or not a model file: {what}; fetch it again from its source", .path.display())]
    Corrupt {
        /// File or folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },

    /// An architecture that is not computed here.
    #[error(
        "{} is a `{arch}` model; the architectures that run here are llama, mistral, qwen2, qwen3 and minicpm",
        .path.display()
    )]
    UnknownArchitecture {
        /// File or folder.
        path: PathBuf,
        /// Its name in the file.
        arch: String,
    },

    /// A tensor is not in the checkpoint.
    #[error("{} has no tensor {name}, which its architecture needs; fetch the complete checkpoint", .path.display())]
    MissingTensor {
        /// File or folder.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
    },

    /// A tensor of another size than the configuration says.
    #[error(
        "tensor {name} of {} has shape {found:?} where the model's configuration asks for {expected:?}; \
         configuration and weights belong to different models, fetch both again",
        .path.display()
    )]
    ShapeMismatch {
        /// File or folder.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Shape by the configuration, row-major.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },

    /// A Forecast of another model.
    #[error(
        "the Forecast {} was trained for model {trained_for}, the loaded model is {model}; train one for it with \
         `longsight train-forecast`",
        .path.display()
    )]
    WrongForecast {
        /// The Forecast's file.
        path: PathBuf,
        /// Fingerprint in the file.
        trained_for: String,
        /// Fingerprint of the model.
        model: String,
    },

    /// A storage type that is not read.
    #[error(
        "tensor {name} of {} is stored as {dtype}, which is not read here; use a checkpoint in F32, F16 or BF16, \
         or a GGUF in one of Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K",
        .path.display()
    )]
    UnsupportedType {
        /// File or folder.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// The type, as the file calls it.
        dtype: String,
    },

    /// Something in the configuration that is not implemented.
    #[error("{} asks for {what}, which is not implemented; use a checkpoint without it", .path.display())]
    Unsupported {
        /// File or folder.
        path: PathBuf,
        /// What it is.
        what: String,
    },

    /// No tokenizer beside the weights or in the file.
    #[error("{} brings no tokenizer; put the model's tokenizer.json beside its weights", .path.display())]
    MissingTokenizer {
        /// File or folder.
        path: PathBuf,
    },

    /// A tokenizer that cannot be built, or cannot read a text.
    #[error("the tokenizer of {} cannot be used: {what}; fetch the model's tokenizer again", .path.display())]
    Tokenizer {
        /// File or folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },

    /// A chat was asked of a model without a chat template.
    #[error("the model brings no chat template; ask with a plain prompt instead")]
    NoTemplate,

    /// The chat template does not compile or render.
    #[error("the model's chat template failed: {what}; ask with a plain prompt instead")]
    Template {
        /// What its engine said.
        what: String,
    },

    /// A model could not be fetched.
    #[error("cannot fetch {name}: {what}")]
    Fetch {
        /// What was asked for.
        name: String,
        /// What went wrong, and what to do.
        what: String,
    },

    /// The system refused a file.
    #[error("cannot {action} {}: {source}; check the path and its permissions", .path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// `read`, `open` and the like.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },

    /// A caller's mistake, not a file's: rows outside a tensor, a buffer of the wrong length.
    #[error("wrong request for {name}: {what}")]
    Request {
        /// Name of the tensor.
        name: String,
        /// What is wrong.
        what: String,
    },
}

impl ModelError {
    pub(crate) fn corrupt(path: &Path, what: impl Into<String>) -> Self {
        ModelError::Corrupt { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn truncated(path: &Path, what: impl Into<String>) -> Self {
        ModelError::Truncated { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Into<String>) -> Self {
        ModelError::Unsupported { path: path.to_owned(), what: what.into() }
    }

    /// `Missing` for a file that is not there, `Io` for everything else.
    pub(crate) fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::NotFound {
            return ModelError::Missing { path: path.to_owned() };
        }
        ModelError::Io { path: path.to_owned(), action, source }
    }
}

/// What a word that is no path may have meant.
fn meant(name: &Path) -> String {
    let word = name.to_str().filter(|w| !w.contains(['/', '\\', '.']));
    word.map_or(String::new(), |w| did_you_mean(w, ["smollm2", "tiny"]))
}

/// Result of the model-file layer.
pub type Result<T> = std::result::Result<T, ModelError>;
