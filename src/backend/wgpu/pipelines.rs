//! The shaders, their binding tables and the cache of compiled pipelines.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::encoder::lock;
use crate::backend::{BackendError, Result};

/// How a shader uses a storage binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    Read,
    Write,
}
use Access::{Read, Write};

/// One entry point of a shader file: `shaders/<op>.wgsl`, compiled with `parts` in front of it.
///
/// Binding 0 of every kernel is its uniform parameter block; `bindings` lists the storage bindings.
#[derive(Debug)]
pub struct Kernel {
    pub op: &'static str,
    pub entry: &'static str,
    parts: &'static [&'static str],
    pub bindings: &'static [(u32, Access)],
}

macro_rules! shader {
    ($name:literal) => {
        include_str!(concat!("../../../shaders/", $name, ".wgsl"))
    };
}

const COMMON: &str = shader!("common");
const KEYS: &str = shader!("keys");
const ATTEND_BUFFERS: &str = shader!("attend_buffers");
const SCORE_QUERY: &str = shader!("score_query");
const FLASH_DECODE: &str = shader!("flash_decode");
const MARK: &str = shader!("mark");

const EMBED_SRC: &[&str] = &[COMMON, shader!("embed")];
const GATHER_ROWS_SRC: &[&str] = &[COMMON, shader!("gather_rows")];
const RMS_NORM_SRC: &[&str] = &[COMMON, shader!("rms_norm")];
const LINEAR_SRC: &[&str] = &[COMMON, shader!("linear")];
const ROPE_SRC: &[&str] = &[COMMON, shader!("rope")];
const SWIGLU_SRC: &[&str] = &[COMMON, shader!("swiglu")];
const CONTENT_BIAS_SRC: &[&str] = &[COMMON, shader!("content_bias")];
const KV_APPEND_SRC: &[&str] = &[COMMON, shader!("kv_append")];
const KEY_STATS_SRC: &[&str] = &[COMMON, shader!("key_stats")];
const KV_SUMMARIES_SRC: &[&str] = &[COMMON, shader!("kv_summaries")];
const SELECT_DIMS_SRC: &[&str] = &[COMMON, shader!("select_dims")];
const REBUILD_SLICE_SRC: &[&str] = &[COMMON, shader!("rebuild_slice")];
const QUANTISE_KEYS_SRC: &[&str] = &[COMMON, shader!("quantise_keys"), MARK];
const SCORE_DIMS_SRC: &[&str] = &[COMMON, SCORE_QUERY, shader!("score_dims")];
const SCORE_ROWS_SRC: &[&str] = &[COMMON, SCORE_QUERY, shader!("score_rows")];
const SCORE_TILES_SRC: &[&str] = &[COMMON, KEYS, shader!("score_tiles")];
const POOL_SCORES_SRC: &[&str] = &[COMMON, shader!("pool_scores")];
const SCORE_SUMMARIES_SRC: &[&str] = &[COMMON, shader!("score_summaries")];
const POOL_BLOCKS_SRC: &[&str] = &[COMMON, shader!("pool_blocks")];
const FORCE_BLOCKS_SRC: &[&str] = &[COMMON, shader!("force_blocks")];
const EXPAND_BLOCKS_SRC: &[&str] = &[COMMON, shader!("expand_blocks")];
const UNION_RANKS_SRC: &[&str] = &[COMMON, shader!("union_ranks")];
const HOLD_LISTS_SRC: &[&str] = &[COMMON, shader!("hold_lists")];
const FORCE_SRC: &[&str] = &[COMMON, shader!("force")];
const TOP_K_SRC: &[&str] = &[COMMON, shader!("top_k")];
const ATTEND_DENSE_SRC: &[&str] =
    &[COMMON, KEYS, ATTEND_BUFFERS, FLASH_DECODE, shader!("attend_dense")];
const ATTEND_ROWS_SRC: &[&str] =
    &[COMMON, KEYS, ATTEND_BUFFERS, FLASH_DECODE, shader!("attend_rows")];
