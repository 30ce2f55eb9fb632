//! Texts cut into pieces that a model reads one at a time.

use super::CalibrateError;

/// The opening of Sense and Sensibility (public domain): enough for a trial, too little for a good calibration.
pub const BUILT_IN_TEXT: &str = include_str!("../../assets/demo.txt");

/// The first `need` pieces of `tokens` tokens: every piece is `start` and the next tokens of a text, texts take
/// turns. What is left at the end of a text is not used.
///
/// # Errors
/// [`CalibrateError::TooLittleText`]; [`CalibrateError::BadOption`] where `start` fills a piece.
pub fn pieces(
    texts: &[Vec<u32>],
    start: &[u32],
    tokens: usize,
    need: usize,
) -> Result<Vec<Vec<u32>>, CalibrateError> {
    let fresh = tokens.checked_sub(start.len()).filter(|&n| n > 0).ok_or_else(|| {
        CalibrateError::BadOption(format!("{tokens} tokens a piece are too few; give at least 2"))
    })?;
    let mut cut: Vec<_> = texts.iter().map(|t| t.chunks_exact(fresh)).collect();
    let have: usize = cut.iter().map(ExactSizeIterator::len).sum();
    if have < need {
        return Err(CalibrateError::TooLittleText { have, tokens, need });
    }
    let mut out = Vec::with_capacity(need);
    while out.len() < need {
        let round = cut.iter_mut().filter_map(Iterator::next);
        out.extend(round.map(|piece| [start, piece].concat()));
    }
    out.truncate(need);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_take_turns_and_more_pieces_start_alike() {
        let texts = [(0..7).collect(), (10..15).collect::<Vec<u32>>()];
        let all = pieces(&texts, &[9], 3, 5).unwrap();
        assert_eq!(all, [[9, 0, 1], [9, 10, 11], [9, 2, 3], [9, 12, 13], [9, 4, 5]]);
        assert_eq!(pieces(&texts, &[9], 3, 2).unwrap(), all[..2]);
        let short = pieces(&texts, &[9], 3, 6).unwrap_err().to_string();
        assert!(
            short.contains("of 6 pieces of 3 tokens that are needed the texts hold 5"),
            "{short}"
        );
        assert!(pieces(&texts, &[9], 1, 1).is_err());
    }
}
