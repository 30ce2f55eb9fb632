//! Seeded bootstrap intervals of a mean (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13:
//! percentile intervals).

use super::seeded;
use rand::RngExt;
use serde::Serialize;

/// A mean with the interval that holds 95 % of the resampled means.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Mean of the data.
    pub mean: f64,
    /// 2.5 % of the resampled means are below.
    pub low: f64,
    /// 2.5 % of the resampled means are above.
    pub high: f64,
}

impl Interval {
    /// 0 lies outside: the difference is more than chance, as far as the resampled units tell.
    pub fn excludes_zero(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }
}

/// How often and from which seed to resample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bootstrap {
    /// Resampled means.
    pub resamples: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// What is drawn as one: the sum of some values, and their number.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Unit {
    pub sum: f64,
    pub n: usize,
}

impl Unit {
    pub fn of(values: &[f64]) -> Unit {
        Unit { sum: values.iter().sum(), n: values.len() }
    }

    pub fn all(units: impl IntoIterator<Item = Unit>) -> Unit {
        let add = |a: Unit, b: Unit| Unit { sum: a.sum + b.sum, n: a.n + b.n };
        units.into_iter().fold(Unit::default(), add)
    }

    pub fn mean(self) -> f64 {
        self.sum / self.n.max(1) as f64
    }
}

impl Bootstrap {
    /// Draws as many units as there are, with replacement, out of each stratum. Deviations from a stratum's mean are
    /// enlarged by `sqrt(k / (k - 1))`, because the mean of k units drawn out of k varies by that much too little. None
    /// where no stratum has two units: nothing varies then, which says nothing about the data.
    pub(super) fn interval(&self, strata: &[Vec<Unit>]) -> Option<Interval> {
        if self.resamples == 0 || strata.iter().all(|s| s.len() < 2) {
            return None;
        }
        let enlarged: Vec<Vec<Unit>> = strata.iter().map(|s| enlarged(s)).collect();
        let mut rng = seeded(self.seed, &[strata.len() as u64]);
        let mut means: Vec<f64> = (0..self.resamples)
            .map(|_| {
                let drawn = enlarged.iter().filter(|s| !s.is_empty()).flat_map(|s| {
                    let draws: Vec<Unit> =
                        s.iter().map(|_| s[rng.random_range(0..s.len())]).collect();
                    draws
                });
                Unit::all(drawn).mean()
            })
            .collect();
        means.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| means[((means.len() - 1) as f64 * share).round() as usize];
        let mean = Unit::all(strata.iter().flatten().copied()).mean();
        Some(Interval { mean, low: at(0.025), high: at(0.975) })
    }
}

fn enlarged(units: &[Unit]) -> Vec<Unit> {
    let (k, mean) = (units.len() as f64, Unit::all(units.iter().copied()).mean());
    let by = (k / (k - 1.0).max(1.0)).sqrt();
    let of = |u: &Unit| {
        let expected = u.n as f64 * mean;
        Unit { sum: expected + by * (u.sum - expected), n: u.n }
    };
    units.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOTSTRAP: Bootstrap = Bootstrap { resamples: 2000, seed: 1 };

    fn singles(values: impl IntoIterator<Item = f64>) -> Vec<Unit> {
        values.into_iter().map(|v| Unit::of(&[v])).collect()
    }

    #[test]
    fn a_constant_has_no_spread() {
        let got = BOOTSTRAP.interval(&[singles([0.25; 9]), singles([0.25; 4])]).unwrap();
        assert_eq!(got, Interval { mean: 0.25, low: 0.25, high: 0.25 });
        assert!(got.excludes_zero());
    }

    #[test]
    fn one_unit_says_nothing() {
        assert_eq!(BOOTSTRAP.interval(&[singles([1.0]), singles([2.0])]), None);
        assert_eq!(BOOTSTRAP.interval(&[]), None);
    }

    #[test]
    fn the_interval_is_that_of_the_normal_distribution() {
        // The mean of 400 values of +-1 has a deviation of 1 / 20: 95 % lie within 1.96 of it.
        let values = (0..400).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 });
        let got = BOOTSTRAP.interval(&[singles(values)]).unwrap();
        assert_eq!(got.mean, 0.0);
        assert!((got.low + 0.098).abs() < 0.01 && (got.high - 0.098).abs() < 0.01, "{got:?}");
        assert!(!got.excludes_zero());
        // Blocks of 40 equal values are 10 values: the deviation of their mean is 1 / sqrt(10), times sqrt(10 / 9)
        // as estimated from ten.
        let blocks = (0..10).map(|i| Unit::of(&[if i % 2 == 0 { 1.0 } else { -1.0 }; 40]));
        let got = BOOTSTRAP.interval(&[blocks.collect()]).unwrap();
        assert!((got.high - 0.653).abs() < 0.06, "{got:?}");
    }

    #[test]
    fn strata_keep_their_share() {
        // Each stratum is constant, so every draw has the same mean.
        let got = BOOTSTRAP.interval(&[singles([0.0; 5]), singles([1.0; 5])]).unwrap();
        assert_eq!((got.mean, got.low, got.high), (0.5, 0.5, 0.5));
        let mixed = BOOTSTRAP.interval(&[singles([0.0, 0.0, 1.0, 1.0])]).unwrap();
        assert!(mixed.low < 0.2 && mixed.high > 0.8, "{mixed:?}");
    }

    #[test]
    fn the_seed_decides() {
        let data = [singles((0..50).map(|i| f64::from(i * i % 17)))];
        assert_eq!(BOOTSTRAP.interval(&data), BOOTSTRAP.interval(&data));
        let other = Bootstrap { seed: 2, ..BOOTSTRAP }.interval(&data).unwrap();
        assert_ne!(other.low, BOOTSTRAP.interval(&data).unwrap().low);
    }
}
