//! Probabilities of keys, summed over the rows of a tile and the heads that share a list:
//! `sum_{i, h} exp(scale * q_{i,h} . K[j] - lse_{i,h})` over rows that see key `j`. A block of keys against all rows of
//! a KV head's group is one product by the GEMM crate.

use std::cell::RefCell;

use super::attention::Cache;
use super::matmul::{Matrix, matmul};
use super::memory::{Io, Parts, with_float};
use super::par;
use super::seqs::{Sequence, sequences};
use super::simd::{self, Lane};
use crate::backend::{Result, ScoreTiles};

/// Keys of a task.
const TILE_KEYS: usize = 256;

/// Buffers of the task that runs on this thread.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    k: Vec<f32>,
    logits: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

pub(super) fn run(io: &Io<'_>, p: &ScoreTiles<'_>) -> Result<()> {
    let (q, lse) = (io.read::<f32>(p.q)?, io.read::<f32>(p.lse)?);
    let page_lists = io.read::<u32>(p.seqs.pages)?;
    let out = Parts::new(io.write::<f32>(p.scores)?);
    let seqs = sequences(io, &p.seqs)?;
    let mut tasks = Vec::new();
    let (mut pages, mut work) = (Vec::with_capacity(seqs.len()), 0);
    let lists = p.lists();
    for (s, seq) in seqs.iter().enumerate() {
        pages.push(seq.pages(io, page_lists, p.cache.n_pages, 0)?);
        work += seq.q_len * seq.kv_len * p.heads * p.cache.head_dim;
        for list in 0..lists {
            tasks.extend((0..seq.kv_len).step_by(TILE_KEYS).map(|first| (s, list, first)));
        }
    }
    with_float!(io, p.cache.k.dtype(), T => {
        let cache = Cache::<T>::new(io, &p.cache)?;
        par::tasks(tasks.len(), work, |i| {
            let (s, list, first) = tasks[i];
            let n = TILE_KEYS.min(seqs[s].kv_len - first);
            // SAFETY: tasks differ in tile, list or keys.
            let out = unsafe { out.part((s * lists + list) * p.stride + first, n) };
            SCRATCH.with_borrow_mut(|x| {
                block(p, &cache, &seqs[s], pages[s], (q, lse), list, first, out, x);
            });
        });
        Ok(())
    })
}

/// Scores of the keys from `first` on for one list of one tile.
#[allow(clippy::too_many_arguments)]
fn block<T: Lane>(
    p: &ScoreTiles<'_>,
    cache: &Cache<'_, T>,
    seq: &Sequence,
    pages: &[u32],
    (q, lse): (&[f32], &[f32]),
    list: usize,
    first: usize,
    out: &mut [f32],
    x: &mut Scratch,
) {
    let (d, lists, group) = (cache.d, p.lists(), p.heads / cache.kv_heads);
    out.fill(0.0);
    let (keys, rows) = (first..first + out.len(), seq.q_len * group);
    x.k.resize(TILE_KEYS * d, 0.0);
    x.logits.resize(rows * TILE_KEYS, 0.0);
    for kv_head in list * cache.kv_heads / lists..(list + 1) * cache.kv_heads / lists {
        let item = |r: usize| (seq.q_start + r / group) * p.heads + kv_head * group + r % group;
        x.q.clear();
        for r in (0..rows).step_by(group) {
            x.q.extend(q[item(r) * d..][..group * d].iter().map(|v| v * p.scale));
        }
        cache.widen_keys(pages, kv_head, &keys, &mut x.k);
        let logits = &mut x.logits[..rows * keys.len()];
        let (a, b) = (Matrix::rows(&x.q, d), Matrix::columns(&x.k, d));
        // SAFETY: `logits` is `rows` rows of as many values as there are keys.
        unsafe {
            matmul((rows, keys.len(), d), logits.as_mut_ptr(), keys.len(), false, a, b);
        }
        for (r, s) in logits.chunks_exact_mut(keys.len()).enumerate() {
            let seen = seq.first_pos() + r / group + 1;
            let seen = seen.clamp(keys.start, keys.end) - keys.start;
            simd::exp_sub(&mut s[..seen], lse[item(r)]);
            out.iter_mut().zip(&s[..seen]).for_each(|(o, p)| *o += p);
        }
    }
}
