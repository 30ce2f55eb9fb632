//! How well one layer's token lists serve another.

/// For layers a <= b and KV heads: the share of head `h` of layer b's mass that the list of head `h1` of layer a
/// holds, relative to b's own list. Layers are counted among those that were measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Similarity {
    layers: usize,
    kv_heads: usize,
    values: Vec<f64>,
}

/// Number of the layer pair (a, b), a <= b.
pub(super) fn pair(a: usize, b: usize) -> usize {
    b * (b + 1) / 2 + a
}

/// Values of a similarity of `layers` layers.
pub(super) fn len(layers: usize, kv_heads: usize) -> usize {
    layers * (layers + 1) / 2 * kv_heads * kv_heads
}

impl Similarity {
    /// `values`: `[pairs, kv_heads of b, kv_heads of a]`, pairs as (0, 0), (0, 1), (1, 1), (0, 2) ...; `None` when
    /// there are not as many.
    pub fn new(layers: usize, kv_heads: usize, values: Vec<f64>) -> Option<Self> {
        (values.len() == len(layers, kv_heads)).then_some(Similarity { layers, kv_heads, values })
    }

    /// Layers measured.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// SIM\[a, b, h, h1\] of Kascade's calibration, for a <= b.
    pub fn at(&self, a: usize, b: usize, h: usize, h1: usize) -> f64 {
        self.values[(pair(a, b) * self.kv_heads + h) * self.kv_heads + h1]
    }

    /// For every KV head of layer b the head of layer a whose list serves it best, ties to the smaller head.
    pub fn head_map(&self, a: usize, b: usize) -> Vec<u8> {
        let best = |h: usize| {
            let mut best = 0;
            for h1 in 1..self.kv_heads {
                if self.at(a, b, h, h1) > self.at(a, b, h, best) {
                    best = h1;
                }
            }
            best as u8
        };
        (0..self.kv_heads).map(best).collect()
    }

    /// `S[a][b] = w_b mean_h max_h1 SIM[a, b, h, h1]`, 0 below the diagonal; `weights` (per layer) default to 1.
    pub fn layer_matrix(&self, weights: Option<&[f64]>) -> Vec<Vec<f64>> {
        let mut s = vec![vec![0.0; self.layers]; self.layers];
        for b in 0..self.layers {
            let weight = weights.and_then(|w| w.get(b)).copied().unwrap_or(1.0);
            for (a, row) in s.iter_mut().enumerate().take(b + 1) {
                let map = self.head_map(a, b);
                let best = map.iter().enumerate().map(|(h, &h1)| self.at(a, b, h, usize::from(h1)));
                row[b] = weight * best.sum::<f64>() / self.kv_heads as f64;
            }
        }
        s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_take_the_list_that_serves_them_best() {
        let mut values = vec![1.0; len(2, 2)];
        // Pair (0, 1): head 0 is served best by head 1, head 1 by both.
        values[4..8].copy_from_slice(&[0.5, 0.75, 0.25, 0.25]);
        let s = Similarity::new(2, 2, values).unwrap();
        assert_eq!(s.head_map(0, 1), [1, 0]);
        assert_eq!(s.at(0, 1, 0, 1), 0.75);
        assert_eq!(s.layer_matrix(None), [[1.0, 0.5], [0.0, 1.0]]);
        assert_eq!(s.layer_matrix(Some(&[2.0, 4.0])), [[2.0, 2.0], [0.0, 4.0]]);
        assert!(Similarity::new(2, 2, vec![1.0]).is_none());
    }
}
