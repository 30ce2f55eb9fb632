//! RULER-style tasks, generated offline.
//!
//! The recipe is that of RULER (arXiv 2404.06654): thirteen tasks, their haystacks, numbers of needles and metrics.
//! Texts, words and encyclopaedia entries are our own or come from the given prose, so results are RULER-style and
//! not comparable with published ones. Lengths count all tokens of the tested model, those to be written included.

mod aggregation;
mod needles;
mod questions;

use super::draft::{Frame, TaskSource, assemble};
use super::{Cell, Problem, SampleError};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// One of the thirteen tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RulerTask {
    /// One needle in a repeated filler line.
    NiahSingle1,
    /// One needle in prose.
    NiahSingle2,
    /// One needle with a UUID in prose.
    NiahSingle3,
    /// Four keys in prose, one is asked for.
    NiahMultikey1,
    /// Every line is a needle.
    NiahMultikey2,
    /// Every line is a needle, keys and values are UUIDs.
    NiahMultikey3,
    /// Four values of one key.
    NiahMultivalue,
    /// Four keys, all are asked for.
    NiahMultiquery,
    /// Variables that hold a value through a chain of assignments.
    VariableTracking,
    /// The ten words of a list that come most often.
    CommonWords,
    /// The three coded words that come most often.
    FrequentWords,
    /// A question about one entry of an encyclopaedia.
    Qa1,
    /// A question that joins two entries.
    Qa2,
}

use RulerTask as T;

/// Every task with its published name.
pub const RULER_TASKS: [(&str, RulerTask); 13] = [
    ("niah_single_1", T::NiahSingle1),
    ("niah_single_2", T::NiahSingle2),
    ("niah_single_3", T::NiahSingle3),
    ("niah_multikey_1", T::NiahMultikey1),
    ("niah_multikey_2", T::NiahMultikey2),
    ("niah_multikey_3", T::NiahMultikey3),
    ("niah_multivalue", T::NiahMultivalue),
    ("niah_multiquery", T::NiahMultiquery),
    ("vt", T::VariableTracking),
    ("cwe", T::CommonWords),
    ("fwe", T::FrequentWords),
    ("qa_1", T::Qa1),
    ("qa_2", T::Qa2),
];

impl RulerTask {
    /// Published name.
    pub fn name(self) -> &'static str {
        RULER_TASKS.iter().find(|t| t.1 == self).map_or("", |t| t.0)
    }

    /// Most tokens of an answer.
    pub fn answer_tokens(self) -> usize {
        match self {
            T::VariableTracking => 30,
            T::CommonWords => 120,
            T::FrequentWords => 50,
            T::Qa1 | T::Qa2 => 32,
            _ => 128,
        }
    }
}

/// Problem number `number` of a task with `tokens` tokens in all; the same number gives the same problem.
///
/// # Errors
/// [`SampleError`] when the number of tokens or the prose is too small.
pub fn ruler(
    source: &TaskSource<'_>,
    task: RulerTask,
    tokens: usize,
    number: u64,
) -> Result<Problem, SampleError> {
    let index = RULER_TASKS.iter().position(|t| t.1 == task).unwrap_or(0) as u64;
    let mut rng = ChaCha8Rng::seed_from_u64((42 + number) * 100 + index);
    // Enough pieces for any text of this many tokens: a piece has more than one.
    let draft = match task {
        T::VariableTracking => aggregation::variables(&mut rng, tokens),
        T::CommonWords => aggregation::common_words(&mut rng, tokens, source.prose),
        T::FrequentWords => aggregation::frequent_words(&mut rng, tokens),
        T::Qa1 => questions::one_hop(&mut rng, tokens),
        T::Qa2 => questions::two_hops(&mut rng, tokens),
        niah => needles::draft(&mut rng, niah, tokens, source.prose)?,
    };
    let frame = Frame {
        task: task.name(),
        name: format!("{} {tokens} #{number}", task.name()),
        cell: Cell { tokens, ..Cell::default() },
        answer_tokens: task.answer_tokens(),
        stop: None,
    };
    // A draft of these tasks has one question.
    let problem = assemble(source, &frame, draft)?.pop();
    problem.ok_or(SampleError::TooFewTokens { tokens, least: tokens })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::draft::Draft;

    #[test]
    fn drafts_are_reproducible_and_hold_their_answers() {
        let prose =
            "One day a bird sat on the wall. It looked at the garden for a while. ".repeat(40);
        for (name, task) in RULER_TASKS {
            let make = |number: u64| {
                let mut rng = ChaCha8Rng::seed_from_u64(number);
                match task {
                    T::VariableTracking => aggregation::variables(&mut rng, 2000),
                    T::CommonWords => aggregation::common_words(&mut rng, 2000, &prose),
                    T::FrequentWords => aggregation::frequent_words(&mut rng, 2000),
                    T::Qa1 => questions::one_hop(&mut rng, 2000),
                    T::Qa2 => questions::two_hops(&mut rng, 2000),
                    niah => needles::draft(&mut rng, niah, 2000, &prose).unwrap(),
                }
            };
            let text = |d: &Draft| d.pieces.iter().map(|p| p.text.as_str()).collect::<String>();
            let (a, b, other) = (make(1), make(1), make(2));
            assert_eq!(text(&a), text(&b), "{name}");
            let (asked, others) = (&a.questions[0], &other.questions[0]);
            assert_ne!(asked.check, others.check, "{name}");
            assert!(!asked.check.references().is_empty(), "{name}");
            let needed: String =
                a.pieces.iter().filter(|p| p.needed).map(|p| p.text.as_str()).collect();
            for r in asked.check.references() {
                assert!(needed.contains(r.as_str()), "{name}: {r} is not among the needed pieces");
                assert!(!asked.prefix.contains(r.as_str()), "{name}: {r} is given away");
            }
        }
    }
}
