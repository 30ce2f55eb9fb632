//! Choosing key dimensions and keeping the compact slice.

use super::{Cell, Layout, Output, Seq, floats, words};
use crate::backend::{
    Backend, CHANGED_WORDS, DIM_STATE_WORDS, DimMetric, RebuildSlice, Refresh, Result, SelectDims,
    key_stats_len,
};

/// One (sequence, KV head) of a [`SelectDims`] call: what it holds and what it should hold.
struct Choice {
    /// slot * kv_heads + KV head.
    at: usize,
    dims: Vec<u32>,
    state: [u32; DIM_STATE_WORDS],
    changed: [u32; CHANGED_WORDS],
    rho: f64,
    rho_best: f64,
    /// Smallest relative distance of a decision to its opposite.
    margin: f64,
}

/// `a_i` of the parameter struct, before units are summed.
fn importance(p: &SelectDims<'_>, q: &[f64], stats: Option<&[f64]>, count: usize) -> Vec<f64> {
    let d = p.head_dim;
    let mut a = vec![0.0; d];
    for q in q.chunks_exact(d) {
        for i in 0..d {
            let (even, odd) = (q[i / 2 * 2], q[i / 2 * 2 + 1]);
            a[i] += match p.metric {
                DimMetric::AbsQ | DimMetric::AbsQk => q[i].abs(),
                DimMetric::PairNorm | DimMetric::PairQk => (even * even + odd * odd).sqrt(),
            };
        }
    }
    let Some(stats) = stats.filter(|_| p.metric.needs_stats()) else { return a };
    let n = count as f64;
    let mean_sigma = |sum: f64, squares: f64| {
        let mean = sum / n;
        (mean, (squares / n - mean * mean).max(0.0).sqrt())
    };
    for (i, a) in a.iter_mut().enumerate() {
        *a *= if p.metric == DimMetric::AbsQk {
            mean_sigma(stats[i], stats[d + i]).1
        } else {
            let (mean, sigma) = mean_sigma(stats[2 * d + i / 2], stats[2 * d + d / 2 + i / 2]);
            mean + sigma
        };
    }
    a
}

fn choose(p: &SelectDims<'_>, s: &Seq, a: &[f64], old: &[u32], state: &[u32]) -> Choice {
    let units: Vec<f64> = a.chunks_exact(p.unit).map(|u| u.iter().sum()).collect();
    let keep = p.n_dims / p.unit;
    let mut order: Vec<usize> = (0..units.len()).collect();
    // Stable: ties to the smaller unit.
    order.sort_by(|x, y| units[*y].total_cmp(&units[*x]));
    let gap = order.get(keep).map_or(1.0, |next| {
        let last = units[order[keep - 1]];
        // Equal importances are a defined tie, not a close call.
        if last == units[*next] { 1.0 } else { (last - units[*next]) / last }
    });
    let mut best: Vec<u32> = order[..keep]
        .iter()
        .flat_map(|u| (u * p.unit..(u + 1) * p.unit).map(|i| i as u32))
        .collect();
    best.sort_unstable();
    let total: f64 = a.iter().sum();
    let covered = |dims: &[u32]| {
        let sum: f64 = dims.iter().map(|i| a[*i as usize]).sum();
        if total == 0.0 { 1.0 } else { sum / total }
    };
    let rho_best = covered(&best);
    let first = state[0] == 0;
    let mut c = Choice {
        at: 0,
        dims: old.to_vec(),
        state: [state[0], state[1], state[2], state[3]],
        changed: [0; CHANGED_WORDS],
        rho: if first { 0.0 } else { covered(old) },
        rho_best,
        margin: 1.0,
    };
    let due = first
        || match p.refresh {
            Refresh::Every { every: 0, .. } => false,
            Refresh::Every { every, phase } => s.step.wrapping_add(phase).is_multiple_of(every),
            Refresh::Adaptive { beta, min, max } => {
                let since = s.step.wrapping_sub(state[1]);
                let floor = f64::from(beta) * rho_best;
                c.margin = c.margin.min(((c.rho - floor) / floor).abs());
                since >= max || (since >= min && c.rho < floor)
            }
        };
    if !due {
        return c;
    }
    c.margin = c.margin.min(gap);
    if first {
        c.dims = best;
        (0..p.n_dims).for_each(|col| c.changed[col / 32] |= 1 << (col % 32));
    } else {
        let mut fresh = best.iter().filter(|i| !old.contains(i));
        for (col, dim) in c.dims.iter_mut().enumerate() {
            if !best.contains(dim)
                && let Some(new) = fresh.next()
            {
                *dim = *new;
                c.changed[col / 32] |= 1 << (col % 32);
                c.state[3] += 1;
            }
        }
    }
    c.state = [1, s.step, c.state[2] + 1, c.state[3]];
    c.rho = rho_best;
    c
}

