//! Projects decode queries and the new keys of their sequences on `n` directions per KV head.

use super::attention::tile;
use super::memory::{Io, Parts, with_float};
use super::par;
use super::seqs::slotted;
use super::simd::{self, Lane, Narrow};
use crate::backend::{KvPool, PAGE, Project, Result};

pub(super) fn run(io: &Io<'_>, p: &Project<'_>) -> Result<()> {
    let (d, lead, hkv, n) = (p.cache.head_dim, p.cache.lead, p.cache.kv_heads, p.n);
    let group = p.heads / hkv;
    let seqs = slotted(io, &p.seqs, p.slots)?;
    let lists = io.read::<u32>(p.seqs.pages)?;
    let (q, basis) = (io.read::<f32>(p.q)?, io.read::<f32>(p.basis)?);
    let out = Parts::new(io.write::<f32>(p.out)?);
    let done = io.write::<u32>(p.done)?;
    let basis_of = |h: usize| &basis[h * n * d..(h + 1) * n * d];
    par::tasks(seqs.len() * p.heads, seqs.len() * p.heads * n * d, |i| {
        let (seq, h) = (&seqs[i / p.heads], i % p.heads);
        for row in seq.q_start..seq.q_start + seq.q_len {
            let at = (row * p.heads + h) * d;
            // SAFETY: a task writes its head of the row of its sequence; no two sequences share a row.
            let out = unsafe { out.part(at, d) };
            out[n..].fill(0.0);
            simd::gemv(&q[at..at + d], basis_of(h / group), &mut out[..n]);
        }
    });
    with_float!(io, p.cache.k.dtype(), T => {
        let k = io.read::<T>(p.cache.k)?;
        let slice = Parts::new(io.write::<T>(p.slice)?);
        for seq in &seqs {
            let from: Vec<usize> = (0..hkv)
                .map(|h| (done[seq.slot * hkv + h] as usize).min(seq.kv_len))
                .collect();
            let first = from.iter().copied().min().unwrap_or(seq.kv_len);
            let pages = seq.pages(io, lists, p.cache.n_pages, first)?;
            let tiles = seq.kv_len.div_ceil(PAGE) - first / PAGE;
            par::tasks(hkv * tiles, hkv * (seq.kv_len - first) * n * d, |i| {
                let (h, page) = (i / tiles, first / PAGE + i % tiles);
                let tokens = from[h].max(page * PAGE)..seq.kv_len.min((page + 1) * PAGE);
                let at = tile(pages[page], h, hkv, d);
                let (mut key, mut row) = (vec![0.0; d], vec![0.0; n]);
                for t in tokens {
                    for (i, x) in key.iter_mut().enumerate() {
                        *x = k[at + KvPool::k_offset(lead, d, t % PAGE, i)].widen();
                    }
                    simd::gemv(&key, basis_of(h), &mut row);
                    let start = ((seq.slot * hkv + h) * p.capacity + t) * n;
                    // SAFETY: a task writes the tokens of its page, of its KV head.
                    let to = unsafe { slice.part(start, n) };
                    to.iter_mut().zip(&row).for_each(|(to, x)| *to = T::narrow(*x));
                }
            });
            done[seq.slot * hkv..][..hkv].fill(seq.kv_len as u32);
        }
        Ok(())
    })
}
