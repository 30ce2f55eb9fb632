//! What the selection of each layer and KV head holds, and how it changes from step to step.

use super::runner::{continued, dense_first};
use super::{Progress, Sample};
use crate::engine::{Engine, EngineError};
use crate::model::LayerProbe;
use crate::select::Plan;
use serde::Serialize;

/// The selection of one KV head, means over the steps in which its layer was sparse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct HeadRecall {
    /// Steps.
    pub steps: usize,
    /// Tokens selected.
    pub selected: f64,
    /// Share of the exact attention (mean over the query heads of the KV head) that lies on the selected tokens.
    pub mass: f64,
    /// The same share on as many tokens with the most attention: no selection of this size holds more.
    pub best_mass: f64,
    /// Share of the tokens with the most attention, as many as are selected, that are selected.
    pub topk: f64,
    /// Share of the selected tokens that were not selected a step before; the step's own token is always one.
    pub churn: f64,
    /// Share of the chosen key dimensions that were not chosen a step before; none where the query chooses none.
    pub dims_churn: Option<f64>,
    /// Share of the steps that changed any of them: churn of a changing step is `dims_churn / dims_changed`.
    pub dims_changed: Option<f64>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerRecall {
    /// Number of the layer, from 0.
    pub layer: usize,
    /// `[kv_heads]`.
    pub heads: Vec<HeadRecall>,
}

/// One text under one method.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RecallRow {
    /// Name of the sample.
    pub sample: String,
    /// Method with its options, as given.
    pub method: String,
    /// KV bytes that the last decode step read under the plan.
    pub kv_bytes: u64,
    /// Sparse layers in ascending order.
    pub layers: Vec<LayerRecall>,
    /// Mass of every decode step, mean over layers and KV heads.
    pub mass_by_step: Vec<f64>,
}

impl RecallRow {
    /// Mean of something over all KV heads of all layers.
    pub fn mean(&self, of: impl Fn(&HeadRecall) -> f64) -> f64 {
        let heads = || self.layers.iter().flat_map(|l| &l.heads);
        heads().map(of).sum::<f64>() / heads().count().max(1) as f64
    }

    /// Mean churn of dimensions, where the method chooses any.
    pub fn dims_churn(&self) -> Option<f64> {
        let of: Vec<f64> =
            self.layers.iter().flat_map(|l| &l.heads).filter_map(|h| h.dims_churn).collect();
        (!of.is_empty()).then(|| of.iter().sum::<f64>() / of.len() as f64)
    }
}

/// Share of `now` that is not in `before`; both ascending. 0 for an empty list.
pub fn churn(before: &[u32], now: &[u32]) -> f64 {
    let new = now.iter().filter(|t| before.binary_search(t).is_err()).count();
    new as f64 / now.len().max(1) as f64
}

/// Decodes every sample with every plan but the dense one, and looks at each selection. The engine needs two sequences
/// and a cache that was built for all plans.
///
/// `progress` gets (decode steps done, all) and answers whether to go on; `each` gets the rows of every finished sample.
///
/// # Errors
/// Any [`EngineError`]; [`EngineError::Interrupted`] when `progress` says so.
pub fn recall(
    engine: &mut Engine,
    samples: &[Sample],
    plans: &[(String, Plan)],
    mut progress: impl FnMut(u64, u64) -> bool,
    mut each: impl FnMut(Vec<RecallRow>),
) -> Result<(), EngineError> {
    let plans = dense_first(engine, plans).split_off(1);
    let steps = |s: &Sample| s.tokens.len() - s.decode_from;
    let work = |s: &Sample| (s.decode_from + plans.len() * steps(s)) as u64;
    let all: u64 = samples.iter().map(work).sum();
    let mut done = 0;
    for sample in samples {
        let mut rows = Vec::with_capacity(plans.len());
        let on = |p: Progress| {
            let before = p.branch.map_or(0, |(i, _)| sample.decode_from + i * steps(sample));
            progress(done + (before + p.tokens) as u64, all)
        };
        let text = &sample.tokens[..sample.decode_from];
        let outcome = continued(engine, text, &plans, 1, on, |engine, branch, step| {
            engine.set_probe(true);
            let mut totals = Totals::default();
            // The last token is only predicted.
            let fed = sample.decode_from..sample.tokens.len() - 1;
            for (i, &token) in sample.tokens[fed].iter().enumerate() {
                engine.decode(branch.seq, token)?;
                totals.add(engine.take_probes());
                if !step(i + 1) {
                    return Err(EngineError::Interrupted);
                }
            }
            let kv_bytes = engine.bytes_read(engine.cached(branch.seq)?);
            rows.push(totals.row(&sample.name, branch.plan, kv_bytes));
            Ok(())
        });
        engine.set_probe(false);
        outcome?;
        each(rows);
        done += work(sample);
    }
    Ok(())
}

/// Sums over steps.
#[derive(Default)]
struct Totals {
    layers: Vec<(usize, Vec<Head>)>,
    mass_by_step: Vec<f64>,
}

/// Sums of one KV head, and what it selected in the step before.
#[derive(Clone, Default)]
struct Head {
    sums: HeadRecall,
    /// Steps that have one before them.
    changes: usize,
    tokens: Vec<u32>,
    dims: Vec<u32>,
}

impl Totals {
    fn add(&mut self, step: Vec<LayerProbe>) {
        let (mut mass, mut heads) = (0.0, 0usize);
        for probe in step {
            let at = match self.layers.binary_search_by_key(&probe.layer, |l| l.0) {
                Ok(at) => at,
                Err(at) => {
                    self.layers.insert(at, (probe.layer, Vec::new()));
                    at
                }
            };
            let of = &mut self.layers[at].1;
            of.resize(probe.selected.len(), Head::default());
            let found = probe.selected.into_iter().zip(probe.dims).zip(&probe.attention);
            for (head, ((selected, dims), attention)) in of.iter_mut().zip(found) {
                mass += head.add(selected, dims, attention);
                heads += 1;
            }
        }
        self.mass_by_step.push(if heads > 0 { mass / heads as f64 } else { 1.0 });
    }

