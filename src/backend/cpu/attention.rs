//! What the two attention ops share: the paged cache as slices, and the running softmax over listed rows.

use std::ops::Range;

use super::memory::{Io, Parts};
use super::par;
use super::simd::{self, Lane};
use crate::backend::{KvPool, PAGE, Result};

/// One layer's pages as slices; layout in [`KvPool`].
#[derive(Clone, Copy)]
pub(super) struct Cache<'a, T> {
    pub k: &'a [T],
    pub v: &'a [T],
    pub kv_heads: usize,
    pub d: usize,
    pub lead: usize,
}

impl<'a, T: Lane> Cache<'a, T> {
    pub fn new(io: &'a Io<'_>, pool: &KvPool<'a>) -> Result<Self> {
        let (k, v) = (io.read::<T>(pool.k)?, io.read::<T>(pool.v)?);
        Ok(Cache { k, v, kv_heads: pool.kv_heads, d: pool.head_dim, lead: pool.lead })
    }

    /// First element of a (page, KV head) tile, in K and in V.
    pub fn tile(&self, page: u32, kv_head: usize) -> usize {
        tile(page, kv_head, self.kv_heads, self.d)
    }

    /// Copies the keys of a run of tokens to f32 rows at the start of `to`.
    pub fn widen_keys(&self, pages: &[u32], kv_head: usize, tokens: &Range<usize>, to: &mut [f32]) {
        let (d, lead) = (self.d, self.lead);
        for (tile, row, to) in self.pieces(pages, kv_head, tokens, to) {
            if lead == d {
                simd::widen(&self.k[tile + row * d..][..to.len()], to);
                continue;
            }
            for (i, k) in to.chunks_exact_mut(d).enumerate() {
                let (first, rest) = k.split_at_mut(lead);
                simd::widen(&self.k[tile + (row + i) * lead..][..lead], first);
                let from = tile + PAGE * lead + (row + i) * (d - lead);
                simd::widen(&self.k[from..][..d - lead], rest);
            }
        }
    }

    /// Copies the values of a run of tokens to f32 rows at the start of `to`.
    pub fn widen_values(
        &self,
        pages: &[u32],
        kv_head: usize,
        tokens: &Range<usize>,
        to: &mut [f32],
    ) {
        for (tile, row, to) in self.pieces(pages, kv_head, tokens, to) {
            simd::widen(&self.v[tile + row * self.d..][..to.len()], to);
        }
    }

    /// The run of tokens page by page: tile, first row in it, and the part of `to` for its rows.
    fn pieces<'t>(
        &self,
        pages: &[u32],
        kv_head: usize,
        tokens: &Range<usize>,
        mut to: &'t mut [f32],
    ) -> Vec<(usize, usize, &'t mut [f32])> {
        let mut pieces = Vec::with_capacity(tokens.len() / PAGE + 2);
        let mut at = tokens.start;
        while at < tokens.end {
            let (row, n) = (at % PAGE, (PAGE - at % PAGE).min(tokens.end - at));
            let (part, rest) = to.split_at_mut(n * self.d);
            pieces.push((self.tile(pages[at / PAGE], kv_head), row, part));
            (to, at) = (rest, at + n);
        }
        pieces
    }
}

/// First element of a (page, KV head) tile of `PAGE * width` elements.
pub(super) fn tile(page: u32, kv_head: usize, kv_heads: usize, width: usize) -> usize {
    (page as usize * kv_heads + kv_head) * PAGE * width
}

/// Where a block of cached tokens lies: offsets of the two pieces of each key and of each value.
pub(super) struct Rows {
    lead: Vec<usize>,
    rest: Vec<usize>,
    value: Vec<usize>,
}

