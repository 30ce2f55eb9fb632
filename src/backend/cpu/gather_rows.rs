//! Row gather: `out[i, :] = x[rows[i], :]`.

use super::memory::Io;
use super::par;
use crate::backend::{GatherRows, Result};

pub(super) fn run(io: &Io<'_>, p: &GatherRows<'_>) -> Result<()> {
    let width = p.cols * p.x.dtype().bytes();
    let rows = &io.read::<u32>(p.rows)?[..p.n];
    if let Some(r) = rows.iter().find(|&&r| r as usize >= p.x_rows) {
        return Err(io.bad(format!("row {r} of {}", p.x_rows)));
    }
    let x = io.read_bytes(p.x)?;
    let out = &mut io.write_bytes(p.out)?[..p.n * width];
    par::chunks(out, width, p.n * width, |i, row| {
        row.copy_from_slice(&x[rows[i] as usize * width..][..width]);
    });
    Ok(())
}
