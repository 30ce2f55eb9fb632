//! The check inside every measurement: one (row, KV head) of the last layer's result against float64 attention over the
//! tokens that the layer attended to.

use super::rig::Rig;
use crate::backend::cpu::CpuBackend;
use crate::backend::{
    AttendRows, Backend, DType, KvPool, META_WORDS, Meta, PAGE, Result, Seqs, Tensor, reference,
};
use crate::bench::kernels::Check;
use crate::bench::kernels::check::{
    attention_limit, expected, head_tiles, part, part_bytes, part_words, upload,
};
use crate::select::Selection;

/// The last KV head of one sequence, on the host.
pub(super) struct Head {
    host: CpuBackend,
    sequence: usize,
    kv_head: usize,
    keys: Tensor,
    values: Tensor,
    pages: usize,
}

/// A row of a step.
pub(super) struct Asked<'a> {
    /// Its number in the step.
    pub row: usize,
    /// Tokens that it may see: itself, and those before it.
    pub seen: usize,
    /// What it was attended with, if not with all of them: which sequence's or tile's of the lists, and the list of each
    /// KV head, where they are not in order.
    pub chosen: Option<(usize, &'a Selection, Option<&'a Tensor>)>,
}

impl Head {
    /// Copies what layer `layer` keeps of `sequence` for that head.
    pub fn of(rig: &Rig<'_>, layer: usize, sequence: usize) -> Result<Head> {
        let (of, host) = (rig.of, CpuBackend::new());
        let kv_head = of.kv_heads - 1;
        let table = rig.tables[sequence].pages();
        let copy = |t: &Tensor| {
            let tile = PAGE * of.head_dim;
            upload(&host, of.dtype, &head_tiles(rig.b, table, (kv_head, of.kv_heads), t, tile)?)
        };
        let (keys, values) = rig.kv(layer);
        let (keys, values) = (copy(keys)?, copy(values)?);
        Ok(Head { host, sequence, kv_head, keys, values, pages: table.len() })
    }

    /// Of what `rig.ws.attn` holds for a row.
    pub fn check(&self, rig: &Rig<'_>, asked: &Asked<'_>) -> Result<Check> {
        let (of, b, host, kv_head) = (rig.of, rig.b, &self.host, self.kv_head);
        let group = of.heads / of.kv_heads;
        let lists = self.tokens(rig, asked)?;
        let (counts, k): (Vec<u32>, usize) = (
            lists.iter().map(|l| l.len() as u32).collect(),
            lists.iter().map(Vec::len).max().unwrap_or(0).max(1),
        );
        let padded: Vec<u32> = lists
            .iter()
            .flat_map(|l| l.iter().copied().chain(std::iter::repeat_n(0, k - l.len())))
            .collect();

        let mut meta = [0u32; META_WORDS];
        (meta[Meta::Q_LEN], meta[Meta::KV_LEN]) = (1, asked.seen as u32);
        let pages: Vec<u32> = (0..self.pages as u32).collect();
        let words = |w: &[u32]| upload(host, DType::U32, bytemuck::cast_slice(w));
        let (meta, pages, indices, counts) =
            (words(&meta)?, words(&pages)?, words(&padded)?, words(&counts)?);
        let n = group * of.head_dim;
        let at = (asked.row * of.heads + kv_head * group) * of.head_dim;
        let out = host.alloc(DType::F32, n, "reference check")?;
        let act = rig.ws.q.dtype();
        let p = AttendRows {
            q: &upload(host, act, &part_bytes(b, &rig.ws.q, at, n)?)?,
            seqs: Seqs {
                meta: &meta,
                pages: &pages,
                n: 1,
                max_kv: rig.tokens,
                max_q: 1,
                rows: 1,
                settled: false,
            },
            cache: KvPool {
                k: &self.keys,
                v: &self.values,
                n_pages: self.pages,
                kv_heads: 1,
                head_dim: of.head_dim,
                lead: rig.cache.shape().lead,
            },
            heads: group,
            scale: 1.0 / (of.head_dim as f32).sqrt(),
            indices: &indices,
            counts: &counts,
            k,
            rows_per_seq: lists.len(),
            head_map: None,
            settled: false,
            splits: 1,
            out: &out,
            lse: None,
        };
        let want = expected(&reference::attend_rows(&p, host)?, 0, n);
        let got = part(b, &rig.ws.attn, at, n)?;
        let error: f64 = got.iter().zip(&want).map(|(g, w)| (g - w).powi(2)).sum();
        let value = error / want.iter().map(|w| w * w).sum::<f64>();
        let limit = attention_limit(act, k);
        // A NaN compares as false.
        Ok(Check {
            metric: "nmse",
            value,
            limit,
            passed: value <= limit,
            elements: n,
            sequence: self.sequence,
            kv_head,
        })
    }

    /// What the row was attended with: one list for the head's group, or one for each of its query heads.
    fn tokens(&self, rig: &Rig<'_>, asked: &Asked<'_>) -> Result<Vec<Vec<u32>>> {
        let (of, kv_head) = (rig.of, self.kv_head);
        let seen = asked.seen as u32;
        let Some((of_seq, chosen, map)) = asked.chosen else {
            return Ok(vec![(0..seen).collect()]);
        };
        let lists: Vec<usize> = match map {
            Some(map) => vec![part_words(rig.b, map, kv_head, 1)?[0] as usize],
            None if chosen.rows_per_seq == of.heads && of.heads > of.kv_heads => {
                let group = of.heads / of.kv_heads;
                (kv_head * group..(kv_head + 1) * group).collect()
            }
            None => vec![kv_head],
        };
        let read = |list: usize| {
            if list >= chosen.rows_per_seq {
                return Ok(Vec::new()); // a list that is not there is empty
            }
            let row = of_seq * chosen.rows_per_seq + list;
            let count = part_words(rig.b, &chosen.counts, row, 1)?[0] as usize;
            let mut list = part_words(rig.b, &chosen.indices, row * chosen.k, count.min(chosen.k))?;
            // The rows of a tile share its list; each reads what lies before it.
            list.retain(|&t| t < seen);
            Ok(list)
        };
        lists.into_iter().map(read).collect()
    }
}
