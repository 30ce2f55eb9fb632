//! From a model's name to its weights: files, configuration, tokenizer, chat template.

pub mod attention;
mod audit;
pub mod chat;
pub mod config;
mod config_gguf;
mod config_hf;
mod decoder;
pub mod error;
pub mod fetch;
pub mod gguf;
mod gguf_cursor;
mod key_order;
mod load;
pub mod mapped;
pub mod quant;
mod step;
pub mod tokenizer;
mod tokenizer_gguf;
pub mod weights;
mod weights_gguf;
mod weights_hf;
mod workspace;

pub use attention::Attention;
pub use audit::LayerAudit;
pub use chat::{ChatTemplate, Message};
pub use config::{Arch, ModelConfig, RopeScaling};
pub use decoder::{Decoder, DecoderLimits};
pub use error::ModelError;
pub use fetch::{cache_dir, resolve};
pub use key_order::{KeyOrder, OrderSource, pair_energies};
pub use load::LoadError;
pub use quant::Quant;
pub use step::{Step, StepSeq};
pub use tokenizer::{DecodeStream, EncodeOptions, Tokenizer};
pub use weights::{Checkpoint, LayerWeight, Weight};
