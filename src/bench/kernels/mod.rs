//! Single ops on one device: bytes that must move over the time it takes, against the device-read ceiling of the
//! same run. Every result is checked against the f64 reference.

mod attend;
pub(super) mod check;
mod inputs;
mod run;
mod score;
#[cfg(test)]
mod tests;
mod top_k;

pub use check::Check;

use super::{Environment, Result, Summary, bad, check_heads};
use crate::backend::{Bandwidth, DType, PAGE};
use serde::Serialize;

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct KernelBench {
    /// Cached tokens of every sequence.
    pub depth: usize,
    /// Sequences decoded together.
    pub batches: Vec<usize>,
    /// Query heads; 1 to 16 for each KV head.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Dimensions of a head; a multiple of 8 up to 256.
    pub head_dim: usize,
    /// Of the KV cache (and of queries where the device's activations follow it).
    pub dtype: DType,
    /// Key dimensions that `score_dims` reads.
    pub dims: usize,
    /// Leading key dimensions stored as their own piece of a page.
    pub lead: usize,
    /// Shares of the tokens that `attend_rows` reads and `top_k` picks.
    pub shares: Vec<f64>,
    /// Samples per op.
    pub repeats: usize,
    /// Of the random inputs.
    pub seed: u64,
}

/// An op with its variant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Op {
    AttendDense,
    AttendRows(f64),
    ScoreLead,
    ScoreInt8,
    ScoreSlice,
    TopK(f64),
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Op::AttendDense => "attend_dense",
            Op::AttendRows(_) => "attend_rows",
            Op::ScoreLead | Op::ScoreInt8 | Op::ScoreSlice => "score_dims",
            Op::TopK(_) => "top_k",
        }
    }

    fn reads_pool(self) -> bool {
        !matches!(self, Op::TopK(_))
    }

    fn variant(self, o: &KernelBench) -> String {
        match self {
            Op::AttendDense => "decode".into(),
            Op::AttendRows(s) | Op::TopK(s) => {
                format!("{} tokens ({} %)", o.k(s), (1e5 * s).round() / 1e3)
            }
            Op::ScoreLead => format!("leading {}", o.dims),
            Op::ScoreInt8 => format!("int8 {}", o.dims),
            Op::ScoreSlice => format!("slice {}", o.dims),
        }
    }
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct KernelRow {
    /// Name of the op.
    pub op: &'static str,
    /// What the op was given, in words.
    pub variant: String,
    /// Sequences decoded together.
    pub batch: usize,
    /// Bytes that one launch must read and write.
    pub bytes: u64,
    /// Milliseconds of one launch (split results merged); a sample is the mean of `launches` in a row.
    pub ms: Summary,
    /// Launches of a sample.
    pub launches: usize,
    /// bytes / median.
    pub gb_s: f64,
    /// Share of the device-read bandwidth.
    pub share: f64,
    /// Ranges that the keys were cut into, for attention.
    pub splits: Option<usize>,
    /// Independent inputs that launches take in turn, and the bytes they read in all. Below the size of the device's
    /// caches the figure flatters.
    pub input_sets: usize,
    /// Bytes that all inputs hold.
    pub rotated_bytes: u64,
    /// The result against the reference.
    pub check: Check,
}

/// A shape that was not measured.
#[derive(Clone, Debug, Serialize)]
pub struct Skipped {
    /// Name of the op.
    pub op: &'static str,
    /// What the op would have been given, in words.
    pub variant: String,
    /// Sequences decoded together.
    pub batch: usize,
    /// A sentence.
    pub why: String,
}

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct KernelReport {
    /// `kernels`.
    pub kind: &'static str,
    /// Device, driver, system, date and commit.
    pub environment: Environment,
    /// What was asked for.
    pub settings: KernelBench,
    /// Measured in this run, before the ops.
    pub bandwidth_gb_s: Bandwidth,
    /// One line per op and batch.
    pub rows: Vec<KernelRow>,
    /// What did not fit the device.
    pub skipped: Vec<Skipped>,
}

impl KernelReport {
    /// Rows whose inputs together are so small that caches may have served them.
    pub fn cached(&self) -> impl Iterator<Item = &KernelRow> {
        self.rows.iter().filter(|r| r.rotated_bytes < 200_000_000)
    }

    /// Rows whose result was wrong.
    pub fn failures(&self) -> impl Iterator<Item = &KernelRow> {
        self.rows.iter().filter(|r| !r.check.passed)
    }
}

impl Default for KernelBench {
    /// One layer of Llama 3.1 8B at 32,768 tokens.
    fn default() -> Self {
        KernelBench {
            depth: 32768,
            batches: vec![1, 8, 64],
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            dtype: DType::BF16,
            dims: 32,
            lead: 32,
            shares: vec![0.01, 0.1],
            repeats: 20,
            seed: 1,
        }
    }
}

impl KernelBench {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`BenchError::BadOption`](super::BenchError::BadOption).
    pub fn validate(&self) -> Result<()> {
        const MAX: usize = 1 << 24;
        if self.depth == 0 || self.depth > MAX {
            return bad(format!("{} tokens a sequence: give 1 to {MAX} (--depth)", self.depth));
        }
        if self.batches.is_empty() || self.batches.iter().any(|&b| b == 0 || b > 4096) {
            return bad("give batch sizes from 1 to 4096 (--batch)");
        }
        check_heads(self.heads, self.kv_heads)?;
        let dims = |n: usize| n > 0 && n.is_multiple_of(8) && n <= self.head_dim;
        if !dims(self.head_dim) || self.head_dim > 256 {
            return bad(format!(
                "a head dimension of {}: give a multiple of 8 up to 256 (--head-dim)",
                self.head_dim
            ));
        }
        if !dims(self.dims) || !dims(self.lead) {
            return bad(format!(
                "{} of {} key dimensions, {} stored in front: give multiples of 8 (--dims, --lead)",
                self.dims, self.head_dim, self.lead
            ));
        }
        if self.shares.iter().any(|s| !(*s > 0.0 && *s <= 1.0)) {
            return bad("shares of tokens are above 0 and at most 100 percent (--share)");
        }
        if !self.dtype.is_float() {
            return bad(format!("the KV cache holds floats, not {}", self.dtype));
        }
        if self.repeats == 0 {
            return bad("give at least one repetition (-r 1)");
        }
        Ok(())
    }

    /// Tokens that a share of them is; at least one.
    fn k(&self, share: f64) -> usize {
        ((self.depth as f64 * share) as usize).clamp(1, self.depth)
    }

    /// KV pages of one sequence.
    fn pages(&self) -> usize {
        self.depth.div_ceil(PAGE)
    }

    /// Elements from one score row to the next.
    fn stride(&self) -> usize {
        self.pages() * PAGE
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn ops(&self) -> Vec<Op> {
        let shares = |op: fn(f64) -> Op| self.shares.iter().map(move |s| op(*s));
        std::iter::once(Op::AttendDense)
            .chain(shares(Op::AttendRows))
            .chain([Op::ScoreLead, Op::ScoreInt8, Op::ScoreSlice])
            .chain(shares(Op::TopK))
            .collect()
    }
}
