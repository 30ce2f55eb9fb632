//! A model as plans see it.

use super::config::ModelConfig;
use crate::select::{KvReads, ModelShape};

impl ModelConfig {
    /// What a plan must know of the model whose files have this fingerprint.
    pub fn plan_shape<'a>(&'a self, fingerprint: &'a str) -> ModelShape<'a> {
        ModelShape {
            model: fingerprint,
            windows: &self.windows,
            heads: self.n_heads,
            kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            importance: self.importance,
        }
    }

    /// What attention over a cache of `elem` bytes a number reads.
    pub fn kv_reads(&self, elem: usize) -> KvReads<'_> {
        KvReads {
            windows: &self.windows,
            heads: self.n_heads,
            kv_heads: self.n_kv_heads,
            head_dim: self.kv_dim(),
            elem,
        }
    }
}
