//! Lines on both outputs, and small formatting.

use crate::backend::Capabilities;
use crate::engine::Engine;
use crate::select::Plan;
use std::io::{Error, Write};
use std::sync::Once;

/// Says what the engine had to say while it was built, and what there is to say of its device.
pub fn notes(engine: &Engine) {
    about_device(engine.backend().caps());
    for n in engine.notes() {
        note(format!("note: {n}"));
    }
}

/// A hint at devices that are slower than the CPU which they run on, once in a process.
pub fn about_device(caps: &Capabilities) {
    static SAID: Once = Once::new();
    if caps.software {
        SAID.call_once(|| {
            note(format!("note: {} is a software driver; -d cpu is faster", caps.device));
        });
    }
}

/// A line below a table of bytes where some of them are bounds; nothing where all are exact.
pub fn bounds<'a>(plans: impl IntoIterator<Item = (&'a str, &'a Plan)>) -> String {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in plans.into_iter().filter(|(_, plan)| plan.reads_at_most()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() {
        return String::new();
    }
    format!(
        "KV bytes of {} are the most that a step may read: mass ends lists sooner.\n",
        names.join(", ")
    )
}

/// 1234567 -> "1,234,567".
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// "1 step", "2 steps".
pub fn count(n: usize, what: &str) -> String {
    format!("{} {what}{}", thousands(n as u64), if n == 1 { "" } else { "s" })
}

/// Bytes with a decimal unit.
pub fn bytes(n: u64) -> String {
    match n {
        0..1_000 => format!("{n} B"),
        1_000..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

/// " +- 0.25" behind a mean; nothing where there is no error.
pub fn plus_minus(error: Option<f64>, decimals: usize) -> String {
    error.map_or_else(String::new, |e| format!(" +- {e:.decimals$}"))
}

/// Writes to standard output.
///
/// # Errors
/// A reader that went away (see [`is_broken_pipe`]), where `print!` would panic; a full disk.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    // Of the same kind, by which readers that went away are told.
    written.map_err(|e| Error::new(e.kind(), format!("cannot write to standard output: {e}")))
}

/// An error with its causes, but for those that a sentence in front of them has told already.
pub fn sentence(e: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in e.chain().map(ToString::to_string) {
        if !said.contains(&cause) {
            said += if said.is_empty() { "" } else { ": " };
            said += &cause;
        }
    }
    said
}

/// A line on standard error. Nobody is left to be told where that cannot be written to.
pub fn note(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The reader of our output went away (`| head`).
pub fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().any(|c| {
        c.downcast_ref::<std::io::Error>()
            .is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_cause_is_told_once() {
        let told = anyhow::anyhow!("no space").context("cannot write a.txt: no space");
        assert_eq!(super::sentence(&told), "cannot write a.txt: no space");
        let other = anyhow::anyhow!("no space").context("cannot write a.txt");
        assert_eq!(super::sentence(&other), "cannot write a.txt: no space");
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(super::thousands(1_234_567), "1,234,567");
        assert_eq!(super::thousands(12), "12");
        assert_eq!(super::bytes(98_362_432), "98.4 MB");
        assert_eq!(super::plus_minus(Some(0.251), 2), " +- 0.25");
        assert_eq!(super::plus_minus(None, 2), "");
    }
}
