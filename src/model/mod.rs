//! From a model's name to its weights: files, configuration, tokenizer, chat template.

pub mod chat;
pub mod config;
mod config_gguf;
mod config_hf;
pub mod error;
pub mod fetch;
pub mod gguf;
mod gguf_cursor;
pub mod mapped;
pub mod quant;
pub mod tokenizer;
mod tokenizer_gguf;
pub mod weights;
mod weights_gguf;
mod weights_hf;

pub use chat::{ChatTemplate, Message};
pub use config::{Arch, ModelConfig, RopeScaling};
pub use error::ModelError;
pub use fetch::resolve;
pub use tokenizer::{DecodeStream, EncodeOptions, Tokenizer};
pub use weights::{Checkpoint, LayerWeight, Weight};
