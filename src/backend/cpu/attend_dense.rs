//! Causal attention over all cached tokens:
//! `out = sum_j softmax_j(scale * q . K[j]) V[j]` over `j <= p` (and `j > p - window`) for the row at `p`.
//!
//! One or a few rows (decode) go key by key straight over the pages. More rows (prefill) go in tiles: a block of
//! query rows of one KV head's group against a block of keys, both products by the GEMM crate, softmax running
//! over the key blocks (FlashAttention-2, Dao 2023).

use std::cell::RefCell;
use std::ops::Range;

use super::attention::{Cache, Job, Queries, log_sum, run_jobs};
use super::matmul::{Matrix, matmul};
use super::memory::{Io, Parts, with_float};
use super::par;
use super::score_dims;
use super::seqs::{Sequence, sequences};
use super::simd::{self, Lane};
use crate::backend::{AttendDense, PAGE, Result};

/// Most rows of a sequence that go key by key.
const FEW_ROWS: usize = 4;
/// Query rows times heads of a tile, about.
const TILE_ROWS: usize = 96;
/// Keys of a tile.
const TILE_KEYS: usize = 256;

pub(super) fn run(io: &Io<'_>, p: &AttendDense<'_>) -> Result<()> {
    let q = io.read::<f32>(p.q)?;
    let page_lists = io.read::<u32>(p.seqs.pages)?;
    let out = io.write::<f32>(p.out)?;
    let mut lse = p.lse.map(|l| io.write::<f32>(l)).transpose()?;
    let seqs = sequences(io, &p.seqs)?;
    let mut pages = Vec::with_capacity(seqs.len());
    for s in &seqs {
        let from = visible(p.window, s.first_pos()).start;
        let from = if s.q_len == 0 { s.kv_len } else { from };
        pages.push(s.pages(io, page_lists, p.cache.n_pages, from)?);
    }
    with_float!(io, p.cache.k.dtype(), T => {
        let cache = Cache::<T>::new(io, &p.cache)?;
        few_rows(p, &cache, &seqs, &pages, q, out, lse.as_deref_mut());
        many_rows(p, &cache, &seqs, &pages, q, out, lse);
        p.scoring().map_or(Ok(()), |s| score_dims::run(io, &s))
    })
}

/// Tokens that the row at `pos` attends to.
fn visible(window: Option<usize>, pos: usize) -> Range<usize> {
    window.map_or(0, |w| (pos + 1).saturating_sub(w))..pos + 1
}

/// Split `s` of a key range, cut at page boundaries.
fn split(keys: &Range<usize>, splits: usize, s: usize) -> Range<usize> {
    let (first, last) = (keys.start / PAGE, keys.end.div_ceil(PAGE));
    let per = (last - first).div_ceil(splits);
    let cut = |i: usize| ((first + i * per) * PAGE).clamp(keys.start, keys.end);
    cut(s)..cut(s + 1)
}

fn few_rows<T: Lane>(
    p: &AttendDense<'_>,
    cache: &Cache<'_, T>,
    seqs: &[Sequence],
    pages: &[&[u32]],
    q: &[f32],
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    let group = p.heads / cache.kv_heads;
    let mut jobs = Vec::new();
    for (s, seq) in seqs.iter().enumerate().filter(|(_, s)| s.q_len <= FEW_ROWS) {
        for i in 0..seq.q_len {
            let keys = visible(p.window, seq.first_pos() + i);
            for kv_head in 0..cache.kv_heads {
                jobs.extend((0..p.splits).map(|n| Job {
                    seq: s,
                    row: seq.q_start + i,
                    head: kv_head * group,
                    heads: group,
                    kv_head,
                    split: n,
                    keys: split(&keys, p.splits, n),
                }));
            }
        }
    }
    let queries = Queries { q, rows: p.seqs.rows, heads: p.heads, scale: p.scale };
    run_jobs(cache, &queries, pages, &jobs, |_, j| Some(j), out, lse);
}

/// A block of query rows of one sequence against one split of their keys.
struct Tile {
    seq: usize,
    kv_head: usize,
    split: usize,
    /// Rows of the sequence's step.
    rows: Range<usize>,
}

