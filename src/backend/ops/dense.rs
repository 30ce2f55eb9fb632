//! The dense family: embedding, norms, linear layers, rotary embedding, activation.

use super::{apart, ensure, float, holds, holds_rows, is};
use crate::backend::{DType, Result, Tensor};

/// `out[r, :] = table[tokens[r], :]`. A token outside the vocabulary gives a row of zeros.
#[derive(Debug)]
pub struct Embed<'a> {
    /// u32 `[rows]`.
    pub tokens: &'a Tensor,
    /// Weight dtype `[vocab, cols]`.
    pub table: &'a Tensor,
    /// f32 `[rows, cols]`.
    pub out: &'a Tensor,
    /// Tokens.
    pub rows: usize,
    /// Width of an embedding.
    pub cols: usize,
    /// Rows of the table.
    pub vocab: usize,
    /// Factor of every value; finite.
    pub scale: f32,
}

impl Embed<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "embed";
        ensure(OP, self.scale.is_finite(), || format!("a scale of {}", self.scale))?;
        is(OP, "tokens", self.tokens, DType::U32)?;
        float(OP, "table", self.table)?;
        is(OP, "out", self.out, DType::F32)?;
        holds(OP, "tokens", self.tokens, &[self.rows])?;
        holds(OP, "table", self.table, &[self.vocab, self.cols])?;
        apart(OP, &[("out", self.out)], &[("tokens", self.tokens), ("table", self.table)])?;
        holds(OP, "out", self.out, &[self.rows, self.cols])
    }
}

/// `out[i, :] = x[rows[i], :]`; same dtype, a float or u32. Every index must be below `x_rows`.
#[derive(Debug)]
pub struct GatherRows<'a> {
    /// `[x_rows, cols]`.
    pub x: &'a Tensor,
    /// u32 `[n]`.
    pub rows: &'a Tensor,
    /// `[n, cols]`, not `x`.
    pub out: &'a Tensor,
    /// Rows to gather.
    pub n: usize,
    /// Rows of `x`.
    pub x_rows: usize,
    /// Width of a row.
    pub cols: usize,
}

impl GatherRows<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "gather_rows";
        is(OP, "rows", self.rows, DType::U32)?;
        ensure(OP, self.x.dtype() != DType::I8, || "x is i8, must be a float or u32".into())?;
        is(OP, "out", self.out, self.x.dtype())?;
        holds(OP, "x", self.x, &[self.x_rows, self.cols])?;
        holds(OP, "rows", self.rows, &[self.n])?;
        apart(OP, &[("out", self.out)], &[("x", self.x), ("rows", self.rows)])?;
        holds(OP, "out", self.out, &[self.n, self.cols])
    }
}

/// `out[r, :] = x[r, :] / sqrt(mean(x[r, :]^2) + eps) * weight` (RMSNorm, Zhang and Sennrich 2019).
#[derive(Debug)]
pub struct RmsNorm<'a> {
    /// f32 `[rows, cols]`.
    pub x: &'a Tensor,
    /// f32 `[cols]`; not written by the op right before, which may still run when it is read.
    pub weight: &'a Tensor,
    /// act `[rows, cols]`, not `x`.
    pub out: &'a Tensor,
    /// Rows to norm.
    pub rows: usize,
    /// Width of a row.
    pub cols: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl RmsNorm<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "rms_norm";
        is(OP, "x", self.x, DType::F32)?;
        is(OP, "weight", self.weight, DType::F32)?;
        float(OP, "out", self.out)?;
        holds(OP, "x", self.x, &[self.rows, self.cols])?;
        holds(OP, "weight", self.weight, &[self.cols])?;
        apart(OP, &[("out", self.out)], &[("x", self.x), ("weight", self.weight)])?;
        holds(OP, "out", self.out, &[self.rows, self.cols])
    }
}

/// `y[r, o] = sum_i x[r, i] * w[o, i] + bias[o]`, or `y += ...` (bias included) with `accumulate`.
#[derive(Debug)]
pub struct Linear<'a> {
    /// act `[rows, inputs]`.
    pub x: &'a Tensor,
    /// Weight dtype `[outputs, inputs]`; not written by the op right before, which may still run when they are read.
    pub w: &'a Tensor,
    /// f32 `[outputs]`.
    pub bias: Option<&'a Tensor>,
    /// act or f32 `[rows, outputs]`; f32 when `accumulate` is set.
    pub y: &'a Tensor,
    /// Rows of `x` and `y`.
    pub rows: usize,
    /// Width of a row of `x`; a multiple of 8.
    pub inputs: usize,
    /// Width of a row of `y`.
    pub outputs: usize,
    /// Adds to `y` (the residual stream) instead of overwriting it.
    pub accumulate: bool,
}

impl Linear<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "linear";
        float(OP, "x", self.x)?;
        float(OP, "w", self.w)?;
        float(OP, "y", self.y)?;
        if self.accumulate {
            is(OP, "y", self.y, DType::F32)?;
        }
        holds(OP, "x", self.x, &[self.rows, self.inputs])?;
        holds(OP, "w", self.w, &[self.outputs, self.inputs])?;
        holds(OP, "y", self.y, &[self.rows, self.outputs])?;
        apart(OP, &[("y", self.y)], &[("x", self.x), ("w", self.w)])?;
        if let Some(b) = self.bias {
            is(OP, "bias", b, DType::F32)?;
            holds(OP, "bias", b, &[self.outputs])?;
            apart(OP, &[("y", self.y)], &[("bias", b)])?;
        }
        ensure(OP, self.inputs.is_multiple_of(8), || {
            format!("inputs = {} must be a multiple of 8", self.inputs)
        })
    }
}

