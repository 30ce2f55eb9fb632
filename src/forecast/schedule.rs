//! How the step size changes during a run.

use serde::{Deserialize, Serialize};

/// What becomes of the step size after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Nothing (as published).
    #[default]
    Constant,
    /// Half a cosine from the full size towards 0 (arXiv 1608.03983, without restarts).
    Cosine,
}

/// The step size, as a share of the optimizer's rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// First steps, in which the size grows in equal parts.
    pub warmup: usize,
    /// What follows.
    pub decay: Decay,
    /// Steps of the whole run; only a decay depends on it, and 0 is as good where there is none.
    pub steps: usize,
}

impl Schedule {
    /// Share of the `step`-th step, counted from 1: at most 1, and above 0 up to the last step.
    pub fn share(&self, step: usize) -> f32 {
        if step <= self.warmup {
            return step as f32 / self.warmup as f32;
        }
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Cosine => {
                let done = (step - 1 - self.warmup) as f64;
                let all = self.steps.saturating_sub(self.warmup).max(1) as f64;
                (0.5 + 0.5 * (std::f64::consts::PI * (done / all).min(1.0)).cos()) as f32
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_grow_and_shrink() {
        let constant = Schedule { warmup: 4, ..Schedule::default() };
        assert_eq!([1, 2, 4, 5, 900].map(|s| constant.share(s)), [0.25, 0.5, 1.0, 1.0, 1.0]);
        assert_eq!(Schedule::default().share(1), 1.0);
        let cosine = Schedule { warmup: 2, decay: Decay::Cosine, steps: 12 };
        assert_eq!([1, 2, 3].map(|s| cosine.share(s)), [0.5, 1.0, 1.0]);
        assert!((cosine.share(8) - 0.5).abs() < 1e-6, "half of the way: {}", cosine.share(8));
        assert!((1..12).all(|s| s < 3 || cosine.share(s) > cosine.share(s + 1)));
        assert!(cosine.share(12) > 0.0 && cosine.share(12) < 0.03 && cosine.share(99) >= 0.0);
        let all_warm = Schedule { warmup: 9, decay: Decay::Cosine, steps: 5 };
        assert!((1..=9).all(|s| all_warm.share(s) > 0.0));
    }
}
