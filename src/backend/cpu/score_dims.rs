//! Partial logits of the decode query on few key dimensions: `s_{h,j} = c_h * sum_{i in D} q_{h,i} K[j, i]`, one row
//! per query head, or their sum or maximum over the KV head's group.

use super::attention::tile;
use super::kv_append::check_list;
use super::memory::{Io, Parts, with_float};
use super::par;
use super::seqs::{Sequence, sequences};
use super::simd::{self, Lane};
use crate::backend::{
    HeadPool, KvPool, LogitScale, PAGE, Result, ScoreDims, ScoreSource, SliceBits,
};

/// Tokens of one task.
const CHUNK: usize = 4 * PAGE;

/// Where the chosen dimensions of a sequence's keys are, for one KV head: rows inside a slice of `T`.
trait Keys: Sync {
    /// `out[h * stride + j] = sum_c q[h * n + c] * key(first + j, c)` for `count` tokens of one page.
    fn dots(
        &self,
        at: &At<'_>,
        q: &[f32],
        first: usize,
        count: usize,
        out: &mut [f32],
        stride: usize,
    );
}

/// A KV head of a sequence.
struct At<'a> {
    seq: &'a Sequence,
    pages: &'a [u32],
    kv_head: usize,
    kv_heads: usize,
}

pub(super) fn run(io: &Io<'_>, p: &ScoreDims<'_>) -> Result<()> {
    let (d, hkv) = (p.cache.head_dim, p.cache.kv_heads);
    let q = io.read::<f32>(p.q)?;
    let lists = io.read::<u32>(p.seqs.pages)?;
    let seqs = sequences(io, &p.seqs)?;
    let scores = io.write::<f32>(p.scores)?;

    let paged = !matches!(p.source, ScoreSource::Slice(_) | ScoreSource::Quantised(_));
    let pages: Vec<&[u32]> = seqs
        .iter()
        .map(|s| if paged { s.pages(io, lists, p.cache.n_pages, 0) } else { Ok(&[][..]) })
        .collect::<Result<_>>()?;
    // Listed dimensions [slots, kv_heads, n], or the leading ones.
    let (n, dims) = match &p.source {
        ScoreSource::Lead { n } | ScoreSource::Int8 { n, .. } => (*n, None),
        ScoreSource::Slice(s) => (s.n_dims, Some(io.read::<u32>(s.dims)?)),
        ScoreSource::Quantised(s) => (s.n_dims, Some(io.read::<u32>(s.dims)?)),
        ScoreSource::Gather { dims, n } => (*n, Some(io.read::<u32>(dims)?)),
    };
    if let Some(dims) = dims {
        for s in &seqs {
            let list = dims.chunks_exact(hkv * n).nth(s.slot);
            check_list(io, list.ok_or_else(|| io.bad(format!("no slot {}", s.slot)))?, d)?;
        }
    }
    let slots = match &p.source {
        ScoreSource::Slice(s) => s.slots,
        ScoreSource::Quantised(s) => s.slots,
        _ => usize::MAX,
    };
    if seqs.iter().any(|q| q.slot >= slots) {
        return Err(io.bad("a slot outside the slice"));
    }
    let call = Call { p, q, seqs: &seqs, pages: &pages, n, dims };
    match &p.source {
        ScoreSource::Int8 { keys, .. } => {
            let (data, scale) = (io.read::<i8>(keys.data)?, io.read::<f32>(keys.scale)?);
            score(&call, &Int8 { data, scale, dims: keys.dims, n }, scores);
            Ok(())
        }
        ScoreSource::Quantised(s) => {
            let (data, scale) = (io.read::<i8>(s.data)?, io.read::<f32>(s.scale)?);
            score(&call, &Quantised { data, scale, bits: s.bits, capacity: s.capacity, n }, scores);
            Ok(())
        }
        ScoreSource::Lead { .. } => with_float!(io, p.cache.k.dtype(), T => {
            score(&call, &Lead { k: io.read::<T>(p.cache.k)?, d, lead: p.cache.lead, n }, scores);
            Ok(())
        }),
        ScoreSource::Slice(s) => with_float!(io, p.cache.k.dtype(), T => {
            score(&call, &Slice { data: io.read::<T>(s.data)?, capacity: s.capacity, n }, scores);
            Ok(())
        }),
        ScoreSource::Gather { .. } => with_float!(io, p.cache.k.dtype(), T => {
            let dims = dims.unwrap_or_default();
            score(&call, &Gather { k: io.read::<T>(p.cache.k)?, d, lead: p.cache.lead, dims, n }, scores);
            Ok(())
        }),
    }
}

