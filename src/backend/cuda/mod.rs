//! NVIDIA GPUs through the driver API: compute capability 8.0 and newer.
//!
//! One stream; kernels come from `kernels/<op>.cu`, embedded as machine code or compiled at first use
//! (`nvrtc.rs`). Everything that varies inside a step is read from device memory by the kernels; grids are
//! sized from the bounds in the parameter structs. Environment variables:
//!
//! * `LONGSIGHT_CUBLAS=off` keeps cuBLASLt out;
//! * `LONGSIGHT_CUDA_GRAPHS=off` runs steps kernel by kernel (`replay.rs`, `options.rs`);
//! * `LONGSIGHT_CUDA_OVERLAP=off` places no block of a kernel before the kernel before has ended (`launch.rs`);
//! * `LONGSIGHT_CUDA_WGMMA=off` reads prompts by the kernels of older GPUs, and in decode steps does without the copy
//!   engine (`hopper.rs`);
//! * `LONGSIGHT_CACHE` moves the cache of kernels compiled at run time.

mod args;
mod attend;
mod bandwidth;
mod blas;
mod blocks;
mod clock;
mod dense;
mod driver;
mod error;
mod hopper;
mod kv;
mod launch;
mod linear;
mod lists;
mod memory;
mod nvrtc;
mod options;
mod parts;
mod replay;
mod score;
mod tiles;
mod top_k;

pub use options::CudaOptions;

use super::ops::check_forced;
use super::{
    AttendDense, AttendRows, Backend, BackendError, Bandwidth, Capabilities, ContentBias, DType,
    Embed, ExpandBlocks, Force, ForceBlocks, GatherRows, HoldLists, KeyStats, KvAppend, KvPool,
    KvSummaries, Linear, MeanValue, Merge, PoolBlocks, PoolScores, Project, QuantiseKeys,
    RebuildSlice, Result, RmsNorm, Rope, ScoreDims, ScoreRows, ScoreSummaries, ScoreTiles,
    SelectDims, SwiGlu, Tensor, TopK, TrimScores, UnionRanks, check_copy, check_host,
};
use blas::Blas;
use clock::timed;
use cudarc::driver::{CudaContext, CudaStream};
use driver::Limits;
use error::Said;
use launch::{Args, Kernels, Shape};
use memory::{Memory, Staging};
use replay::{Node, Replays, Runner};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

/// A CUDA device.
pub struct CudaBackend {
    caps: Capabilities,
    limits: Limits,
    ctx: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernels: Kernels,
    blas: Option<Blas>,
    staging: Mutex<Staging>,
    scratch: Mutex<Option<Arc<Memory>>>,
    replays: Replays,
    /// For every pair of a decode attention how many of its parts are done; zero between kernels.
    arrived: Arc<Memory>,
}

/// Pairs of sequence and KV head that a decode attention takes.
const PAIRS: usize = 1 << 18;

/// The scratch memory for the time of one op.
struct Scratch<'a> {
    ptr: u64,
    _turn: MutexGuard<'a, Option<Arc<Memory>>>,
}

impl fmt::Debug for CudaBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaBackend").field("caps", &self.caps).finish_non_exhaustive()
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // Modules must not be unloaded under running kernels.
        let _ = self.stream.synchronize();
    }
}

/// Capabilities of every CUDA device of this machine.
///
/// # Errors
/// [`BackendError::Unavailable`] without a driver or a device, or when a device is too old.
pub fn list() -> Result<Vec<Capabilities>> {
    (0..driver::count()?).map(|i| Ok(driver::describe(i)?.0)).collect()
}