/// Buffers of the tile that runs on this thread.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    logits: Vec<f32>,
    acc: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn many_rows<T: Lane>(
    p: &AttendDense<'_>,
    cache: &Cache<'_, T>,
    seqs: &[Sequence],
    pages: &[&[u32]],
    q: &[f32],
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    let group = p.heads / cache.kv_heads;
    let block = (TILE_ROWS / group).max(8);
    let (mut tiles, mut work) = (Vec::new(), 0);
    for (s, seq) in seqs.iter().enumerate().filter(|(_, s)| s.q_len > FEW_ROWS) {
        work += seq.q_len * seq.kv_len * p.heads * cache.d;
        // Late blocks see the most keys: first, so that the last tasks to end are short.
        for start in (0..seq.q_len).step_by(block).rev() {
            let rows = start..seq.q_len.min(start + block);
            for kv_head in 0..cache.kv_heads {
                tiles.extend((0..p.splits).map(|split| Tile {
                    seq: s,
                    kv_head,
                    split,
                    rows: rows.clone(),
                }));
            }
        }
    }
    let out = Parts::new(out);
    let lse = lse.map(Parts::new);
    par::tasks(tiles.len(), work, |i| {
        let t = &tiles[i];
        let seq = &seqs[t.seq];
        SCRATCH.with_borrow_mut(|x| {
            run_tile(p, cache, seq, pages[t.seq], q, t, x);
            for (r, acc) in x.acc.chunks_exact(group * cache.d).enumerate() {
                let row = t.split * p.seqs.rows + seq.q_start + t.rows.start + r;
                let at = row * p.heads + t.kv_head * group;
                // SAFETY: tiles differ in split, KV head or rows.
                let to = unsafe { out.part(at * cache.d, group * cache.d) };
                for (h, (to, acc)) in
                    to.chunks_exact_mut(cache.d).zip(acc.chunks_exact(cache.d)).enumerate()
                {
                    let sum = x.sum[r * group + h];
                    let inv = if sum > 0.0 { 1.0 / sum } else { 0.0 };
                    to.iter_mut().zip(acc).for_each(|(o, a)| *o = a * inv);
                }
                if let Some(lse) = &lse {
                    // SAFETY: as above.
                    let to = unsafe { lse.part(at, group) };
                    for (h, l) in to.iter_mut().enumerate() {
                        *l = log_sum(x.max[r * group + h], x.sum[r * group + h]);
                    }
                }
            }
        });
    });
}

/// Leaves the unnormalised result of a tile's rows in `x.acc`, `x.max` and `x.sum`, row by row, head by head.
fn run_tile<T: Lane>(
    p: &AttendDense<'_>,
    cache: &Cache<'_, T>,
    seq: &Sequence,
    pages: &[u32],
    q: &[f32],
    t: &Tile,
    x: &mut Scratch,
) {
    let (d, group) = (cache.d, p.heads / cache.kv_heads);
    let n = t.rows.len() * group;
    x.q.clear();
    for r in t.rows.clone() {
        let at = ((seq.q_start + r) * p.heads + t.kv_head * group) * d;
        x.q.extend(q[at..at + group * d].iter().map(|v| v * p.scale));
    }
    x.acc.clear();
    x.acc.resize(n * d, 0.0);
    x.max.clear();
    x.max.resize(n, f32::NEG_INFINITY);
    x.sum.clear();
    x.sum.resize(n, 0.0);
    x.logits.resize(n * TILE_KEYS, 0.0);
    x.k.resize(TILE_KEYS * d, 0.0);
    x.v.resize(TILE_KEYS * d, 0.0);

    let pos = |r: usize| seq.first_pos() + r;
    let seen = visible(p.window, pos(t.rows.start)).start..pos(t.rows.end - 1) + 1;
    let keys = split(&seen, p.splits, t.split);
    for start in keys.clone().step_by(TILE_KEYS) {
        let tile = start..keys.end.min(start + TILE_KEYS);
        cache.widen_keys(pages, t.kv_head, &tile, &mut x.k);
        let nk = tile.len();
        let logits = &mut x.logits[..n * nk];
        let (a, b) = (Matrix::rows(&x.q, d), Matrix::columns(&x.k, d));
        // SAFETY: `logits` is `n` rows of `nk`.
        unsafe { matmul((n, nk, d), logits.as_mut_ptr(), nk, false, a, b) };
        for (i, s) in logits.chunks_exact_mut(nk).enumerate() {
            let sees = visible(p.window, pos(t.rows.start + i / group));
            let inside = |j: usize| j.clamp(tile.start, tile.end) - tile.start;
            let (from, to) = (inside(sees.start), inside(sees.end));
            let max = simd::largest(&s[from..to]).max(x.max[i]);
            if max == f32::NEG_INFINITY {
                s.fill(0.0);
                continue;
            }
            s[..from].fill(0.0);
            s[to..].fill(0.0);
            if max > x.max[i] {
                let shrink = (x.max[i] - max).exp();
                x.sum[i] *= shrink;
                simd::scale(&mut x.acc[i * d..][..d], shrink);
                x.max[i] = max;
            }
            x.sum[i] += simd::exp_sub(&mut s[from..to], max);
        }
        if p.values {
            cache.widen_values(pages, t.kv_head, &tile, &mut x.v);
            let (a, b) = (Matrix::rows(logits, nk), Matrix::rows(&x.v, d));
            // SAFETY: `acc` is `n` rows of `d`.
            unsafe { matmul((n, d, nk), x.acc.as_mut_ptr(), d, true, a, b) };
        }
    }
}
