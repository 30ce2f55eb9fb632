//! How many blocks a decode attention is shared out to.

use super::driver::Limits;
use crate::backend::Result;

/// Shared memory that a block takes besides its own.
const RESERVED: usize = 1 << 10;
/// Most blocks on a multiprocessor that registers allow (`__launch_bounds__` of the kernels).
const RESIDENT: usize = 3;
/// Keys of a plane below which another one does not pay, and most planes.
const LEAST_KEYS: usize = 256;
const MOST_PLANES: usize = 64;

/// Pairs up to which listed keys are read by wide blocks: what a block loses where one pair ends and another begins
/// is the whole multiprocessor's loss there.
const FEW_PAIRS: usize = 16;

/// Pairs from which clusters read lists of any length; tiles of a warp up to which they do for fewer.
const ENOUGH_PAIRS: usize = 8;
const MANY_TILES: usize = 3;
/// Blocks of a cluster from which on narrow ones read several rounds.
const MANY_BLOCKS: usize = 6;
/// Tiles of a warp up to which one block reads a list where many pairs are read.
const SHORT_TILES: usize = 3;

/// A block of `decode.cuh`: warps of a narrow one, and bytes: what any takes, and a warp's ring.
pub(super) struct Block {
    pub warps: usize,
    pub fixed: usize,
    pub ring: usize,
}

impl Block {
    /// Shared memory of a block of `times` the warps.
    pub fn shared(&self, times: usize) -> usize {
        self.fixed + times * self.warps * self.ring
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
        return (rounds(2).min(l.sms), 2);
    }
    let resident = (l.shared_each / (block.shared(1) + RESERVED)).clamp(1, RESIDENT);
    (rounds(1).clamp(1, l.sms * resident), 1)
}

/// A cluster that reads a pair's list (`together` of `decode.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Cluster {
    /// Its blocks.
    pub blocks: usize,
    /// How many times the warps of a narrow block each has.
    pub times: usize,
}

/// The cluster of each of `pairs` pairs with lists of up to `keys` keys; None where sharing all lists out evenly is
/// better. `resident` says how many such clusters run at once.
///
/// Measured on an H100 (head dimension 128): one wide block a multiprocessor, in clusters that all run at once, is best
/// or near it for 8 to 64 pairs and 327 to 13,107 keys; for more pairs than multiprocessors, one wide block a pair where
/// two rounds of them are nearly full.
pub(super) fn together(
    l: &Limits,
    block: &Block,
    (pairs, keys): (usize, usize),
    mut resident: impl FnMut(Cluster) -> Result<usize>,
) -> Result<Option<Cluster>> {
    let wide = if block.shared(2) + RESERVED <= l.shared_each.min(l.shared) { 2 } else { 1 };
    let round = |times: usize| 16 * times * block.warps;
    let one = Cluster { blocks: 1, times: if keys <= round(1) { 1 } else { wide } };
    if l.cluster < 2
        || pairs == 0
        || pairs < ENOUGH_PAIRS && keys > l.cluster * MANY_TILES * round(wide)
    {
        return Ok(None);
    }
    if pairs > l.sms / 2 {
        let rounds = pairs.div_ceil(l.sms);
        let full = rounds <= 2 && 20 * pairs >= 19 * rounds * l.sms;
        return Ok(full.then_some(one));
    }
    // Where half of the multiprocessors have a block anyway, a few tiles take less time than blocks take to meet.
    if 3 * pairs >= l.sms && keys <= SHORT_TILES * round(wide) {
        return Ok(Some(one));
    }
    let most = l.cluster.min(l.sms / pairs).min(keys.div_ceil(round(1)));
    for blocks in (2..=most).rev() {
        // Narrow ones for few rounds: of many blocks only each has so few.
        let rounds = if blocks < MANY_BLOCKS { 1 } else { blocks - 1 };
        let few = keys <= blocks * round(1) * rounds;
        let cluster = Cluster { blocks, times: if few { 1 } else { wide } };
        if resident(cluster)? >= pairs {
            return Ok(Some(cluster));
        }
    }
    Ok(Some(one))
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
            holds(op, "panels = D % 64 == 0;");
            holds(op, "tile = panels ? 16 * D : query;");
            holds(op, "query = 16 * Padded<D>::value;");
            holds(op, "ring = stages * 2 * tile;");
            holds(op, &format!("#define DECODE_BLOCKS {RESIDENT}"));
        }
    }

    const BLOCK: Block = Block { warps: 4, fixed: 5376, ring: 16_384 };

    #[test]
    fn lists_get_clusters_that_all_run_at_once() {
        // A device with groups of 16 and 18 multiprocessors; a wide block takes one, three narrow ones do.
        let resident = |c: Cluster| {
            let each = if c.times == 1 { 3 } else { 1 };
            Ok(6 * (16 * each / c.blocks) + 2 * (18 * each / c.blocks))
        };
        let of = |pairs, keys| {
            let found = together(&Limits::H100, &BLOCK, (pairs, keys), resident).unwrap();
            found.map(|c| (c.blocks, c.times))
        };
        assert_eq!(of(8, 327), Some((6, 1)));
        assert_eq!(of(8, 1024), Some((8, 1)));
        assert_eq!(of(8, 3276), Some((8, 1)));
        assert_eq!(of(8, 13_107), Some((8, 2)));
        assert_eq!(of(16, 2048), Some((8, 1)));
        assert_eq!(of(32, 327), Some((4, 2)));
        assert_eq!(of(64, 327), Some((1, 2)));
        assert_eq!(of(64, 1024), Some((2, 2)));
        assert_eq!(of(64, 60), Some((1, 1)));
        assert_eq!(of(1, 1), Some((1, 1)));
        // Fewer clusters at once: smaller ones.
        let fewer = |c: Cluster| Ok(resident(c)? * 4 / 5);
        let c = together(&Limits::H100, &BLOCK, (32, 2048), fewer).unwrap();
        assert_eq!(c, Some(Cluster { blocks: 3, times: 2 }));
        // A block a pair, where they come out even.
        assert_eq!(of(128, 3276), Some((1, 2)));
        assert_eq!(of(256, 3276), Some((1, 2)));
        assert_eq!(of(160, 3276), None);
        assert_eq!(of(512, 3276), None);
        // Few pairs with long lists are shared out to all multiprocessors.
        assert_eq!(of(2, 3000), Some((8, 1)));
        assert_eq!(of(2, 13_107), None);
        assert_eq!(of(0, 10), None);
        let none = Limits { cluster: 1, ..Limits::H100 };
        assert_eq!(together(&none, &BLOCK, (8, 64), resident).unwrap(), None);
    }

    #[test]
    fn few_pairs_get_many_blocks_and_many_pairs_one_plane() {
        let (l, block) = (Limits::H100, BLOCK);
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
        assert_eq!(older(1000, 228 << 10, 227 << 10), (1000, 2));
        assert_eq!(splits(&l, 4096, 4096), 1);
        assert_eq!(splits(&l, 8, 131_072), 33);
        assert_eq!(splits(&l, 8, 300), 1);
        assert_eq!(splits(&l, 0, 0), 1);
    }
}
