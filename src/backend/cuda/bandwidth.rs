//! How fast the device reads its memory.

use super::CudaBackend;
use super::clock::timed;
use super::launch::{Args, Shape};
use super::memory::Memory;
use crate::backend::{Backend, Result};

impl CudaBackend {
    /// GB/s of a kernel that reads as much memory as fits, up to 8 GiB.
    pub(super) fn read_bandwidth(&self) -> Result<f64> {
        let free = self.free_memory().unwrap_or(0) as usize;
        let bytes = (8usize << 30).min(free / 2).max(1 << 20) / 64 * 64;
        let memory = Memory::new(&self.stream, bytes, "the bandwidth test")?;
        let sink = self.scratch(4)?;
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            let ms = timed(&self.stream, &mut || {
                let args = Args::new().with(memory.ptr()).with((bytes / 16) as u64).with(sink.ptr);
                let shape = Shape::new([self.limits.sms * 8, 1, 1], 256);
                self.launch("bandwidth", "bandwidth", shape, args)
            })?;
            best = best.min(ms);
        }
        Ok(bytes as f64 / best / 1e6)
    }
}
