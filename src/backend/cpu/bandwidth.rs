//! Measured memory bandwidth: what the decode ops are compared with.

use std::time::Instant;

use super::{CpuBackend, par, simd};
use crate::backend::{Backend, BackendError, Bandwidth, DType, Result};

/// Far more than any last-level cache, where memory allows.
const BYTES: usize = 1 << 30;
/// Elements that one task reads.
const READ: usize = 1 << 18;
/// Passes; the best counts.
const PASSES: usize = 5;
/// Times that reading is tried, each time in other pages of memory: one in bad places reads half as fast, and made a
/// model's steps look faster than the memory. The best counts.
const PROBES: usize = 3;

/// Host to device: copying into a buffer. Device read: summing a buffer, on all threads.
pub(super) fn measure(cpu: &CpuBackend) -> Result<Bandwidth> {
    let free = cpu.free_memory().unwrap_or(4 * BYTES as u64);
    let bytes = BYTES.min(usize::try_from(free / 4).unwrap_or(BYTES)) & !0xfff;
    let source = || {
        let from = cpu.alloc(DType::F32, bytes / 4, "bandwidth test source")?;
        // Until it is written to, all of it is one page of zeros in a cache.
        cpu.io("bandwidth")?.write::<f32>(&from)?.fill(1.0);
        Ok::<_, BackendError>(from)
    };
    let mut read = 0.0;
    for _ in 0..PROBES {
        let from = source()?;
        let io = cpu.io("bandwidth")?;
        let data = io.read::<f32>(&from)?;
        let mut sums = vec![0.0; data.len().div_ceil(READ)];
        let found = best(bytes, || {
            par::chunks(&mut sums, 1, data.len(), |i, sum| {
                sum[0] = simd::sum(&data[i * READ..data.len().min((i + 1) * READ)]);
            });
            std::hint::black_box(&mut sums);
        });
        read = f64::max(read, found);
    }
    let from = source()?;
    let to = cpu.alloc(DType::F32, bytes / 4, "bandwidth test target")?;
    let io = cpu.io("bandwidth")?;
    let (src, dst) = (io.read_bytes(&from)?, io.write_bytes(&to)?);
    let copy = best(bytes, || par::copy(src, std::hint::black_box(&mut *dst)));
    Ok(Bandwidth { host_to_device: copy, device_read: read })
}

/// GB/s of the fastest pass.
fn best(bytes: usize, mut pass: impl FnMut()) -> f64 {
    let mut seconds = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        pass();
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    bytes as f64 / 1e9 / seconds.max(1e-9)
}
