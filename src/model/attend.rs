//! Running attention ops over groups of sequences: dense attention, and the merge of split results.

use super::step::{Group, GroupSeqs, Step};
use super::workspace::Growing;
use crate::backend::{AttendDense, AttendRows, Backend, DType, Logits, Merge, Result, Tensor};
use crate::kv::KvCache;
use crate::select::{LayerShape, Selection};

/// Buffers of split results.
pub(super) struct Partials {
    out: Growing,
    lse: Growing,
}

impl Partials {
    pub fn new() -> Self {
        let new = || Growing::new(DType::F32, "attention splits");
        Partials { out: new(), lse: new() }
    }

    /// Runs a decode attention with `splits` key ranges and merges them into `out` and `lse`.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &mut self,
        b: &dyn Backend,
        group: &GroupSeqs,
        splits: usize,
        shape: LayerShape,
        out: &Tensor,
        lse: &Tensor,
        attend: impl Fn(&Tensor, &Tensor, usize) -> Result<()>,
    ) -> Result<()> {
        if splits <= 1 {
            return attend(out, lse, 1);
        }
        let seqs = group.seqs();
        let n = splits * seqs.rows * shape.heads;
        let part = self.out.at_least(b, n * shape.head_dim)?;
        let part_lse = self.lse.at_least(b, n)?;
        attend(&part, &part_lse, splits)?;
        b.merge(&Merge {
            part: &part,
            part_lse: &part_lse,
            seqs,
            splits,
            heads: shape.heads,
            head_dim: shape.head_dim,
            out,
            lse: Some(lse),
        })
    }
}

/// Dense attention of one layer of one step.
pub(super) struct Dense<'a> {
    pub b: &'a dyn Backend,
    pub step: &'a Step,
    pub cache: &'a KvCache,
    pub shape: LayerShape,
    pub window: Option<usize>,
    pub q: &'a Tensor,
}

impl Dense<'_> {
    pub fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    /// Ranges that a decode attention of `n` sequences over `keys` keys each is cut into.
    fn splits(&self, n: usize, keys: usize) -> usize {
        let pool = self.cache.pool(self.shape.layer);
        self.b.splits(self.q.dtype(), &pool, n * self.shape.kv_heads, keys)
    }

    pub fn attend(
        &self,
        g: Group,
        splits: usize,
        out: &Tensor,
        lse: Option<&Tensor>,
    ) -> Result<()> {
        self.run(g, splits, out, (lse, true), None)
    }

    /// Each row's log-sum-exp alone; `out` is room for what a backend has beside it.
    pub fn sums(&self, g: Group, out: &Tensor, lse: &Tensor) -> Result<()> {
        self.run(g, 1, out, (Some(lse), false), None)
    }

    fn run(
        &self,
        g: Group,
        splits: usize,
        out: &Tensor,
        (lse, values): (Option<&Tensor>, bool),
        logits: Option<Logits<'_>>,
    ) -> Result<()> {
        if g.n == 0 {
            return Ok(());
        }
        let group = GroupSeqs::new(self.step, g);
        self.b.attend_dense(&AttendDense {
            q: self.q,
            seqs: group.seqs(),
            cache: self.cache.pool(self.shape.layer),
            heads: self.shape.heads,
            scale: self.scale(),
            window: self.window,
            splits,
            out,
            lse,
            values,
            logits,
        })
    }

    /// Attention of a group's rows over the lists of their sequences.
    pub fn listed(
        &self,
        group: &GroupSeqs,
        lists: &Selection,
        (head_map, settled): (Option<&Tensor>, bool),
        partials: &mut Partials,
        out: &Tensor,
        lse: &Tensor,
    ) -> Result<()> {
        let seqs = group.seqs();
        let splits = self.splits(seqs.n, lists.k);
        partials.run(self.b, group, splits, self.shape, out, lse, |o, l, splits| {
            self.b.attend_rows(&AttendRows {
                q: self.q,
                seqs,
                cache: self.cache.pool(self.shape.layer),
                heads: self.shape.heads,
                scale: self.scale(),
                indices: &lists.indices,
                counts: &lists.counts,
                k: lists.k,
                rows_per_seq: lists.rows_per_seq,
                head_map,
                settled,
                splits,
                out: o,
                lse: Some(l),
            })
        })
    }

    /// Attention of decoding sequences over all their tokens; `logits`: where these are wanted too.
    pub fn decode(
        &self,
        g: Group,
        partials: &mut Partials,
        (out, lse): (&Tensor, &Tensor),
        logits: Option<Logits<'_>>,
    ) -> Result<()> {
        if g.n == 0 {
            return Ok(());
        }
        let group = GroupSeqs::new(self.step, g);
        let keys = self.window.map_or(g.max_kv, |w| w.min(g.max_kv));
        let splits = self.splits(g.n, keys);
        partials.run(self.b, &group, splits, self.shape, out, lse, |o, l, splits| {
            self.run(g, splits, o, (Some(l), true), logits)
        })
    }
}
