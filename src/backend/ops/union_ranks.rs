//! A union of the query heads' rankings.

use super::score::check_scores;
use super::{Among, Seqs, apart, ensure};
use crate::backend::{Result, Tensor};

/// Scores that order tokens as LessIsMore's union does: the first token of every head's ranking, then the second of
/// every head, and so on, each token at its first occurrence.
///
/// `out_j = -min_h (rank_h(j) * heads + h)` over the heads `h` whose list holds `j`; -infinity for the other tokens
/// below `kv_len`, entries from there on are left alone. `rank_h(j)` is the place of `j` among the tokens of list `h`,
/// by falling score, then rising index (-0 equals +0). Lists are those of [`TopK`](super::TopK) over the same scores,
/// so that no score in them is NaN. All results are whole numbers of at most 24 bits, so they are exact.
#[derive(Debug)]
pub struct UnionRanks<'a> {
    /// f32 `[n, heads, stride]`.
    pub scores: &'a Tensor,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// Query heads.
    pub heads: usize,
    /// Elements between score rows; at least `seqs.max_kv`, a multiple of 64.
    pub stride: usize,
    /// The best tokens of each head: u32 `[n, heads, k]`, and how many there are.
    pub listed: Among<'a>,
    /// f32 `[n, stride]`, out.
    pub out: &'a Tensor,
}

impl UnionRanks<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "union_ranks";
        self.seqs.check_decode(OP)?;
        let k = self.listed.k;
        ensure(OP, self.heads.checked_mul(k).is_some_and(|n| n > 0 && n < 1 << 24), || {
            format!("{} heads of {k} ranks: at least 1, less than 2^24 in all", self.heads)
        })?;
        self.listed.check_room(OP, self.seqs.n, self.heads)?;
        check_scores(OP, self.scores, self.seqs, self.heads, self.stride)?;
        check_scores(OP, self.out, self.seqs, 1, self.stride)?;
        let ([meta, pages], [indices, counts]) = (self.seqs.named(), self.listed.named());
        apart(OP, &[("out", self.out)], &[("scores", self.scores), indices, counts, meta, pages])
    }
}
