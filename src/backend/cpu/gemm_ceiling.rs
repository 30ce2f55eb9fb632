//! The GEMM crate's own speed at a shape: what `linear` with many rows is compared with.

use std::time::Instant;

use super::matmul::{Matrix, matmul};
use super::par;

/// How a product is shared out to the threads, one part each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GemmSplit {
    /// Every thread computes some rows of the result.
    Rows,
    /// Every thread computes some columns of the result.
    Outputs,
}

/// `y[r, o] = sum_i x[r, i] * w[o, i]` in f32 by the GEMM crate, without the backend around it.
#[derive(Debug)]
pub struct GemmCeiling {
    x: Vec<f32>,
    w: Vec<f32>,
    y: Vec<f32>,
    rows: usize,
    inputs: usize,
    outputs: usize,
}

impl GemmCeiling {
    /// `x`: `[rows, inputs]`, `w`: `[outputs, inputs]`. Panics when the lengths differ from that.
    pub fn new(rows: usize, inputs: usize, outputs: usize, x: Vec<f32>, w: Vec<f32>) -> Self {
        assert!(x.len() == rows * inputs && w.len() == outputs * inputs, "operands of other sizes");
        GemmCeiling { x, w, y: vec![0.0; rows * outputs], rows, inputs, outputs }
    }

    /// Seconds of one product on all threads.
    pub fn seconds(&mut self, split: GemmSplit) -> f64 {
        let (rows, n, outputs) = (self.rows, self.inputs, self.outputs);
        let (x, w) = (&self.x, &self.w);
        let threads = par::threads();
        let work = rows * n * outputs;
        let start = Instant::now();
        match split {
            GemmSplit::Rows => {
                let part = rows.div_ceil(threads).max(1);
                par::chunks(&mut self.y, part * outputs, work, |i, y| {
                    let m = y.len() / outputs;
                    let a = Matrix::rows(&x[i * part * n..][..m * n], n);
                    // SAFETY: `y` is this task's own slice of `m` rows of `outputs`.
                    unsafe {
                        let shape = (m, outputs, n);
                        matmul(shape, y.as_mut_ptr(), outputs, false, a, Matrix::columns(w, n));
                    }
                });
            }
            // Each part keeps its columns as a matrix of its own.
            GemmSplit::Outputs => {
                let part = outputs.div_ceil(threads).max(1);
                par::chunks(&mut self.y, part * rows, work, |i, y| {
                    let width = y.len() / rows;
                    let b = Matrix::columns(&w[i * part * n..][..width * n], n);
                    // SAFETY: `y` is this task's own slice of `rows` rows of `width`.
                    unsafe {
                        let shape = (rows, width, n);
                        matmul(shape, y.as_mut_ptr(), width, false, Matrix::rows(x, n), b);
                    }
                });
            }
        }
        std::hint::black_box(&self.y);
        start.elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_splits_compute_the_product() {
        let (rows, inputs, outputs) = (5, 7, 9);
        let x: Vec<f32> = (0..rows * inputs).map(|i| (i % 11) as f32 - 5.0).collect();
        let w: Vec<f32> = (0..outputs * inputs).map(|i| (i % 13) as f32 - 6.0).collect();
        let dot = |r: usize, o: usize| -> f32 {
            (0..inputs).map(|i| x[r * inputs + i] * w[o * inputs + i]).sum()
        };
        let mut want: Vec<f32> = (0..rows)
            .flat_map(|r| (0..outputs).map(move |o| (r, o)))
            .map(|(r, o)| dot(r, o))
            .collect();
        let mut g = GemmCeiling::new(rows, inputs, outputs, x.clone(), w.clone());
        assert!(g.seconds(GemmSplit::Rows) > 0.0);
        assert_eq!(g.y, want);
        g.y.fill(0.0);
        g.seconds(GemmSplit::Outputs);
        // The parts lie one after the other: the same values in another order.
        want.sort_by(f32::total_cmp);
        g.y.sort_by(f32::total_cmp);
        assert_eq!(g.y, want);
    }
}
