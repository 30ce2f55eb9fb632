//! Exact top-k.

use super::CudaBackend;
use super::args::{SeqsArg, word};
use super::driver::Limits;
use super::launch::{Args, Shape};
use crate::backend::{Force, Result, TopK};
use bytemuck::{Pod, Zeroable};

/// `TopKArgs` of `top_k.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TopKArgs {
    scores: u64,
    seqs: SeqsArg,
    indices: u64,
    counts: u64,
    among: u64,
    among_counts: u64,
    masks: u64,
    stride: u64,
    rows_per_seq: u32,
    k: u32,
    unit: u32,
    permille: u32,
    at_least: u32,
    among_k: u32,
    span: u32,
    sinks: u32,
    recent: u32,
    room: u32,
}

// Constants of `digits.cuh` and `candidates.cuh`.
const THREADS: usize = 1024;
/// Bytes of four histograms of 2048 bins.
const HISTOGRAMS: usize = 4 * 2048 * 4;
/// Scores that the block's warps load at a time, and those that its registers hold.
const ROUND: usize = 128 * THREADS / 32;
const TILE: usize = 8 * ROUND;
/// Bytes of a score, and of its place in a warp's list.
const SCORE: usize = 4;
const ENTRY: usize = 2;
/// More shared memory than the kernel declares.
const DECLARED: usize = 1024;

/// Bytes of a candidate: its image and its number.
const CANDIDATE: usize = 8;

/// How a row is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Blocks {
    blocks: usize,
    /// Scores of a block.
    span: usize,
    /// They stay in registers and shared memory.
    cached: bool,
}

impl Blocks {
    fn new(n: usize, blocks: usize, cached: bool) -> Self {
        Blocks { blocks, span: n.div_ceil(blocks).next_multiple_of(64), cached }
    }

    /// For `rows` rows of `n` scores; `resident` says how many rows are worked on at once.
    fn of(
        l: &Limits,
        (rows, n): (usize, usize),
        mut resident: impl FnMut(Blocks) -> Result<usize>,
    ) -> Result<Self> {
        let room = l.shared.saturating_sub(HISTOGRAMS + DECLARED) / (SCORE + ENTRY);
        let most = (room / ROUND * ROUND).min(TILE);
        let fewest = if most == 0 { usize::MAX } else { n.div_ceil(most) };
        // As few as hold the row: blocks of a cluster wait for each other after every histogram, which takes longer than
        // what one of them has to do (8 rows of 32,768 scores on an H100: 8 us, 13 with two blocks each).
        if fewest <= l.cluster {
            let held = Blocks::new(n, fewest, true);
            if fewest == 1 || resident(held)? >= rows {
                return Ok(held);
            }
        }
        // More clusters than run at once take longer than blocks that stream more of a row each.
        for blocks in (2..=l.cluster.min(fewest)).rev() {
            let streamed = Blocks::new(n, blocks, false);
            if resident(streamed)? >= rows {
                return Ok(streamed);
            }
        }
        Ok(Blocks::new(n, 1, false))
    }

    fn entry(self) -> String {
        let kind = if self.cached { "cached" } else { "streamed" };
        format!("top_k_{kind}{}", if self.blocks > 1 { "_cluster" } else { "" })
    }

    /// What shared memory holds beside the histograms: all scores and lists, or candidates, else lists of a tile.
    fn own(self, l: &Limits) -> usize {
        match self.cached {
            true => self.span.next_multiple_of(ROUND) * (SCORE + ENTRY),
            false => l.shared.saturating_sub(HISTOGRAMS + DECLARED).max(TILE * ENTRY),
        }
    }

    /// The launch over `rows` rows of each of `n` sequences.
    fn shape(self, l: &Limits, rows: usize, n: usize) -> Shape {
        let shape = Shape::new([self.blocks, rows, n], THREADS);
        shape.shared(HISTOGRAMS + self.own(l)).cluster(self.blocks)
    }
}

