//! Scores that order tokens by the turn in which the heads' rankings name them.

use super::memory::{Io, Parts};
use super::par;
use super::seqs::{Lists, sequences};
use crate::backend::{Result, UnionRanks};
use std::cmp::Ordering;

pub(super) fn run(io: &Io<'_>, p: &UnionRanks<'_>) -> Result<()> {
    let seqs = sequences(io, &p.seqs)?;
    let scores = io.read::<f32>(p.scores)?;
    let lists = Lists::read(io, p.listed)?;
    for (s, seq) in seqs.iter().enumerate() {
        let all = (s * p.heads..(s + 1) * p.heads).flat_map(|row| lists.of(row));
        if let Some(j) = all.copied().find(|&j| j as usize >= seq.kv_len) {
            return Err(io.bad(format!("token {j} of {}", seq.kv_len)));
        }
    }
    let out = Parts::new(io.write::<f32>(p.out)?);
    let work = seqs.len() * p.heads * p.listed.k * 16;
    par::tasks(seqs.len(), work, |s| {
        // SAFETY: a task writes the row of its sequence.
        let out = unsafe { out.part(s * p.stride, seqs[s].kv_len) };
        out.fill(f32::NEG_INFINITY);
        for h in 0..p.heads {
            let row = s * p.heads + h;
            let of_head = &scores[row * p.stride..][..p.stride];
            let score = |j: u32| of_head[j as usize];
            let mut order = lists.of(row).to_vec();
            order.sort_unstable_by(|&a, &b| {
                score(b).partial_cmp(&score(a)).unwrap_or(Ordering::Equal).then(a.cmp(&b))
            });
            for (rank, j) in order.into_iter().enumerate() {
                let best = &mut out[j as usize];
                *best = best.max(-((rank * p.heads + h) as f32));
            }
        }
    });
    Ok(())
}
