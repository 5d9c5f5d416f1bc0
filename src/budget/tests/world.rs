//! A world around a bare dispatcher, in simulated time: flights arrive, connect, write and give up when they like, and
//! the dispatcher's task wakes up late. Deterministic; what it tells afterwards is when each thing really happened.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::super::called::Grant;
use super::super::dispatcher::Dispatcher;
use super::super::ring::Stamp;
use super::super::{Pace, Parts};
use crate::account::{Caller, Client};
use crate::metrics::Metrics;

/// From a standstill to the full rate.
const RECOVERY: Duration = Duration::from_secs(30);

pub(super) const MARGIN: Duration = Duration::from_millis(30);

const MAX_QUEUE: usize = 1_000_000;

/// What a flight is going to do.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// After the flight before it.
    pub(super) arrives: Duration,
    /// From being called forward to having a connection; `None` when it never gets one.
    pub(super) connects: Option<Duration>,
    pub(super) gives_up: GivesUp,
    /// From the permit to the write.
    pub(super) writes: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GivesUp {
    Never,
    AfterEntry(Duration),
    AfterCall(Duration),
    AfterReady(Duration),
    /// With its permit in hand.
    Unused(Duration),
}

#[derive(Clone, Debug)]
pub(super) struct Plans {
    pub(super) limit: u32,
    /// When configuration changes it, and to what.
    pub(super) limits: Vec<(Duration, u32)>,
    pub(super) flights: Vec<Plan>,
    /// When, and for how long.
    pub(super) pauses: Vec<(Duration, Duration)>,
    /// How late each wake-up of the dispatcher's task is; over and over.
    pub(super) lateness: Vec<Duration>,
}

/// What happened, on the world's clock.
#[derive(Debug, Default)]
pub(super) struct History {
    pub(super) called: Vec<Duration>,
    pub(super) granted: Vec<Duration>,
    pub(super) written: Vec<Duration>,
    /// When a flight with a connection waited, the account was not paused and the start hold was over.
    pub(super) wanted: Vec<(Duration, Duration)>,
    /// Flights that neither gave up nor got a permit.
    pub(super) forgotten: usize,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Enter(usize),
    Ready(usize),
    Leave(usize),
    Write(usize),
    Pause(Duration),
    Limit(u32),
}

#[derive(Debug, Default)]
struct Flight {
    called: Option<oneshot::Receiver<()>>,
    granted: Option<oneshot::Receiver<Grant>>,
    stamp: Option<Stamp>,
    has_connection: bool,
    is_over: bool,
}

struct World<'a> {
    plans: &'a Plans,
    start: Instant,
    dispatcher: Dispatcher,
    parts: Arc<Parts>,
    flights: Vec<Flight>,
    events: BinaryHeap<Reverse<(Duration, usize, Event)>>,
    scheduled: usize,
    /// When its task is roused, and when its timer and the ring's news reach it.
    roused: Option<Duration>,
    timer: Option<Duration>,
    listens: bool,
    has_news: bool,
    news: Option<Duration>,
    wake_ups: usize,
    waiting: usize,
    wanted_since: Duration,
    paused_until: Duration,
    slowed_until: Duration,
    history: History,
}

fn client() -> Client {
    Client {
        caller: Caller::Token("world".into()),
        name: None,
    }
}

pub(super) fn interval(limit: u32) -> Duration {
    (Duration::from_secs(1) + MARGIN) / limit
}

pub(super) fn hold() -> Duration {
    Duration::from_secs(1) + MARGIN
}

