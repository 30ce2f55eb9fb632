//! The needle grid: a number at a known depth of a text of a known length.

use super::draft::{Draft, Frame, Question, TaskSource, assemble, hide, sentences};
use super::words::{different, number, word};
use super::{Cell, Check, Problem, SampleError, seeded};

/// Sentences that hide a number under a key, the question about it, and the start of the answer.
const NEEDLES: [[&str; 3]; 3] = [
    [
        "The special magic number for KEY is: VALUE.",
        "What is the special magic number for KEY mentioned in the text?",
        " The special magic number for KEY is:",
    ],
    [
        "The telephone number of the KEY club is VALUE.",
        "What is the telephone number of the KEY club?",
        " The telephone number of the KEY club is",
    ],
    [
        "The safe of KEY opens with the code VALUE.",
        "With which code does the safe of KEY open?",
        " The safe of KEY opens with the code",
    ],
];

/// One text of the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedleSpec {
    /// Tokens of the text with question and answer.
    pub tokens: usize,
    /// Where the first needle lies, in percent of the prose; at most 100.
    pub depth: usize,
    /// Needles: the others lie evenly between the first and the end.
    pub needles: usize,
    /// Number of the text in its cell of the grid; also chooses one of three wordings.
    pub number: u64,
    /// Seed of keys, values and the place in the prose.
    pub seed: u64,
}

/// One problem for each needle of a text, over the same text: the answer's first number must be the needle's.
///
/// # Errors
/// [`SampleError`] when the number of tokens or the prose is too small.
pub fn needle(source: &TaskSource<'_>, spec: &NeedleSpec) -> Result<Vec<Problem>, SampleError> {
    let NeedleSpec { tokens, depth, needles, number: text, seed } = *spec;
    let mut rng = seeded(seed, &[tokens as u64, depth as u64, text]);
    let [statement, question, prefix] = NEEDLES[(text % NEEDLES.len() as u64) as usize];
    let keys = different(&mut rng, needles, word);
    let values = different(&mut rng, needles, number);
    let mut pieces = sentences(&mut rng, source.prose, tokens)?;
    let mut questions = Vec::with_capacity(needles);
    for (i, (key, value)) in keys.iter().zip(&values).enumerate() {
        let with = |words: &str| words.replace("KEY", key).replace("VALUE", value);
        let first = depth.min(100) as f64 / 100.0;
        let share = first + (1.0 - first) * i as f64 / needles as f64;
        hide(&mut pieces, format!("\n{}\n", with(statement)), share);
        questions.push(Question {
            text: format!("\n\n{}", with(question)),
            prefix: with(prefix),
            check: Check::Number(value.clone()),
        });
    }
    let head =
        "Some numbers are hidden within the following text. Memorize them. I will ask you about them afterwards.\n"
            .into();
    let frame = Frame {
        task: "needle",
        name: format!("{tokens} tokens, depth {depth} %, #{text}"),
        cell: Cell { tokens, depth: Some(depth), size: None },
        answer_tokens: 12,
        stop: None,
    };
    assemble(source, &frame, Draft { head, pieces, questions })
}
