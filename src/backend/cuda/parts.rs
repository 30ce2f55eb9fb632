//! How many blocks a decode attention is shared out to.

use super::driver::Limits;

/// Shared memory that a block takes besides its own.
const RESERVED: usize = 1 << 10;
/// Most blocks (`MOST` of `decode.cuh`: parts of a pair whose weights fit).
const MOST_BLOCKS: usize = 512;
/// Most blocks on a multiprocessor that registers allow (`__launch_bounds__` of the kernels).
const RESIDENT: usize = 3;
/// Keys of a plane below which another one does not pay, and most planes.
const LEAST_KEYS: usize = 256;
const MOST_PLANES: usize = 64;

/// Blocks that share out the rounds of `round` keys of `pairs` pairs of at most `keys` keys (`decode.cuh`).
///
/// As many as run at once; below two rounds of listed keys a block, merging takes longer than reading.
pub(super) fn blocks(
    l: &Limits,
    shared: usize,
    (pairs, keys): (usize, usize),
    round: usize,
    listed: bool,
) -> usize {
    let resident = (l.shared_each / (shared + RESERVED)).clamp(1, RESIDENT);
    let per_pair = keys.div_ceil(round).max(1);
    let rounds = pairs * if listed { per_pair.div_ceil(2) } else { per_pair };
    rounds.clamp(1, (l.sms * resident).min(MOST_BLOCKS))
}

/// Planes of results that the caller merges, for kernels that do not share keys out.
pub(super) fn splits(l: &Limits, pairs: usize, keys: usize) -> usize {
    let wanted = (2 * l.sms).div_ceil(pairs.max(1));
    wanted.min(keys / LEAST_KEYS).clamp(1, MOST_PLANES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_pairs_get_many_blocks_and_many_pairs_one_plane() {
        let l = Limits {
            cc: (9, 0),
            sms: 132,
            shared: 232_448,
            shared_each: 233_472,
            cluster: 8,
            wgmma: true,
        };
        // 164 KiB a multiprocessor hold two such blocks, 100 KiB one.
        let of = |sms, shared_each| {
            blocks(&Limits { sms, shared_each, ..l }, 74_000, (8, 131_072), 64, true)
        };
        assert_eq!((of(108, 164 << 10), of(84, 100 << 10), of(1000, 228 << 10)), (216, 84, 512));
        assert_eq!(blocks(&l, 74_000, (8, 131_072), 64, false), 396);
        assert_eq!(blocks(&l, 74_000, (8, 131_072), 64, true), 396);
        assert_eq!(blocks(&l, 74_000, (1, 327), 64, false), 6);
        assert_eq!(blocks(&l, 74_000, (64, 327), 64, true), 192);
        assert_eq!(blocks(&l, 74_000, (1, 0), 64, true), 1);
        assert_eq!(blocks(&l, 120_000, (64, 32_768), 64, true), 132);
        assert_eq!(splits(&l, 4096, 4096), 1);
        assert_eq!(splits(&l, 8, 131_072), 33);
        assert_eq!(splits(&l, 8, 300), 1);
        assert_eq!(splits(&l, 0, 0), 1);
    }
}
