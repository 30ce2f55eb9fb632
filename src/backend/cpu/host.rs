//! The matrix product and the vector kernels for data that never was a tensor: what is computed about a model instead
//! of with it. One thread each; callers bring their own loops.

use super::{matmul, simd};

pub(crate) use matmul::Matrix;

/// `dst = a b`, or `dst += a b` with `accumulate`: `a` is `m` by `k`, `b` is `k` by `n`, row `i` of `dst` starts at
/// `i * stride`.
pub(crate) fn product(
    (m, n, k): (usize, usize, usize),
    dst: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        n <= stride && (m - 1) * stride + n <= dst.len(),
        "the result is larger than its slice"
    );
    // SAFETY: `dst` is borrowed for writing and holds every row, checked above.
    unsafe { matmul::matmul((m, n, k), dst.as_mut_ptr(), stride, accumulate, a, b) }
}

/// Softmax in place. Where every value is -infinity, or there is none, nothing is a probability: all become 0.
pub(crate) fn softmax(x: &mut [f32]) {
    let max = simd::largest(x);
    if max == f32::NEG_INFINITY {
        return x.fill(0.0);
    }
    let sum = simd::exp_sub(x, max);
    simd::scale(x, 1.0 / sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_rows_and_columns() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 1.0, 1.0]);
        let mut out = [9.0; 5];
        product((2, 2, 2), &mut out, 3, false, Matrix::rows(&a, 2), Matrix::columns(&b, 2));
        assert_eq!(out, [1.0, 3.0, 9.0, 3.0, 7.0]);
        product((2, 2, 2), &mut out, 3, true, Matrix::columns(&a, 2), Matrix::rows(&b, 2));
        assert_eq!(out, [5.0, 6.0, 9.0, 9.0, 11.0]);
    }

    #[test]
    fn probabilities_sum_to_one_or_are_none() {
        let mut x = [0.0, 2f32.ln(), f32::NEG_INFINITY];
        softmax(&mut x);
        assert!((x[0] - 1.0 / 3.0).abs() < 1e-6 && x[2] == 0.0, "{x:?}");
        let mut none = [f32::NEG_INFINITY; 2];
        softmax(&mut none);
        assert_eq!(none, [0.0; 2]);
    }
}
