//! The texts of a run: each is traced and prepared once, and kept while it is still asked for.

use super::TrainSettings;
use super::prepared::Prepared;
use crate::calibrate::{CalibrateError, TracedText};
use crate::engine::{Engine, EngineError, TraceParts};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// A text, and the first of its queries that are learned from.
type Piece = (usize, usize);

/// The piece of text `i` of a batch in a step: a text after the other, from a first query that shifts by one.
fn piece(settings: &TrainSettings, texts: usize, step: usize, i: usize) -> Piece {
    ((step * settings.batch + i) % texts, step % settings.every)
}

/// Prepared pieces, as many as there is memory for.
pub(super) struct Pieces<'a> {
    texts: &'a [Vec<u32>],
    settings: &'a TrainSettings,
    /// How often each piece is still asked for.
    asks: HashMap<Piece, usize>,
    kept: HashMap<Piece, Arc<Prepared>>,
    /// Bytes that may still be kept.
    room: u64,
}

impl<'a> Pieces<'a> {
    /// For the steps `steps` of a run.
    pub fn new(texts: &'a [Vec<u32>], settings: &'a TrainSettings, steps: Range<usize>) -> Self {
        let mut asks = HashMap::new();
        for step in steps {
            for i in 0..settings.batch {
                *asks.entry(piece(settings, texts.len(), step, i)).or_default() += 1;
            }
        }
        Pieces { texts, settings, asks, kept: HashMap::new(), room: settings.memory }
    }

    /// The `i`-th piece of a step.
    ///
    /// # Errors
    /// As [`TracedText::read`]; [`EngineError::Interrupted`] when `go_on` says no.
    pub fn get(
        &mut self,
        engine: &mut Engine,
        (step, i): (usize, usize),
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Arc<Prepared>, CalibrateError> {
        let piece = piece(self.settings, self.texts.len(), step, i);
        if let Some(asks) = self.asks.get_mut(&piece) {
            *asks = asks.saturating_sub(1);
        }
        if let Some(found) = self.kept.get(&piece).cloned() {
            if !self.asked(piece) {
                self.room += found.bytes();
                self.kept.remove(&piece);
            }
            return Ok(found);
        }
        let parts = TraceParts { normed: true, ..TraceParts::default() };
        let (text, settings) = (&self.texts[piece.0], self.settings);
        let traced = TracedText::read(engine, text, parts, |_| go_on())?;
        let prepare = |(_, first): Piece| {
            let rows = (first..text.len()).step_by(settings.every).collect();
            let made = Prepared::new(&traced, settings.grid, settings.teacher, rows, go_on);
            made.map(Arc::new).ok_or(EngineError::Interrupted)
        };
        let found = prepare(piece)?;
        self.keep(piece, &found);
        // The other queries of this text that will be asked for, while it is here.
        for other in (0..settings.every).map(|first| (piece.0, first)) {
            let wanted = self.asked(other) && !self.kept.contains_key(&other);
            if wanted && other != piece && found.bytes() <= self.room {
                self.keep(other, &prepare(other)?);
            }
        }
        Ok(found)
    }

    fn asked(&self, piece: Piece) -> bool {
        self.asks.get(&piece).is_some_and(|n| *n > 0)
    }

    /// Keeps a piece that will be asked for again, where there is room. What is kept stays: texts come in turn, so
    /// the piece that was not used for longest is the one that is needed next.
    fn keep(&mut self, piece: Piece, found: &Arc<Prepared>) {
        if self.asked(piece) && found.bytes() <= self.room {
            self.room -= found.bytes();
            self.kept.insert(piece, found.clone());
        }
    }
}
