//! Writes the step's keys and values into their pages, with the int8 copy and the compact slice where given.
//!
//! int8: `scale = max_i |key[i]| / 127` over the leading dimensions, `data[i] = round(key[i] / scale)`, ties to even,
//! of the key as the page holds it.

use super::attention::tile;
use super::memory::{Io, Parts, with_float};
use super::par;
use super::seqs::{Sequence, sequences};
use super::simd::{Lane, Narrow};
use crate::backend::{CompactSlice, Int8Keys, KvAppend, PAGE, Result};

pub(super) fn run(io: &Io<'_>, p: &KvAppend<'_>) -> Result<()> {
    let seqs = sequences(io, &p.seqs)?;
    let lists = io.read::<u32>(p.seqs.pages)?;
    let pages: Vec<&[u32]> = seqs
        .iter()
        .map(|s| s.pages(io, lists, p.cache.n_pages, s.first_pos()))
        .collect::<Result<_>>()?;
    with_float!(io, p.cache.k.dtype(), T => append::<T>(io, p, &seqs, &pages))
}

fn append<T: Narrow>(
    io: &Io<'_>,
    p: &KvAppend<'_>,
    seqs: &[Sequence],
    pages: &[&[u32]],
) -> Result<()> {
    let (d, lead, hkv) = (p.cache.head_dim, p.cache.lead, p.cache.kv_heads);
    let (k, v) = (io.read::<f32>(p.k)?, io.read::<f32>(p.v)?);
    let keys = Parts::new(io.write::<T>(p.cache.k)?);
    let values = Parts::new(io.write::<T>(p.cache.v)?);
    let int8 = p.int8.as_ref().map(|q| Int8Writer::new(io, q)).transpose()?;
    let slice = p.slice.as_ref().map(|s| SliceWriter::<T>::new(io, s, hkv, d, seqs)).transpose()?;
    let rows: usize = seqs.iter().map(|s| s.q_len).sum();
    par::tasks(hkv, rows * hkv * d, |h| {
        let mut key = vec![T::narrow(0.0); d];
        for (seq, pages) in seqs.iter().zip(pages) {
            for i in 0..seq.q_len {
                let (r, pos) = (seq.q_start + i, seq.first_pos() + i);
                let (page, row) = (pages[pos / PAGE], pos % PAGE);
                let at = tile(page, h, hkv, d);
                narrow(&k[r * p.k_stride + h * d..][..d], &mut key);
                // SAFETY: everything a task writes belongs to its KV head.
                unsafe {
                    keys.part(at + row * lead, lead).copy_from_slice(&key[..lead]);
                    keys.part(at + PAGE * lead + row * (d - lead), d - lead)
                        .copy_from_slice(&key[lead..]);
                    narrow(&v[r * p.v_stride + h * d..][..d], values.part(at + row * d, d));
                    if let Some(q) = &int8 {
                        q.put(tile(page, h, hkv, 1) + row, &key);
                    }
                    if let Some(s) = &slice {
                        s.put(seq, h, pos, &key);
                    }
                }
            }
        }
    });
    Ok(())
}

fn narrow<T: Narrow>(from: &[f32], to: &mut [T]) {
    to.iter_mut().zip(from).for_each(|(t, x)| *t = T::narrow(*x));
}

struct Int8Writer<'a> {
    data: Parts<'a, i8>,
    scale: Parts<'a, f32>,
    dims: usize,
}

impl<'a> Int8Writer<'a> {
    fn new(io: &'a Io<'_>, q: &Int8Keys<'a>) -> Result<Self> {
        let (data, scale) = (io.write::<i8>(q.data)?, io.write::<f32>(q.scale)?);
        Ok(Int8Writer { data: Parts::new(data), scale: Parts::new(scale), dims: q.dims })
    }

    /// Quantises `key` into row `row` of the copy.
    ///
    /// # Safety
    /// No other task writes this row.
    unsafe fn put<T: Lane>(&self, row: usize, key: &[T]) {
        let key = &key[..self.dims];
        let max = key.iter().map(|x| x.widen().abs()).fold(0.0, f32::max);
        let scale = max / 127.0;
        // SAFETY: the caller's promise.
        let (data, to) =
            unsafe { (self.data.part(row * self.dims, self.dims), self.scale.part(row, 1)) };
        to[0] = scale;
        for (to, x) in data.iter_mut().zip(key) {
            let x = if scale > 0.0 { x.widen() / scale } else { 0.0 };
            // A cast saturates, and takes NaN to 0.
            *to = x.round_ties_even() as i8;
        }
    }
}

struct SliceWriter<'a, T> {
    data: Parts<'a, T>,
    dims: &'a [u32],
    n_dims: usize,
    capacity: usize,
    kv_heads: usize,
}

impl<'a, T: Lane> SliceWriter<'a, T> {
    fn new(
        io: &'a Io<'_>,
        s: &CompactSlice<'a>,
        kv_heads: usize,
        d: usize,
        seqs: &[Sequence],
    ) -> Result<Self> {
        let dims = io.read::<u32>(s.dims)?;
        for seq in seqs.iter().filter(|q| q.kv_len <= s.capacity) {
            let per_slot = kv_heads * s.n_dims;
            if seq.slot >= s.slots {
                return Err(io.bad(format!("slot {} of {}", seq.slot, s.slots)));
            }
            check_list(io, &dims[seq.slot * per_slot..][..per_slot], d)?;
        }
        let data = Parts::new(io.write::<T>(s.data)?);
        Ok(SliceWriter { data, dims, n_dims: s.n_dims, capacity: s.capacity, kv_heads })
    }

    /// Writes the chosen dimensions of the key at `pos`; nothing for a sequence that outgrew the slice.
    ///
    /// # Safety
    /// No other task writes this KV head.
    unsafe fn put(&self, seq: &Sequence, h: usize, pos: usize, key: &[T]) {
        if seq.kv_len > self.capacity {
            return;
        }
        let head = seq.slot * self.kv_heads + h;
        let dims = &self.dims[head * self.n_dims..][..self.n_dims];
        // SAFETY: the caller's promise.
        let row =
            unsafe { self.data.part((head * self.capacity + pos) * self.n_dims, self.n_dims) };
        row.iter_mut().zip(dims).for_each(|(to, &i)| *to = key[i as usize]);
    }
}

/// Every listed dimension is below `head_dim`.
pub(super) fn check_list(io: &Io<'_>, dims: &[u32], head_dim: usize) -> Result<()> {
    match dims.iter().find(|&&i| i as usize >= head_dim) {
        Some(i) => Err(io.bad(format!("dimension {i} of {head_dim}"))),
        None => Ok(()),
    }
}
