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
const WARPS: usize = 32;
const THREADS: usize = 32 * WARPS;
/// Bytes of five histograms of 2048 bins.
const HISTOGRAMS: usize = 5 * 2048 * 4;
/// Scores that the first bound is guessed from.
const SAMPLE: usize = 4 * THREADS;
/// Scores that a warp copies at a time, and with more room for candidates.
const STEP: usize = 1024;
const ROOMY_STEP: usize = 256;
/// Bytes of a candidate: its image and its place in the warp's run.
const CANDIDATE: usize = 4 + 2;
/// At least the shared memory that the kernel declares.
const DECLARED: usize = 3584;
/// Scores that a block looks through where rows are few: with more blocks waiting for each other takes longer.
const SPAN: usize = 32 << 10;

/// Candidates that a block keeps beside the scores that its warps copy at a time; as the kernel wants it, an even number.
fn room(l: &Limits, step: usize) -> usize {
    let taken = HISTOGRAMS + DECLARED + WARPS * step * 4;
    (l.shared.saturating_sub(taken) / CANDIDATE) & !1
}

/// How many of `n` scores may reach the bound that is guessed for the `k` largest of them: what the kernel asks of the
/// sample, and a tenth for chance.
fn candidates(n: usize, k: usize) -> usize {
    if n <= SAMPLE {
        return n;
    }
    let share = k as f64 * SAMPLE as f64 / n as f64;
    let want = share + share / 32.0 + 3.0 * share.sqrt() + 16.0;
    ((want * n as f64 / SAMPLE as f64 * 1.1) as usize).min(n)
}

/// How a row is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Blocks {
    blocks: usize,
    /// Scores of a block.
    span: usize,
    /// Scores that a warp copies at a time.
    step: usize,
    /// Candidates that there is room for.
    room: usize,
}

impl Blocks {
    /// The `k` best of `n` scores by so many blocks.
    fn new(l: &Limits, (n, k): (usize, usize), blocks: usize) -> Self {
        let span = n.div_ceil(blocks).next_multiple_of(64);
        let fits = room(l, STEP) >= candidates(n, k).div_ceil(blocks);
        let step = if fits { STEP } else { ROOMY_STEP };
        Blocks { blocks, span, step, room: room(l, step) }
    }

    /// For `rows` rows of `n` scores; `resident` says how many rows are worked on at once.
    fn of(
        l: &Limits,
        (rows, n, k): (usize, usize, usize),
        mut resident: impl FnMut(Blocks) -> Result<usize>,
    ) -> Result<Self> {
        // More clusters than run at once take longer than blocks that look through more of a row each.
        for blocks in (2..=n.div_ceil(SPAN).min(l.cluster)).rev() {
            let b = Blocks::new(l, (n, k), blocks);
            if resident(b)? >= rows {
                return Ok(b);
            }
        }
        Ok(Blocks::new(l, (n, k), 1))
    }

    fn entry(self) -> String {
        let roomy = if self.step == STEP { "" } else { "_roomy" };
        format!("top_k{roomy}{}", if self.blocks > 1 { "_cluster" } else { "" })
    }

