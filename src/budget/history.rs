//! How many queries an account wrote in each of the last seconds: what the status page draws. Pure: `now` is passed in.
//!
//! It tells, and decides nothing: what the promise is about is `budget/ring.rs`'s.

use std::collections::VecDeque;

use tokio::time::Instant;

/// How far back it goes: three minutes.
const SECONDS: usize = 180;

/// Only seconds in which something was written are kept, so that an account that asked for nothing takes no room; at most
/// 4 KiB.
#[derive(Debug, Default)]
pub(super) struct History {
    /// The first query's instant: seconds are counted from it.
    start: Option<Instant>,
    /// Second and number of queries, in order.
    written: VecDeque<(usize, u32)>,
    total: u64,
}

impl History {
    /// One query was written, `at` this instant; no earlier than the one before.
    pub(super) fn count(&mut self, at: Instant) {
        let start = *self.start.get_or_insert(at);
        let second = since(start, at);
        self.forget(second);
        self.total += 1;
        match self.written.back_mut() {
            Some((last, count)) if *last == second => *count += 1,
            Some(_) | None => self.written.push_back((second, 1)),
        }
    }

    /// Each of the last whole seconds before `now`, the oldest first.
    pub(super) fn seconds(&mut self, now: Instant) -> Vec<u32> {
        let mut seconds = vec![0; SECONDS];
        if let Some(start) = self.start {
            let this = since(start, now);
            self.forget(this);
            for (second, count) in &self.written {
                // What was written in this second, it is too early to tell.
                if let Some(place) = (second + SECONDS)
                    .checked_sub(this)
                    .and_then(|place| seconds.get_mut(place))
                {
                    *place = *count;
                }
            }
        }
        seconds
    }

    /// Queries in these and in the second that is not over.
    pub(super) fn total(&mut self, now: Instant) -> u64 {
        if let Some(start) = self.start {
            self.forget(since(start, now));
        }
        self.total
    }

    fn forget(&mut self, this: usize) {
        while let Some((second, count)) = self.written.front().copied()
            && second + SECONDS < this
        {
            self.written.pop_front();
            self.total -= u64::from(count);
        }
    }
}

fn since(start: Instant, at: Instant) -> usize {
    usize::try_from(at.saturating_duration_since(start).as_secs()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_whole_second_is_told_and_the_one_that_is_not_over_is_not() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut history = History::default();
        assert_eq!(history.seconds(start), vec![0; SECONDS]);
        for ms in [0, 400, 999, 1000, 3000, 3001] {
            history.count(at(ms));
        }
        assert_eq!(history.seconds(at(3999))[SECONDS - 3..], [3, 1, 0]);
        assert_eq!(history.seconds(at(4000))[SECONDS - 4..], [3, 1, 0, 2]);
        assert_eq!(history.total(at(4000)), 6);
    }

    #[test]
    fn three_minutes_are_kept_and_no_more() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut history = History::default();
        for second in 0..1000 {
            history.count(at(second));
        }
        assert!(history.written.len() <= SECONDS + 1);
        assert_eq!(history.seconds(at(1000)), vec![1; SECONDS]);
        assert_eq!(history.seconds(at(1100))[..SECONDS - 100], [1; SECONDS - 100]);
        assert_eq!(history.seconds(at(1100))[SECONDS - 100..], [0; 100]);
        assert_eq!((history.total(at(1180)), history.total(at(1181))), (0, 0));
        assert_eq!(history.seconds(at(5000)), vec![0; SECONDS]);
    }
}
