//! An instant on both clocks: the monotonic one, on which ages count, and the wall clock, by which others know it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// An instant of ours, and what a wall clock said then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Ages count on this one.
    pub at: Instant,
    /// Since 1970, on the wall clock: this machine's, or that of a store which replicas share.
    pub unix: Duration,
}

impl Moment {
    /// Now, on this machine's clocks.
    pub fn now() -> Self {
        Self {
            at: Instant::now(),
            unix: unix_now(),
        }
    }

    /// The same wall clock as of `now`, which is no earlier.
    #[must_use]
    pub fn on(self, now: Instant) -> Self {
        Self {
            at: now,
            unix: self.unix + now.saturating_duration_since(self.at),
        }
    }

    /// The wall clock's time when it was `then`, which is no later, in milliseconds since 1970.
    pub fn unix_ms(&self, then: Instant) -> u64 {
        millis(self.unix.saturating_sub(self.at.saturating_duration_since(then)))
    }
}

/// Since 1970, by this machine's wall clock.
pub fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// In whole milliseconds, rounded down.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
