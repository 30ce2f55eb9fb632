//! Similarity statistics of texts, and their sums over texts.

use super::TracedText;
use super::mass::{LayerTile, step_of, tile_of};
use super::similarity::{Similarity, len, pair};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How a text's tiles become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The worst tile (as published).
    Min,
    /// The mean of the tiles.
    Mean,
    /// The fifth percentile of the tiles (nearest rank).
    Low,
}

impl Objective {
    /// All of them, in the order in which [`Statistics`] keeps their sums.
    pub const ALL: [Objective; 3] = [Objective::Min, Objective::Mean, Objective::Low];
    /// Share of tiles that may lie below [`Objective::Low`].
    const PERCENTILE: f64 = 0.05;

    /// Name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Objective::Min => "min",
            Objective::Mean => "mean",
            Objective::Low => "low",
        }
    }

    /// Of ratios in ascending order.
    fn of(self, sorted: &[f32]) -> f64 {
        let n = sorted.len();
        match self {
            Objective::Min => sorted.first().map_or(1.0, |&r| f64::from(r)),
            Objective::Mean => sorted.iter().map(|&r| f64::from(r)).sum::<f64>() / n.max(1) as f64,
            Objective::Low => {
                let rank = (Self::PERCENTILE * n as f64).ceil() as usize;
                sorted.get(rank.max(1) - 1).map_or(1.0, |&r| f64::from(r))
            }
        }
    }
}

/// Whose mass inside the tile is added to both sides of a ratio.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnTile {
    /// That of the head whose mass is compared.
    #[default]
    Right,
    /// That of the head with the number of the *anchor's* head: the slip in the published code, to regenerate its
    /// head maps.
    Published,
}

/// The ratio of every pair of layers and heads for one tile or generated token, `[pairs, kv_heads of b, kv_heads of a]`.
///
/// `r = (mass of b on a's list + own) / (mass of b on b's list + own)`, 1 where nothing has mass.
pub(super) fn ratios(tiles: &[LayerTile], kv_heads: usize, own: OwnTile) -> Vec<f32> {
    let mut out = vec![1.0; len(tiles.len(), kv_heads)];
    for (b, of_b) in tiles.iter().enumerate() {
        for h in 0..kv_heads {
            let mass = of_b.mass(h);
            let held = |list: &[u32]| list.iter().map(|&j| mass[j as usize]).sum::<f32>();
            let by_own = held(&of_b.chosen[h]);
            for (a, of_a) in tiles.iter().enumerate().take(b + 1) {
                for h1 in 0..kv_heads {
                    let inside = of_b.own[if own == OwnTile::Right { h } else { h1 }];
                    let all = by_own + inside;
                    if all > 0.0 {
                        out[(pair(a, b) * kv_heads + h) * kv_heads + h1] =
                            (held(&of_a.chosen[h1]) + inside) / all;
                    }
                }
            }
        }
    }
    out
}

/// Which tiles and lists a text's statistics are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiles {
    /// Tokens of a tile.
    pub tile: usize,
    /// Keys that a list holds at least.
    pub keys: usize,
    /// Thousandths of the earlier keys that it holds where that is more.
    pub permille: usize,
    /// Form of the ratio.
    pub own: OwnTile,
}

impl Tiles {
    /// Keys of a list where `earlier` keys lie before the tile.
    fn keys(&self, earlier: usize) -> usize {
        self.keys.max(earlier.saturating_mul(self.permille) / 1000)
    }

    /// Tiles of a prompt of `tokens` tokens whose lists leave something out: the others are 1 by definition.
    pub fn of(&self, tokens: usize) -> impl Iterator<Item = Range<usize>> {
        let starts = (0..tokens).step_by(self.tile.max(1));
        let left_out = starts.filter(|&s| self.keys(s) < s);
        left_out.map(move |s| s..(s + self.tile).min(tokens))
    }

    /// The same for the generated tokens at positions `prompt..tokens`.
    fn steps(&self, prompt: usize, tokens: usize) -> impl Iterator<Item = usize> {
        (prompt..tokens).filter(|&at| self.keys(at + 1) < at + 1)
    }

    /// Tiles of the prompt and generated tokens that say something.
    pub fn count(&self, prompt: usize, tokens: usize) -> usize {
        self.of(prompt).count() + self.steps(prompt, tokens).count()
    }
}

/// Whose attention is compared at once.
enum Part {
    Tile(Range<usize>),
    Step(usize),
}

