//! The training run.

use super::learn::{Lesson, Tally};
use super::rotary::Rotary;
use super::state::Progress;
use super::teacher::LayerTeacher;
use super::{AdamW, Forecast, Grid, Start, Teacher};
use crate::calibrate::state::text_name;
use crate::calibrate::{CalibrateError, TracedText};
use crate::engine::{Engine, EngineError, TraceParts};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What a run depends on, the number of steps apart; a run is continued only where all of it is the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSettings {
    /// Windows, blocks and the budget.
    pub grid: Grid,
    /// What is learned from.
    pub teacher: Teacher,
    /// What matrices are before.
    pub start: Start,
    /// Rates.
    pub optimizer: AdamW,
    /// Texts of one step.
    pub batch: usize,
    /// Every how many-th query of a text is learned from; the first shifts from step to step.
    pub every: usize,
    /// Seed of [`Start::Uniform`].
    pub seed: u64,
    /// Steps between two saves.
    pub save_every: usize,
    /// Fingerprint of the model.
    pub model: String,
    /// Dtype of the weights.
    pub dtype: String,
    /// Hash of the texts.
    pub texts: String,
}

impl TrainSettings {
    /// The published recipe for this engine and these texts, one text a step.
    pub fn of(engine: &Engine, texts: &[Vec<u32>]) -> Self {
        TrainSettings {
            grid: Grid::default(),
            teacher: Teacher::Fine,
            start: Start::Queries,
            optimizer: AdamW::default(),
            batch: 1,
            every: 1,
            seed: 0,
            save_every: 20,
            model: engine.fingerprint().into(),
            dtype: engine.decoder().weight_dtype().to_string(),
            texts: text_name(&texts.concat()),
        }
    }

    pub(super) fn line(&self) -> String {
        let kept = TrainSettings { save_every: 0, ..self.clone() };
        serde_json::to_string(&kept).unwrap_or_default()
    }

