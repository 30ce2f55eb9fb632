//! What a device is and can do.

use super::DType;

/// Where device memory sits. Decides whether moving KV to the host means a copy at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Topology {
    /// One pool shared with the host (CPU, integrated GPU, Apple silicon, Grace).
    Unified,
    /// Own memory behind a link.
    Discrete,
}

/// Fixed facts of an opened device.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Capabilities {
    /// Backend name.
    pub backend: &'static str,
    /// Device name as the driver gives it.
    pub device: String,
    /// Driver name and version.
    pub driver: String,
    /// A driver that renders on the CPU (Mesa's llvmpipe, SwiftShader, WARP): slower there than the `cpu` backend.
    pub software: bool,
    /// Total device memory in bytes, when known.
    pub memory: Option<u64>,
    /// Memory topology.
    pub topology: Topology,
    /// Half-precision arithmetic in kernels.
    pub f16: bool,
    /// Smallest and largest subgroup (warp, wave) size; (0, 0) when there are none.
    pub subgroup: (u32, u32),
    /// Matrix units, in words ("wgmma bf16/f16", "none").
    pub tensor_cores: String,
    /// Largest single buffer binding in bytes.
    pub max_binding: u64,
    /// Dtypes that weights and the KV cache may be stored in.
    pub storage: Vec<DType>,
    /// Dtype of activations for weights of the given dtype: f32, or the weight's own.
    pub activations_follow_weights: bool,
    /// Rows of a prompt from which on larger steps are no faster.
    pub prompt_rows: usize,
}

impl Capabilities {
    /// Dtype of activations beside weights of dtype `weights`.
    pub fn activations(&self, weights: DType) -> DType {
        if self.activations_follow_weights { weights } else { DType::F32 }
    }
}

/// Measured bandwidths in GB/s (1e9 bytes per second).
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Bandwidth {
    /// Host to device (pinned where the backend has pinned memory).
    pub host_to_device: f64,
    /// Device memory read by a kernel.
    pub device_read: f64,
}
