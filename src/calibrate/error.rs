//! Errors of calibration and training.

use super::changed::{Changed, lines};
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
        "of {need} pieces of {tokens} tokens that are needed the texts hold {have}; give more text, shorter pieces or \
         fewer"
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
    /// Pieces of text in which nothing can be chosen.
    #[error(
        "a piece has {tokens} tokens, and a budget of {budget} blocks of {block} keeps {} of them anyway: nothing is \
         left to choose, so nothing to learn; give longer pieces or a smaller budget",
        .budget.saturating_mul(*.block)
    )]
    NoChoice {
        /// Tokens of the shortest piece.
        tokens: usize,
        /// Tokens of a block.
        block: usize,
        /// Blocks read in all.
        budget: usize,
        /// The fewest that such a budget can be.
        least: usize,
    },
    /// A file of an interrupted run with other settings.
    #[error(
        "{} is of a run with other settings:{}\nremove it to start anew, or name another output",
        .path.display(),
        lines(.changed)
    )]
    OtherSettings {
        /// The file.
        path: PathBuf,
        /// What differs.
        changed: Vec<Changed>,
    },
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
