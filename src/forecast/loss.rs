//! The restricted divergence and its gradient.

/// Smallest probability of an entry.
const FLOOR: f64 = 1e-8;

/// Restricts a teacher to the entries `selected` and one bucket for all others: adds its shares to `shares`, the
/// bucket's last, and returns `sum t ln t` over them. Entries of `teacher` that nobody may select (where its grid
/// reaches further than the query) go to the bucket. A teacher restricted to nothing adds nothing.
pub(super) fn restrict(
    teacher: &[f32],
    selected: impl Iterator<Item = usize>,
    shares: &mut Vec<f32>,
) -> f64 {
    let start = shares.len();
    let mut rest = total(teacher);
    for j in selected {
        rest -= f64::from(teacher[j]);
        shares.push(teacher[j]);
    }
    if shares.len() == start {
        return 0.0;
    }
    let mut t: Vec<f64> = shares[start..].iter().map(|&t| t.into()).chain([rest]).collect();
    floor(&mut t);
    shares.truncate(start);
    shares.extend(t.iter().map(|&t| t as f32));
    // Of what is kept, so that a prediction of exactly these shares costs nothing.
    shares[start..].iter().map(|&t| f64::from(t) * f64::from(t).ln()).sum()
}

/// KL(teacher || prediction) over the entries `selected` and one bucket for all others; `scores` becomes its gradient.
///
/// `scores`: logits (already scaled) of what the query may see; the prediction is their softmax. `shares` and
/// `entropy`: the teacher on the same entries, from [`restrict`]. With p the softmax, t the teacher and R the bucket,
/// the gradient is `p_j - t_j` on a selected entry and `p_j - t_R p_j / p_R` on the others: the softmax divergence
/// with the teacher's rest spread as the prediction spreads it. (Where [`FLOOR`] lifts an entry, its own gradient is
/// left out.) `p` is room to work in.
pub(super) fn restricted_kl(
    (shares, entropy): (&[f32], f64),
    selected: impl Iterator<Item = usize> + Clone,
    scores: &mut [f32],
    p: &mut Vec<f64>,
) -> f64 {
    let Some((&t_rest, shares)) = shares.split_last() else {
        scores.fill(0.0);
        return 0.0;
    };
    crate::backend::cpu::host::softmax(scores);
    p.clear();
    p.extend(selected.clone().map(|j| f64::from(scores[j])));
    p.push(total(scores) - p.iter().sum::<f64>());
    floor(p);
    let p_rest = p[shares.len()];
    let each = shares.iter().chain([&t_rest]).zip(&*p);
    let cross: f64 = each.map(|(&t, p)| f64::from(t) * p.ln()).sum();
    let rest = (1.0 - f64::from(t_rest) / p_rest) as f32;
    scores.iter_mut().for_each(|s| *s *= rest);
    for (j, (&t, p)) in selected.zip(shares.iter().zip(&*p)) {
        scores[j] = (p - f64::from(t)) as f32;
    }
    entropy - cross
}

fn total(x: &[f32]) -> f64 {
    // Four sums: one would wait for itself.
    let (four, rest) = x.as_chunks::<4>();
    let mut sums = [0f64; 4];
    for x in four {
        sums.iter_mut().zip(x).for_each(|(s, &x)| *s += f64::from(x));
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x)).sum::<f64>()
}

fn floor(x: &mut [f64]) {
    x.iter_mut().for_each(|x| *x = x.max(FLOOR));
    let sum: f64 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The divergence, from a whole teacher.
    fn kl(teacher: &[f32], scores: &mut [f32], selected: &[usize]) -> f64 {
        let mut shares = Vec::new();
        let entropy = restrict(teacher, selected.iter().copied(), &mut shares);
        restricted_kl((&shares, entropy), selected.iter().copied(), scores, &mut Vec::new())
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let teacher = [0.3f32, 0.05, 0.2, 0.1, 0.25, 0.1];
        let scores = [0.4f32, -1.0, 0.3, 1.1, -0.2, 0.0];
        for selected in [&[0usize, 2, 4][..], &[3], &[0, 1, 2, 3, 4]] {
            let mut gradient = scores;
            kl(&teacher, &mut gradient, selected);
            for i in 0..scores.len() {
                let at = |step: f32| {
                    let mut moved = scores;
                    moved[i] += step;
                    kl(&teacher, &mut moved, selected)
                };
                let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
                let got = f64::from(gradient[i]);
                assert!((slope - got).abs() < 1e-4, "{selected:?} {i}: {slope} {got}");
            }
        }
    }

    #[test]
    fn nothing_is_learned_from_nothing_and_agreement_is_free() {
        let mut scores = [1.0, 2.0];
        assert_eq!(kl(&[0.5, 0.5], &mut scores, &[]), 0.0);
        assert_eq!(scores, [0.0; 2]);
        let mut same = [0.25f32.ln(), 0.5f32.ln(), 0.25f32.ln()];
        let loss = kl(&[0.25, 0.5, 0.25], &mut same, &[1]);
        assert!(loss.abs() < 1e-6 && same.iter().all(|g| g.abs() < 1e-6), "{loss} {same:?}");
        // The bucket only counts as a whole.
        let mut moved = [0.4f32.ln(), 0.5f32.ln(), 0.1f32.ln()];
        assert!(kl(&[0.25, 0.5, 0.25], &mut moved, &[1]).abs() < 1e-6);
    }

    #[test]
    fn the_divergence_by_hand() {
        // Shares 0.3, 0.5 and the rest 0.2 against 0.25, 0.25 and 0.5.
        let mut scores = [0.25f32.ln(), 0.25f32.ln(), 0.2f32.ln(), 0.3f32.ln(), 0.0];
        scores[4] = f32::NEG_INFINITY;
        let loss = kl(&[0.3, 0.5, 0.1, 0.05, 0.05], &mut scores, &[0, 1]);
        let want =
            0.3 * (0.3f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.25).ln() + 0.2 * (0.2f64 / 0.5).ln();
        assert!((loss - want).abs() < 1e-6, "{loss} {want}");
    }
}
