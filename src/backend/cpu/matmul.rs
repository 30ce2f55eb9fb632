//! Single-threaded f32 matrix product on slices, by the `gemm` crate.

/// A matrix inside a slice: element `(i, j)` at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows one after the other, `stride` apart.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        Matrix { data, row_stride: stride, col_stride: 1 }
    }
    /// The transpose of `rows(data, stride)`.
    pub fn columns(data: &'a [f32], stride: usize) -> Self {
        Matrix { data, row_stride: 1, col_stride: stride }
    }
    fn covers(&self, m: usize, n: usize) -> bool {
        m == 0 || n == 0 || (m - 1) * self.row_stride + (n - 1) * self.col_stride < self.data.len()
    }
}

/// `dst = a b`, or `dst += a b` with `accumulate`; `a` is `m` by `k`, `b` is `k` by `n`.
///
/// # Safety
/// `dst` is valid for writes of rows `i * dst_stride .. i * dst_stride + n` for `i < m`, and nobody else reads or
/// writes them meanwhile. (Parallel tasks write column panels of one matrix, which no slice can express.)
pub(super) unsafe fn matmul(
    (m, n, k): (usize, usize, usize),
    dst: *mut f32,
    dst_stride: usize,
    accumulate: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
) {
    assert!(a.covers(m, k) && b.covers(k, n), "a matrix is larger than its slice");
    // SAFETY: the operands are inside their slices, checked above; `dst` is the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst,
            1,
            dst_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
