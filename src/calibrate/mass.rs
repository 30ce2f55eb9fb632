//! The attention mass of a tile of queries on earlier keys, pooled after the softmax, and its largest keys.

use super::TracedText;
use crate::backend::cpu::host::{Matrix, product, softmax};
use std::ops::Range;

/// What one tile of queries, or one generated token, attends to in one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerTile {
    /// `[kv_heads, keys]`: probability of each key that a list may hold, summed over the tile's tokens and the query
    /// heads of the KV head. A tile's lists hold keys before it, a generated token's any key up to its own.
    pub earlier: Vec<f32>,
    /// `[kv_heads]`: the sum on the other keys, those inside the tile. With `earlier`, a KV head sums to tokens x query heads.
    pub own: Vec<f32>,
    /// Per KV head: the `k` of these keys with the most mass, ties to the smaller key; all where there are
    /// fewer. In no particular order.
    pub chosen: Vec<Vec<u32>>,
}

impl LayerTile {
    /// Mass of KV head `head` on the keys that a list may hold.
    pub fn mass(&self, head: usize) -> &[f32] {
        let keys = self.earlier.len() / self.own.len().max(1);
        &self.earlier[head * keys..][..keys]
    }
}

/// Numbers of the `k` largest values, ties to the smaller number; all where there are fewer.
pub(crate) fn largest(values: &[f32], k: usize) -> Vec<u32> {
    let mut order = Vec::new();
    largest_in(values, k, &mut order);
    order
}

/// [`largest`] into `order`.
pub(crate) fn largest_in(values: &[f32], k: usize, order: &mut Vec<u32>) {
    order.clear();
    order.extend(0..values.len() as u32);
    if k == 0 {
        order.clear();
    } else if k < order.len() {
        order.select_nth_unstable_by(k - 1, |&a, &b| {
            values[b as usize].total_cmp(&values[a as usize]).then(a.cmp(&b))
        });
        order.truncate(k);
    }
}

/// Keys that queries are compared with: key `j` of KV head `h` starts at `(j * kv_heads + h) * head_dim`.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    pub data: &'a [f32],
    /// Keys compared with, from the first.
    pub count: usize,
}

/// Probabilities of the query rows `rows` of one KV head's group, `[group, rows.len(), keys.count]` into `out`:
/// softmax of `q . k / sqrt(head_dim)` over the keys `seen(row)`, 0 elsewhere.
pub(crate) fn probabilities(
    text: &TracedText,
    (layer, head): (usize, usize),
    rows: &[usize],
    keys: Keys<'_>,
    seen: impl Fn(usize) -> Range<usize>,
    out: &mut Vec<f32>,
) {
    let (d, group, n, end) = (text.head_dim, text.group(), rows.len(), keys.count);
    // Every element is written below.
    out.resize(group * n * end, 0.0);
    if end == 0 {
        return;
    }
    let traced = &text.layers[layer];
    let scale = 1.0 / (d as f32).sqrt();
    let mut q = Vec::with_capacity(group * n * d);
    for g in 0..group {
        for &row in rows {
            let at = (row * text.heads + head * group + g) * d;
            q.extend(traced.q[at..at + d].iter().map(|x| x * scale));
        }
    }
    let columns = Matrix::columns(&keys.data[head * d..], text.kv_heads * d);
    product((group * n, end, d), out, end, false, Matrix::rows(&q, d), columns);
    for (i, p) in out.chunks_exact_mut(end).enumerate() {
        let range = seen(rows[i % n]);
        let last = range.end.min(end);
        let first = range.start.min(last);
        p[..first].fill(0.0);
        softmax(&mut p[first..last]);
        p[last..].fill(0.0);
    }
}

/// The tokens that the query at `position` sees.
pub(crate) fn causal(window: Option<usize>, position: usize) -> Range<usize> {
    window.map_or(0, |w| (position + 1).saturating_sub(w))..position + 1
}

/// What the queries `tile` of a text attend to in a layer, and the `k` keys that each KV head would keep.
pub fn tile_of(text: &TracedText, layer: usize, tile: Range<usize>, k: usize) -> LayerTile {
    let start = tile.start;
    pooled(text, layer, tile, start, k)
}

/// What the token at `position`, decoded alone, attends to in a layer: its own key is one of those that each KV head
/// chooses `k` from, and no mass is set aside.
pub fn step_of(text: &TracedText, layer: usize, position: usize, k: usize) -> LayerTile {
    pooled(text, layer, position..position + 1, position + 1, k)
}

