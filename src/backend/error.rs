//! Errors of the backends.

use thiserror::Error;

/// What can go wrong on a device.
#[derive(Debug, Error)]
pub enum BackendError {
    /// No such device, or its driver is not installed.
    #[error("{backend}: {reason}")]
    Unavailable {
        /// Backend name (`cpu`, `wgpu`, `cuda`).
        backend: &'static str,
        /// Sentence that says what was looked for and what to do.
        reason: String,
    },
    /// The device has no room for a buffer.
    #[error(
        "out of device memory: {what} needs {need} bytes, {free} are free; \
         use a shorter context, a smaller batch, a 16-bit dtype, or another device"
    )]
    OutOfMemory {
        /// What was being allocated.
        what: String,
        /// Bytes asked for.
        need: u64,
        /// Bytes free on the device, as far as it tells.
        free: u64,
    },
    /// A single buffer is larger than the device can bind.
    #[error("{what} needs {need} bytes in one buffer, this device binds at most {limit}; {remedy}")]
    BufferLimit {
        /// What was being allocated or bound.
        what: String,
        /// Bytes asked for.
        need: u64,
        /// The device's limit in bytes.
        limit: u64,
        /// What the user can do.
        remedy: String,
    },
    /// An op was called with shapes or dtypes that do not fit together. A bug in the caller.
    #[error("op {op}: {reason}")]
    BadArgument {
        /// Op name.
        op: &'static str,
        /// Which field, and what was expected.
        reason: String,
    },
    /// The backend has no kernel for this combination; the support table says which there are.
    #[error("op {op} has no {backend} kernel for {what}")]
    Unsupported {
        /// Op name.
        op: &'static str,
        /// Backend name.
        backend: &'static str,
        /// The dtype or shape.
        what: String,
    },
    /// The driver reported an error, or the device was lost.
    #[error("{backend} driver: {reason}")]
    Driver {
        /// Backend name.
        backend: &'static str,
        /// What the driver said.
        reason: String,
    },
    /// A kernel did not compile on this device.
    #[error("{backend} could not compile {kernel}: {reason}")]
    Compile {
        /// Backend name.
        backend: &'static str,
        /// Kernel or shader name.
        kernel: String,
        /// Compiler message.
        reason: String,
    },
}

impl BackendError {
    /// The device has no room, or none in a single buffer: something smaller may fit.
    pub fn is_full(&self) -> bool {
        matches!(self, BackendError::OutOfMemory { .. } | BackendError::BufferLimit { .. })
    }
}

/// Result of a backend call.
pub type Result<T> = std::result::Result<T, BackendError>;
