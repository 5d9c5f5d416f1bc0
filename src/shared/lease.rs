//! When a process may spend: its slice lent, at home, or neither. Pure: `now` is passed in.
//!
//! The numbered rules are those of `shared.rs`. A slice is lent from the store's time that a call names until 1 s later
//! on the store's clock; on this process's own clock it is home 1 s + window after that time was heard. Everything
//! doubtful costs a wait, never a query too many.

use std::time::Duration;

use strum::{AsRefStr, IntoStaticStr, VariantArray};
use tokio::time::Instant;

use super::script::Call;

/// How long the store counts on a slice, after the time that the call named: `LEASE` of `lend.lua`.
pub(super) const LENT: Duration = Duration::from_secs(1);

/// A clock may differ by this before it counts as a step, here as in `lend.lua`.
const STEP: Duration = Duration::from_millis(5);

/// Two calls running without a reply: cut off.
const MISSES: u32 = 2;

/// Replies for so long without a miss: no longer cut off.
const STEADY: Duration = Duration::from_secs(1);

/// The store's time, when this process learnt of it.
#[derive(Clone, Copy, Debug)]
struct LastTime {
    /// In µs on the store's clock.
    time: u64,
    /// When the call was sent, and the reply received.
    sent: Instant,
    received: Instant,
}

/// Where a process stands with its slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Standing {
    /// It spends nothing: it has just started, or something was doubtful.
    Waiting,
    /// The slice is lent, permits come from the store.
    Lending,
    /// Cut off, the slice not home yet.
    CutOff,
    /// Cut off, and spending its slice.
    Alone,
}