const MERGE_SRC: &[&str] = &[COMMON, shader!("merge")];
const PROJECT_SRC: &[&str] = &[COMMON, shader!("project"), MARK];
const TRIM_SCORES_SRC: &[&str] = &[COMMON, shader!("trim_scores")];
const MEAN_VALUE_SRC: &[&str] = &[COMMON, shader!("mean_value")];
const BANDWIDTH_SRC: &[&str] = &[COMMON, shader!("bandwidth")];

const fn kernel(
    op: &'static str,
    entry: &'static str,
    parts: &'static [&'static str],
    bindings: &'static [(u32, Access)],
) -> Kernel {
    Kernel { op, entry, parts, bindings }
}

pub static EMBED: Kernel = kernel("embed", "main", EMBED_SRC, &[(1, Read), (2, Read), (3, Write)]);
pub static GATHER_ROWS: Kernel =
    kernel("gather_rows", "main", GATHER_ROWS_SRC, &[(1, Read), (2, Read), (3, Write)]);
pub static RMS_NORM: Kernel =
    kernel("rms_norm", "main", RMS_NORM_SRC, &[(1, Read), (2, Read), (3, Write)]);
const THREE_IN: &[(u32, Access)] = &[(1, Read), (2, Read), (3, Read), (4, Write)];
pub static MATVEC: Kernel = kernel("linear", "matvec", LINEAR_SRC, THREE_IN);
pub static MATMUL: Kernel = kernel("linear", "matmul", LINEAR_SRC, THREE_IN);
pub static MATMUL_ROWS: Kernel = kernel("linear", "matmul_rows", LINEAR_SRC, THREE_IN);
pub static ROPE: Kernel =
    kernel("rope", "main", ROPE_SRC, &[(1, Read), (2, Read), (3, Read), (4, Read), (5, Write)]);
pub static SWIGLU: Kernel = kernel("swiglu", "main", SWIGLU_SRC, &[(1, Read), (2, Write)]);
pub static CONTENT_BIAS: Kernel = kernel(
    "content_bias",
    "main",
    CONTENT_BIAS_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Write), (5, Write)],
);
pub static KV_APPEND: Kernel = kernel(
    "kv_append",
    "pages_main",
    KV_APPEND_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Read), (5, Write), (6, Write)],
);
pub static KV_APPEND_INT8: Kernel = kernel(
    "kv_append",
    "int8_main",
    KV_APPEND_SRC,
    &[(1, Read), (3, Read), (4, Read), (7, Write), (8, Write)],
);
pub static KV_APPEND_SLICE: Kernel = kernel(
    "kv_append",
    "slice_main",
    KV_APPEND_SRC,
    &[(1, Read), (3, Read), (9, Write), (10, Read)],
);
pub static KEY_STATS: Kernel =
    kernel("key_stats", "main", KEY_STATS_SRC, &[(1, Read), (2, Read), (3, Read), (4, Write)]);
pub static KV_SUMMARIES: Kernel = kernel(
    "kv_summaries",
    "main",
    KV_SUMMARIES_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Write)],
);
pub static SELECT_DIMS: Kernel = kernel(
    "select_dims",
    "main",
    SELECT_DIMS_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Write), (5, Write), (6, Write), (7, Write)],
);
pub static REBUILD_SLICE: Kernel = kernel(
    "rebuild_slice",
    "main",
    REBUILD_SLICE_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Read), (5, Read), (6, Write)],
);
pub static PROJECT_QUERIES: Kernel =
    kernel("project", "queries", PROJECT_SRC, &[(1, Read), (3, Read), (5, Read), (6, Write)]);
pub static PROJECT_KEYS: Kernel = kernel(
    "project",
    "keys",
    PROJECT_SRC,
    &[(1, Read), (2, Read), (4, Read), (5, Read), (7, Write), (8, Write)],
);
pub static PROJECT_MARK: Kernel = kernel("project", "mark", PROJECT_SRC, &[(1, Read), (8, Write)]);
pub static QUANTISE_KEYS: Kernel = kernel(
    "quantise_keys",
    "main",
    QUANTISE_KEYS_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Read), (5, Write), (6, Write), (7, Write)],
);
pub static QUANTISE_MARK: Kernel =
    kernel("quantise_keys", "mark", QUANTISE_KEYS_SRC, &[(1, Read), (7, Write)]);
