//! The task that paces one account: who is called forward, and when the next permit is due.
//!
//! Permits follow the GCRA schedule of a governor quota with burst 1 (`Quota::per_second(15)` would let 29 through in one
//! second). governor is asked with the instant at which the permit was *due*: where a flight with a connection was waiting
//! then, a late wake-up does not move the next one, or 1.3 ms of lateness a wake-up would cost 0.3/s. Evenly spaced
//! queries are safe whatever limiter upstream runs.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use prometheus::IntGauge;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::Pace;
use super::ring::{Ring, Room, Stamp};

/// How far behind now the schedule may be, where an emission interval is shorter than a wake-up is late.
const LATEST_WAKE_UP: Duration = Duration::from_millis(3);

/// Flights called forward are those with a connection, up to this many, and as many without one as could keep the pace
/// while connections take a second to open. Few, since whoever is called forward is past every later rule of fairness.
const READY_AHEAD: usize = 2;

/// What flights tell the dispatcher.
#[derive(Debug)]
pub(super) enum Message {
    /// A flight waits for its turn.
    Enter { order: i64, call: oneshot::Sender<()> },
    /// A flight called forward has its connection, `since`.
    Ready {
        order: i64,
        since: Instant,
        grant: oneshot::Sender<Stamp>,
    },
    /// A flight is done, or gave up.
    Leave { order: i64 },
    /// Nothing before `until`.
    Pause { until: Instant },
}

/// A flight called forward that has a connection.
#[derive(Debug)]
struct Ready {
    since: Instant,
    grant: oneshot::Sender<Stamp>,
}

/// When the next permit can be granted.
enum Next {
    /// Nobody could use it.
    Never,
    At(Instant),
    WhenWritten,
}

pub(super) struct Dispatcher {
    pace: Pace,
    inbox: mpsc::UnboundedReceiver<Message>,
    /// By order of entry.
    queue: BTreeMap<i64, oneshot::Sender<()>>,
    called: BTreeMap<i64, Option<Ready>>,
    ready: usize,
    limiter: RateLimiter<NotKeyed, InMemoryState, DueClock, NoOpMiddleware<Nanos>>,
    clock: DueClock,
    /// The instant from which governor would let the next cell through.
    due: Instant,
    /// The end of the pause, while there is one.
    paused_until: Option<Instant>,
    /// When granting began or was last resumed: no permit was due before.
    resumed: Instant,
    paused: IntGauge,
    ring: Arc<Ring>,
}

impl Dispatcher {
    pub(super) fn new(pace: Pace, paused: IntGauge, inbox: mpsc::UnboundedReceiver<Message>) -> Self {
        let clock = DueClock::new();
        // An interval below a nanosecond is beyond `budget.limit`'s range; a minimum keeps the quota defined.
        let quota = Quota::with_period(pace.interval().max(Duration::from_nanos(1)))
            .unwrap_or_else(|| Quota::per_second(NonZeroU32::MIN))
            .allow_burst(NonZeroU32::MIN);
        Self {
            pace,
            inbox,
            queue: BTreeMap::new(),
            called: BTreeMap::new(),
            ready: 0,
            limiter: RateLimiter::direct_with_clock(quota, clock.clone()),
            due: clock.start,
            clock,
            paused_until: None,
            resumed: pace.not_before,
            paused,
            ring: Arc::new(Ring::default()),
        }
    }

    /// Runs until the account's last handle is gone.
    pub(super) async fn run(mut self) {
        loop {
            let now = Instant::now();
            self.end_pause(now);
            let next = self.grant_due(now);
            let (wake, when_written) = match next {
                Next::Never => (self.paused_until, false),
                Next::At(due) => (Some(self.paused_until.map_or(due, |until| until.min(due))), false),
                Next::WhenWritten => (self.paused_until, true),
            };
            let ring = Arc::clone(&self.ring);
            tokio::select! {
                message = self.inbox.recv() => {
                    let Some(message) = message else { break };
                    self.take(message);
                    while let Ok(message) = self.inbox.try_recv() {
                        self.take(message);
                    }
                }
                () = sleep_until(wake.unwrap_or(now)), if wake.is_some() => {}
                () = ring.changed.notified(), if when_written => {}
            }
        }
        if self.paused_until.is_some() {
            self.paused.dec();
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Enter { order, call } => {
                self.queue.insert(order, call);
            }
            Message::Ready { order, since, grant } => {
                if let Some(called) = self.called.get_mut(&order) {
                    *called = Some(Ready { since, grant });
                    self.ready += 1;
                }
            }
            Message::Leave { order } => {
                self.queue.remove(&order);
                self.forget(order);
            }
            Message::Pause { until } => {
                if self.paused_until.is_none() {
                    self.paused.inc();
                }
                self.paused_until = self.paused_until.max(Some(until));
            }
        }
    }

