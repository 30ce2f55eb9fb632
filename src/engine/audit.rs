//! What sparsity cost: attention mass and output error of the selection, measured during the run.

use crate::model::LayerAudit;
use serde::Serialize;

/// When to audit, and what follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AuditConfig {
    /// The first decode step and every n-th after it, all sparse layers; 0 = never.
    pub every: usize,
    /// The budget is doubled for the steps after one whose selections held less attention mass than this share (0 to 1), in
    /// the mean over layers and query heads. Where the device has no room for that, decoding goes on with the budget that
    /// there is ([`Doubling::no_room`]), and the next audit may ask again.
    pub min_recall: Option<f32>,
}

impl AuditConfig {
    /// The first decode step and every n-th after it.
    pub const fn every(n: usize) -> Self {
        AuditConfig { every: n, min_recall: None }
    }

    /// Decode step `step`, counted from the setting of the audit, is audited.
    pub fn due(&self, step: usize) -> bool {
        self.every > 0 && step.is_multiple_of(self.every)
    }

    /// What this step's audits found calls for a larger budget.
    pub fn too_little(&self, audits: &[LayerAudit]) -> bool {
        let found = AuditSummary::new(audits);
        self.min_recall.is_some_and(|least| !found.is_empty() && found.recall() < f64::from(least))
    }
}

/// What audits did to the budget ([`AuditConfig::min_recall`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Doubling {
    /// Times that the budget was doubled.
    pub doubled: usize,
    /// The last audit doubled it: nothing has been measured with the budget that there is now.
    pub unmeasured: bool,
    /// Times that the device had no room for a doubled budget.
    pub no_room: usize,
}

/// Audit results of one layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerSummary {
    /// Number of the layer, from 0.
    pub layer: usize,
    /// Samples: audited (step, sequence) pairs.
    pub samples: usize,
    /// Mean attention mass on the selected tokens over query heads and samples.
    pub recall: f64,
    /// Smallest mass of a query head.
    pub worst_recall: f64,
    /// Mean relative output error.
    pub output_error: f64,
}

/// Audit results of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct AuditSummary {
    /// Audited layers in ascending order.
    pub layers: Vec<LayerSummary>,
    /// What they did to the budget.
    #[serde(flatten)]
    pub doubling: Doubling,
}

impl AuditSummary {
    /// Collects single measurements.
    pub fn new(audits: &[LayerAudit]) -> Self {
        let mut ids: Vec<usize> = audits.iter().map(|a| a.layer).collect();
        ids.sort_unstable();
        ids.dedup();
        let layer = |layer: usize| {
            let of: Vec<_> = audits.iter().filter(|a| a.layer == layer).collect();
            let heads = || of.iter().flat_map(|a| a.recall.iter().map(|&r| f64::from(r)));
            LayerSummary {
                layer,
                samples: of.len(),
                recall: heads().sum::<f64>() / heads().count().max(1) as f64,
                // Unlike f64::min, this keeps NaN.
                worst_recall: heads().fold(1.0, |a, b| if b.is_nan() || b < a { b } else { a }),
                output_error: of.iter().map(|a| f64::from(a.output_error)).sum::<f64>()
                    / of.len().max(1) as f64,
            }
        };
        AuditSummary { layers: ids.into_iter().map(layer).collect(), ..AuditSummary::default() }
    }

    /// Nothing was sparse, or nothing was audited.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Mean attention mass over layers.
    pub fn recall(&self) -> f64 {
        self.mean(|l| l.recall)
    }

    /// Mean relative output error over layers.
    pub fn output_error(&self) -> f64 {
        self.mean(|l| l.output_error)
    }

    /// The layer whose selection misses most, with its mean recall.
    pub fn worst_layer(&self) -> Option<(usize, f64)> {
        let key = |l: &LayerSummary| if l.recall.is_nan() { f64::NEG_INFINITY } else { l.recall };
        let worst = self.layers.iter().min_by(|a, b| key(a).total_cmp(&key(b)))?;
        Some((worst.layer, worst.recall))
    }

    fn mean(&self, f: impl Fn(&LayerSummary) -> f64) -> f64 {
        self.layers.iter().map(f).sum::<f64>() / self.layers.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_too_small_where_less_mass_is_kept() {
        assert!(AuditConfig::every(4).due(8) && !AuditConfig::every(4).due(9));
        assert!(!AuditConfig::every(0).due(0));
        let audit = |recall: f32| LayerAudit {
            layer: 0,
            seq: 0,
            recall: vec![recall; 2],
            output_error: 0.0,
        };
        let least = |min| AuditConfig { min_recall: Some(min), ..AuditConfig::every(1) };
        assert!(least(0.9).too_little(&[audit(0.7), audit(1.0)]));
        assert!(!least(0.8).too_little(&[audit(0.7), audit(1.0)]));
        assert!(!least(1.0).too_little(&[]) && !AuditConfig::every(1).too_little(&[audit(0.0)]));
    }

    #[test]
    fn nan_is_the_worst_of_all() {
        let audit = |layer, recall: &[f32]| LayerAudit {
            layer,
            seq: 0,
            recall: recall.to_vec(),
            output_error: 0.0,
        };
        let s = AuditSummary::new(&[audit(2, &[0.5, 0.5]), audit(3, &[0.9, f32::NAN, 0.8])]);
        assert_eq!(s.worst_layer().unwrap().0, 3);
        assert!(s.layers[1].worst_recall.is_nan() && s.recall().is_nan());
    }

    #[test]
    fn summaries_average_heads_and_name_the_worst_layer() {
        let audit = |layer, recall: &[f32], output_error| LayerAudit {
            layer,
            seq: 0,
            recall: recall.to_vec(),
            output_error,
        };
        let s = AuditSummary::new(&[
            audit(2, &[1.0, 0.5], 0.1),
            audit(3, &[1.0, 1.0], 0.0),
            audit(2, &[1.0, 0.9], 0.3),
        ]);
        assert_eq!(s.worst_layer().unwrap().0, 2);
        assert!((s.layers[0].recall - 0.85).abs() < 1e-6);
        assert!((s.layers[0].worst_recall - 0.5).abs() < 1e-6);
        assert!((s.output_error() - 0.1).abs() < 1e-6);
    }
}
