//! Tokens that are selected whatever their scores are.

use super::score::check_scores;
use super::{Among, Seqs, TopK, apart, ensure};
use crate::backend::{Result, Tensor};

/// Sets the scores of the first `sinks` and the last `recent` tokens to +infinity, in place.
/// The newest token is always forced (`recent >= 1`). Both ranges are cut to `kv_len`. With `among` the scores are
/// those of listed tokens, in list order; a forced token that is not on the list stays off it. A sequence's rows share
/// its scores; how many there are makes no difference.
#[derive(Debug)]
pub struct Force<'a> {
    /// f32 `[n, rows_per_seq, stride]`, in and out.
    pub scores: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// Score rows of a sequence.
    pub rows_per_seq: usize,
    /// Elements between score rows; at least `seqs.max_kv`, a multiple of 64.
    pub stride: usize,
    /// First tokens to force.
    pub sinks: usize,
    /// Last tokens to force, the newest included; at least 1.
    pub recent: usize,
    /// The tokens that the scores belong to; None: tokens `0..kv_len`.
    pub among: Option<Among<'a>>,
}

impl Force<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "force";
        self.seqs.check(OP)?;
        ensure(OP, self.recent >= 1, || "recent must be at least 1".into())?;
        let scores = [("scores", self.scores)];
        apart(OP, &scores, &self.seqs.named())?;
        if let Some(among) = &self.among {
            among.check(OP, self.seqs.n, self.rows_per_seq, self.stride)?;
            apart(OP, &scores, &among.named())?;
        }
        check_scores(OP, self.scores, self.seqs, self.rows_per_seq, self.stride)
    }
}

/// What [`Backend::force_top_k`](crate::backend::Backend::force_top_k) takes: both ops on the same rows of scores.
pub(crate) fn check_forced(force: &Force<'_>, top_k: &TopK<'_>) -> Result<()> {
    const OP: &str = "force_top_k";
    force.check()?;
    top_k.check()?;
    ensure(OP, force.scores.same_place(top_k.scores), || {
        "force and top_k of different scores".into()
    })?;
    let rows = [
        (force.seqs.n, force.rows_per_seq, force.stride),
        (top_k.seqs.n, top_k.rows_per_seq, top_k.stride),
    ];
    ensure(OP, rows[0] == rows[1], || format!("sequences, rows and strides {rows:?} differ"))?;
    let seqs =
        force.seqs.meta.same_place(top_k.seqs.meta) && force.seqs.max_kv == top_k.seqs.max_kv;
    ensure(OP, seqs, || "force and top_k of different sequences".into())?;
    let lists = match (&force.among, &top_k.among) {
        (Some(a), Some(b)) => {
            a.indices.same_place(b.indices) && a.counts.same_place(b.counts) && a.k == b.k
        }
        _ => true,
    };
    ensure(OP, lists, || "force and top_k among different candidates".into())?;
    let alike = force.among.is_some() == top_k.among.is_some() && top_k.unit == 1;
    ensure(OP, alike, || "scores of tokens for one, of something else for the other".into())
}