impl Standing {
    /// Whether there are permits to be had, the store's or the slice's.
    pub(super) fn spends(self) -> bool {
        match self {
            Self::Lending | Self::Alone => true,
            Self::Waiting | Self::CutOff => false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Lease {
    /// 1 s plus the margin.
    window: Duration,
    /// A third of the margin: the longest that a reply may take, and a permit be late.
    third: Duration,
    generation: String,
    seen: Option<LastTime>,
    /// From here on nobody else can be spending the slice.
    home: Instant,
    /// Before this nothing is spent and nothing lent.
    quiet: Instant,
    is_alone: bool,
    is_cut_off: bool,
    is_leaving: bool,
    misses: u32,
    steady_since: Option<Instant>,
}

impl Lease {
    /// Rule 6: a process that starts at `now` spends and lends nothing for 1 s + window, since its predecessor may
    /// have.
    pub(super) fn new(window: Duration, third: Duration, now: Instant) -> Self {
        let home = now + LENT + window;
        Self {
            window,
            third,
            generation: String::new(),
            seen: None,
            home,
            quiet: home,
            is_alone: false,
            is_cut_off: false,
            is_leaving: false,
            misses: 0,
            steady_since: None,
        }
    }

    /// Whether permits may be had from the store.
    pub(super) fn lends(&self, now: Instant) -> bool {
        !self.is_alone && !self.is_cut_off && self.seen.is_some() && now >= self.quiet
    }

    /// Rule 8: whether the slice is spent here.
    pub(super) fn is_alone(&self) -> bool {
        self.is_alone
    }

    /// Whether calls have had no replies.
    pub(super) fn is_cut_off(&self) -> bool {
        self.is_cut_off
    }

    pub(super) fn standing(&self, now: Instant) -> Standing {
        if self.is_alone {
            Standing::Alone
        } else if self.is_cut_off {
            Standing::CutOff
        } else if self.lends(now) {
            Standing::Lending
        } else {
            Standing::Waiting
        }
    }

    /// Whether the store was of this generation when it was heard last.
    pub(super) fn is_of(&self, generation: &str) -> bool {
        self.generation == generation
    }

    /// When waiting is over, if nothing else happens.
    pub(super) fn quiet(&self) -> Instant {
        self.quiet
    }

    /// A call that is sent at `now`, without the accounts that want a permit. Rule 7: it lends the slice out until
    /// 1 s + window after the reply whose time it names.
    pub(super) fn call(&mut self, now: Instant) -> Call {
        let named = self.seen.filter(|_| self.lends(now));
        if let Some(seen) = named {
            self.home = self.home.max(seen.received + LENT + self.window);
        }
        Call {
            generation: self.generation.clone(),
            named: named.map(|seen| seen.time),
            lends: named.is_some() && !self.is_leaving,
            wants: Vec::new(),
        }
    }

    /// A call had no reply. Rule 8: after two the process is cut off.
    pub(super) fn missed(&mut self) {
        self.misses += 1;
        self.steady_since = None;
        if self.misses >= MISSES {
            self.is_cut_off = true;
        }
    }

    /// A reply of this generation that tells this `time`: gives whether a permit in it may be spent, `None` if it is no
    /// reply.
    pub(super) fn heard(&mut self, sent: Instant, received: Instant, generation: &str, time: u64) -> Option<bool> {
        // Rule 5.
        if received.saturating_duration_since(sent) > self.third {
            self.missed();
            return None;
        }
        self.misses = 0;
        let steady_since = *self.steady_since.get_or_insert(received);
        let is_odd = self.is_odd(sent, received, generation, time);
        let mut counts = !is_odd && !self.is_cut_off;
        if is_odd {
            // Rule 9.
            self.quiet = self.quiet.max(received + self.window).max(self.home);
        }
        if self.is_cut_off && received.saturating_duration_since(steady_since) >= STEADY {
            self.is_cut_off = false;
        }
        if self.is_alone && !self.is_cut_off {
            self.is_alone = false;
            self.quiet = self.quiet.max(received + self.window);
            counts = false;
        }
        if self.generation != generation {
            generation.clone_into(&mut self.generation);
        }
        self.seen = Some(LastTime { time, sent, received });
        Some(counts)
    }

    /// Rule 9: a new generation, the first too, or a time that moved more or less than our own clock allows.
    fn is_odd(&self, sent: Instant, received: Instant, generation: &str, time: u64) -> bool {
        let Some(seen) = self.seen.filter(|_| self.generation == generation) else {
            return true;
        };
        let Some(moved) = time.checked_sub(seen.time).map(Duration::from_micros) else {
            return true;
        };
        let least = sent.saturating_duration_since(seen.received);
        let most = received.saturating_duration_since(seen.sent);
        moved + STEP < least || moved > most + STEP
    }

    /// Rule 8: cut off, the slice is spent here as soon as it is home. Gives when to look again, while that is to come.
    pub(super) fn look(&mut self, now: Instant) -> Option<Instant> {
        if self.is_leaving || self.is_alone || !self.is_cut_off {
            return None;
        }
        let at = self.home.max(self.quiet);
        if now < at {
            return Some(at);
        }
        self.is_alone = true;
        None
    }

    /// Rule 10: the process is told to stop. The slice is its successor's; the store's permits are still to be had.
    pub(super) fn leave(&mut self, now: Instant) {
        if self.is_alone {
            self.quiet = self.quiet.max(now + self.window);
        }
        self.is_leaving = true;
        self.is_alone = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_millis(1030);
    const THIRD: Duration = Duration::from_millis(10);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A lease, and its replies: each after so many milliseconds since the start, having taken so many.
    struct Played {
        lease: Lease,
        start: Instant,
    }

    impl Played {
        fn new() -> Self {
            let start = Instant::now();
            let lease = Lease::new(WINDOW, THIRD, start);
            Self { lease, start }
        }

        fn heard(&mut self, at: u64, took: u64, generation: &str) -> Option<bool> {
            self.lease.call(self.start + ms(at - took));
            let (sent, received) = (self.start + ms(at - took), self.start + ms(at));
            self.lease.heard(sent, received, generation, 1_000_000 + at * 1000)
        }

        /// Replies in time every 250 ms, until then.
        fn steady(mut self, until: u64) -> Self {
            for at in (1..=until).step_by(250) {
                self.heard(at, 1, "a");
            }
            self
        }
    }

    #[test]
    fn nothing_is_lent_for_two_seconds_and_a_margin_after_a_start() {
        let mut played = Played::new().steady(2000);
        assert!(!played.lease.lends(played.start + ms(2029)));
        assert!(played.lease.lends(played.start + ms(2030)));
        assert_eq!(played.heard(2040, 1, "a"), Some(true));
    }

    #[test]
    fn a_reply_that_takes_longer_than_a_third_of_the_margin_is_none() {
        let mut played = Played::new().steady(3000);
        assert_eq!(played.heard(3100, 10, "a"), Some(true));
        assert_eq!(played.heard(3200, 11, "a"), None);
        assert_eq!(played.lease.standing(played.start + ms(3200)), Standing::Lending);
        assert_eq!(played.heard(3300, 11, "a"), None);
        assert_eq!(played.lease.standing(played.start + ms(3300)), Standing::CutOff);
    }

    #[test]
    fn a_new_generation_drops_the_permit_and_waits_for_a_second_and_the_slice() {
        let mut played = Played::new().steady(3000);
        assert_eq!(played.heard(3100, 1, "b"), Some(false));
        // The call that told of it had named the time of 2751 ms.
        let home = ms(2751 + 1000 + 1030);
        assert!(!played.lease.lends(played.start + ms(3100) + WINDOW));
        assert!(!played.lease.lends(played.start + home - ms(1)));
        assert!(played.lease.lends(played.start + home));
    }

    #[test]
    fn one_that_is_told_to_stop_while_it_is_alone_spends_nothing_for_a_second_and_a_margin() {
        let mut played = Played::new().steady(3000);
        played.lease.missed();
        played.lease.missed();
        played.lease.look(played.start + ms(4531));
        assert!(played.lease.is_alone());
        played.heard(4540, 1, "a");
        played.lease.leave(played.start + ms(5500));
        // The store has been back for a second.
        played.heard(5550, 1, "a");
        assert!(!played.lease.is_cut_off());
        assert!(!played.lease.lends(played.start + ms(5500) + WINDOW - ms(1)));
        assert!(played.lease.lends(played.start + ms(5500) + WINDOW));
    }

    #[test]
    fn a_second_of_replies_ends_being_cut_off_and_a_window_being_alone() {
        let mut played = Played::new().steady(3000);
        played.lease.missed();
        played.lease.missed();
        // The last call had named the time of 2501 ms.
        let home = ms(2501 + 1000 + 1030);
        assert_eq!(
            played.lease.look(played.start + home - ms(1)),
            Some(played.start + home)
        );
        assert_eq!(played.lease.look(played.start + home), None);
        assert!(played.lease.is_alone());
        for at in [5000, 5250, 5500, 5750, 5999] {
            played.heard(at, 1, "a");
            assert!(played.lease.is_alone(), "after {at} ms");
        }
        assert_eq!(played.heard(6000, 1, "a"), Some(false));
        assert!(!played.lease.is_alone() && !played.lease.lends(played.start + ms(6000) + WINDOW - ms(1)));
        assert!(played.lease.lends(played.start + ms(6000) + WINDOW));
    }

    #[test]
    fn whoever_is_told_to_stop_lends_nothing_and_never_spends_alone() {
        let mut played = Played::new().steady(3000);
        played.lease.leave(played.start + ms(3050));
        let call = played.lease.call(played.start + ms(3100));
        assert!(call.named.is_some() && !call.lends);
        played.lease.missed();
        played.lease.missed();
        assert_eq!(played.lease.look(played.start + ms(60_000)), None);
        assert!(!played.lease.is_alone());
    }
}
