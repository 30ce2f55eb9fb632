//! Ctrl-C: the first one ends the answer cleanly, a second one (or one while loading) ends the program.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Shell convention for "ended by SIGINT".
pub const EXIT_CODE: u8 = 130;

/// The flag that Ctrl-C sets while `armed`; see [`crate::engine::Request::cancel`].
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    cancel: Arc<AtomicBool>,
    armed: Arc<AtomicBool>,
}

impl Interrupt {
    /// Installs the handler. Without one (a second call, an odd platform) Ctrl-C just ends the program.
    pub fn install() -> Self {
        let i = Interrupt::default();
        let (cancel, armed) = (i.cancel.clone(), i.armed.clone());
        let _ = ctrlc::set_handler(move || {
            if !armed.load(Ordering::SeqCst) || cancel.swap(true, Ordering::SeqCst) {
                std::process::exit(i32::from(EXIT_CODE));
            }
        });
        i
    }

    /// From here on the first Ctrl-C only sets the flag.
    pub fn arm(&self) -> Arc<AtomicBool> {
        self.cancel.store(false, Ordering::SeqCst);
        self.armed.store(true, Ordering::SeqCst);
        self.cancel.clone()
    }

    /// From here on Ctrl-C ends the program.
    pub fn disarm(&self) {
        self.armed.store(false, Ordering::SeqCst);
    }
}