/// Plays the plans to their end.
pub(super) fn play(plans: &Plans) -> History {
    let start = Instant::now();
    let pace = Pace {
        limit: NonZeroU32::new(plans.limit).unwrap(),
        margin: MARGIN,
        not_before: start + hold(),
    };
    let metrics = Metrics::new().unwrap().account("world");
    let parts = Arc::new(Parts::new(pace, None, metrics));
    let dispatcher = Dispatcher::new(MAX_QUEUE, Arc::clone(&parts));
    let mut world = World {
        plans,
        start,
        dispatcher,
        parts,
        flights: plans.flights.iter().map(|_| Flight::default()).collect(),
        events: BinaryHeap::new(),
        scheduled: 0,
        roused: None,
        timer: None,
        listens: false,
        has_news: false,
        news: None,
        wake_ups: 0,
        waiting: 0,
        wanted_since: Duration::ZERO,
        paused_until: hold(),
        slowed_until: hold(),
        history: History::default(),
    };
    let mut arrival = Duration::ZERO;
    for (flight, plan) in plans.flights.iter().enumerate() {
        arrival += plan.arrives;
        world.schedule(arrival, Event::Enter(flight));
    }
    for &(at, limit) in &plans.limits {
        world.schedule(at, Event::Limit(limit));
    }
    for &(at, length) in &plans.pauses {
        world.schedule(at, Event::Pause(length));
    }
    world.run();
    world.history
}

