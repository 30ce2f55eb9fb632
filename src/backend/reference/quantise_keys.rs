//! Chosen key dimensions in few bits.

use super::{Cell, Layout, Output, Seq, floats, words};
use crate::backend::{Backend, QuantiseKeys, QuantisedSlice, Result, SliceBits};

/// See [`QuantiseKeys`]. The arithmetic is in f32, as the contract says: a byte of two numbers leaves no room for
/// roundings of another kind.
pub fn quantise_keys<'a>(p: &QuantiseKeys<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    const OP: &str = "quantise_keys";
    let (k, dims, done) = (floats(dev, p.cache.k)?, words(dev, p.slice.dims)?, words(dev, p.done)?);
    let (at, slice) = (Layout::of(&p.cache), &p.slice);
    let (n, bytes, most) = (slice.n_dims, slice.bits.row(slice.n_dims), slice.bits.most());
    let mut data = Output::exact(OP, "slice", slice.data);
    let mut scales = Output::new(OP, "slice scales", slice.scale);
    let mut now = Output::exact(OP, "done", p.done);
    for s in Seq::read(dev, &p.seqs)? {
        for h in 0..at.kv_heads {
            let head = s.slot * at.kv_heads + h;
            now.cells[head] = Cell::Is(s.kv_len as f64);
            for t in done[head] as usize..s.kv_len {
                let key =
                    dims[head * n..][..n].iter().map(|i| k[at.k(&s, h, t, *i as usize)] as f32);
                let key: Vec<f32> = key.collect();
                let scale = key.iter().fold(0.0, |m: f32, x| m.max(x.abs())) / most;
                let number =
                    |x: &f32| if scale > 0.0 { (x / scale).round_ties_even() } else { 0.0 };
                let numbers: Vec<i32> = key.iter().map(|x| number(x) as i32).collect();
                // A quotient on a device is good to a few units, so that one next to a half may go either way.
                let open = |i: usize| ((key[i] / scale).abs().fract() - 0.5).abs() < 1e-4;
                let cell = |i: usize| match slice.bits {
                    SliceBits::Eight if open(i) => {
                        Cell::Near(f64::from(key[i] / scale), 0.5 + 1e-4)
                    }
                    SliceBits::Eight => Cell::Is(f64::from(numbers[i])),
                    SliceBits::Four if open(2 * i) || open(2 * i + 1) => Cell::Any,
                    SliceBits::Four => {
                        Cell::Is(f64::from((numbers[2 * i] & 15 | numbers[2 * i + 1] << 4) as i8))
                    }
                };
                let row = head * slice.capacity + t;
                scales.cells[row] = Cell::Is(f64::from(scale));
                (0..bytes).for_each(|i| data.cells[row * bytes + i] = cell(i));
            }
        }
    }
    Ok(vec![data, scales, now])
}

/// The numbers of a slice times their scales, `[slots, kv_heads, capacity, n_dims]`.
pub(super) fn dequantised(s: &QuantisedSlice<'_>, dev: &dyn Backend) -> Result<Vec<f64>> {
    let (data, scales) = (floats(dev, s.data)?, floats(dev, s.scale)?);
    let number = |i: usize| match s.bits {
        SliceBits::Eight => data[i],
        SliceBits::Four => {
            let byte = data[i / 2] as i32;
            f64::from(if i.is_multiple_of(2) { byte << 28 >> 28 } else { byte >> 4 })
        }
    };
    let row = |i: usize| scales.get(i / s.n_dims).copied().unwrap_or_default();
    let numbers = data.len() / s.bits.row(s.n_dims) * s.n_dims;
    Ok((0..numbers).map(|i| number(i) * row(i)).collect())
}