pub static SCORE_DIMS: Kernel = kernel(
    "score_dims",
    "main",
    SCORE_DIMS_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Read), (5, Read), (6, Read), (7, Write)],
);
pub static SCORE_ROWS: Kernel = kernel(
    "score_rows",
    "main",
    SCORE_ROWS_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Read), (5, Read), (6, Read), (7, Write), (8, Read)],
);
pub static SCORE_TILES: Kernel = kernel(
    "score_tiles",
    "main",
    SCORE_TILES_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Read), (5, Read), (6, Write)],
);
pub static POOL_PARTIALS: Kernel = kernel(
    "pool_scores",
    "partials",
    POOL_SCORES_SRC,
    &[(1, Read), (2, Read), (3, Write), (5, Read)],
);
pub static POOL_SCORES: Kernel = kernel(
    "pool_scores",
    "pool",
    POOL_SCORES_SRC,
    &[(1, Read), (2, Read), (3, Write), (4, Write), (5, Read)],
);
pub static SCORE_SUMMARIES: Kernel = kernel(
    "score_summaries",
    "main",
    SCORE_SUMMARIES_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Read), (5, Write)],
);
pub static POOL_BLOCKS_TOTALS: Kernel =
    kernel("pool_blocks", "totals", POOL_BLOCKS_SRC, &[(1, Read), (2, Read), (3, Write)]);
pub static POOL_BLOCKS: Kernel =
    kernel("pool_blocks", "pool", POOL_BLOCKS_SRC, &[(1, Read), (2, Read), (3, Write), (4, Write)]);
pub static EXPAND_BLOCKS: Kernel = kernel(
    "expand_blocks",
    "main",
    EXPAND_BLOCKS_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Write), (5, Write)],
);
pub static UNION_RANKS_PLACES: Kernel = kernel(
    "union_ranks",
    "places",
    UNION_RANKS_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Read), (5, Write)],
);
pub static UNION_RANKS: Kernel = kernel(
    "union_ranks",
    "main",
    UNION_RANKS_SRC,
    &[(1, Read), (3, Read), (4, Read), (5, Write), (6, Write)],
);
pub static HOLD_LISTS: Kernel = kernel(
    "hold_lists",
    "main",
    HOLD_LISTS_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Write), (5, Write), (6, Write), (7, Write)],
);
pub static FORCE_BLOCKS: Kernel = kernel("force_blocks", "main", FORCE_BLOCKS_SRC, THREE_IN);
pub static FORCE: Kernel = kernel("force", "main", FORCE_SRC, &[(1, Read), (2, Write)]);
pub static FORCE_LISTED: Kernel =
    kernel("force", "listed", FORCE_SRC, &[(1, Read), (2, Write), (3, Read), (4, Read)]);
pub static TRIM_MASS: Kernel =
    kernel("trim_scores", "mass", TRIM_SCORES_SRC, &[(1, Read), (2, Write)]);
pub static TRIM_TOGETHER: Kernel =
    kernel("trim_scores", "together", TRIM_SCORES_SRC, &[(1, Read), (2, Write)]);
pub static TOP_K: Kernel = kernel(
    "top_k",
    "main",
    TOP_K_SRC,
    &[(1, Read), (2, Read), (3, Write), (4, Write), (5, Read), (6, Read)],
);
const ATTEND_DENSE_BINDINGS: &[(u32, Access)] =
    &[(1, Read), (2, Read), (3, Read), (4, Read), (5, Read), (6, Write), (7, Write)];
pub static ATTEND_DECODE: Kernel =
    kernel("attend_dense", "decode", ATTEND_DENSE_SRC, ATTEND_DENSE_BINDINGS);
pub static ATTEND_PREFILL: Kernel =
    kernel("attend_dense", "prefill", ATTEND_DENSE_SRC, ATTEND_DENSE_BINDINGS);
