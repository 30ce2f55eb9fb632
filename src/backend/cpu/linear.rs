//! Matrix product with a weight: `y[r, o] = sum_i x[r, i] * w[o, i] + bias[o]`, or `y += ...`.
//!
//! Few rows (decode) are bound by reading the weights: dot products straight from them, each weight read once.
//! Many rows (prefill) are bound by arithmetic: the result is cut into tiles, one product of the GEMM crate each.
//! 16-bit weights are widened tile by tile, in the cache of the core that multiplies them: with a hundred rows and
//! more a tile that costs less than a pass over memory would.

use std::cell::RefCell;

use super::matmul::{Matrix, matmul};
use super::memory::{Io, Parts, with_float};
use super::par;
use super::simd::{self, Lane};
use super::tiles::Tiles;
use crate::backend::{DType, Linear, Result};

/// Most rows of the dot-product path.
const FEW_ROWS: usize = 8;
/// Most weight elements and weight rows of one decode task.
const DECODE_TASK: usize = 1 << 16;
const PANEL: usize = 128;
/// Decode tasks a thread, where the weight is large enough: a late thread leaves some of its own to the others.
const TASKS_PER_THREAD: usize = 4;

pub(super) fn run(io: &Io<'_>, p: &Linear<'_>) -> Result<()> {
    let x = &io.read::<f32>(p.x)?[..p.rows * p.inputs];
    let bias = p.bias.map(|b| Ok(&io.read::<f32>(b)?[..p.outputs])).transpose()?;
    let y = &mut io.write::<f32>(p.y)?[..p.rows * p.outputs];
    if p.rows == 0 || p.outputs == 0 {
        return Ok(());
    }
    with_float!(io, p.w.dtype(), T => {
        let w = &io.read::<T>(p.w)?[..p.outputs * p.inputs];
        if p.rows <= FEW_ROWS {
            few_rows(p, x, w, bias, y);
        } else {
            let tiles = Tiles::choose(p.rows, p.outputs, p.inputs, par::threads());
            many_rows(p, x, w, bias, y, &tiles);
        }
        Ok(())
    })
}

fn few_rows<T: Lane>(p: &Linear<'_>, x: &[f32], w: &[T], bias: Option<&[f32]>, y: &mut [f32]) {
    let (rows, n) = (p.rows, p.inputs);
    // Every output is a dot product of its own, summed in the same order whatever the task.
    let share = p.outputs.div_ceil(TASKS_PER_THREAD * par::threads());
    let panel = share.min(DECODE_TASK / n.max(1)).clamp(4, PANEL).next_multiple_of(4);
    let y = Parts::new(y);
    par::tasks(p.outputs.div_ceil(panel), p.outputs * n, |task| {
        let outputs = task * panel..p.outputs.min((task + 1) * panel);
        // With what follows: the thread's next task.
        let w = &w[outputs.start * n..];
        let mut sums = [0.0; PANEL * FEW_ROWS];
        let sums = &mut sums[..outputs.len() * rows];
        if rows == 1 {
            simd::gemv(x, w, sums);
        } else {
            simd::gemv_rows(x, rows, n, w, sums);
        }
        for r in 0..rows {
            // SAFETY: tasks own disjoint ranges of outputs.
            let y = unsafe { y.part(r * p.outputs + outputs.start, outputs.len()) };
            for (i, y) in y.iter_mut().enumerate() {
                let sum = sums[i * rows + r] + bias.map_or(0.0, |b| b[outputs.start + i]);
                *y = if p.accumulate { *y + sum } else { sum };
            }
        }
    });
}

thread_local! {
    /// Widened weight rows of the tile that runs on this thread.
    static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn many_rows<T: Lane>(
    p: &Linear<'_>,
    x: &[f32],
    w: &[T],
    bias: Option<&[f32]>,
    y: &mut [f32],
    tiles: &Tiles,
) {
    let n = p.inputs;
    let y = Parts::new(y);
    par::tasks(tiles.len(), p.rows * p.outputs * n, |task| {
        let (rows, outputs) = tiles.get(task);
        // What the product is added to: the bias, or y itself with it.
        let add = p.accumulate || bias.is_some();
        if let Some(b) = bias.map(|b| &b[outputs.clone()]) {
            for r in rows.clone() {
                // SAFETY: tasks own disjoint rectangles of y.
                let y = unsafe { y.part(r * p.outputs + outputs.start, outputs.len()) };
                if p.accumulate {
                    y.iter_mut().zip(b).for_each(|(y, b)| *y += b);
                } else {
                    y.copy_from_slice(b);
                }
            }
        }
        let product = |w: &[f32]| {
            let shape = (rows.len(), outputs.len(), n);
            let a = Matrix::rows(&x[rows.start * n..rows.end * n], n);
            let last = (rows.len() - 1) * p.outputs + outputs.len();
            let dst = y.part_ptr(rows.start * p.outputs + outputs.start, last);
            // SAFETY: this task's rectangle of y, as above.
            unsafe { matmul(shape, dst, p.outputs, add, a, Matrix::columns(w, n)) };
        };
        let w = &w[outputs.start * n..outputs.end * n];
        if T::DTYPE == DType::F32 {
            product(bytemuck::cast_slice(w));
        } else {
            WIDE.with_borrow_mut(|wide| {
                wide.resize(wide.len().max(w.len()), 0.0);
                simd::widen(w, &mut wide[..w.len()]);
                product(&wide[..w.len()]);
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, cpu::CpuBackend};
    use half::f16;

    /// The same bits whatever the number of threads that the tiles are chosen for.
    #[test]
    fn results_do_not_depend_on_the_tiles() {
        let b = CpuBackend::new();
        let any = b.alloc(DType::F32, 1, "test").unwrap();
        for (rows, inputs, outputs) in [
            (9, 33, 50),
            (64, 576, 200),
            (65, 600, 60),
            (200, 576, 60),
            (301, 1536, 203),
            (512, 576, 576),
        ] {
            let number = |i: usize| ((i * 7919 % 1999) as f32 - 999.0) / 512.0;
            let x: Vec<f32> = (0..rows * inputs).map(number).collect();
            let w: Vec<f16> = (0..outputs * inputs).map(|i| f16::from_f32(number(i + 3))).collect();
            let wide: Vec<f32> = w.iter().map(|w| w.to_f32()).collect();
            let bias: Vec<f32> = (0..outputs).map(number).collect();
            let p = Linear {
                x: &any,
                w: &any,
                bias: None,
                y: &any,
                rows,
                inputs,
                outputs,
                accumulate: false,
            };
            let mut want: Vec<u32> = Vec::new();
            for threads in [1, 2, 3, 5, 16, 61] {
                let tiles = Tiles::choose(rows, outputs, inputs, threads);
                let (mut y, mut z) =
                    (vec![f32::NAN; rows * outputs], vec![f32::NAN; rows * outputs]);
                many_rows(&p, &x, &w, Some(&bias), &mut y, &tiles);
                many_rows(&p, &x, &wide, Some(&bias), &mut z, &tiles);
                assert!(y.iter().all(|y| y.is_finite()));
                let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<u32>>();
                assert_eq!(bits(&y), bits(&z));
                if want.is_empty() {
                    want = bits(&y);
                }
                assert!(want == bits(&y), "{rows} x {inputs} x {outputs}, {threads} threads");
            }
        }
    }
}
