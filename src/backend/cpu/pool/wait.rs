//! How threads of the pool wait for each other.

use std::time::{Duration, Instant};

/// Looks between two glances at the clock.
const LOOKS: u32 = 16;

/// A wait that spins first and yields then.
pub(super) struct Wait {
    since: Option<Instant>,
    idle: Duration,
    looks: u32,
    spin: Duration,
}

impl Wait {
    pub(super) fn new(spin: Duration) -> Wait {
        Wait { since: None, idle: Duration::ZERO, looks: 0, spin }
    }

    /// Passes some time; returns how long the wait has been, about.
    pub(super) fn look(&mut self) -> Duration {
        self.looks += 1;
        if self.looks < LOOKS {
            std::hint::spin_loop();
            return self.idle;
        }
        self.looks = 0;
        let since = *self.since.get_or_insert_with(Instant::now);
        self.idle = since.elapsed();
        if self.idle >= self.spin {
            std::thread::yield_now();
        }
        self.idle
    }
}