fn choices(p: &SelectDims<'_>, dev: &dyn Backend) -> Result<Vec<Choice>> {
    let (q, dims, state) = (floats(dev, p.q)?, words(dev, p.dims)?, words(dev, p.state)?);
    let stats = p.stats.map(|t| floats(dev, t)).transpose()?;
    let len = key_stats_len(p.head_dim);
    let wide = p.heads / p.kv_heads * p.head_dim;
    let mut all = Vec::new();
    for s in Seq::read(dev, &p.seqs)? {
        for h in 0..p.kv_heads {
            let at = s.slot * p.kv_heads + h;
            let q = &q[s.q_start * p.heads * p.head_dim + h * wide..][..wide];
            let stats = stats.as_ref().map(|t| &t[at * len..][..len]);
            let a = importance(p, q, stats, s.kv_len);
            let state = &state[at * DIM_STATE_WORDS..][..DIM_STATE_WORDS];
            let old = &dims[at * p.n_dims..][..p.n_dims];
            all.push(Choice { at, ..choose(p, &s, &a, old, state) });
        }
    }
    Ok(all)
}

/// See [`SelectDims`]. Outputs: `dims`, `state`, `changed`, `coverage`.
pub fn select_dims<'a>(p: &SelectDims<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    const OP: &str = "select_dims";
    let mut dims = Output::exact(OP, "dims", p.dims);
    let mut state = Output::exact(OP, "state", p.state);
    let mut changed = Output::exact(OP, "changed", p.changed);
    let mut coverage = Output::new(OP, "coverage", p.coverage);
    for c in choices(p, dev)? {
        let wide = |words: &[u32]| words.iter().map(|w| f64::from(*w)).collect::<Vec<_>>();
        dims.put(c.at * p.n_dims, &wide(&c.dims));
        state.put(c.at * DIM_STATE_WORDS, &wide(&c.state));
        changed.put(c.at * CHANGED_WORDS, &wide(&c.changed));
        coverage.put(c.at * 2, &[c.rho, c.rho_best]);
    }
    Ok(vec![dims, state, changed, coverage])
}

/// Smallest relative distance by which a decision of this call was taken (which dimension is the last to be
/// kept, whether coverage has fallen): below the rounding of f32 sums the call has no single right answer.
pub fn decision_margin(p: &SelectDims<'_>, dev: &dyn Backend) -> Result<f64> {
    Ok(choices(p, dev)?.iter().fold(1.0, |m, c| m.min(c.margin)))
}

/// See [`RebuildSlice`].
pub fn rebuild_slice<'a>(p: &RebuildSlice<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (k, changed) = (floats(dev, p.cache.k)?, words(dev, p.changed)?);
    let (dims, at) = (words(dev, p.slice.dims)?, Layout::of(&p.cache));
    let n = p.slice.n_dims;
    let mut out = Output::exact("rebuild_slice", "slice", p.slice.data);
    for s in Seq::read(dev, &p.seqs)? {
        for h in 0..at.kv_heads {
            let head = s.slot * at.kv_heads + h;
            let mask = &changed[head * CHANGED_WORDS..][..CHANGED_WORDS];
            for col in (0..n).filter(|c| mask[c / 32] >> (c % 32) & 1 == 1) {
                let i = dims[head * n + col] as usize;
                for j in 0..s.kv_len {
                    let x = k[at.k(&s, h, j, i)];
                    out.cells[(head * p.slice.capacity + j) * n + col] = Cell::Is(x);
                }
            }
        }
    }
    Ok(vec![out])
}
