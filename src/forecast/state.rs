//! A training run on disk: weights, moments, and how far it is.

use super::train::TrainSettings;
use crate::calibrate::CalibrateError;
use crate::calibrate::state::{begin, failed, other, resume};
use std::path::Path;

/// Raised when the state changes its meaning.
const VERSION: &str = "forecast 1";

/// Everything that a step changes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Progress {
    /// Steps done.
    pub steps: usize,
    /// Mean loss of each.
    pub losses: Vec<f64>,
    /// Per target: weights, mean gradient, mean square.
    pub targets: Vec<[Vec<f32>; 3]>,
}

const PARTS: [&str; 3] = ["weight", "mean", "square"];

impl Progress {
    /// Before the first step.
    pub fn new(matrices: &[Vec<f32>]) -> Self {
        let target = |w: &Vec<f32>| [w.clone(), vec![0.0; w.len()], vec![0.0; w.len()]];
        Progress { steps: 0, losses: Vec::new(), targets: matrices.iter().map(target).collect() }
    }

    pub fn save(&self, path: &Path, settings: &TrainSettings) -> Result<(), CalibrateError> {
        let mut file = begin(VERSION, settings.line());
        file.about.insert("steps".into(), self.steps.to_string());
        file.f64s("losses", self.losses.clone());
        for (t, parts) in self.targets.iter().enumerate() {
            for (name, numbers) in PARTS.iter().zip(parts) {
                file.f32s(&format!("{name}.{t}"), vec![numbers.len()], numbers.clone());
            }
        }
        file.save(path).map_err(failed("write", path))
    }

    /// A run saved before; `None` when there is none.
    ///
    /// # Errors
    /// [`CalibrateError::OtherSettings`], [`CalibrateError::OtherRun`] when it is no run.
    pub fn load(
        path: &Path,
        settings: &TrainSettings,
        fresh: &Progress,
    ) -> Result<Option<Progress>, CalibrateError> {
        let found = resume(path, VERSION, "it is no training run", &settings.line())?;
        let Some(mut file) = found else { return Ok(None) };
        let steps: usize =
            file.word("steps").parse().map_err(|_| other(path, "its step is lost".into()))?;
        let missing = |name: &str| other(path, format!("it has no array {name}"));
        let losses = file.take_f64s("losses", steps).ok_or_else(|| missing("losses"))?;
        let mut targets = fresh.targets.clone();
        for (t, parts) in targets.iter_mut().enumerate() {
            for (name, numbers) in PARTS.iter().zip(parts) {
                let name = format!("{name}.{t}");
                let found = file.take_f32s(&name, numbers.len());
                *numbers = found.ok_or_else(|| missing(&name))?;
            }
        }
        Ok(Some(Progress { steps, losses, targets }))
    }
}
