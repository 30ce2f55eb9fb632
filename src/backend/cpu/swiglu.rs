//! SwiGLU: `out[r, i] = silu(x[r, i]) * x[r, ffn + i]`.

use super::memory::Io;
use super::{par, simd};
use crate::backend::{Result, SwiGlu};

pub(super) fn run(io: &Io<'_>, p: &SwiGlu<'_>) -> Result<()> {
    let x = io.read::<f32>(p.x)?;
    let out = &mut io.write::<f32>(p.out)?[..p.rows * p.ffn];
    par::chunks(out, p.ffn, p.rows * p.ffn, |r, out| {
        let (gate, up) = x[r * 2 * p.ffn..][..2 * p.ffn].split_at(p.ffn);
        simd::swiglu(gate, up, out);
    });
    Ok(())
}
