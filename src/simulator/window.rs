//! Counts arrivals in every sliding second: the strict limiter's memory.
//!
//! An arrival at `t` is over the limit when more than `limit` arrivals, itself included, lie in `(t - 1 s, t]`. Stamps
//! come from the kernel and are recorded by many connections, so they may be recorded slightly out of order; they are
//! kept sorted, and one that is recorded late counts in the windows of those after it. Of arrivals with one stamp, the
//! one recorded first is the earlier. Pure: no clock.

use std::collections::VecDeque;

/// One second, in the nanoseconds that stamps are counted in.
const SECOND: u64 = 1_000_000_000;

/// How long stamps are remembered: a stamp recorded up to four seconds late is still counted exactly.
const MEMORY: u64 = 5 * SECOND;

/// The arrivals of one account.
pub(super) struct Window {
    limit: usize,
    /// Sorted by stamp.
    arrivals: VecDeque<Arrival>,
    requests: u64,
    violations: u64,
    highest: usize,
}

struct Arrival {
    stamp: u64,
    /// Arrivals in the second that ends with this one, itself included.
    in_second: usize,
}

impl Window {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            arrivals: VecDeque::new(),
            requests: 0,
            violations: 0,
            highest: 0,
        }
    }

    /// Records an arrival at `stamp`, in nanoseconds, and tells whether it is within the limit.
    pub(super) fn record(&mut self, stamp: u64) -> bool {
        self.requests += 1;
        let place = self.place_after(stamp);
        let first_in_second = match stamp.checked_sub(SECOND) {
            Some(second_before) => self.place_after(second_before),
            None => 0,
        };
        let in_second = place - first_in_second + 1;
        self.arrivals.insert(place, Arrival { stamp, in_second });
        self.saw(in_second);
        for later in place + 1..self.arrivals.len() {
            let arrival = &mut self.arrivals[later];
            if arrival.stamp - stamp >= SECOND {
                break;
            }
            arrival.in_second += 1;
            let in_second = arrival.in_second;
            self.saw_one_more(in_second);
        }
        self.forget();
        in_second <= self.limit
    }

    /// All arrivals that were ever recorded.
    pub(super) fn requests(&self) -> u64 {
        self.requests
    }

    /// Arrivals over the limit, counting those that became so by one recorded late.
    pub(super) fn violations(&self) -> u64 {
        self.violations
    }

    /// The most arrivals that any second held.
    pub(super) fn highest(&self) -> usize {
        self.highest
    }

    /// The place behind every arrival at or before `stamp`. The tail is looked at first: most stamps are the newest.
    fn place_after(&self, stamp: u64) -> usize {
        match self.arrivals.back() {
            Some(newest) if newest.stamp > stamp => self.arrivals.partition_point(|arrival| arrival.stamp <= stamp),
            _ => self.arrivals.len(),
        }
    }

    fn saw(&mut self, in_second: usize) {
        self.highest = self.highest.max(in_second);
        if in_second > self.limit {
            self.violations += 1;
        }
    }

    /// An arrival's second grew to `in_second`: it becomes a violation once, when it crosses the limit.
    fn saw_one_more(&mut self, in_second: usize) {
        self.highest = self.highest.max(in_second);
        if in_second == self.limit + 1 {
            self.violations += 1;
        }
    }

    fn forget(&mut self) {
        let Some(newest) = self.arrivals.back().map(|arrival| arrival.stamp) else {
            return;
        };
        while self
            .arrivals
            .front()
            .is_some_and(|oldest| newest - oldest.stamp > MEMORY)
        {
            self.arrivals.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn recorded(limit: usize, stamps: impl IntoIterator<Item = u64>) -> Window {
        let mut window = Window::new(limit);
        for stamp in stamps {
            window.record(stamp);
        }
        window
    }

    #[test]
    fn fifteen_in_a_second_are_within_the_limit_and_a_sixteenth_is_not() {
        let mut window = Window::new(15);
        assert!((0..15).all(|n| window.record(10 * SECOND + n * MS)));
        assert!(!window.record(10 * SECOND + 999 * MS));
        assert_eq!((window.violations(), window.highest(), window.requests()), (1, 16, 16));
    }

    #[test]
    fn a_window_is_half_open() {
        let mut window = recorded(15, (0..15).map(|_| 10 * SECOND));
        assert!(window.record(11 * SECOND));
        assert_eq!((window.violations(), window.highest()), (0, 15));
        let mut window = recorded(15, (0..15).map(|_| 10 * SECOND));
        assert!(!window.record(11 * SECOND - 1));
    }

    #[test]
    fn a_late_stamp_counts_in_the_seconds_of_those_after_it() {
        let mut window = recorded(2, [SECOND, SECOND + 500 * MS]);
        assert!(window.record(SECOND + 400 * MS), "its own second holds two");
        assert_eq!((window.violations(), window.highest()), (1, 3));
        assert!(!window.record(SECOND + 450 * MS));
        assert_eq!(window.violations(), 2);
    }

    #[test]
    fn stamps_near_the_epoch_are_counted_too() {
        let window = recorded(1, [0, 1, SECOND]);
        assert_eq!((window.violations(), window.highest()), (2, 2));
    }

    #[test]
    fn old_stamps_are_forgotten() {
        let window = recorded(1_000_000, (0..100_000).map(|n| n * MS));
        assert_eq!(window.arrivals.len(), 5001);
        assert_eq!((window.requests(), window.highest()), (100_000, 1000));
    }

    proptest! {
        #[test]
        fn the_count_is_that_of_a_naive_one(
            limit in 1usize..20,
            stamps in prop::collection::vec((0u64..4000).prop_map(|tenths| tenths * MS / 10 * 8), 0..300),
        ) {
            let window = recorded(limit, stamps.iter().copied());
            let mut sorted = stamps;
            sorted.sort_unstable();
            let counts: Vec<usize> = (0..sorted.len())
                .map(|at| sorted[..=at].iter().filter(|&&earlier| earlier + SECOND > sorted[at]).count())
                .collect();
            prop_assert_eq!(window.highest(), counts.iter().copied().max().unwrap_or(0));
            prop_assert_eq!(window.violations(), counts.iter().filter(|&&count| count > limit).count() as u64);
        }
    }
}
