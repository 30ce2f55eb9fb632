//! Compressed keys and blocks: what stands for which tokens.

use crate::calibrate::mass::largest_in;
use crate::calibrate::{CalibrateError, TracedText};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Sizes of compressed keys and blocks, and which blocks are always read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grid {
    /// Tokens of one compressed key, the mean of their keys.
    pub window: usize,
    /// Tokens between two compressed keys.
    pub stride: usize,
    /// Tokens of a block.
    pub block: usize,
    /// First blocks that are always read.
    pub init: usize,
    /// Blocks before the query's own that are always read, as is its own.
    pub local: usize,
    /// Blocks read in all.
    pub budget: usize,
}

impl Default for Grid {
    /// The published windows and blocks, with a budget for contexts of a few thousand tokens.
    fn default() -> Self {
        Grid { window: 32, stride: 16, block: 64, init: 1, local: 4, budget: 16 }
    }
}

impl Grid {
    /// Checks that the sizes fit each other.
    ///
    /// # Errors
    /// [`CalibrateError::BadOption`].
    pub fn check(&self) -> Result<(), CalibrateError> {
        let bad = |what: String| Err(CalibrateError::BadOption(what));
        let Grid { window, stride, block, .. } = *self;
        if stride == 0
            || window < stride
            || block < stride
            || block % stride != 0
            || block > 1 << 20
        {
            return bad(format!(
                "windows of {window} tokens every {stride} in blocks of {block}: a window is no shorter than the \
                 stride, and a block is a multiple of it"
            ));
        }
        let least = self.least();
        if self.budget < least {
            return bad(format!(
                "{} blocks are always read, which leaves nothing to choose of a budget of {}; give at least {least}",
                least - 1,
                self.budget
            ));
        }
        Ok(())
    }

    /// The smallest budget in which something is left to choose.
    pub fn least(&self) -> usize {
        self.init.saturating_add(self.local).saturating_add(2)
    }

    /// The largest budget that leaves something to choose in a text of `tokens` tokens.
    pub fn most(&self, tokens: usize) -> usize {
        tokens.saturating_sub(1) / self.block.max(1)
    }

    /// Checks that some query of a text of `tokens` tokens has more blocks than the budget.
    ///
    /// # Errors
    /// [`CalibrateError::NoChoice`].
    pub fn chooses_in(&self, tokens: usize) -> Result<(), CalibrateError> {
        let (Grid { block, budget, .. }, least) = (*self, self.least());
        match tokens > block.saturating_mul(budget) {
            true => Ok(()),
            false => Err(CalibrateError::NoChoice { tokens, block, budget, least }),
        }
    }

    /// Complete windows of a text.
    pub fn windows(&self, tokens: usize) -> usize {
        if tokens < self.window { 0 } else { (tokens - self.window) / self.stride + 1 }
    }

    /// Blocks that the query may choose beside those that are always read.
    pub fn free(&self) -> usize {
        self.budget - self.init - self.local - 1
    }

    /// Blocks that a query at `position` chooses from: neither first, nor local, nor in the future.
    pub fn candidates(&self, position: usize) -> Range<usize> {
        let end = (position / self.block).saturating_sub(self.local);
        self.init.min(end)..end
    }

    /// Windows whose first token a query at `position` sees.
    pub fn started(&self, position: usize) -> usize {
        position / self.stride + 1
    }

    /// Windows of the block itself: those that start in it.
    pub fn of_block(&self, block: usize, windows: usize) -> Range<usize> {
        let r = self.block / self.stride;
        (r * block).min(windows)..(r * block + r).min(windows)
    }

    /// [`Grid::of_block`] of several blocks.
    pub(super) fn of_blocks(
        self,
        blocks: &[u32],
        windows: usize,
    ) -> impl Iterator<Item = usize> + Clone {
        blocks.iter().flat_map(move |&b| self.of_block(b as usize, windows))
    }

