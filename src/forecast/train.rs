//! The training run.

use super::learn::{Desk, Tally, study};
use super::pieces::Pieces;
use super::prepared::Prepared;
use super::rotary::Rotary;
use super::state::Progress;
use super::{AdamW, Decay, Forecast, Grid, Schedule, Start, Teacher};
use crate::calibrate::CalibrateError;
use crate::calibrate::state::text_name;
use crate::engine::{Engine, EngineError};
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
    /// The step size from step to step.
    pub schedule: Schedule,
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
    /// Bytes of prepared texts that are kept from step to step. A text takes, for each query that is learned from and
    /// each layer, its `4 hidden` bytes of input and per KV head some 20 bytes for each block of the budget; texts that
    /// do not fit are traced anew each time. The result is the same.
    #[serde(skip)]
    pub memory: u64,
}

/// Bytes of prepared texts that are kept unless said otherwise: 8 GiB.
const MEMORY: u64 = 8 << 30;

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
            schedule: Schedule::default(),
            memory: MEMORY,
        }
    }

    pub(super) fn line(&self) -> String {
        let kept = TrainSettings { save_every: 0, ..self.clone() };
        serde_json::to_string(&kept).unwrap_or_default()
    }

    fn check(&self, texts: &[Vec<u32>], steps: usize) -> Result<(), CalibrateError> {
        self.grid.check()?;
        let bad = |what: String| Err(CalibrateError::BadOption(what));
        if self.batch == 0 || self.every == 0 || self.save_every == 0 || texts.is_empty() {
            return bad(
                "give at least one text, one text a step, every query, and a save now and then"
                    .into(),
            );
        }
        const MOST: usize = 10_000_000;
        if steps > MOST || self.batch > MOST || self.every > MOST {
            return bad(format!("steps, texts a step and queries between two: at most {MOST}"));
        }
        let o = self.optimizer;
        let share = |b: f32| (0.0..1.0).contains(&b);
        let rates = o.rate > 0.0 && o.clip > 0.0 && o.eps > 0.0 && o.decay >= 0.0;
        if !(rates && share(o.betas.0) && share(o.betas.1)) {
            return bad("rates above 0 and decays below 1 are needed to learn".into());
        }
        if self.schedule.decay == Decay::Cosine && self.schedule.steps < steps {
            return bad(format!(
                "the cosine ends after {} steps, and {steps} are asked for",
                self.schedule.steps
            ));
        }
        let shortest = texts.iter().map(Vec::len).min().unwrap_or(0);
        self.grid.chooses_in(shortest)
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
/// [`EngineError::Interrupted`] when stopped; [`CalibrateError::OtherSettings`] for a state of another run;
/// [`CalibrateError::NoChoice`] for texts that fit the budget;
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
    settings.check(texts, steps)?;
    let start = Forecast::new(engine.checkpoint(), settings.start, settings.seed)?;
    let fresh = Progress::new(&start.matrices);
    let found = state.map(|path| Progress::load(path, settings, &fresh)).transpose()?.flatten();
    let mut progress = found.unwrap_or(fresh);
    let inv_freq = engine.decoder().config().inv_freq();
    let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
    let rotary = Rotary::new(&inv_freq, longest);
    let mut pieces = Pieces::new(texts, settings, progress.steps..steps);
    let mut gradients: Vec<Vec<f32>> =
        progress.targets.iter().map(|t| vec![0.0; t[0].len()]).collect();
    let mut saved = progress.steps;
    let outcome = loop {
        if progress.steps >= steps {
            break Ok(());
        }
        match step(engine, &mut pieces, settings, &rotary, &mut progress, &mut gradients, go_on) {
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
    pieces: &mut Pieces<'_>,
    settings: &TrainSettings,
    rotary: &Rotary,
    progress: &mut Progress,
    gradients: &mut [Vec<f32>],
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<StepReport, CalibrateError> {
    gradients.par_iter_mut().for_each(|g| g.fill(0.0));
    let weights: Vec<&[f32]> = progress.targets.iter().map(|t| &t[0][..]).collect();
    let mut tally = Tally::default();
    for i in 0..settings.batch {
        let piece = pieces.get(engine, (progress.steps, i), go_on)?;
        let of_piece = learn(&piece, rotary, &weights, gradients, go_on);
        tally.add(of_piece.ok_or(EngineError::Interrupted)?);
    }
    let queries = tally.queries.max(1) as f64;
    // A layer's loss is the mean over its heads and queries; each layer has a matrix of its own.
    let layers = gradients.len().max(1) as f64;
    let mean = (layers / queries) as f32;
    let square = |g: &Vec<f32>| g.iter().map(|&g| f64::from(g * mean).powi(2)).sum::<f64>();
    let squares: Vec<f64> = gradients.par_iter().map(square).collect();
    let norm = squares.iter().sum::<f64>().sqrt();
    if !norm.is_finite() {
        return Err(CalibrateError::BadOption(
            "the gradient is not finite; try a smaller rate or another dtype (f32)".into(),
        ));
    }
    let scale = mean * settings.optimizer.scale(norm);
    progress.steps += 1;
    let rate = settings.optimizer.rate * settings.schedule.share(progress.steps);
    let number = progress.steps as u64;
    let moved = progress.targets.par_iter_mut().zip(gradients);
    moved.for_each(|([weight, m, v], gradient)| {
        settings.optimizer.apply(number, rate, scale, gradient, weight, (m, v));
    });
    let loss = tally.loss / queries;
    progress.losses.push(loss);
    let recall = tally.found as f64 / tally.wanted as f64;
    Ok(StepReport { step: progress.steps, loss, recall })
}

/// Adds the gradients of one piece; `None` when the caller stopped.
fn learn(
    piece: &Prepared,
    rotary: &Rotary,
    weights: &[&[f32]],
    gradients: &mut [Vec<f32>],
    go_on: &(dyn Fn() -> bool + Sync),
) -> Option<Tally> {
    let head_len = piece.head_dim * piece.hidden;
    let heads = gradients.iter_mut().enumerate().flat_map(|(target, gradient)| {
        let of_head = move |(head, gradient)| (target, head, gradient);
        gradient.chunks_exact_mut(head_len).enumerate().map(of_head)
    });
    let heads: Vec<(usize, usize, &mut [f32])> = heads.collect();
    let of_head = |desk: &mut Desk, (target, head, gradient): (usize, usize, &mut [f32])| {
        let weight = &weights[target][head * head_len..][..head_len];
        go_on().then(|| study(piece, (target, head), weight, rotary, Some(gradient), desk))
    };
    let heads = heads.into_par_iter().with_max_len(1);
    let tallies: Option<Vec<Tally>> = heads.map_init(Desk::default, of_head).collect();
    let mut all = Tally::default();
    tallies?.into_iter().for_each(|t| all.add(t));
    Some(all)
}
