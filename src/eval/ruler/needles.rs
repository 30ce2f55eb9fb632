//! Needles in haystacks: values of keys that are hidden among other lines.

use super::RulerTask as T;
use crate::eval::draft::{Draft, Piece, Question, sentences};
use crate::eval::words::{FILLER, different, number, pick, shuffle, uuid, word};
use crate::eval::{Check, SampleError};
use rand_chacha::ChaCha8Rng;

fn needle(kind: &str, key: &str, value: &str) -> String {
    format!("One of the special magic {kind}s for {key} is: {value}.\n")
}

pub(super) fn draft(
    rng: &mut ChaCha8Rng,
    task: T,
    tokens: usize,
    prose: &str,
) -> Result<Draft, SampleError> {
    let kind = if matches!(task, T::NiahSingle3 | T::NiahMultikey3) { "uuid" } else { "number" };
    let value = if kind == "uuid" { uuid } else { number };
    let key = if task == T::NiahMultikey3 { uuid } else { word };
    let keys = match task {
        T::NiahMultikey1 | T::NiahMultiquery => 4,
        _ => 1,
    };
    let values = if task == T::NiahMultivalue { 4 } else { 1 };
    let asked = if task == T::NiahMultiquery { 4 } else { 1 };
    // Only needles: more of them than any text of this length holds.
    let lines = match task {
        T::NiahMultikey2 | T::NiahMultikey3 => tokens / 12 + 2,
        _ => 0,
    };
    let names = different(rng, keys + lines, key);
    let held: Vec<Vec<String>> = (0..keys).map(|_| different(rng, values, value)).collect();
    let mut needles: Vec<Piece> = names
        .iter()
        .zip(&held)
        .flat_map(|(k, vs)| vs.iter().map(|v| Piece::needed(needle(kind, k, v))))
        .collect();

    let mut pieces: Vec<Piece> = if lines > 0 {
        let others = names[keys..].iter().map(|k| Piece::filler(needle(kind, k, &value(rng))));
        others.collect()
    } else if task == T::NiahSingle1 {
        (0..tokens / 20 + 2).map(|_| Piece::filler(FILLER)).collect()
    } else {
        sentences(rng, prose, tokens)?
    };
    shuffle(rng, &mut needles);
    for needle in needles {
        // One of 40 evenly spaced depths.
        let depth = *pick(rng, &(0..40).collect::<Vec<usize>>());
        let at = pieces.len() * depth / 39;
        pieces.insert(at, needle);
    }

    let wanted = names[..asked].join(", ");
    let references: Vec<String> = held[..asked].concat();
    let (s, is) = if references.len() > 1 { ("s", "are") } else { ("", "is") };
    Ok(Draft {
        head: format!(
            "Some special magic {kind}s are hidden within the following text. Make sure to memorize them. I will \
             quiz you about the {kind}s afterwards.\n"
        ),
        pieces,
        questions: vec![Question {
            text: format!(
                "\nWhat {is} the special magic {kind}{s} for {wanted} mentioned in the provided text?"
            ),
            prefix: format!(
                " The special magic {kind}{s} for {wanted} mentioned in the provided text {is}"
            ),
            check: Check::All(references),
        }],
    })
}
