//! What a device is opened with.

/// How steps are launched; the answers are the same bits in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Blocks of a kernel may be placed while the kernel before still runs; only on GPUs that can.
    pub overlap: bool,
    /// Steps that repeat are replayed as graphs.
    pub graphs: bool,
}

impl CudaOptions {
    /// Everything that the device can, but what `LONGSIGHT_CUDA_OVERLAP` and `LONGSIGHT_CUDA_GRAPHS` switch off.
    #[must_use]
    pub fn from_environment() -> Self {
        CudaOptions {
            overlap: !switched_off("LONGSIGHT_CUDA_OVERLAP"),
            graphs: !switched_off("LONGSIGHT_CUDA_GRAPHS"),
        }
    }
}

/// The environment says `off` of what the variable names.
pub(super) fn switched_off(variable: &str) -> bool {
    std::env::var(variable).is_ok_and(|v| v == "off")
}
