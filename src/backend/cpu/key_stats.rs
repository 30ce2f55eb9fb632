//! Running sums over the appended keys, per coordinate and per norm of a rotary pair: for each new key,
//! `sum[i] += k[i]`, `squares[i] += k[i]^2`, and the same for `n[p] = sqrt(k[2p]^2 + k[2p+1]^2)`.

use super::attention::tile;
use super::memory::{Io, Parts, with_float};
use super::par;
use super::seqs::slotted;
use super::simd::Lane;
use crate::backend::{KeyStats, KvPool, PAGE, Result, key_stats_len};

pub(super) fn run(io: &Io<'_>, p: &KeyStats<'_>) -> Result<()> {
    let (d, lead, hkv) = (p.cache.head_dim, p.cache.lead, p.cache.kv_heads);
    let seqs = slotted(io, &p.seqs, p.slots)?;
    let lists = io.read::<u32>(p.seqs.pages)?;
    let pages: Vec<&[u32]> = seqs
        .iter()
        .map(|s| s.pages(io, lists, p.cache.n_pages, s.first_pos()))
        .collect::<Result<_>>()?;
    let stats = Parts::new(io.write::<f32>(p.stats)?);
    let len = key_stats_len(d);
    let rows: usize = seqs.iter().map(|s| s.q_len).sum();
    with_float!(io, p.cache.k.dtype(), T => {
        let k = io.read::<T>(p.cache.k)?;
        par::tasks(hkv, rows * hkv * d, |h| {
            let mut key = vec![0.0; d];
            for (seq, pages) in seqs.iter().zip(&pages) {
                // SAFETY: a task writes the sums of its KV head only.
                let sums = unsafe { stats.part((seq.slot * hkv + h) * len, len) };
                if seq.kv_len == seq.q_len {
                    sums.fill(0.0);
                }
                for pos in seq.first_pos()..seq.kv_len {
                    let at = tile(pages[pos / PAGE], h, hkv, d);
                    for (i, x) in key.iter_mut().enumerate() {
                        *x = k[at + KvPool::k_offset(lead, d, pos % PAGE, i)].widen();
                    }
                    add(sums, &key);
                }
            }
        });
        Ok(())
    })
}

fn add(sums: &mut [f32], key: &[f32]) {
    let (coordinates, pairs) = sums.split_at_mut(2 * key.len());
    let (sum, squares) = coordinates.split_at_mut(key.len());
    for ((sum, squares), x) in sum.iter_mut().zip(squares).zip(key) {
        *sum += x;
        *squares += x * x;
    }
    let (sum, squares) = pairs.split_at_mut(key.len() / 2);
    for ((sum, squares), x) in sum.iter_mut().zip(squares).zip(key.chunks_exact(2)) {
        let square = x[0] * x[0] + x[1] * x[1];
        *sum += square.sqrt();
        *squares += square;
    }
}