    fn check(&self, texts: &[Vec<u32>]) -> Result<(), CalibrateError> {
        self.grid.check()?;
        let bad = |what: String| Err(CalibrateError::BadOption(what));
        if self.batch == 0 || self.every == 0 || self.save_every == 0 || texts.is_empty() {
            return bad(
                "give at least one text, one text a step, every query, and a save now and then"
                    .into(),
            );
        }
        let o = self.optimizer;
        let share = |b: f32| (0.0..1.0).contains(&b);
        let rates = o.rate > 0.0 && o.clip > 0.0 && o.eps > 0.0 && o.decay >= 0.0;
        if !(rates && share(o.betas.0) && share(o.betas.1)) {
            return bad("rates above 0 and decays below 1 are needed to learn".into());
        }
        let shortest = texts.iter().map(Vec::len).min().unwrap_or(0);
        if self.grid.candidates(shortest.saturating_sub(1)).is_empty() {
            return bad(format!(
                "in {shortest} tokens every block of {} is among those always read; give longer pieces",
                self.grid.block
            ));
        }
        Ok(())
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done.
    pub step: usize,
    /// Mean restricted divergence over layers, KV heads and queries.
    pub loss: f64,
    /// Share of the teacher's picks that the matrices (before the step) picked too; NaN when there was no choice.
    pub recall: f64,
}

/// Trains until `steps` steps are done. With `state`, the run is saved there as it goes and when it is stopped, and a
/// run that finds such a file goes on after it, to the same result.
///
/// `each` hears of finished steps; `go_on` is asked often, and false stops the run after the last whole step.
///
/// # Errors
/// [`EngineError::Interrupted`] when stopped; [`CalibrateError::OtherRun`] for a state of another run;
/// [`CalibrateError::BadOption`] for settings that cannot be.
pub fn train(
    engine: &mut Engine,
    texts: &[Vec<u32>],
    steps: usize,
    settings: &TrainSettings,
    state: Option<&Path>,
    mut each: impl FnMut(StepReport),
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<(Forecast, Vec<f64>), CalibrateError> {
    settings.check(texts)?;
    let start = Forecast::new(engine.checkpoint(), settings.start, settings.seed)?;
    let fresh = Progress::new(&start.matrices);
    let found = state.map(|path| Progress::load(path, settings, &fresh)).transpose()?.flatten();
    let mut progress = found.unwrap_or(fresh);
    let inv_freq = engine.decoder().config().inv_freq();
    let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
    let rotary = Rotary::new(&inv_freq, longest);
    let mut saved = progress.steps;
    let outcome = loop {
        if progress.steps >= steps {
            break Ok(());
        }
        match step(engine, texts, settings, &rotary, &mut progress, go_on) {
            Ok(report) => each(report),
            Err(e) => break Err(e),
        }
        if let Some(path) = state
            && progress.steps.is_multiple_of(settings.save_every)
        {
            progress.save(path, settings)?;
            saved = progress.steps;
        }
    };
    if let Some(path) = state
        && saved != progress.steps
    {
        progress.save(path, settings)?;
    }
    outcome?;
    let matrices = progress.targets.into_iter().map(|[weight, _, _]| weight).collect();
    Ok((Forecast { matrices }, progress.losses))
}

fn step(
    engine: &mut Engine,
    texts: &[Vec<u32>],
    settings: &TrainSettings,
    rotary: &Rotary,
    progress: &mut Progress,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<StepReport, CalibrateError> {
    let mut gradients: Vec<Vec<f32>> =
        progress.targets.iter().map(|t| vec![0.0; t[0].len()]).collect();
    let mut tally = Tally::default();
    for i in 0..settings.batch {
        let text = &texts[(progress.steps * settings.batch + i) % texts.len()];
        let parts = TraceParts { normed: true, ..TraceParts::default() };
        let traced = TracedText::read(engine, text, parts, |_| go_on())?;
        let rows: Vec<usize> =
            (progress.steps % settings.every..text.len()).step_by(settings.every).collect();
        let weights: Vec<&[f32]> = progress.targets.iter().map(|t| &t[0][..]).collect();
        let of_text = learn(&traced, settings, rotary, &weights, &rows, &mut gradients, go_on);
        tally.add(of_text.ok_or(EngineError::Interrupted)?);
    }
    let queries = tally.queries.max(1) as f64;
    // A layer's loss is the mean over its heads and queries; each layer has a matrix of its own.
    let layers = gradients.len().max(1) as f64;
    let mean = (layers / queries) as f32;
    let square = |g: &Vec<f32>| g.iter().map(|&g| f64::from(g * mean).powi(2)).sum::<f64>();
    let norm = gradients.iter().map(square).sum::<f64>().sqrt();
    if !norm.is_finite() {
        return Err(CalibrateError::BadOption(
            "the gradient is not finite; try a smaller rate or another dtype (f32)".into(),
        ));
    }
    let scale = mean * settings.optimizer.scale(norm);
    progress.steps += 1;
    let number = progress.steps as u64;
    progress.targets.par_iter_mut().zip(&gradients).for_each(|([weight, m, v], gradient)| {
        settings.optimizer.apply(number, scale, gradient, weight, (m, v));
    });
    let loss = tally.loss / queries;
    progress.losses.push(loss);
    let recall = tally.found as f64 / tally.wanted as f64;
    Ok(StepReport { step: progress.steps, loss, recall })
}

/// Adds the gradients of one text; `None` when the caller stopped.
fn learn(
    text: &TracedText,
    settings: &TrainSettings,
    rotary: &Rotary,
    weights: &[&[f32]],
    rows: &[usize],
    gradients: &mut [Vec<f32>],
    go_on: &(dyn Fn() -> bool + Sync),
) -> Option<Tally> {
    let head_len = text.head_dim * text.hidden;
    let of_target = |(target, gradient): (usize, &mut Vec<f32>)| {
        // A layer with a sliding window reads no blocks: nothing to learn.
        if text.windows[target].is_some() {
            return Some(Tally { queries: rows.len() * text.kv_heads, ..Tally::default() });
        }
        let grid = settings.grid;
        let lesson = Lesson { text, grid, rotary, target };
        let compressed = grid.compressed(text, target);
        let teacher = LayerTeacher::new(text, target, grid, settings.teacher, &compressed);
        let heads = gradient.par_chunks_exact_mut(head_len).enumerate();
        let of_heads = heads.map(|(head, gradient)| {
            let weight = &weights[target][head * head_len..][..head_len];
            let keys = (&teacher, &compressed[..]);
            go_on().then(|| lesson.study(weight, head, rows, keys, Some(gradient)))
        });
        let of_heads: Option<Vec<Tally>> = of_heads.collect();
        of_heads.map(sum)
    };
    let targets = gradients.par_iter_mut().enumerate().with_max_len(1);
    let of_targets: Option<Vec<Tally>> = targets.map(of_target).collect();
    of_targets.map(sum)
}

fn sum(tallies: Vec<Tally>) -> Tally {
    let mut all = Tally::default();
    tallies.into_iter().for_each(|t| all.add(t));
    all
}
