//! The CPU backend: f32 arithmetic that follows each op's formula, on all cores.
//!
//! One file per op. `memory` keeps the borrow rules of tensors, `seqs` reads and checks the sequence records,
//! `simd` holds the vector kernels, `matmul` wraps the GEMM crate, `tiles` cuts its products, `par` has the
//! parallel loops and `pool` the threads that run them. Weights and the KV cache may be f32, f16 or bf16; activations are f32. Results do not depend on the number of threads.

mod attend_dense;
mod attend_rows;
mod attention;
mod bandwidth;
mod content_bias;
mod embed;
mod expand_blocks;
mod force;
mod force_blocks;
mod gather_rows;
mod gemm_ceiling;
mod hold_lists;
pub(crate) mod host;
mod key_stats;
mod kv_append;
mod kv_summaries;
mod linear;
mod matmul;
mod mean_value;
mod memory;
mod merge;
mod par;
mod pool;
mod pool_blocks;
mod pool_scores;
mod project;
mod quantise_keys;
mod rebuild_slice;
mod rms_norm;
mod rope;
mod score_dims;
mod score_rows;
mod score_summaries;
mod score_tiles;
mod select_dims;
mod seqs;
mod simd;
mod swiglu;
mod tiles;
mod top_k;
mod trim_scores;
mod union_ranks;

use std::sync::Arc;

pub use gemm_ceiling::{GemmCeiling, GemmSplit};

use super::*;
#[cfg(feature = "wgpu")]
pub(super) use memory::available;
use memory::{CpuBuffer, Io, Stream};

/// The host's own cores and memory as a [`Backend`].
///
/// Ops run to their end before the call returns, one at a time in the order of the calls; do not call them
/// from inside a task of an op.
#[derive(Debug)]
pub struct CpuBackend {
    caps: Capabilities,
    stream: Arc<Stream>,
}

impl CpuBackend {
    /// Always available; uses one pool of threads for all.
    #[allow(clippy::new_without_default)] // a device, not a value
    pub fn new() -> CpuBackend {
        let isa = simd::Isa::detected();
        let caps = Capabilities {
            backend: "cpu",
            device: device_name(),
            driver: format!("{}, {} threads", isa.name(), par::threads()),
            software: false,
            memory: memory::installed(),
            topology: Topology::Unified,
            f16: false,
            subgroup: (0, 0),
            tensor_cores: "none".into(),
            max_binding: isize::MAX as u64,
            storage: vec![DType::F32, DType::F16, DType::BF16],
            activations_follow_weights: false,
            prompt_rows: 512,
        };
        CpuBackend { caps, stream: Arc::default() }
    }

    /// Threads that an op runs on at most: `RAYON_NUM_THREADS` where that is a positive number, else as many as the
    /// process may use cores.
    pub fn threads() -> usize {
        par::threads()
    }

    fn io(&self, op: &'static str) -> Result<Io<'_>> {
        Io::begin(op, &self.stream)
    }
}

/// Model name of the first core, or the architecture.
fn device_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, n)| n.trim().to_owned())
}

/// Checks the arguments, takes the op's turn and runs `src/backend/cpu/<op>.rs`.
macro_rules! ops {
    ($($op:ident: $params:ident),* $(,)?) => {
        $(fn $op(&self, p: &$params<'_>) -> Result<()> {
            p.check()?;
            $op::run(&self.io(stringify!($op))?, p)
        })*
    };
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn caps(&self) -> &Capabilities {
        &self.caps
    }

    fn alloc(&self, dtype: DType, len: usize, what: &str) -> Result<Tensor> {
        let free = memory::available();
        let full = |need: u64| BackendError::OutOfMemory {
            what: what.to_owned(),
            need,
            free: free.unwrap_or(0),
        };
        let bytes = len.checked_mul(dtype.bytes()).ok_or_else(|| full(u64::MAX))?;
        let need = bytes as u64;
        if free.is_some_and(|f| need > f) {
            return Err(full(need));
        }
        let buffer = CpuBuffer::new(bytes, self.stream.clone()).ok_or_else(|| full(need))?;
        Ok(Tensor::from_buffer(Arc::new(buffer), dtype, len))
    }

    fn upload(&self, dst: &Tensor, bytes: &[u8]) -> Result<()> {
        check_host("upload", dst, bytes.len())?;
        let io = self.io("upload")?;
        par::copy(bytes, io.write_bytes(dst)?);
        Ok(())
    }

    fn download(&self, src: &Tensor, out: &mut [u8]) -> Result<()> {
        check_host("download", src, out.len())?;
        let io = self.io("download")?;
        par::copy(io.read_bytes(src)?, out);
        Ok(())
    }

    fn copy(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        check_copy(src, dst)?;
        let io = self.io("copy")?;
        par::copy(io.read_bytes(src)?, io.write_bytes(dst)?);
        Ok(())
    }

    fn zero(&self, dst: &Tensor) -> Result<()> {
        self.io("zero")?.write_bytes(dst)?.fill(0);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn free_memory(&self) -> Option<u64> {
        memory::available()
    }

    fn bandwidth(&self) -> Result<Bandwidth> {
        bandwidth::measure(self)
    }

    ops! {
        embed: Embed,
        gather_rows: GatherRows,
        rms_norm: RmsNorm,
        linear: Linear,
        rope: Rope,
        swiglu: SwiGlu,
        content_bias: ContentBias,
        kv_append: KvAppend,
        key_stats: KeyStats,
        kv_summaries: KvSummaries,
        select_dims: SelectDims,
        rebuild_slice: RebuildSlice,
        project: Project,
        quantise_keys: QuantiseKeys,
        score_dims: ScoreDims,
        score_rows: ScoreRows,
        score_tiles: ScoreTiles,
        pool_scores: PoolScores,
        force: Force,
        trim_scores: TrimScores,
        top_k: TopK,
        union_ranks: UnionRanks,
        hold_lists: HoldLists,
        score_summaries: ScoreSummaries,
        pool_blocks: PoolBlocks,
        force_blocks: ForceBlocks,
        expand_blocks: ExpandBlocks,
        attend_dense: AttendDense,
        attend_rows: AttendRows,
        merge: Merge,
        mean_value: MeanValue,
    }
}
