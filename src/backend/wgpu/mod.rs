//! The wgpu backend: any adapter with Vulkan, Metal or DX12, software Vulkan included.
//!
//! Shaders are plain WGSL (`shaders/<op>.wgsl`) that need neither subgroups nor 16-bit arithmetic; 16-bit
//! storage is unpacked from words. Activations are f32. Ops are recorded and submitted in batches.

mod attend;
mod blocks;
mod dense;
mod encoder;
mod kv;
mod lists;
mod memory;
mod pipelines;
mod score;

use super::cpu::available;
use super::{
    AttendDense, AttendRows, Backend, BackendError, Bandwidth, Capabilities, ContentBias, DType,
    Embed, ExpandBlocks, Force, ForceBlocks, GatherRows, HoldLists, KeyStats, KvAppend, KvPool,
    KvSummaries, Linear, MeanValue, Merge, PoolBlocks, PoolScores, Project, QuantiseKeys,
    RebuildSlice, Result, RmsNorm, Rope, ScoreDims, ScoreRows, ScoreSummaries, ScoreTiles,
    SelectDims, SwiGlu, Tensor, TopK, Topology, TrimScores, UnionRanks,
};
use encoder::{ARENA_BYTES, PARAMS_BYTES, catch_faults};
use memory::Gpu;
use wgpu::DeviceType;

/// What to do when there is no adapter.
const INSTALL: &str = "install the GPU vendor's Vulkan driver, or Mesa's software Vulkan \
    (package mesa-vulkan-drivers, or scripts/install_lavapipe.sh)";

/// A GPU opened through wgpu.
#[derive(Debug)]
pub struct WgpuBackend {
    gpu: Gpu,
    caps: Capabilities,
}

impl WgpuBackend {
    /// Opens the best adapter (discrete, then integrated, virtual, CPU), or the best one whose name contains
    /// `adapter`, upper and lower case alike.
    ///
    /// # Errors
    /// [`BackendError::Unavailable`] without a matching adapter, or when it gives no device.
    pub fn open(adapter: Option<&str>) -> Result<WgpuBackend> {
        let found = adapters();
        let names: Vec<String> = found.iter().map(|a| a.get_info().name).collect();
        let wanted = adapter.map(str::to_lowercase);
        let chosen = found
            .into_iter()
            .find(|a| wanted.as_ref().is_none_or(|w| a.get_info().name.to_lowercase().contains(w)));
        let Some(chosen) = chosen else {
            return Err(unavailable(match (adapter, names.as_slice()) {
                (_, []) => format!("no Vulkan, Metal or DX12 adapter was found; {INSTALL}"),
                (Some(w), names) => {
                    format!("no adapter is named like {w:?}; found: {}", names.join(", "))
                }
                (None, _) => format!("no usable adapter; {INSTALL}"),
            }));
        };
        let info = chosen.get_info();
        let caps = capabilities(&chosen);
        let (device, queue) = pollster::block_on(chosen.request_device(&wgpu::DeviceDescriptor {
            label: Some("longsight"),
            required_features: wgpu::Features::empty(),
            required_limits: chosen.limits(),
            ..Default::default()
        }))
        .map_err(|e| unavailable(format!("{} gave no device: {e}", info.name)))?;
        let faults = catch_faults(&device);
        let small = |label, size, usage| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage,
                mapped_at_creation: false,
            })
        };
        let uniform = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let storage = wgpu::BufferUsages::STORAGE;
        let gpu = Gpu {
            arena: small("parameters", ARENA_BYTES as u64, uniform),
            absent: [
                small("absent input", PARAMS_BYTES as u64, storage),
                small("absent output", PARAMS_BYTES as u64, storage),
            ],
            software: info.device_type == DeviceType::Cpu,
            limits: device.limits(),
            device,
            queue,
            faults,
            pipelines: Default::default(),
            pending: Default::default(),
            read_back: Default::default(),
            scratch: Default::default(),
        };
        gpu.fault()?;
        Ok(WgpuBackend { gpu, caps })
    }

    /// Every adapter, best first; empty without a driver.
    pub fn list() -> Vec<Capabilities> {
        adapters().iter().map(capabilities).collect()
    }
}

