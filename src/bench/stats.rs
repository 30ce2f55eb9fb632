//! Samples and what is said about them.

use serde::Serialize;

/// Samples in the order taken, with their mean, standard deviation and median.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Mean of the samples, in their unit.
    pub mean: f64,
    /// Of the sample (n - 1); none for a single one.
    pub sd: Option<f64>,
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The samples, in the order taken.
    pub samples: Vec<f64>,
}

impl Summary {
    /// Of at least one sample; without any, all figures are NaN.
    pub fn of(samples: Vec<f64>) -> Summary {
        let n = samples.len() as f64;
        let mean = samples.iter().sum::<f64>() / n;
        let squares: f64 = samples.iter().map(|x| (x - mean).powi(2)).sum();
        let sd = (samples.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let median = match (sorted.len() / 2, sorted.len() % 2) {
            (0, 0) => f64::NAN,
            (half, 0) => (sorted[half - 1] + sorted[half]) / 2.0,
            (half, _) => sorted[half],
        };
        Summary { mean, sd, median, samples }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_deviation_and_median() {
        let s = Summary::of(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((s.mean, s.median), (2.5, 2.5));
        // Squares 2.25 + 2.25 + 0.25 + 0.25 = 5 over n - 1 = 3.
        assert!((s.sd.unwrap() - (5.0f64 / 3.0).sqrt()).abs() < 1e-15);
        assert_eq!(s.samples, [4.0, 1.0, 3.0, 2.0]);
        let s = Summary::of(vec![10.0, -1.0, 3.0]);
        assert_eq!((s.mean, s.median), (4.0, 3.0));
    }

    #[test]
    fn one_sample_has_no_deviation() {
        let s = Summary::of(vec![7.0]);
        assert_eq!((s.mean, s.sd, s.median), (7.0, None, 7.0));
    }
}
