//! Matrix product with a weight: `y[r, o] = sum_i x[r, i] * w[o, i] + bias[o]`, or `y += ...`.
//!
//! Few rows (decode) are bound by reading the weights: dot products straight from them, each weight read once.
//! Many rows (prefill) are bound by arithmetic: panels of weight rows are widened to f32 and multiplied by the
//! GEMM crate.

use std::cell::RefCell;

use super::matmul::{Matrix, matmul};
use super::memory::{Io, Parts, with_float};
use super::par;
use super::simd::{self, Lane};
use crate::backend::{Linear, Result};

/// Most rows of the dot-product path.
const FEW_ROWS: usize = 8;
/// Weight elements of one decode task: long streams, yet enough tasks for all cores.
const DECODE_TASK: usize = 1 << 16;
/// Weight rows of one prefill task.
const PANEL: usize = 128;
/// Activation rows of one prefill task.
const ROWS: usize = 512;

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
            many_rows(p, x, w, bias, y);
        }
        Ok(())
    })
}

fn few_rows<T: Lane>(p: &Linear<'_>, x: &[f32], w: &[T], bias: Option<&[f32]>, y: &mut [f32]) {
    let (rows, n) = (p.rows, p.inputs);
    let panel = (DECODE_TASK / n.max(1)).clamp(4, PANEL).next_multiple_of(4);
    let y = Parts::new(y);
    par::tasks(p.outputs.div_ceil(panel), p.outputs * n, |task| {
        let outputs = task * panel..p.outputs.min((task + 1) * panel);
        let w = &w[outputs.start * n..outputs.end * n];
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
    /// Widened weight panel of the task that runs on this thread.
    static PANEL_F32: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn many_rows<T: Lane>(p: &Linear<'_>, x: &[f32], w: &[T], bias: Option<&[f32]>, y: &mut [f32]) {
    let n = p.inputs;
    let (panels, blocks) = (p.outputs.div_ceil(PANEL), p.rows.div_ceil(ROWS));
    let y = Parts::new(y);
    par::tasks(panels * blocks, p.rows * p.outputs * n, |task| {
        let (panel, block) = (task / blocks, task % blocks);
        let outputs = panel * PANEL..p.outputs.min((panel + 1) * PANEL);
        let rows = block * ROWS..p.rows.min((block + 1) * ROWS);
        // What the product is added to: the bias, or y itself with it.
        let add = p.accumulate || bias.is_some();
        for r in rows.clone() {
            // SAFETY: tasks own disjoint rectangles of y.
            let y = unsafe { y.part(r * p.outputs + outputs.start, outputs.len()) };
            match bias {
                Some(b) if p.accumulate => {
                    y.iter_mut().zip(&b[outputs.clone()]).for_each(|(y, b)| *y += b);
                }
                Some(b) => y.copy_from_slice(&b[outputs.clone()]),
                None => {}
            }
        }
        PANEL_F32.with_borrow_mut(|scratch| {
            scratch.resize(PANEL * n, 0.0);
            let wide = &mut scratch[..outputs.len() * n];
            simd::widen(&w[outputs.start * n..outputs.end * n], wide);
            let shape = (rows.len(), outputs.len(), n);
            let a = Matrix::rows(&x[rows.start * n..rows.end * n], n);
            let b = Matrix::columns(wide, n);
            // SAFETY: this task's rectangle of y, as above.
            unsafe {
                let last = (rows.len() - 1) * p.outputs + outputs.len();
                let dst = y.part_ptr(rows.start * p.outputs + outputs.start, last);
                matmul(shape, dst, p.outputs, add, a, b);
            }
        });
    });
}
