//! The check inside every measurement: one (sequence, KV head) of the result against the f64 reference.
//!
//! What that pair reads is copied into a small problem of one sequence and one KV head on the host, on which the
//! reference runs; the whole pool may be far larger than the host's memory.

use super::inputs::{KvSet, Rig};
use crate::backend::cpu::CpuBackend;
use crate::backend::reference::{Cell, Output, floats};
use crate::backend::{Backend, DType, KvPool, META_WORDS, Meta, PAGE, Result, Seqs, Tensor};
use serde::Serialize;

/// What a comparison found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// `nmse` (sum of squared differences over sum of squares) or `mismatches` (elements that differ).
    pub metric: &'static str,
    /// What the metric is.
    pub value: f64,
    /// Most that passes.
    pub limit: f64,
    /// The value is within the limit.
    pub passed: bool,
    /// Elements compared.
    pub elements: usize,
    /// The sequence that was compared.
    pub sequence: usize,
    /// The KV head that was compared.
    pub kv_head: usize,
}

/// NMSE of results in f32: the conformance test allows 1e-10 for sums of up to 4096 terms, and the rounding errors
/// of a longer sum grow with the root of its length, their squares with the length.
pub(super) fn f32_limit(terms: usize) -> f64 {
    1e-10 * (terms as f64 / 4096.0).max(1.0)
}

/// NMSE of attention computed from activations of `act`: matrix units round the softmax weights to it, and the
/// result is rounded once more. The same limits as in the conformance test.
pub(in crate::bench) fn attention_limit(act: DType, terms: usize) -> f64 {
    let rounding = match act {
        DType::F16 => 2e-7,
        DType::BF16 => 1.3e-5,
        _ => 0.0,
    };
    f32_limit(terms).max(rounding)
}

/// The pair that is checked: the last, where a wrong stride or an overflowing offset shows first.
pub(super) struct Pair {
    pub sequence: usize,
    pub kv_head: usize,
}

impl Pair {
    pub fn last(rig: &Rig<'_>) -> Pair {
        Pair { sequence: rig.batch - 1, kv_head: rig.o.kv_heads - 1 }
    }

    /// NMSE of `got` against the values of `want`, which must be as many.
    pub fn nmse(&self, got: &[f64], want: &[f64], limit: f64) -> Check {
        let square = |x: f64| x * x;
        let error: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
        let size: f64 = want.iter().map(|w| square(*w)).sum();
        let value = match (error, size) {
            _ if got.len() != want.len() => f64::INFINITY,
            (0.0, _) => 0.0,
            (e, s) => e / s,
        };
        // A NaN compares as false.
        let passed = value <= limit && !want.is_empty();
        self.found("nmse", value, limit, passed, want.len())
    }

    /// Elements of `got` that differ from `want`.
    pub fn mismatches(&self, got: &[u32], want: &[u32]) -> Check {
        let differ = got.iter().zip(want).filter(|(g, w)| g != w).count();
        let value = (differ + got.len().abs_diff(want.len())) as f64;
        self.found("mismatches", value, 0.0, value == 0.0 && !want.is_empty(), want.len())
    }

    fn found(
        &self,
        metric: &'static str,
        value: f64,
        limit: f64,
        passed: bool,
        elements: usize,
    ) -> Check {
        let &Pair { sequence, kv_head } = self;
        Check { metric, value, limit, passed, elements, sequence, kv_head }
    }
}

