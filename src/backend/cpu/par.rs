//! Parallel loops. Results never depend on the number of threads: tasks are cut by shape alone, and every
//! output element is computed by one task in a fixed order.

use rayon::prelude::*;

/// Work (in rough elementary steps) below which waking other threads costs more than it saves.
const SMALL: usize = 1 << 15;

/// Runs `task(0) .. task(n - 1)`, in parallel when `work` of them together is worth it.
pub(super) fn tasks(n: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    if n <= 1 || work < SMALL {
        (0..n).for_each(task);
    } else {
        (0..n).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// Runs `task(i, chunk i of out)` for chunks of `len` elements (the last may be shorter).
pub(super) fn chunks<T: Send>(
    out: &mut [T],
    len: usize,
    work: usize,
    task: impl Fn(usize, &mut [T]) + Sync + Send,
) {
    if out.is_empty() || len == 0 {
        return;
    }
    if out.len() <= len || work < SMALL {
        out.chunks_mut(len).enumerate().for_each(|(i, c)| task(i, c));
    } else {
        out.par_chunks_mut(len).enumerate().for_each(|(i, c)| task(i, c));
    }
}

/// Copies bytes, in parallel when there are many.
pub(super) fn copy(src: &[u8], dst: &mut [u8]) {
    /// Bytes of one task.
    const CHUNK: usize = 1 << 20;
    chunks(dst, CHUNK, src.len(), |i, part| {
        part.copy_from_slice(&src[i * CHUNK..][..part.len()]);
    });
}
