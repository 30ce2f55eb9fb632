//! Content importance of new tokens.

use super::{Output, decode, encode, floats};
use crate::backend::{Backend, ContentBias, Result};

/// See [`ContentBias`].
pub fn content_bias<'a>(p: &ContentBias<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (v, delta, a) = (floats(dev, p.v)?, floats(dev, p.delta)?, floats(dev, p.a)?);
    let (d, width) = (p.head_dim, p.kv_heads * p.head_dim);
    let mut q = Output::exact("content_bias", "q", p.q);
    let mut k = Output::new("content_bias", "k", p.k);
    let rounded = |x: f64| decode(p.q.dtype(), &encode(p.q.dtype(), &[x]))[0];
    let whole = (d as f64).sqrt();
    let high = rounded(whole);
    let mut tail = vec![0.0; d - p.at];
    for r in 0..p.rows {
        for m in 0..p.kv_heads {
            let product = |i: usize| delta[m * width + i] * v[r * p.v_stride + i];
            let x: f64 = (0..width).map(product).sum();
            let cis = a[m] * (x.max(0.0) + (-x.abs()).exp().ln_1p());
            tail[..2].fill(cis);
            k.put((r * p.kv_heads + m) * d + p.at, &tail);
        }
        tail[..2].copy_from_slice(&[high, whole - high]);
        (0..p.heads).for_each(|h| q.put((r * p.heads + h) * d + p.at, &tail));
    }
    Ok(vec![q, k])
}
