//! Parallel loops. Results never depend on the number of threads: every output element is computed by one task
//! in an order that the shape fixes.

use std::sync::OnceLock;

use super::memory::Parts;
use super::pool::Pool;

/// Work (in rough elementary steps) that is worth another thread.
const GRAIN: usize = 1 << 13;

/// Threads that loops run on: `RAYON_NUM_THREADS` where that is a positive number, else as many as the process may
/// use cores.
pub(super) fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| {
        let set = std::env::var("RAYON_NUM_THREADS").ok();
        let set = set.and_then(|n| n.trim().parse().ok()).filter(|&n| n > 0);
        set.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
    })
}

fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool::new(threads()))
}

/// Runs `task(0) .. task(n - 1)`, in parallel when `work` of them together is worth it.
pub(super) fn tasks(n: usize, work: usize, task: impl Fn(usize) + Sync) {
    let width = (work / GRAIN).min(n).min(threads());
    if width <= 1 {
        (0..n).for_each(task);
    } else {
        pool().run(n, width, &task);
    }
}

/// Runs `task(i, chunk i of out)` for chunks of `len` elements (the last may be shorter).
pub(super) fn chunks<T: Send>(
    out: &mut [T],
    len: usize,
    work: usize,
    task: impl Fn(usize, &mut [T]) + Sync,
) {
    if out.is_empty() || len == 0 {
        return;
    }
    let total = out.len();
    let out = Parts::new(out);
    tasks(total.div_ceil(len), work, |i| {
        // SAFETY: one chunk a task.
        task(i, unsafe { out.part(i * len, len.min(total - i * len)) });
    });
}

/// Copies bytes, in parallel when there are many.
pub(super) fn copy(src: &[u8], dst: &mut [u8]) {
    /// Bytes of one task.
    const CHUNK: usize = 1 << 16;
    chunks(dst, CHUNK, src.len(), |i, part| {
        part.copy_from_slice(&src[i * CHUNK..][..part.len()]);
    });
}
