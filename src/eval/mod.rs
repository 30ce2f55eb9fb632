//! What sparsity costs in quality: the same tokens decoded with every method from one shared prefill.
//!
//! Selection only happens while decoding, so a sample names the token from which it is fed one by one; what
//! comes before is prefilled densely, once, and every method continues a fork of it. Differences to dense are
//! paired, token by token.

mod ruler;
mod runner;
mod samples;
mod solve;

pub use ruler::{RULER_TASKS, RulerSource, RulerTask, ruler};
pub use runner::{Difference, Row, evaluate};
pub use samples::{
    DEPTHS, Sample, SampleError, continuation, copy, key_sequence, passkey, start_of_text,
};
pub use solve::{Answer, Problem, mean_score, solve};