fn unavailable(reason: String) -> BackendError {
    BackendError::Unavailable { backend: "wgpu", reason }
}

/// Adapters, best first. A driver's own order is kept within a class.
fn adapters() -> Vec<wgpu::Adapter> {
    let instance =
        wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    let mut found = pollster::block_on(instance.enumerate_adapters(backends));
    found.sort_by_key(|a| match a.get_info().device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Cpu => 3,
        DeviceType::Other => 4,
    });
    found
}

fn capabilities(adapter: &wgpu::Adapter) -> Capabilities {
    let info = adapter.get_info();
    let features = adapter.features();
    let unified = matches!(info.device_type, DeviceType::IntegratedGpu | DeviceType::Cpu);
    let subgroup = features.contains(wgpu::Features::SUBGROUP);
    Capabilities {
        backend: "wgpu",
        driver: format!("{:?} {} {}", info.backend, info.driver, info.driver_info),
        device: info.name,
        software: info.device_type == DeviceType::Cpu,
        memory: None,
        topology: if unified { Topology::Unified } else { Topology::Discrete },
        f16: features.contains(wgpu::Features::SHADER_F16),
        subgroup: if subgroup { (info.subgroup_min_size, info.subgroup_max_size) } else { (0, 0) },
        tensor_cores: "none".into(),
        max_binding: adapter.limits().max_storage_buffer_binding_size,
        storage: vec![DType::F32, DType::F16, DType::BF16],
        activations_follow_weights: false,
        prompt_rows: 512,
    }
}

/// Number of a float dtype in the shaders (`DTYPE`).
fn dtype_code(d: DType) -> u32 {
    match d {
        DType::F16 => 1,
        DType::BF16 => 2,
        _ => 0,
    }
}

/// Activations are f32 on this backend.
fn acts_are_f32(op: &'static str, tensors: &[&Tensor]) -> Result<()> {
    match tensors.iter().find(|t| t.dtype() != DType::F32) {
        None => Ok(()),
        Some(t) => Err(BackendError::Unsupported {
            op,
            backend: "wgpu",
            what: format!("{} activations", t.dtype()),
        }),
    }
}

