//! How threads of the pool wait for each other.

use std::time::{Duration, Instant};

/// How long a thread spins before it offers its core to others on every look.
pub(super) const SPIN: Duration = Duration::from_micros(30);
/// How long an idle thread looks for a job at most: longer than what lies between two steps of a model.
const AWAKE: Duration = Duration::from_millis(2);
/// Looks between two glances at the clock: about a microsecond.
const LOOKS: u32 = 16;
/// Time between two glances from which on somebody else must have had the core.
const DISTURBED: Duration = Duration::from_micros(50);

/// A wait that spins first and yields then.
#[derive(Default)]
pub(super) struct Wait {
    since: Option<Instant>,
    idle: Duration,
    /// Between the last two glances.
    gap: Duration,
    looks: u32,
}

impl Wait {
    /// Passes some time.
    pub(super) fn look(&mut self) {
        self.looks += 1;
        self.gap = Duration::ZERO;
        if self.looks < LOOKS {
            return std::hint::spin_loop();
        }
        self.looks = 0;
        if self.idle >= SPIN {
            std::thread::yield_now();
        }
        let idle = self.since.get_or_insert_with(Instant::now).elapsed();
        self.gap = idle.saturating_sub(self.idle);
        self.idle = idle;
    }

    /// How long the wait has been, about.
    pub(super) fn idle(&self) -> Duration {
        self.idle
    }

    /// Whether somebody else had the core during the last look.
    pub(super) fn disturbed(&self) -> bool {
        self.gap >= DISTURBED
    }
}

/// How long a worker looks for its next job before it sleeps.
pub(super) struct Patience {
    limit: Duration,
    most: Duration,
}

impl Patience {
    /// None at all for a pool that does not fit the cores.
    pub(super) fn new(fits: bool) -> Patience {
        let most = if fits { AWAKE } else { Duration::ZERO };
        Patience { limit: most, most }
    }

    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// Others want the core: sleep at once, until that stops being so.
    pub(super) fn disturbed(&mut self) {
        self.limit = Duration::ZERO;
    }

    /// A job came: a little more patience.
    pub(super) fn found(&mut self) {
        self.limit = (self.limit + self.limit / 8 + Duration::from_micros(1)).min(self.most);
    }
}
