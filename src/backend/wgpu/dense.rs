//! The dense family: embed, gather_rows, rms_norm, linear, rope, swiglu.

use std::ops::Range;

use super::encoder::{BIND_ALIGN, Bind, Dispatch, flat_grid, grid, loose_offset, word};
use super::memory::Gpu;
use super::{acts_are_f32, dtype_code, pipelines};
use crate::backend::{
    BackendError, Embed, GatherRows, Linear, Result, RmsNorm, Rope, SwiGlu, Tensor,
};

/// Rows of `x` up to which `linear` reads the weight once per workgroup instead of tiling.
const MATVEC_ROWS: usize = 4;

/// Row ranges of a `[rows, cols]` table, each of which fits into one binding.
fn row_ranges(
    gpu: &Gpu,
    op: &'static str,
    t: &Tensor,
    rows: usize,
    cols: usize,
) -> Result<Vec<Range<usize>>> {
    let row_bytes = cols * t.dtype().bytes();
    let limit = gpu.limits.max_storage_buffer_binding_size as usize;
    if rows == 0 || row_bytes == 0 {
        return Ok(Vec::new());
    }
    if rows * row_bytes <= limit / 16 * 16 {
        return Ok(std::iter::once(0..rows).collect());
    }
    // Every range starts at a bindable offset.
    let step = BIND_ALIGN >> row_bytes.trailing_zeros().min(BIND_ALIGN.trailing_zeros());
    let most = limit / row_bytes / step * step;
    if most == 0 {
        return Err(BackendError::BufferLimit {
            what: format!("{step} rows of a weight of op {op}"),
            need: (step * row_bytes) as u64,
            limit: limit as u64,
            remedy: "use another device".into(),
        });
    }
    Ok((0..rows).step_by(most).map(|first| first..rows.min(first + most)).collect())
}

/// The bytes of rows `range`.
fn rows_of<'a>(t: &'a Tensor, range: &Range<usize>, cols: usize) -> Bind<'a> {
    let row_bytes = cols * t.dtype().bytes();
    Bind::Part { tensor: t, start: range.start * row_bytes, len: range.len() * row_bytes }
}

pub fn embed(gpu: &Gpu, p: &Embed<'_>) -> Result<()> {
    const OP: &str = "embed";
    p.check()?;
    let (rows, cols, vocab) = (word(OP, p.rows)?, word(OP, p.cols)?, word(OP, p.vocab)?);
    for range in row_ranges(gpu, OP, p.table, p.vocab, p.cols)? {
        gpu.dispatch(&Dispatch {
            kernel: &pipelines::EMBED,
            constants: &[("DTYPE", dtype_code(p.table.dtype()))],
            binds: &[Bind::Tensor(p.tokens), rows_of(p.table, &range, p.cols), Bind::Tensor(p.out)],
            params: &[
                rows,
                cols,
                vocab,
                word(OP, range.start)?,
                word(OP, range.len())?,
                p.scale.to_bits(),
            ],
            grid: flat_grid(OP, (p.rows * p.cols).div_ceil(64))?,
        })?;
    }
    Ok(())
}

pub fn gather_rows(gpu: &Gpu, p: &GatherRows<'_>) -> Result<()> {
    const OP: &str = "gather_rows";
    p.check()?;
    let words = (p.n * p.cols * p.x.dtype().bytes()).div_ceil(4);
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::GATHER_ROWS,
        constants: &[("DTYPE", dtype_code(p.x.dtype()))],
        binds: &[Bind::Tensor(p.x), Bind::Tensor(p.rows), Bind::Tensor(p.out)],
        params: &[word(OP, p.n)?, word(OP, p.x_rows)?, word(OP, p.cols)?],
        grid: flat_grid(OP, words.div_ceil(64))?,
    })
}

pub fn rms_norm(gpu: &Gpu, p: &RmsNorm<'_>) -> Result<()> {
    const OP: &str = "rms_norm";
    p.check()?;
    acts_are_f32(OP, &[p.out])?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::RMS_NORM,
        constants: &[],
        binds: &[Bind::Tensor(p.x), Bind::Tensor(p.weight), Bind::Tensor(p.out)],
        params: &[word(OP, p.rows)?, word(OP, p.cols)?, p.eps.to_bits()],
        grid: flat_grid(OP, p.rows)?,
    })
}

