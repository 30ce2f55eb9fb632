//! The backend trait: device memory and the ops that the engine is built from.
//!
//! An op takes device tensors and a parameter struct with named fields, records itself on the backend's
//! stream in call order, and returns. Nothing is read back unless [`Backend::download`] or
//! [`Backend::sync`] is called. Backends know neither models nor methods. One op has one name: the trait
//! method, `src/backend/cpu/<op>.rs`, `shaders/<op>.wgsl`, `kernels/<op>.cu` and the conformance group.
//!
//! ```
//! use longsight::backend::{DType, RmsNorm, open};
//!
//! let device = open("cpu")?;
//! let x = device.alloc(DType::F32, 4, "two rows")?;
//! let weight = device.alloc(DType::F32, 2, "norm weight")?;
//! let out = device.alloc(DType::F32, 4, "normed rows")?;
//! device.upload(&x, bytemuck::cast_slice(&[3.0f32, 4.0, 1.0, 1.0]))?;
//! device.upload(&weight, bytemuck::cast_slice(&[1.0f32, 2.0]))?;
//! device.rms_norm(&RmsNorm { x: &x, weight: &weight, out: &out, rows: 2, cols: 2, eps: 0.0 })?;
//! let mut normed = [0.0f32; 4];
//! device.download(&out, bytemuck::cast_slice_mut(&mut normed))?;
//! // The root of the mean square is sqrt(12.5) in the first row, 1 in the second.
//! let want = [3.0 / 12.5f32.sqrt(), 2.0 * 4.0 / 12.5f32.sqrt(), 1.0, 2.0];
//! assert!(normed.iter().zip(want).all(|(x, w)| (x - w).abs() < 1e-6));
//!
//! // Arguments that do not fit are refused.
//! let beyond = RmsNorm { x: &x, weight: &weight, out: &out, rows: 3, cols: 2, eps: 0.0 };
//! assert!(device.rms_norm(&beyond).is_err());
//! # Ok::<(), longsight::backend::BackendError>(())
//! ```

mod caps;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
mod open;
pub mod ops;
pub mod reference;
mod tensor;
#[cfg(feature = "wgpu")]
pub mod wgpu;

pub use caps::{Bandwidth, Capabilities, Topology};
pub use error::{BackendError, Result};
pub use open::{list, open, open_all};
pub use ops::*;
pub use tensor::{DType, DeviceBuffer, Tensor};

/// Byte alignment of every tensor passed to an op, inside its buffer.
pub const ALIGN: usize = 256;

/// Tokens of one KV page.
pub const PAGE: usize = 64;

/// Most dimensions of a head; also, it must be a multiple of 8.
pub const MAX_HEAD_DIM: usize = 256;

/// Most query heads that share a KV head.
pub const MAX_GROUP: usize = 16;

/// A device that runs the ops. Object safe: the model and the engine hold `Arc<dyn Backend>`.
///
/// Ops run in call order; a later op sees the writes of an earlier one. Output tensors must not overlap
/// inputs unless an op says that it works in place. Every op checks its arguments (`check` of its
/// parameter struct) and answers [`BackendError::BadArgument`] instead of reading out of bounds;
/// [`BackendError::Unsupported`] where the arguments fit but this backend has no kernel for their dtypes or sizes, with
/// both in the reason; [`BackendError::OutOfMemory`] where scratch memory finds no room; [`BackendError::Driver`] where
/// the device fails, possibly at a later call.
///
/// Byte offsets of the tensors passed to ops are multiples of [`ALIGN`] inside their buffers; backends may
/// rely on it. What lies beside a tensor, in rows and pages that no sequence owns, behind `kv_len` or between
/// strides is unspecified (it may be NaN): it must not reach a result, and it is never written. Conversions to a
/// narrower float round to nearest, ties to even. Every op gives the same bits when run again on the same
/// inputs. Every sequence of a call has at least one row.
///
/// Threads may share a backend: each op is recorded whole, and the calls of one thread keep their order.
pub trait Backend: Send + Sync {
    /// `cpu`, `wgpu` or `cuda`.
    fn name(&self) -> &'static str;
    /// What the device is and can do.
    fn caps(&self) -> &Capabilities;

