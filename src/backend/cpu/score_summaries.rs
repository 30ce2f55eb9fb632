//! Logits against summaries. As `lo <= hi`, `max(q lo, q hi) = min(q, 0) lo + max(q, 0) hi`: for bounds, too, a logit
//! is one dot product with what is stored.

use super::memory::{Io, Parts, with_float};
use super::par;
use super::seqs::sequences;
use super::simd::{self, Lane};
use crate::backend::{PAGE, Result, ScoreSummaries};

/// Pages of one task.
const CHUNK: usize = 16;

pub(super) fn run(io: &Io<'_>, p: &ScoreSummaries<'_>) -> Result<()> {
    with_float!(io, p.summaries.data.dtype(), T => score::<T>(io, p))
}

fn score<T: Lane>(io: &Io<'_>, p: &ScoreSummaries<'_>) -> Result<()> {
    let (d, hkv, kind) = (p.head_dim, p.kv_heads, p.summaries.kind);
    let (group, width, per_page) = (p.heads / hkv, kind.vectors() * d, kind.per_page());
    // Whole summaries are one piece.
    let (pieces, n) = if p.dims == d { (1, width) } else { (kind.vectors(), p.dims) };
    let q = io.read::<f32>(p.q)?;
    let data = io.read::<T>(p.summaries.data)?;
    let seqs = sequences(io, &p.seqs)?;
    let lists = io.read::<u32>(p.seqs.pages)?;
    let scores = Parts::new(io.write::<f32>(p.scores)?);
    let pages: Vec<&[u32]> =
        seqs.iter().map(|s| s.pages(io, lists, p.n_pages, 0)).collect::<Result<_>>()?;
    let chunks = p.seqs.max_kv.div_ceil(CHUNK * PAGE);
    let work = seqs.iter().map(|s| kind.count(s.kv_len) * p.heads * width).sum();
    par::tasks(seqs.len() * hkv * chunks, work, |i| {
        let (s, h, chunk) = (i / (hkv * chunks), i / chunks % hkv, i % chunks);
        let (seq, pages) = (&seqs[s], pages[s]);
        let q = &q[(seq.q_start * p.heads + h * group) * d..][..group * d];
        let q = q.chunks_exact(d).map(|q| &q[p.from..p.from + p.dims]);
        let q: Vec<f32> = q.flat_map(|q| facing(q, pieces * n, p.scale)).collect();
        let mut logits = vec![0.0; group * per_page];
        for page in (chunk * CHUNK..(chunk + 1) * CHUNK).take_while(|n| *n < pages.len()) {
            let at = (pages[page] as usize * hkv + h) * per_page * width;
            let first = page * per_page;
            let count = per_page.min(kind.count(seq.kv_len) - first);
            for piece in 0..pieces {
                let at = at + piece * d + p.from;
                let rows: Vec<usize> = (0..count).map(|g| at + g * width).collect();
                let (q, out, more) = (&q[piece * n..], &mut logits, piece > 0);
                simd::dot_rows(q, pieces * n, group, n, data, &rows, out, per_page, more);
            }
            for (r, logits) in logits.chunks_exact(per_page).enumerate() {
                let row = (s * p.heads + h * group + r) * p.stride + first;
                // SAFETY: tasks differ in row or page.
                let out = unsafe { scores.part(row, count) };
                for (g, (out, logit)) in out.iter_mut().zip(logits).enumerate() {
                    let valid = kind.exists(first + g, seq.kv_len) && logit.is_finite();
                    *out = if valid { *logit } else { f32::NEG_INFINITY };
                }
            }
        }
    });
    Ok(())
}

/// The query, scaled, as it meets a summary of `width` numbers: `q`, or its negative and its positive part.
fn facing(q: &[f32], width: usize, scale: f32) -> Vec<f32> {
    let q = q.iter().map(|x| x * scale);
    if width == q.len() {
        return q.collect();
    }
    q.clone().map(|x| x.min(0.0)).chain(q.map(|x| x.max(0.0))).collect()
}
