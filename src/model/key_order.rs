//! The order of rotary pairs inside each KV head.
//!
//! A checkpoint rotates dimension `i` with `i + d/2`. The engine stores pair `p` of the order at dimensions `2p` and
//! `2p + 1`, pairs with the most key energy first (sorted keys). The permutation is applied to the rows of the q and
//! k projections, their biases and norms, and to the rotary frequencies, so q . k is unchanged.

use super::ModelConfig;
use crate::backend::{Backend, Result, Tensor, key_stats_len};
use crate::files::write_cached;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What an order was measured on: an order is used again only where all of it is the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderSource {
    /// Fingerprint of the model.
    pub model: String,
    /// Version of the measurement.
    pub version: u32,
    /// Hash of the text.
    pub text: String,
    /// Tokens read at most.
    pub tokens: usize,
    /// With the rotary divisors for texts beyond the original context.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub beyond: bool,
}

/// For every layer and KV head the checkpoint's pair numbers in storage order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyOrder {
    /// What it was measured on; empty for the checkpoint's own order.
    pub source: OrderSource,
    /// `[layers][kv_heads][head_dim / 2]`.
    pub pairs: Vec<Vec<Vec<u16>>>,
}

impl KeyOrder {
    /// The checkpoint's own order.
    pub fn identity(c: &ModelConfig) -> Self {
        let head: Vec<u16> = (0..c.head_dim as u16 / 2).collect();
        KeyOrder {
            source: OrderSource::default(),
            pairs: vec![vec![head; c.n_kv_heads]; c.n_layers],
        }
    }

    /// Pairs sorted by falling energy `sum_tokens |k_pair|^2`, ties to the smaller pair.
    ///
    /// `energies`: `[layers][kv_heads][head_dim / 2]` in the checkpoint's pair order.
    pub fn from_energies(source: OrderSource, energies: &[Vec<Vec<f32>>]) -> Self {
        let sort = |e: &Vec<f32>| {
            let mut order: Vec<u16> = (0..e.len() as u16).collect();
            order.sort_by(|&a, &b| e[b as usize].total_cmp(&e[a as usize]).then(a.cmp(&b)));
            order
        };
        let pairs = energies.iter().map(|l| l.iter().map(sort).collect()).collect();
        KeyOrder { source, pairs }
    }

    /// True when every head is a permutation of the model's pairs.
    pub fn fits(&self, c: &ModelConfig) -> bool {
        let is_permutation = |h: &Vec<u16>| {
            let mut seen = vec![false; c.head_dim / 2];
            h.len() == seen.len()
                && h.iter()
                    .all(|&p| seen.get_mut(p as usize).is_some_and(|s| !std::mem::replace(s, true)))
        };
        self.pairs.len() == c.n_layers
            && self.pairs.iter().all(|l| l.len() == c.n_kv_heads && l.iter().all(is_permutation))
    }

    /// Checkpoint row of storage dimension `i` of a KV head.
    pub fn source_dim(&self, layer: usize, kv_head: usize, i: usize) -> usize {
        let head = &self.pairs[layer][kv_head];
        head[i / 2] as usize + (i % 2) * head.len()
    }

    /// Frequencies `[kv_heads, head_dim / 2]` in storage order.
    pub fn inv_freq(&self, layer: usize, base: &[f32]) -> Vec<f32> {
        self.pairs[layer].iter().flatten().map(|&p| base[p as usize]).collect()
    }

    /// Where the order of a model is kept between runs.
    pub fn cache_file(dir: &Path, fingerprint: &str) -> PathBuf {
        dir.join(format!("key-order-{fingerprint}.json"))
    }

    /// Reads a saved order; `None` when there is none that was measured as `source` says and fits the model.
    pub fn load(path: &Path, source: &OrderSource, c: &ModelConfig) -> Option<Self> {
        let order: KeyOrder = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        (order.source == *source && order.fits(c)).then_some(order)
    }

    /// Saves the order; an interrupted write leaves no partial file.
    pub fn save(&self, path: &Path) -> std::io::Result<()> {
        write_cached(path, &serde_json::to_vec(self)?)
    }
}

/// Pair energies of slot `slot` from running key statistics, in storage order: `[kv_heads][head_dim / 2]`.
pub fn pair_energies(
    b: &dyn Backend,
    stats: &Tensor,
    slot: usize,
    kv_heads: usize,
    head_dim: usize,
) -> Result<Vec<Vec<f32>>> {
    let len = key_stats_len(head_dim);
    let mut host = vec![0f32; kv_heads * len];
    b.download(&stats.slice(slot * host.len(), host.len()), bytemuck::cast_slice_mut(&mut host))?;
    // The last head_dim / 2 values of a head are the sums of squared pair norms.
    Ok(host.chunks_exact(len).map(|h| h[len - head_dim / 2..].to_vec()).collect())
}

/// Storage-order rows of a q or k weight of one layer: `rows[i]` = checkpoint row of storage row `i`.
pub fn source_rows(c: &ModelConfig, order: &KeyOrder, layer: usize, heads: usize) -> Vec<usize> {
    let per_kv = heads / c.n_kv_heads;
    (0..heads * c.head_dim)
        .map(|r| {
            let (h, i) = (r / c.head_dim, r % c.head_dim);
            h * c.head_dim + order.source_dim(layer, h / per_kv, i)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorts_by_energy_with_ties_to_the_smaller_pair() {
        let o = KeyOrder::from_energies(OrderSource::default(), &[vec![vec![1.0, 3.0, 3.0, 2.0]]]);
        assert_eq!(o.pairs[0][0], [1, 2, 3, 0]);
        assert_eq!((o.source_dim(0, 0, 0), o.source_dim(0, 0, 1)), (1, 5));
        assert_eq!(o.inv_freq(0, &[0.1, 0.2, 0.3, 0.4]), [0.2, 0.3, 0.4, 0.1]);
    }
}