/// Sums over texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// Numbers of the measured layers in the model: all without a sliding window.
    pub layers: Vec<usize>,
    /// KV heads.
    pub kv_heads: usize,
    /// Texts summed.
    pub texts: usize,
    /// Per objective of [`Objective::ALL`]: sums of [`Similarity`] values.
    pub(super) sums: [Vec<f64>; 3],
    /// Per measured layer: sum of the mean turn of the residual stream by attention.
    pub(super) change: Vec<f64>,
}

impl Statistics {
    /// Of no text.
    pub fn new(layers: Vec<usize>, kv_heads: usize) -> Self {
        let zeros = || vec![0.0; len(layers.len(), kv_heads)];
        let sums = [zeros(), zeros(), zeros()];
        let change = vec![0.0; layers.len()];
        Statistics { layers, kv_heads, texts: 0, sums, change }
    }

    /// Adds a text: tiles of its first `prompt` tokens and, one by one, the tokens generated after them. `tick` hears
    /// of every tile and token and answers whether to go on; false: nothing was added, the caller stopped.
    pub(super) fn add(
        &mut self,
        text: &TracedText,
        prompt: usize,
        tiles: Tiles,
        tick: &(dyn Fn() -> bool + Sync),
    ) -> bool {
        let of_part = |part: &Part| {
            let of = |&l: &usize| match part {
                Part::Tile(tile) => tile_of(text, l, tile.clone(), tiles.keys(tile.start)),
                Part::Step(at) => step_of(text, l, *at, tiles.keys(at + 1)),
            };
            let of_layers: Vec<LayerTile> = self.layers.iter().map(of).collect();
            tick().then(|| ratios(&of_layers, self.kv_heads, tiles.own))
        };
        let steps = tiles.steps(prompt, text.tokens).map(Part::Step);
        let mut parts: Vec<Part> = tiles.of(prompt).map(Part::Tile).chain(steps).collect();
        // Long ones first: the last task to end is then a short one.
        parts.reverse();
        let of_parts: Option<Vec<Vec<f32>>> =
            parts.par_iter().with_max_len(1).map(of_part).collect();
        let Some(of_parts) = of_parts else { return false };
        let objectives = |value: usize| {
            let mut column: Vec<f32> = of_parts.iter().map(|t| t[value]).collect();
            column.sort_unstable_by(f32::total_cmp);
            Objective::ALL.map(|o| o.of(&column))
        };
        let found: Vec<[f64; 3]> =
            (0..self.sums[0].len()).into_par_iter().map(objectives).collect();
        for (o, sums) in self.sums.iter_mut().enumerate() {
            sums.iter_mut().zip(&found).for_each(|(sum, of)| *sum += of[o]);
        }
        for (sum, &l) in self.change.iter_mut().zip(&self.layers) {
            *sum += text.layers[l].change / text.tokens.max(1) as f64;
        }
        self.texts += 1;
        true
    }

    /// Means over texts; `None` when there was no text.
    pub fn similarity(&self, objective: Objective) -> Option<Similarity> {
        let n = (self.texts > 0).then_some(self.texts as f64)?;
        let sums = Objective::ALL.iter().zip(&self.sums).find(|(o, _)| **o == objective)?.1;
        Similarity::new(self.layers.len(), self.kv_heads, sums.iter().map(|s| s / n).collect())
    }