struct Call<'a> {
    p: &'a ScoreDims<'a>,
    q: &'a [f32],
    seqs: &'a [Sequence],
    pages: &'a [&'a [u32]],
    n: usize,
    dims: Option<&'a [u32]>,
}

fn score(c: &Call<'_>, keys: &impl Keys, scores: &mut [f32]) {
    let (p, n) = (c.p, c.n);
    let (d, hkv) = (p.cache.head_dim, p.cache.kv_heads);
    let (group, rows_per_seq) = (p.heads / hkv, p.rows_per_seq());
    let per_seq = p.seqs.max_kv.div_ceil(CHUNK);
    let work = c.seqs.iter().map(|s| s.kv_len * p.heads * n).sum();
    let scores = Parts::new(scores);
    par::tasks(c.seqs.len() * hkv * per_seq, work, |i| {
        let (s, kv_head, chunk) = (i / (hkv * per_seq), i / per_seq % hkv, i % per_seq);
        let seq = &c.seqs[s];
        let tokens = seq.kv_len.min(chunk * CHUNK)..seq.kv_len.min((chunk + 1) * CHUNK);
        if seq.q_len == 0 || tokens.is_empty() {
            return;
        }
        let at = At { seq, pages: c.pages[s], kv_head, kv_heads: hkv };
        let list = c.dims.map(|l| &l[(seq.slot * hkv + kv_head) * n..][..n]);
        // c_h q_{h,i} for i in D, [group, n].
        let q = &c.q[(seq.q_start * p.heads + kv_head * group) * d..][..group * d];
        let q: Vec<f32> = q.chunks_exact(d).flat_map(|q| chosen(q, list, n, p.scale)).collect();
        let mut logits = vec![0.0; group * PAGE];
        for first in tokens.clone().step_by(PAGE) {
            let count = PAGE.min(tokens.end - first);
            keys.dots(&at, &q, first, count, &mut logits, PAGE);
            if p.pool.in_score() {
                let at = (s * rows_per_seq + kv_head) * p.stride + first;
                // SAFETY: one KV head and range of tokens a task.
                pool(p.pool, &logits, unsafe { scores.part(at, count) });
            } else {
                for (h, logits) in logits.chunks_exact(PAGE).enumerate() {
                    let at = (s * rows_per_seq + kv_head * group + h) * p.stride + first;
                    // SAFETY: as above.
                    let to = unsafe { scores.part(at, count) };
                    to.iter_mut().zip(logits).for_each(|(t, s)| *t = finite(*s));
                }
            }
        }
    });
}

/// The chosen coordinates of one head's query, times `c_h`.
pub(super) fn chosen(q: &[f32], list: Option<&[u32]>, n: usize, scale: LogitScale) -> Vec<f32> {
    let mut kept: Vec<f32> = match list {
        Some(list) => list.iter().map(|&i| q[i as usize]).collect(),
        None => q[..n].to_vec(),
    };
    let abs = |q: &[f32]| q.iter().map(|x| x.abs()).sum::<f32>();
    let c = match scale {
        LogitScale::InvSqrtDim => 1.0 / (q.len() as f32).sqrt(),
        LogitScale::Coverage => match abs(&kept) {
            0.0 => 0.0,
            sum => 1.0 / (q.len() as f32 * (sum / abs(q))).sqrt(),
        },
    };
    kept.iter_mut().for_each(|x| *x *= c);
    kept
}

/// A score that is not finite is never chosen.
pub(super) fn finite(score: f32) -> f32 {
    if score.is_finite() { score } else { f32::NEG_INFINITY }
}

/// Sum or maximum over the heads of the group; `logits` is `[group, PAGE]`.
pub(super) fn pool(pool: HeadPool, logits: &[f32], out: &mut [f32]) {
    for (j, out) in out.iter_mut().enumerate() {
        let heads = logits[j..].iter().step_by(PAGE);
        *out = match pool {
            HeadPool::SumLogit => finite(heads.sum()),
            _ => heads.map(|&s| finite(s)).fold(f32::NEG_INFINITY, f32::max),
        };
    }
}

/// Leading dimensions of the K tiles: those of the leading piece, and the first of the rest beyond it.
struct Lead<'a, T> {
    k: &'a [T],
    d: usize,
    lead: usize,
    n: usize,
}