pub fn linear(gpu: &Gpu, p: &Linear<'_>) -> Result<()> {
    const OP: &str = "linear";
    p.check()?;
    acts_are_f32(OP, &[p.x, p.y])?;
    if p.rows == 0 {
        return Ok(());
    }
    let (rows, inputs) = (word(OP, p.rows)?, word(OP, p.inputs)?);
    // Enough inputs per thread that the sum over the lanes at the end stays small.
    let lanes = if p.inputs <= 2048 { 16 } else { 32 };
    let dtype = ("DTYPE", dtype_code(p.w.dtype()));
    let bias = ("BIAS", u32::from(p.bias.is_some()));
    let accumulate = ("ACCUMULATE", u32::from(p.accumulate));
    // matmul_rows: rows of each of the eight threads of a workgroup.
    let thread_rows = p.rows.div_ceil(8).next_power_of_two().min(4);
    for range in row_ranges(gpu, OP, p.w, p.outputs, p.inputs)? {
        let count = range.len();
        let (kernel, constants, grid) = if p.rows <= MATVEC_ROWS {
            let groups = count.div_ceil(4 * (64 / lanes as usize));
            let shape = vec![dtype, bias, accumulate, ("ROWS", rows), ("LANES", lanes)];
            (&pipelines::MATVEC, shape, flat_grid(OP, groups)?)
        } else if gpu.software {
            let groups = [count.div_ceil(8), p.rows.div_ceil(8 * thread_rows), 1];
            let shape = vec![dtype, bias, accumulate, ("ROWS", thread_rows as u32)];
            (&pipelines::MATMUL_ROWS, shape, grid(OP, groups)?)
        } else {
            let groups = [count.div_ceil(64), p.rows.div_ceil(64), 1];
            (&pipelines::MATMUL, vec![dtype, bias, accumulate], grid(OP, groups)?)
        };
        gpu.dispatch(&Dispatch {
            kernel,
            constants: &constants,
            binds: &[
                Bind::Tensor(p.x),
                rows_of(p.w, &range, p.inputs),
                p.bias.map_or(Bind::Absent, Bind::Tensor),
                Bind::Tensor(p.y),
            ],
            params: &[rows, inputs, word(OP, p.outputs)?, word(OP, range.start)?, word(OP, count)?],
            grid,
        })?;
    }
    Ok(())
}

pub fn rope(gpu: &Gpu, p: &Rope<'_>) -> Result<()> {
    const OP: &str = "rope";
    p.check()?;
    acts_are_f32(OP, &[p.x])?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::ROPE,
        constants: &[("NORM", u32::from(p.norm.is_some()))],
        binds: &[
            Bind::Loose(p.x),
            Bind::Tensor(p.positions),
            Bind::Tensor(p.inv_freq),
            p.norm.as_ref().map_or(Bind::Absent, |n| Bind::Tensor(n.weight)),
            Bind::Tensor(p.out),
        ],
        params: &[
            word(OP, p.rows)?,
            word(OP, p.heads)?,
            word(OP, p.head_dim)?,
            word(OP, p.heads_per_freq)?,
            word(OP, p.x_stride)?,
            word(OP, loose_offset(p.x))?,
            p.norm.as_ref().map_or(0, |n| n.eps.to_bits()),
            p.factor.to_bits(),
        ],
        grid: flat_grid(OP, p.rows * p.heads)?,
    })
}

pub fn swiglu(gpu: &Gpu, p: &SwiGlu<'_>) -> Result<()> {
    const OP: &str = "swiglu";
    p.check()?;
    acts_are_f32(OP, &[p.x])?;
    gpu.dispatch(&Dispatch {
        kernel: &pipelines::SWIGLU,
        constants: &[],
        binds: &[Bind::Tensor(p.x), Bind::Tensor(p.out)],
        params: &[word(OP, p.rows)?, word(OP, p.ffn)?],
        grid: flat_grid(OP, (p.rows * p.ffn).div_ceil(64))?,
    })
}
