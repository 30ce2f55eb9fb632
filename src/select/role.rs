//! What one layer's plan is made of: its role, its scorer, its budget.

use super::blocks::Query;
use crate::backend::{DimMetric, Refresh, Share, SummaryKind};
use serde::{Deserialize, Serialize};

/// What a layer does in a decode step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Attends to every cached token.
    Dense,
    /// Chooses tokens with its own scorer, then attends to them exactly. Later layers may reuse the lists.
    Select,
    /// Attends to every cached token; its scorer makes lists for the layers that reuse them.
    DenseAnchor,
    /// Attends to tokens that an earlier layer chose, with keys and values of its own (Kascade).
    Reuse {
        /// The anchor: an earlier layer that is [`Role::Select`] or [`Role::DenseAnchor`].
        from: usize,
        /// The anchor's list that each KV head takes; any function, so several heads may share one.
        head_map: Vec<u8>,
        /// Whether the layer scores what it is handed once more.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        refine: Option<Refine>,
    },
}

/// A second look at an anchor's tokens: the anchor hands down more of them, and the layer that reuses them keeps
/// those that its own query scores best.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub struct Refine {
    /// Tokens of each list that the anchor hands down; more than the layer's budget.
    pub candidates: usize,
    /// How the layer scores them: [`Scorer::Exact`] or [`Scorer::Sorted`] on the keys themselves.
    pub scorer: Scorer,
}

/// How tokens are scored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Scorer {
    /// No scores: only the kept tokens (StreamingLLM), or those of another layer.
    None,
    /// Exact logits (oracle).
    Exact,
    /// The leading dimensions of energy-sorted keys.
    Sorted {
        /// D_b, dimensions read per token.
        dims: usize,
        /// Read the int8 copy instead of the keys.
        int8: bool,
    },
    /// Dimensions chosen by the query (SparCas and its neighbours).
    Dims {
        /// D_b.
        dims: usize,
        /// Importance rule.
        metric: DimMetric,
        /// Dimensions chosen together: 1, 2 (rotary pairs), 8 or 16.
        unit: usize,
        /// When the set is chosen anew.
        refresh: Refresh,
        /// Keep a compact copy of the chosen dimensions; else read them from the keys.
        slice: bool,
    },
    /// A number that layer, KV head and position decide: what every scorer must beat.
    Random {
        /// Other seeds give other tokens.
        seed: u32,
    },
    /// Dimensions chosen offline by the mean of `|q_i k_i|`, read from a compact slice (Double Sparsity).
    Static {
        /// Dimensions read per token.
        dims: usize,
        /// Bits of a number in the slice: 4, 8, or 16 for those of the cache.
        #[serde(default = "uncompressed", skip_serializing_if = "is_uncompressed")]
        bits: usize,
    },
    /// The leading principal components of the keys, measured offline, read from a slice of their own (Loki).
    Components {
        /// Components read per token.
        dims: usize,
    },
    /// Whole blocks by summaries of their keys (Quest, ArkVale, InfLLM-V2, SparDA, NOSA).
    Blocks {
        /// What stands for a run of keys.
        summary: SummaryKind,
        /// Tokens of a block: 16, 32 or 64.
        unit: usize,
        /// Whose query the summaries are scored with.
        query: Query,
        /// Blocks that are chosen so, the others by the content importance of their tokens (NOSA); None: all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by_query: Option<usize>,
    },
    /// A selector that the program brought along.
    Custom {
        /// Its name.
        name: String,
    },
}

fn uncompressed() -> usize {
    16
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde calls it
fn is_uncompressed(bits: &usize) -> bool {
    *bits == 16
}

/// How a budget follows the scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Follow {
    /// The fewest tokens whose estimated softmax mass reaches a share (Twilight's top-p); sinks and recent tokens
    /// come on top.
    Mass {
        /// The share in thousandths.
        permille: u32,
        /// Least tokens of a list.
        at_least: u32,
    },
    /// The lists of a layer share their budgets by the scores (AdaKV).
    Shared {
        /// Tokens of a list on average.
        mean: usize,
        /// Tokens that each list is sure of.
        at_least: u32,
    },
}

/// How many tokens are attended to, forced ones included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub struct Budget {
    /// T_b: tokens per KV head, at most.
    pub tokens: usize,
    /// The layer stays dense while a sequence has at most this many tokens (never below the budget).
    pub dense_below: usize,
    /// A sequence's own limit below `tokens`: a share of its length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<Share>,
    /// A limit below `tokens` that the scores set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub follow: Option<Follow>,
}

impl Budget {
    /// The same number of tokens at every length.
    pub fn fixed(tokens: usize, dense_below: usize) -> Self {
        Budget { tokens, dense_below, share: None, follow: None }
    }

    /// Tokens attended to in a sequence of `n`, not more than there are: the mean over the lists of a layer, and
    /// the most that there may be where the mass of the scores decides.
    pub fn tokens_at(&self, n: usize) -> usize {
        if let Some(Follow::Shared { mean, .. }) = self.follow {
            return mean.min(n);
        }
        self.share.map_or(self.tokens, |s| s.of(n).min(self.tokens)).min(n)
    }

    /// Tokens that a list has room for in every sequence that is not attended to densely.
    pub(super) fn least(&self) -> usize {
        match (self.share, self.follow) {
            (Some(s), _) => self.tokens.min(s.at_least as usize),
            (None, Some(Follow::Shared { mean, .. })) => mean,
            _ => self.tokens,
        }
    }

    /// Longest sequence that is still attended to densely: its tokens all fit the budget.
    pub fn dense_until(&self) -> usize {
        let all_fit = match (self.share, self.follow) {
            (_, Some(Follow::Shared { mean, .. })) => mean,
            (Some(s), _) if s.permille < 1000 => self.tokens.min(s.at_least as usize),
            _ => self.tokens,
        };
        self.dense_below.max(all_fit)
    }
}

/// Tokens that are always selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keep {
    /// First tokens of the sequence.
    pub sinks: usize,
    /// Last tokens, the newest included.
    pub recent: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kascade: min(max(128, L / 10), L).
    #[test]
    fn a_share_follows_the_length() {
        let share = Some(Share { permille: 100, at_least: 128 });
        let b = Budget { share, ..Budget::fixed(3276, 0) };
        let k: Vec<usize> =
            [1, 100, 128, 129, 1280, 1290, 32_768, 65_536].map(|n| b.tokens_at(n)).into();
        assert_eq!(k, [1, 100, 128, 128, 128, 129, 3276, 3276]);
        assert_eq!(b.dense_until(), 128);
        assert_eq!(Budget { dense_below: 2048, ..b }.dense_until(), 2048);
        // All of every sequence, up to the room.
        let all = Some(Share { permille: 1000, at_least: 1 });
        assert_eq!(Budget { share: all, ..b }.dense_until(), 3276);
        assert_eq!(Budget::fixed(64, 10).dense_until(), 64);
    }
}
