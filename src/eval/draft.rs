//! From the words of a task to its tokens: a haystack that fits a length, and the questions about it.

use super::{Cell, Check, Problem, SampleError};
use crate::model::{ModelError, Tokenizer};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// What problems are made from.
#[derive(Clone, Copy, Debug)]
pub struct TaskSource<'a> {
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
pub(super) struct Draft {
    /// Instructions before the haystack.
    pub head: String,
    /// Pieces of the haystack in order. As many as fit are kept, those marked `needed` always.
    pub pieces: Vec<Piece>,
    /// Questions about the haystack; each is a problem of its own.
    pub questions: Vec<Question>,
}

pub(super) struct Question {
    /// Follows the haystack.
    pub text: String,
    /// Start of the answer, which the model continues.
    pub prefix: String,
    pub check: Check,
}

pub(super) struct Piece {
    pub text: String,
    pub needed: bool,
}

impl Piece {
    pub fn filler(text: impl Into<String>) -> Piece {
        Piece { text: text.into(), needed: false }
    }
    pub fn needed(text: impl Into<String>) -> Piece {
        Piece { text: text.into(), needed: true }
    }
}

/// What a draft becomes.
pub(super) struct Frame {
    pub task: &'static str,
    /// Names the draft among those of the task.
    pub name: String,
    pub cell: Cell,
    /// Most tokens of an answer.
    pub answer_tokens: usize,
    /// Text that ends an answer.
    pub stop: Option<&'static str>,
}

/// One problem for each question, over the same haystack of `frame.cell.tokens` tokens, those to be written included.
///
/// # Errors
/// [`SampleError::TooFewTokens`] where the needed pieces and the questions do not fit; the tokenizer's.
pub(super) fn assemble(
    source: &TaskSource<'_>,
    frame: &Frame,
    draft: Draft,
) -> Result<Vec<Problem>, SampleError> {
    let encode = |s: &str| source.tokenizer.encode(s, false);
    let head = encode(&draft.head)?;
    let ask =
        |q: &Question| Ok([&encode(&q.text)?[..], source.after, &encode(&q.prefix)?].concat());
    let asked = draft.questions.iter().map(ask).collect::<Result<Vec<_>, ModelError>>()?;
    let encoded: Vec<(Vec<u32>, bool)> = draft
        .pieces
        .iter()
        .map(|p| Ok((encode(&p.text)?, p.needed)))
        .collect::<Result<_, ModelError>>()?;
    let needed: usize = encoded.iter().filter(|p| p.1).map(|p| p.0.len()).sum();
    let longest = asked.iter().map(Vec::len).max().unwrap_or(0);
    let fixed = source.before.len() + head.len() + needed + longest + frame.answer_tokens;
    let tokens = frame.cell.tokens;
    let room =
        tokens.checked_sub(fixed).ok_or(SampleError::TooFewTokens { tokens, least: fixed })?;
    let mut keep = kept(&encoded, room);
    let mut all = [source.before, &head].concat();
    for (piece, _) in encoded.iter().filter(|_| keep.next().unwrap_or(false)) {
        all.extend(piece);
    }
    let several = asked.len() > 1;
    let problem = |(i, (question, ids)): (usize, (Question, Vec<u32>))| Problem {
        task: frame.task,
        name: if several { format!("{} question {i}", frame.name) } else { frame.name.clone() },
        cell: frame.cell,
        decode_from: all.len(),
        tokens: [&all[..], &ids].concat(),
        answer_tokens: frame.answer_tokens,
        stop: frame.stop,
        check: question.check,
    };
    Ok(draft.questions.into_iter().zip(asked).enumerate().map(problem).collect())
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

/// Sentences of the prose from a random one on, over and over, enough for `tokens`.
///
/// # Errors
/// [`SampleError::TextTooShort`] for prose without a sentence.
pub(super) fn sentences(
    rng: &mut ChaCha8Rng,
    prose: &str,
    tokens: usize,
) -> Result<Vec<Piece>, SampleError> {
    let all: Vec<&str> = prose.split_inclusive(['.', '!', '?']).filter(|s| s.len() > 2).collect();
    if all.is_empty() {
        return Err(SampleError::TextTooShort { text: "the prose".into(), have: 0, need: tokens });
    }
    let start = rng.random_range(0..all.len());
    // A token has about four characters; what is too much is left out later.
    let mut room = tokens.saturating_mul(6);
    let from = all.iter().cycle().skip(start).take_while(|s| {
        let more = room > 0;
        room = room.saturating_sub(s.len());
        more
    });
    Ok(from.map(|s| Piece::filler(*s)).collect())
}

/// Puts a needed piece after the first `share` (0 to 1) of the characters of the fillers.
pub(super) fn hide(pieces: &mut Vec<Piece>, text: String, share: f64) {
    let fillers = |p: &&Piece| !p.needed;
    let all: usize = pieces.iter().filter(fillers).map(|p| p.text.len()).sum();
    let target = (all as f64 * share.clamp(0.0, 1.0)).round() as usize;
    let (mut seen, mut at) = (0, 0);
    while at < pieces.len() && (seen < target || pieces[at].needed) {
        seen += if pieces[at].needed { 0 } else { pieces[at].text.len() };
        at += 1;
    }
    pieces.insert(at, Piece::needed(text));
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
    fn needles_are_hidden_at_their_share() {
        let order = |shares: &[f64]| -> String {
            let mut pieces: Vec<Piece> = ["a", "b", "c", "d"].map(Piece::filler).into();
            for (i, share) in shares.iter().enumerate() {
                hide(&mut pieces, i.to_string(), *share);
            }
            pieces.iter().map(|p| p.text.as_str()).collect()
        };
        assert_eq!(order(&[0.0]), "0abcd");
        assert_eq!(order(&[0.5]), "ab0cd");
        assert_eq!(order(&[1.0]), "abcd0");
        assert_eq!(order(&[0.25, 0.75, 2.0]), "a0bc1d2");
        assert_eq!(order(&[0.5, 0.5]), "ab01cd");
    }
}
