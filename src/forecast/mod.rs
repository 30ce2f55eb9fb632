//! Training of Forecast projections (SparDA, arXiv 2606.04511): one small matrix per layer that says, from the input
//! of layer l, which blocks of 64 tokens layer l + 1 will read.
//!
//! The model is frozen. A text is read densely ([`TracedText`](crate::calibrate::TracedText)); for every query the
//! blocks that the real queries of a layer prefer are the teacher ([`Teacher`]), and the matrix is trained so that
//! its own distribution over compressed keys agrees with the teacher's (a KL divergence restricted to the blocks
//! that are really chosen). Each loss has a gradient into exactly one matrix, in closed form. What comes out is a
//! safetensors file with the published checkpoint's names.

mod grid;
mod learn;
mod lesson;
mod lookahead;
mod loss;
mod optimizer;
mod pieces;
mod prepared;
mod report;
mod rotary;
mod schedule;
mod state;
mod teacher;
mod train;
mod weights;

pub use grid::Grid;
pub use optimizer::AdamW;
pub use report::{LayerRecall, Scores, held_out};
pub use schedule::{Decay, Schedule};
pub use teacher::Teacher;
pub use train::{StepReport, TrainSettings, train};
pub use weights::{Forecast, Start};