impl CudaBackend {
    /// `forced`: what runs before it, of the same scores and of all tokens.
    pub(super) fn top_k_op(&self, p: &TopK<'_>, forced: Option<&Force<'_>>) -> Result<()> {
        const OP: &str = "top_k";
        p.check()?;
        let n = p.among.map_or(p.seqs.max_kv.div_ceil(p.unit), |a| a.k).max(1);
        let rows = p.rows_per_seq * p.seqs.n;
        let l = &self.limits;
        let of = Blocks::of(l, (rows, n), |b| {
            self.clusters(OP, &b.entry(), b.shape(l, p.rows_per_seq, p.seqs.n))
        })?;
        let Blocks { blocks, span, cached } = of;
        let scores = self.ptr(OP, p.scores)?;
        if !scores.is_multiple_of(16) {
            return Err(self.unsupported(OP, "scores that do not begin at 16 bytes".into()));
        }
        let scratch = match cached {
            true => None,
            false => Some(self.scratch(rows * blocks * span.div_ceil(TILE) * THREADS * 4)?),
        };
        let room = if cached { 0 } else { of.own(l) / CANDIDATE };
        let args = TopKArgs {
            scores,
            seqs: self.seqs(OP, &p.seqs)?,
            indices: self.ptr(OP, p.indices)?,
            counts: self.ptr(OP, p.counts)?,
            among: p.among.map_or(Ok(0), |a| self.ptr(OP, a.indices))?,
            among_counts: p.among.map_or(Ok(0), |a| self.ptr(OP, a.counts))?,
            masks: scratch.as_ref().map_or(0, |s| s.ptr),
            stride: p.stride as u64,
            rows_per_seq: word(OP, "rows_per_seq", p.rows_per_seq)?,
            k: word(OP, "k", p.k)?,
            unit: word(OP, "unit", p.unit)?,
            permille: p.share.permille,
            at_least: p.share.at_least,
            among_k: p.among.map_or(Ok(0), |a| word(OP, "candidates", a.k))?,
            span: word(OP, "scores of a block", span)?,
            sinks: forced.map_or(0, |f| f.sinks.min(p.seqs.max_kv) as u32),
            recent: forced.map_or(0, |f| f.recent.min(p.seqs.max_kv) as u32),
            room: word(OP, "candidates in shared memory", room)?,
        };
        let shape = of.shape(l, p.rows_per_seq, p.seqs.n);
        self.launch(OP, &of.entry(), shape, Args::new().with(args))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::launch::holds;

    #[test]
    fn the_kernel_has_the_same_constants() {
        for line in [
            &format!("#define THREADS {THREADS}u"),
            "#define BINS 2048u",
            "#define HISTOGRAMS 4",
            "#define CHUNK 128u",
            "#define CHUNKS 8u",
        ] {
            holds("top_k", line);
        }
    }

    #[test]
    fn rows_are_shared_out_to_blocks_that_hold_them() {
        // Seven groups of 18 multiprocessors and one of 6.
        let resident = |b: Blocks| Ok(7 * (18 / b.blocks) + 6 / b.blocks);
        let of = |l: &Limits, rows, n| {
            let b = Blocks::of(l, (rows, n), resident).unwrap();
            assert!(b.span.is_multiple_of(64) && b.span * b.blocks >= n);
            assert!(b.shape(l, 1, 1).shared + DECLARED <= l.shared || !b.cached);
            (b.blocks, b.cached)
        };
        let h100 = |rows, n| of(&Limits::H100, rows, n);
        assert_eq!(h100(8, 1), (1, true));
        assert_eq!(h100(512, 32_768), (1, true));
        assert_eq!(h100(8, 32_769), (2, true));
        assert_eq!(h100(8, 131_072), (4, true));
        assert_eq!(h100(8, 262_144), (8, true));
        assert_eq!(h100(8, 262_145), (8, false));
        // Many rows: as many blocks as run at once.
        assert_eq!(h100(66, 65_536), (2, true));
        assert_eq!(h100(32, 131_072), (3, false));
        assert_eq!(h100(64, 131_072), (2, false));
        assert_eq!(h100(256, 131_072), (1, false));
        // Without clusters; and with little shared memory.
        let alone = Limits { cluster: 1, shared: 163 << 10, ..Limits::H100 };
        assert_eq!(of(&alone, 8, 20_000), (1, true));
        assert_eq!(of(&alone, 8, 20_481), (1, false));
        assert_eq!(of(&Limits { shared: 99 << 10, ..alone }, 8, 8193), (1, false));
    }
}