impl CudaBackend {
    /// Opens device `ordinal` (0 is the first), with what the environment says.
    ///
    /// # Errors
    /// Those of [`CudaBackend::open_with`].
    pub fn open(ordinal: usize) -> Result<CudaBackend> {
        CudaBackend::open_with(ordinal, CudaOptions::from_environment())
    }

    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// [`BackendError::Unavailable`] with a sentence that says what is missing; [`BackendError::Driver`] when
    /// the driver fails.
    pub fn open_with(ordinal: usize, options: CudaOptions) -> Result<CudaBackend> {
        let (caps, limits) = driver::describe(ordinal)?;
        let ctx = CudaContext::new(ordinal).said("opening the device")?;
        // SAFETY: one stream orders everything; no slice of cudarc's own is ever shared between streams.
        unsafe { ctx.disable_event_tracking() };
        let stream = ctx.new_stream().said("creating a stream")?;
        let arrived = Arc::new(Memory::new(&stream, PAIRS * 4, "counters")?);
        Ok(CudaBackend {
            arrived,
            caps,
            limits,
            kernels: Kernels::new(ctx.clone(), limits, options.overlap),
            blas: Blas::open(&stream),
            staging: Mutex::new(Staging::new(&stream)),
            scratch: Mutex::default(),
            replays: Replays::new(&ctx, options.graphs)?,
            ctx,
            stream,
        })
    }

    fn ptr(&self, op: &'static str, t: &Tensor) -> Result<u64> {
        memory::address(op, t, &self.stream)
    }

    /// Launches a kernel whose arguments an op's `check` has gone over.
    fn launch(&self, op: &'static str, entry: &str, shape: Shape, args: Args) -> Result<()> {
        self.submit(Node::Kernel { op, entry: entry.into(), shape, args })
    }

    /// Clusters of this shape that the device holds at once.
    fn clusters(&self, op: &'static str, entry: &str, shape: Shape) -> Result<usize> {
        self.kernels.clusters(&self.stream, op, entry, shape)
    }

