//! Progress of long work on standard error: a bar on a terminal, elsewhere a line now and then.

use super::ui::{bytes, note, thousands};
use crate::engine::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Time between lines where there is no terminal; shorter work says nothing.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// What a bar counts.
#[derive(Clone, Copy, Debug)]
enum Unit {
    Named(&'static str),
    Bytes,
}

/// Progress of one piece of work. Clones are the same bar.
#[derive(Clone, Debug)]
pub struct Bar {
    bar: ProgressBar,
    unit: Unit,
    /// When the last line was written, or the work began.
    said: Arc<Mutex<Instant>>,
}

impl Bar {
    /// A bar that counts `unit`.
    pub fn new(what: &'static str, unit: &'static str) -> Bar {
        let numbers = format!("{{human_pos}}/{{human_len}} {unit}, {{eta}} left");
        Bar::with(what, Unit::Named(unit), &numbers)
    }

    fn of_bytes(what: &'static str) -> Bar {
        Bar::with(what, Unit::Bytes, "{bytes}/{total_bytes} {bytes_per_sec}, {eta} left")
    }

    fn with(what: &'static str, unit: Unit, numbers: &str) -> Bar {
        let style = ProgressStyle::with_template(&format!("{{msg:<10}} [{{wide_bar}}] {numbers}"))
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        let bar = ProgressBar::new(0);
        bar.set_style(style);
        bar.set_message(what);
        Bar { bar, unit, said: Arc::new(Mutex::new(Instant::now())) }
    }

    /// What is worked on.
    pub fn about(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// `done` of `all` are done; the same number twice where nobody knows how many there are.
    pub fn at(&self, done: u64, all: u64) {
        self.bar.set_length(all);
        self.bar.set_position(done);
        if !self.bar.is_hidden() || done >= all {
            return;
        }
        let Ok(mut said) = self.said.lock() else { return };
        if said.elapsed() >= BETWEEN_LINES {
            *said = Instant::now();
            note(self.unit.line(&self.bar.message(), done, all));
        }
    }

    /// [`Bar::at`]; whether to go on, which a set `cancel` says no to.
    pub fn go_on(&self, cancel: &AtomicBool, done: u64, all: u64) -> bool {
        self.at(done, all);
        !cancel.load(Ordering::Relaxed)
    }

    /// A line above the bar.
    pub fn line(&self, line: impl std::fmt::Display) {
        self.bar.suspend(|| note(line));
    }

    /// Takes the bar away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}

impl Unit {
    fn line(self, what: &str, done: u64, all: u64) -> String {
        let percent = 100 * u128::from(done) / u128::from(all.max(1));
        match self {
            Unit::Bytes => format!("{what}: {percent} %, {} of {}", bytes(done), bytes(all)),
            Unit::Named(unit) => {
                format!("{what}: {percent} %, {} of {} {unit}", thousands(done), thousands(all))
            }
        }
    }
}

/// Shows the parts of a build one after the other.
pub fn build_progress() -> impl FnMut(Progress) {
    let mut current: Option<(&'static str, Bar)> = None;
    move |p| {
        let (what, done, all) = match p {
            Progress::Fetch(done, all) => ("fetching", done, all),
            Progress::Load(done, all) => ("loading", done, Some(all)),
            Progress::Calibrate(done, all) => ("ordering", done, Some(all)),
        };
        if current.as_ref().is_none_or(|(w, _)| *w != what) {
            let new = match p {
                Progress::Fetch(..) => Bar::of_bytes(what),
                Progress::Load(..) => Bar::new(what, "parameters"),
                Progress::Calibrate(..) => Bar::new(what, "tokens of the built-in text"),
            };
            current = Some((what, new));
        }
        if let Some((_, bar)) = &current {
            bar.at(done, all.unwrap_or(done));
            if Some(done) == all {
                bar.end();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_how_far_and_of_how_much() {
        let line = Unit::Named("tokens").line("reading", 1_500, 4_096);
        assert_eq!(line, "reading: 36 %, 1,500 of 4,096 tokens");
        let line = Unit::Bytes.line("fetching", 49_200_000, 98_362_432);
        assert_eq!(line, "fetching: 50 %, 49.2 MB of 98.4 MB");
    }

    #[test]
    fn a_set_flag_ends_the_work() {
        let (bar, cancel) = (Bar::new("reading", "tokens"), AtomicBool::new(false));
        assert!(bar.go_on(&cancel, 1, 2));
        cancel.store(true, Ordering::Relaxed);
        assert!(!bar.go_on(&cancel, 1, 2));
    }
}
