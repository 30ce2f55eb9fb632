//! Summaries of runs of keys: bounds, cuboids of means, means of windows.

use super::attention::tile;
use super::memory::{Io, Parts, with_float};
use super::par;
use super::seqs::sequences;
use super::simd::{self, Narrow};
use crate::backend::{KvSummaries, PAGE, Result, SummaryKind};

pub(super) fn run(io: &Io<'_>, p: &KvSummaries<'_>) -> Result<()> {
    with_float!(io, p.cache.k.dtype(), T => summarise::<T>(io, p))
}

fn summarise<T: Narrow>(io: &Io<'_>, p: &KvSummaries<'_>) -> Result<()> {
    let (d, lead, hkv) = (p.cache.head_dim, p.cache.lead, p.cache.kv_heads);
    let kind = p.summaries.kind;
    let (run, vectors) = (kind.run(), kind.vectors());
    let seqs = sequences(io, &p.seqs)?;
    let lists = io.read::<u32>(p.seqs.pages)?;
    let k = io.read::<T>(p.cache.k)?;
    let out = Parts::new(io.write::<T>(p.summaries.data)?);
    // One entry per summary and sequence; each KV head of it is a task.
    let mut jobs = Vec::new();
    for s in &seqs {
        let first = s.first_pos() / run;
        let pages =
            s.pages(io, lists, p.cache.n_pages, (first * run).saturating_sub(kind.before()))?;
        let there = (first..kind.count(s.kv_len)).filter(|g| kind.exists(*g, s.kv_len));
        jobs.extend(there.map(|g| (s.kv_len, pages, g)));
    }
    let tokens = run + kind.before();
    par::tasks(jobs.len() * hkv, jobs.len() * hkv * tokens * d, |i| {
        let ((kv_len, pages, g), h) = (jobs[i / hkv], i % hkv);
        let range = g * run - kind.before()..((g + 1) * run).min(kv_len);
        let mut keys = vec![0.0; range.len() * d];
        for (j, key) in range.zip(keys.chunks_exact_mut(d)) {
            let (at, row) = (tile(pages[j / PAGE], h, hkv, d), j % PAGE);
            let (front, rest) = key.split_at_mut(lead);
            simd::widen(&k[at + row * lead..][..lead], front);
            simd::widen(&k[at + PAGE * lead + row * (d - lead)..][..d - lead], rest);
        }
        let page = pages[g * run / PAGE] as usize;
        let at = (page * hkv + h) * kind.page_len(d) + g % kind.per_page() * vectors * d;
        // SAFETY: one summary and KV head a task, and sequences that write to a page do not share it.
        let out = unsafe { out.part(at, vectors * d) };
        let values = match kind {
            SummaryKind::Windows { .. } => means(&keys, d),
            SummaryKind::Bounds { .. } => bounds(&keys, d),
            SummaryKind::Cuboid { .. } => cuboid(&keys, d),
        };
        out.iter_mut().zip(values).for_each(|(o, x)| *o = T::narrow(x));
    });
    Ok(())
}

fn means(keys: &[f32], d: usize) -> Vec<f32> {
    let mut sum = vec![0.0f32; d];
    for key in keys.chunks_exact(d) {
        sum.iter_mut().zip(key).for_each(|(s, k)| *s += k);
    }
    simd::scale(&mut sum, 1.0 / (keys.len() / d) as f32);
    sum
}

/// Smallest, then largest.
fn bounds(keys: &[f32], d: usize) -> Vec<f32> {
    let mut both = keys[..d].repeat(2);
    let (lo, hi) = both.split_at_mut(d);
    for key in keys.chunks_exact(d).skip(1) {
        lo.iter_mut().zip(key).for_each(|(l, k)| *l = l.min(*k));
        hi.iter_mut().zip(key).for_each(|(h, k)| *h = h.max(*k));
    }
    both
}

fn cuboid(keys: &[f32], d: usize) -> Vec<f32> {
    let mut both = bounds(keys, d);
    let (lo, hi) = both.split_at_mut(d);
    let scale = 1.0 / (keys.len() / d) as f32;
    for i in 0..d {
        let middle = 0.5 * lo[i] + 0.5 * hi[i];
        let sum: f32 = keys[i..].iter().step_by(d).map(|k| (k - middle).abs()).sum();
        (lo[i], hi[i]) = (middle - sum * scale, middle + sum * scale);
    }
    both
}
