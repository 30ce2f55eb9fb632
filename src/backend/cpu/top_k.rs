//! Exact deterministic top-k: the `k` largest scores, as ascending token indices.
//!
//! Scores are compared by an unsigned image that keeps their order. Halving the range of images finds the `k`th
//! largest: each step counts the images from the middle up, a pass that vectors do at the speed of the cache, and
//! a count of exactly `k` ends the search early. Then one pass in token order takes everything above it and as many
//! equal ones as still fit (the smallest indices).

use std::cell::RefCell;

use super::memory::{Io, Parts};
use super::seqs::{Lists, sequences};
use super::{par, simd};
use crate::backend::{Result, TopK};

pub(super) fn run(io: &Io<'_>, p: &TopK<'_>) -> Result<()> {
    let scores = io.read::<f32>(p.scores)?;
    let indices = Parts::new(io.write::<u32>(p.indices)?);
    let counts = Parts::new(io.write::<u32>(p.counts)?);
    let seqs = sequences(io, &p.seqs)?;
    let among = p.among.map(|a| Lists::read(io, a)).transpose()?;
    // A score is looked at some twenty times, by vectors.
    let work = seqs.iter().map(|s| 4 * s.kv_len / p.unit * p.rows_per_seq).sum();
    par::tasks(seqs.len() * p.rows_per_seq, work, |row| {
        let kv_len = seqs[row / p.rows_per_seq].kv_len;
        let candidates = among.map(|lists| lists.of(row));
        let n = candidates.map_or(kv_len.div_ceil(p.unit), <[u32]>::len);
        // SAFETY: one row a task.
        let (indices, count) = unsafe { (indices.part(row * p.k, p.k), counts.part(row, 1)) };
        let indices = &mut indices[..p.k.min(p.share.of(kv_len))];
        let scores = &scores[row * p.stride..][..n];
        let n = IMAGES.with_borrow_mut(|images| select(scores, images, indices));
        count[0] = n as u32;
        if let Some(candidates) = candidates {
            indices[..n].iter_mut().for_each(|i| *i = candidates[*i as usize]);
        }
    });
    Ok(())
}

thread_local! {
    /// Images of the row that runs on this thread.
    static IMAGES: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// Writes the indices of the `out.len()` largest scores, ascending; returns how many there were.
fn select(scores: &[f32], images: &mut Vec<u32>, out: &mut [u32]) -> usize {
    images.resize(images.len().max(scores.len()), 0);
    let images = &mut images[..scores.len()];
    let largest = simd::images(scores, images);
    let (least, mut equal) = threshold(images, largest, out.len());
    let mut n = 0;
    for (j, &image) in images.iter().enumerate() {
        if n == out.len() {
            break;
        }
        // Written always, kept by counting: there is no branch to mispredict.
        out[n] = j as u32;
        let fits = (image == least) & (equal > 0);
        equal -= usize::from(fits);
        n += usize::from((image > least) | fits);
    }
    n
}

/// Image of the `k`th largest score and how many equal ones belong to the `k`. Where `k` or fewer may be chosen:
/// an image that they are all above.
fn threshold(images: &[u32], largest: u32, k: usize) -> (u32, usize) {
    // Image 0 is not a score.
    if simd::count_from(images, 1) <= k {
        return (0, 0);
    }
    // More than `k` are from `low` up, fewer than `k` from `high` up: `above` of them.
    let (mut low, mut high, mut above) = (1, largest + 1, 0);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match simd::count_from(images, middle) {
            n if n == k => return (middle - 1, 0),
            n if n > k => low = middle,
            n => (high, above) = (middle, n),
        }
    }
    (low, k - above)
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
        let n = select(scores, &mut vec![7; 3], &mut out);
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
        assert_eq!(select(&[1.0, 2.0, 1.0, 1.0], &mut Vec::new(), &mut out), 2);
        assert_eq!(out, [0, 1]);
    }
}
