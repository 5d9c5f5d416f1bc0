//! What part of an account's limit a process can count on: what is on loan, less what others take of it who want it,
//! too. Pure: `now` is passed in.
//!
//! The store speaks of one moment. A single poll at another replica halves what is left here until it is served, and a
//! replica that restarts is back soon: who waits for seconds is told by the mean of the last two, or half of a queue
//! would be turned away and the budget then lie idle.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// The mean is over so long; and a lease that has ended is missing after so long.
const SPAN: Duration = Duration::from_secs(2);

/// What the store told counts for so long after nobody waits here any more.
const KEPT: Duration = Duration::from_secs(1);

/// What was told within this is kept as one, so that an account's past is short.
const PIECE: Duration = Duration::from_millis(100);

/// A share is not told to be less: for a moment it may be nothing, and who waits wants to know for how long.
const LEAST: f64 = 0.001;

/// An account's part of the limit in this process.
#[derive(Debug)]
pub(super) struct Share {
    /// What part of the limit all replicas have together; or this one, alone.
    paid: f64,
    /// What part of that came here, and for how long, up to `since`: the latest last. Before it was everything.
    past: VecDeque<(Duration, f64)>,
    since: Instant,
    part: f64,
    /// From when on nobody waits here any more, nor did lately: then everything would come here.
    rests: Option<Instant>,
}

impl Share {
    pub(super) fn new(paid: f64, now: Instant) -> Self {
        Self {
            paid,
            past: VecDeque::new(),
            since: now,
            part: 1.0,
            rests: None,
        }
    }

    /// Changes what part of the limit all replicas have.
    pub(super) fn pay(&mut self, paid: f64) {
        self.paid = paid;
    }

    /// The store says what part of it comes here from `now` on.
    pub(super) fn told(&mut self, part: f64, now: Instant) {
        self.pass(now);
        self.part = part;
    }

    /// Whether anybody waits here, from `now` on.
    pub(super) fn waits(&mut self, anybody: bool, now: Instant) {
        self.pass(now);
        self.rests = if anybody {
            None
        } else {
            self.rests.or_else(|| Some(now + KEPT))
        };
    }

    /// What part of the limit can be counted on: in the mean of the last two seconds, and never nothing.
    pub(super) fn of_limit(&self, now: Instant) -> f64 {
        let (mut left, mut sum) = (SPAN, 0.0);
        for (lasted, part) in self.latest(now).into_iter().chain(self.past.iter().rev().copied()) {
            let counts = lasted.min(left);
            sum += counts.as_secs_f64() * part;
            left -= counts;
        }
        let mean = (sum + left.as_secs_f64()) / SPAN.as_secs_f64();
        (self.paid * mean).clamp(LEAST, 1.0)
    }

    /// Whether others wanted permits, too, when the store was asked last, a moment ago.
    pub(super) fn is_contended(&self, now: Instant) -> bool {
        self.part < 1.0 && self.rests.is_none_or(|rests| now < rests)
    }

    /// What has passed since `since`, the latest first.
    fn latest(&self, now: Instant) -> [(Duration, f64); 2] {
        let rests = self
            .rests
            .map_or(now, |rests| rests.clamp(self.since, now.max(self.since)));
        let resting = now.saturating_duration_since(rests);
        [(resting, 1.0), (rests.saturating_duration_since(self.since), self.part)]
    }

    /// Moves what has passed into the past.
    fn pass(&mut self, now: Instant) {
        let [resting, told] = self.latest(now);
        for (lasted, part) in [told, resting].into_iter().filter(|(lasted, _)| !lasted.is_zero()) {
            match self.past.back_mut() {
                Some((before, mean)) if *before + lasted <= PIECE => {
                    let sum = before.as_secs_f64() * *mean + lasted.as_secs_f64() * part;
                    *before += lasted;
                    *mean = sum / before.as_secs_f64();
                }
                _ => self.past.push_back((lasted, part)),
            }
        }
        // What is older than the span is forgotten.
        let mut kept = Duration::ZERO;
        let counts = self.past.iter().rev().take_while(|(lasted, _)| {
            let is_needed = kept < SPAN;
            kept += *lasted;
            is_needed
        });
        let forgotten = self.past.len() - counts.count();
        self.past.drain(..forgotten);
        if !resting.0.is_zero() {
            self.part = 1.0;
        }
        self.since = now.max(self.since);
    }
}

/// How many leases count. One that has ended is mostly about to be back: the store has forgotten, or a replica
/// restarts.
#[derive(Debug)]
pub(super) struct Leases {
    counted: u32,
    /// When there were as many, or nothing could be known of them.
    seen: Instant,
}

impl Leases {
    /// As many as there can be.
    pub(super) fn all(replicas: u32, now: Instant) -> Self {
        Self {
            counted: replicas,
            seen: now,
        }
    }

