//! Tasks with long answers that have one right form: the answer is written freely and compared item by item.

use super::words::{pick, plain, shuffle, word};
use super::{Cell, Check, Problem, SampleError, seeded};
use crate::model::Tokenizer;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// A task with a long answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LongTask {
    /// Numbers from one to another.
    Count,
    /// The words of a list, once more.
    Copy,
    /// The numbers of a list in rising order.
    Sort,
    /// A counter after each of many steps.
    State,
}

/// Every task with its name.
pub const LONG_TASKS: [(&str, LongTask); 4] = [
    ("count", LongTask::Count),
    ("copy", LongTask::Copy),
    ("sort", LongTask::Sort),
    ("state", LongTask::State),
];

impl LongTask {
    /// Name.
    pub fn name(self) -> &'static str {
        LONG_TASKS.iter().find(|t| t.1 == self).map_or("", |t| t.0)
    }
}

/// One list: the text that asks for it, the words before the answer, and its items.
struct List {
    given: String,
    prefix: &'static str,
    items: Vec<String>,
}

impl List {
    fn new(rng: &mut ChaCha8Rng, task: LongTask, n: usize) -> List {
        let strings =
            |numbers: &[i64]| -> Vec<String> { numbers.iter().map(|n| n.to_string()).collect() };
        match task {
            LongTask::Count => {
                let first = rng.random_range(1..100i64);
                let all: Vec<i64> = (first..).take(n).collect();
                let last = all.last().copied().unwrap_or(first);
                let given = format!("Count from {first} to {last}.");
                List { given, prefix: "\nNumbers:", items: strings(&all) }
            }
            LongTask::Copy => {
                let mut items: Vec<String> = plain().map(str::to_string).collect();
                shuffle(rng, &mut items);
                items.truncate(n);
                items.extend((items.len()..n).map(|_| word(rng)));
                List { given: format!("List: {}", items.join(", ")), prefix: "\nCopy:", items }
            }
            LongTask::Sort => {
                // Ten times as many numbers as items: few come twice.
                let most = 10 * n.max(10) as i64;
                let mut all: Vec<i64> = (0..n).map(|_| rng.random_range(1..most)).collect();
                let given = format!("Numbers: {}", strings(&all).join(", "));
                all.sort_unstable();
                List { given, prefix: "\nSorted:", items: strings(&all) }
            }
            LongTask::State => {
                let start = rng.random_range(20..60i64);
                let mut steps = Vec::with_capacity(n);
                let mut values = Vec::with_capacity(n);
                let mut value = start;
                for _ in 0..n {
                    let mut step = *pick(rng, &[-3, -2, -1, 1, 2, 3]);
                    // Stays at two digits.
                    if !(10..100).contains(&(value + step)) {
                        step = -step;
                    }
                    value += step;
                    steps.push(format!("{step:+}"));
                    values.push(value);
                }
                let given = format!("A counter is at {start}. Steps: {}", steps.join(", "));
                List { given, prefix: "\nCounter after each step:", items: strings(&values) }
            }
        }
    }

    fn answer(&self) -> String {
        format!(" {}", self.items.join(", "))
    }
}

/// Problem number `number` with `items` items, behind two solved ones of eight; it is decoded from the last list on
/// (`\nCopy:`), and the answer ends with its line. The model may write half as much again as the right answer has.
///
/// # Errors
/// [`SampleError::TooFewTokens`] for no items; the tokenizer's.
pub fn long_output(
    tokenizer: &Tokenizer,
    start: &[u32],
    task: LongTask,
    items: usize,
    number: u64,
    seed: u64,
) -> Result<Problem, SampleError> {
    if items == 0 {
        return Err(SampleError::TooFewTokens { tokens: 0, least: 1 });
    }
    let index = LONG_TASKS.iter().position(|t| t.1 == task).unwrap_or(0) as u64;
    let mut rng = seeded(seed, &[index, items as u64, number]);
    let shown: String = (0..2)
        .map(|_| List::new(&mut rng, task, 8))
        .map(|l| format!("{}{}{}\n\n", l.given, l.prefix, l.answer()))
        .collect();
    let list = List::new(&mut rng, task, items);
    let encode = |s: &str| tokenizer.encode(s, false);
    let mut tokens = [start, &encode(&format!("{shown}{}", list.given))?].concat();
    let decode_from = tokens.len();
    tokens.extend(encode(list.prefix)?);
    let answer_tokens = encode(&list.answer())?.len() * 3 / 2 + 8;
    let all = tokens.len() + answer_tokens;
    Ok(Problem {
        task: task.name(),
        name: format!("{} {items} items, #{number}", task.name()),
        cell: Cell { tokens: all, depth: None, size: Some(items) },
        tokens,
        decode_from,
        answer_tokens,
        stop: Some("\n"),
        check: Check::Items(list.items),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_answers_are_right_and_others_are_not() {
        for (name, task) in LONG_TASKS {
            let mut rng = seeded(1, &[0]);
            for n in [1, 8, 300] {
                let list = List::new(&mut rng, task, n);
                assert_eq!(list.items.len(), n, "{name}");
                let check = Check::Items(list.items.clone());
                let right = check.verdict(&list.answer());
                assert!(right.exact, "{name}: {}", list.answer());
                assert_eq!(right.items.map(|i| (i.prefix, i.written)), Some((n, n)), "{name}");

                let cut = list.items[..n / 2].join(", ");
                assert!(!check.verdict(&cut).exact, "{name}");
            }
        }
    }

    #[test]
    fn lists_are_what_they_say() {
        let mut rng = seeded(7, &[0]);
        let numbers =
            |list: &List| -> Vec<i64> { list.items.iter().map(|i| i.parse().unwrap()).collect() };
        let count = numbers(&List::new(&mut rng, LongTask::Count, 50));
        assert!(count.windows(2).all(|w| w[1] == w[0] + 1));
        let sort = List::new(&mut rng, LongTask::Sort, 50);
        let sorted = numbers(&sort);
        assert!(sorted.is_sorted() && sorted.iter().all(|n| sort.given.contains(&n.to_string())));
        let state = List::new(&mut rng, LongTask::State, 400);
        let (start, steps) = state.given.split_once(". Steps: ").unwrap();
        let mut value: i64 = start.rsplit(' ').next().unwrap().parse().unwrap();
        for (step, after) in steps.split(", ").zip(numbers(&state)) {
            value += step.parse::<i64>().unwrap();
            assert_eq!(value, after);
            assert!((10..100).contains(&value));
        }
        let copy = List::new(&mut rng, LongTask::Copy, 300);
        assert!(copy.given.ends_with(&copy.answer()));
    }
}
