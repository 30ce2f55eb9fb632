//! Token lists of several heads or steps: union_ranks, hold_lists.

use super::encoder::{Bind, Dispatch, MAX_GROUPS, grid, word};
use super::memory::Gpu;
use super::pipelines;
use crate::backend::{HoldLists, Result, UnionRanks};

pub fn union_ranks(gpu: &Gpu, p: &UnionRanks<'_>) -> Result<()> {
    const OP: &str = "union_ranks";
    p.check()?;
    let (n, k) = (p.seqs.n, p.listed.k);
    let places = gpu.scratch(n * p.heads * k * 4)?;
    let params = [word(OP, p.heads)?, word(OP, k)?, word(OP, p.stride)?];
    let [meta, scores] = [Bind::Tensor(p.seqs.meta), Bind::Tensor(p.scores)];
    let [indices, counts] = [Bind::Tensor(p.listed.indices), Bind::Tensor(p.listed.counts)];
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::UNION_RANKS_PLACES,
        constants: &[],
        binds: &[meta, scores, indices, counts, Bind::Raw(&places.buffer)],
        params: &params,
        grid: grid(OP, [k.div_ceil(64).min(MAX_GROUPS), p.heads, n])?,
    })?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::UNION_RANKS,
        constants: &[],
        binds: &[meta, indices, counts, Bind::Raw(&places.buffer), Bind::Tensor(p.out)],
        params: &params,
        grid: grid(OP, [p.seqs.max_kv.div_ceil(64).min(MAX_GROUPS), n, 1])?,
    })
}

pub fn hold_lists(gpu: &Gpu, p: &HoldLists<'_>) -> Result<()> {
    const OP: &str = "hold_lists";
    p.check()?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::HOLD_LISTS,
        constants: &[],
        binds: &[
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.chosen),
            Bind::Tensor(p.chosen_counts),
            Bind::Tensor(p.held),
            Bind::Tensor(p.marks),
            Bind::Tensor(p.indices),
            Bind::Tensor(p.counts),
        ],
        params: &[word(OP, p.fresh)?, word(OP, p.rows_per_seq)?, word(OP, p.k)?, word(OP, p.room)?],
        grid: grid(OP, [p.room.div_ceil(64).min(MAX_GROUPS), p.rows_per_seq, p.seqs.n])?,
    })
}
