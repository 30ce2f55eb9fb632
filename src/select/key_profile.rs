//! What is known of a model's queries and keys before it runs.

/// Per layer and KV head: how much each key dimension matters, and the principal components of the keys. Measured
/// once per model on a text, on queries and keys after the rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyProfile {
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// `[layers, kv_heads, head_dim]`: the sum over the query heads of the group of the mean of `|q_i k_i|`, query
    /// and key at the same position (Double Sparsity, arXiv 2408.07092).
    pub importance: Vec<f32>,
    /// `[layers, kv_heads, head_dim, head_dim]`: orthonormal directions, one a row, by falling variance of the keys.
    pub basis: Vec<f32>,
}

impl KeyProfile {
    /// Of a model about which nothing is known: every dimension matters alike, and is a direction.
    pub fn neutral(layers: usize, kv_heads: usize, head_dim: usize) -> Self {
        let one = |i: usize| if i / head_dim == i % head_dim { 1.0 } else { 0.0 };
        let head = head_dim * head_dim;
        KeyProfile {
            kv_heads,
            head_dim,
            importance: vec![1.0; layers * kv_heads * head_dim],
            basis: (0..layers * kv_heads * head).map(|i| one(i % head)).collect(),
        }
    }

    /// The arrays have the sizes that a model of so many layers needs, and hold numbers.
    pub fn fits(&self, layers: usize) -> bool {
        let heads = layers * self.kv_heads;
        self.importance.len() == heads * self.head_dim
            && self.basis.len() == heads * self.head_dim * self.head_dim
            && self.importance.iter().chain(&self.basis).all(|x| x.is_finite())
    }

    /// The arrays reach to layer `layer`.
    pub(super) fn fits_layer(&self, layer: usize) -> bool {
        let heads = (layer + 1) * self.kv_heads;
        self.importance.len() >= heads * self.head_dim
            && self.basis.len() >= heads * self.head_dim * self.head_dim
    }

    /// `[kv_heads, head_dim]` of a layer.
    pub fn importance(&self, layer: usize) -> &[f32] {
        let n = self.kv_heads * self.head_dim;
        &self.importance[layer * n..][..n]
    }

    /// `[kv_heads, head_dim, head_dim]` of a layer.
    pub fn basis(&self, layer: usize) -> &[f32] {
        let n = self.kv_heads * self.head_dim * self.head_dim;
        &self.basis[layer * n..][..n]
    }

    /// The same with dimension `i` of each KV head where `source(layer, kv_head, i)` was.
    #[must_use]
    pub fn reordered(&self, source: impl Fn(usize, usize, usize) -> usize) -> Self {
        let (d, hkv) = (self.head_dim, self.kv_heads);
        // `row`: consecutive rows of a head.
        let rows = |x: &[f32], per_head: usize| -> Vec<f32> {
            let row = |(r, row): (usize, &[f32])| -> Vec<f32> {
                let head = r / per_head;
                (0..d).map(|i| row[source(head / hkv, head % hkv, i)]).collect()
            };
            x.chunks_exact(d).enumerate().flat_map(row).collect()
        };
        KeyProfile { importance: rows(&self.importance, 1), basis: rows(&self.basis, d), ..*self }
    }

    /// The same for heads of `wide` dimensions: those that are more do not matter, and are directions of their own
    /// behind all others.
    #[must_use]
    pub fn widened(&self, wide: usize) -> Self {
        let d = self.head_dim;
        if wide <= d {
            return self.clone();
        }
        let row = |x: &[f32]| x.iter().copied().chain(vec![0.0; wide - d]).collect::<Vec<f32>>();
        let unit = |i: usize| (0..wide).map(move |j| if i == j { 1.0 } else { 0.0 });
        let head = |h: &[f32]| {
            let own = h.chunks_exact(d).flat_map(row);
            own.chain((d..wide).flat_map(unit)).collect::<Vec<f32>>()
        };
        KeyProfile {
            kv_heads: self.kv_heads,
            head_dim: wide,
            importance: self.importance.chunks_exact(d).flat_map(row).collect(),
            basis: self.basis.chunks_exact(d * d).flat_map(head).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reordering_moves_dimensions_and_keeps_directions() {
        let p = KeyProfile {
            kv_heads: 2,
            head_dim: 2,
            importance: vec![1.0, 2.0, 3.0, 4.0],
            basis: vec![0.6, 0.8, -0.8, 0.6, 1.0, 0.0, 0.0, 1.0],
        };
        assert!(p.fits(1) && !p.fits(2));
        // The second head is turned round.
        let q = p.reordered(|_, h, i| if h == 1 { 1 - i } else { i });
        assert_eq!(q.importance, [1.0, 2.0, 4.0, 3.0]);
        assert_eq!(q.basis, [0.6, 0.8, -0.8, 0.6, 0.0, 1.0, 1.0, 0.0]);
        assert_eq!(KeyProfile::neutral(1, 2, 2).basis(0)[4..], [1.0, 0.0, 0.0, 1.0]);
        // What is more comes last.
        let wide = p.widened(3);
        assert!(wide.fits(1) && p.widened(2) == p);
        assert_eq!(wide.importance, [1.0, 2.0, 0.0, 3.0, 4.0, 0.0]);
        assert_eq!(wide.basis[..9], [0.6, 0.8, 0.0, -0.8, 0.6, 0.0, 0.0, 0.0, 1.0]);
        assert_eq!(
            KeyProfile::neutral(2, 3, 2).widened(4).basis,
            KeyProfile::neutral(2, 3, 4).basis
        );
    }
}
