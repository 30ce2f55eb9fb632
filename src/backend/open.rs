//! Finding and opening devices.

use super::{Backend, BackendError, Capabilities, Result};
use std::sync::Arc;

/// Opens every backend of this build: (`cpu`, `wgpu` or `cuda`; the backend, or why it cannot be used).
///
/// `wgpu` is the adapter that [`open`] would take for `wgpu`, `cuda` is ordinal 0.
pub fn open_all() -> Vec<(String, Result<Arc<dyn Backend>>)> {
    ["cpu", "wgpu", "cuda"].map(|name| (name.to_string(), open(name))).into()
}

/// Every wgpu adapter, then every CUDA device, without opening them; none of a backend that this build or machine lacks.
pub fn list() -> Vec<Capabilities> {
    #[allow(unused_mut)] // in a build without either
    let mut all: Vec<Capabilities> = Vec::new();
    #[cfg(feature = "wgpu")]
    all.extend(super::wgpu::WgpuBackend::list());
    #[cfg(feature = "cuda")]
    all.extend(super::cuda::list().unwrap_or_default());
    all
}

/// Opens a device.
///
/// `selector`: `cpu`, `wgpu`, `wgpu:<part of the adapter's name>`, `cuda`, `cuda:<ordinal>`, or `auto`: CUDA
/// where it works, else a wgpu adapter that is not a software renderer, else the CPU. The case of letters does not
/// matter.
///
/// # Errors
/// [`BackendError::Unavailable`] when the device or its driver is missing, or the selector is not one of these.
pub fn open(selector: &str) -> Result<Arc<dyn Backend>> {
    let (kind, rest) = match selector.split_once(':') {
        Some((kind, rest)) => (kind, Some(rest)),
        None => (selector, None),
    };
    match (&*kind.to_ascii_lowercase(), rest) {
        ("auto", None) => auto(),
        ("cpu", None) => cpu(),
        ("wgpu", name) => wgpu(name),
        ("cuda", None) => cuda(0),
        ("cuda", Some(ordinal)) => match ordinal.parse() {
            Ok(n) => cuda(n),
            Err(_) => Err(BackendError::Unavailable {
                backend: "cuda",
                reason: format!("{ordinal:?} is no device number; use cuda:0 for the first GPU"),
            }),
        },
        _ => Err(BackendError::Unavailable {
            backend: "device",
            reason: format!(
                "{selector:?} is not known; use auto, cpu, wgpu, wgpu:<part of the adapter's name>, \
                 cuda or cuda:<number>"
            ),
        }),
    }
}

fn auto() -> Result<Arc<dyn Backend>> {
    if let Ok(gpu) = cuda(0) {
        return Ok(gpu);
    }
    match wgpu(None) {
        Ok(gpu) if !gpu.caps().software => Ok(gpu),
        _ => cpu(),
    }
}

fn cpu() -> Result<Arc<dyn Backend>> {
    Ok(Arc::new(super::cpu::CpuBackend::new()))
}

#[cfg(feature = "wgpu")]
fn wgpu(adapter: Option<&str>) -> Result<Arc<dyn Backend>> {
    Ok(Arc::new(super::wgpu::WgpuBackend::open(adapter)?))
}

#[cfg(not(feature = "wgpu"))]
fn wgpu(_: Option<&str>) -> Result<Arc<dyn Backend>> {
    Err(missing("wgpu"))
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> Result<Arc<dyn Backend>> {
    Ok(Arc::new(super::cuda::CudaBackend::open(ordinal)?))
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Arc<dyn Backend>> {
    Err(missing("cuda"))
}

#[cfg(any(not(feature = "wgpu"), not(feature = "cuda")))]
fn missing(backend: &'static str) -> BackendError {
    BackendError::Unavailable {
        backend,
        reason: format!("not part of this build; rebuild with --features {backend}"),
    }
}