    /// Importance of each measured layer: mean over texts and tokens of `1 - cos(x, x + attention output)`.
    pub fn importance(&self) -> Vec<f64> {
        self.change.iter().map(|c| c / self.texts.max(1) as f64).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TILES: Tiles = Tiles { tile: 4, keys: 3, permille: 0, own: OwnTile::Right };

    fn of_text(own: OwnTile) -> Statistics {
        let text = TracedText::random(7, 3, 30);
        let mut s = Statistics::new(vec![0, 1, 2], 2);
        assert!(s.add(&text, 30, Tiles { own, ..TILES }, &|| true));
        s
    }

    #[test]
    fn a_list_serves_its_own_layer_and_head_fully_and_no_list_serves_better() {
        let s = of_text(OwnTile::Right);
        for o in Objective::ALL {
            let sim = s.similarity(o).unwrap();
            for b in 0..3 {
                for h in 0..2 {
                    assert_eq!(sim.at(b, b, h, h), 1.0);
                    for a in 0..=b {
                        for h1 in 0..2 {
                            let r = sim.at(a, b, h, h1);
                            assert!(r > 0.0 && r <= 1.0 + 1e-6, "{a} {b} {h} {h1}: {r}");
                        }
                    }
                }
            }
        }
        let at = |o: Objective| s.similarity(o).unwrap().at(0, 2, 0, 1);
        assert!(
            at(Objective::Min) <= at(Objective::Low) && at(Objective::Low) < at(Objective::Mean)
        );
    }

    #[test]
    fn both_forms_agree_where_heads_keep_the_same_inside_the_tile() {
        assert_ne!(of_text(OwnTile::Right), of_text(OwnTile::Published));
        let text = TracedText::random(3, 2, 12);
        let mut tiles: Vec<LayerTile> = (0..2).map(|l| tile_of(&text, l, 8..12, 3)).collect();
        assert_ne!(ratios(&tiles, 2, OwnTile::Right), ratios(&tiles, 2, OwnTile::Published));
        tiles.iter_mut().for_each(|t| t.own = vec![2.0; 2]);
        assert_eq!(ratios(&tiles, 2, OwnTile::Right), ratios(&tiles, 2, OwnTile::Published));
    }

    /// Of one tile and one step, whose ratios are computed here from their masses.
    #[test]
    fn generated_tokens_count_like_tiles_without_an_own_part() {
        let text = TracedText::random(5, 2, 9);
        let mut s = Statistics::new(vec![0, 1], 2);
        assert!(s.add(&text, 8, TILES, &|| true));
        let of_tile: Vec<LayerTile> = (0..2).map(|l| tile_of(&text, l, 4..8, 3)).collect();
        let of_step: Vec<LayerTile> = (0..2).map(|l| step_of(&text, l, 8, 3)).collect();
        let held = |tile: &LayerTile, list: &[u32]| -> f32 {
            list.iter().map(|&j| tile.mass(0)[j as usize]).sum()
        };
        let list = |tiles: &[LayerTile], l: usize| tiles[l].chosen[0].clone();
        let tile = (held(&of_tile[1], &list(&of_tile, 0)) + of_tile[1].own[0])
            / (held(&of_tile[1], &list(&of_tile, 1)) + of_tile[1].own[0]);
        let step = held(&of_step[1], &list(&of_step, 0)) / held(&of_step[1], &list(&of_step, 1));
        assert!(tile != step && step > 0.0);
        let at = |o: Objective| s.similarity(o).unwrap().at(0, 1, 0, 0);
        assert_eq!(at(Objective::Min), f64::from(tile.min(step)));
        assert!((at(Objective::Mean) - f64::from(tile + step) / 2.0).abs() < 1e-7);
    }

    #[test]
    fn ratios_are_those_of_the_formula() {
        let tile = |earlier: &[f32], own: f32, chosen: &[u32]| LayerTile {
            earlier: earlier.to_vec(),
            own: vec![own],
            chosen: vec![chosen.to_vec()],
        };
        let tiles = [tile(&[3.0, 1.0, 0.0], 4.0, &[0]), tile(&[1.0, 1.0, 2.0], 4.0, &[2])];
        assert_eq!(ratios(&tiles, 1, OwnTile::Right), [1.0, 5.0 / 6.0, 1.0]);
    }

    #[test]
    fn objectives_of_sorted_ratios() {
        let sorted: Vec<f32> = (1..=40).map(|i| i as f32).collect();
        assert_eq!(Objective::Min.of(&sorted), 1.0);
        assert_eq!(Objective::Low.of(&sorted), 2.0);
        assert_eq!(Objective::Mean.of(&sorted), 20.5);
        assert_eq!(Objective::Low.of(&sorted[..3]), 1.0);
    }

    #[test]
    fn tiles_that_keep_everything_say_nothing() {
        let of = |t: Tiles, tokens| t.of(tokens).collect::<Vec<_>>();
        assert_eq!(of(TILES, 13), [4..8, 8..12, 12..13]);
        let share = Tiles { keys: 1, permille: 500, ..TILES };
        assert_eq!((share.keys(8), of(share, 9)), (4, vec![4..8, 8..9]));
        assert_eq!((TILES.count(13, 13), TILES.count(13, 15), TILES.count(2, 5)), (3, 5, 2));
        let mut s = Statistics::new(vec![0], 2);
        assert!(!s.add(&TracedText::random(1, 1, 30), 30, TILES, &|| false));
        assert_eq!(s, Statistics::new(vec![0], 2));
    }
}
