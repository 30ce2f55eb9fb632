//! What sparsity costs in quality: the same tokens decoded with every method from one shared prefill.
//!
//! Selection only happens while decoding, so a sample names the token from which it is fed one by one; what
//! comes before is prefilled densely, once, and every method continues a fork of it. Differences to dense are
//! paired, token by token.

mod bootstrap;
mod check;
mod draft;
mod long_output;
mod multikey;
mod needle;
mod positions;
mod recall;
mod ruler;
mod runner;
mod samples;
mod solve;
mod words;

pub use bootstrap::{Bootstrap, Interval};
pub use check::{Check, Items, Verdict};
pub use draft::TaskSource;
pub use long_output::{LONG_TASKS, LongTask, long_output};
pub use multikey::{MultikeySpec, multikey};
pub use needle::{NeedleSpec, needle};
pub use positions::{Paired, PairedConfig, PositionBucket, paired};
pub use recall::{HeadRecall, LayerRecall, RecallRow, churn, recall};
pub use ruler::{RULER_TASKS, RulerTask, ruler};
pub use runner::{Difference, Row, evaluate};
pub use samples::{
    DEPTHS, Sample, SampleError, continuation, copy, key_sequence, passkey, start_of_text,
};
pub use solve::{Answer, Cell, Problem, mean_score, solve};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use runner::Progress;

/// Random numbers that `parts` and the seed decide together (FNV-1a of their bytes).
fn seeded(seed: u64, parts: &[u64]) -> ChaCha8Rng {
    let bytes = std::iter::once(&seed).chain(parts).flat_map(|p| p.to_le_bytes());
    let hash = bytes
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    ChaCha8Rng::seed_from_u64(hash)
}
