//! Parameter structs of the ops, with their formulas, shapes and checks.
//!
//! Shapes are row-major, the last index fastest. `act` is the activation dtype (f32, or the weight dtype
//! where [`Capabilities::activations_follow_weights`](super::Capabilities) says so), `kv` the cache dtype.
//! All arithmetic accumulates in f32.

mod attend;
mod blocks;
mod content_bias;
mod dense;
mod dims;
mod expand_blocks;
mod force;
mod force_blocks;
mod hold_lists;
mod kv;
mod mean_value;
mod pool_scores;
mod project;
mod quantise_keys;
mod score;
mod score_rows;
mod score_tiles;
mod trim_scores;
mod union_ranks;

pub use attend::{AttendDense, AttendRows, Logits, Merge};
pub use blocks::{KvSummaries, PoolBlocks, ScoreSummaries, Summaries, SummaryKind};
pub use content_bias::ContentBias;
pub(crate) use dense::check_gated;
pub use dense::{Embed, GatherRows, Linear, QkNorm, RmsNorm, Rope, SwiGlu};
pub use dims::{CHANGED_WORDS, DIM_STATE_WORDS, DimMetric, RebuildSlice, Refresh, SelectDims};
pub use expand_blocks::ExpandBlocks;
pub use force::Force;
pub(crate) use force::check_forced;
pub use force_blocks::ForceBlocks;
pub use hold_lists::{HELD_WORDS, HoldLists};
pub(crate) use kv::check_rope_append;
pub use kv::{
    CompactSlice, Int8Keys, KeyStats, KvAppend, KvPool, META_WORDS, Meta, Seqs, key_stats_len,
};
pub use mean_value::MeanValue;
pub use pool_scores::PoolScores;
pub(crate) use pool_scores::check_score_pool;
pub use project::Project;
pub use quantise_keys::{QuantiseKeys, QuantisedSlice, SliceBits};
pub use score::{Among, HeadPool, LogitScale, ScoreDims, ScoreSource, Share, TopK};
pub use score_rows::ScoreRows;
pub use score_tiles::ScoreTiles;
pub use trim_scores::{Trim, TrimScores};
pub use union_ranks::UnionRanks;

use super::{BackendError, DType, Result, Tensor};

/// Fails with [`BackendError::BadArgument`] unless `ok`.
pub(crate) fn ensure(op: &'static str, ok: bool, reason: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(BackendError::BadArgument { op, reason: reason() }) }
}

/// The product of `shape`; `None` where it, or that of its sizes other than 0, is no `usize`.
fn product(shape: &[usize]) -> Option<usize> {
    let all = shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s.max(1)))?;
    Some(if shape.contains(&0) { 0 } else { all })
}

fn room(op: &'static str, name: &str, t: &Tensor, need: Option<usize>) -> Result<()> {
    ensure(op, need.is_some_and(|n| t.len() >= n), || match need {
        Some(n) => format!("{name} holds {} elements, needs {n}", t.len()),
        None => format!("{name} holds {} elements, needs more than can be counted", t.len()),
    })
}

/// `t` holds at least the elements of `shape`.
pub(crate) fn holds(op: &'static str, name: &str, t: &Tensor, shape: &[usize]) -> Result<()> {
    room(op, name, t, product(shape))
}

/// `t` holds `rows` rows of `width` elements (a shape), `stride` elements from one to the next.
pub(crate) fn holds_rows(
    op: &'static str,
    name: &str,
    t: &Tensor,
    rows: usize,
    stride: usize,
    width: &[usize],
) -> Result<()> {
    let before = product(&[rows.saturating_sub(1), stride]);
    let last = product(width).map(|n| if rows == 0 { 0 } else { n });
    room(op, name, t, before.zip(last).and_then(|(a, b)| a.checked_add(b)))
}

/// `t` has dtype `d`.
pub(crate) fn is(op: &'static str, name: &str, t: &Tensor, d: DType) -> Result<()> {
    ensure(op, t.dtype() == d, || format!("{name} is {}, must be {d}", t.dtype()))
}

/// A tensor and its name in errors.
pub(crate) type Named<'a> = (&'static str, &'a Tensor);

/// No output shares bytes with an input or with another output.
pub(crate) fn apart(op: &'static str, outs: &[Named<'_>], ins: &[Named<'_>]) -> Result<()> {
    for (i, (name, out)) in outs.iter().enumerate() {
        for (other, t) in outs[i + 1..].iter().chain(ins) {
            ensure(op, !out.overlaps(t), || format!("{name} overlaps {other}"))?;
        }
    }
    Ok(())
}

/// `t` has a float dtype.
pub(crate) fn float(op: &'static str, name: &str, t: &Tensor) -> Result<()> {
    ensure(op, t.dtype().is_float(), || format!("{name} is {}, must be a float", t.dtype()))
}
