//! How many blocks share the keys of one (sequence, KV head) pair in decode attention.
//!
//! The blocks of a cluster merge their results on chip; several clusters leave a plane each (a split), which costs
//! the launch of `merge`. The costs below are rough; they only have to rank the choices.

use super::driver::Limits;

/// Blocks of a decode kernel that one multiprocessor holds (shared memory allows three at head_dim 128).
const RESIDENT: usize = 3;
/// Keys that a block reads at a time, one tile a warp.
const ROUND: usize = 64;
/// Least time of a round in microseconds: the latency of dependent loads.
const LATENCY_US: f64 = 1.0;
/// What a block's round of 16-bit keys and values of head_dim 128 takes of the memory's time in microseconds.
const BLOCK_US: f64 = 0.011;
/// What a block takes before its first and after its last round: lookups, the ring, the merge.
const BLOCK_FIXED_US: f64 = 2.0;
/// Launch and work of `merge` in microseconds, and what one more split adds.
const MERGE_US: f64 = 3.0;
const SPLIT_US: f64 = 0.02;
/// Most blocks of one pair.
const MOST: usize = 512;

/// Blocks for each of `groups` pairs over `tokens` keys.
fn parts(l: &Limits, groups: usize, tokens: usize) -> usize {
    let (groups, slots) = (groups.max(1), l.sms * RESIDENT);
    let cost = |parts: usize| {
        let blocks = groups * parts;
        let rounds = tokens.div_ceil(parts).div_ceil(ROUND) as f64;
        let wave = |resident: usize| match resident {
            0 => 0.0,
            n => rounds * LATENCY_US.max(n as f64 * BLOCK_US) + BLOCK_FIXED_US,
        };
        let splits = parts.div_ceil(l.cluster);
        let merge = if splits > 1 { MERGE_US + SPLIT_US * splits as f64 } else { 0.0 };
        (blocks / slots) as f64 * wave(slots) + wave(blocks % slots) + merge
    };
    let most = tokens.div_ceil(ROUND).clamp(1, MOST);
    (1..=most).min_by(|a, b| cost(*a).total_cmp(&cost(*b))).unwrap_or(1)
}

/// Planes of results that the caller merges.
pub(super) fn splits(l: &Limits, groups: usize, tokens: usize) -> usize {
    parts(l, groups, tokens).div_ceil(l.cluster)
}

/// Blocks of a cluster when the caller merges `splits` planes.
pub(super) fn cluster(l: &Limits, groups: usize, tokens: usize, splits: usize) -> usize {
    parts(l, groups, tokens).div_ceil(splits.max(1)).clamp(1, l.cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(cluster: usize) -> Limits {
        Limits { cc: (9, 0), sms: 132, shared: 232_448, cluster, wgmma: true }
    }

    #[test]
    fn few_pairs_get_many_blocks_and_many_pairs_one() {
        for cluster_limit in [1, 8] {
            let l = limits(cluster_limit);
            for tokens in [1, 64, 327, 4096, 131_072] {
                for groups in [1, 3, 8, 64, 512] {
                    let s = splits(&l, groups, tokens);
                    let blocks = s * cluster(&l, groups, tokens, s);
                    assert!(blocks <= tokens.div_ceil(ROUND), "{groups} x {tokens}: {blocks}");
                    if tokens / groups >= 4096 {
                        assert!(groups * blocks >= 64, "{groups} x {tokens}: {blocks} blocks each");
                    }
                }
            }
            assert_eq!(splits(&l, 4096, 4096), 1);
        }
        // One launch where a cluster is enough.
        assert_eq!(splits(&limits(8), 64, 327), 1);
        assert!(cluster(&limits(8), 64, 327, 1) >= 2);
    }
}
