//! What sparsity cost: attention mass and output error of the selection, measured during the run.

use crate::model::LayerAudit;
use serde::Serialize;

/// When to audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// Every n-th decode step.
    pub every: usize,
    /// Layers per audited step, taken in turn; 0 = all.
    pub layers: usize,
}

impl AuditConfig {
    /// The sparse layers to audit in decode step `step`, or none.
    pub fn layers_at(&self, step: usize, sparse: &[usize]) -> Vec<usize> {
        if self.every == 0 || !step.is_multiple_of(self.every) || sparse.is_empty() {
            return Vec::new();
        }
        if self.layers == 0 || self.layers >= sparse.len() {
            return sparse.to_vec();
        }
        // Evenly spaced, shifted each time, so that every layer gets its turn.
        let turn = step / self.every;
        (0..self.layers)
            .map(|i| sparse[(i * sparse.len() / self.layers + turn) % sparse.len()])
            .collect()
    }
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
        AuditSummary { layers: ids.into_iter().map(layer).collect() }
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
    fn every_sparse_layer_gets_its_turn() {
        let a = AuditConfig { every: 4, layers: 2 };
        let sparse = [2, 3, 4, 5];
        assert!(a.layers_at(1, &sparse).is_empty());
        let mut seen: Vec<_> = (0..8).flat_map(|s| a.layers_at(s, &sparse)).collect();
        seen.sort_unstable();
        assert_eq!(seen, sparse);
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
