//! Looking for the driver and its devices, without panics where there are none.

use super::error::Said;
use super::options::switched_off;
use crate::backend::{BackendError, Capabilities, DType, Result, Topology};
use cudarc::driver::result::{device, init};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use std::panic::catch_unwind;

/// Smallest compute capability that the kernels are written for (cp.async, bf16 mma).
const OLDEST: (i32, i32) = (8, 0);

fn unavailable(reason: String) -> BackendError {
    BackendError::Unavailable { backend: "cuda", reason }
}

/// Number of CUDA devices.
///
/// # Errors
/// [`BackendError::Unavailable`] without a driver or a device.
pub(super) fn count() -> Result<usize> {
    let found = catch_unwind(|| {
        // SAFETY: only tries to load the library by name.
        if !unsafe { sys::is_culib_present() } {
            return Err(unavailable(
                "no NVIDIA driver: looked for libcuda.so.1 (nvcuda.dll on Windows) on the library \
                 path; install the driver, or use another device (wgpu or cpu)"
                    .into(),
            ));
        }
        init().said("the NVIDIA driver does not start").map_err(|e| unavailable(e.to_string()))?;
        device::get_count().said("counting devices")
    });
    let n = match found {
        Ok(n) => n?,
        // cudarc panics when libcuda lacks a symbol that it wants.
        Err(_) => {
            return Err(unavailable(
                "libcuda.so.1 was found but lacks functions of CUDA 11.4 or newer; update the NVIDIA \
                 driver"
                    .into(),
            ));
        }
    };
    match usize::try_from(n) {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(unavailable("the NVIDIA driver is there but reports no CUDA device".into())),
    }
}

/// Facts that launches need.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Compute capability.
    pub cc: (i32, i32),
    /// Streaming multiprocessors.
    pub sms: usize,
    /// Most shared memory of one block in bytes, after opting in.
    pub shared: usize,
    /// Shared memory of a multiprocessor in bytes.
    pub shared_each: usize,
    /// Most blocks of a cluster; 1 where the embedded kernels were compiled without clusters.
    pub cluster: usize,
    /// Hopper's own matrix instructions are there and `LONGSIGHT_CUDA_WGMMA` is not `off`.
    pub wgmma: bool,
}

#[cfg(test)]
impl Limits {
    /// Of an H100 SXM.
    pub const H100: Limits = Limits {
        cc: (9, 0),
        sms: 132,
        shared: 232_448,
        shared_each: 233_472,
        cluster: 8,
        wgmma: true,
    };
}

/// Capabilities and limits of device `ordinal`; opens no context.
///
/// # Errors
/// [`BackendError::Unavailable`] when there is no such device or it is too old.
pub(super) fn describe(ordinal: usize) -> Result<(Capabilities, Limits)> {
    let n = count()?;
    if ordinal >= n {
        return Err(unavailable(format!(
            "there is no device {ordinal}: the driver reports {n}, numbered from 0"
        )));
    }
    let dev = device::get(ordinal as i32).said("opening the device")?;
    let get = |a: Attribute| {
        // SAFETY: `dev` was just returned by the driver.
        unsafe { device::get_attribute(dev, a) }.said("reading a device attribute")
    };
    let cc = (
        get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let name = device::get_name(dev).said("reading the device's name")?;
    if cc < OLDEST {
        return Err(unavailable(format!(
            "{name} has compute capability {}.{}, the kernels need {}.{} or newer (Ampere); use \
             the wgpu backend on this GPU",
            cc.0, cc.1, OLDEST.0, OLDEST.1
        )));
    }
    // SAFETY: as above.
    let memory = unsafe { device::total_mem(dev) }.said("reading the memory size")? as u64;
    let unified = get(Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0;
    let caps = Capabilities {
        backend: "cuda",
        device: name,
        driver: driver_version(),
        software: false,
        memory: Some(memory),
        topology: if unified { Topology::Unified } else { Topology::Discrete },
        f16: true,
        subgroup: (32, 32),
        tensor_cores: format!("mma.sync bf16/f16 m16n8k16 (sm_{}{})", cc.0, cc.1),
        max_binding: memory,
        storage: vec![DType::F32, DType::F16, DType::BF16],
        activations_follow_weights: true,
        prompt_rows: 4096,
    };
    let limits = Limits {
        cc,
        sms: get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as usize,
        shared: get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?.max(0)
            as usize,
        shared_each: get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?
            .max(0) as usize,
        // Newer architectures run the machine-independent code for 8.0, which knows no clusters.
        cluster: if cc == (9, 0) { 8 } else { 1 },
        wgmma: cc == (9, 0) && !switched_off("LONGSIGHT_CUDA_WGMMA"),
    };
    Ok((caps, limits))
}

fn driver_version() -> String {
    let mut v = 0;
    // SAFETY: `v` outlives the call; the library is loaded by now.
    match unsafe { sys::cuDriverGetVersion(&mut v) }.result() {
        Ok(()) => format!("CUDA {}.{}", v / 1000, v % 1000 / 10),
        Err(_) => "CUDA, unknown version".into(),
    }
}