    fn row(self, sample: &str, method: &str, kv_bytes: u64) -> RecallRow {
        let layer = |(layer, heads): (usize, Vec<Head>)| LayerRecall {
            layer,
            heads: heads.iter().map(Head::mean).collect(),
        };
        RecallRow {
            sample: sample.into(),
            method: method.into(),
            kv_bytes,
            layers: self.layers.into_iter().map(layer).collect(),
            mass_by_step: self.mass_by_step,
        }
    }
}

impl Head {
    /// Adds a step; the mass of its selection.
    fn add(&mut self, selected: Vec<u32>, dims: Vec<u32>, attention: &[f32]) -> f64 {
        let of = |token: &u32| attention.get(*token as usize).copied().unwrap_or(0.0);
        let mass: f64 = selected.iter().map(|t| f64::from(of(t))).sum();
        let mut best: Vec<u32> = (0..attention.len() as u32).collect();
        // As top-k everywhere: ties go to the earlier token.
        let order = |a: &u32, b: &u32| of(b).total_cmp(&of(a)).then(a.cmp(b));
        if selected.len() < best.len() {
            best.select_nth_unstable_by(selected.len(), order);
            best.truncate(selected.len());
        }
        let best_mass: f64 = best.iter().map(|t| f64::from(of(t))).sum();
        let hits = best.iter().filter(|t| selected.binary_search(t).is_ok()).count();
        let s = &mut self.sums;
        if s.steps > 0 {
            s.churn += churn(&self.tokens, &selected);
            if !dims.is_empty() {
                let new = churn(&self.dims, &dims);
                *s.dims_churn.get_or_insert(0.0) += new;
                *s.dims_changed.get_or_insert(0.0) += f64::from(u8::from(new > 0.0));
            }
            self.changes += 1;
        }
        s.steps += 1;
        s.selected += selected.len() as f64;
        s.mass += mass;
        s.best_mass += best_mass;
        s.topk += hits as f64 / selected.len().max(1) as f64;
        (self.tokens, self.dims) = (selected, dims);
        mass
    }

    fn mean(&self) -> HeadRecall {
        let s = self.sums;
        let (n, changes) = (s.steps.max(1) as f64, self.changes.max(1) as f64);
        HeadRecall {
            steps: s.steps,
            selected: s.selected / n,
            mass: s.mass / n,
            best_mass: s.best_mass / n,
            topk: s.topk / n,
            churn: s.churn / changes,
            dims_churn: s.dims_churn.map(|c| c / changes),
            dims_changed: s.dims_changed.map(|c| c / changes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn churn_is_the_share_of_what_is_new() {
        assert_eq!(churn(&[1, 2, 3, 4], &[1, 2, 3, 4]), 0.0);
        assert_eq!(churn(&[1, 2, 3, 4], &[2, 3, 4, 5]), 0.25);
        assert_eq!(churn(&[1, 2], &[3, 4, 5]), 1.0);
        assert_eq!(churn(&[], &[7]), 1.0);
        assert_eq!(churn(&[7], &[]), 0.0);
    }

    #[test]
    fn known_selections_have_known_recall() {
        let attention = [0.4, 0.1, 0.2, 0.3];
        let probe = |selected: &[u32], dims: &[u32]| LayerProbe {
            layer: 3,
            attention: vec![attention.to_vec()],
            selected: vec![selected.to_vec()],
            dims: vec![dims.to_vec()],
        };
        let mut totals = Totals::default();
        // The best two; then one of them; then everything.
        totals.add(vec![probe(&[0, 3], &[1, 5])]);
        totals.add(vec![probe(&[0, 1], &[1, 6])]);
        totals.add(vec![probe(&[0, 1, 2, 3], &[1, 6])]);
        let row = totals.row("s", "m", 1);
        assert_eq!((row.layers.len(), row.layers[0].layer), (1, 3));
        let head = row.layers[0].heads[0];
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} {b}");
        assert_eq!(head.steps, 3);
        near(head.selected, 8.0 / 3.0);
        near(head.mass, (0.7 + 0.5 + 1.0) / 3.0);
        near(head.best_mass, (0.7 + 0.7 + 1.0) / 3.0);
        near(head.topk, (1.0 + 0.5 + 1.0) / 3.0);
        near(head.churn, (0.5 + 0.5) / 2.0);
        near(head.dims_churn.unwrap(), (0.5 + 0.0) / 2.0);
        near(head.dims_changed.unwrap(), 0.5);
        for (got, want) in row.mass_by_step.iter().zip([0.7, 0.5, 1.0]) {
            near(*got, want);
        }
        near(row.mean(|h| h.mass), head.mass);
        near(row.dims_churn().unwrap(), 0.25);
    }

    #[test]
    fn methods_without_dimensions_have_no_churn_of_them() {
        let mut totals = Totals::default();
        for _ in 0..2 {
            totals.add(vec![LayerProbe {
                layer: 0,
                attention: vec![vec![0.5, 0.5]],
                selected: vec![vec![1]],
                dims: vec![vec![]],
            }]);
        }
        let row = totals.row("s", "m", 1);
        assert_eq!(row.dims_churn(), None);
        // A tie goes to the first token.
        assert_eq!((row.layers[0].heads[0].topk, row.layers[0].heads[0].churn), (0.0, 0.0));
    }
}