/// Expected values of an output's first `n` elements.
pub(in crate::bench) fn expected(outputs: &[Output<'_>], which: usize, n: usize) -> Vec<f64> {
    let cells = outputs.get(which).map_or(&[][..], |o| &o.cells[..]);
    cells
        .iter()
        .take(n)
        .map(|c| match c {
            Cell::Is(v) | Cell::Near(v, _) => *v,
            Cell::Keep | Cell::Any => f64::NAN,
        })
        .collect()
}

/// Bytes of a device tensor.
pub(super) fn bytes(b: &dyn Backend, t: &Tensor) -> Result<Vec<u8>> {
    let mut out = vec![0; t.bytes()];
    b.download(t, &mut out)?;
    Ok(out)
}

/// One sequence and one KV head on the host.
pub(super) struct Small {
    pub host: CpuBackend,
    pub q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: Tensor,
    pages: Tensor,
    n_pages: usize,
    head_dim: usize,
    lead: usize,
    depth: usize,
}

impl Small {
    /// Copies what `pair` reads. `values` = V is read too.
    pub fn cut(rig: &Rig<'_>, pair: &Pair, set: &KvSet, q: &Tensor, values: bool) -> Result<Small> {
        let (o, b) = (rig.o, rig.b);
        let host = CpuBackend::new();
        let tiles = |t: &Tensor| tiles_of(rig, pair, set, t, PAGE * o.head_dim);
        let k_bytes = tiles(&set.k)?;
        let v_bytes = if values { tiles(&set.v)? } else { vec![0; k_bytes.len()] };
        let group = o.heads / o.kv_heads;
        let at = (pair.sequence * o.heads + pair.kv_head * group) * o.head_dim;
        let q_bytes = part_bytes(b, q, at, group * o.head_dim)?;
        let mut meta = [0u32; META_WORDS];
        meta[Meta::Q_LEN] = 1;
        meta[Meta::KV_LEN] = o.depth as u32;
        let pages: Vec<u32> = (0..o.pages() as u32).collect();
        Ok(Small {
            q: upload(&host, q.dtype(), &q_bytes)?,
            k: upload(&host, o.dtype, &k_bytes)?,
            v: upload(&host, o.dtype, &v_bytes)?,
            meta: upload(&host, DType::U32, bytemuck::cast_slice(&meta))?,
            pages: upload(&host, DType::U32, bytemuck::cast_slice(&pages))?,
            host,
            n_pages: o.pages(),
            head_dim: o.head_dim,
            lead: o.lead,
            depth: o.depth,
        })
    }

    pub fn seqs(&self) -> Seqs<'_> {
        Seqs {
            meta: &self.meta,
            pages: &self.pages,
            n: 1,
            max_kv: self.depth,
            max_q: 1,
            rows: 1,
            settled: false,
        }
    }

    pub fn pool(&self) -> KvPool<'_> {
        KvPool {
            k: &self.k,
            v: &self.v,
            n_pages: self.n_pages,
            kv_heads: 1,
            head_dim: self.head_dim,
            lead: self.lead,
        }
    }
}

/// The pieces of `t` (`[n_pages, kv_heads, tile]`) that belong to the pair, page by page.
pub(super) fn tiles_of(
    rig: &Rig<'_>,
    pair: &Pair,
    set: &KvSet,
    t: &Tensor,
    tile: usize,
) -> Result<Vec<u8>> {
    let n = rig.o.pages();
    let table = &set.table[pair.sequence * n..(pair.sequence + 1) * n];
    head_tiles(rig.b, table, (pair.kv_head, rig.o.kv_heads), t, tile)
}

/// The pieces of `t` (`[n_pages, kv_heads, tile]`) of one head of so many, in the pages of `table`.
pub(in crate::bench) fn head_tiles(
    b: &dyn Backend,
    table: &[u32],
    (kv_head, kv_heads): (usize, usize),
    t: &Tensor,
    tile: usize,
) -> Result<Vec<u8>> {
    let size = tile * t.dtype().bytes();
    let mut out = vec![0; table.len() * size];
    for (page, out) in table.iter().zip(out.chunks_exact_mut(size)) {
        let at = (*page as usize * kv_heads + kv_head) * tile;
        b.download(&t.slice(at, tile), out)?;
    }
    Ok(out)
}

/// A host tensor of `bytes`.
pub(in crate::bench) fn upload(host: &CpuBackend, dtype: DType, bytes: &[u8]) -> Result<Tensor> {
    let t = host.alloc(dtype, bytes.len() / dtype.bytes(), "reference check")?;
    host.upload(&t, bytes)?;
    Ok(t)
}

/// A view that holds elements `at .. at + n` of a tensor, and where in it they begin.
fn around(t: &Tensor, at: usize, n: usize) -> (Tensor, usize) {
    // Views start on 256 bytes; copies on some devices need that too.
    let before = at % 256;
    let from = at - before;
    let len = (before + n).next_multiple_of(256).min(t.len() - from);
    (t.slice(from, len), before)
}

/// Elements `at .. at + n` of a float tensor; only their neighbourhood is downloaded.
pub(in crate::bench) fn part(b: &dyn Backend, t: &Tensor, at: usize, n: usize) -> Result<Vec<f64>> {
    let (view, before) = around(t, at, n);
    Ok(floats(b, &view)?[before..before + n].to_vec())
}

/// The same elements as they are stored.
pub(in crate::bench) fn part_bytes(
    b: &dyn Backend,
    t: &Tensor,
    at: usize,
    n: usize,
) -> Result<Vec<u8>> {
    let (view, before) = around(t, at, n);
    let size = t.dtype().bytes();
    Ok(bytes(b, &view)?[before * size..(before + n) * size].to_vec())
}

/// Elements of a u32 tensor, as [`part`].
pub(in crate::bench) fn part_words(
    b: &dyn Backend,
    t: &Tensor,
    at: usize,
    n: usize,
) -> Result<Vec<u32>> {
    Ok(part(b, t, at, n)?.into_iter().map(|v| v as u32).collect())
}