    /// Allocates `len` elements, zero-filled. `what` names the buffer in errors. The buffer itself is aligned to
    /// at least [`ALIGN`] bytes.
    fn alloc(&self, dtype: DType, len: usize, what: &str) -> Result<Tensor>;
    /// Copies host bytes into `dst` (exactly `dst.bytes()`); ordered with the ops around it.
    fn upload(&self, dst: &Tensor, bytes: &[u8]) -> Result<()>;
    /// Waits for all recorded ops, then copies `src` into `out` (exactly `src.bytes()`).
    fn download(&self, src: &Tensor, out: &mut [u8]) -> Result<()>;
    /// Copies `src` to `dst` on the device; same dtype and length, no overlap ([`check_copy`]).
    fn copy(&self, src: &Tensor, dst: &Tensor) -> Result<()>;
    /// Sets every byte of `dst` to zero.
    fn zero(&self, dst: &Tensor) -> Result<()>;
    /// Waits until everything recorded has run. A lost device is reported here.
    fn sync(&self) -> Result<()>;
    /// Free device memory in bytes now, where the device can tell.
    fn free_memory(&self) -> Option<u64>;
    /// Measures host-to-device and device-read bandwidth (takes about a second).
    fn bandwidth(&self) -> Result<Bandwidth>;
    /// Runs `f` and returns the device time of what it recorded, in milliseconds; on CUDA from the first work on, so that
    /// the host's way to it does not count.
    fn time(&self, f: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.sync()?;
        let t = std::time::Instant::now();
        f()?;
        self.sync()?;
        Ok(t.elapsed().as_secs_f64() * 1e3)
    }
    /// Runs `f`, which records ops in a way that repeats from call to call: a backend may list what they launch and
    /// replay the list in parts. Where `f` answers false, what no part has begun with need not run. Whoever calls keeps
    /// the tensors that `f` uses until the call ends. By default `f` just runs.
    fn replayable(&self, f: &mut dyn FnMut() -> bool) -> Result<()> {
        f();
        Ok(())
    }
    /// Inside [`Backend::replayable`] a place where what was recorded so far may begin to run, while the rest is still
    /// being recorded. Calls must come at the same places every time.
    fn advance(&self) -> Result<()> {
        Ok(())
    }
    /// How many parts of calls of [`Backend::replayable`] were replayed so far.
    fn replayed(&self) -> u64 {
        0
    }
    /// How many splits of the KV range `attend_dense` (decode) or `attend_rows` should use so that queries of `act` of
    /// `groups` independent (sequence, KV head) pairs over `tokens` keys of `cache` each fill the device; 1 where the
    /// kernels see to that themselves.
    fn splits(&self, act: DType, cache: &KvPool<'_>, groups: usize, tokens: usize) -> usize {
        let _ = (act, cache, groups, tokens);
        1
    }

    /// Whether attention takes queries of `act` over a cache of `kv`.
    fn attends(&self, act: DType, kv: DType) -> bool {
        let _ = (act, kv);
        true
    }

