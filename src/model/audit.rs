//! What a selection cost: its outputs beside those of dense attention over the same cache.

use super::trace::download_f32;
use crate::backend::{Backend, Tensor};
use crate::select::{LayerShape, SelectError};

/// What the selection of one (layer, sequence) cost, measured against dense attention.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LayerAudit {
    /// Number of the layer, from 0.
    pub layer: usize,
    /// Index of the sequence in the step.
    pub seq: usize,
    /// Per query head: exact attention mass on the selected tokens,
    /// `exp(lse_selected - lse_all)`.
    /// NaN where attention itself is.
    pub recall: Vec<f32>,
    /// `|out - out_dense| / |out_dense|` over all heads.
    pub output_error: f32,
}

/// What rounding may add to a share of 1.
const ROUNDING: f32 = 1e-3;

/// Mass on the selected tokens from the log-sum-exps of both, at most 1; an error where it is clearly more.
fn recall(layer: usize, selected: f32, all: f32) -> std::result::Result<f32, SelectError> {
    match (selected - all).exp() {
        recall if recall > 1.0 + ROUNDING => Err(SelectError::AuditMismatch { layer, recall }),
        recall if recall > 1.0 => Ok(1.0),
        recall => Ok(recall),
    }
}

/// Compares the sparse outputs of the given (sequence, row) pairs with the dense ones.
pub(super) fn audit(
    b: &dyn Backend,
    shape: LayerShape,
    rows: &[(usize, usize)],
    (out, lse): (&Tensor, &Tensor),
    (exact_out, exact_lse): (&Tensor, &Tensor),
    results: &mut Vec<LayerAudit>,
) -> std::result::Result<(), SelectError> {
    let width = shape.heads * shape.head_dim;
    for &(seq, row) in rows {
        let part = |t: &Tensor, w: usize| download_f32(b, &t.slice(row * w, w));
        let (o, l) = (part(out, width)?, part(lse, shape.heads)?);
        let (eo, el) = (part(exact_out, width)?, part(exact_lse, shape.heads)?);
        let recall = l.iter().zip(&el).map(|(&s, &e)| recall(shape.layer, s, e));
        let recall = recall.collect::<std::result::Result<_, _>>()?;
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>();
        let diff = norm(&mut o.iter().zip(&eo).map(|(a, b)| a - b));
        let full = norm(&mut eo.iter().copied()).max(f64::MIN_POSITIVE);
        results.push(LayerAudit {
            layer: shape.layer,
            seq,
            recall,
            output_error: (diff / full).sqrt() as f32,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_all_of_the_mass_is_an_error_and_nan_stays() {
        assert_eq!(recall(0, 2.0, 2.0 + 2f32.ln()).unwrap(), 0.5);
        assert_eq!(recall(0, 2.0001, 2.0).unwrap(), 1.0);
        let error = recall(7, 2.01, 2.0).unwrap_err();
        assert!(matches!(error, SelectError::AuditMismatch { layer: 7, .. }), "{error}");
        assert!(recall(0, f32::NAN, 2.0).unwrap().is_nan());
        assert!(recall(0, 2.0, f32::NAN).unwrap().is_nan());
    }
}
