//! Queries and keys on directions of their own.

use super::{Cell, Layout, Output, Seq, floats, words};
use crate::backend::{Backend, Project, Result};

/// See [`Project`].
pub fn project<'a>(p: &Project<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (q, k, basis) = (floats(dev, p.q)?, floats(dev, p.cache.k)?, floats(dev, p.basis)?);
    let before = words(dev, p.done)?;
    let at = Layout::of(&p.cache);
    let (d, hkv) = (at.d, at.kv_heads);
    let mut out = Output::new("project", "out", p.out);
    let mut slice = Output::new("project", "slice", p.slice);
    let mut done = Output::exact("project", "done", p.done);
    for s in Seq::read(dev, &p.seqs)? {
        let along = |kv: usize, x: &dyn Fn(usize) -> f64| -> Vec<f64> {
            let one =
                |i: usize| -> f64 { (0..d).map(|j| basis[(kv * p.n + i) * d + j] * x(j)).sum() };
            (0..p.n).map(one).collect()
        };
        for h in 0..p.heads {
            let from = (s.q_start * p.heads + h) * d;
            let mut values = along(h / (p.heads / hkv), &|j| q[from + j]);
            values.resize(d, 0.0);
            out.put(from, &values);
        }
        for kv in 0..hkv {
            let head = s.slot * hkv + kv;
            for t in (before[head] as usize).min(s.kv_len)..s.kv_len {
                let row = along(kv, &|j| k[at.k(&s, kv, t, j)]);
                slice.put((head * p.capacity + t) * p.n, &row);
            }
            done.cells[head] = Cell::Is(s.kv_len as f64);
        }
    }
    Ok(vec![out, slice, done])
}
