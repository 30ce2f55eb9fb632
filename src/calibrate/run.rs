//! The run: texts through the engine, statistics to disk.

use super::state::{Texts, load, save, text_name};
use super::statistics::{OwnTile, Statistics, Tiles};
use super::{CalibrateError, TracedText};
use crate::engine::{Engine, EngineError, TraceParts};
use crate::select::Plan;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// What statistics depend on; statistics are continued only where all of it is the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Fingerprint of the model.
    pub model: String,
    /// Dtype of weights and cache.
    pub dtype: String,
    /// Tokens of a tile: queries whose lists are one (published: 32).
    pub tile: usize,
    /// Keys before the tile that a list holds at least (published: 32).
    pub keys: usize,
    /// Thousandths of the keys before the tile that it holds where that is more.
    pub permille: usize,
    /// Form of the ratio.
    pub own: OwnTile,
    /// Tokens generated after each text, greedily and densely, until the model ends its answer: each counts as a tile
    /// of its own (published: 32).
    #[serde(default)]
    pub generated: usize,
}

impl Settings {
    /// The published calibration of prompts with this engine: tiles of 32 tokens, 32 keys beside the tile itself.
    pub fn of(engine: &Engine) -> Self {
        Settings {
            model: engine.fingerprint().into(),
            dtype: format!("{}/{}", engine.decoder().weight_dtype(), engine.cache().shape().dtype),
            tile: 32,
            keys: 32,
            permille: 0,
            own: OwnTile::Right,
            generated: 0,
        }
    }

    fn tiles(&self) -> Tiles {
        Tiles { tile: self.tile, keys: self.keys, permille: self.permille, own: self.own }
    }
}

/// Reads `texts` and sums their statistics. With `state`, what is done is saved there after every text, and a run that
/// finds such a file goes on after it; the result is the same as without the interruption.
///
/// `progress` gets (tokens done, all), counting each text twice (reading, then comparing), and answers whether to go
/// on; it is called from several threads.
///
/// # Errors
/// [`EngineError::Interrupted`] when `progress` says so; [`CalibrateError::OtherSettings`] and [`CalibrateError::OtherRun`] for a state of
/// something else;
/// [`CalibrateError::BadOption`] for settings that leave nothing to compare.
pub fn gather(
    engine: &mut Engine,
    texts: &[Vec<u32>],
    settings: &Settings,
    state: Option<&Path>,
    progress: &(dyn Fn(u64, u64) -> bool + Sync),
) -> Result<Statistics, CalibrateError> {
    let tiles = settings.tiles();
    let bad = |what: &str| Err(CalibrateError::BadOption(what.into()));
    if settings.tile == 0 || settings.keys == 0 || settings.permille >= 1000 {
        return bad(
            "give tiles of at least one token, lists of at least one key and a share below 1000",
        );
    }
    if texts.iter().any(|t| tiles.of(t.len()).next().is_none()) {
        return bad("the lists would hold every key of a text; give longer texts or shorter lists");
    }
    let c = engine.decoder().config();
    let free = (0..c.n_layers).filter(|&l| c.windows[l].is_none());
    let empty = Statistics::new(free.collect(), c.n_kv_heads);
    if empty.layers.is_empty() {
        return bad("every layer of this model has a sliding window, so none can be sparse");
    }
    let names = Texts {
        tokens: texts.first().map_or(0, Vec::len),
        names: texts.iter().map(|t| text_name(t)).collect(),
    };
    let found = state.map(|path| load(path, settings, &names, &empty)).transpose()?.flatten();
    let mut sums = found.unwrap_or(empty);
    let work = |texts: &[Vec<u32>]| -> u64 { texts.iter().map(|t| 2 * t.len() as u64).sum() };
    let (all, mut before) = (work(texts), work(&texts[..sums.texts]));
    for text in &texts[sums.texts..] {
        let prompt = text.len();
        let reading = |n: usize| progress(before + n.min(prompt) as u64, all);
        let parts = TraceParts { residual: true, ..TraceParts::default() };
        let text = [&text[..], &answer(engine, text, settings.generated)?].concat();
        let traced = TracedText::read(engine, &text, parts, reading)?;
        let compared = AtomicU64::new(0);
        let share = prompt as u64 / tiles.count(prompt, text.len()) as u64;
        let tick = || {
            let done = share + compared.fetch_add(share, Ordering::Relaxed);
            progress(before + prompt as u64 + done, all)
        };
        if !sums.add(&traced, prompt, tiles, &tick) {
            return Err(EngineError::Interrupted.into());
        }
        before += 2 * prompt as u64;
        if let Some(path) = state {
            save(path, settings, &names, &sums)?;
        }
    }
    progress(all, all);
    Ok(sums)
}

/// What the model writes after a text with dense attention, at most `n` tokens, without the token that ends it.
fn answer(engine: &mut Engine, text: &[u32], n: usize) -> Result<Vec<u32>, EngineError> {
    if n == 0 {
        return Ok(Vec::new());
    }
    let plan = engine.plan().clone();
    engine.set_plan(Plan::dense(plan.layers.len()))?;
    let written = engine.greedy_tokens(text, n);
    engine.set_plan(plan)?;
    let mut written = written?;
    let ends = &engine.decoder().config().eos;
    let end = written.iter().position(|token| ends.contains(token));
    written.truncate(end.unwrap_or(n));
    Ok(written)
}
