//! The key order of a model, measured once on a short built-in text.

use super::EngineError;
use crate::backend::{DType, PAGE};
use crate::files::hex;
use crate::kv::{KvCache, KvShape, PageTable, pages_for};
use crate::model::{
    Attention, Decoder, DecoderLimits, KeyOrder, ModelConfig, Observer, OrderSource, RopeScaling,
    StepSeq, Tokenizer, pair_energies,
};
use crate::select::{Given, Plan};
use sha2::{Digest, Sha256};

/// The opening of Sense and Sensibility (public domain).
const TEXT: &str = include_str!("../../assets/calibration.txt");
/// Tokens read at most, and tokens per step.
const TOKENS: usize = 2048;
const CHUNK: usize = 512;
/// To be raised when the measurement changes, so that orders saved before are measured anew.
const VERSION: u32 = 1;

/// What the order of a model is measured on: the same for every engine, whatever its own sizes are.
pub fn order_source(c: &ModelConfig, fingerprint: &str) -> OrderSource {
    let hash = Sha256::digest(TEXT);
    OrderSource {
        model: fingerprint.into(),
        version: VERSION,
        text: hex(&hash[..8]),
        tokens: TOKENS.min(c.max_context),
        beyond: matches!(c.rope_scaling, RopeScaling::Long { beyond: true, .. }),
    }
}

/// Sizes of the decoder that measures.
pub fn order_limits(source: &OrderSource) -> DecoderLimits {
    DecoderLimits {
        rows: CHUNK.min(source.tokens),
        seqs: 1,
        context: source.tokens.next_multiple_of(PAGE),
    }
}

/// Reads the built-in text with a decoder of [`order_limits`] (in checkpoint order) and sorts each KV head's pairs
/// by key energy.
pub fn calibrated_order(
    decoder: &mut Decoder,
    tokenizer: &Tokenizer,
    kv_dtype: DType,
    source: OrderSource,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<KeyOrder, EngineError> {
    let c = decoder.config().clone();
    let cache = read_text(decoder, tokenizer, kv_dtype, &source, None, progress)?;
    let b = decoder.backend();
    let mut energies = (0..c.n_layers)
        .filter_map(|l| cache.stats(l))
        .map(|stats| pair_energies(&**b, stats, 0, c.n_kv_heads, c.kv_dim()))
        .collect::<Result<Vec<_>, _>>()?;
    // Those of the content importance, which come last, are no pairs.
    energies.iter_mut().flatten().for_each(|head| head.truncate(c.head_dim / 2));
    Ok(KeyOrder::from_energies(source, &energies))
}

/// Reads the built-in text with a decoder of [`order_limits`], with somebody who looks into the layers where wanted.
/// Returns the cache, which holds statistics of its keys.
pub fn read_text(
    decoder: &mut Decoder,
    tokenizer: &Tokenizer,
    kv_dtype: DType,
    source: &OrderSource,
    mut observer: Option<&mut Observer<'_>>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<KvCache, EngineError> {
    let c = decoder.config().clone();
    let limits = decoder.limits();
    let mut tokens = tokenizer.encode(TEXT, tokenizer.adds_bos())?;
    tokens.truncate(source.tokens);
    let b = decoder.backend().clone();
    let mut cache = KvCache::new(
        &*b,
        KvShape {
            n_layers: c.n_layers,
            kv_heads: c.n_kv_heads,
            head_dim: c.kv_dim(),
            lead: c.kv_dim(),
            dtype: kv_dtype,
            n_pages: pages_for(tokens.len()).max(1),
            slots: limits.seqs,
            int8_dims: 0,
            key_stats: true,
            value_stats: false,
        },
    )?;
    let shape = decoder.layer_shape(0, kv_dtype);
    let mut attention = Attention::new(&*b, Plan::dense(c.n_layers), shape, Given::default())?;
    let mut table = PageTable::default();
    let all = tokens.len() as u64;
    for chunk in tokens.chunks(limits.rows) {
        progress(table.tokens() as u64, all);
        let cached = table.tokens();
        cache.extend(&*b, &mut table, chunk.len())??;
        let seq = StepSeq { tokens: chunk, cached, pages: table.pages(), slot: 0, decode: None };
        let observer = observer.as_deref_mut();
        decoder.forward_observed(&[seq], &cache, &mut attention, observer)?;
    }
    progress(all, all);
    Ok(cache)
}
