//! When an account's next permit is due by its pace. Who gets it is `budget/dispatcher.rs`'s business, and whether the last
//! second has room for it `budget/ring.rs`'s. Pure: `now` is passed in.
//!
//! Permits follow the GCRA schedule of a governor quota with burst 1 (`Quota::per_second(15)` would let 29 through in one
//! second). governor is asked with the instant at which the permit was *due*: where a flight with a connection was waiting
//! then, a late wake-up does not move the next one, or 1.3 ms of lateness a wake-up would cost 0.3/s. Evenly spaced
//! queries are safe whatever limiter upstream runs. The quota is the full rate's and outlives every change of it: a lower
//! rate is a longer wait on top. A quota that configuration changes takes over where the old one stands.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use tokio::time::Instant;

use super::Pace;
use super::backoff::Backoff;

/// How far behind now the schedule may be, where an emission interval is shorter than a wake-up is late.
const LATEST_WAKE_UP: Duration = Duration::from_millis(3);

type Limiter = RateLimiter<NotKeyed, InMemoryState, DueClock, NoOpMiddleware<Nanos>>;

#[derive(Debug)]
pub(super) struct Pacer {
    pace: Pace,
    /// Cut off from the other replicas: the queries a second that are this process's own.
    alone: Option<NonZeroU32>,
    limiter: Limiter,
    clock: DueClock,
    /// When the last permit was on schedule.
    last: Option<Instant>,
    /// The instant from which the next permit would be on schedule.
    due: Instant,
}

impl Pacer {
    /// Nothing is spent before `now`.
    pub(super) fn new(pace: Pace, now: Instant) -> Self {
        let clock = DueClock::new(now);
        Self {
            pace,
            alone: None,
            limiter: limiter(pace, &clock),
            clock,
            last: None,
            due: now,
        }
    }

    /// The account's, however much of it is this process's own.
    pub(super) fn pace(&self) -> Pace {
        self.pace
    }

    /// The pace of what is this process's own.
    pub(super) fn own_pace(&self) -> Pace {
        Pace {
            limit: self.alone.unwrap_or(self.pace.limit),
            ..self.pace
        }
    }

    /// The instant from which the next permit would be on schedule.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// It is due when somebody else's schedule says.
    pub(super) fn set_due(&mut self, due: Instant) {
        self.due = due;
    }

    /// Takes notice of whether the process spends its slice of the limit, `alone`. It begins, and ends, with a second in
    /// which nobody spends it.
    pub(super) fn set_alone(&mut self, alone: Option<NonZeroU32>, now: Instant) {
        if alone != self.alone {
            self.alone = alone;
            self.limiter = limiter(self.own_pace(), &self.clock);
            self.last = None;
            self.due = now;
        }
    }

    /// Takes a changed pace over. A new quota starts with the last permit spent, or changing it would grant one more.
    pub(super) fn configure(&mut self, backoff: &Backoff) {
        let before = std::mem::replace(&mut self.pace, backoff.pace());
        if before.interval() != self.pace.interval() {
            self.limiter = limiter(self.own_pace(), &self.clock);
            if let Some(last) = self.last {
                self.conforms(last, backoff.rate(last));
            }
        }
    }

    /// Spends the permit that is due, on the schedule's account when it was due, or when it could first be used: `since`.
    /// `rate` is what the backoff leaves of the limit, queries a second. False if it was not due after all.
    pub(super) fn spend(&mut self, since: Instant, rate: f64, now: Instant) -> bool {
        let behind = self.own_pace().interval().max(LATEST_WAKE_UP);
        let latest = now.checked_sub(behind).unwrap_or(now);
        self.conforms(self.due.max(since).max(latest).min(now), rate)
    }

    /// Spends a cell at the instant `at`, and learns when the next one is due: when it conforms, and at a lower `rate`
    /// later.
    fn conforms(&mut self, at: Instant, rate: f64) -> bool {
        self.clock.set(at);
        let conforms = self.limiter.check().is_ok();
        if let Err(not_until) = self.limiter.check() {
            self.due = self.clock.instant(not_until.earliest_possible());
        }
        if conforms {
            self.last = Some(at);
            let limit = f64::from(self.pace.limit.get());
            if rate < limit {
                let own = f64::from(self.own_pace().limit.get()) / limit;
                self.due = self.due.max(at + self.pace.full_second().div_f64(rate * own));
            }
        }
        conforms
    }
}

/// A quota with burst 1, of which nothing is spent.
fn limiter(pace: Pace, clock: &DueClock) -> Limiter {
    // An interval below a nanosecond is beyond `budget.limit`'s range; a minimum keeps the quota defined.
    let quota = Quota::with_period(pace.interval().max(Duration::from_nanos(1)))
        .unwrap_or_else(|| Quota::per_second(NonZeroU32::MIN))
        .allow_burst(NonZeroU32::MIN);
    RateLimiter::direct_with_clock(quota, clock.clone())
}

/// governor's clock: it shows the instant that the pacer sets, on tokio's clock, so that pacing follows paused time.
#[derive(Clone, Debug)]
struct DueClock {
    start: Instant,
    shown: Arc<AtomicU64>,
}

impl DueClock {
    fn new(start: Instant) -> Self {
        Self {
            start,
            shown: Arc::default(),
        }
    }

    fn set(&self, at: Instant) {
        let since_start = at.saturating_duration_since(self.start);
        self.shown.store(Nanos::from(since_start).as_u64(), Ordering::Relaxed);
    }

    fn instant(&self, shown: Nanos) -> Instant {
        self.start + Duration::from(shown)
    }
}

impl Clock for DueClock {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Nanos::from(self.shown.load(Ordering::Relaxed))
    }
}
