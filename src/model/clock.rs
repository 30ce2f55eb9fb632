//! What a layer's attention of prompts spends its time on, for those who measure it.

use crate::backend::{Backend, BackendError};
use serde::Serialize;

/// Milliseconds of one layer, by what it does with the rows of prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PhaseTimes {
    /// Keys, values and what the method keeps of them go into the cache.
    pub append: f64,
    /// The Forecast that is made beside this layer: projection and rotation.
    pub forecast: f64,
    /// Attention to every token: dense layers, rows below a method's threshold, and the pass that an anchor takes the
    /// softmax of its rows from.
    pub dense: f64,
    /// Scores, pooling, forced tokens and top-k.
    pub select: f64,
    /// Attention to the chosen tokens.
    pub listed: f64,
}

impl PhaseTimes {
    /// All of them.
    pub fn total(&self) -> f64 {
        self.append + self.forecast + self.attention()
    }

    /// Selection and attention.
    pub fn attention(&self) -> f64 {
        self.dense + self.select + self.listed
    }

    /// Adds another layer's.
    pub fn add(&mut self, other: &PhaseTimes) {
        self.append += other.append;
        self.forecast += other.forecast;
        self.dense += other.dense;
        self.select += other.select;
        self.listed += other.listed;
    }

    /// Their mean over `n` layers, where these are the sum.
    pub fn over(&self, n: usize) -> PhaseTimes {
        let share = |ms: f64| ms / n.max(1) as f64;
        PhaseTimes {
            append: share(self.append),
            forecast: share(self.forecast),
            dense: share(self.dense),
            select: share(self.select),
            listed: share(self.listed),
        }
    }
}

/// Adds up the device time of every layer's phases while it runs; else it is in nobody's way.
#[derive(Debug, Default)]
pub(crate) struct Clock(Option<Vec<PhaseTimes>>);

impl Clock {
    /// Starts one for so many layers. The device waits between phases from now on.
    pub fn running(layers: usize) -> Clock {
        Clock(Some(vec![PhaseTimes::default(); layers]))
    }

    /// What was found, by layer.
    pub fn found(self) -> Vec<PhaseTimes> {
        self.0.unwrap_or_default()
    }

    /// Runs `f`, a phase of `layer`.
    pub fn time<E: From<BackendError>>(
        &mut self,
        b: &dyn Backend,
        layer: usize,
        phase: fn(&mut PhaseTimes) -> &mut f64,
        mut f: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(times) = self.0.as_mut().and_then(|all| all.get_mut(layer)) else { return f() };
        let mut outcome = Ok(());
        *phase(times) += b.time(&mut || {
            outcome = f();
            Ok(())
        })?;
        outcome
    }
}
