//! How a matrix product is cut into tiles, one product of the GEMM crate each.
//!
//! The cut depends on the number of threads, the result does not: the GEMM crate sums in an order that the shared
//! dimension alone sets, unless a tile is small both ways (64 or less) or one wide. So tiles are larger than that
//! in one of the ways, or cut by shape alone.

use std::ops::Range;

/// Outputs and rows that the GEMM crate's widest inner kernel computes at once: tiles are multiples.
const OUTPUT_UNIT: usize = 48;
const ROW_UNIT: usize = 8;
/// Up to here tiles are one `OUTPUT_UNIT` wide, and the GEMM crate takes its path for small products.
const SMALL: usize = 64;
/// Units of the smallest tile of a larger product: more than `SMALL`.
const MIN_OUTPUT_UNITS: usize = 2;
const MIN_ROW_UNITS: usize = 9;
/// Weight elements of a tile, at most, where that is possible: they stay in a core's cache.
const PANEL: usize = 1 << 20;

/// A length cut into parts of nearly the same number of units. What is left over belongs to the last part, or is
/// one of its own where there are more parts than units.
#[derive(Clone, Copy)]
struct Cuts {
    total: usize,
    unit: usize,
    parts: usize,
}

impl Cuts {
    fn start(&self, i: usize) -> usize {
        let units = self.total / self.unit;
        match i {
            _ if i == self.parts => self.total,
            _ if self.parts > units => i * self.unit,
            _ => units * i / self.parts * self.unit,
        }
    }

    fn part(&self, i: usize) -> Range<usize> {
        self.start(i)..self.start(i + 1)
    }

    fn longest(&self) -> usize {
        let units = (self.total / self.unit).div_ceil(self.parts);
        units * self.unit + self.total % self.unit
    }
}

/// Tiles of `[rows, outputs]`.
pub(super) struct Tiles {
    rows: Cuts,
    outputs: Cuts,
}

impl Tiles {
    /// For a product over `inputs` on `threads` threads; `rows` and `outputs` are not 0.
    pub(super) fn choose(rows: usize, outputs: usize, inputs: usize, threads: usize) -> Tiles {
        let by = |total, unit, parts| Cuts { total, unit, parts };
        if rows <= SMALL {
            let narrow = by(outputs, OUTPUT_UNIT, outputs.div_ceil(OUTPUT_UNIT));
            return Tiles { rows: by(rows, ROW_UNIT, 1), outputs: narrow };
        }
        let most_rows = (rows / ROW_UNIT / MIN_ROW_UNITS).max(1);
        let most_outputs = (outputs / OUTPUT_UNIT / MIN_OUTPUT_UNITS).max(1);
        let least_outputs = (outputs * inputs).div_ceil(PANEL).min(most_outputs);
        // More tiles than that only cost.
        let enough = 8 * threads;
        let mut best = (f32::INFINITY, 1, least_outputs);
        for r in 1..=most_rows.min(threads.max(rows / 512)) {
            let most = most_outputs.min((enough / r).max(least_outputs));
            for o in least_outputs..=most {
                let tile = (by(rows, ROW_UNIT, r).longest(), by(outputs, OUTPUT_UNIT, o).longest());
                let cost = cost(tile, r * o, threads);
                if cost < best.0 {
                    best = (cost, r, o);
                }
            }
        }
        Tiles { rows: by(rows, ROW_UNIT, best.1), outputs: by(outputs, OUTPUT_UNIT, best.2) }
    }

    pub(super) fn len(&self) -> usize {
        self.rows.parts * self.outputs.parts
    }

    /// Rows and outputs of a tile; neighbours share their outputs.
    pub(super) fn get(&self, i: usize) -> (Range<usize>, Range<usize>) {
        (self.rows.part(i % self.rows.parts), self.outputs.part(i / self.rows.parts))
    }
}

/// Cycles for each of the inputs until the last of `tiles` tiles ends, about: multiply-adds at the speed of the
/// inner kernel, copies of both operands, widening. Half a tile on top stands for threads that do not end together.
fn cost((rows, outputs): (usize, usize), tiles: usize, threads: usize) -> f32 {
    let (m, n) = (rows as f32, outputs as f32);
    let tile = m * n / 22.0 + 0.6 * (m + n) + 0.3 * n;
    let late = if threads > 1 { 0.5 } else { 0.0 };
    (tiles.div_ceil(threads) as f32 + late) * tile
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_in_one_tile_of_an_allowed_size() {
        for (rows, outputs) in
            [(9, 1), (9, 49), (64, 3072), (65, 100), (512, 576), (513, 960), (2048, 49152)]
        {
            for threads in [1, 2, 7, 16, 200] {
                let tiles = Tiles::choose(rows, outputs, 576, threads);
                let mut seen = vec![0u8; rows * outputs];
                for i in 0..tiles.len() {
                    let (r, o) = tiles.get(i);
                    assert!(!r.is_empty() && !o.is_empty());
                    // One of the GEMM crate's two paths for all.
                    assert_eq!(rows <= SMALL, r.len() <= SMALL && o.len() <= SMALL);
                    for r in r {
                        seen[r * outputs + o.start..r * outputs + o.end]
                            .iter_mut()
                            .for_each(|s| *s += 1);
                    }
                }
                assert!(seen.iter().all(|&s| s == 1), "{rows} x {outputs}, {threads} threads");
            }
        }
    }

    #[test]
    fn all_threads_get_tiles() {
        for outputs in [576, 960, 3072] {
            let n = Tiles::choose(512, outputs, 576, 16).len();
            assert!((16..=128).contains(&n), "{n} tiles of 512 x {outputs}");
        }
        assert!(Tiles::choose(512, 192, 576, 16).len() >= 8);
    }
}
