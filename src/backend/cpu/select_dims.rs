//! Chooses key dimensions by the query: the units of largest importance `a_i`; see [`SelectDims`] for the metrics,
//! the refresh rule and the state words.

use super::memory::Io;
use super::seqs::{Sequence, slotted};
use crate::backend::{
    CHANGED_WORDS, DIM_STATE_WORDS, DimMetric, Refresh, Result, SelectDims, key_stats_len,
};

pub(super) fn run(io: &Io<'_>, p: &SelectDims<'_>) -> Result<()> {
    let (d, hkv, n) = (p.head_dim, p.kv_heads, p.n_dims);
    let group = p.heads / hkv;
    let q = io.read::<f32>(p.q)?;
    let stats = p.stats.map(|s| io.read::<f32>(s)).transpose()?;
    let dims = io.write::<u32>(p.dims)?;
    let state = io.write::<u32>(p.state)?;
    let changed = io.write::<u32>(p.changed)?;
    let coverage = io.write::<f32>(p.coverage)?;
    // Few numbers per sequence: not worth other threads.
    for seq in slotted(io, &p.seqs, p.slots)?.iter().filter(|s| s.q_len > 0) {
        for h in 0..hkv {
            let at = seq.slot * hkv + h;
            let q = &q[(seq.q_start * p.heads + h * group) * d..][..group * d];
            let stats = stats.map(|s| &s[at * key_stats_len(d)..][..key_stats_len(d)]);
            let importance = importance(p.metric, q, d, stats, seq.kv_len);
            let held = Held {
                dims: &mut dims[at * n..][..n],
                state: &mut state[at * DIM_STATE_WORDS..][..DIM_STATE_WORDS],
                changed: &mut changed[at * CHANGED_WORDS..][..CHANGED_WORDS],
            };
            let rho = update(p, seq, &importance, held);
            coverage[at * 2..][..2].copy_from_slice(&rho);
        }
    }
    Ok(())
}

/// `a_i` of every dimension; `q` is `[group, d]`.
fn importance(
    metric: DimMetric,
    q: &[f32],
    d: usize,
    stats: Option<&[f32]>,
    count: usize,
) -> Vec<f32> {
    let mut a = vec![0.0; d];
    for q in q.chunks_exact(d) {
        for (i, a) in a.iter_mut().enumerate() {
            *a += match metric {
                DimMetric::AbsQ | DimMetric::AbsQk => q[i].abs(),
                DimMetric::PairNorm | DimMetric::PairQk => {
                    let (x, y) = (q[i & !1], q[i | 1]);
                    (x * x + y * y).sqrt()
                }
            };
        }
    }
    if let Some(stats) = stats {
        for (i, a) in a.iter_mut().enumerate() {
            *a *= match metric {
                DimMetric::AbsQ | DimMetric::PairNorm => 1.0,
                DimMetric::AbsQk => mean_sigma(stats[i], stats[d + i], count).1,
                DimMetric::PairQk => {
                    let pairs = &stats[2 * d..];
                    let (mean, sigma) = mean_sigma(pairs[i / 2], pairs[d / 2 + i / 2], count);
                    sigma + mean
                }
            };
        }
    }
    a
}

/// Mean and deviation from a sum and a sum of squares. In f64: their difference cancels.
fn mean_sigma(sum: f32, squares: f32, count: usize) -> (f32, f32) {
    let n = count as f64;
    let mean = f64::from(sum) / n;
    let variance = f64::from(squares) / n - mean * mean;
    (mean as f32, variance.max(0.0).sqrt() as f32)
}

/// What a (slot, KV head) keeps between calls.
struct Held<'a> {
    dims: &'a mut [u32],
    state: &'a mut [u32],
    changed: &'a mut [u32],
}

/// Chooses anew where the refresh rule says so; returns rho and rho_best.
fn update(p: &SelectDims<'_>, seq: &Sequence, a: &[f32], held: Held<'_>) -> [f32; 2] {
    let best = best(a, p.n_dims, p.unit);
    let covered = |dims: &[u32]| {
        let total: f32 = a.iter().sum();
        let sum: f32 = dims.iter().filter_map(|&i| a.get(i as usize)).sum();
        if total == 0.0 { 1.0 } else { sum / total }
    };
    let rho_best = covered(&best);
    held.changed.fill(0);
    let mut mark = |c: usize| held.changed[c / 32] |= 1 << (c % 32);

    if held.state[0] == 0 {
        (0..p.n_dims).for_each(&mut mark);
        held.dims.copy_from_slice(&best);
    } else {
        let rho = covered(held.dims);
        let since = seq.step.wrapping_sub(held.state[1]);
        let due = match p.refresh {
            Refresh::Every { every: 0, .. } => false,
            Refresh::Every { every, phase } => seq.step.wrapping_add(phase).is_multiple_of(every),
            Refresh::Adaptive { beta, min, max } => {
                since >= max || since >= min && rho < beta * rho_best
            }
        };
        if !due {
            return [rho, rho_best];
        }
        let old = held.dims.to_vec();
        let mut fresh = best.iter().filter(|i| !old.contains(i));
        for (c, dim) in held.dims.iter_mut().enumerate().filter(|(_, i)| !best.contains(i)) {
            if let Some(&new) = fresh.next() {
                *dim = new;
                mark(c);
                held.state[3] += 1;
            }
        }
    }
    held.state[0] = 1;
    held.state[1] = seq.step;
    held.state[2] += 1;
    [rho_best, rho_best]
}

/// Dimensions of the `n / unit` units with the largest sums, ascending; ties to the smaller unit.
fn best(a: &[f32], n: usize, unit: usize) -> Vec<u32> {
    let sums: Vec<f32> = a.chunks_exact(unit).map(|u| u.iter().sum()).collect();
    let mut order: Vec<usize> = (0..sums.len()).collect();
    order.sort_by(|&x, &y| sums[y].total_cmp(&sums[x])); // stable
    order.truncate(n / unit);
    order.sort_unstable();
    order.iter().flat_map(|u| (u * unit..(u + 1) * unit).map(|i| i as u32)).collect()
}
