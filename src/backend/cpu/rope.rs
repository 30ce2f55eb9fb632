//! Rotary embedding on interleaved pairs, after an optional RMS norm of each head.
//!
//! With `a = t * inv_freq[p]`: `out[2p] = x[2p] cos a - x[2p+1] sin a`,
//! `out[2p+1] = x[2p+1] cos a + x[2p] sin a`.

use super::memory::Io;
use super::par;
use super::rms_norm::normalize;
use crate::backend::{Result, Rope};

pub(super) fn run(io: &Io<'_>, p: &Rope<'_>) -> Result<()> {
    let (d, half) = (p.head_dim, p.head_dim / 2);
    let x = io.read::<f32>(p.x)?;
    let positions = io.read::<u32>(p.positions)?;
    let inv_freq = io.read::<f32>(p.inv_freq)?;
    let norm = p.norm.as_ref().map(|n| Ok((io.read::<f32>(n.weight)?, n.eps))).transpose()?;
    let width = p.heads * d;
    let out = &mut io.write::<f32>(p.out)?[..p.rows * width];
    // The sine and cosine of a pair cost far more than its rotation.
    par::chunks(out, width, 8 * p.rows * width, |r, out| {
        let row = &x[r * p.x_stride..][..width];
        let t = positions[r] as f32;
        let mut angles = vec![(0.0, 0.0); half];
        let mut held: &[f32] = &[];
        for (h, out) in out.chunks_exact_mut(d).enumerate() {
            let freqs = &inv_freq[h / p.heads_per_freq * half..][..half];
            // Most models have the same frequencies in every head.
            if freqs != held {
                held = freqs;
                for (a, f) in angles.iter_mut().zip(freqs) {
                    let (sin, cos) = (t * f).sin_cos();
                    *a = (sin * p.factor, cos * p.factor);
                }
            }
            match norm {
                Some((w, eps)) => normalize(&row[h * d..][..d], &w[h * d..][..d], eps, out),
                None => out.copy_from_slice(&row[h * d..][..d]),
            }
            for (pair, &(sin, cos)) in out.chunks_exact_mut(2).zip(&angles) {
                let (even, odd) = (pair[0], pair[1]);
                pair[0] = even * cos - odd * sin;
                pair[1] = odd * cos + even * sin;
            }
        }
    });
    Ok(())
}
