//! What an engine takes of a device: tokens, sequences, pages, dtypes.

use super::EngineError;
use super::builder::EngineBuilder;
use crate::backend::{Backend, DType, PAGE, Topology};
use crate::kv::{KvShape, pages_for};
use crate::model::{Checkpoint, DecoderLimits, ModelConfig, Quant, Weight};

/// Refuses a model that memory has no room for. Memory of the host is given page by page as it is written to, so no
/// allocation fails: the system would end the program while it loads. `LONGSIGHT_MEMORY_CHECK=off` lets it try, where
/// there is swap or the cache will not be filled.
pub(super) fn check_memory(
    b: &dyn Backend,
    c: &ModelConfig,
    dtype: DType,
    kv: &KvShape,
) -> Result<(), EngineError> {
    // A GPU's driver refuses what does not fit; one with the host's memory counts cached files as used, so that its number says
    // too little.
    let lazy = b.caps().topology == Topology::Unified && b.name() != "cuda";
    let off = std::env::var("LONGSIGHT_MEMORY_CHECK").is_ok_and(|v| v == "off");
    let weights = c.parameters().saturating_mul(dtype.bytes() as u64);
    match b.free_memory().filter(|_| lazy && !off) {
        Some(free) => fits(weights, kv, free),
        None => Ok(()),
    }
}

fn fits(weights: u64, kv: &KvShape, free: u64) -> Result<(), EngineError> {
    let (cache, tokens) = (kv.bytes(), kv.n_pages.saturating_mul(PAGE));
    match weights.saturating_add(cache) <= free {
        true => Ok(()),
        false => Err(EngineError::TooLarge { weights, tokens, cache, free }),
    }
}

impl EngineBuilder<'_> {
    /// Sizes of the decoder, and the pages of the KV cache.
    pub(super) fn limits(
        &self,
        c: &ModelConfig,
        b: &dyn Backend,
    ) -> Result<(DecoderLimits, usize), EngineError> {
        let context = self.context.unwrap_or(c.max_context.min(32768));
        if context == 0 || context > c.max_context {
            return Err(EngineError::BadContext { context, most: c.max_context });
        }
        let seqs = self.sequences;
        let chunk = self.chunk.unwrap_or(b.caps().prompt_rows);
        if seqs == 0 || chunk == 0 || self.kv_tokens == Some(0) {
            return Err(EngineError::BadOption(
                "give at least one sequence, one token a step and one token of KV cache".into(),
            ));
        }
        // Page numbers are u32; this also keeps every product of sizes below far from wrapping.
        let pages = |tokens: usize, n: usize| {
            let pages = pages_for(tokens).checked_mul(n).filter(|&p| u32::try_from(p).is_ok());
            pages.ok_or_else(|| {
                EngineError::BadOption(format!(
                    "a KV cache for {n} x {tokens} tokens: more than {} pages of {PAGE} tokens",
                    u32::MAX
                ))
            })
        };
        let all = pages(context, seqs)?;
        let n_pages = self.kv_tokens.map_or(Ok(all), |tokens| pages(tokens, 1))?;
        let context = context.min(self.kv_tokens.unwrap_or(context));
        Ok((DecoderLimits { rows: chunk.min(context) + seqs, seqs, context }, n_pages))
    }

    /// Dtype of the weights: as asked for, or what suits checkpoint and device.
    pub(super) fn weight_dtype(
        &self,
        b: &dyn Backend,
        c: &Checkpoint,
    ) -> Result<DType, EngineError> {
        let stored_bf16 = matches!(c.quant(Weight::Embed)?, Quant::BF16);
        let dtype = self.dtype.unwrap_or(if stored_bf16 || b.name() == "cuda" {
            DType::BF16
        } else {
            DType::F16
        });
        for d in [Some(dtype), self.kv_dtype].into_iter().flatten() {
            if !b.caps().storage.contains(&d) {
                let known: Vec<_> = b.caps().storage.iter().map(|d| d.name()).collect();
                return Err(EngineError::BadOption(format!(
                    "{} does not store {d}; use one of {}",
                    b.caps().device,
                    known.join(", ")
                )));
            }
        }
        Ok(dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_and_cache_must_fit_together() {
        // Llama 3.1 8B in 16 bits with 16,384 tokens: 16.1 GB and 2.1 GB.
        let kv = KvShape {
            n_layers: 32,
            kv_heads: 8,
            head_dim: 128,
            lead: 128,
            dtype: DType::BF16,
            n_pages: 256,
            slots: 1,
            int8_dims: 0,
            key_stats: false,
            value_stats: false,
        };
        assert_eq!(kv.bytes(), 2 << 30);
        let int8 = KvShape { int8_dims: 32, ..kv };
        assert_eq!(int8.bytes(), (2 << 30) + 32 * 8 * 16384 * (32 + 4));
        let weights = 16_060_000_000;
        let need = weights + kv.bytes();
        assert!(fits(weights, &kv, need).is_ok());
        let said = fits(weights, &kv, need - 1).unwrap_err().to_string();
        for part in ["16.1 GB", "16384 tokens 2.1 GB", "18.2 GB of memory are free"] {
            assert!(said.contains(part), "{said}");
        }
    }
}
