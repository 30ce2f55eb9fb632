//! Rewrites the marked columns of the compact slice: `slice[j, c] = K[j, dims[c]]` for every changed column `c`
//! and all `kv_len` tokens.

use super::attention::tile;
use super::kv_append::check_list;
use super::memory::{Io, Parts, with_float};
use super::par;
use super::seqs::slotted;
use crate::backend::{CHANGED_WORDS, KvPool, PAGE, RebuildSlice, Result};

pub(super) fn run(io: &Io<'_>, p: &RebuildSlice<'_>) -> Result<()> {
    let (pool, slice) = (&p.cache, &p.slice);
    let (d, hkv, n) = (pool.head_dim, pool.kv_heads, slice.n_dims);
    let seqs = slotted(io, &p.seqs, slice.slots)?;
    let lists = io.read::<u32>(p.seqs.pages)?;
    let changed = io.read::<u32>(p.changed)?;
    let dims = io.read::<u32>(slice.dims)?;
    with_float!(io, pool.k.dtype(), T => {
        let k = io.read::<T>(pool.k)?;
        let data = Parts::new(io.write::<T>(slice.data)?);
        for seq in &seqs {
            let pages = seq.pages(io, lists, pool.n_pages, 0)?;
            // (column, dimension) of each KV head.
            let mut columns = Vec::with_capacity(hkv);
            for head in seq.slot * hkv..(seq.slot + 1) * hkv {
                let mask = &changed[head * CHANGED_WORDS..][..CHANGED_WORDS];
                let list = &dims[head * n..][..n];
                let marked: Vec<(usize, u32)> = (0..n)
                    .filter(|c| mask[c / 32] >> (c % 32) & 1 == 1)
                    .map(|c| (c, list[c]))
                    .collect();
                check_list(io, &marked.iter().map(|m| m.1).collect::<Vec<_>>(), d)?;
                columns.push(marked);
            }
            let work = columns.iter().map(|c| c.len() * seq.kv_len).sum();
            par::tasks(hkv * pages.len(), work, |i| {
                let (h, page) = (i / pages.len(), i % pages.len());
                let at = tile(pages[page], h, hkv, d);
                let tokens = page * PAGE..seq.kv_len.min((page + 1) * PAGE);
                let first = (seq.slot * hkv + h) * slice.capacity + tokens.start;
                if columns[h].is_empty() {
                    return;
                }
                // SAFETY: a task writes the tokens of its page, of its KV head.
                let rows = unsafe { data.part(first * n, tokens.len() * n) };
                for (row, to) in rows.chunks_exact_mut(n).enumerate() {
                    for &(c, dim) in &columns[h] {
                        to[c] = k[at + KvPool::k_offset(pool.lead, d, row, dim as usize)];
                    }
                }
            });
        }
        Ok(())
    })
}