impl World<'_> {
    fn schedule(&mut self, at: Duration, event: Event) {
        self.scheduled += 1;
        self.events.push(Reverse((at, self.scheduled, event)));
    }

    fn late(&mut self) -> Duration {
        self.wake_ups += 1;
        assert!(self.wake_ups < 100_000, "the dispatcher is busy for nothing");
        self.plans.lateness[self.wake_ups % self.plans.lateness.len()]
    }

    fn run(&mut self) {
        loop {
            let wake = [self.roused, self.timer, self.news].into_iter().flatten().min();
            let event = self.events.peek().map(|Reverse((at, ..))| *at);
            match (event, wake) {
                (Some(at), wake) if wake.is_none_or(|wake| at <= wake) => {
                    let Some(Reverse((_, _, event))) = self.events.pop() else {
                        return;
                    };
                    self.happen(at, event);
                }
                (_, Some(wake)) => self.wake(wake),
                (_, None) => break,
            }
        }
        let lost = self.flights.iter().filter(|flight| !flight.is_over).count();
        self.history.forgotten = lost;
    }

    #[allow(clippy::needless_pass_by_value, reason = "an event happens but once")]
    fn happen(&mut self, now: Duration, event: Event) {
        match event {
            Event::Enter(flight) => {
                let (call, called) = oneshot::channel();
                self.flights[flight].called = Some(called);
                // Nobody listens, so nobody leaves when told that the turn comes late.
                let (late, _) = oneshot::channel();
                let (id, at) = (flight as u64, self.start + now);
                let poll = (at + Duration::from_secs(1), 0);
                self.tell(now, |dispatcher| dispatcher.open(id, None));
                let world = client();
                self.tell(now, |dispatcher| {
                    dispatcher.join(id, &world, 1, poll, Duration::ZERO, late);
                });
                self.tell(now, |dispatcher| dispatcher.enter(id, false, call, at));
                if let GivesUp::AfterEntry(after) = self.plans.flights[flight].gives_up {
                    self.schedule(now + after, Event::Leave(flight));
                }
            }
            Event::Ready(flight) if !self.flights[flight].is_over => {
                let (grant, granted) = oneshot::channel();
                let since = self.start + now;
                self.flights[flight].granted = Some(granted);
                self.flights[flight].has_connection = true;
                self.waits(now, 1);
                self.tell(now, |dispatcher| dispatcher.connected(flight as u64, since, grant));
                if let GivesUp::AfterReady(after) = self.plans.flights[flight].gives_up {
                    self.schedule(now + after, Event::Leave(flight));
                }
            }
            Event::Leave(flight) if !self.flights[flight].is_over => {
                if self.flights[flight].has_connection {
                    self.waits(now, -1);
                }
                self.leave(now, flight);
            }
            Event::Ready(_) | Event::Leave(_) => {}
            Event::Write(flight) => {
                let stamp = self.flights[flight].stamp.take().unwrap();
                if matches!(self.plans.flights[flight].gives_up, GivesUp::Unused(_)) {
                    drop(stamp);
                } else {
                    stamp.written(self.start + now);
                    self.history.written.push(now);
                }
                self.has_news = true;
                self.hear(now);
            }
            Event::Limit(limit) => {
                let pace = Pace {
                    limit: NonZeroU32::new(limit).unwrap(),
                    ..self.parts.backoff.lock().pace()
                };
                self.parts.backoff.lock().set_pace(pace);
                self.tell(now, |dispatcher| dispatcher.configure(MAX_QUEUE));
            }
            Event::Pause(length) => {
                self.wants_no_more(now);
                self.paused_until = self.paused_until.max(now + length);
                // And slowed for as long as the rate takes to recover.
                self.slowed_until = self.paused_until + RECOVERY;
                self.wanted_since = self.slowed_until;
                let at = self.start + now;
                self.parts.backoff.lock().rate_limited(Some(length), at, at);
                self.tell(now, |dispatcher| dispatcher.backed_off(at));
            }
        }
    }

    fn leave(&mut self, now: Duration, flight: usize) {
        let gone = &mut self.flights[flight];
        gone.is_over = true;
        gone.called = None;
        gone.granted = None;
        self.tell(now, |dispatcher| dispatcher.close(flight as u64));
    }

    fn tell(&mut self, now: Duration, what: impl FnOnce(&mut Dispatcher)) {
        let must_look = self.dispatcher.hear(what, self.start + now);
        if must_look && self.roused.is_none() {
            self.roused = Some(now + self.late());
        }
        self.notice_all(now);
    }

    /// The ring's news, which are kept for a task that does not listen yet.
    fn hear(&mut self, now: Duration) {
        if self.listens && self.has_news && self.news.is_none() {
            self.news = Some(now + self.late());
        }
    }

    fn wake(&mut self, now: Duration) {
        if self.news.take_if(|news| *news <= now).is_some() {
            self.has_news = false;
        }
        self.roused = None;
        let wake = self.dispatcher.look(self.start + now);
        self.timer = wake.at.map(|at| {
            assert!(at > self.start + now, "a timer that is over already");
            at.saturating_duration_since(self.start) + self.late()
        });
        self.listens = wake.when_changed;
        self.news = None;
        self.hear(now);
        self.notice_all(now);
    }

    fn notice_all(&mut self, now: Duration) {
        for flight in 0..self.flights.len() {
            self.notice(now, flight);
        }
    }

    /// What the dispatcher has just told a flight.
    fn notice(&mut self, now: Duration, flight: usize) {
        let plan = &self.plans.flights[flight];
        let told = &mut self.flights[flight];
        if told.called.as_mut().is_some_and(|called| called.try_recv().is_ok()) {
            told.called = None;
            self.history.called.push(now);
            match plan.connects {
                Some(after) => self.schedule(now + after, Event::Ready(flight)),
                None => self.schedule(now + Duration::from_secs(3), Event::Leave(flight)),
            }
            if let GivesUp::AfterCall(after) = plan.gives_up {
                self.schedule(now + after, Event::Leave(flight));
            }
            return;
        }
        let granted = told.granted.as_mut().and_then(|granted| granted.try_recv().ok());
        if let Some(Grant { stamp, .. }) = granted {
            assert!(now >= self.paused_until, "granted during a pause or the start hold");
            told.stamp = Some(stamp);
            self.history.granted.push(now);
            // Only when all have noticed what they were told just now.
            self.schedule(now, Event::Leave(flight));
            let used = match plan.gives_up {
                GivesUp::Unused(after) => after,
                GivesUp::Never | GivesUp::AfterEntry(_) | GivesUp::AfterCall(_) | GivesUp::AfterReady(_) => plan.writes,
            };
            self.schedule(now + used, Event::Write(flight));
        }
    }

    /// One flight more or less that has a connection and waits.
    fn waits(&mut self, now: Duration, change: isize) {
        let before = self.waiting;
        self.waiting = before.checked_add_signed(change).unwrap();
        if before == 0 {
            self.wanted_since = now.max(self.slowed_until);
        } else if self.waiting == 0 {
            self.waiting = before;
            self.wants_no_more(now);
            self.waiting = 0;
        }
    }

    fn wants_no_more(&mut self, now: Duration) {
        if self.waiting > 0 && self.wanted_since < now {
            self.history.wanted.push((self.wanted_since, now));
        }
    }
}
