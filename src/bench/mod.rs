//! Measurements: the whole model end to end, the attention of all its layers, and single ops against the device's own
//! ceilings.
//!
//! Every ceiling (device read bandwidth, the GEMM crate's peak) is taken in the run that is compared with it, and
//! reports keep the raw samples. Inputs are real text or random values, never zeros, and rotate over more memory
//! than caches hold.

mod arithmetic;
pub mod attention;
mod end_to_end;
mod environment;
pub mod kernels;
mod random;
mod report;
mod stats;

pub use arithmetic::{PrefillArithmetic, ShapeArithmetic};
pub use end_to_end::{EndToEnd, Progress};
pub use environment::Environment;
pub use report::{EndToEndReport, ModelFacts, Row, Traffic};
pub use stats::Summary;

use crate::backend::BackendError;
use crate::engine::EngineError;
use crate::select::SelectError;
use thiserror::Error;

/// What can go wrong in a measurement.
#[derive(Debug, Error)]
pub enum BenchError {
    /// Options that cannot be measured.
    #[error("{0}")]
    BadOption(String),
    /// The device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A method.
    #[error(transparent)]
    Select(#[from] SelectError),
}

/// Why something was not measured.
const INTERRUPTED: &str = "interrupted";

/// Result of a measurement.
pub type Result<T> = std::result::Result<T, BenchError>;

fn bad<T>(reason: impl Into<String>) -> Result<T> {
    Err(BenchError::BadOption(reason.into()))
}

/// Query heads and KV heads that attention takes.
fn check_heads(heads: usize, kv_heads: usize) -> Result<()> {
    let group = heads.checked_div(kv_heads).unwrap_or(0);
    if !(1..=16).contains(&group) || group * kv_heads != heads || heads > 1024 {
        return bad(format!(
            "{heads} query heads over {kv_heads} KV heads: each KV head serves 1 to 16 of at most 1024 (--heads, --kv-heads)"
        ));
    }
    Ok(())
}
