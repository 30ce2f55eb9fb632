//! Budgets that follow the scores.

use super::score::check_scores;
use super::{Seqs, apart, ensure};
use crate::backend::{Result, Tensor};

/// How many of the best scores of a row stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trim {
    /// Row by row: the smallest number of best scores that hold a share of the row's softmax mass
    /// `sum_j exp(s_j)` (Twilight's top-p), and no fewer than `at_least`.
    Mass {
        /// The share, in thousandths: 1 to 1000.
        permille: u32,
        /// Least scores of a row.
        at_least: u32,
    },
    /// The rows of a sequence share one number of tokens: the best scores of all of them stay, and no fewer than
    /// `at_least` of each row (AdaKV, arXiv 2407.11550: the floor is part of the total).
    Together {
        /// Tokens of all rows of a sequence.
        tokens: u32,
        /// Least scores of a row.
        at_least: u32,
    },
}

/// Sets the scores that a budget leaves out to -infinity, in place, so that [`TopK`](super::TopK) never takes them.
///
/// Scores are compared with a threshold `t` per row, so equal ones stay or go together; NaN counts as -infinity. Let
/// `c_r(t)` be the number of finite and infinite scores of row `r` that are at least `t`, and `f_r` the largest score
/// with `c_r(f_r) >= at_least`, +infinity where `at_least` is 0. So +infinity always stays.
///
/// [`Trim::Mass`]: `t` is the smaller of `f_r` and the largest score for which the scores of at least `t` hold
/// `permille / 1000` of the mass. The mass is that of the scores before sinks and recent tokens are forced: a row
/// that holds +infinity is unspecified. Rounding may decide about scores at which the mass differs from what is asked
/// for by less than 1e-5 of the whole.
///
/// [`Trim::Together`]: with the smallest `u` for which `sum_r c_r(min(u, f_r)) <= tokens`, `t = min(u, f_r)`; where
/// there is no such `u`, `t = f_r`.
#[derive(Debug)]
pub struct TrimScores<'a> {
    /// f32 `[n, rows_per_seq, stride]`, in and out.
    pub scores: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// Score rows of a sequence; at most 256.
    pub rows_per_seq: usize,
    /// Elements between score rows; at least `seqs.max_kv`, a multiple of 64.
    pub stride: usize,
    /// What stays.
    pub trim: Trim,
}

impl TrimScores<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "trim_scores";
        self.seqs.check_decode(OP)?;
        if let Trim::Mass { permille, .. } = self.trim {
            ensure(OP, (1..=1000).contains(&permille), || format!("{permille} thousandths"))?;
        }
        ensure(OP, self.rows_per_seq <= 256, || format!("{} rows", self.rows_per_seq))?;
        let [meta, pages] = self.seqs.named();
        apart(OP, &[("scores", self.scores)], &[meta, pages])?;
        check_scores(OP, self.scores, self.seqs, self.rows_per_seq, self.stride)
    }
}
