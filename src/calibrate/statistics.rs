//! Similarity statistics of texts, and their sums over texts.

use super::TracedText;
use super::mass::{LayerTile, tile_of};
use super::similarity::{Similarity, len, pair};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

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

/// The ratio of every pair of layers and heads for one tile, `[pairs, kv_heads of b, kv_heads of a]`.
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

    /// First tokens of the tiles whose lists leave something out: the others are 1 by definition.
    pub fn starts(&self, tokens: usize) -> Vec<usize> {
        let starts = (0..tokens).step_by(self.tile.max(1));
        starts.filter(|&s| self.keys(s) < s).collect()
    }
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

    /// Adds a text. `tick` hears of every tile and answers whether to go on; false: nothing was added, the caller
    /// stopped.
    pub(super) fn add(
        &mut self,
        text: &TracedText,
        tiles: Tiles,
        tick: &(dyn Fn() -> bool + Sync),
    ) -> bool {
        let of_tile = |&start: &usize| {
            let range = start..(start + tiles.tile).min(text.tokens);
            let k = tiles.keys(start);
            let of = |&l: &usize| tile_of(text, l, range.clone(), k);
            let of_layers: Vec<LayerTile> = self.layers.iter().map(of).collect();
            tick().then(|| ratios(&of_layers, self.kv_heads, tiles.own))
        };
        // Long tiles first: the last task to end is then a short one.
        let starts: Vec<usize> = tiles.starts(text.tokens).into_iter().rev().collect();
        let of_tiles: Option<Vec<Vec<f32>>> =
            starts.par_iter().with_max_len(1).map(of_tile).collect();
        let Some(of_tiles) = of_tiles else { return false };
        let objectives = |value: usize| {
            let mut column: Vec<f32> = of_tiles.iter().map(|t| t[value]).collect();
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
        assert!(s.add(&text, Tiles { own, ..TILES }, &|| true));
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
        assert_eq!(TILES.starts(13), [4, 8, 12]);
        let share = Tiles { keys: 1, permille: 500, ..TILES };
        assert_eq!((share.keys(8), share.starts(9)), (4, vec![4, 8]));
        let mut s = Statistics::new(vec![0], 2);
        assert!(!s.add(&TracedText::random(1, 1, 30), TILES, &|| false));
        assert_eq!(s, Statistics::new(vec![0], 2));
    }
}
