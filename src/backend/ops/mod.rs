//! Parameter structs of the ops, with their formulas, shapes and checks.
//!
//! Shapes are row-major, the last index fastest. `act` is the activation dtype (f32, or the weight dtype
//! where [`Capabilities::activations_follow_weights`](super::Capabilities) says so), `kv` the cache dtype.
//! All arithmetic accumulates in f32.

mod attend;
mod dense;
mod kv;
mod score;

pub use attend::{AttendDense, AttendRows, Merge};
pub use dense::{Embed, GatherRows, Linear, QkNorm, RmsNorm, Rope, SwiGlu};
pub use kv::{
    CompactSlice, Int8Keys, KeyStats, KvAppend, KvPool, META_WORDS, Meta, Seqs, key_stats_len,
};
pub use score::{
    CHANGED_WORDS, DIM_STATE_WORDS, DimMetric, Force, LogitScale, Pool, PoolScores, RebuildSlice,
    Refresh, ScoreDims, ScoreSource, SelectDims, TopK,
};

use super::{BackendError, DType, Result, Tensor};

/// Fails with [`BackendError::BadArgument`] unless `ok`.
pub(crate) fn ensure(op: &'static str, ok: bool, reason: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(BackendError::BadArgument { op, reason: reason() }) }
}

/// `t` holds at least `need` elements.
pub(crate) fn holds(op: &'static str, name: &str, t: &Tensor, need: usize) -> Result<()> {
    ensure(op, t.len() >= need, || format!("{name} holds {} elements, needs {need}", t.len()))
}

/// `t` has dtype `d`.
pub(crate) fn is(op: &'static str, name: &str, t: &Tensor, d: DType) -> Result<()> {
    ensure(op, t.dtype() == d, || format!("{name} is {}, must be {d}", t.dtype()))
}

/// `a` and `b` share no bytes.
pub(crate) fn apart(op: &'static str, an: &str, a: &Tensor, bn: &str, b: &Tensor) -> Result<()> {
    ensure(op, !a.overlaps(b), || format!("{an} overlaps {bn}"))
}

/// `t` has a float dtype.
pub(crate) fn float(op: &'static str, name: &str, t: &Tensor) -> Result<()> {
    ensure(op, t.dtype().is_float(), || format!("{name} is {}, must be a float", t.dtype()))
}
