//! What an engine takes of a device: tokens, sequences, pages, dtypes.

use super::EngineError;
use super::builder::EngineBuilder;
use crate::backend::{Backend, DType, PAGE};
use crate::kv::pages_for;
use crate::model::{Checkpoint, DecoderLimits, ModelConfig, Quant, Weight};

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
