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

/// Pairs up to which listed keys are read by wide blocks: what a block loses where one pair ends and another begins
/// is the whole multiprocessor's loss there.
const FEW_PAIRS: usize = 16;

/// Tiles of 16 listed keys that a warp of a cluster reads at most.
const CLUSTER_TILES: usize = 2;

/// A block of `decode.cuh`: warps of a narrow one, bytes of the queries' tile, and of a warp's ring.
pub(super) struct Block {
    pub warps: usize,
    pub tile: usize,
    pub ring: usize,
}

impl Block {
    /// Shared memory of a block of `times` the warps.
    pub fn shared(&self, times: usize) -> usize {
        self.tile + times * self.warps * self.ring
    }
}

/// Blocks that share out `keys` keys of each of `pairs` pairs (`decode.cuh`), and how many times the warps of a narrow
/// block they have.
///
/// As many as run at once; below two rounds of listed keys a block, merging takes longer than reading. One wide block
/// a multiprocessor leaves fewer parts to merge than several narrow ones.
pub(super) fn blocks(
    l: &Limits,
    block: &Block,
    (pairs, keys): (usize, usize),
    listed: bool,
) -> (usize, usize) {
    let rounds = |times: usize| {
        let per_pair = keys.div_ceil(16 * times * block.warps).max(1);
        pairs * if listed { per_pair.div_ceil(2) } else { per_pair }
    };
    let fits = block.shared(2) <= l.shared && block.shared(2) + RESERVED <= l.shared_each;
    let enough =
        if listed { pairs <= FEW_PAIRS && 2 * rounds(2) >= l.sms } else { rounds(2) >= l.sms };
    if fits && enough {
        return (rounds(2).min(l.sms).min(MOST_BLOCKS), 2);
    }
    let resident = (l.shared_each / (block.shared(1) + RESERVED)).clamp(1, RESIDENT);
    (rounds(1).clamp(1, (l.sms * resident).min(MOST_BLOCKS)), 1)
}

/// Blocks of the cluster that reads a pair's list (`together` of `decode.cuh`), None where lists are too long for that:
/// beyond [`CLUSTER_TILES`] tiles a warp, sharing out all lists evenly takes less time than it saves.
///
/// All clusters run at once.
pub(super) fn together(l: &Limits, block: &Block, pairs: usize, keys: usize) -> Option<usize> {
    let resident = (l.shared_each / (block.shared(1) + RESERVED)).clamp(1, RESIDENT) * l.sms;
    let round = 16 * block.warps;
    let most = l.cluster.min(resident / pairs.max(1));
    let blocks = keys.div_ceil(round).clamp(1, most.max(1));
    (l.cluster > 1 && most > 0 && keys.div_ceil(blocks * round) <= CLUSTER_TILES).then_some(blocks)
}

/// Planes of results that the caller merges, for kernels that do not share keys out.
pub(super) fn splits(l: &Limits, pairs: usize, keys: usize) -> usize {
    let wanted = (2 * l.sms).div_ceil(pairs.max(1));
    wanted.min(keys / LEAST_KEYS).clamp(1, MOST_PLANES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::launch::holds;

    #[test]
    fn kernels_have_the_same_limits() {
        for op in ["attend_dense", "attend_rows"] {
            holds(op, "warps = D > 128 ? 2 : 4;");
            holds(op, "stages = D <= 64 ? 4 : 2;");
            holds(op, &format!("const u32 MOST = {MOST_BLOCKS};"));
            holds(op, &format!("#define DECODE_BLOCKS {RESIDENT}"));
        }
    }

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
        let block = Block { warps: 4, tile: 4352, ring: 17_408 };
        let of = |pairs, keys, listed| blocks(&l, &block, (pairs, keys), listed);
        // A wide block a multiprocessor, also where less is listed than dense.
        assert_eq!(of(8, 131_072, false), (132, 2));
        assert_eq!(of(64, 32_768, false), (132, 2));
        assert_eq!(of(8, 3276, true), (104, 2));
        // Too few keys, or many lists: narrow ones.
        assert_eq!(of(8, 327, true), (24, 1));
        assert_eq!(of(1, 327, false), (6, 1));
        assert_eq!(of(64, 3276, true), (396, 1));
        assert_eq!(of(64, 327, true), (192, 1));
        assert_eq!(of(1, 0, true), (1, 1));
        // 164 KiB a multiprocessor hold a wide block, 100 KiB only a narrow one.
        let older = |sms, shared_each, shared| {
            let l = Limits { sms, shared_each, shared, ..l };
            blocks(&l, &block, (8, 131_072), false)
        };
        assert_eq!(older(108, 164 << 10, 163 << 10), (108, 2));
        assert_eq!(older(84, 100 << 10, 99 << 10), (84, 1));
        assert_eq!(older(1000, 228 << 10, 227 << 10), (512, 2));
        // A cluster a pair, where a warp has a tile or two and all clusters run at once.
        let with = |pairs, keys| together(&l, &block, pairs, keys);
        assert_eq!(with(64, 327), Some(6));
        assert_eq!(with(8, 327), Some(6));
        assert_eq!(with(1, 1), Some(1));
        assert_eq!(with(8, 1024), Some(8));
        assert_eq!(with(8, 1025), None);
        assert_eq!(with(128, 327), Some(3));
        assert_eq!(with(132, 500), None);
        assert_eq!(with(400, 10), None);
        assert_eq!(together(&Limits { cluster: 1, ..l }, &block, 8, 64), None);
        assert_eq!(splits(&l, 4096, 4096), 1);
        assert_eq!(splits(&l, 8, 131_072), 33);
        assert_eq!(splits(&l, 8, 300), 1);
        assert_eq!(splits(&l, 0, 0), 1);
    }
}
