//! RMS normalisation: `out[r, :] = x[r, :] / sqrt(mean(x[r, :]^2) + eps) * weight`.

use super::memory::Io;
use super::{par, simd};
use crate::backend::{Result, RmsNorm};

pub(super) fn run(io: &Io<'_>, p: &RmsNorm<'_>) -> Result<()> {
    let x = io.read::<f32>(p.x)?;
    let weight = &io.read::<f32>(p.weight)?[..p.cols];
    let out = &mut io.write::<f32>(p.out)?[..p.rows * p.cols];
    par::chunks(out, p.cols, p.rows * p.cols, |r, out| {
        normalize(&x[r * p.cols..][..p.cols], weight, p.eps, out);
    });
    Ok(())
}

/// One row; also the per-head norm of `rope`.
pub(super) fn normalize(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = simd::sum_squares(x) / x.len() as f32;
    simd::scale_by(x, 1.0 / (mean + eps).sqrt(), weight, out);
}
