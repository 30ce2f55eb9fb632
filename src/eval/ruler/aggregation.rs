//! Tasks that gather what is spread over the whole text: variable tracking, common words, frequent words.

use crate::eval::Check;
use crate::eval::draft::{Draft, Piece, Question};
use crate::eval::words::{FILLER, different, plain, shuffle};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

fn letters(rng: &mut ChaCha8Rng, n: usize, first: u8) -> String {
    (0..n).map(|_| char::from(first + rng.random_range(0..26u8))).collect()
}

/// Lines that give a value through a chain of variables.
fn chain(names: &[String], value: u32) -> Vec<String> {
    let first = format!("VAR {} = {value}\n", names[0]);
    let others = names.windows(2).map(|w| format!("VAR {} = VAR {}\n", w[1], w[0]));
    std::iter::once(first).chain(others).collect()
}

pub(super) fn variables(rng: &mut ChaCha8Rng, tokens: usize) -> Draft {
    const HOPS: usize = 4;
    let ask = |value: u32| {
        format!(
            "Question: Find all variables that are assigned the value {value} in the text above."
        )
    };
    let start = |value: u32| {
        format!(
            " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned \
             the value {value}, they are: "
        )
    };
    let head =
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n";
    // One example, solved, in front.
    let names = different(rng, HOPS + 1, |r| letters(r, 3, b'A'));
    let value = rng.random_range(10_000..100_000);
    let example: String =
        chain(&names, value).into_iter().flat_map(|line| [FILLER.to_string(), line]).collect();
    let head =
        format!("{head}{example}{}{}{}\n\n{head}", ask(value), start(value), names.join(" "));

    let names = different(rng, HOPS + 1, |r| letters(r, 5, b'A'));
    let value = rng.random_range(10_000..100_000);
    let fillers = tokens / 20 + 2;
    let mut places: Vec<usize> = (0..=HOPS).map(|_| rng.random_range(0..=fillers)).collect();
    places.sort_unstable();
    let mut pieces = Vec::new();
    let mut lines = chain(&names, value).into_iter().zip(places).peekable();
    for i in 0..=fillers {
        while let Some((line, _)) = lines.next_if(|l| l.1 <= i) {
            pieces.push(Piece::needed(line));
        }
        pieces.push(Piece::filler(FILLER));
    }
    let question = Question { text: ask(value), prefix: start(value), check: Check::All(names) };
    Draft { head, pieces, questions: vec![question] }
}

/// A numbered list with `often` copies of each common word and `seldom` of each other one.
fn numbered(
    rng: &mut ChaCha8Rng,
    common: &[String],
    others: &[String],
    [often, seldom]: [usize; 2],
) -> Vec<String> {
    let copies = |words: &[String], n: usize| -> Vec<String> {
        words.iter().flat_map(|w| std::iter::repeat_n(w.clone(), n)).collect()
    };
    let mut all = [copies(common, often), copies(others, seldom)].concat();
    shuffle(rng, &mut all);
    all.into_iter().enumerate().map(|(i, w)| format!("{}. {w} ", i + 1)).collect()
}

pub(super) fn common_words(rng: &mut ChaCha8Rng, tokens: usize, prose: &str) -> Draft {
    const COMMON: usize = 10;
    let times = if tokens < 4096 { [6, 1] } else { [30, 3] };
    let mut vocabulary: Vec<String> = plain().map(str::to_string).collect();
    let of_prose = prose.split(|c: char| !c.is_ascii_alphabetic()).filter(|w| w.len() >= 4);
    vocabulary.extend(of_prose.take(200_000).map(str::to_lowercase));
    vocabulary.sort_unstable();
    vocabulary.dedup();
    shuffle(rng, &mut vocabulary);
    let ask = "Question: What are the 10 most common words in the above list?";
    let start = " Answer: The top 10 words that appear most often in the list are:";
    let head = "Below is a numbered list of words. In these words, some appear more often than others. Memorize the \
                ones that appear most often.\n";
    let mut take = |n: usize| -> Vec<String> {
        let n = n.min(vocabulary.len());
        vocabulary.split_off(vocabulary.len() - n)
    };
    let (shown, unshown) = (take(COMMON), take(COMMON));
    let example: String = numbered(rng, &shown, &unshown, [3, 1]).concat();
    let head = format!("{head}{example}\n{ask}{start} {}\n\n{head}", shown.join(" "));
    // An entry has a number, a point and a word: about five tokens.
    let common = take(COMMON);
    let others = take((tokens / 5).saturating_sub(COMMON * times[0]) / times[1] + 1);
    let list = numbered(rng, &common, &others, times);
    let of_common = |entry: &str| common.iter().any(|w| entry.ends_with(&format!(" {w} ")));
    let pieces = list
        .into_iter()
        .map(|e| if of_common(&e) { Piece::needed(e) } else { Piece::filler(e) })
        .collect();
    let question =
        Question { text: format!("\n{ask}"), prefix: start.into(), check: Check::All(common) };
    Draft { head, pieces, questions: vec![question] }
}

pub(super) fn frequent_words(rng: &mut ChaCha8Rng, tokens: usize) -> Draft {
    // Counts fall with the square of the rank; the first rank is noise. A word has about four tokens.
    let words = tokens / 4;
    let vocabulary = different(rng, (tokens / 50).max(8), |r| letters(r, 6, b'a'));
    let zeta = std::f64::consts::PI.powi(2) / 6.0;
    let mut all = Vec::new();
    for (rank, word) in (1..).zip(&vocabulary) {
        let count = (words as f64 / (f64::from(rank).powi(2) * zeta)).round() as usize;
        let word = if rank == 1 { "..." } else { word.as_str() };
        all.extend(std::iter::repeat_n(format!("{word} "), count.max(1)));
    }
    shuffle(rng, &mut all);
    let wanted = vocabulary[1..4].to_vec();
    let is_wanted = |piece: &str| wanted.iter().any(|w| piece.trim_end() == w);
    let pieces = all
        .into_iter()
        .map(|w| if is_wanted(&w) { Piece::needed(w) } else { Piece::filler(w) })
        .collect();
    Draft {
        head: "Read the following coded text and track the frequency of each coded word. Find the three most \
               frequently appeared coded words.\n"
            .into(),
        pieces,
        questions: vec![Question {
            text: "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three \
                   most frequently appeared words in the above coded text?"
                .into(),
            prefix: " Answer: According to the coded text above, the three most frequently appeared words are:"
                .into(),
            check: Check::All(wanted),
        }],
    }
}
