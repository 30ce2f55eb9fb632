//! The tasks: continuing prose, copying, and finding a pass key.

use crate::model::{ModelError, Tokenizer};
use thiserror::Error;

/// One prediction task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Text and length, or length and depth.
    pub name: String,
    /// The whole sample.
    pub tokens: Vec<u32>,
    /// First token that is fed in a decode step; everything before is prefilled.
    pub decode_from: usize,
    /// First token whose prediction is scored; all later ones are.
    pub score_from: usize,
}

/// A task that cannot be made.
#[derive(Debug, Error)]
pub enum SampleError {
    /// The text is too short.
    #[error("{text} has {have} tokens, this task needs {need}; give a longer text")]
    TextTooShort {
        /// Name of the text.
        text: String,
        /// Tokens it has.
        have: usize,
        /// Tokens the task needs.
        need: usize,
    },
    /// Fewer tokens than the task's own words.
    #[error("{tokens} tokens are too few for this task; give at least {least}")]
    TooFewTokens {
        /// Asked for.
        tokens: usize,
        /// What the task needs.
        least: usize,
    },
    /// Fewer keys than questions about them.
    #[error("{asked} keys cannot be asked for where the text has {keys}; ask for fewer")]
    TooFewKeys {
        /// Keys of the text.
        keys: usize,
        /// Keys asked for.
        asked: usize,
    },
    /// The tokenizer.
    #[error(transparent)]
    Model(#[from] ModelError),
}

fn need(text: &str, ids: &[u32], n: usize) -> Result<(), SampleError> {
    if ids.len() >= n {
        return Ok(());
    }
    Err(SampleError::TextTooShort { text: text.into(), have: ids.len(), need: n })
}

/// The tokens that start a text of this model: its BOS where it wants one, else none.
///
/// # Errors
/// What the tokenizer says.
pub fn start_of_text(tokenizer: &Tokenizer) -> Result<Vec<u32>, ModelError> {
    tokenizer.encode("", tokenizer.adds_bos())
}

/// `start` and the first ids of a text, `tokens` in all; the last `scored` are predicted.
///
/// # Errors
/// [`SampleError`] when the text or the number is too small.
pub fn continuation(
    text: &str,
    start: &[u32],
    ids: &[u32],
    tokens: usize,
    scored: usize,
) -> Result<Sample, SampleError> {
    let count = room(tokens, start.len(), scored)?;
    need(text, ids, count)?;
    Ok(tail(format!("{text} {tokens}"), [start, &ids[..count]].concat(), scored))
}

/// `start` and the first ids of a text, twice, `tokens` in all (one less where they do not halve); the last
/// `scored` are predicted, each of which stands half the length back.
///
/// # Errors
/// [`SampleError`] when the text or the number is too small.
pub fn copy(
    text: &str,
    start: &[u32],
    ids: &[u32],
    tokens: usize,
    scored: usize,
) -> Result<Sample, SampleError> {
    let count = room(tokens, start.len(), scored)? / 2;
    need(text, ids, count)?;
    let half = &ids[..count];
    let all = [start, half, half].concat();
    room(all.len(), start.len(), scored)?;
    Ok(tail(format!("{text} {tokens}"), all, scored))
}

/// Tokens of text after `start` tokens, at least one of which comes before those that are scored.
fn room(tokens: usize, start: usize, scored: usize) -> Result<usize, SampleError> {
    let least = scored.max(1).saturating_add(2).saturating_add(start);
    if scored == 0 || tokens < least {
        return Err(SampleError::TooFewTokens { tokens, least });
    }
    Ok(tokens - start)
}

fn tail(name: String, tokens: Vec<u32>, scored: usize) -> Sample {
    let n = tokens.len();
    // The token before the first scored one is the first decode step.
    Sample { name, tokens, decode_from: n - scored - 1, score_from: n - scored }
}

/// Depths of the pass key, in tenths of the text.
pub const DEPTHS: [usize; 5] = [1, 3, 5, 7, 9];

const HEAD: &str = "Somewhere in this long text a pass key is hidden. Find it and memorize it.\n\n";
const QUESTION: &str = "\n\nWhat is the pass key? The pass key is ";

/// Five-digit keys, the same on every machine: `x = x * 48271 mod (2^31 - 1)`, `10000 + x mod 90000`.
pub fn key_sequence() -> impl Iterator<Item = u64> {
    let mut x = 20_240_229u64;
    std::iter::repeat_with(move || {
        x = x * 48_271 % 0x7fff_ffff;
        10_000 + x % 90_000
    })
}

/// A key hidden in prose at `tenths` / 10 of the text; the question and the five digits are fed one by one, the
/// digits are scored. The question ends with a space so that the next token is a digit.
///
/// `tokens` counts everything, the start of the text too. Pieces are encoded apart, so the filler is the text's own
/// ids.
///
/// # Errors
/// [`SampleError`] when the text or the number is too small.
pub fn passkey(
    tokenizer: &Tokenizer,
    text: &str,
    filler: &[u32],
    tokens: usize,
    tenths: usize,
    key: u64,
) -> Result<Sample, SampleError> {
    let encode = |s: &str| tokenizer.encode(s, false);
    let key = key.to_string();
    let needle = format!("\n\nThe pass key is {key}. Do not forget it: {key} is the pass key.\n\n");
    let (needle, question) = (encode(&needle)?, encode(QUESTION)?);
    let head = [start_of_text(tokenizer)?, encode(HEAD)?].concat();
    let digits = encode(&key)?;
    let fixed = head.len() + needle.len() + question.len() + digits.len();
    let count = tokens
        .checked_sub(fixed)
        .filter(|&n| n > 0)
        .ok_or(SampleError::TooFewTokens { tokens, least: fixed + 1 })?;
    need(text, filler, count)?;
    let before = tenths * count / 10;
    let mut all = [&head, &filler[..before], &needle, &filler[before..count]].concat();
    let decode_from = all.len();
    all.extend(question);
    let score_from = all.len();
    all.extend(digits);
    let name = format!("{tokens} at 0.{tenths}");
    Ok(Sample { name, tokens: all, decode_from, score_from })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_recorded_ones() {
        assert_eq!(key_sequence().take(2).collect::<Vec<_>>(), [48321, 52654]);
    }

    #[test]
    fn copy_repeats_and_scores_the_tail() {
        let ids: Vec<u32> = (0..10).collect();
        let s = copy("t", &[], &ids, 8, 3).unwrap();
        assert_eq!(s.tokens, [0, 1, 2, 3, 0, 1, 2, 3]);
        assert_eq!((s.decode_from, s.score_from), (4, 5));
        assert!(copy("t", &[], &ids, 40, 3).is_err());
        assert!(continuation("t", &[], &ids, 4, 3).is_err());
        // One token that does not halve is missing for the score.
        assert!(copy("t", &[], &ids, 5, 3).is_err());
    }

    #[test]
    fn a_text_starts_as_its_model_wants_it() {
        let ids: Vec<u32> = (0..10).collect();
        let s = copy("t", &[99], &ids, 9, 3).unwrap();
        assert_eq!(s.tokens, [99, 0, 1, 2, 3, 0, 1, 2, 3]);
        let s = continuation("t", &[99], &ids, 6, 3).unwrap();
        assert_eq!((&s.tokens[..], s.score_from), (&[99, 0, 1, 2, 3, 4][..], 3));
    }

    #[test]
    fn no_number_of_scored_tokens_overflows() {
        let ids = [1, 2, 3];
        for scored in [0, usize::MAX, usize::MAX - 1] {
            for made in [continuation("t", &[7], &ids, 3, scored), copy("t", &[7], &ids, 6, scored)]
            {
                let e = made.unwrap_err();
                assert!(matches!(e, SampleError::TooFewTokens { .. }), "{e}");
            }
        }
    }
}