/// The queries `tile`, whose lists hold keys before `keys`.
fn pooled(text: &TracedText, layer: usize, tile: Range<usize>, keys: usize, k: usize) -> LayerTile {
    let end = tile.end;
    let rows: Vec<usize> = tile.collect();
    let mut out = LayerTile { earlier: vec![0.0; text.kv_heads * keys], ..LayerTile::default() };
    let mut p = Vec::new();
    for head in 0..text.kv_heads {
        let seen = |row| causal(text.windows[layer], row);
        let all = Keys { data: &text.layers[layer].k, count: end };
        probabilities(text, (layer, head), &rows, all, seen, &mut p);
        let mass = &mut out.earlier[head * keys..][..keys];
        let mut own = 0.0;
        for row in p.chunks_exact(end.max(1)) {
            mass.iter_mut().zip(row).for_each(|(m, p)| *m += p);
            own += row[keys..].iter().sum::<f32>();
        }
        out.chosen.push(largest(mass, k));
        out.own.push(own);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_the_largest_and_ties_go_to_the_front() {
        let mut top = largest(&[1.0, 3.0, 3.0, 0.5, 3.0], 2);
        top.sort_unstable();
        assert_eq!(top, [1, 2]);
        assert_eq!(largest(&[1.0], 4), [0]);
        assert!(largest(&[1.0], 0).is_empty());
    }

    #[test]
    fn a_tile_has_the_mass_of_the_softmax_by_hand() {
        let mut text = TracedText::random(1, 1, 24);
        for window in [None, Some(5)] {
            text.windows[0] = window;
            let tile = tile_of(&text, 0, 16..24, 3);
            for head in 0..2 {
                // One probability after the other, in f64.
                let mut want = [0f64; 24];
                for row in 16..24 {
                    for q_head in [2 * head, 2 * head + 1] {
                        let logit = |key: usize| -> f64 {
                            let q = &text.layers[0].q[(row * 4 + q_head) * 8..][..8];
                            let k = &text.layers[0].k[(key * 2 + head) * 8..][..8];
                            let dot = q.iter().zip(k).map(|(a, b)| f64::from(a * b)).sum::<f64>();
                            (dot / 8f64.sqrt()).exp()
                        };
                        let seen = window.map_or(0, |w| row + 1 - w)..=row;
                        let sum: f64 = seen.clone().map(logit).sum();
                        seen.for_each(|key| want[key] += logit(key) / sum);
                    }
                }
                let close = |got: f32, want: f64| (f64::from(got) - want).abs() < 1e-4;
                let mass = tile.mass(head);
                assert!(mass.iter().zip(want).all(|(&got, want)| close(got, want)));
                assert!(close(tile.own[head], want[16..].iter().sum()));
                let total = mass.iter().sum::<f32>() + tile.own[head];
                assert!((total - 16.0).abs() < 1e-3, "8 tokens x 2 query heads: {total}");
                let least = tile.chosen[head].iter().map(|&j| mass[j as usize]).fold(9.0, f32::min);
                let above = mass.iter().filter(|&&m| m > least).count();
                assert!(tile.chosen[head].len() == 3 && above <= 2);
            }
        }
    }

    #[test]
    fn a_generated_token_chooses_from_all_keys_up_to_its_own() {
        let text = TracedText::random(2, 1, 20);
        let (step, tile) = (step_of(&text, 0, 19, 4), tile_of(&text, 0, 19..20, 4));
        for head in 0..2 {
            assert_eq!(step.own[head], 0.0);
            let (mass, earlier) = (step.mass(head), tile.mass(head));
            assert_eq!((mass.len(), earlier.len()), (20, 19));
            assert_eq!(mass[..19], *earlier);
            assert_eq!(mass[19], tile.own[head]);
            let mut by_mass: Vec<u32> = (0..20).collect();
            by_mass.sort_by(|&a, &b| mass[b as usize].total_cmp(&mass[a as usize]));
            let mut chosen = step.chosen[head].clone();
            chosen.sort_by_key(|j| by_mass.iter().position(|b| b == j));
            assert_eq!(chosen, by_mass[..4]);
        }
    }

    #[test]
    fn the_first_tile_has_only_itself() {
        let tile = tile_of(&TracedText::random(1, 1, 8), 0, 0..8, 3);
        assert!(tile.earlier.is_empty() && tile.chosen.iter().all(Vec::is_empty));
        assert!((tile.own[1] - 16.0).abs() < 1e-4);
    }
}