    pub(super) fn counted(&self) -> u32 {
        self.counted
    }

    /// The store says how many there are; while this process does not lend it may be that none can. True if it changes
    /// anything.
    pub(super) fn told(&mut self, alive: u32, lends: bool, now: Instant) -> bool {
        let before = self.counted;
        if lends && (alive >= before || now.saturating_duration_since(self.seen) >= SPAN) {
            self.counted = alive;
        }
        if !lends || self.counted == alive {
            self.seen = now;
        }
        self.counted != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A share of everything, for which somebody has waited for long.
    fn share() -> (Share, Instant) {
        let now = Instant::now();
        (Share::new(1.0, now), now + ms(10_000))
    }

    #[track_caller]
    fn assert_share(share: &Share, at: Instant, expected: f64) {
        let of_limit = share.of_limit(at);
        assert!((of_limit - expected).abs() < 1e-9, "{of_limit}, not {expected}");
    }

    #[test]
    fn a_moment_of_contention_costs_what_it_takes() {
        let (mut share, now) = share();
        share.told(0.5, now);
        share.told(1.0, now + ms(60));
        assert_share(&share, now + ms(60), 0.985);
        assert_share(&share, now + ms(2030), 0.9925);
        assert_share(&share, now + ms(2060), 1.0);
    }

    #[test]
    fn after_two_seconds_of_contention_the_share_is_what_the_store_says() {
        let (mut share, now) = share();
        for asked in 0..40 {
            share.told(0.25, now + ms(25 * asked));
        }
        assert_share(&share, now + ms(1000), 0.625);
        for asked in 40..80 {
            share.told(0.25, now + ms(25 * asked));
        }
        assert_share(&share, now + ms(2000), 0.25);
        assert_share(&share, now + ms(60_000), 0.25);
    }

    #[test]
    fn what_changes_all_the_time_is_the_mean_of_it_and_takes_no_more_room() {
        let (mut share, now) = share();
        for asked in 0..10_000_u32 {
            share.told(f64::from(asked % 2), now + ms(2) * asked);
        }
        let of_limit = share.of_limit(now + ms(20_000));
        assert!((of_limit - 0.5).abs() < 0.01, "{of_limit}");
        assert!(share.past.len() <= 41, "{}", share.past.len());
    }

    #[test]
    fn where_nobody_waits_any_more_others_are_forgotten_in_a_second_and_the_mean_follows() {
        let (mut share, now) = share();
        share.told(0.5, now);
        let quiet = now + ms(3000);
        share.waits(false, quiet);
        // Again and again nobody: since then all the same.
        share.waits(false, quiet + ms(900));
        assert!(share.is_contended(quiet + ms(999)) && !share.is_contended(quiet + ms(1000)));
        assert_share(&share, quiet + ms(1000), 0.5);
        assert_share(&share, quiet + ms(2000), 0.75);
        assert_share(&share, quiet + ms(3000), 1.0);
        share.waits(true, quiet + ms(2000));
        assert_share(&share, quiet + ms(3000), 1.0);
        assert!(!share.is_contended(quiet + ms(3000)), "nobody has been heard of since");
    }

    #[test]
    fn whoever_comes_back_within_a_second_finds_what_was_told() {
        let (mut share, now) = share();
        share.told(0.5, now);
        share.waits(false, now + ms(500));
        share.waits(true, now + ms(1400));
        assert_share(&share, now + ms(2000), 0.5);
        assert!(share.is_contended(now + ms(2000)));
    }

    #[test]
    fn it_is_a_part_of_what_is_paid_out_and_never_nothing() {
        let (mut share, now) = share();
        share.told(0.5, now);
        share.pay(2.0 / 3.0);
        assert_share(&share, now + ms(2000), 1.0 / 3.0);
        share.pay(0.0);
        assert_share(&share, now + ms(2000), LEAST);
    }

    #[test]
    fn a_lease_that_is_back_within_two_seconds_was_never_missing() {
        let now = Instant::now();
        let mut leases = Leases::all(3, now);
        assert!(!leases.told(2, true, now + ms(1900)));
        assert!(!leases.told(3, true, now + ms(2100)));
        assert!(!leases.told(2, true, now + ms(4000)));
        assert_eq!(leases.counted(), 3);
        assert!(leases.told(2, true, now + ms(4100)));
        assert!(leases.told(3, true, now + ms(4200)), "one more counts at once");
    }

    #[test]
    fn while_a_process_waits_with_all_others_no_lease_is_missing() {
        let now = Instant::now();
        let mut leases = Leases::all(3, now);
        for heard in 1..10 {
            assert!(!leases.told(0, false, now + ms(250) * heard));
        }
        assert!(!leases.told(1, true, now + ms(2500)));
        assert!(leases.told(1, true, now + ms(4500)));
        assert_eq!(leases.counted(), 1);
    }
}
