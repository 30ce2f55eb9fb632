//! Content importance of new tokens, in the keys' and queries' dimensions for it.

use super::memory::Io;
use super::{par, simd};
use crate::backend::{ContentBias, Result};

pub(super) fn run(io: &Io<'_>, p: &ContentBias<'_>) -> Result<()> {
    let (d, width) = (p.head_dim, p.kv_heads * p.head_dim);
    let (v, a) = (io.read::<f32>(p.v)?, io.read::<f32>(p.a)?);
    let delta = &io.read::<f32>(p.delta)?[..p.kv_heads * width];
    let k = &mut io.write::<f32>(p.k)?[..p.rows * width];
    par::chunks(k, width, p.rows * width * p.kv_heads, |r, out| {
        let mut sums = vec![0.0; p.kv_heads];
        simd::gemv(&v[r * p.v_stride..][..width], delta, &mut sums);
        for ((key, x), a) in out.chunks_exact_mut(d).zip(sums).zip(a) {
            let cis = a * (x.max(0.0) + (-x.abs()).exp().ln_1p());
            fill(&mut key[p.at..], [cis; 2]);
        }
    });
    let unit = p.unit();
    let q = &mut io.write::<f32>(p.q)?[..p.rows * p.heads * d];
    q.chunks_exact_mut(d).for_each(|query| fill(&mut query[p.at..], unit));
    Ok(())
}

/// Two numbers, and zeros.
fn fill(tail: &mut [f32], first: [f32; 2]) {
    tail.fill(0.0);
    tail[..2].copy_from_slice(&first);
}
