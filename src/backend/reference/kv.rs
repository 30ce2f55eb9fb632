//! Writing the paged KV cache.

use super::{Cell, Layout, Output, Seq, decode, encode, floats, words};
use crate::backend::{Backend, KeyStats, KvAppend, Result, key_stats_len};

/// See [`KvAppend`]. Outputs: `k`, `v`, then `int8 data`, `int8 scale`, `slice` where given.
pub fn kv_append<'a>(p: &KvAppend<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    const OP: &str = "kv_append";
    let (k, v) = (floats(dev, p.k)?, floats(dev, p.v)?);
    let dims = p.slice.as_ref().map(|s| words(dev, s.dims)).transpose()?;
    let at = Layout::of(&p.cache);
    let mut keys = Output::exact(OP, "k", p.cache.k);
    let mut values = Output::exact(OP, "v", p.cache.v);
    let mut data = p.int8.as_ref().map(|q| Output::new(OP, "int8 data", q.data));
    let mut scale = p.int8.as_ref().map(|q| Output::new(OP, "int8 scale", q.scale));
    let mut slice = p.slice.as_ref().map(|s| Output::exact(OP, "slice", s.data));
    for s in Seq::read(dev, &p.seqs)? {
        for (row, h) in (0..s.q_len).flat_map(|r| (0..at.kv_heads).map(move |h| (r, h))) {
            let j = s.kv_len - s.q_len + row;
            let r = s.q_start + row;
            for i in 0..at.d {
                keys.cells[at.k(&s, h, j, i)] = Cell::Is(k[r * p.k_stride + h * at.d + i]);
                values.cells[at.v(&s, h, j, i)] = Cell::Is(v[r * p.v_stride + h * at.d + i]);
            }
            let new = &k[r * p.k_stride + h * at.d..][..at.d];
            // The summaries see the key as it is stored.
            let stored = decode(p.cache.k.dtype(), &encode(p.cache.k.dtype(), new));
            if let (Some(q), Some(data), Some(scale)) = (&p.int8, &mut data, &mut scale) {
                let lead = &stored[..q.dims];
                let step = lead.iter().fold(0.0, |m: f64, x| m.max(x.abs())) / 127.0;
                let at = at.row(&s, h, j);
                scale.cells[at] = Cell::Is(step);
                for (i, x) in lead.iter().enumerate() {
                    // Within half a step; the slack covers the rounding of the f32 quotient.
                    let x = if step == 0.0 { 0.0 } else { x / step };
                    data.cells[at * q.dims + i] = Cell::Near(x, 0.5 + 1e-4);
                }
            }
            if let (Some(c), Some(dims), Some(slice)) = (&p.slice, &dims, &mut slice)
                && s.kv_len <= c.capacity
            {
                let head = s.slot * at.kv_heads + h;
                for col in 0..c.n_dims {
                    let x = stored[dims[head * c.n_dims + col] as usize];
                    slice.cells[(head * c.capacity + j) * c.n_dims + col] = Cell::Is(x);
                }
            }
        }
    }
    Ok([Some(keys), Some(values), data, scale, slice].into_iter().flatten().collect())
}

/// See [`KeyStats`].
pub fn key_stats<'a>(p: &KeyStats<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (k, old) = (floats(dev, p.cache.k)?, floats(dev, p.stats)?);
    let at = Layout::of(&p.cache);
    let (d, len) = (at.d, key_stats_len(at.d));
    let mut out = Output::new("key_stats", "stats", p.stats);
    for s in Seq::read(dev, &p.seqs)? {
        for h in 0..at.kv_heads {
            let base = (s.slot * at.kv_heads + h) * len;
            let fresh = s.kv_len == s.q_len;
            let mut sums = if fresh { vec![0.0; len] } else { old[base..base + len].to_vec() };
            for j in s.kv_len - s.q_len..s.kv_len {
                let key: Vec<f64> = (0..d).map(|i| k[at.k(&s, h, j, i)]).collect();
                for (i, x) in key.iter().enumerate() {
                    sums[i] += x;
                    sums[d + i] += x * x;
                }
                for (i, pair) in key.chunks_exact(2).enumerate() {
                    let square = pair[0] * pair[0] + pair[1] * pair[1];
                    sums[2 * d + i] += square.sqrt();
                    sums[2 * d + d / 2 + i] += square;
                }
            }
            out.put(base, &sums);
        }
    }
    Ok(vec![out])
}
