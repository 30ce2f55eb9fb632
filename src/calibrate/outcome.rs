//! What a calibration decides.

use super::CalibrateError;
use super::anchors::{Placement, least_anchors, placements};
use super::statistics::{Objective, Statistics};
use crate::select::{Anchors, MethodSpec, ModelShape, Plan, Role, SelectError};
use serde::{Deserialize, Serialize};

/// How anchors are chosen from statistics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// How the tiles of a text become one similarity.
    pub objective: Objective,
    /// Weigh each layer by how far its attention turns the residual stream (as published).
    pub weigh: bool,
    /// Number of anchors; `None`: the fewest worth `share` of every layer being one.
    pub anchors: Option<usize>,
    /// See `anchors`.
    pub share: f64,
}

/// Anchors, maps and the numbers behind them. Layers are numbered as in the model; layers with a sliding window take
/// no part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Fingerprint of the model.
    pub model: String,
    /// Layers that take part, ascending.
    pub layers: Vec<usize>,
    /// How the tiles of a text became one similarity.
    pub objective: Objective,
    /// Texts that were read.
    pub texts: usize,
    /// Layers that make lists, ascending; the first attends to everything.
    pub anchors: Vec<usize>,
    /// Per entry of `layers`: the anchor whose lists it takes (itself for an anchor).
    pub from: Vec<usize>,
    /// Per entry of `layers`: for every KV head the anchor's head whose list it takes.
    pub head_maps: Vec<Vec<u8>>,
    /// `[a][b]` over `layers`: what layer b is worth with the lists of layer a, 0 for a > b.
    pub similarity: Vec<Vec<f64>>,
    /// Per entry of `layers`: mean of `1 - cos(x, x + attention output)`.
    pub importance: Vec<f64>,
    /// The best anchors for 1, 2 ... all layers, and their share of the value of all.
    pub table: Vec<(Vec<usize>, f64)>,
}

impl Calibration {
    /// Chooses anchors and maps.
    ///
    /// # Errors
    /// [`CalibrateError::BadOption`] for a number of anchors that the model cannot have, a share outside 0..=1, or
    /// statistics of no text.
    pub fn new(model: &str, s: &Statistics, choice: Choice) -> Result<Self, CalibrateError> {
        let bad = |what: String| CalibrateError::BadOption(what);
        let similarity = s
            .similarity(choice.objective)
            .ok_or_else(|| bad("no text was read; give at least one".into()))?;
        let importance = s.importance();
        let matrix = similarity.layer_matrix(choice.weigh.then_some(&importance[..]));
        let n = s.layers.len();
        let all = placements(&matrix, n);
        if !(0.0..=1.0).contains(&choice.share) {
            return Err(bad(format!("a share of {}: give one from 0 to 1", choice.share)));
        }
        let index = match choice.anchors {
            Some(m) => m.checked_sub(1).filter(|&i| i < n),
            None => least_anchors(&all, choice.share),
        };
        let best = index
            .and_then(|i| all.get(i))
            .ok_or_else(|| bad(format!("this model can have 1 to {n} anchors")))?;
        let anchor_of = |b: usize| best.anchors.iter().copied().rfind(|&a| a <= b).unwrap_or(0);
        let identity = (0..s.kv_heads as u8).collect::<Vec<_>>();
        let head_map = |b: usize| match anchor_of(b) {
            a if a == b => identity.clone(),
            a => similarity.head_map(a, b),
        };
        let model_layers = |p: &Placement| p.anchors.iter().map(|&a| s.layers[a]).collect();
        let top = all.last().map_or(1.0, |p| p.value);
        Ok(Calibration {
            model: model.into(),
            layers: s.layers.clone(),
            objective: choice.objective,
            texts: s.texts,
            anchors: model_layers(best),
            from: (0..n).map(|b| s.layers[anchor_of(b)]).collect(),
            head_maps: (0..n).map(head_map).collect(),
            table: all.iter().map(|p| (model_layers(p), p.value / top)).collect(),
            similarity: matrix,
            importance,
        })
    }

    /// The plan of a method with anchors (Kascade and its neighbours) with these anchors and, where every KV head has
    /// a list of its own, these maps; `spec` gives what else there is to choose.
    ///
    /// # Errors
    /// [`SelectError::WrongModel`]; [`SelectError::BadPlan`] for a method without anchors, or options that do not fit.
    pub fn plan(
        &self,
        spec: &MethodSpec,
        m: &ModelShape<'_>,
        context: usize,
    ) -> Result<Plan, SelectError> {
        if !spec.variant.takes("anchors") {
            let reason = "its layers share no lists, so a calibration has nothing to say".into();
            return Err(SelectError::BadPlan { method: spec.name().into(), reason });
        }
        if self.model != m.model {
            return Err(SelectError::WrongModel {
                plan_model: self.model.clone(),
                plan_layers: self.layers.last().map_or(0, |l| l + 1),
                model: m.model.into(),
                layers: m.windows.len(),
            });
        }
        let anchors = Some(Anchors::Layers(self.anchors.clone()));
        let mut plan = MethodSpec { anchors, ..spec.clone() }.plan(m, context)?;
        let lists: Vec<usize> = plan.layers.iter().map(|l| l.lists(m.heads, m.kv_heads)).collect();
        let found = self.layers.iter().zip(&self.from).zip(&self.head_maps);
        for ((&layer, &anchor), map) in found {
            if let Some(layer) = plan.layers.get_mut(layer)
                && let Role::Reuse { from, head_map, .. } = &mut layer.role
                && *from == anchor
                && lists[anchor] == map.len()
            {
                head_map.clone_from(map);
            }
        }
        plan.check(m)?;
        Ok(plan)
    }
}