    fn runner(&self) -> Runner<'_> {
        Runner { kernels: &self.kernels, blas: self.blas.as_ref(), scratch: &self.scratch }
    }

    /// Runs `node`, or lists it where this thread records.
    fn submit(&self, node: Node) -> Result<()> {
        let Some(node) = self.replays.listed(node) else { return Ok(()) };
        clock::begin(&self.stream)?;
        // SAFETY: every caller builds a kernel's arguments from the struct of that kernel and from tensors that the
        // op's `check` found large enough; their memory is freed only after the stream has drained.
        unsafe { self.runner().run(&node, &self.stream) }
    }

    /// What this thread has listed runs before what comes now.
    fn flush(&self) -> Result<()> {
        self.replays.flush(self.runner(), &self.stream)
    }

    fn unsupported(&self, op: &'static str, what: String) -> BackendError {
        BackendError::Unsupported { op, backend: "cuda", what }
    }

    /// At least `bytes` of device memory for use inside one op; ops share it, as the stream orders them. Keep it
    /// until the last kernel that uses it is launched: another thread's op must not come between them.
    fn scratch(&self, bytes: usize) -> Result<Scratch<'_>> {
        use crate::backend::DeviceBuffer;
        let mut held = self.scratch.lock().unwrap_or_else(|e| e.into_inner());
        let memory = match held.take().filter(|m| m.bytes() >= bytes) {
            Some(memory) => memory,
            None => {
                let size = bytes.next_power_of_two().max(1 << 16);
                Arc::new(Memory::new(&self.stream, size, "scratch space")?)
            }
        };
        self.replays.keep(&memory);
        let ptr = memory.ptr();
        *held = Some(memory);
        Ok(Scratch { ptr, _turn: held })
    }
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        "cuda"
    }
    fn caps(&self) -> &Capabilities {
        &self.caps
    }

    fn alloc(&self, dtype: DType, len: usize, what: &str) -> Result<Tensor> {
        let memory = Memory::new(&self.stream, memory::size(dtype, len, what)?, what)?;
        Ok(Tensor::from_buffer(Arc::new(memory), dtype, len))
    }
    fn upload(&self, dst: &Tensor, bytes: &[u8]) -> Result<()> {
        check_host("upload", dst, bytes.len())?;
        self.flush()?;
        let at = self.ptr("upload", dst)?;
        self.staging.lock().unwrap_or_else(|e| e.into_inner()).upload(at, bytes)
    }
    fn download(&self, src: &Tensor, out: &mut [u8]) -> Result<()> {
        check_host("download", src, out.len())?;
        self.flush()?;
        let at = self.ptr("download", src)?;
        if out.is_empty() {
            return self.sync();
        }
        self.staging.lock().unwrap_or_else(|e| e.into_inner()).download(at, out)
    }
    fn copy(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        check_copy(src, dst)?;
        let (from, to) = (self.ptr("copy", src)?, self.ptr("copy", dst)?);
        if src.is_empty() {
            return Ok(());
        }
        self.submit(Node::Copy { from, to, bytes: src.bytes() })
    }
    fn zero(&self, dst: &Tensor) -> Result<()> {
        let at = self.ptr("zero", dst)?;
        if dst.is_empty() {
            return Ok(());
        }
        self.submit(Node::Zero { at, bytes: dst.bytes() })
    }
    fn replayable(&self, f: &mut dyn FnMut() -> bool) -> Result<()> {
        self.replays.record(self.runner(), &self.stream, f)
    }
    fn advance(&self) -> Result<()> {
        self.replays.advance(self.runner(), &self.stream)
    }
    fn replayed(&self) -> u64 {
        self.replays.replayed()
    }
    fn sync(&self) -> Result<()> {
        self.flush()?;
        self.stream.synchronize().said("waiting for the device")
    }
    fn free_memory(&self) -> Option<u64> {
        self.ctx.mem_get_info().ok().map(|(free, _)| free as u64)
    }

    fn bandwidth(&self) -> Result<Bandwidth> {
        let bytes = |free: u64| if free > 4 << 30 { 1usize << 30 } else { 256 << 20 };
        let bytes = bytes(self.free_memory().unwrap_or(0));
        let host_to_device = {
            let dst = Memory::new(&self.stream, bytes, "the bandwidth test")?;
            self.staging.lock().unwrap_or_else(|e| e.into_inner()).bandwidth(&dst, bytes)?
        };
        Ok(Bandwidth { host_to_device, device_read: self.read_bandwidth()? })
    }
    fn time(&self, f: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        timed(&self.stream, f)
    }

    fn splits(&self, act: DType, cache: &KvPool<'_>, groups: usize, tokens: usize) -> usize {
        // The kernels on tensor cores share the keys out themselves.
        match attend::on_tensor_cores(act, cache.k.dtype(), cache.head_dim) {
            true => 1,
            false => parts::splits(&self.limits, groups, tokens),
        }
    }

    fn attends(&self, act: DType, kv: DType) -> bool {
        act == kv || act == DType::F32
    }

    fn embed(&self, p: &Embed<'_>) -> Result<()> {
        self.embed_op(p)
    }
    fn gather_rows(&self, p: &GatherRows<'_>) -> Result<()> {
        self.gather_rows_op(p)
    }
    fn rms_norm(&self, p: &RmsNorm<'_>) -> Result<()> {
        self.rms_norm_op(p)
    }
    fn linear(&self, p: &Linear<'_>) -> Result<()> {
        self.linear_op(p)
    }
    fn rope(&self, p: &Rope<'_>) -> Result<()> {
        self.rope_op(&[p])
    }
    fn rope_both(&self, both: [&Rope<'_>; 2]) -> Result<()> {
        match both[0].x.dtype() == both[1].x.dtype() {
            true => self.rope_op(&both),
            false => both.into_iter().try_for_each(|p| self.rope_op(&[p])),
        }
    }
    fn swiglu(&self, p: &SwiGlu<'_>) -> Result<()> {
        self.swiglu_op(p)
    }
    fn linear_gated(&self, linear: &Linear<'_>, swiglu: &SwiGlu<'_>) -> Result<()> {
        self.linear_gated_op(linear, swiglu)
    }
    fn content_bias(&self, p: &ContentBias<'_>) -> Result<()> {
        self.content_bias_op(p)
    }
    fn kv_append(&self, p: &KvAppend<'_>) -> Result<()> {
        self.kv_append_op(p)
    }
    fn rope_append(&self, ropes: [&Rope<'_>; 2], append: &KvAppend<'_>) -> Result<()> {
        self.rope_append_op(ropes, append)
    }
    fn key_stats(&self, p: &KeyStats<'_>) -> Result<()> {
        self.key_stats_op(p)
    }
    fn kv_summaries(&self, p: &KvSummaries<'_>) -> Result<()> {
        self.kv_summaries_op(p)
    }
    fn select_dims(&self, p: &SelectDims<'_>) -> Result<()> {
        self.select_dims_op(p)
    }
    fn rebuild_slice(&self, p: &RebuildSlice<'_>) -> Result<()> {
        self.rebuild_slice_op(p)
    }
    fn project(&self, p: &Project<'_>) -> Result<()> {
        self.project_op(p)
    }
    fn quantise_keys(&self, p: &QuantiseKeys<'_>) -> Result<()> {
        self.quantise_keys_op(p)
    }
    fn score_dims(&self, p: &ScoreDims<'_>) -> Result<()> {
        self.score_dims_op(p, false).map(drop)
    }
    fn score_rows(&self, p: &ScoreRows<'_>) -> Result<()> {
        self.score_rows_op(p)
    }
    fn score_tiles(&self, p: &ScoreTiles<'_>) -> Result<()> {
        self.score_tiles_op(p)
    }
    fn pool_scores(&self, p: &PoolScores<'_>) -> Result<()> {
        self.pool_scores_op(p, None)
    }
    fn score_pool(&self, score: &ScoreDims<'_>, pool: &PoolScores<'_>) -> Result<()> {
        self.score_pool_op(score, pool)
    }
    fn force(&self, p: &Force<'_>) -> Result<()> {
        self.force_op(p)
    }
    fn trim_scores(&self, p: &TrimScores<'_>) -> Result<()> {
        self.trim_scores_op(p)
    }
    fn top_k(&self, p: &TopK<'_>) -> Result<()> {
        self.top_k_op(p, None)
    }
    fn force_top_k(&self, force: &Force<'_>, top_k: &TopK<'_>) -> Result<()> {
        check_forced(force, top_k)?;
        if force.among.is_some() {
            self.force_op(force)?;
            return self.top_k_op(top_k, None);
        }
        self.top_k_op(top_k, Some(force))
    }
    fn union_ranks(&self, p: &UnionRanks<'_>) -> Result<()> {
        self.union_ranks_op(p)
    }
    fn hold_lists(&self, p: &HoldLists<'_>) -> Result<()> {
        self.hold_lists_op(p)
    }
    fn score_summaries(&self, p: &ScoreSummaries<'_>) -> Result<()> {
        self.score_summaries_op(p)
    }
    fn pool_blocks(&self, p: &PoolBlocks<'_>) -> Result<()> {
        self.pool_blocks_op(p)
    }
    fn force_blocks(&self, p: &ForceBlocks<'_>) -> Result<()> {
        self.force_blocks_op(p)
    }
    fn expand_blocks(&self, p: &ExpandBlocks<'_>) -> Result<()> {
        self.expand_blocks_op(p)
    }
    fn attend_dense(&self, p: &AttendDense<'_>) -> Result<()> {
        self.attend_dense_op(p)
    }
    fn attend_rows(&self, p: &AttendRows<'_>) -> Result<()> {
        self.attend_rows_op(p)
    }
    fn merge(&self, p: &Merge<'_>) -> Result<()> {
        self.merge_op(p)
    }
    fn mean_value(&self, p: &MeanValue<'_>) -> Result<()> {
        self.mean_value_op(p)
    }
}
