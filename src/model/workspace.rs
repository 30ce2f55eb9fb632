//! Activation buffers of a step, and buffers that grow with need.

use super::ModelConfig;
use crate::backend::{Backend, DType, Result, Tensor};

/// Rows of logits computed at once.
pub const LOGIT_ROWS: usize = 64;

/// Activations for up to `rows` rows; `kv_dim`: [`ModelConfig::kv_dim`].
#[derive(Debug)]
pub struct Workspace {
    /// f32 `[rows, hidden]`, the residual stream.
    pub x: Tensor,
    /// act `[rows, hidden]`.
    pub normed: Tensor,
    /// act `[rows, (heads + 2 kv_heads) * kv_dim]`.
    pub qkv: Tensor,
    /// act `[rows, heads, kv_dim]`.
    pub q: Tensor,
    /// act `[rows, kv_heads, kv_dim]`.
    pub k: Tensor,
    /// act `[rows, heads, kv_dim]`.
    pub attn: Tensor,
    /// f32 `[rows, heads]`.
    pub lse: Tensor,
    /// act `[rows, 2 * ffn]`.
    pub gate_up: Tensor,
    /// act `[rows, ffn]`.
    pub ffn: Tensor,
    /// u32 `[LOGIT_ROWS]`.
    pub logit_rows: Tensor,
    /// f32 `[LOGIT_ROWS, hidden]`.
    pub picked: Tensor,
    /// act `[LOGIT_ROWS, hidden]`.
    pub picked_normed: Tensor,
    /// f32 `[LOGIT_ROWS, vocab]`.
    pub logits: Tensor,
}

impl Workspace {
    pub fn new(b: &dyn Backend, c: &ModelConfig, act: DType, rows: usize) -> Result<Self> {
        let a = |dtype, n: usize, width: usize| b.alloc(dtype, n * width, "activations");
        let (hd, f32) = (c.kv_dim(), DType::F32);
        Ok(Workspace {
            x: a(f32, rows, c.hidden)?,
            normed: a(act, rows, c.hidden)?,
            qkv: a(act, rows, (c.n_heads + 2 * c.n_kv_heads) * hd)?,
            q: a(act, rows, c.n_heads * hd)?,
            k: a(act, rows, c.n_kv_heads * hd)?,
            attn: a(act, rows, c.n_heads * hd)?,
            lse: a(f32, rows, c.n_heads)?,
            gate_up: a(act, rows, 2 * c.ffn)?,
            ffn: a(act, rows, c.ffn)?,
            logit_rows: a(DType::U32, LOGIT_ROWS, 1)?,
            picked: a(f32, LOGIT_ROWS, c.hidden)?,
            picked_normed: a(act, LOGIT_ROWS, c.hidden)?,
            logits: a(f32, LOGIT_ROWS, c.vocab)?,
        })
    }
}

impl Workspace {
    /// [`Workspace::qkv`] from an element of its first row on, for rows of a part of it.
    pub fn qkv_from(&self, start: usize) -> Tensor {
        self.qkv.slice(start, self.qkv.len() - start)
    }
}

/// A buffer that is replaced by a larger one when a step needs more.
#[derive(Debug)]
pub struct Growing {
    dtype: DType,
    what: &'static str,
    tensor: Option<Tensor>,
}

impl Growing {
    pub fn new(dtype: DType, what: &'static str) -> Self {
        Growing { dtype, what, tensor: None }
    }

    /// At least `len` elements.
    pub fn at_least(&mut self, b: &dyn Backend, len: usize) -> Result<Tensor> {
        if let Some(t) = self.tensor.as_ref().filter(|t| t.len() >= len) {
            return Ok(t.clone());
        }
        // Steps before this one may still read the old buffer; tensors keep it alive until they are done.
        let t = b.alloc(self.dtype, len.next_power_of_two(), self.what)?;
        self.tensor = Some(t.clone());
        Ok(t)
    }
}