    /// Token embedding; see [`Embed`].
    fn embed(&self, p: &Embed<'_>) -> Result<()>;
    /// Row gather; see [`GatherRows`].
    fn gather_rows(&self, p: &GatherRows<'_>) -> Result<()>;
    /// RMS normalisation; see [`RmsNorm`].
    fn rms_norm(&self, p: &RmsNorm<'_>) -> Result<()>;
    /// Matrix product with a weight; see [`Linear`].
    fn linear(&self, p: &Linear<'_>) -> Result<()>;
    /// Rotary embedding, with an optional per-head norm before it; see [`Rope`].
    fn rope(&self, p: &Rope<'_>) -> Result<()>;
    /// Two [`Backend::rope`]s that do not depend on each other, in one launch where the backend can.
    fn rope_both(&self, both: [&Rope<'_>; 2]) -> Result<()> {
        both.into_iter().try_for_each(|p| self.rope(p))
    }
    /// SwiGLU activation; see [`SwiGlu`].
    fn swiglu(&self, p: &SwiGlu<'_>) -> Result<()>;
    /// `linear` without bias into `swiglu.x`, and `swiglu` on it, in one launch where the backend can: what lies in
    /// `swiglu.x` afterwards is unspecified.
    fn linear_gated(&self, linear: &Linear<'_>, swiglu: &SwiGlu<'_>) -> Result<()> {
        ops::check_gated(linear, swiglu)?;
        self.linear(linear)?;
        self.swiglu(swiglu)
    }

    /// Content importance of new tokens, where attention adds it to their logits; see [`ContentBias`].
    fn content_bias(&self, p: &ContentBias<'_>) -> Result<()>;
    /// Appends new keys and values to the pages and their summaries; see [`KvAppend`].
    fn kv_append(&self, p: &KvAppend<'_>) -> Result<()>;
    /// `rope` of the queries and the keys of `ropes`, and `kv_append` of these keys, in one launch where the backend
    /// can; the same bits. In rows that no sequence of `append` has, what the embeddings leave is unspecified.
    fn rope_append(&self, ropes: [&Rope<'_>; 2], append: &KvAppend<'_>) -> Result<()> {
        ops::check_rope_append(ropes, append)?;
        self.rope_both(ropes)?;
        self.kv_append(append)
    }
    /// Running key statistics of the appended tokens; see [`KeyStats`].
    fn key_stats(&self, p: &KeyStats<'_>) -> Result<()>;
    /// Summaries of runs of the appended tokens' keys; see [`KvSummaries`].
    fn kv_summaries(&self, p: &KvSummaries<'_>) -> Result<()>;
    /// Chooses key dimensions by the query; see [`SelectDims`].
    fn select_dims(&self, p: &SelectDims<'_>) -> Result<()>;
    /// Rewrites changed columns of the compact slice; see [`RebuildSlice`].
    fn rebuild_slice(&self, p: &RebuildSlice<'_>) -> Result<()>;
    /// Queries and keys on directions of their own; see [`Project`].
    fn project(&self, p: &Project<'_>) -> Result<()>;

    /// Chosen key dimensions in few bits; see [`QuantiseKeys`].
    fn quantise_keys(&self, p: &QuantiseKeys<'_>) -> Result<()>;

    /// Partial logits on few key dimensions; see [`ScoreDims`].
    fn score_dims(&self, p: &ScoreDims<'_>) -> Result<()>;
    /// Partial logits of listed tokens; see [`ScoreRows`].
    fn score_rows(&self, p: &ScoreRows<'_>) -> Result<()>;
    /// Probabilities of keys, summed over a tile of rows; see [`ScoreTiles`].
    fn score_tiles(&self, p: &ScoreTiles<'_>) -> Result<()>;
    /// Pools per-query-head logits over a GQA group; see [`PoolScores`].
    fn pool_scores(&self, p: &PoolScores<'_>) -> Result<()>;
    /// `score_dims` for every head, and `pool_scores` of these logits, which need not be read for their sums of
    /// exponentials where the backend takes them while it scores.
    fn score_pool(&self, score: &ScoreDims<'_>, pool: &PoolScores<'_>) -> Result<()> {
        ops::check_score_pool(score, pool)?;
        self.score_dims(score)?;
        self.pool_scores(pool)
    }
    /// Forces sink and recent tokens into the selection; see [`Force`].
    fn force(&self, p: &Force<'_>) -> Result<()>;
    /// Drops the scores that a budget leaves out; see [`TrimScores`].
    fn trim_scores(&self, p: &TrimScores<'_>) -> Result<()>;
    /// Exact deterministic top-k; see [`TopK`].
    fn top_k(&self, p: &TopK<'_>) -> Result<()>;
    /// `force`, and `top_k` of the same scores, in one launch where the backend can.
    fn force_top_k(&self, force: &Force<'_>, top_k: &TopK<'_>) -> Result<()> {
        ops::check_forced(force, top_k)?;
        self.force(force)?;
        self.top_k(top_k)
    }

    /// Orders tokens by the turns of the heads' rankings; see [`UnionRanks`].
    fn union_ranks(&self, p: &UnionRanks<'_>) -> Result<()>;
    /// Lists that several steps attend with; see [`HoldLists`].
    fn hold_lists(&self, p: &HoldLists<'_>) -> Result<()>;

    /// Logits against summaries of runs of keys; see [`ScoreSummaries`].
    fn score_summaries(&self, p: &ScoreSummaries<'_>) -> Result<()>;
    /// Scores of blocks from scores of summaries; see [`PoolBlocks`].
    fn pool_blocks(&self, p: &PoolBlocks<'_>) -> Result<()>;
    /// Puts listed blocks first; see [`ForceBlocks`].
    fn force_blocks(&self, p: &ForceBlocks<'_>) -> Result<()>;
    /// Tokens of listed blocks; see [`ExpandBlocks`].
    fn expand_blocks(&self, p: &ExpandBlocks<'_>) -> Result<()>;

    /// Causal attention over all cached tokens; see [`AttendDense`].
    fn attend_dense(&self, p: &AttendDense<'_>) -> Result<()>;
    /// Attention over listed tokens; see [`AttendRows`].
    fn attend_rows(&self, p: &AttendRows<'_>) -> Result<()>;
    /// Merges split results by log-sum-exp; see [`Merge`].
    fn merge(&self, p: &Merge<'_>) -> Result<()>;
    /// The mean value in place of the tokens that were left out; see [`MeanValue`].
    fn mean_value(&self, p: &MeanValue<'_>) -> Result<()>;
}

/// Arguments of [`Backend::copy`] fit together: same dtype and length, no overlap.
///
/// # Errors
/// [`BackendError::BadArgument`], naming what does not fit.
pub fn check_copy(src: &Tensor, dst: &Tensor) -> Result<()> {
    const OP: &str = "copy";
    ops::is(OP, "dst", dst, src.dtype())?;
    ops::ensure(OP, src.len() == dst.len(), || {
        format!("{} elements into {}", src.len(), dst.len())
    })?;
    ops::apart(OP, &[("dst", dst)], &[("src", src)])
}

/// `bytes` of host memory match the tensor that [`Backend::upload`] or [`Backend::download`] names.
///
/// # Errors
/// [`BackendError::BadArgument`] with both sizes.
pub fn check_host(op: &'static str, t: &Tensor, bytes: usize) -> Result<()> {
    ops::ensure(op, t.bytes() == bytes, || {
        format!("{bytes} bytes on the host, {} on the device", t.bytes())
    })
}