    /// The launch over `rows` rows of each of `n` sequences.
    fn shape(self, rows: usize, n: usize) -> Shape {
        let shape = Shape::new([self.blocks, rows, n], THREADS);
        let own = WARPS * self.step * 4 + self.room * CANDIDATE;
        shape.shared(HISTOGRAMS + own).cluster(self.blocks)
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
        let most = p.k.min(p.share.of(p.seqs.max_kv));
        let of = Blocks::of(l, (rows, n, most), |b| {
            self.clusters(OP, &b.entry(), b.shape(p.rows_per_seq, p.seqs.n))
        })?;
        let scores = self.ptr(OP, p.scores)?;
        if !scores.is_multiple_of(16) {
            return Err(self.unsupported(OP, "scores that do not begin at 16 bytes".into()));
        }
        let args = TopKArgs {
            scores,
            seqs: self.seqs(OP, &p.seqs)?,
            indices: self.ptr(OP, p.indices)?,
            counts: self.ptr(OP, p.counts)?,
            among: p.among.map_or(Ok(0), |a| self.ptr(OP, a.indices))?,
            among_counts: p.among.map_or(Ok(0), |a| self.ptr(OP, a.counts))?,
            stride: p.stride as u64,
            rows_per_seq: word(OP, "rows_per_seq", p.rows_per_seq)?,
            k: word(OP, "k", p.k)?,
            unit: word(OP, "unit", p.unit)?,
            permille: p.share.permille,
            at_least: p.share.at_least,
            among_k: p.among.map_or(Ok(0), |a| word(OP, "candidates", a.k))?,
            span: word(OP, "scores of a block", of.span)?,
            sinks: forced.map_or(0, |f| f.sinks.min(p.seqs.max_kv) as u32),
            recent: forced.map_or(0, |f| f.recent.min(p.seqs.max_kv) as u32),
            room: word(OP, "candidates in shared memory", of.room)?,
        };
        let shape = of.shape(p.rows_per_seq, p.seqs.n);
        self.launch(OP, &of.entry(), shape, Args::new().with(args))
    }
}

#[cfg(test)]
super::args::same_sizes! {
    "top_k" "TopKArgs" TopKArgs,
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
            "#define HISTOGRAMS 5",
            "#define SAMPLE (4 * THREADS)",
            &format!("KERNEL(top_k, false, {STEP})"),
            &format!("KERNEL(top_k_roomy_cluster, true, {ROOMY_STEP})"),
        ] {
            holds("top_k", line);
        }
    }

    #[test]
    fn rows_are_shared_out_to_blocks_that_run_at_once() {
        // Seven groups of 18 multiprocessors and one of 6.
        let resident = |b: Blocks| Ok(7 * (18 / b.blocks) + 6 / b.blocks);
        let of = |l: &Limits, rows, n, k| {
            let b = Blocks::of(l, (rows, n, k), resident).unwrap();
            assert!(b.span.is_multiple_of(64) && b.span * b.blocks >= n);
            assert!(b.shape(1, 1).shared + DECLARED <= l.shared);
            (b.blocks, b.step)
        };
        let h100 = |rows, n, k| of(&Limits::H100, rows, n, k);
        assert_eq!(h100(8, 1, 1), (1, STEP));
        assert_eq!(h100(512, 32_768, 1024), (1, STEP));
        assert_eq!(h100(8, 32_769, 1024), (2, STEP));
        assert_eq!(h100(8, 131_072, 13_107), (4, STEP));
        assert_eq!(h100(8, 1 << 20, 2048), (8, STEP));
        // Many rows: as many blocks as run at once.
        assert_eq!(h100(32, 131_072, 2048), (3, STEP));
        assert_eq!(h100(256, 131_072, 2048), (1, STEP));
        // Many candidates in a block.
        assert_eq!(h100(256, 131_072, 13_107), (1, ROOMY_STEP));
        assert_eq!(h100(8, 4096, 4096), (1, STEP));
        // Without clusters; and with little shared memory.
        let alone = Limits { cluster: 1, shared: 163 << 10, ..Limits::H100 };
        assert_eq!(of(&alone, 8, 131_072, 2048), (1, ROOMY_STEP));
        assert_eq!(of(&Limits { shared: 99 << 10, ..alone }, 8, 8193, 100), (1, ROOMY_STEP));
    }

    #[test]
    fn a_guess_is_somewhat_more_than_k() {
        assert_eq!(candidates(4096, 100), 4096);
        assert_eq!(candidates(5000, 5000), 5000);
        // 64 of the sample are expected to be among the 2,048, and 106 asked for; 409 and 498 for 13,107.
        let n = 131_072;
        assert_eq!(candidates(n, 2048), 106 * 32 * 11 / 10);
        assert!((498 * 35..499 * 36).contains(&candidates(n, 13_107)));
    }
}
