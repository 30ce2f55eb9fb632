//! Which layers may use the token lists of which other layer: calibration for cross-layer reuse (Kascade,
//! arXiv 2512.16391).
//!
//! A text is read densely while queries and keys of all layers are copied to the host ([`TracedText`]). For every
//! tile of queries the mass that each layer puts on earlier keys is pooled, and its largest keys are its list
//! ([`tile_of`]). How much of layer b's mass layer a's list holds, relative to b's own list, is their similarity
//! ([`Statistics`]). A dynamic program then places the anchors ([`place_anchors`]), and every KV head of a layer
//! takes the list of the anchor's head that serves it best ([`Similarity::head_map`]).
//!
//! The engine prefills densely, so the statistics are those of a dense forward pass.

mod anchors;
mod changed;
mod error;
pub(crate) mod mass;
mod outcome;
mod run;
mod similarity;
pub(crate) mod state;
mod statistics;
mod text;
pub(crate) mod traced;

pub use anchors::{Placement, least_anchors, place_anchors, placements};
pub use changed::Changed;
pub use error::CalibrateError;
pub use mass::{LayerTile, step_of, tile_of};
pub use outcome::{Calibration, Choice};
pub use run::{Settings, gather};
pub use similarity::Similarity;
pub use statistics::{Objective, OwnTile, Statistics};
pub use text::{BUILT_IN_TEXT, pieces};
pub use traced::TracedText;
