//! How long upstream takes, lately: what admission reckons with beside the wait for a turn.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Answers that count: seven seconds' worth at 15 a second.
const ANSWERS: usize = 100;

/// Once there are as many, one in so many is looked at for what has changed.
const SELDOM: usize = 10;

/// The ninetieth percentile of how long the last answers took.
#[derive(Debug)]
pub(super) struct Recent {
    took: Mutex<Took>,
    p90_us: AtomicU64,
}

#[derive(Debug)]
struct Took {
    us: [u64; ANSWERS],
    /// How many were noted so far.
    noted: usize,
}

impl Default for Recent {
    fn default() -> Self {
        Self {
            took: Mutex::new(Took {
                us: [0; ANSWERS],
                noted: 0,
            }),
            p90_us: AtomicU64::new(0),
        }
    }
}

impl Recent {
    /// An answer took so long.
    pub(super) fn note(&self, took: Duration) {
        let mut all = self.took.lock().unwrap_or_else(PoisonError::into_inner);
        let at = all.noted % ANSWERS;
        all.us[at] = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        all.noted += 1;
        if all.noted > ANSWERS && !all.noted.is_multiple_of(SELDOM) {
            return;
        }
        let mut sorted = all.us;
        let sorted = &mut sorted[..all.noted.min(ANSWERS)];
        let nine_tenths = sorted.len() * 9 / 10;
        let (_, p90, _) = sorted.select_nth_unstable(nine_tenths);
        self.p90_us.store(*p90, Ordering::Relaxed);
    }

    /// What nine answers in ten do not exceed; nothing before the first.
    pub(super) fn p90(&self) -> Duration {
        Duration::from_micros(self.p90_us.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_p90_follows_the_last_hundred_answers() {
        let recent = Recent::default();
        assert_eq!(recent.p90(), Duration::ZERO);
        recent.note(Duration::from_millis(500));
        assert_eq!(recent.p90(), Duration::from_millis(500));
        for ms in 0..100 {
            recent.note(Duration::from_millis(ms));
        }
        assert_eq!(recent.p90(), Duration::from_millis(90));
        for _ in 0..100 {
            recent.note(Duration::from_secs(3));
        }
        assert_eq!(recent.p90(), Duration::from_secs(3));
    }
}