    /// Score of a block: the largest of the windows that overlap it, of those in `scores`.
    pub fn block_score(&self, scores: &[f32], block: usize) -> f32 {
        let r = self.block / self.stride;
        let before = (self.window - 1) / self.stride;
        let range = (r * block).saturating_sub(before)..(r * block + r).min(scores.len());
        let inside = scores.get(range).unwrap_or_default();
        inside.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// The free picks of a query at `position` by window scores: blocks in no particular order, ties to the smaller.
    pub fn pick(&self, scores: &[f32], position: usize) -> Vec<u32> {
        self.pick_in(scores, position, &mut Picker::default()).to_vec()
    }

    /// [`Grid::pick`] without an allocation.
    pub(super) fn pick_in<'a>(
        &self,
        scores: &[f32],
        position: usize,
        room: &'a mut Picker,
    ) -> &'a [u32] {
        let Picker { scores: of_blocks, picks } = room;
        let blocks = self.candidates(position);
        let first = blocks.start as u32;
        of_blocks.clear();
        of_blocks.extend(blocks.map(|b| self.block_score(scores, b)));
        largest_in(of_blocks, self.free(), picks);
        picks.iter_mut().for_each(|b| *b += first);
        picks
    }

    /// Compressed keys of a layer, `[windows, kv_heads, head_dim]`: means over `window` tokens, every `stride`.
    pub(super) fn compressed(&self, text: &TracedText, layer: usize) -> Vec<f32> {
        means(text, layer, self.windows(text.tokens), self.window, self.stride)
    }
}

/// Room that picks are made in.
#[derive(Default)]
pub(super) struct Picker {
    scores: Vec<f32>,
    picks: Vec<u32>,
}

/// Means of the keys of `window` tokens each, every `stride` tokens, `count` of them.
pub(super) fn means(
    text: &TracedText,
    layer: usize,
    count: usize,
    window: usize,
    stride: usize,
) -> Vec<f32> {
    let width = text.kv_heads * text.head_dim;
    let keys = &text.layers[layer].k;
    let mut out = vec![0.0; count * width];
    for (j, mean) in out.chunks_exact_mut(width).enumerate() {
        for key in keys[j * stride * width..][..window * width].chunks_exact(width) {
            mean.iter_mut().zip(key).for_each(|(m, k)| *m += k);
        }
        mean.iter_mut().for_each(|m| *m /= window as f32);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid { window: 32, stride: 16, block: 64, init: 1, local: 2, budget: 6 };

    #[test]
    fn windows_and_blocks_of_a_text() {
        assert_eq!((GRID.windows(31), GRID.windows(32), GRID.windows(64)), (0, 1, 3));
        assert_eq!(GRID.free(), 2);
        assert_eq!(GRID.candidates(64 * 3), 1..1);
        assert_eq!(GRID.candidates(64 * 6 + 63), 1..4);
        assert_eq!(GRID.candidates(0), 0..0);
        assert_eq!(GRID.started(15), 1);
        assert_eq!((GRID.of_block(1, 9), GRID.of_block(2, 9)), (4..8, 8..9));
    }

    /// One token more than the budget holds, and its query may choose.
    #[test]
    fn a_text_longer_than_the_budget_leaves_a_choice() {
        for tokens in 1..64 * 8 {
            let choice = (0..tokens).any(|row| GRID.candidates(row).len() > GRID.free());
            assert_eq!(GRID.chooses_in(tokens).is_ok(), choice, "{tokens} tokens");
        }
    }

    #[test]
    fn a_block_scores_as_the_best_window_that_overlaps_it() {
        // Windows 3 (straddles the left edge) to 7 (straddles the right one) overlap block 1.
        let mut scores = vec![0.0; 12];
        for (window, found) in [(2, false), (3, true), (4, true), (7, true), (8, false)] {
            scores[window] = 1.0;
            assert_eq!(GRID.block_score(&scores, 1) == 1.0, found, "window {window}");
            scores[window] = 0.0;
        }
        assert_eq!(GRID.block_score(&scores[..2], 1), f32::NEG_INFINITY);
        assert_eq!(GRID.block_score(&[5.0, 0.0], 0), 5.0);
    }

    #[test]
    fn picks_are_the_best_candidates() {
        let mut scores = vec![0.0; 4 * 8];
        (scores[4 * 3 + 1], scores[4 * 4 + 1], scores[4 * 7]) = (1.0, 2.0, 9.0);
        let mut picks = GRID.pick(&scores, 64 * 7);
        picks.sort_unstable();
        assert_eq!(picks, [3, 4], "block 7 is the query's own");
    }

    #[test]
    fn grids_that_cannot_be_are_refused() {
        GRID.check().unwrap();
        Grid::default().check().unwrap();
        for bad in [
            Grid { stride: 0, ..GRID },
            Grid { window: 8, ..GRID },
            Grid { block: 40, ..GRID },
            Grid { budget: 4, ..GRID },
            Grid { local: usize::MAX, ..GRID },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn compressed_keys_are_means() {
        let text = TracedText::random(2, 1, 10);
        let out = means(&text, 0, 3, 4, 3);
        let key = |t: usize| text.layers[0].k[t * 16 + 5];
        let want = (key(3) + key(4) + key(5) + key(6)) / 4.0;
        assert!((out[16 + 5] - want).abs() < 1e-6);
        assert_eq!(out.len(), 3 * 16);
    }
}
