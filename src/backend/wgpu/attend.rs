//! Attention: attend_dense, attend_rows, merge, mean_value.

use super::encoder::{Bind, Dispatch, MAX_GROUPS, grid, word};
use super::memory::Gpu;
use super::score::score_dims;
use super::{acts_are_f32, dtype_code, pipelines};
use crate::backend::{AttendDense, AttendRows, KvPool, MeanValue, Merge, Result};

/// Query rows of one prefill workgroup (BLOCK in the shader).
const PREFILL_ROWS: usize = 32;
/// f32 values that queries and weights of one decode workgroup may take: 12 KiB of the 16 KiB that every
/// device has, next to the smaller arrays.
const DECODE_TILE: usize = 3072;

/// Query heads of a group that one decode workgroup handles, and tokens per round.
fn decode_shape(group: usize, head_dim: usize) -> (usize, usize) {
    let heads = (1..=group)
        .rev()
        .find(|h| group.is_multiple_of(*h) && h * (head_dim + 64) <= DECODE_TILE)
        .unwrap_or(1);
    // Longer rounds mean fewer barriers.
    let round = [256, 128].into_iter().find(|r| heads * (head_dim + r) <= DECODE_TILE);
    (heads, round.unwrap_or(64))
}

fn constants(
    op: &'static str,
    cache: &KvPool<'_>,
    group: usize,
    per_workgroup: usize,
    round: usize,
    has_lse: bool,
) -> Result<[(&'static str, u32); 9]> {
    Ok([
        ("DTYPE", dtype_code(cache.k.dtype())),
        ("HAS_LSE", u32::from(has_lse)),
        ("HEAD_DIM", word(op, cache.head_dim)?),
        ("LEAD", word(op, cache.lead)?),
        ("GROUP", word(op, group)?),
        ("HEADS", word(op, per_workgroup)?),
        ("ROUND", word(op, round)?),
        ("Q_TILE", word(op, per_workgroup * cache.head_dim / 4)?),
        ("W_TILE", word(op, per_workgroup * round)?),
    ])
}

pub fn attend_dense(gpu: &Gpu, p: &AttendDense<'_>) -> Result<()> {
    const OP: &str = "attend_dense";
    p.check()?;
    acts_are_f32(OP, &[p.q, p.out])?;
    let cache = &p.cache;
    let group = p.heads / cache.kv_heads;
    let (heads, round) = decode_shape(group, cache.head_dim);
    let decode = p.seqs.max_q <= 1;
    let window = p.window.map_or(u32::MAX, |w| u32::try_from(w).unwrap_or(u32::MAX));
    gpu.dispatch(&Dispatch {
        kernel: if decode { &pipelines::ATTEND_DECODE } else { &pipelines::ATTEND_PREFILL },
        constants: &constants(OP, cache, group, heads, round, p.lse.is_some())?,
        binds: &[
            Bind::Tensor(p.q),
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.seqs.pages),
            Bind::Tensor(cache.k),
            Bind::Tensor(cache.v),
            Bind::Tensor(p.out),
            p.lse.map_or(Bind::Absent, Bind::Tensor),
        ],
        params: &[
            word(OP, p.seqs.rows)?,
            word(OP, p.heads)?,
            word(OP, cache.kv_heads)?,
            window,
            word(OP, p.splits)?,
            p.scale.to_bits(),
            word(OP, cache.head_dim)?,
            u32::from(p.values),
        ],
        grid: if decode {
            grid(OP, [p.splits, p.heads / heads, p.seqs.n])?
        } else {
            grid(OP, [p.seqs.max_q.div_ceil(PREFILL_ROWS), p.heads, p.seqs.n * p.splits])?
        },
    })?;
    p.scoring().map_or(Ok(()), |s| score_dims(gpu, &s))
}

pub fn attend_rows(gpu: &Gpu, p: &AttendRows<'_>) -> Result<()> {
    const OP: &str = "attend_rows";
    p.check()?;
    acts_are_f32(OP, &[p.q, p.out])?;
    let cache = &p.cache;
    let group = p.heads / cache.kv_heads;
    // Heads that share one list of tokens.
    let (heads, round) = decode_shape(p.heads / p.parts_per_seq(), cache.head_dim);
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::ATTEND_ROWS,
        constants: &constants(OP, cache, group, heads, round, p.lse.is_some())?,
        binds: &[
            Bind::Tensor(p.q),
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.seqs.pages),
            Bind::Tensor(cache.k),
            Bind::Tensor(cache.v),
            Bind::Tensor(p.out),
            p.lse.map_or(Bind::Absent, Bind::Tensor),
            Bind::Tensor(p.indices),
            Bind::Tensor(p.counts),
            p.head_map.map_or(Bind::Absent, Bind::Tensor),
        ],
        params: &[
            word(OP, p.seqs.rows)?,
            word(OP, p.heads)?,
            word(OP, cache.kv_heads)?,
            word(OP, p.k)?,
            word(OP, p.rows_per_seq)?,
            word(OP, p.splits)?,
            p.scale.to_bits(),
            word(OP, cache.head_dim)?,
            u32::from(p.head_map.is_some()),
            word(OP, p.seqs.max_q)?,
        ],
        grid: grid(OP, [p.splits, p.heads / heads, p.seqs.n * p.seqs.max_q])?,
    })
}

pub fn merge(gpu: &Gpu, p: &Merge<'_>) -> Result<()> {
    const OP: &str = "merge";
    p.check()?;
    acts_are_f32(OP, &[p.out])?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::MERGE,
        constants: &[],
        binds: &[
            Bind::Tensor(p.part),
            Bind::Tensor(p.part_lse),
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.out),
            p.lse.map_or(Bind::Absent, Bind::Tensor),
        ],
        params: &[
            word(OP, p.seqs.rows)?,
            word(OP, p.heads)?,
            word(OP, p.head_dim)?,
            word(OP, p.splits)?,
            u32::from(p.lse.is_some()),
        ],
        grid: grid(OP, [p.seqs.max_q.min(MAX_GROUPS), p.heads, p.seqs.n])?,
    })
}

pub fn mean_value(gpu: &Gpu, p: &MeanValue<'_>) -> Result<()> {
    const OP: &str = "mean_value";
    p.check()?;
    acts_are_f32(OP, &[p.out])?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::MEAN_VALUE,
        constants: &[],
        binds: &[
            Bind::Tensor(p.seqs.meta),
            Bind::Tensor(p.scores),
            Bind::Tensor(p.listed.indices),
            Bind::Tensor(p.listed.counts),
            Bind::Tensor(p.sums),
            Bind::Tensor(p.out),
        ],
        params: &[
            word(OP, p.heads)?,
            word(OP, p.kv_heads)?,
            word(OP, p.head_dim)?,
            word(OP, p.stride)?,
            word(OP, p.listed.k)?,
            word(OP, p.lists)?,
            word(OP, p.slots)?,
        ],
        grid: grid(OP, [p.heads, p.seqs.n, 1])?,
    })
}