impl<T: Lane> Keys for Lead<'_, T> {
    fn dots(
        &self,
        at: &At<'_>,
        q: &[f32],
        first: usize,
        count: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        let (n, lead) = (self.n, self.lead);
        let tile = tile(at.pages[first / PAGE], at.kv_head, at.kv_heads, self.d);
        let piece = n.min(lead);
        let rows = strided(tile, lead, count);
        simd::dot_rows(q, n, q.len() / n, piece, self.k, &rows, out, stride, false);
        if piece < n {
            let rows = strided(tile + PAGE * lead, self.d - lead, count);
            simd::dot_rows(
                &q[piece..],
                n,
                q.len() / n,
                n - piece,
                self.k,
                &rows,
                out,
                stride,
                true,
            );
        }
    }
}

/// Multiplies the sums of every row of `stride` by their keys' scales.
fn scale_rows(out: &mut [f32], stride: usize, scale: &[f32]) {
    for out in out.chunks_exact_mut(stride) {
        out.iter_mut().zip(scale).for_each(|(s, scale)| *s *= scale);
    }
}

/// The int8 copy: the scale of a row multiplies its sum.
struct Int8<'a> {
    data: &'a [i8],
    scale: &'a [f32],
    dims: usize,
    n: usize,
}

impl Keys for Int8<'_> {
    fn dots(
        &self,
        at: &At<'_>,
        q: &[f32],
        first: usize,
        count: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        let row = tile(at.pages[first / PAGE], at.kv_head, at.kv_heads, 1);
        let rows = strided(row * self.dims, self.dims, count);
        simd::dot_rows(q, self.n, q.len() / self.n, self.n, self.data, &rows, out, stride, false);
        scale_rows(out, stride, &self.scale[row..row + count]);
    }
}

/// The compact slice of the sequence's slot.
struct Slice<'a, T> {
    data: &'a [T],
    capacity: usize,
    n: usize,
}

impl<T: Lane> Keys for Slice<'_, T> {
    fn dots(
        &self,
        at: &At<'_>,
        q: &[f32],
        first: usize,
        count: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        let head = at.seq.slot * at.kv_heads + at.kv_head;
        let rows = strided((head * self.capacity + first) * self.n, self.n, count);
        simd::dot_rows(q, self.n, q.len() / self.n, self.n, self.data, &rows, out, stride, false);
    }
}

/// The quantised slice of the sequence's slot: the scale of a row multiplies its sum.
struct Quantised<'a> {
    data: &'a [i8],
    scale: &'a [f32],
    bits: SliceBits,
    capacity: usize,
    n: usize,
}

impl Keys for Quantised<'_> {
    fn dots(
        &self,
        at: &At<'_>,
        q: &[f32],
        first: usize,
        count: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        let (n, bytes) = (self.n, self.bits.row(self.n));
        let row = (at.seq.slot * at.kv_heads + at.kv_head) * self.capacity + first;
        match self.bits {
            SliceBits::Eight => {
                let rows = strided(row * bytes, bytes, count);
                simd::dot_rows(q, n, q.len() / n, n, self.data, &rows, out, stride, false);
            }
            SliceBits::Four => {
                let packed = &self.data[row * bytes..][..count * bytes];
                let numbers: Vec<i8> = packed.iter().flat_map(|b| [b << 4 >> 4, b >> 4]).collect();
                let rows = strided(0, n, count);
                simd::dot_rows(q, n, q.len() / n, n, &numbers, &rows, out, stride, false);
            }
        }
        scale_rows(out, stride, &self.scale[row..row + count]);
    }
}

/// Listed dimensions read from the K tiles.
struct Gather<'a, T> {
    k: &'a [T],
    d: usize,
    lead: usize,
    dims: &'a [u32],
    n: usize,
}

impl<T: Lane> Keys for Gather<'_, T> {
    fn dots(
        &self,
        at: &At<'_>,
        q: &[f32],
        first: usize,
        count: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        let tile = tile(at.pages[first / PAGE], at.kv_head, at.kv_heads, self.d);
        let list = (at.seq.slot * at.kv_heads + at.kv_head) * self.n;
        let mut keys = vec![0.0; count * self.n];
        for (c, &i) in self.dims[list..][..self.n].iter().enumerate() {
            let i = i as usize;
            for row in 0..count {
                let from = tile + KvPool::k_offset(self.lead, self.d, row, i);
                keys[row * self.n + c] = self.k[from].widen();
            }
        }
        let rows = strided(0, self.n, count);
        simd::dot_rows(q, self.n, q.len() / self.n, self.n, &keys, &rows, out, stride, false);
    }
}

/// Offsets of `count <= PAGE` rows, `stride` apart.
fn strided(start: usize, stride: usize, count: usize) -> Vec<usize> {
    (0..count).map(|row| start + row * stride).collect()
}
