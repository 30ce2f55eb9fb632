//! Errors of calibration and training.

use crate::engine::EngineError;
use crate::model::ModelError;
use std::path::PathBuf;
use thiserror::Error;

/// What can go wrong while a model is measured or its Forecast is trained.
#[derive(Debug, Error)]
pub enum CalibrateError {
    /// The engine; [`EngineError::Interrupted`] when the caller stopped.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The model's files.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Not enough text.
    #[error(
        "the texts hold {have} pieces of {tokens} tokens, {need} are needed; give more text, or shorter pieces"
    )]
    TooLittleText {
        /// Whole pieces in the texts.
        have: usize,
        /// Tokens of a piece.
        tokens: usize,
        /// Pieces asked for.
        need: usize,
    },
    /// Options that do not fit the model or each other.
    #[error("{0}")]
    BadOption(String),
    /// The model computes no numbers.
    #[error("layer {0} computes values that are not finite; try another dtype (f32)")]
    NotFinite(usize),
    /// A file of an interrupted run that does not belong to this one.
    #[error("{} cannot be continued: {what}; remove it to start anew, or name another output", .path.display())]
    OtherRun {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A file that cannot be read or written.
    #[error("cannot {doing} {}: {source}", .path.display())]
    File {
        /// `read` or `write`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}
