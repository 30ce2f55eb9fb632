//! Where and when a measurement was taken.

use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, Capabilities};
use serde::Serialize;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// What a reader needs to place a report.
#[derive(Clone, Debug, Serialize)]
pub struct Environment {
    /// Of this crate.
    pub version: &'static str,
    /// Git commit of the source: `LONGSIGHT_COMMIT` at run or build time, else what git says of the source folder
    /// (`-dirty` with uncommitted changes) where it has not moved since the program was built, else `unknown`.
    pub commit: String,
    /// UTC, `2026-01-31T12:00:00Z`.
    pub date: String,
    /// Operating system and architecture.
    pub system: String,
    /// Threads of the CPU backend.
    pub host_threads: usize,
    /// Device, driver and capabilities.
    pub device: Capabilities,
}

impl Environment {
    /// Of this process and `b`.
    pub fn of(b: &dyn Backend) -> Environment {
        Environment {
            version: env!("CARGO_PKG_VERSION"),
            commit: commit(),
            date: date(SystemTime::now()),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            host_threads: CpuBackend::threads(),
            device: b.caps().clone(),
        }
    }
}

fn commit() -> String {
    let given = std::env::var("LONGSIGHT_COMMIT").ok().filter(|c| !c.trim().is_empty());
    given
        .or_else(|| option_env!("LONGSIGHT_COMMIT").map(str::to_owned))
        .or_else(source_commit)
        .map_or_else(|| "unknown".into(), |c| c.trim().to_owned())
}

/// Asks git about the folder this was built from, where both are still there.
fn source_commit() -> Option<String> {
    let git = |args: &[&str]| {
        let out = Command::new("git")
            .args(["-C", env!("CARGO_MANIFEST_DIR")])
            .args(args)
            .output()
            .ok()
            .filter(|o| o.status.success())?;
        String::from_utf8(out.stdout).ok()
    };
    let moves = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
    let changed = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    let moved = changed(&Path::new(env!("CARGO_MANIFEST_DIR")).join(moves.trim()))?;
    if moved > changed(&std::env::current_exe().ok()?)? {
        return None;
    }
    let head = git(&["rev-parse", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(format!("{}{}", head.trim(), if changed.trim().is_empty() { "" } else { "-dirty" }))
}

/// RFC 3339 in UTC, by the proleptic Gregorian calendar.
fn date(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (h, m, s) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{:02}T{h:02}:{m:02}:{s:02}Z", days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_follow_the_calendar() {
        let at = |s: u64| date(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        // Leap day of a year divisible by 400, and the end of a leap year.
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59Z");
        assert_eq!(at(1_000_000_000), "2001-09-09T01:46:40Z");
    }
}
