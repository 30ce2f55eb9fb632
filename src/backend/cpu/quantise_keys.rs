//! Brings the chosen key dimensions of every token, in 4 or 8 bits, up to date.

use super::attention::tile;
use super::kv_append::check_list;
use super::memory::{Io, Parts, with_float};
use super::par;
use super::seqs::slotted;
use super::simd::Lane;
use crate::backend::{KvPool, PAGE, QuantiseKeys, Result, SliceBits};

pub(super) fn run(io: &Io<'_>, p: &QuantiseKeys<'_>) -> Result<()> {
    let (pool, slice) = (&p.cache, &p.slice);
    let (d, hkv, n) = (pool.head_dim, pool.kv_heads, slice.n_dims);
    let seqs = slotted(io, &p.seqs, slice.slots)?;
    let lists = io.read::<u32>(p.seqs.pages)?;
    let dims = io.read::<u32>(slice.dims)?;
    let data = Parts::new(io.write::<i8>(slice.data)?);
    let scales = Parts::new(io.write::<f32>(slice.scale)?);
    let done = io.write::<u32>(p.done)?;
    with_float!(io, pool.k.dtype(), T => {
        let k = io.read::<T>(pool.k)?;
        for seq in &seqs {
            let heads = seq.slot * hkv;
            check_list(io, &dims[heads * n..(heads + hkv) * n], d)?;
            let from: Vec<usize> =
                (0..hkv).map(|h| (done[heads + h] as usize).min(seq.kv_len)).collect();
            let first = from.iter().copied().min().unwrap_or(seq.kv_len);
            let pages = seq.pages(io, lists, pool.n_pages, first)?;
            let tiles = seq.kv_len.div_ceil(PAGE) - first / PAGE;
            par::tasks(hkv * tiles, hkv * (seq.kv_len - first) * n * 4, |i| {
                let (h, page) = (i / tiles, first / PAGE + i % tiles);
                let at = tile(pages[page], h, hkv, d);
                let list = &dims[(heads + h) * n..][..n];
                let mut key = vec![0.0; n];
                for t in from[h].max(page * PAGE)..seq.kv_len.min((page + 1) * PAGE) {
                    for (x, &i) in key.iter_mut().zip(list) {
                        *x = k[at + KvPool::k_offset(pool.lead, d, t % PAGE, i as usize)].widen();
                    }
                    let row = (heads + h) * slice.capacity + t;
                    let bytes = slice.bits.row(n);
                    // SAFETY: a task writes the tokens of its page, of its KV head.
                    let (to, scale) = unsafe { (data.part(row * bytes, bytes), scales.part(row, 1)) };
                    scale[0] = quantise(&key, slice.bits, to);
                }
            });
            done[heads..][..hkv].fill(seq.kv_len as u32);
        }
        Ok(())
    })
}

/// The numbers of a key, packed; answers their scale.
pub(super) fn quantise(key: &[f32], bits: SliceBits, to: &mut [i8]) -> f32 {
    let most = bits.most();
    let scale = key.iter().map(|x| x.abs()).fold(0.0, f32::max) / most;
    let number = |x: f32| {
        let x = if scale > 0.0 { x / scale } else { 0.0 };
        // A cast saturates, and takes NaN to 0.
        x.round_ties_even().clamp(-most, most) as i8
    };
    match bits {
        SliceBits::Eight => to.iter_mut().zip(key).for_each(|(to, x)| *to = number(*x)),
        SliceBits::Four => {
            for (to, pair) in to.iter_mut().zip(key.chunks_exact(2)) {
                *to = number(pair[0]) & 15 | number(pair[1]) << 4;
            }
        }
    }
    scale
}
