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

// Constants of `digits.cuh` and `top_k.cu`.
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
#[derive(Debug, PartialEq, Eq)]
struct Blocks {
    blocks: usize,
    /// Scores of a block.
    span: usize,
    /// They stay in registers and shared memory.
    cached: bool,
}

impl Blocks {
    /// For `rows` rows of `n` scores.
    fn of(l: &Limits, rows: usize, n: usize) -> Self {
        let room = l.shared.saturating_sub(HISTOGRAMS + DECLARED) / (SCORE + ENTRY);
        let most = (room / ROUND * ROUND).min(TILE);
        let fewest = if most == 0 { usize::MAX } else { n.div_ceil(most) };
        // More clusters than run at once take longer than blocks that each read a row alone.
        let at_once = fewest == 1 || rows.saturating_mul(fewest) <= l.sms;
        let (blocks, cached) = match fewest <= l.cluster {
            // As few as hold the row: blocks of a cluster wait for each other after every histogram, which takes longer
            // than what one of them has to do (8 rows of 32,768 scores on an H100: 8 us, 13 with two blocks each).
            true if at_once => (fewest, true),
            true => (1, false),
            false => (if rows * l.cluster <= l.sms { l.cluster } else { 1 }, false),
        };
        Blocks { blocks, span: n.div_ceil(blocks).next_multiple_of(64), cached }
    }
}

impl CudaBackend {
    /// `forced`: what runs before it, of the same scores and of all tokens.
    pub(super) fn top_k_op(&self, p: &TopK<'_>, forced: Option<&Force<'_>>) -> Result<()> {
        const OP: &str = "top_k";
        p.check()?;
        let n = p.among.map_or(p.seqs.max_kv.div_ceil(p.unit), |a| a.k).max(1);
        let rows = p.rows_per_seq * p.seqs.n;
        let Blocks { blocks, span, cached } = Blocks::of(&self.limits, rows, n);
        let scores = self.ptr(OP, p.scores)?;
        if !scores.is_multiple_of(16) {
            return Err(self.unsupported(OP, "scores that do not begin at 16 bytes".into()));
        }
        let scratch = match cached {
            true => None,
            false => Some(self.scratch(rows * blocks * span.div_ceil(TILE) * THREADS * 4)?),
        };
        let (kept, listed) = if cached { (span.next_multiple_of(ROUND), 0) } else { (0, TILE) };
        let shared = HISTOGRAMS + kept * (SCORE + ENTRY) + listed * ENTRY;
        let room = match cached {
            true => 0,
            false => self.limits.shared.saturating_sub(shared + DECLARED) / CANDIDATE,
        };
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
        let kind = if cached { "cached" } else { "streamed" };
        let cluster = if blocks > 1 { "_cluster" } else { "" };
        let grid = [blocks, p.rows_per_seq, p.seqs.n];
        let shared = shared + room * CANDIDATE;
        let shape = Shape::new(grid, THREADS).shared(shared).cluster(blocks);
        self.launch(OP, &format!("top_k_{kind}{cluster}"), shape, Args::new().with(args))
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
        let of = |n| {
            let b = Blocks::of(&Limits::H100, 8, n);
            assert!(b.span.is_multiple_of(64) && b.span * b.blocks >= n);
            (b.blocks, b.cached)
        };
        assert_eq!(of(1), (1, true));
        assert_eq!(of(32_768), (1, true));
        assert_eq!(of(32_769), (2, true));
        assert_eq!(of(131_072), (4, true));
        assert_eq!(of(262_144), (8, true));
        assert_eq!(of(262_145), (8, false));
        // Many rows: as many clusters as run at once, then a block a row.
        let many = |rows, n| {
            let b = Blocks::of(&Limits::H100, rows, n);
            (b.blocks, b.cached)
        };
        assert_eq!(many(512, 32_768), (1, true));
        assert_eq!(many(33, 131_072), (4, true));
        assert_eq!(many(34, 131_072), (1, false));
        assert_eq!(many(256, 300_000), (1, false));
        // Without clusters; and with little shared memory.
        let alone = Limits { cluster: 1, shared: 163 << 10, ..Limits::H100 };
        assert_eq!(Blocks::of(&alone, 8, 20_000), Blocks { blocks: 1, span: 20_032, cached: true });
        assert!(!Blocks::of(&alone, 8, 20_481).cached);
        assert!(!Blocks::of(&Limits { shared: 99 << 10, ..alone }, 8, 8193).cached);
    }
}