/// What [`Backend::linear_gated`](crate::backend::Backend::linear_gated) takes: a product without bias whose result is
/// what `swiglu` reads, and an output apart from all that the product reads.
pub(crate) fn check_gated(linear: &Linear<'_>, swiglu: &SwiGlu<'_>) -> Result<()> {
    const OP: &str = "linear_gated";
    linear.check()?;
    swiglu.check()?;
    ensure(OP, linear.bias.is_none() && !linear.accumulate, || {
        "neither a bias nor a sum is taken".into()
    })?;
    ensure(OP, linear.y.same_place(swiglu.x) && linear.y.dtype() == swiglu.x.dtype(), || {
        "y of the product is not x of swiglu".into()
    })?;
    let sizes = [(linear.rows, linear.outputs), (swiglu.rows, 2 * swiglu.ffn)];
    ensure(OP, sizes[0] == sizes[1], || format!("rows and widths {sizes:?} differ"))?;
    apart(OP, &[("out", swiglu.out)], &[("x", linear.x), ("w", linear.w)])
}

/// RMS norm of each head's vector before the rotation (Qwen3).
#[derive(Debug)]
pub struct QkNorm<'a> {
    /// f32 `[heads, head_dim]`, one row per head of the call.
    pub weight: &'a Tensor,
    /// Added to the mean square.
    pub eps: f32,
}

/// Rotary embedding on interleaved pairs.
///
/// For head `h`, pair `p` (dimensions `2p`, `2p+1`), position `t = positions[r]` and angle
/// `a = t * inv_freq[h / heads_per_freq, p]`:
/// `out[2p] = x[2p] cos a - x[2p+1] sin a`, `out[2p+1] = x[2p+1] cos a + x[2p] sin a`.
/// The frequency table has one row per KV head because sorted keys order the pairs of each KV head
/// differently. The angle is the f32 product of position and frequency (position exact up to 2^24); its sine and
/// cosine are good to f32 accuracy at any such angle, so a device whose own sine is not must reduce it first.
#[derive(Debug)]
pub struct Rope<'a> {
    /// act, row `r`, head `h`, dimension `i` at `r * x_stride + h * head_dim + i`.
    pub x: &'a Tensor,
    /// Elements between rows of `x`.
    pub x_stride: usize,
    /// u32 `[rows]`; not written by the op right before, which may still run when `rope_append` reads them.
    pub positions: &'a Tensor,
    /// f32 `[heads / heads_per_freq, head_dim / 2]`; not written by the op right before either.
    pub inv_freq: &'a Tensor,
    /// Query heads per frequency row (the GQA group size for queries, 1 for keys).
    pub heads_per_freq: usize,
    /// Norm applied to each head first.
    pub norm: Option<QkNorm<'a>>,
    /// Factor of the result (LongRoPE's attention factor); 1 for none.
    pub factor: f32,
    /// act `[rows, heads, head_dim]`, not `x`.
    pub out: &'a Tensor,
    /// Rows of the batch.
    pub rows: usize,
    /// Heads of a row; a multiple of `heads_per_freq`.
    pub heads: usize,
    /// Dimensions of a head; even.
    pub head_dim: usize,
}

impl Rope<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "rope";
        float(OP, "x", self.x)?;
        is(OP, "out", self.out, self.x.dtype())?;
        is(OP, "positions", self.positions, DType::U32)?;
        is(OP, "inv_freq", self.inv_freq, DType::F32)?;
        ensure(OP, self.head_dim.is_multiple_of(2) && self.head_dim > 0, || {
            format!("head_dim = {} must be even", self.head_dim)
        })?;
        ensure(
            OP,
            self.heads_per_freq > 0 && self.heads.is_multiple_of(self.heads_per_freq),
            || format!("{} heads, {} per frequency row", self.heads, self.heads_per_freq),
        )?;
        holds_rows(OP, "x", self.x, self.rows, self.x_stride, &[self.heads, self.head_dim])?;
        holds(OP, "positions", self.positions, &[self.rows])?;
        let freqs = [self.heads / self.heads_per_freq, self.head_dim / 2];
        holds(OP, "inv_freq", self.inv_freq, &freqs)?;
        let out = [("out", self.out)];
        if let Some(n) = &self.norm {
            is(OP, "norm weight", n.weight, DType::F32)?;
            holds(OP, "norm weight", n.weight, &[self.heads, self.head_dim])?;
            apart(OP, &out, &[("norm weight", n.weight)])?;
        }
        let ins = [("x", self.x), ("positions", self.positions), ("inv_freq", self.inv_freq)];
        apart(OP, &out, &ins)?;
        holds(OP, "out", self.out, &[self.rows, self.heads, self.head_dim])
    }
}

/// `out[r, i] = silu(x[r, i]) * x[r, ffn + i]` with `silu(z) = z / (1 + exp(-z))` (gate first, then up).
#[derive(Debug)]
pub struct SwiGlu<'a> {
    /// act `[rows, 2 * ffn]`.
    pub x: &'a Tensor,
    /// act `[rows, ffn]`, not `x`.
    pub out: &'a Tensor,
    /// Rows of `x` and `out`.
    pub rows: usize,
    /// Width of the MLP.
    pub ffn: usize,
}

impl SwiGlu<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "swiglu";
        float(OP, "x", self.x)?;
        is(OP, "out", self.out, self.x.dtype())?;
        holds(OP, "x", self.x, &[self.rows, 2, self.ffn])?;
        apart(OP, &[("out", self.out)], &[("x", self.x)])?;
        holds(OP, "out", self.out, &[self.rows, self.ffn])
    }
}
