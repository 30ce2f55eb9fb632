//! Many keys with a value each in prose, some of which are asked for.

use super::draft::{Draft, Frame, Piece, Question, TaskSource, assemble, hide, sentences};
use super::words::{different, number, word};
use super::{Cell, Check, Problem, SampleError, seeded};

/// One text with many keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultikeySpec {
    /// Tokens of the text with question and answer.
    pub tokens: usize,
    /// Keys in the text, spread evenly.
    pub keys: usize,
    /// Keys that are asked for, one by one, at most all: evenly spread over the text.
    pub asked: usize,
    /// Number of the text.
    pub number: u64,
    /// Seed of keys, values and the place in the prose.
    pub seed: u64,
}

/// One problem for each key that is asked for, over the same text: the answer's first number must be the key's value.
///
/// # Errors
/// [`SampleError`] when the number of tokens is too small for the keys, more are asked for than there are, or there is
/// no prose.
pub fn multikey(source: &TaskSource<'_>, spec: &MultikeySpec) -> Result<Vec<Problem>, SampleError> {
    let MultikeySpec { tokens, keys, asked, number: text, seed } = *spec;
    if asked > keys {
        return Err(SampleError::TooFewKeys { keys, asked });
    }
    // A line of a key has more than five tokens: more of them never fit, however long it takes to make them.
    if keys > tokens / 5 {
        return Err(SampleError::TooFewTokens { tokens, least: keys.saturating_mul(5) });
    }
    let mut rng = seeded(seed, &[tokens as u64, keys as u64, text]);
    let names = different(&mut rng, keys, word);
    let values = different(&mut rng, keys, number);
    let mut pieces: Vec<Piece> = sentences(&mut rng, source.prose, tokens)?;
    for (i, (key, value)) in names.iter().zip(&values).enumerate() {
        let share = (i as f64 + 0.5) / keys as f64;
        hide(&mut pieces, format!("\nThe number of {key} is {value}.\n"), share);
    }
    let questions = (0..asked).map(|i| (2 * i + 1) * keys / (2 * asked)).map(|i| Question {
        text: format!("\n\nWhat is the number of {}?", names[i]),
        prefix: format!(" The number of {} is", names[i]),
        check: Check::Number(values[i].clone()),
    });
    let head =
        "The following text gives numbers to names. Memorize them. I will ask you about them afterwards.\n"
            .into();
    let frame = Frame {
        task: "multikey",
        name: format!("{tokens} tokens, {keys} keys, #{text}"),
        cell: Cell { tokens, depth: None, size: Some(keys) },
        answer_tokens: 12,
        stop: None,
    };
    assemble(source, &frame, Draft { head, pieces, questions: questions.collect() })
}