impl Backend for WgpuBackend {
    fn name(&self) -> &'static str {
        "wgpu"
    }
    fn caps(&self) -> &Capabilities {
        &self.caps
    }

    fn alloc(&self, dtype: DType, len: usize, what: &str) -> Result<Tensor> {
        self.gpu.alloc(dtype, len, what)
    }
    fn upload(&self, dst: &Tensor, bytes: &[u8]) -> Result<()> {
        self.gpu.upload(dst, bytes)
    }
    fn download(&self, src: &Tensor, out: &mut [u8]) -> Result<()> {
        self.gpu.download(src, out)
    }
    fn copy(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        self.gpu.copy(src, dst)
    }
    fn zero(&self, dst: &Tensor) -> Result<()> {
        self.gpu.zero(dst)
    }
    fn sync(&self) -> Result<()> {
        self.gpu.sync()
    }
    /// Drivers do not tell; where memory is the host's, the host does.
    fn free_memory(&self) -> Option<u64> {
        (self.caps().topology == Topology::Unified).then(available).flatten()
    }
    fn bandwidth(&self) -> Result<Bandwidth> {
        self.gpu.bandwidth()
    }

    /// One split per 1,024 tokens until about 512 workgroups run; a CPU adapter has no use for more.
    fn splits(&self, _: DType, _: &KvPool<'_>, groups: usize, tokens: usize) -> usize {
        if self.gpu.software {
            return 1;
        }
        tokens.div_ceil(1024).clamp(1, (512 / groups.max(1)).max(1))
    }

    fn embed(&self, p: &Embed<'_>) -> Result<()> {
        dense::embed(&self.gpu, p)
    }
    fn gather_rows(&self, p: &GatherRows<'_>) -> Result<()> {
        dense::gather_rows(&self.gpu, p)
    }
    fn rms_norm(&self, p: &RmsNorm<'_>) -> Result<()> {
        dense::rms_norm(&self.gpu, p)
    }
    fn linear(&self, p: &Linear<'_>) -> Result<()> {
        dense::linear(&self.gpu, p)
    }
    fn rope(&self, p: &Rope<'_>) -> Result<()> {
        dense::rope(&self.gpu, p)
    }
    fn swiglu(&self, p: &SwiGlu<'_>) -> Result<()> {
        dense::swiglu(&self.gpu, p)
    }

    fn content_bias(&self, p: &ContentBias<'_>) -> Result<()> {
        kv::content_bias(&self.gpu, p)
    }
    fn kv_append(&self, p: &KvAppend<'_>) -> Result<()> {
        kv::kv_append(&self.gpu, p)
    }
    fn key_stats(&self, p: &KeyStats<'_>) -> Result<()> {
        kv::key_stats(&self.gpu, p)
    }
    fn kv_summaries(&self, p: &KvSummaries<'_>) -> Result<()> {
        blocks::kv_summaries(&self.gpu, p)
    }
    fn select_dims(&self, p: &SelectDims<'_>) -> Result<()> {
        score::select_dims(&self.gpu, p)
    }
    fn rebuild_slice(&self, p: &RebuildSlice<'_>) -> Result<()> {
        kv::rebuild_slice(&self.gpu, p)
    }
    fn project(&self, p: &Project<'_>) -> Result<()> {
        kv::project(&self.gpu, p)
    }

    fn quantise_keys(&self, p: &QuantiseKeys<'_>) -> Result<()> {
        kv::quantise_keys(&self.gpu, p)
    }
    fn score_dims(&self, p: &ScoreDims<'_>) -> Result<()> {
        score::score_dims(&self.gpu, p)
    }
    fn score_rows(&self, p: &ScoreRows<'_>) -> Result<()> {
        score::score_rows(&self.gpu, p)
    }
    fn score_tiles(&self, p: &ScoreTiles<'_>) -> Result<()> {
        score::score_tiles(&self.gpu, p)
    }
    fn pool_scores(&self, p: &PoolScores<'_>) -> Result<()> {
        score::pool_scores(&self.gpu, p)
    }
    fn force(&self, p: &Force<'_>) -> Result<()> {
        score::force(&self.gpu, p)
    }
    fn trim_scores(&self, p: &TrimScores<'_>) -> Result<()> {
        score::trim_scores(&self.gpu, p)
    }
    fn top_k(&self, p: &TopK<'_>) -> Result<()> {
        score::top_k(&self.gpu, p)
    }

    fn union_ranks(&self, p: &UnionRanks<'_>) -> Result<()> {
        lists::union_ranks(&self.gpu, p)
    }
    fn hold_lists(&self, p: &HoldLists<'_>) -> Result<()> {
        lists::hold_lists(&self.gpu, p)
    }

    fn score_summaries(&self, p: &ScoreSummaries<'_>) -> Result<()> {
        blocks::score_summaries(&self.gpu, p)
    }
    fn pool_blocks(&self, p: &PoolBlocks<'_>) -> Result<()> {
        blocks::pool_blocks(&self.gpu, p)
    }
    fn force_blocks(&self, p: &ForceBlocks<'_>) -> Result<()> {
        blocks::force_blocks(&self.gpu, p)
    }
    fn expand_blocks(&self, p: &ExpandBlocks<'_>) -> Result<()> {
        blocks::expand_blocks(&self.gpu, p)
    }

    fn attend_dense(&self, p: &AttendDense<'_>) -> Result<()> {
        attend::attend_dense(&self.gpu, p)
    }
    fn attend_rows(&self, p: &AttendRows<'_>) -> Result<()> {
        attend::attend_rows(&self.gpu, p)
    }
    fn merge(&self, p: &Merge<'_>) -> Result<()> {
        attend::merge(&self.gpu, p)
    }
    fn mean_value(&self, p: &MeanValue<'_>) -> Result<()> {
        attend::mean_value(&self.gpu, p)
    }
}

#[cfg(test)]
#[path = "tests/device.rs"]
mod tests;
