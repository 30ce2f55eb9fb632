//! AdamW with decoupled weight decay (arXiv 1711.05101), on f32 weights.

use serde::{Deserialize, Serialize};

/// Rates of the optimizer; the default is the published recipe.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// Step size; a [`Schedule`](super::Schedule) takes shares of it.
    pub rate: f32,
    /// Decay of the mean gradient and of the mean square.
    pub betas: (f32, f32),
    /// Added to the root of the mean square.
    pub eps: f32,
    /// Weight decay per unit of step size.
    pub decay: f32,
    /// Largest norm of all gradients together; larger ones are scaled down.
    pub clip: f32,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW { rate: 5e-4, betas: (0.9, 0.95), eps: 1e-6, decay: 0.01, clip: 0.5 }
    }
}

impl AdamW {
    /// Factor that brings gradients of this norm below [`AdamW::clip`].
    pub(super) fn scale(&self, norm: f64) -> f32 {
        if norm > f64::from(self.clip) { self.clip / norm as f32 } else { 1.0 }
    }

    /// One step of this step size, the `step`-th from 1. `mean` and `square` are the moments of `gradient`, which is
    /// scaled by `scale` first; `weight` moves.
    pub(super) fn apply(
        &self,
        step: u64,
        rate: f32,
        scale: f32,
        gradient: &[f32],
        weight: &mut [f32],
        (mean, square): (&mut [f32], &mut [f32]),
    ) {
        let (b1, b2) = self.betas;
        let correct = |b: f32| (1.0 - f64::from(b).powf(step as f64)) as f32;
        let (c1, c2) = (correct(b1), correct(b2));
        let moments = mean.iter_mut().zip(square);
        for ((w, g), (m, v)) in weight.iter_mut().zip(gradient).zip(moments) {
            let g = g * scale;
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            *w -= rate * (self.decay * *w + *m / c1 / ((*v / c2).sqrt() + self.eps));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_by_hand() {
        let o = AdamW { rate: 0.1, decay: 0.0, ..AdamW::default() };
        let (mut w, mut m, mut v) = ([1.0], [0.0], [0.0]);
        o.apply(1, o.rate, 1.0, &[2.0], &mut w, (&mut m, &mut v));
        // The first step moves by the rate, whatever the gradient.
        assert!(
            (w[0] - 0.9).abs() < 1e-5 && (m[0] - 0.2).abs() < 1e-6 && (v[0] - 0.2).abs() < 1e-6
        );
        o.apply(2, o.rate, 0.5, &[2.0], &mut w, (&mut m, &mut v));
        let (mean, square) = (0.28 / 0.19f32, 0.24 / 0.0975f32);
        assert!((w[0] - (0.9 - 0.1 * mean / square.sqrt())).abs() < 1e-4, "{w:?}");
        let decay = AdamW { rate: 0.1, decay: 0.5, ..AdamW::default() };
        let (mut w, mut m, mut v) = ([2.0], [0.0], [0.0]);
        decay.apply(1, 0.1, 1.0, &[0.0], &mut w, (&mut m, &mut v));
        assert!((w[0] - 1.9).abs() < 1e-6);
    }

    #[test]
    fn large_gradients_are_scaled_down() {
        let o = AdamW::default();
        assert_eq!((o.scale(0.4), o.scale(2.0)), (1.0, 0.25));
    }
}
