//! Sequences, steps, sampling and generation.
//!
//! ```no_run
//! # fn main() -> Result<(), longsight::engine::EngineError> {
//! use longsight::engine::{Engine, Request};
//!
//! let mut engine = Engine::builder().model("smollm2").device("auto").build()?;
//! for piece in engine.generate(Request::chat("Name three rivers."))? {
//!     print!("{}", piece?.text);
//! }
//! # Ok(())
//! # }
//! ```

mod audit;
mod builder;
mod calibrate;
mod error;
mod fork;
mod generate;
mod key_profile;
mod request;
mod reuse;
mod sampling;
mod scheduler;
mod sequences;
mod sizes;
mod step;
mod stop;
mod trace;

pub use audit::{AuditConfig, AuditSummary, Doubling, LayerSummary};
pub use builder::{EngineBuilder, Progress};
pub use error::EngineError;
pub use generate::Generation;
pub use request::{Event, Finish, Piece, Prompt, Request, Stats};
pub use sampling::{Sampler, Sampling, greedy};
pub use scheduler::Scheduler;
pub use sequences::{Engine, SeqId};
pub use step::{WantLogits, Work};
pub use stop::StopFilter;
pub use trace::{LayerTrace, TraceParts};
