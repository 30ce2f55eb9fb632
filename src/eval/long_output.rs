//! Tasks with long answers that have one right form: the answer is written freely and compared item by item.

use super::words::{different, plain, shuffle, word};
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
    /// The state of a lamp after each of many named steps: press or wait.
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

/// One list: what comes before the question, the question with the start of the answer, and the answer.
struct List {
    given: String,
    question: String,
    answer: String,
}

fn listed<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

/// Different words: common ones as long as there are any.
fn words(rng: &mut ChaCha8Rng, n: usize) -> Vec<String> {
    let mut all: Vec<String> = plain().map(str::to_string).collect();
    shuffle(rng, &mut all);
    all.truncate(n);
    let more = different(rng, n - all.len(), word);
    all.extend(more);
    all
}

impl List {
    /// With `n` items; a step of the lamp has two of them.
    fn new(rng: &mut ChaCha8Rng, task: LongTask, n: usize) -> List {
        match task {
            LongTask::Count => {
                let first = rng.random_range(1..100i64);
                let last = first + n as i64 - 1;
                let question = format!("From {first} to {last}:");
                let answer = listed(&(first..=last).collect::<Vec<_>>());
                List { given: String::new(), question, answer }
            }
            LongTask::Copy => {
                let answer = listed(&words(rng, n));
                List { given: format!("List: {answer}"), question: "\nCopy:".into(), answer }
            }
            LongTask::Sort => {
                // Out of twice as many numbers as items, so that the next one is not simply one more.
                let mut all: Vec<i64> = (1..=99.max(2 * n as i64)).collect();
                shuffle(rng, &mut all);
                all.truncate(n);
                let given = format!("Numbers: {}", listed(&all));
                all.sort_unstable();
                List { given, question: "\nSorted:".into(), answer: listed(&all) }
            }
            LongTask::State => {
                let (mut steps, mut states) = (Vec::new(), Vec::new());
                let mut on = false;
                for name in words(rng, n.div_ceil(2)) {
                    let press = rng.random_bool(0.5);
                    on ^= press;
                    steps.push(format!("{name} {}", if press { "press" } else { "wait" }));
                    states.push(format!("{name} {}", if on { "on" } else { "off" }));
                }
                let given = format!("The lamp is off. Steps: {}", listed(&steps));
                List { given, question: "\nLamp:".into(), answer: listed(&states) }
            }
        }
    }
}

/// Problem number `number` with `items` items, behind two solved ones of eight; its question
/// (`Copy:`) is decoded token by token, and the answer ends with its line. The model may write half as much again as the right answer has.
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
        .map(|l| format!("{}{} {}\n\n", l.given, l.question, l.answer))
        .collect();
    let list = List::new(&mut rng, task, items);
    let encode = |s: &str| tokenizer.encode(s, false);
    let mut tokens = [start, &encode(&format!("{shown}{}", list.given))?].concat();
    let decode_from = tokens.len();
    tokens.extend(encode(&list.question)?);
    let answer_tokens = encode(&format!(" {}", list.answer))?.len() * 3 / 2 + 8;
    let all = tokens.len() + answer_tokens;
    Ok(Problem {
        task: task.name(),
        name: format!("{} {items} items, #{number}", task.name()),
        cell: Cell { tokens: all, depth: None, size: Some(items) },
        tokens,
        decode_from,
        answer_tokens,
        stop: Some("\n"),
        check: Check::items(&list.answer),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_answers_are_right_and_others_are_not() {
        for (name, task) in LONG_TASKS {
            let mut rng = seeded(1, &[0]);
            for n in [2, 8, 300] {
                let list = List::new(&mut rng, task, n);
                let check = Check::items(&list.answer);
                assert_eq!(check.references().len(), n, "{name}");
                let right = check.verdict(&format!(" {}.", list.answer));
                assert!(right.exact, "{name}: {}", list.answer);
                assert_eq!(right.items.map(|i| (i.prefix, i.written)), Some((n, n)), "{name}");
                let (first, rest) = list.answer.split_once(", ").unwrap();
                for wrong in [rest, first, &format!("{}, {first}", list.answer)] {
                    assert!(!check.verdict(wrong).exact, "{name}: {wrong}");
                }
            }
        }
    }

    #[test]
    fn lists_are_what_they_say() {
        let mut rng = seeded(7, &[0]);
        let numbers = |list: &str| -> Vec<i64> {
            list.split(", ").map(|item| item.parse().unwrap()).collect()
        };
        let count = numbers(&List::new(&mut rng, LongTask::Count, 50).answer);
        assert!(count.windows(2).all(|w| w[1] == w[0] + 1));
        let sort = List::new(&mut rng, LongTask::Sort, 50);
        let (sorted, mut given) =
            (numbers(&sort.answer), numbers(sort.given.strip_prefix("Numbers: ").unwrap()));
        assert_ne!(sorted, given);
        given.sort_unstable();
        assert_eq!(sorted, given);
        let state = List::new(&mut rng, LongTask::State, 600);
        let steps = state.given.split_once("Steps: ").unwrap().1;
        let mut on = false;
        for (step, after) in steps.split(", ").zip(state.answer.split(", ")) {
            let ((name, what), (same, lamp)) =
                (step.split_once(' ').unwrap(), after.split_once(' ').unwrap());
            on = if what == "press" { !on } else { on };
            assert_eq!((same, lamp), (name, if on { "on" } else { "off" }));
        }
        let copy = List::new(&mut rng, LongTask::Copy, 300);
        assert_eq!(copy.given, format!("List: {}", copy.answer));
    }
}
