//! Attention that prefers some keys by what they hold: a bias of each key, kept in dimensions of its own.

use super::kv::check_head_dim;
use super::{apart, ensure, float, holds, holds_rows, is};
use crate::backend::{DType, MAX_GROUP, Result, Tensor};
use half::{bf16, f16};

/// Content importance of the step's new tokens (`cis` of NOSA, arXiv 2510.13602), written where attention adds it to
/// their logits.
///
/// Of row `r` and KV head `m`: `cis = a[m] * softplus(sum_i delta[m, i] v[r, i])`, `i` over all KV heads, with
/// `softplus(x) = max(x, 0) + ln(1 + exp(-|x|))`, which no `x` overflows.
///
/// Dimensions `at..head_dim` of every head are written, the others left alone: a key gets `cis, cis, 0, ...`, a query
/// [`ContentBias::unit`] and zeros. The two numbers of the query sum up to `sqrt(head_dim)` with the digits of two, so
/// that `q . k / sqrt(head_dim)` has grown by `cis`, rounded once to the key's dtype.
#[derive(Debug)]
pub struct ContentBias<'a> {
    /// act, row `r`, KV head `h`, dimension `i` at `r * v_stride + h * head_dim + i`: the values.
    pub v: &'a Tensor,
    /// Elements between rows of `v`.
    pub v_stride: usize,
    /// f32 `[kv_heads, kv_heads, head_dim]`.
    pub delta: &'a Tensor,
    /// f32 `[kv_heads]`.
    pub a: &'a Tensor,
    /// act `[rows, heads, head_dim]`, in and out.
    pub q: &'a Tensor,
    /// act `[rows, kv_heads, head_dim]`, in and out.
    pub k: &'a Tensor,
    /// Rows of the batch.
    pub rows: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head, those of the bias included.
    pub head_dim: usize,
    /// First dimension of the bias; at least two are left from there on.
    pub at: usize,
}

impl ContentBias<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "content_bias";
        let (rows, heads, hkv, d) = (self.rows, self.heads, self.kv_heads, self.head_dim);
        float(OP, "v", self.v)?;
        is(OP, "q", self.q, self.v.dtype())?;
        is(OP, "k", self.k, self.v.dtype())?;
        is(OP, "delta", self.delta, DType::F32)?;
        is(OP, "a", self.a, DType::F32)?;
        check_head_dim(OP, d)?;
        let whole = hkv > 0 && heads.is_multiple_of(hkv) && heads / hkv <= MAX_GROUP;
        ensure(OP, whole, || format!("{heads} query heads over {hkv} KV heads"))?;
        ensure(OP, self.at < d && d - self.at >= 2, || {
            format!("a bias from dimension {} of {d}: it takes two at least", self.at)
        })?;
        holds_rows(OP, "v", self.v, rows, self.v_stride, &[hkv, d])?;
        holds(OP, "delta", self.delta, &[hkv, hkv, d])?;
        holds(OP, "a", self.a, &[hkv])?;
        holds(OP, "q", self.q, &[rows, heads, d])?;
        holds(OP, "k", self.k, &[rows, hkv, d])?;
        let ins = [("v", self.v), ("delta", self.delta), ("a", self.a)];
        apart(OP, &[("q", self.q), ("k", self.k)], &ins)
    }

    /// What a query holds for the bias: `sqrt(head_dim)` rounded to its dtype, and the rest of it, rounded likewise.
    pub fn unit(&self) -> [f32; 2] {
        let rounded = |x: f64| match self.q.dtype() {
            DType::F16 => f16::from_f64(x).to_f64(),
            DType::BF16 => bf16::from_f64(x).to_f64(),
            _ => f64::from(x as f32),
        };
        let whole = (self.head_dim as f64).sqrt();
        let high = rounded(whole);
        [high as f32, rounded(whole - high) as f32]
    }
}
