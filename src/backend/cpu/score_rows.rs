//! Partial logits of listed tokens on few key dimensions: as `score_dims`, entry by entry of a list.

use super::attention::tile;
use super::kv_append::check_list;
use super::memory::{Io, Parts, with_float};
use super::par;
use super::score_dims::{chosen, finite, pool};
use super::seqs::{Lists, Sequence, sequences};
use super::simd::{self, Lane};
use crate::backend::{KvPool, PAGE, Result, ScoreRows};

/// Entries of one task.
const CHUNK: usize = 4 * PAGE;

pub(super) fn run(io: &Io<'_>, p: &ScoreRows<'_>) -> Result<()> {
    let (d, hkv) = (p.cache.head_dim, p.cache.kv_heads);
    let q = io.read::<f32>(p.q)?;
    let page_lists = io.read::<u32>(p.seqs.pages)?;
    let lists = Lists::read(io, p.among)?;
    let seqs = sequences(io, &p.seqs)?;
    let (n, dims) = p.dims();
    let dims = dims.map(|d| io.read::<u32>(d)).transpose()?;
    let mut pages = Vec::with_capacity(seqs.len());
    for (s, seq) in seqs.iter().enumerate() {
        let list = seq.page_list(io, page_lists)?;
        pages.push(list);
        if let Some(dims) = dims {
            let list = dims.chunks_exact(hkv * n).nth(seq.slot);
            check_list(io, list.ok_or_else(|| io.bad(format!("no slot {}", seq.slot)))?, d)?;
        }
        for l in s * p.lists..(s + 1) * p.lists {
            seq.check_listed(io, list, p.cache.n_pages, lists.of(l))?;
        }
    }
    let scores = io.write::<f32>(p.scores)?;
    let call = Call { p, q, seqs: &seqs, pages: &pages, lists, n, dims };
    with_float!(io, p.cache.k.dtype(), T => {
        score(&call, io.read::<T>(p.cache.k)?, scores);
        Ok(())
    })
}

struct Call<'a> {
    p: &'a ScoreRows<'a>,
    q: &'a [f32],
    seqs: &'a [Sequence],
    pages: &'a [&'a [u32]],
    lists: Lists<'a>,
    n: usize,
    dims: Option<&'a [u32]>,
}

fn score<T: Lane>(c: &Call<'_>, keys: &[T], scores: &mut [f32]) {
    let (p, n) = (c.p, c.n);
    let (d, hkv) = (p.cache.head_dim, p.cache.kv_heads);
    let (parts, rows_per_seq) = (p.parts_per_seq(), p.rows_per_seq());
    let heads = p.heads / parts;
    let per_part = p.among.k.div_ceil(CHUNK);
    let work = c.seqs.iter().map(|s| s.kv_len.min(p.among.k) * p.heads * n).sum();
    let scores = Parts::new(scores);
    par::tasks(c.seqs.len() * parts * per_part, work, |i| {
        let (s, part, chunk) = (i / (parts * per_part), i / per_part % parts, i % per_part);
        let (seq, kv_head) = (&c.seqs[s], part * hkv / parts);
        let listed = c.lists.of(s * p.lists + part * p.lists / parts);
        let columns = chunk * CHUNK..listed.len().min((chunk + 1) * CHUNK);
        if seq.q_len == 0 || columns.is_empty() {
            return;
        }
        let dims = c.dims.map(|l| &l[(seq.slot * hkv + kv_head) * n..][..n]);
        // c_h q_{h,i} for i in D, [heads, n].
        let q = &c.q[(seq.q_start * p.heads + part * heads) * d..][..heads * d];
        let q: Vec<f32> = q.chunks_exact(d).flat_map(|q| chosen(q, dims, n, p.scale)).collect();
        let mut logits = vec![0.0; heads * PAGE];
        let mut block = Block { c, keys, kv_head, at: Vec::new(), gathered: Vec::new() };
        for first in columns.clone().step_by(PAGE) {
            let tokens = &listed[first..columns.end.min(first + PAGE)];
            block.dots(seq, c.pages[s], dims, tokens, &q, &mut logits);
            let put = |row: usize| {
                let at = (s * rows_per_seq + row) * p.stride + first;
                // SAFETY: one part and range of columns a task.
                unsafe { scores.part(at, tokens.len()) }
            };
            if p.pool.in_score() {
                pool(p.pool, &logits, put(part));
            } else {
                for (h, logits) in logits.chunks_exact(PAGE).enumerate() {
                    let to = put(part * heads + h);
                    to.iter_mut().zip(logits).for_each(|(t, s)| *t = finite(*s));
                }
            }
        }
    });
}

/// Up to a page of listed keys of one KV head.
struct Block<'a, T> {
    c: &'a Call<'a>,
    keys: &'a [T],
    kv_head: usize,
    at: Vec<usize>,
    gathered: Vec<f32>,
}

impl<T: Lane> Block<'_, T> {
    /// `out[h * PAGE + i] = q_h . key(tokens[i])`, -infinity for a token that is not cached.
    fn dots(
        &mut self,
        seq: &Sequence,
        pages: &[u32],
        dims: Option<&[u32]>,
        tokens: &[u32],
        q: &[f32],
        out: &mut [f32],
    ) {
        let KvPool { head_dim: d, lead, kv_heads, .. } = self.c.p.cache;
        let (n, kv_head) = (self.c.n, self.kv_head);
        let heads = q.len() / n;
        if self.keys.is_empty() {
            out.fill(f32::NEG_INFINITY);
            return;
        }
        let at = |j: u32, i: usize| match j as usize {
            j if j < seq.kv_len => {
                let tile = tile(pages[j / PAGE], kv_head, kv_heads, d);
                tile + KvPool::k_offset(lead, d, j % PAGE, i)
            }
            // Not cached: the pool's first key, whose score is thrown away.
            _ => KvPool::k_offset(lead, d, 0, i),
        };
        self.at.clear();
        if let Some(dims) = dims {
            self.gathered.clear();
            for &j in tokens {
                let key = |&i: &u32| self.keys[at(j, i as usize)].widen();
                self.gathered.extend(dims.iter().map(key));
            }
            self.at.extend((0..tokens.len()).map(|i| i * n));
            simd::dot_rows(q, n, heads, n, &self.gathered, &self.at, out, PAGE, false);
        } else {
            let piece = n.min(lead);
            self.at.extend(tokens.iter().map(|&j| at(j, 0)));
            simd::dot_rows(q, n, heads, piece, self.keys, &self.at, out, PAGE, false);
            if piece < n {
                self.at.clear();
                self.at.extend(tokens.iter().map(|&j| at(j, lead)));
                let q = &q[piece..];
                simd::dot_rows(q, n, heads, n - piece, self.keys, &self.at, out, PAGE, true);
            }
        }
        for (i, _) in tokens.iter().enumerate().filter(|(_, j)| **j as usize >= seq.kv_len) {
            out[i..].iter_mut().step_by(PAGE).for_each(|s| *s = f32::NEG_INFINITY);
        }
    }
}