impl Rows {
    pub fn new(capacity: usize) -> Self {
        let list = || Vec::with_capacity(capacity);
        Rows { lead: list(), rest: list(), value: list() }
    }
    pub fn clear(&mut self) {
        self.lead.clear();
        self.rest.clear();
        self.value.clear();
    }
    pub fn len(&self) -> usize {
        self.value.len()
    }
    pub fn push<T>(&mut self, cache: &Cache<'_, T>, tile: usize, row: usize) {
        let (d, lead) = (cache.d, cache.lead);
        self.lead.push(tile + row * lead);
        self.rest.push(tile + PAGE * lead + row * (d - lead));
        self.value.push(tile + row * d);
    }

    /// `out[h * stride + j] = q_h . K[j]` for the group's query heads, `q` being `[heads, d]`.
    fn logits<T: Lane>(&self, c: &Cache<'_, T>, q: &[f32], out: &mut [f32], stride: usize) {
        let heads = q.len() / c.d;
        simd::dot_rows(q, c.d, heads, c.lead, c.k, &self.lead, out, stride, false);
        if c.lead < c.d {
            let q = &q[c.lead..];
            simd::dot_rows(q, c.d, heads, c.d - c.lead, c.k, &self.rest, out, stride, true);
        }
    }
}

/// Softmax over the keys seen so far, for a group of query heads: the largest logit, the sum of
/// `exp(logit - max)` and the values weighted by the same (online softmax, Milakov and Gimelshein 2018).
pub(super) struct Running {
    max: Vec<f32>,
    sum: Vec<f32>,
    acc: Vec<f32>,
}

impl Running {
    pub fn new(heads: usize, d: usize) -> Self {
        Running {
            max: vec![f32::NEG_INFINITY; heads],
            sum: vec![0.0; heads],
            acc: vec![0.0; heads * d],
        }
    }

    /// Adds a block of keys. `q` is `[heads, d]`, already scaled; `logits` is scratch.
    fn add<T: Lane>(&mut self, c: &Cache<'_, T>, q: &[f32], rows: &Rows, logits: &mut Vec<f32>) {
        let (n, heads) = (rows.len(), self.max.len());
        if n == 0 {
            return;
        }
        logits.resize(heads * n, 0.0);
        rows.logits(c, q, logits, n);
        for (h, s) in logits.chunks_exact_mut(n).enumerate() {
            let max = simd::largest(s).max(self.max[h]);
            if max == f32::NEG_INFINITY {
                s.fill(0.0);
                continue;
            }
            if max > self.max[h] {
                let shrink = (self.max[h] - max).exp();
                self.sum[h] *= shrink;
                simd::scale(&mut self.acc[h * c.d..][..c.d], shrink);
                self.max[h] = max;
            }
            self.sum[h] += simd::exp_sub(s, max);
        }
        simd::axpy_rows(logits, n, heads, c.d, c.v, &rows.value, &mut self.acc);
    }

    /// Adds the keys that `other` has seen.
    fn merge(&mut self, other: &Running) {
        let d = self.acc.len() / self.max.len();
        for h in 0..self.max.len() {
            let max = self.max[h].max(other.max[h]);
            if max == f32::NEG_INFINITY {
                continue;
            }
            let (a, b) = ((self.max[h] - max).exp(), (other.max[h] - max).exp());
            self.max[h] = max;
            self.sum[h] = self.sum[h] * a + other.sum[h] * b;
            let (acc, add) = (&mut self.acc[h * d..][..d], &other.acc[h * d..][..d]);
            acc.iter_mut().zip(add).for_each(|(x, y)| *x = *x * a + y * b);
        }
    }

    /// Writes `out [heads, d]` and `lse [heads]`: zeros and -infinity when no key was seen.
    fn finish(&self, out: &mut [f32], lse: Option<&mut [f32]>) {
        let d = self.acc.len() / self.max.len();
        for (h, out) in out.chunks_exact_mut(d).enumerate() {
            let inv = if self.sum[h] > 0.0 { 1.0 / self.sum[h] } else { 0.0 };
            out.iter_mut().zip(&self.acc[h * d..]).for_each(|(o, a)| *o = a * inv);
        }
        if let Some(lse) = lse {
            for (h, lse) in lse.iter_mut().enumerate() {
                *lse = log_sum(self.max[h], self.sum[h]);
            }
        }
    }
}

