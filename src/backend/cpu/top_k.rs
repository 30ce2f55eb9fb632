//! Exact deterministic top-k by radix selection: the `k` largest scores, as ascending token indices.
//!
//! Scores are compared by an unsigned image that keeps their order. A histogram of its upper bits finds the
//! bucket that holds the `k`th largest, two more on the bucket's members find the value itself; then one pass
//! in token order takes everything above it and as many equal ones as still fit (the smallest indices).

use super::memory::{Io, Parts};
use super::par;
use super::seqs::sequences;
use crate::backend::{Result, TopK};

pub(super) fn run(io: &Io<'_>, p: &TopK<'_>) -> Result<()> {
    let scores = io.read::<f32>(p.scores)?;
    let indices = Parts::new(io.write::<u32>(p.indices)?);
    let counts = Parts::new(io.write::<u32>(p.counts)?);
    let seqs = sequences(io, &p.seqs)?;
    let work = seqs.iter().map(|s| s.kv_len * p.rows_per_seq).sum();
    par::tasks(seqs.len() * p.rows_per_seq, work, |row| {
        let scores = &scores[row * p.stride..][..seqs[row / p.rows_per_seq].kv_len];
        // SAFETY: one row a task.
        let (indices, count) = unsafe { (indices.part(row * p.k, p.k), counts.part(row, 1)) };
        count[0] = select(scores, indices) as u32;
    });
    Ok(())
}

/// Image of a score: larger for larger scores, equal for -0 and +0, and 0 for NaN and -infinity, which are
/// never chosen (no other score has image 0).
fn image(score: f32) -> u32 {
    if score.is_nan() || score == f32::NEG_INFINITY {
        return 0;
    }
    // Adding +0 turns -0 into +0.
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// Writes the indices of the `out.len()` largest scores, ascending; returns how many there were.
fn select(scores: &[f32], out: &mut [u32]) -> usize {
    let Some((least, mut equal)) = threshold(scores, out.len()) else {
        // Fewer than k: all that may be chosen.
        return take(scores, out, |image| image > 0);
    };
    take(scores, out, |image| {
        let fits = image == least && equal > 0;
        equal -= usize::from(fits);
        image > least || fits
    })
}

fn take(scores: &[f32], out: &mut [u32], mut wanted: impl FnMut(u32) -> bool) -> usize {
    let mut n = 0;
    for (j, &s) in scores.iter().enumerate() {
        if n < out.len() && wanted(image(s)) {
            out[n] = j as u32;
            n += 1;
        }
    }
    n
}

/// Image of the `k`th largest score and how many equal ones belong to the `k`; None when there are fewer.
fn threshold(scores: &[f32], k: usize) -> Option<(u32, usize)> {
    let mut counts = vec![0u32; 1 << 11];
    for &s in scores {
        counts[(image(s) >> 21) as usize] += 1;
    }
    // Image 0 is not a score.
    let none = scores.iter().filter(|&&s| image(s) == 0).count();
    counts[0] -= none as u32;
    let (high, left) = bucket(&counts, k)?;
    let members: Vec<u32> =
        scores.iter().map(|&s| image(s)).filter(|&i| i >> 21 == high && i > 0).collect();

    counts.fill(0);
    members.iter().for_each(|i| counts[(i >> 10 & 0x7ff) as usize] += 1);
    let (middle, left) = bucket(&counts, left)?;

    let prefix = high << 11 | middle;
    counts.fill(0);
    members.iter().filter(|&&i| i >> 10 == prefix).for_each(|i| counts[(i & 0x3ff) as usize] += 1);
    let (low, left) = bucket(&counts, left)?;
    Some((prefix << 10 | low, left))
}

/// The bucket that holds the `k`th largest, counted from the top, and its rank in there.
fn bucket(counts: &[u32], k: usize) -> Option<(u32, usize)> {
    let mut left = k;
    for (b, &n) in counts.iter().enumerate().rev() {
        if left <= n as usize {
            return Some((b as u32, left));
        }
        left -= n as usize;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition: sort by (score descending, index ascending), keep k, sort by index.
    fn sorted(scores: &[f32], k: usize) -> Vec<u32> {
        let ok = |j: &u32| scores[*j as usize] > f32::NEG_INFINITY;
        let mut all: Vec<u32> = (0..scores.len() as u32).filter(ok).collect();
        all.sort_by(|&a, &b| {
            let (x, y) = (scores[a as usize], scores[b as usize]);
            y.partial_cmp(&x).unwrap().then(a.cmp(&b))
        });
        all.truncate(k);
        all.sort_unstable();
        all
    }

    fn check(scores: &[f32], k: usize) {
        let mut out = vec![0; k];
        let n = select(scores, &mut out);
        assert_eq!(out[..n], sorted(scores, k), "k = {k}, {scores:?}");
    }

    #[test]
    fn agrees_with_a_sort() {
        let mut state = 7u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        for n in [1, 2, 63, 64, 65, 1000] {
            // Few distinct values (ties), and many.
            for levels in [1, 2, 7, 1 << 24] {
                let s: Vec<f32> = (0..n)
                    .map(|_| (next() % levels) as f32 / 64.0 - levels as f32 / 128.0)
                    .collect();
                for k in [1, 2, n / 2 + 1, n, n + 3] {
                    check(&s, k);
                }
            }
        }
    }

    #[test]
    fn special_values() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let s = [0.0, -0.0, nan, -inf, inf, 1e-45, -1e-45, -nan, f32::MIN, f32::MAX, -0.0, inf];
        for k in 1..=s.len() {
            check(&s, k);
        }
        check(&[-inf, nan], 2);
        check(&[], 2);
        check(&[f32::MIN; 5], 3);
    }

    #[test]
    fn ties_go_to_the_smaller_index() {
        let mut out = [0; 2];
        assert_eq!(select(&[1.0, 2.0, 1.0, 1.0], &mut out), 2);
        assert_eq!(out, [0, 1]);
    }
}
