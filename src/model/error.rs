//! What can go wrong between a model's name and its weights.

use std::path::{Path, PathBuf};

/// Every failure of the model-file layer. Each message names the file (or the
/// name that was asked for) and says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(
        "there is no {}; give a model folder, a .gguf file, a hub id such as org/name, or `smollm2`",
        .path.display()
    )]
    Missing { path: PathBuf },

    #[error("{} ends before its {what}; the download was probably cut short, fetch the file again", .path.display())]
    Truncated { path: PathBuf, what: String },

    #[error("{} is damaged or not a model file: {what}; fetch it again from its source", .path.display())]
    Corrupt { path: PathBuf, what: String },

    #[error(
        "{} is a `{arch}` model; the architectures that run here are llama, mistral, qwen2 and qwen3",
        .path.display()
    )]
    UnknownArchitecture { path: PathBuf, arch: String },

    #[error("{} has no tensor {name}, which its architecture needs; fetch the complete checkpoint", .path.display())]
    MissingTensor { path: PathBuf, name: String },

    #[error(
        "tensor {name} of {} has shape {found:?} where the model's configuration asks for {expected:?}; \
         configuration and weights belong to different models, fetch both again",
        .path.display()
    )]
    ShapeMismatch { path: PathBuf, name: String, expected: Vec<usize>, found: Vec<usize> },

    #[error(
        "tensor {name} of {} is stored as {dtype}, which is not read here; use a checkpoint in F32, F16 or BF16, \
         or a GGUF in one of Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K",
        .path.display()
    )]
    UnsupportedType { path: PathBuf, name: String, dtype: String },

    #[error("{} asks for {what}, which is not implemented; use a checkpoint without it", .path.display())]
    Unsupported { path: PathBuf, what: String },

    #[error("{} brings no tokenizer; put the model's tokenizer.json beside its weights", .path.display())]
    MissingTokenizer { path: PathBuf },

    #[error("the tokenizer of {} cannot be used: {what}; fetch the model's tokenizer again", .path.display())]
    Tokenizer { path: PathBuf, what: String },

    #[error("the model brings no chat template; ask with a plain prompt instead")]
    NoTemplate,

    #[error("the model's chat template failed: {what}; ask with a plain prompt instead")]
    Template { what: String },

    #[error("cannot fetch {name}: {what}")]
    Fetch { name: String, what: String },

    #[error("cannot {action} {}: {source}; check the path and its permissions", .path.display())]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },

    /// A caller's mistake, not a file's: rows outside a tensor, a buffer of the wrong length.
    #[error("wrong request for {name}: {what}")]
    Request { name: String, what: String },
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

/// Result of the model-file layer.
pub type Result<T> = std::result::Result<T, ModelError>;
