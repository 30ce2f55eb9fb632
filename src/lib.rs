//! Long-context language models with sparse attention over a tiered KV cache.

pub mod model;
