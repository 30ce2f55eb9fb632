//! Ctrl-C: the first one ends the work cleanly, a second one (or one while loading) ends the program.

use super::ui::note;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Shell convention for "ended by SIGINT".
pub const EXIT_CODE: u8 = 130;

/// What is said on the first Ctrl-C of work whose steps may be long.
const ENDING: &str = "ending when the step at hand is done; Ctrl-C again ends at once";

/// The flag that Ctrl-C sets while `armed`; see [`crate::engine::Request::cancel`].
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    cancel: Arc<AtomicBool>,
    armed: Arc<AtomicBool>,
    /// What the first Ctrl-C is answered with.
    answer: Arc<Mutex<Option<&'static str>>>,
}

impl Interrupt {
    /// Installs the handler. Without one (a second call, an odd platform) Ctrl-C just ends the program.
    pub fn install() -> Self {
        let i = Interrupt::default();
        let at = i.clone();
        let _ = ctrlc::set_handler(move || {
            if !at.armed.load(Ordering::SeqCst) || at.cancel.swap(true, Ordering::SeqCst) {
                std::process::exit(i32::from(EXIT_CODE));
            }
            if let Some(line) = at.answer.lock().ok().and_then(|answer| *answer) {
                // A terminal shows ^C, possibly behind a bar.
                let below = if std::io::stderr().is_terminal() { "\n" } else { "" };
                note(format!("{below}{line}"));
            }
        });
        i
    }

    /// From here on the first Ctrl-C only sets the flag, and says that what is at hand will be finished.
    pub fn arm(&self) -> Arc<AtomicBool> {
        self.arm_with(Some(ENDING))
    }

    /// As [`Interrupt::arm`], with another answer or none.
    pub fn arm_with(&self, answer: Option<&'static str>) -> Arc<AtomicBool> {
        if let Ok(mut at) = self.answer.lock() {
            *at = answer;
        }
        self.cancel.store(false, Ordering::SeqCst);
        self.armed.store(true, Ordering::SeqCst);
        self.cancel.clone()
    }

    /// From here on Ctrl-C ends the program.
    pub fn disarm(&self) {
        self.armed.store(false, Ordering::SeqCst);
    }
}
