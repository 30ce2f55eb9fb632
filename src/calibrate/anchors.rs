//! Where anchors go: a dynamic program over the layers.

/// Anchors and what they are worth.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// Layers that make lists, ascending; the first is layer 0.
    pub anchors: Vec<usize>,
    /// Sum over all layers of their similarity to their anchor.
    pub value: f64,
}

/// The best places for 1, 2 ... `most` anchors among the layers of `s` (`s[a][b]` for a <= b: what layer b is worth
/// when it takes the lists of layer a).
///
/// `V_1(i) = score(0, i)`, `V_m(i) = max over l < i of V_{m-1}(l) + score(l, i)` with `score(l, i)` the sum of
/// `s[l][l..i]`; ties go to the smallest l.
pub fn placements(s: &[Vec<f64>], most: usize) -> Vec<Placement> {
    let n = s.len();
    // sums[l][i] = score(l, l + i).
    let sums: Vec<Vec<f64>> = (0..n)
        .map(|l| {
            let mut sum = 0.0;
            let after = s[l][l..].iter().map(|x| {
                sum += x;
                sum
            });
            std::iter::once(0.0).chain(after).collect()
        })
        .collect();
    let score = |l: usize, i: usize| sums[l][i - l];
    // best[m - 1][i]: value of the first i layers with m anchors, and where the last of them is.
    let mut best: Vec<Vec<(f64, usize)>> = Vec::new();
    for m in 1..=most.min(n) {
        let row = (0..=n).map(|i| match best.last() {
            None => (score(0, i), 0),
            Some(fewer) => {
                let mut top = (f64::NEG_INFINITY, 0);
                for (l, before) in fewer.iter().enumerate().take(i).skip(m - 1) {
                    let value = before.0 + score(l, i);
                    if value > top.0 {
                        top = (value, l);
                    }
                }
                top
            }
        });
        let row = row.collect();
        best.push(row);
    }
    (0..best.len())
        .map(|m| {
            let (mut anchors, mut end) = (Vec::new(), n);
            for row in best[..=m].iter().rev() {
                end = row[end].1;
                anchors.push(end);
            }
            anchors.reverse();
            Placement { anchors, value: best[m][n].0 }
        })
        .collect()
}

/// The best places for `m` anchors; `None` unless 1 <= m <= layers.
pub fn place_anchors(s: &[Vec<f64>], m: usize) -> Option<Placement> {
    placements(s, m).into_iter().nth(m.checked_sub(1)?)
}

/// Index of the fewest anchors that are worth at least `share` of the last placement (all layers).
pub fn least_anchors(all: &[Placement], share: f64) -> Option<usize> {
    let goal = all.last()?.value * share;
    all.iter().position(|p| p.value >= goal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    fn vector() -> Vec<Vec<f64>> {
        vec![
            vec![1.0, 0.9, 0.6, 0.3, 0.2],
            vec![0.0, 1.0, 0.8, 0.5, 0.4],
            vec![0.0, 0.0, 1.0, 0.9, 0.7],
            vec![0.0, 0.0, 0.0, 1.0, 0.8],
            vec![0.0, 0.0, 0.0, 0.0, 1.0],
        ]
    }

    #[test]
    fn the_test_vector() {
        let found = placements(&vector(), 9);
        assert_eq!(found.len(), 5);
        assert_eq!(found[0].anchors, [0]);
        assert!((found[0].value - 3.0).abs() < 1e-12);
        assert_eq!(found[1].anchors, [0, 2]);
        assert!((found[1].value - 4.5).abs() < 1e-12);
        assert_eq!(found[2].anchors, [0, 2, 4]);
        assert!((found[2].value - 4.8).abs() < 1e-12);
        assert_eq!(found[4].anchors, [0, 1, 2, 3, 4]);
        assert_eq!(place_anchors(&vector(), 2), Some(found[1].clone()));
        assert_eq!((place_anchors(&vector(), 0), place_anchors(&vector(), 6)), (None, None));
    }

    /// Value of given anchors, straight from the definition.
    fn value(s: &[Vec<f64>], anchors: &[usize]) -> f64 {
        let anchor = |b: usize| anchors.iter().copied().filter(|&a| a <= b).max().unwrap();
        (0..s.len()).map(|b| s[anchor(b)][b]).sum()
    }

    #[test]
    fn no_other_set_of_anchors_is_better() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        for n in 1..9 {
            let s: Vec<Vec<f64>> =
                (0..n).map(|_| (0..n).map(|_| rng.random_range(0.0..1.0)).collect()).collect();
            let found = placements(&s, n);
            let mut best = vec![f64::NEG_INFINITY; n];
            for set in 0..1usize << (n - 1) {
                let anchors: Vec<usize> =
                    (0..n).filter(|&l| l == 0 || set >> (l - 1) & 1 == 1).collect();
                let m = anchors.len() - 1;
                best[m] = best[m].max(value(&s, &anchors));
            }
            for (p, best) in found.iter().zip(best) {
                assert!((p.value - best).abs() < 1e-9, "{n} layers: {p:?} against {best}");
                assert!((value(&s, &p.anchors) - best).abs() < 1e-9, "{n} layers: {p:?}");
            }
        }
    }

    #[test]
    fn ties_go_to_the_smallest_layer() {
        let flat = vec![vec![1.0; 4]; 4];
        let found = placements(&flat, 4);
        assert_eq!(found[2].anchors, [0, 1, 2]);
        assert_eq!(found[1].anchors, [0, 1]);
    }

    #[test]
    fn the_fewest_anchors_within_a_share() {
        let all = placements(&vector(), 5);
        assert_eq!(least_anchors(&all, 0.9), Some(1));
        assert_eq!(least_anchors(&all, 0.95), Some(2));
        assert_eq!(least_anchors(&all, 1.0), Some(4));
        assert_eq!(least_anchors(&[], 0.5), None);
    }
}
