//! The check inside every measurement: one (sequence, KV head) of the last layer's result against float64 attention over
//! the tokens that the layer attended to.

use super::rig::Rig;
use crate::backend::cpu::CpuBackend;
use crate::backend::{
    AttendRows, Backend, DType, KvPool, META_WORDS, Meta, PAGE, Result, Seqs, reference,
};
use crate::bench::kernels::Check;
use crate::bench::kernels::check::{
    attention_limit, expected, head_tiles, part, part_words, upload,
};
use crate::model::Attention;

/// Of what `attention` left of the last layer in the rig's workspace.
pub(super) fn last_layer(rig: &Rig<'_>, attention: &Attention) -> Result<Check> {
    let (o, b) = (rig.o, rig.b);
    let layer = o.layers - 1;
    let (sequence, kv_head, group) = (rig.batch - 1, o.kv_heads - 1, o.heads / o.kv_heads);
    let lists = tokens(rig, attention, layer, (sequence, kv_head))?;
    let (counts, k): (Vec<u32>, usize) = (
        lists.iter().map(|l| l.len() as u32).collect(),
        lists.iter().map(Vec::len).max().unwrap_or(0).max(1),
    );
    let padded: Vec<u32> = lists
        .iter()
        .flat_map(|l| l.iter().copied().chain(std::iter::repeat_n(0, k - l.len())))
        .collect();

    let host = CpuBackend::new();
    let table = rig.tables[sequence].pages();
    let (keys, values) = rig.kv(layer);
    let tiles = |t| head_tiles(b, table, (kv_head, o.kv_heads), t, PAGE * o.head_dim);
    let (keys, values) =
        (upload(&host, o.dtype, &tiles(keys)?)?, upload(&host, o.dtype, &tiles(values)?)?);
    let mut meta = [0u32; META_WORDS];
    (meta[Meta::Q_LEN], meta[Meta::KV_LEN]) = (1, o.depth as u32);
    let pages: Vec<u32> = (0..table.len() as u32).collect();
    let words = |w: &[u32]| upload(&host, DType::U32, bytemuck::cast_slice(w));
    let (meta, pages, indices, counts) =
        (words(&meta)?, words(&pages)?, words(&padded)?, words(&counts)?);
    let n = group * o.head_dim;
    let out = host.alloc(DType::F32, n, "reference check")?;
    let p = AttendRows {
        q: &upload(&host, rig.ws.q.dtype(), &rig.query_bytes(sequence, kv_head)?)?,
        seqs: Seqs { meta: &meta, pages: &pages, n: 1, max_kv: o.depth, max_q: 1, rows: 1 },
        cache: KvPool {
            k: &keys,
            v: &values,
            n_pages: table.len(),
            kv_heads: 1,
            head_dim: o.head_dim,
            lead: rig.cache.shape().lead,
        },
        heads: group,
        scale: 1.0 / (o.head_dim as f32).sqrt(),
        indices: &indices,
        counts: &counts,
        k,
        rows_per_seq: lists.len(),
        head_map: None,
        splits: 1,
        out: &out,
        lse: None,
    };
    let want = expected(&reference::attend_rows(&p, &host)?, 0, n);
    let got = part(b, &rig.ws.attn, (sequence * o.heads + kv_head * group) * o.head_dim, n)?;
    let error: f64 = got.iter().zip(&want).map(|(g, w)| (g - w).powi(2)).sum();
    let value = error / want.iter().map(|w| w * w).sum::<f64>();
    let limit = attention_limit(rig.ws.q.dtype(), k);
    // A NaN compares as false.
    Ok(Check {
        metric: "nmse",
        value,
        limit,
        passed: value <= limit,
        elements: n,
        sequence,
        kv_head,
    })
}

/// What the layer attended to for one KV head of a sequence: one list for the group, or one for each of its query heads.
fn tokens(
    rig: &Rig<'_>,
    attention: &Attention,
    layer: usize,
    (sequence, kv_head): (usize, usize),
) -> Result<Vec<Vec<u32>>> {
    let o = rig.o;
    let plan = &attention.plan().layers[layer];
    let Some((chosen, map)) =
        attention.attended(layer).filter(|_| plan.sparse() && o.depth > plan.budget.dense_until())
    else {
        return Ok(vec![(0..o.depth as u32).collect()]);
    };
    let lists: Vec<usize> = match map {
        Some(map) => vec![part_words(rig.b, map, kv_head, 1)?[0] as usize],
        None if chosen.rows_per_seq == o.heads && o.heads > o.kv_heads => {
            let group = o.heads / o.kv_heads;
            (kv_head * group..(kv_head + 1) * group).collect()
        }
        None => vec![kv_head],
    };
    let read = |list: usize| {
        if list >= chosen.rows_per_seq {
            return Ok(Vec::new()); // a list that is not there is empty
        }
        let row = sequence * chosen.rows_per_seq + list;
        let count = part_words(rig.b, &chosen.counts, row, 1)?[0] as usize;
        part_words(rig.b, &chosen.indices, row * chosen.k, count.min(chosen.k))
    };
    lists.into_iter().map(read).collect()
}
