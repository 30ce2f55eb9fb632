//! Errors of the engine.

use crate::backend::BackendError;
use crate::kv::PageError;
use crate::model::{LoadError, ModelError};
use crate::select::SelectError;
use thiserror::Error;

/// What can go wrong while building or running an engine.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The model files.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The method.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// No page left in the KV cache.
    #[error(transparent)]
    Cache(#[from] PageError),
    /// Options that do not fit the model.
    #[error("{0}")]
    BadOption(String),
    /// A model that would not fit in memory beside its cache.
    #[error(
        "the model's weights take {:.1} GB and a KV cache of {tokens} tokens {:.1} GB, but {:.1} GB of memory are free; \
         take a shorter context, a 16-bit dtype, a smaller model or another device",
        *.weights as f64 / 1e9,
        *.cache as f64 / 1e9,
        *.free as f64 / 1e9
    )]
    TooLarge {
        /// Bytes of the weights as the device holds them.
        weights: u64,
        /// Tokens that the cache is for.
        tokens: usize,
        /// Bytes of the cache.
        cache: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// A context that the model was not made for.
    #[error("a context of {context} tokens: this model was trained for 1 to {most}")]
    BadContext {
        /// Asked for, in tokens.
        context: usize,
        /// The most the model was trained for, in tokens.
        most: usize,
    },
    /// More tokens than the engine has room for.
    #[error(
        "the text has {tokens} tokens{room}, but {}",
        match *trained {
            true => format!("this model was trained for {limit}: shorten the text, or take a model that was trained for more"),
            false => format!("the context is {limit} tokens: shorten the text, or use a longer context"),
        }
    )]
    ContextTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// ", N more for the answer", or nothing.
        room: String,
        /// Context of the engine.
        limit: usize,
        /// This is the most that the model was trained for.
        trained: bool,
    },
    /// Nothing to run.
    #[error("the prompt is empty; give some text")]
    EmptyPrompt,
    /// All sequence slots are in use.
    #[error("all {0} sequence slots are in use; close one or build the engine with more")]
    NoSlot(usize),
    /// A sequence that was closed, or never opened.
    #[error("sequence {0} is not open")]
    NoSequence(usize),
    /// A model or method gone wrong: nothing can be drawn.
    #[error("none of the logits is finite; try another dtype (f32) or the dense method")]
    NoFiniteLogit,
    /// Stopped by the caller.
    #[error("interrupted")]
    Interrupted,
}

impl EngineError {
    /// The device has no room for what was asked for ([`BackendError::is_full`]).
    pub fn is_full(&self) -> bool {
        match self {
            EngineError::Backend(e) | EngineError::Select(SelectError::Backend(e)) => e.is_full(),
            _ => false,
        }
    }
}

impl From<LoadError> for EngineError {
    fn from(e: LoadError) -> Self {
        match e {
            LoadError::Model(e) => EngineError::Model(e),
            LoadError::Backend(e) => EngineError::Backend(e),
        }
    }
}