/// `max + log(sum)`, -infinity when no key was seen.
pub(super) fn log_sum(max: f32, sum: f32) -> f32 {
    if max == f32::NEG_INFINITY { max } else { max + sum.ln() }
}

/// Keys of one task of a range of `len`; the parts are merged in order. Set by the range alone, as the sums are.
fn chunk(len: usize) -> usize {
    (len / 16).next_multiple_of(PAGE).clamp(PAGE, 512)
}

/// Keys whose logits are taken before their values are read.
const BLOCK: usize = 128;

/// The keys `keys` (tokens or list positions, see `token`) for a group of heads of one row.
pub(super) struct Job {
    /// Index of the sequence.
    pub seq: usize,
    /// Row of the ragged batch.
    pub row: usize,
    /// First query head, and how many share the KV head.
    pub head: usize,
    pub heads: usize,
    pub kv_head: usize,
    pub split: usize,
    pub keys: Range<usize>,
}

/// The queries `[rows, heads, d]` of a call.
pub(super) struct Queries<'a> {
    pub q: &'a [f32],
    pub rows: usize,
    pub heads: usize,
    pub scale: f32,
}

/// Runs jobs row by row over the cache (decode): `token(job, i)` is the `i`th key's token, or None to skip it;
/// `pages[seq]` is the page list.
pub(super) fn run_jobs<T: Lane>(
    cache: &Cache<'_, T>,
    queries: &Queries<'_>,
    pages: &[&[u32]],
    jobs: &[Job],
    token: impl Fn(&Job, usize) -> Option<usize> + Sync + Send,
    out: &mut [f32],
    mut lse: Option<&mut [f32]>,
) {
    let d = cache.d;
    let chunks: Vec<(usize, Range<usize>)> = jobs
        .iter()
        .enumerate()
        .flat_map(|(i, j)| {
            let (keys, chunk) = (j.keys.clone(), chunk(j.keys.len()));
            let n = keys.len().div_ceil(chunk).max(1);
            (0..n).map(move |c| {
                let start = keys.start + c * chunk;
                (i, start..keys.end.min(start + chunk))
            })
        })
        .collect();
    let work = jobs.iter().map(|j| j.keys.len() * j.heads * d).sum();
    let mut states: Vec<Option<Running>> = chunks.iter().map(|_| None).collect();
    let parts = Parts::new(&mut states);
    par::tasks(chunks.len(), work, |i| {
        let (job, keys) = (&jobs[chunks[i].0], chunks[i].1.clone());
        let at = (job.row * queries.heads + job.head) * d;
        let q = &queries.q[at..at + job.heads * d];
        let q: Vec<f32> = q.iter().map(|x| x * queries.scale).collect();
        let mut state = Running::new(job.heads, d);
        let (mut rows, mut logits) = (Rows::new(BLOCK), Vec::with_capacity(job.heads * BLOCK));
        for start in keys.clone().step_by(BLOCK) {
            rows.clear();
            for j in (start..keys.end.min(start + BLOCK)).filter_map(|k| token(job, k)) {
                let tile = cache.tile(pages[job.seq][j / PAGE], job.kv_head);
                rows.push(cache, tile, j % PAGE);
            }
            state.add(cache, &q, &rows, &mut logits);
        }
        // SAFETY: one element a task.
        unsafe { parts.part(i, 1)[0] = Some(state) };
    });
    let mut states = chunks.iter().zip(states).peekable();
    while let Some((&(i, _), state)) = states.next() {
        let job = &jobs[i];
        let mut state = state.unwrap_or_else(|| Running::new(job.heads, d));
        while let Some((_, more)) = states.next_if(|((next, _), _)| *next == i) {
            more.iter().for_each(|m| state.merge(m));
        }
        let at = (job.split * queries.rows + job.row) * queries.heads + job.head;
        let lse = lse.as_deref_mut().map(|l| &mut l[at..at + job.heads]);
        state.finish(&mut out[at * d..(at + job.heads) * d], lse);
    }
}
