//! An account's polls by how they were answered, since it formed and lately: what the status page shows. The metrics count
//! the same for every label; accounts that share one are told apart only here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use strum::VariantArray as _;
use tokio::time::Instant;

use crate::outcome::Served;

/// What is told of lately covers one to two of these.
const SPAN: Duration = Duration::from_mins(3);

/// The ways of [`Served`], and last those that have flown and were answered without it.
const COUNTS: usize = Served::VARIANTS.len() + 1;
const FLOWN: usize = Served::VARIANTS.len();

/// Polls by how they were answered.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Polls([u64; COUNTS]);

impl Polls {
    /// Those that were answered so.
    pub(super) fn of(&self, served: Served) -> u64 {
        self.0[served as usize]
    }

    /// Those that opened no flight, and were answered with what was there or by somebody else's.
    pub(super) fn saved(&self) -> u64 {
        let saving: u64 = Served::SAVING.into_iter().map(|served| self.of(served)).sum();
        saving.saturating_sub(self.0[FLOWN])
    }
}

#[derive(Debug)]
pub(super) struct Tally {
    start: Instant,
    polls: [AtomicU64; COUNTS],
    /// The counts at two instants: lately is since the first.
    marks: Mutex<[(Instant, Polls); 2]>,
}

impl Tally {
    /// Nothing is counted before `now`.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            start: now,
            polls: Default::default(),
            marks: Mutex::new([(now, Polls::default()); 2]),
        }
    }

    /// One more poll was answered so, and `has_flown` or not.
    pub(super) fn count(&self, served: Served, has_flown: bool) {
        self.polls[served as usize].fetch_add(1, Ordering::Relaxed);
        if has_flown && Served::SAVING.contains(&served) {
            self.polls[FLOWN].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How long it has counted.
    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.start)
    }

    /// Polls since the account formed.
    pub(super) fn total(&self) -> Polls {
        Polls(self.polls.each_ref().map(|count| count.load(Ordering::Relaxed)))
    }

    /// Polls of the last three to six minutes before `now`, and how long that is exactly; longer where nobody calls
    /// [`Self::forget_old`].
    pub(super) fn lately(&self, now: Instant) -> (Duration, Polls) {
        let [(since, before), _] = *self.marks.lock();
        let mut polls = self.total();
        for (count, before) in polls.0.iter_mut().zip(before.0) {
            // Another thread may have marked what this one has not seen yet.
            *count = count.saturating_sub(before);
        }
        (now.saturating_duration_since(since), polls)
    }

    /// Forgets what is too old; to be called every few seconds.
    pub(super) fn forget_old(&self, now: Instant) {
        let mut marks = self.marks.lock();
        let [_, (newer, _)] = *marks;
        if now.saturating_duration_since(newer) >= SPAN {
            *marks = [marks[1], (now, self.total())];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lately_is_three_to_six_minutes_and_the_total_is_all() {
        let start = Instant::now();
        let tally = Tally::new(start);
        let mut longest = Duration::ZERO;
        for second in 1..=1000 {
            let now = start + Duration::from_secs(second);
            tally.count(Served::Hit, false);
            if second % 5 == 0 {
                tally.forget_old(now);
            }
            let (span, polls) = tally.lately(now);
            assert_eq!(polls.of(Served::Hit), span.as_secs(), "one a second");
            assert!(second < 180 || span >= SPAN, "{span:?}");
            longest = longest.max(span);
        }
        assert!(
            longest > SPAN && longest <= SPAN * 2 + Duration::from_secs(5),
            "{longest:?}"
        );
        assert_eq!((tally.total().of(Served::Hit), tally.total().saved()), (1000, 1000));
    }

    #[test]
    fn who_has_flown_saved_nothing_however_it_was_answered() {
        let tally = Tally::new(Instant::now());
        for &served in Served::VARIANTS {
            for has_flown in [true, false] {
                tally.count(served, has_flown);
            }
        }
        assert_eq!(tally.total().saved(), 3);
    }
}
