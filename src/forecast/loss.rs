//! The restricted divergence and its gradient.

/// Smallest probability of an entry.
const FLOOR: f64 = 1e-8;

/// KL(teacher || prediction) over the entries `selected` and one bucket for all others; `scores` becomes its gradient.
///
/// `scores`: logits (already scaled) of what the query may see; the prediction is their softmax. `teacher`:
/// probabilities, of more than that where its grid reaches further (that much goes to the bucket). With p the softmax, t the teacher restricted to the same entries, and R the bucket, the gradient is
/// `p_j - t_j` on a selected entry and `p_j - t_R p_j / p_R` on the others: the softmax divergence with the
/// teacher's rest spread as the prediction spreads it. (Where [`FLOOR`] lifts an entry, its own gradient is left out.)
pub(super) fn restricted_kl(teacher: &[f32], scores: &mut [f32], selected: &[u32]) -> f64 {
    if selected.is_empty() {
        scores.fill(0.0);
        return 0.0;
    }
    crate::backend::cpu::host::softmax(scores);
    let (mut t, mut p) = (Vec::new(), Vec::new());
    let (mut t_rest, mut p_rest) = (total(teacher), total(scores));
    for &j in selected {
        let (tj, pj) = (f64::from(teacher[j as usize]), f64::from(scores[j as usize]));
        t_rest -= tj;
        p_rest -= pj;
        t.push(tj);
        p.push(pj);
    }
    t.push(t_rest);
    p.push(p_rest);
    floor(&mut t);
    floor(&mut p);
    let loss = t.iter().zip(&p).map(|(t, p)| t * (t.ln() - p.ln())).sum();
    let last = selected.len();
    let rest = (1.0 - t[last] / p[last]) as f32;
    scores.iter_mut().for_each(|s| *s *= rest);
    for (&j, (t, p)) in selected.iter().zip(t.iter().zip(&p)) {
        scores[j as usize] = (p - t) as f32;
    }
    loss
}

fn total(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x)).sum()
}

fn floor(x: &mut [f64]) {
    x.iter_mut().for_each(|x| *x = x.max(FLOOR));
    let sum: f64 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let teacher = [0.3f32, 0.05, 0.2, 0.1, 0.25, 0.1];
        let scores = [0.4f32, -1.0, 0.3, 1.1, -0.2, 0.0];
        for selected in [&[0u32, 2, 4][..], &[3], &[0, 1, 2, 3, 4]] {
            let mut gradient = scores;
            restricted_kl(&teacher, &mut gradient, selected);
            for i in 0..scores.len() {
                let at = |step: f32| {
                    let mut moved = scores;
                    moved[i] += step;
                    restricted_kl(&teacher, &mut moved, selected)
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
        assert_eq!(restricted_kl(&[0.5, 0.5], &mut scores, &[]), 0.0);
        assert_eq!(scores, [0.0; 2]);
        let mut same = [0.25f32.ln(), 0.5f32.ln(), 0.25f32.ln()];
        let loss = restricted_kl(&[0.25, 0.5, 0.25], &mut same, &[1]);
        assert!(loss.abs() < 1e-6 && same.iter().all(|g| g.abs() < 1e-6), "{loss} {same:?}");
        // The bucket only counts as a whole.
        let mut moved = [0.4f32.ln(), 0.5f32.ln(), 0.1f32.ln()];
        assert!(restricted_kl(&[0.25, 0.5, 0.25], &mut moved, &[1]).abs() < 1e-6);
    }
}
