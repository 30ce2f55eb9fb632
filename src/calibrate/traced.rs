//! A text as the layers saw it.

use super::CalibrateError;
use crate::engine::{Engine, LayerTrace, TraceParts};

/// One layer of a [`TracedText`]; f32, row-major.
#[derive(Clone, Debug, Default)]
pub(crate) struct TracedLayer {
    /// `[tokens, heads, head_dim]` after the rotary embedding, in the checkpoint's rotary order.
    pub q: Vec<f32>,
    /// `[tokens, kv_heads, head_dim]`, likewise.
    pub k: Vec<f32>,
    /// `[tokens, hidden]`: what the q, k and v projections read; empty unless asked for.
    pub normed: Vec<f32>,
    /// `1 - cos(x, x + attention output)`, summed over tokens; 0 unless asked for.
    pub change: f64,
}

/// Queries and keys of every layer for one text: memory grows with tokens, not with their square.
#[derive(Clone, Debug)]
pub struct TracedText {
    /// Tokens of the text.
    pub tokens: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Per layer: its sliding window, if it has one.
    pub windows: Vec<Option<usize>>,
    pub(crate) layers: Vec<TracedLayer>,
}

/// `1 - cos(a, b)`; 0 where one of them is 0.
fn turned(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms == 0.0 { 0.0 } else { 1.0 - dot(a, b) / norms }
}

impl TracedText {
    /// Reads a text densely. `parts.residual` measures how far attention turns the residual stream,
    /// `parts.normed` keeps the inputs of the projections; queries and keys are always kept. `progress` gets the
    /// tokens read and answers whether to go on.
    ///
    /// # Errors
    /// As [`Engine::trace`]; [`CalibrateError::NotFinite`].
    pub fn read(
        engine: &mut Engine,
        tokens: &[u32],
        parts: TraceParts,
        progress: impl FnMut(usize) -> bool,
    ) -> Result<TracedText, CalibrateError> {
        let c = engine.decoder().config();
        let mut text = TracedText {
            tokens: tokens.len(),
            heads: c.n_heads,
            kv_heads: c.n_kv_heads,
            head_dim: c.head_dim,
            hidden: c.hidden,
            windows: c.windows.clone(),
            layers: vec![TracedLayer::default(); c.n_layers],
        };
        let (hidden, mut bad) = (c.hidden, None);
        let each = |chunk: LayerTrace| {
            let Some(layer) = text.layers.get_mut(chunk.layer) else { return };
            let rows = chunk.x.chunks_exact(hidden).zip(chunk.attended.chunks_exact(hidden));
            layer.change += rows.map(|(a, b)| turned(a, b)).sum::<f64>();
            let finite = |x: &[f32]| x.iter().all(|v| v.is_finite());
            if !(finite(&chunk.q) && finite(&chunk.k) && layer.change.is_finite()) {
                bad.get_or_insert(chunk.layer);
            }
            layer.q.extend(chunk.q);
            layer.k.extend(chunk.k);
            layer.normed.extend(chunk.normed);
        };
        engine.trace(tokens, TraceParts { heads: true, ..parts }, each, progress)?;
        bad.map_or(Ok(text), |layer| Err(CalibrateError::NotFinite(layer)))
    }

    /// Query heads that share a KV head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// A text of random queries and keys, for tests of what is computed from them.
    #[cfg(test)]
    pub(crate) fn random(seed: u64, layers: usize, tokens: usize) -> TracedText {
        use rand::{RngExt, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let (heads, kv_heads, head_dim, hidden) = (4, 2, 8, 12);
        let mut numbers = |n: usize| (0..n).map(|_| rng.random_range(-1.5f32..1.5)).collect();
        let mut layer = || TracedLayer {
            q: numbers(tokens * heads * head_dim),
            k: numbers(tokens * kv_heads * head_dim),
            normed: numbers(tokens * hidden),
            change: 0.0,
        };
        let layers: Vec<_> = (0..layers).map(|_| layer()).collect();
        let windows = vec![None; layers.len()];
        TracedText { tokens, heads, kv_heads, head_dim, hidden, windows, layers }
    }
}

#[cfg(test)]
mod tests {
    use super::turned;

    #[test]
    fn a_turn_is_one_minus_the_cosine() {
        assert_eq!(turned(&[1.0, 0.0], &[2.0, 0.0]), 0.0);
        assert_eq!(turned(&[1.0, 0.0], &[0.0, 3.0]), 1.0);
        assert_eq!(turned(&[0.0, 0.0], &[0.0, 3.0]), 0.0);
    }
}
