//! RULER-style tasks, generated offline.
//!
//! The recipe is that of RULER (arXiv 2404.06654): thirteen tasks, their haystacks, numbers of needles and metrics.
//! Texts, words and encyclopaedia entries are our own or come from the given prose, so results are RULER-style and
//! not comparable with published ones. Lengths count all tokens of the tested model, those to be written included.

mod aggregation;
mod needles;
mod questions;
mod words;

use super::{Problem, SampleError};
use crate::model::{ModelError, Tokenizer};
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

/// What problems are made from.
#[derive(Clone, Copy, Debug)]
pub struct RulerSource<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Prose for haystacks; any long text.
    pub prose: &'a str,
    /// Tokens before the task's text, as a chat template puts them.
    pub before: &'a [u32],
    /// Tokens between the task's text and the start of the answer.
    pub after: &'a [u32],
}

/// A task's text in parts that are encoded apart.
struct Draft {
    /// Instructions before the haystack.
    head: String,
    /// Pieces of the haystack in order. As many as fit are kept, those marked `needed` always.
    pieces: Vec<Piece>,
    /// The question after the haystack.
    question: String,
    /// Start of the answer, which the model continues.
    prefix: String,
    references: Vec<String>,
    any: bool,
}

struct Piece {
    text: String,
    needed: bool,
}

impl Piece {
    fn filler(text: impl Into<String>) -> Piece {
        Piece { text: text.into(), needed: false }
    }
    fn needed(text: impl Into<String>) -> Piece {
        Piece { text: text.into(), needed: true }
    }
}

/// Problem number `number` of a task with `tokens` tokens in all; the same number gives the same problem.
///
/// # Errors
/// [`SampleError`] when the number of tokens or the prose is too small.
pub fn ruler(
    source: &RulerSource<'_>,
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
    assemble(source, task, tokens, number, draft)
}

fn assemble(
    source: &RulerSource<'_>,
    task: RulerTask,
    tokens: usize,
    number: u64,
    draft: Draft,
) -> Result<Problem, SampleError> {
    let encode = |s: &str| source.tokenizer.encode(s, false);
    let (head, question, prefix) =
        (encode(&draft.head)?, encode(&draft.question)?, encode(&draft.prefix)?);
    let encoded: Vec<(Vec<u32>, bool)> = draft
        .pieces
        .iter()
        .map(|p| Ok((encode(&p.text)?, p.needed)))
        .collect::<Result<_, ModelError>>()?;
    let needed: usize = encoded.iter().filter(|p| p.1).map(|p| p.0.len()).sum();
    let fixed = source.before.len()
        + head.len()
        + question.len()
        + source.after.len()
        + prefix.len()
        + needed
        + task.answer_tokens();
    let room =
        tokens.checked_sub(fixed).ok_or(SampleError::TooFewTokens { tokens, least: fixed })?;
    let mut keep = kept(&encoded, room);
    let mut all = [source.before, &head].concat();
    for (piece, _) in encoded.iter().filter(|_| keep.next().unwrap_or(false)) {
        all.extend(piece);
    }
    let decode_from = all.len();
    all.extend([&question[..], source.after, &prefix].concat());
    Ok(Problem {
        task: task.name(),
        name: format!("{} {tokens} #{number}", task.name()),
        tokens: all,
        decode_from,
        answer_tokens: task.answer_tokens(),
        references: draft.references,
        any: draft.any,
    })
}

/// Which pieces stay: all needed ones, and fillers spread evenly until `room` tokens are full.
fn kept(pieces: &[(Vec<u32>, bool)], room: usize) -> std::vec::IntoIter<bool> {
    let fillers: usize = pieces.iter().filter(|p| !p.1).map(|p| p.0.len()).sum();
    let (mut used, mut seen) = (0, 0);
    let keep = pieces.iter().map(|(ids, needed)| {
        if *needed {
            return true;
        }
        seen += ids.len();
        // After `seen` of all filler tokens, that share of the room may be full.
        let share = if fillers <= room { seen } else { seen.saturating_mul(room) / fillers };
        let fits = used + ids.len() <= share;
        used += if fits { ids.len() } else { 0 };
        fits
    });
    keep.collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fillers_are_thinned_evenly_and_needed_pieces_stay() {
        let piece = |n: usize, needed: bool| (vec![0; n], needed);
        let pieces: Vec<_> = (0..100).map(|i| piece(5, i == 50)).collect();
        let keep: Vec<bool> = kept(&pieces, 100).collect();
        assert!(keep[50]);
        assert_eq!(keep.iter().filter(|k| **k).count(), 21);
        assert!(keep[..50].iter().filter(|k| **k).count().abs_diff(10) <= 1);
        assert!(kept(&pieces, 10_000).all(|k| k));
        assert_eq!(kept(&pieces, 0).filter(|k| *k).count(), 1);
    }

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
            assert_ne!(a.references, other.references, "{name}");
            assert!(!a.references.is_empty(), "{name}");
            let needed: String =
                a.pieces.iter().filter(|p| p.needed).map(|p| p.text.as_str()).collect();
            for r in &a.references {
                assert!(needed.contains(r.as_str()), "{name}: {r} is not among the needed pieces");
                assert!(!a.prefix.contains(r.as_str()), "{name}: {r} is given away");
            }
        }
    }
}
