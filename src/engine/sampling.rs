//! From logits to a token.

use super::EngineError;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// How tokens are drawn. Temperature 0 is greedy (ties to the smaller token).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the largest.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest most likely tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0 drops none.
    pub min_p: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

impl Sampling {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`EngineError::BadOption`] for a temperature that is negative or not finite, and for a `top_p` or `min_p`
    /// outside 0 to 1.
    pub fn check(&self) -> Result<(), EngineError> {
        let t = self.temperature;
        if !(t.is_finite() && t >= 0.0) {
            return Err(EngineError::BadOption(format!("a temperature of {t}: give 0 or more")));
        }
        for (name, p) in [("top_p", self.top_p), ("min_p", self.min_p)] {
            if !(0.0..=1.0).contains(&p) {
                return Err(EngineError::BadOption(format!("{name} is {p}: give 0 to 1")));
            }
        }
        Ok(())
    }
}

/// Draws tokens; the same seed and logits give the same tokens.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at its first token.
    pub fn new(sampling: Sampling) -> Self {
        Sampler { sampling, rng: ChaCha8Rng::seed_from_u64(sampling.seed) }
    }

    /// The next token; logits that are not finite are never drawn. `None` where no logit is finite.
    pub fn sample(&mut self, logits: &[f32]) -> Option<u32> {
        let s = self.sampling;
        if s.temperature <= 0.0 {
            return greedy(logits);
        }
        let mut p: Vec<(u32, f32)> = finite(logits).collect();
        // Equal logits keep the smaller token first.
        p.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if s.top_k > 0 {
            p.truncate(s.top_k);
        }
        let max = p.first()?.1;
        let mut sum = 0.0;
        for (_, l) in &mut p {
            // The difference first: a logit over a tiny temperature may be infinite.
            *l = ((*l - max) / s.temperature).exp();
            sum += *l;
        }
        let mut kept = 0.0;
        let mut n = 0;
        for &(_, w) in &p {
            if n > 0 && (kept >= s.top_p * sum || w < s.min_p) {
                break;
            }
            kept += w;
            n += 1;
        }
        // 24 random bits make a uniform f32 in [0, 1).
        let mut at = (self.rng.next_u32() >> 8) as f32 / (1 << 24) as f32 * kept;
        for &(t, w) in &p[..n] {
            at -= w;
            if at < 0.0 {
                return Some(t);
            }
        }
        Some(p[n - 1].0)
    }
}

fn finite(logits: &[f32]) -> impl Iterator<Item = (u32, f32)> {
    logits.iter().enumerate().filter(|(_, l)| l.is_finite()).map(|(i, &l)| (i as u32, l))
}

/// The token with the largest finite logit, ties to the smaller token; `None` where no logit is finite.
pub fn greedy(logits: &[f32]) -> Option<u32> {
    finite(logits).reduce(|best, next| if next.1 > best.1 { next } else { best }).map(|b| b.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(s: Sampling, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(s);
        (0..n).map(|_| sampler.sample(logits).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_skips_nan() {
        assert_eq!(greedy(&[f32::NAN, 1.0, 3.0, 3.0]), Some(2));
    }

    #[test]
    fn logits_that_are_not_finite_are_never_drawn() {
        let hot = Sampling { temperature: 1.0, ..Default::default() };
        let one = [f32::NAN, f32::NEG_INFINITY, -3.0, f32::INFINITY];
        for s in [Sampling::default(), hot] {
            assert_eq!(draw(s, &one, 20), [2; 20]);
            for none in [&[][..], &[f32::NAN, f32::INFINITY]] {
                assert_eq!(Sampler::new(s).sample(none), None);
            }
        }
    }

    #[test]
    fn a_tiny_temperature_takes_the_largest_logit() {
        for temperature in [1e-10, 1e-39, f32::from_bits(1)] {
            let s = Sampling { temperature, ..Default::default() };
            assert_eq!(draw(s, &[9.0, 20.0, -4.0], 20), [1; 20]);
        }
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        let ok = Sampling::default();
        ok.check().unwrap();
        Sampling { temperature: 2.0, top_p: 0.0, min_p: 1.0, ..ok }.check().unwrap();
        let bad =
            |s: Sampling| assert!(matches!(s.check(), Err(EngineError::BadOption(_))), "{s:?}");
        for x in [f32::NAN, f32::INFINITY, -0.5] {
            bad(Sampling { temperature: x, ..ok });
            bad(Sampling { top_p: x, ..ok });
            bad(Sampling { min_p: x, ..ok });
        }
        bad(Sampling { top_p: 1.5, ..ok });
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let s = Sampling { temperature: 1.0, seed: 7, ..Default::default() };
        let l = [0.1, 0.5, 0.2, 0.9];
        assert_eq!(draw(s, &l, 50), draw(s, &l, 50));
        assert_ne!(draw(s, &l, 50), draw(Sampling { seed: 8, ..s }, &l, 50));
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let s = Sampling { temperature: 0.5, ..Default::default() };
        let n = 20_000;
        let ones = draw(s, &[0.0, 0.5], n).iter().filter(|&&t| t == 1).count() as f64 / n as f64;
        let want = 1.0 / (1.0 + (-1.0f64).exp());
        assert!((ones - want).abs() < 0.015, "{ones} {want}");
    }

    #[test]
    fn filters_keep_what_they_say() {
        let l = [3.0, 2.0, 1.0, -4.0];
        let t = Sampling { temperature: 1.0, ..Default::default() };
        let set = |s| {
            let mut v = draw(s, &l, 2000);
            v.sort_unstable();
            v.dedup();
            v
        };
        assert_eq!(set(Sampling { top_k: 2, ..t }), [0, 1]);
        // Probabilities 0.665, 0.244, 0.090, 0.0006.
        assert_eq!(set(Sampling { top_p: 0.6, ..t }), [0]);
        assert_eq!(set(Sampling { top_p: 0.7, ..t }), [0, 1]);
        assert_eq!(set(Sampling { min_p: 0.2, ..t }), [0, 1]);
    }
}
