//! Attention over listed tokens:
//! `out = sum_j softmax_j(scale * q . K[j]) V[j]` with `j` running over the list that the sequence's rows share, up to
//! each row's own position.

use super::attention::{Cache, Job, Queries, run_jobs};
use super::memory::{Io, with_float};
use super::seqs::sequences;
use crate::backend::{AttendRows, Result};

pub(super) fn run(io: &Io<'_>, p: &AttendRows<'_>) -> Result<()> {
    let (hkv, lists, parts) = (p.cache.kv_heads, p.rows_per_seq, p.parts_per_seq());
    let q = io.read::<f32>(p.q)?;
    let page_lists = io.read::<u32>(p.seqs.pages)?;
    let indices = io.read::<u32>(p.indices)?;
    let counts = io.read::<u32>(p.counts)?;
    let map = p.head_map.map(|m| io.read::<u32>(m)).transpose()?;
    let out = io.write::<f32>(p.out)?;
    let lse = p.lse.map(|l| io.write::<f32>(l)).transpose()?;
    let seqs = sequences(io, &p.seqs)?;

    let mut pages = Vec::with_capacity(seqs.len());
    let mut jobs = Vec::new();
    for (s, seq) in seqs.iter().enumerate() {
        let list = seq.page_list(io, page_lists)?;
        pages.push(list);
        for r in 0..parts {
            let heads = p.heads / parts;
            // A list that is not there is empty.
            let list_no = Some(list_of(map, r)).filter(|l| *l < lists).map(|l| s * lists + l);
            let count = list_no.map_or(0, |l| p.k.min(counts[l] as usize));
            let tokens = &indices[list_no.unwrap_or(0) * p.k..][..count];
            seq.check_listed(io, list, p.cache.n_pages, tokens)?;
            let per = count.div_ceil(p.splits);
            for (row, split) in (0..seq.q_len).flat_map(|i| (0..p.splits).map(move |s| (i, s))) {
                let keys = count.min(split * per)..count.min((split + 1) * per);
                let (row, kv_head) = (seq.q_start + row, r * hkv / parts);
                jobs.push(Job { seq: s, row, head: r * heads, heads, kv_head, split, keys });
            }
        }
    }

    let queries = Queries { q, rows: p.seqs.rows, heads: p.heads, scale: p.scale };
    let token = |job: &Job, i: usize| {
        let list = list_of(map, job.head / job.heads);
        let j = indices[(job.seq * lists + list) * p.k + i] as usize;
        let seq = &seqs[job.seq];
        (j <= seq.first_pos() + (job.row - seq.q_start)).then_some(j)
    };
    with_float!(io, p.cache.k.dtype(), T => {
        let cache = Cache::<T>::new(io, &p.cache)?;
        run_jobs(&cache, &queries, &pages, &jobs, token, out, lse);
        Ok(())
    })
}

/// The list of part `r` of a sequence.
fn list_of(map: Option<&[u32]>, r: usize) -> usize {
    map.map_or(r, |m| m[r] as usize)
}
