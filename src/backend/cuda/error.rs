//! Driver errors as sentences.

use crate::backend::{BackendError, Result};
use cudarc::cublaslt::result::CublasError;
use cudarc::driver::DriverError;

/// Adds what was being done to a driver's answer.
pub(super) trait Said<T> {
    fn said(self, what: &str) -> Result<T>;
}

pub(super) fn driver(reason: String) -> BackendError {
    BackendError::Driver { backend: "cuda", reason }
}

impl<T> Said<T> for std::result::Result<T, DriverError> {
    fn said(self, what: &str) -> Result<T> {
        self.map_err(|e| driver(format!("{what}: {e}")))
    }
}

impl<T> Said<T> for std::result::Result<T, CublasError> {
    fn said(self, what: &str) -> Result<T> {
        self.map_err(|e| driver(format!("{what}: cuBLASLt says {e}")))
    }
}
