//! The rotary embedding in a checkpoint's order: dimension `i` rotates with `i + head_dim / 2`.

/// Cosines and sines of every position, `[positions, head_dim / 2]`.
pub(super) struct Rotary {
    half: usize,
    angles: Vec<(f32, f32)>,
}

impl Rotary {
    /// For positions `0..tokens`; `inv_freq` in radians per position, one for each pair.
    pub fn new(inv_freq: &[f32], tokens: usize) -> Self {
        let angle = |i: usize| {
            let (position, pair) = (i / inv_freq.len(), i % inv_freq.len());
            let (sin, cos) = (position as f64 * f64::from(inv_freq[pair])).sin_cos();
            (cos as f32, sin as f32)
        };
        Rotary { half: inv_freq.len(), angles: (0..tokens * inv_freq.len()).map(angle).collect() }
    }

    /// Rotates one head's vector at a position.
    pub fn turn(&self, position: usize, x: &mut [f32]) {
        self.apply(position, x, 1.0);
    }

    /// The transpose of [`Rotary::turn`], which is its inverse.
    pub fn turn_back(&self, position: usize, x: &mut [f32]) {
        self.apply(position, x, -1.0);
    }

    fn apply(&self, position: usize, x: &mut [f32], sign: f32) {
        let (a, b) = x.split_at_mut(self.half);
        let angles = &self.angles[position * self.half..][..self.half];
        for ((a, b), &(cos, sin)) in a.iter_mut().zip(b).zip(angles) {
            let sin = sign * sin;
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_rotate_together_and_back() {
        let r = Rotary::new(&[std::f32::consts::FRAC_PI_2, 0.1], 3);
        let x = [1.0, 2.0, 3.0, 4.0];
        let mut y = x;
        r.turn(1, &mut y);
        assert!((y[0] + 3.0).abs() < 1e-6 && (y[2] - 1.0).abs() < 1e-6, "{y:?}");
        r.turn_back(1, &mut y);
        assert!(x.iter().zip(y).all(|(x, y)| (x - y).abs() < 1e-6), "{y:?}");
        r.turn(0, &mut y);
        assert!(x.iter().zip(y).all(|(x, y)| (x - y).abs() < 1e-6), "{y:?}");
    }
}
