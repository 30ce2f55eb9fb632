//! `top_k` on random scores.

use super::check::{self, Check, Pair, part, part_words};
use super::inputs::{Rig, sets_for, words};
use super::run::Case;
use crate::backend::cpu::CpuBackend;
use crate::backend::{
    Backend, DType, META_WORDS, Meta, Result, Seqs, Share, Tensor, TopK, reference,
};
use crate::bench::random::Values;

/// Picks `k` tokens per (sequence, KV head).
pub(super) struct Picks {
    scores: Vec<Tensor>,
    indices: Tensor,
    counts: Tensor,
    k: usize,
    bytes: u64,
}

impl Picks {
    pub fn new(rig: &mut Rig<'_>, share: f64) -> Result<Self> {
        let (b, o) = (rig.b, rig.o);
        let (k, rows) = (o.k(share), rig.batch * o.kv_heads);
        let bytes = (rows * (o.depth + k + 1) * 4) as u64;
        let scores = (0..sets_for(bytes)).map(|_| {
            let what = "token scores";
            rig.random.tensor(b, DType::F32, rows * o.stride(), what, Values::Normal)
        });
        Ok(Picks {
            scores: scores.collect::<Result<_>>()?,
            indices: b.alloc(DType::U32, rows * k, "token lists")?,
            counts: b.alloc(DType::U32, rows, "token counts")?,
            k,
            bytes,
        })
    }
}

impl Case for Picks {
    fn bytes(&self) -> u64 {
        self.bytes
    }
    fn sets(&self) -> usize {
        self.scores.len()
    }
    fn launch(&self, rig: &Rig<'_>, set: usize) -> Result<()> {
        rig.b.top_k(&TopK {
            scores: &self.scores[set],
            seqs: rig.seqs_without_pages(),
            rows_per_seq: rig.o.kv_heads,
            stride: rig.o.stride(),
            unit: 1,
            k: self.k,
            share: Share::ALL,
            among: None,
            indices: &self.indices,
            counts: &self.counts,
        })
    }
    fn check(&self, rig: &Rig<'_>, set: usize) -> Result<Check> {
        let (o, b, pair) = (rig.o, rig.b, Pair::last(rig));
        let head = pair.sequence * o.kv_heads + pair.kv_head;
        let host = CpuBackend::new();
        let row: Vec<f32> = part(b, &self.scores[set], head * o.stride(), o.stride())?
            .into_iter()
            .map(|v| v as f32)
            .collect();
        let scores = check::upload(&host, DType::F32, bytemuck::cast_slice(&row))?;
        let mut meta = [0u32; META_WORDS];
        meta[Meta::Q_LEN] = 1;
        meta[Meta::KV_LEN] = o.depth as u32;
        let meta = words(&host, &meta, "reference check")?;
        // The reference reads page lists although top-k does not need them.
        let pages = words(&host, &(0..o.pages() as u32).collect::<Vec<_>>(), "reference check")?;
        let indices = host.alloc(DType::U32, self.k, "reference check")?;
        let counts = host.alloc(DType::U32, 1, "reference check")?;
        let p = TopK {
            scores: &scores,
            seqs: Seqs {
                meta: &meta,
                pages: &pages,
                n: 1,
                max_kv: o.depth,
                max_q: 1,
                rows: 1,
                settled: false,
            },
            rows_per_seq: 1,
            stride: o.stride(),
            unit: 1,
            k: self.k,
            share: Share::ALL,
            among: None,
            indices: &indices,
            counts: &counts,
        };
        let outputs = reference::top_k(&p, &host)?;
        let count = check::expected(&outputs, 1, 1)[0] as usize;
        let list = check::expected(&outputs, 0, count);
        let want: Vec<u32> =
            std::iter::once(count as u32).chain(list.into_iter().map(|v| v as u32)).collect();
        let mut got = part_words(b, &self.counts, head, 1)?;
        got.extend(part_words(b, &self.indices, head * self.k, count)?);
        Ok(pair.mismatches(&got, &want))
    }
    #[cfg(test)]
    fn output(&self) -> &Tensor {
        &self.indices
    }
}
