//! How long upstream takes, lately: what admission reckons with beside the wait for a turn.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Answers that count: seven seconds' worth at 15 a second.
const ANSWERS: usize = 100;

/// Once there are as many, one in so many is looked at for what has changed.
const SELDOM: usize = 10;

/// By how much the slowest answers are exceeded now and then: by this, and half of what lies between them and the median.
const SLACK: Duration = Duration::from_millis(50);

/// How long the last answers took, and for how long there has been none.
#[derive(Debug)]
pub(super) struct Recent(Mutex<Took>);

#[derive(Debug)]
struct Took {
    us: [u64; ANSWERS],
    /// How many were noted so far.
    noted: usize,
    median: Duration,
    p90: Duration,
    /// What all but a few take less than; nothing before the first.
    nearly_all: Option<Duration>,
    /// Queries that are not answered yet.
    out: usize,
    /// Since when there has been a query without an answer to any.
    silent_since: Option<Instant>,
}

/// A query under way.
#[derive(Debug)]
pub(super) struct Query<'r> {
    recent: &'r Recent,
    asked: Instant,
}

impl Default for Recent {
    fn default() -> Self {
        Self(Mutex::new(Took {
            us: [0; ANSWERS],
            noted: 0,
            median: Duration::ZERO,
            p90: Duration::ZERO,
            nearly_all: None,
            out: 0,
            silent_since: None,
        }))
    }
}

impl Recent {
    fn took(&self) -> MutexGuard<'_, Took> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A query goes out.
    pub(super) fn ask(&self, asked: Instant) -> Query<'_> {
        let mut took = self.took();
        if took.out == 0 {
            took.silent_since = Some(asked);
        }
        took.out += 1;
        Query { recent: self, asked }
    }

    /// What nine answers in ten do not exceed; nothing before the first.
    pub(super) fn p90(&self) -> Duration {
        self.took().p90
    }

    /// What all but about one answer in a hundred take less than, where that is `within`; else nine in ten, since those that
    /// take longer are lost whenever they are asked for. `None` before the first.
    pub(super) fn nearly_all(&self, within: Duration) -> Option<Duration> {
        let took = self.took();
        let nearly_all = took.nearly_all?;
        Some(if nearly_all < within { nearly_all } else { took.p90 })
    }

    /// What the next answer is more likely than not to take at least: where upstream has been silent for longer than is
    /// usual, half as long again.
    pub(super) fn at_least(&self, now: Instant) -> Duration {
        let took = self.took();
        let since = took.silent_since.filter(|_| took.out > 0);
        let silent = since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        if silent > took.nearly_all.unwrap_or_default() {
            silent * 3 / 2
        } else {
            took.median
        }
    }
}

impl Query<'_> {
    /// It is answered.
    pub(super) fn answered(self, received: Instant) {
        let mut took = self.recent.took();
        took.silent_since = Some(received);
        took.note(received.saturating_duration_since(self.asked));
    }
}

impl Drop for Query<'_> {
    fn drop(&mut self) {
        self.recent.took().out -= 1;
    }
}

impl Took {
    fn note(&mut self, took: Duration) {
        self.us[self.noted % ANSWERS] = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.noted += 1;
        if self.noted > ANSWERS && !self.noted.is_multiple_of(SELDOM) {
            return;
        }
        let mut sorted = self.us;
        let sorted = &mut sorted[..self.noted.min(ANSWERS)];
        sorted.sort_unstable();
        let count = sorted.len();
        let at = |index: usize| Duration::from_micros(sorted[index]);
        self.median = at(count / 2);
        self.p90 = at(count * 9 / 10);
        let p99 = at((count - 1) * 99 / 100);
        self.nearly_all = Some(p99 + p99.saturating_sub(self.median) / 2 + SLACK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn note(recent: &Recent, took: Duration) {
        let now = Instant::now();
        recent.ask(now).answered(now + took);
    }

    #[test]
    fn the_p90_follows_the_last_hundred_answers() {
        let recent = Recent::default();
        assert_eq!(recent.p90(), Duration::ZERO);
        note(&recent, ms(500));
        assert_eq!(recent.p90(), ms(500));
        for took in 0..100 {
            note(&recent, ms(took));
        }
        assert_eq!(recent.p90(), ms(90));
        for _ in 0..100 {
            note(&recent, 3 * SECOND);
        }
        assert_eq!(recent.p90(), 3 * SECOND);
    }

    #[test]
    fn nearly_all_leaves_out_a_single_slow_answer_and_those_that_nobody_can_wait_for() {
        let recent = Recent::default();
        assert_eq!(recent.nearly_all(10 * SECOND), None);
        for _ in 0..99 {
            note(&recent, ms(100));
        }
        note(&recent, 20 * SECOND);
        assert_eq!(recent.nearly_all(10 * SECOND), Some(ms(150)));
        for took in 0..100 {
            note(&recent, ms(took));
        }
        // The slowest but one, and half of what it takes more than the median.
        assert_eq!(recent.nearly_all(10 * SECOND), Some(ms(98 + 24 + 50)));
        for _ in 0..5 {
            note(&recent, 20 * SECOND);
        }
        for _ in 0..95 {
            note(&recent, ms(100));
        }
        assert_eq!(recent.nearly_all(10 * SECOND), Some(ms(100)));
    }

    #[test]
    fn a_longer_silence_than_usual_says_that_answers_take_longer() {
        let (recent, start) = (Recent::default(), Instant::now());
        assert_eq!(recent.at_least(start), Duration::ZERO);
        let first = recent.ask(start);
        assert_eq!(recent.at_least(start + 2 * SECOND), 3 * SECOND);
        let second = recent.ask(start + SECOND);
        first.answered(start + 4 * SECOND);
        assert_eq!(
            recent.at_least(start + 8 * SECOND),
            4 * SECOND,
            "no longer than the first took"
        );
        assert_eq!(recent.at_least(start + 10 * SECOND), 9 * SECOND);
        drop(second);
        assert_eq!(
            recent.at_least(start + 20 * SECOND),
            4 * SECOND,
            "nobody waits for an answer"
        );
    }
}
