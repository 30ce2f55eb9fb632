//! Content importance (NOSA): heads that are wider on the device than in the checkpoint, and what fills them.

use std::path::Path;

use super::config::{ModelConfig, UNIT};
use super::error::{ModelError, Result};
use super::workspace::Workspace;
use crate::backend::{self, Backend, ContentBias, MAX_HEAD_DIM, Tensor};

/// Dimensions of keys and queries that hold the importance: two, up to what head dimensions are multiples of.
const BIAS_DIMS: usize = UNIT;

impl ModelConfig {
    /// Dimensions of a head on the device, those of the content importance included. Its keys, queries and values are
    /// that wide, and attention divides by the root of it.
    pub fn kv_dim(&self) -> usize {
        self.head_dim + if self.importance.is_some() { BIAS_DIMS } else { 0 }
    }

    /// Factor of queries that gives logits the scale of the model's own head dimension.
    pub(super) fn query_factor(&self) -> f32 {
        (self.kv_dim() as f64 / self.head_dim as f64).sqrt() as f32
    }

    /// Parameters of a layer that make the importance.
    pub(super) fn importance_parameters(&self) -> usize {
        match self.importance {
            Some(_) => self.n_kv_heads * (self.n_kv_heads * self.head_dim + 1),
            None => 0,
        }
    }

    /// The importance can be computed here; `path` is the file that messages name.
    pub(super) fn check_importance(&self, path: &Path) -> Result<()> {
        let Some(blocks) = &self.importance else { return Ok(()) };
        if self.qkv_bias || self.qk_norm {
            let what = "content importance beside biases or norms of heads";
            return Err(ModelError::unsupported(path, what));
        }
        if self.kv_dim() > MAX_HEAD_DIM {
            let (d, most) = (self.head_dim, MAX_HEAD_DIM - BIAS_DIMS);
            let what =
                format!("a head dimension of {d} with content importance (up to {most} run here)");
            return Err(ModelError::unsupported(path, what));
        }
        blocks.fault().map_or(Ok(()), |what| Err(ModelError::corrupt(path, what)))
    }
}

/// What the importance is made of, on the device.
#[derive(Debug)]
pub struct ImportanceWeights {
    /// f32 `[kv_heads, kv_heads, kv_dim]`.
    pub delta: Tensor,
    /// f32 `[kv_heads]`.
    pub a: Tensor,
}

impl ImportanceWeights {
    /// Writes it into the projected and rotated queries and keys of a step's first `rows`.
    pub(super) fn write(
        &self,
        b: &dyn Backend,
        c: &ModelConfig,
        ws: &Workspace,
        rows: usize,
    ) -> backend::Result<()> {
        let (heads, kv_heads, head_dim) = (c.n_heads, c.n_kv_heads, c.kv_dim());
        b.content_bias(&ContentBias {
            v: &ws.qkv_from((heads + kv_heads) * head_dim),
            v_stride: (heads + 2 * kv_heads) * head_dim,
            delta: &self.delta,
            a: &self.a,
            q: &ws.q,
            k: &ws.k,
            rows,
            heads,
            kv_heads,
            head_dim,
            at: c.head_dim,
        })
    }
}
