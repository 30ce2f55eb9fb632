//! Exact checks of written answers.

use serde::Serialize;

/// What a right answer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// Holds all of these strings, whatever their case (RULER's metric); the score is the share it holds.
    All(Vec<String>),
    /// Holds one of these strings, whatever their case.
    Any(Vec<String>),
    /// The first number in it is this one, digit by digit.
    Number(String),
    /// Its items are these, in this order. Items stand between blanks, line ends, commas and semicolons; a full
    /// stop at the end of an item is not part of it.
    Items(Vec<String>),
}

/// How an answer compares with the right one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Verdict {
    /// 0 to 1. For [`Check::Items`] the longest common subsequence of both lists over the longer of the two, so
    /// that one missing item does not spoil those after it and superfluous ones count against the answer.
    pub score: f64,
    /// Nothing is missing, wrong or (for lists) superfluous.
    pub exact: bool,
    /// Of a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub items: Option<Items>,
}

/// How a written list compares with the right one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Items {
    /// Items of the right list.
    pub expected: usize,
    /// Items that were written.
    pub written: usize,
    /// Leading items that are right.
    pub prefix: usize,
    /// Length of the longest common subsequence.
    pub common: usize,
}

impl Check {
    /// [`Check::Items`] of a written list.
    pub fn items(list: &str) -> Check {
        Check::Items(items(list).map(str::to_string).collect())
    }

    /// Compares an answer.
    pub fn verdict(&self, answer: &str) -> Verdict {
        let plain = |score: f64| Verdict { score, exact: score == 1.0, items: None };
        let lower = || answer.to_lowercase();
        match self {
            Check::All(of) => {
                let found = found(of, &lower());
                plain(found as f64 / of.len().max(1) as f64)
            }
            Check::Any(of) => plain(f64::from(u8::from(found(of, &lower()) > 0))),
            Check::Number(number) => {
                plain(f64::from(u8::from(first_number(answer) == Some(number))))
            }
            Check::Items(expected) => {
                let written: Vec<&str> = items(answer).collect();
                let same = |(a, b): &(&String, &&str)| a == *b;
                let compared = Items {
                    expected: expected.len(),
                    written: written.len(),
                    prefix: expected.iter().zip(&written).take_while(same).count(),
                    common: common(expected, &written),
                };
                let longer = expected.len().max(written.len()).max(1);
                let score = compared.common as f64 / longer as f64;
                Verdict { score, exact: score == 1.0, items: Some(compared) }
            }
        }
    }

    /// The strings that a right answer holds.
    pub fn references(&self) -> &[String] {
        match self {
            Check::All(of) | Check::Any(of) | Check::Items(of) => of,
            Check::Number(number) => std::slice::from_ref(number),
        }
    }
}

fn found(of: &[String], answer: &str) -> usize {
    of.iter().filter(|r| answer.contains(&r.to_lowercase())).count()
}

/// The first run of digits.
fn first_number(text: &str) -> Option<&str> {
    text.split(|c: char| !c.is_ascii_digit()).find(|run| !run.is_empty())
}

fn items(text: &str) -> impl Iterator<Item = &str> {
    let between = |c: char| c.is_whitespace() || c == ',' || c == ';';
    text.split(between).map(|item| item.trim_end_matches('.')).filter(|item| !item.is_empty())
}

/// Length of the longest common subsequence.
fn common(a: &[String], b: &[&str]) -> usize {
    let mut row = vec![0usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &str) -> Vec<String> {
        Check::items(list).references().to_vec()
    }

    #[test]
    fn all_references_count_or_any_of_them() {
        let all = Check::All(strings("Blue red"));
        assert_eq!(all.verdict("It is blue.").score, 0.5);
        assert!(!all.verdict("It is blue.").exact);
        assert_eq!(all.verdict("BLUE and Red"), Verdict { score: 1.0, exact: true, items: None });
        let any = Check::Any(strings("Blue red"));
        assert_eq!(any.verdict("reddish").score, 1.0);
        assert_eq!(any.verdict("green").score, 0.0);
    }

    #[test]
    fn a_number_is_right_as_a_whole_or_wrong() {
        let check = Check::Number("1234567".into());
        for right in ["1234567", " 1234567.", "is: 1234567, or 7654321", "**1234567**"] {
            assert!(check.verdict(right).exact, "{right}");
        }
        for wrong in
            ["", "none", "91234567", "12345678", "1234568", "7654321 or 1234567", "1,234,567"]
        {
            assert_eq!(check.verdict(wrong), Verdict::default(), "{wrong}");
        }
    }

    #[test]
    fn lists_are_compared_in_order() {
        let check = Check::items("1 2 3 4 5");
        let of = |answer: &str| {
            let v = check.verdict(answer);
            let i = v.items.unwrap();
            (v.score, v.exact, i.prefix, i.written)
        };
        assert_eq!(of("1, 2, 3, 4, 5."), (1.0, true, 5, 5));
        assert_eq!(of("1\n2\n3\n4\n5\n"), (1.0, true, 5, 5));
        // One is missing, one is too many, two are swapped.
        assert_eq!(of("1, 2, 4, 5"), (0.8, false, 2, 4));
        assert_eq!(of("1, 2, 3, 4, 5, 6"), (5.0 / 6.0, false, 5, 6));
        assert_eq!(of("2, 1, 3, 4, 5"), (0.8, false, 0, 5));
        assert_eq!(of(""), (0.0, false, 0, 0));
        assert_eq!(of("12345"), (0.0, false, 0, 1));
        assert_eq!(of("1 1 1 1 1 1 1 1 1 1"), (0.1, false, 1, 10));
    }
}