// Ten storage buffers: two more than WebGPU promises, fewer than any Vulkan, Metal or DX12 device has.
pub static ATTEND_ROWS: Kernel = kernel(
    "attend_rows",
    "main",
    ATTEND_ROWS_SRC,
    &[
        (1, Read),
        (2, Read),
        (3, Read),
        (4, Read),
        (5, Read),
        (6, Write),
        (7, Write),
        (8, Read),
        (9, Read),
        (10, Read),
    ],
);
pub static MERGE: Kernel =
    kernel("merge", "main", MERGE_SRC, &[(1, Read), (2, Read), (3, Read), (4, Write), (5, Write)]);
pub static MEAN_VALUE: Kernel = kernel(
    "mean_value",
    "main",
    MEAN_VALUE_SRC,
    &[(1, Read), (2, Read), (3, Read), (4, Read), (5, Read), (6, Write)],
);
pub static BANDWIDTH: Kernel = kernel("bandwidth", "main", BANDWIDTH_SRC, &[(1, Read), (2, Write)]);

/// Values of a kernel's `override` constants.
pub type Constants<'a> = &'a [(&'static str, u32)];

/// A compiled kernel with the layout of its bindings.
#[derive(Debug, Clone)]
pub struct Pipeline {
    pub raw: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
}

type PipelineKey = (&'static str, &'static str, usize, Vec<(&'static str, u32)>);

/// Compiled modules and pipelines, made at first use.
#[derive(Debug, Default)]
pub struct Pipelines {
    modules: Mutex<HashMap<&'static str, wgpu::ShaderModule>>,
    pipelines: Mutex<HashMap<PipelineKey, Arc<Pipeline>>>,
}

impl Pipelines {
    /// The pipeline of `kernel` with these constants.
    pub fn get(
        &self,
        device: &wgpu::Device,
        kernel: &Kernel,
        constants: Constants<'_>,
    ) -> Result<Arc<Pipeline>> {
        let key = (kernel.op, kernel.entry, kernel.bindings.len(), constants.to_vec());
        if let Some(p) = lock(&self.pipelines).get(&key) {
            return Ok(p.clone());
        }
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let pipeline = Arc::new(self.compile(device, kernel, constants));
        let internal = pollster::block_on(internal.pop());
        let invalid = pollster::block_on(scope.pop());
        if let Some(e) = internal.or(invalid) {
            return Err(BackendError::Compile {
                backend: "wgpu",
                kernel: format!("{}.wgsl ({})", kernel.op, kernel.entry),
                reason: e.to_string(),
            });
        }
        lock(&self.pipelines).insert(key, pipeline.clone());
        Ok(pipeline)
    }

    fn compile(
        &self,
        device: &wgpu::Device,
        kernel: &Kernel,
        constants: Constants<'_>,
    ) -> Pipeline {
        let module = lock(&self.modules)
            .entry(kernel.op)
            .or_insert_with(|| create_module(device, kernel))
            .clone();
        let mut entries = vec![wgpu::BindGroupLayoutEntry {
            binding: 0,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Uniform,
                has_dynamic_offset: true,
                min_binding_size: None,
            },
            count: None,
        }];
        entries.extend(kernel.bindings.iter().map(|&(binding, access)| {
            let read_only = access == Access::Read;
            wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            }
        }));
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(kernel.op),
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(kernel.op),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let values: Vec<(&str, f64)> = constants.iter().map(|&(n, v)| (n, f64::from(v))).collect();
        let raw = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.op),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(kernel.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &values,
                // Every kernel writes its workgroup memory before it reads it.
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        Pipeline { raw, layout }
    }
}

fn create_module(device: &wgpu::Device, kernel: &Kernel) -> wgpu::ShaderModule {
    let descriptor = wgpu::ShaderModuleDescriptor {
        label: Some(kernel.op),
        source: wgpu::ShaderSource::Wgsl(kernel.parts.concat().into()),
    };
    // Bounds and divisions stay checked; only the counters that wgpu adds to every loop are left out.
    let checks = wgpu::ShaderRuntimeChecks {
        force_loop_bounding: false,
        ..wgpu::ShaderRuntimeChecks::checked()
    };
    // SAFETY: every loop of the shaders counts up to a bound (a length, a constant), so none is endless.
    unsafe { device.create_shader_module_trusted(descriptor, checks) }
}

#[cfg(test)]
#[path = "tests/shaders.rs"]
mod tests;