    fn forget(&mut self, order: i64) -> Option<Ready> {
        let ready = self.called.remove(&order)?;
        self.ready -= usize::from(ready.is_some());
        ready
    }

    fn end_pause(&mut self, now: Instant) {
        if let Some(until) = self.paused_until.take_if(|until| *until <= now) {
            self.resumed = self.resumed.max(until);
            self.paused.dec();
        }
    }

    /// Calls flights forward while too few of those called have a connection.
    fn call_forward(&mut self) {
        let limit = self.limit();
        let ahead = (limit / 8).clamp(READY_AHEAD, 64);
        let most = (limit + 1).clamp(4, 256);
        while self.ready < ahead && self.called.len() < most {
            let Some((order, call)) = self.queue.pop_first() else {
                break;
            };
            // Nobody listens when the flight has just given up; its `Leave` is on the way.
            if call.send(()).is_ok() {
                self.called.insert(order, None);
            }
        }
    }

    /// Grants every permit that is due, to the earliest flights that have a connection.
    fn grant_due(&mut self, now: Instant) -> Next {
        loop {
            self.call_forward();
            let first = self
                .called
                .iter()
                .find_map(|(order, ready)| Some((*order, ready.as_ref()?.since)));
            let Some((order, since)) = first else {
                return Next::Never;
            };
            let hold = self.resumed.max(self.paused_until.unwrap_or(now));
            if hold > now {
                return Next::At(hold);
            }
            match self.ring.room(now, self.limit(), self.pace.window()) {
                Room::Free => {}
                Room::At(free) => return Next::At(free),
                Room::WhenWritten => return Next::WhenWritten,
            }
            if self.due > now {
                return Next::At(self.due);
            }
            let behind = self.pace.interval().max(LATEST_WAKE_UP);
            let latest = now.checked_sub(behind).unwrap_or(now);
            let at = self.due.max(since).max(self.resumed).max(latest).min(now);
            if !self.conforms(at) {
                continue;
            }
            if let Some(ready) = self.forget(order) {
                self.hand_over(ready);
            }
        }
    }

    /// Spends a cell at the instant `at`, and learns when the next one conforms.
    fn conforms(&mut self, at: Instant) -> bool {
        self.clock.set(at);
        let conforms = self.limiter.check().is_ok();
        if let Err(not_until) = self.limiter.check() {
            self.due = self.clock.instant(not_until.earliest_possible());
        }
        conforms
    }

    fn hand_over(&mut self, to: Ready) {
        let mut stamp = self.ring.take();
        let mut to = Some(to);
        // A flight may have given up since it said that it was ready: the next ready one takes its permit.
        while let Some(ready) = to.take() {
            match ready.grant.send(stamp) {
                Ok(()) => return,
                Err(back) => stamp = back,
            }
            let next = self
                .called
                .iter()
                .find_map(|(order, ready)| ready.is_some().then_some(*order));
            to = next.and_then(|order| self.forget(order));
        }
    }

    fn limit(&self) -> usize {
        usize::try_from(self.pace.limit.get()).unwrap_or(usize::MAX)
    }
}

/// governor's clock: it shows the instant that the dispatcher sets, on tokio's clock, so that pacing follows paused time.
#[derive(Clone, Debug)]
struct DueClock {
    start: Instant,
    shown: Arc<AtomicU64>,
}

impl DueClock {
    fn new() -> Self {
        Self {
            start: Instant::now(),
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
