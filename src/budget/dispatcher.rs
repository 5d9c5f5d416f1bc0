//! What serves one account's flights: who is called forward, and who is granted a permit when one is due.
//!
//! Whoever says something ([`Desk::tell`]) does what follows from it, there and then, under one lock: a flight that nobody
//! stands before has its turn and its permit without a task to wait for. What falls due later is done by a task of the
//! account's own ([`Desk::run`]), which sleeps until then.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::OptionFuture;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until};

use super::admission::{Admission, PollId};
use super::called::{Called, Grant};
use super::connections::Connections;
use super::fair_queue::{FairQueue, Flight, Shedding};
use super::pacer::Pacer;
use super::ring::Room;
use super::spending::Spending;
use super::{Expected, MOST_SHOWN, Parts, Usage};
use crate::account::Client;
use crate::outcome::Lane;
use crate::panics::contain_now;
use crate::shared::{Demand, Right, SharedBudget, Slot};

/// Where connections open at once, as many flights are called forward as there are permits in an eighth of a second, within
/// these bounds. Few, since whoever is called forward is past every later rule of fairness. Chosen, not measured.
const LEAST_AHEAD: usize = 2;
const MOST_AHEAD: usize = 64;

/// Where they open slowly, at most as many as there are permits in a second, and one: the pace is kept while that takes a
/// second. These bounds were chosen, not measured, too.
const LEAST_CALLED: usize = 4;
const MOST_CALLED: usize = 256;

/// What the dispatcher waits for, beside what it is told: by default for nothing, since nobody could use a permit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wake {
    pub(super) at: Option<Instant>,
    /// When a permit is written or dropped.
    pub(super) when_changed: bool,
}

impl Wake {
    fn at(at: Instant) -> Self {
        Self {
            at: Some(at),
            when_changed: false,
        }
    }

    fn or_at(self, at: Option<Instant>) -> Self {
        Self {
            at: self.at.into_iter().chain(at).min(),
            ..self
        }
    }

    /// Whether somebody who waits for `other` would be woken too late for this.
    fn is_missed_by(self, other: Self) -> bool {
        let is_earlier = |at| other.at.is_none_or(|other| at < other);
        self.at.is_some_and(is_earlier) || (self.when_changed && !other.when_changed)
    }
}

/// Where an account's flights and its pacing task meet.
#[derive(Debug)]
pub(super) struct Desk {
    dispatcher: Mutex<Dispatcher>,
    /// The task has to look again: what it sleeps for is no longer the next thing due, or nothing is any more.
    roused: Notify,
    pub(super) parts: Arc<Parts>,
}

impl Desk {
    pub(super) fn new(max_queue: usize, parts: Parts) -> Self {
        let parts = Arc::new(parts);
        Self {
            dispatcher: Mutex::new(Dispatcher::new(max_queue, Arc::clone(&parts))),
            roused: Notify::new(),
            parts,
        }
    }

    /// Says something, and does what follows from it.
    pub(super) fn tell(&self, what: impl FnOnce(&mut Dispatcher)) {
        if self.dispatcher.lock().hear(what, Instant::now()) {
            self.roused.notify_one();
        }
    }

    /// What upstream takes, as is known by now: who can no longer be answered in time for that is told with whatever happens
    /// next.
    pub(super) fn expect(&self, expected: Expected) {
        let mut dispatcher = self.dispatcher.lock();
        dispatcher.admission.expect(expected.at_least);
        let (opening, takes) = (expected.opening, expected.mean);
        dispatcher.connections.expect(expected.connections, opening, takes);
        dispatcher.leaves = expected.leaves;
    }

    /// How far apart connections come free while all are in use.
    pub(super) fn apart(&self) -> Duration {
        self.dispatcher.lock().connections.apart()
    }

    /// Who waits, and who spends.
    pub(super) fn usage(&self) -> Usage {
        self.dispatcher.lock().usage(Instant::now())
    }

    /// No flight stands here any more, nor will: the task ends.
    pub(super) fn close(&self) {
        self.dispatcher.lock().is_closed = true;
        self.roused.notify_one();
    }

    /// Does what falls due, until the desk is closed.
    pub(super) async fn run(&self) {
        loop {
            let Wake { at, when_changed } = {
                let mut dispatcher = self.dispatcher.lock();
                if dispatcher.is_closed {
                    // A pause may not be over yet.
                    return self.parts.metrics.paused.sub(i64::from(dispatcher.is_paused));
                }
                dispatcher.look(Instant::now())
            };
            tokio::select! {
                biased;
                () = self.roused.notified() => {}
                Some(()) = OptionFuture::from(at.map(sleep_until)) => {}
                () = self.parts.ring.changed.notified(), if when_changed => {}
                Some(()) = OptionFuture::from(self.parts.shared.as_ref().map(SharedBudget::told)) => {}
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Dispatcher {
    max_queue: usize,
    queue: FairQueue,
    admission: Admission,
    /// How to call each flight that waits in the queue.
    calls: BTreeMap<Flight, oneshot::Sender<()>>,
    called: Called,
    pacer: Pacer,
    connections: Connections,
    /// In what time after a poll's arrival its turn has to come.
    leaves: Duration,
    is_paused: bool,
    /// What the shared budget was told last.
    wanted: Demand,
    spending: Spending,
    parts: Arc<Parts>,
    /// What the gauges show of this account: foreground and background.
    shown: (i64, i64),
    /// What the task sleeps for.
    next: Wake,
    is_closed: bool,
}

impl Dispatcher {
    pub(super) fn new(max_queue: usize, parts: Arc<Parts>) -> Self {
        let (pace, now) = (parts.backoff.lock().pace(), Instant::now());
        Self {
            max_queue,
            queue: FairQueue::default(),
            admission: Admission::default(),
            calls: BTreeMap::new(),
            called: Called::default(),
            pacer: Pacer::new(pace, now),
            connections: Connections::default(),
            leaves: Duration::MAX,
            is_paused: false,
            wanted: Demand::default(),
            spending: Spending::new(now),
            parts,
            shown: (0, 0),
            next: Wake::default(),
            is_closed: false,
        }
    }

    /// Does `work`. A panic ends the wait of everybody who waits, and nothing else: what was spent counts on, and whoever
    /// comes next is served.
    fn contain(&mut self, now: Instant, work: impl FnOnce(&mut Self)) {
        if contain_now(|| work(self)).is_none() {
            self.forget_all();
            self.next = self.go_on(now, true);
        }
    }

    /// Sends everybody away.
    fn forget_all(&mut self) {
        self.queue = FairQueue::default();
        self.admission = Admission::default();
        self.calls.clear();
        self.called.clear();
    }

    /// Is told something, and does what follows from it at `now`. Gives whether the task has to look again, or it would
    /// sleep too long.
    pub(super) fn hear(&mut self, what: impl FnOnce(&mut Self), now: Instant) -> bool {
        let slept_for = self.next;
        self.contain(now, |dispatcher| {
            what(dispatcher);
            if !dispatcher.is_idle() {
                dispatcher.next = dispatcher.go_on(now, false);
            }
        });
        self.next.is_missed_by(slept_for)
    }

    /// Does what is due at `now`, for the task; gives what that sleeps for.
    pub(super) fn look(&mut self, now: Instant) -> Wake {
        self.contain(now, |dispatcher| dispatcher.next = dispatcher.go_on(now, true));
        self.next
    }

    /// Does what is due at `now`. Only the task calls more flights forward because connections open slowly: where it is the
    /// process that is slow, so is the task.
    fn go_on(&mut self, now: Instant, is_task: bool) -> Wake {
        if let Some(heard) = self.parts.shared.as_ref().and_then(SharedBudget::backed) {
            self.parts.backoff.lock().take_over(heard, now);
        }
        let pause_ends = self.watch_pause(now);
        let wake = self.grant_due(now, is_task).or_at(pause_ends).or_at(self.judge(now));
        self.want(now);
        self.show();
        wake
    }

    /// A flight may come to wait.
    pub(super) fn open(&mut self, flight: Flight, snapshot: Option<Instant>) {
        self.queue.open(flight, snapshot);
    }

    /// A client's poll waits for it, which upstream `takes` so long for, and is told when its turn would come `late`.
    pub(super) fn join(
        &mut self,
        flight: Flight,
        client: &Client,
        weight: u32,
        poll: PollId,
        takes: Duration,
        late: oneshot::Sender<Duration>,
    ) {
        self.queue.join(flight, client, weight);
        self.admission.join(flight, poll, takes, late);
    }

    /// A client's poll waits no longer.
    pub(super) fn leave(&mut self, flight: Flight, client: &Client, poll: PollId) {
        self.queue.leave(flight, client);
        self.admission.leave(flight, poll);
    }

    /// Its answer is wanted though nobody may wait for it.
    pub(super) fn keep(&mut self, flight: Flight) {
        self.queue.keep(flight);
    }

    /// It waits for its turn, from `now` on.
    pub(super) fn enter(&mut self, flight: Flight, is_again: bool, call: oneshot::Sender<()>, now: Instant) {
        if !self.queue.has(flight) {
            // Opened before all were sent away.
            return;
        }
        self.admission.enter(flight);
        // Mostly nobody stands before it, and all that a queue does for one alone is not done.
        if !is_again && self.called.len() == 0 && self.max_queue > 0 && self.queue.passes(flight) {
            return self.called.call(flight, call, now);
        }
        self.calls.insert(flight, call);
        self.queue.enter(flight, is_again);
        while !is_again && self.waiting() > self.max_queue {
            match self.queue.shed() {
                // Its leader learns from the call that never comes.
                Shedding::Flight(shed) => drop(self.calls.remove(&shed)),
                Shedding::Place => {}
                Shedding::Nothing => break,
            }
        }
    }

    /// Called forward, it has its connection, `since`.
    pub(super) fn connected(&mut self, flight: Flight, since: Instant, grant: oneshot::Sender<Grant>) {
        self.called.connected(flight, since, grant);
    }

    /// It gives its turn up.
    pub(super) fn withdraw(&mut self, flight: Flight) {
        self.calls.remove(&flight);
        self.queue.withdraw(flight);
        self.called.forget(flight);
    }

    /// It is over.
    pub(super) fn close(&mut self, flight: Flight) {
        self.withdraw(flight);
        self.queue.close(flight);
        self.admission.close(flight);
    }

    /// The backoff has changed.
    pub(super) fn backed_off(&mut self, now: Instant) {
        self.watch_pause(now);
    }

    fn usage(&mut self, now: Instant) -> Usage {
        let (places, background) = self.queue.places(self.called.flights());
        Usage {
            clients: places.len(),
            places: places
                .into_iter()
                .take(MOST_SHOWN)
                .map(|(client, places)| (client.clone(), places))
                .collect(),
            background,
            spent: self.spending.spent(now),
        }
    }

    /// Whether nobody waits, nothing is paused and everybody who looks at it knows: then nothing follows from a flight's
    /// coming and going.
    fn is_idle(&self) -> bool {
        let is_known = self.shown == (0, 0) && self.next == Wake::default() && self.wanted == Demand::default();
        self.waiting() == 0 && !self.is_paused && is_known
    }

    /// Flights that wait for a permit.
    fn waiting(&self) -> usize {
        self.queue.waiting() + self.called.len()
    }

    /// Shows whether the account is paused; gives when the pause ends.
    fn watch_pause(&mut self, now: Instant) -> Option<Instant> {
        let pause_ends = self.parts.backoff.lock().paused_until(now);
        if pause_ends.is_some() != self.is_paused {
            self.is_paused = pause_ends.is_some();
            self.parts.metrics.paused.add(if self.is_paused { 1 } else { -1 });
        }
        pause_ends
    }

    /// Brings the queue's length up to date where others see it. Accounts that are not configured share one gauge, so
    /// that each adds what has changed.
    fn show(&mut self) {
        self.parts.waiting.store(self.waiting(), Ordering::Relaxed);
        let count = |flights: usize| i64::try_from(flights).unwrap_or(i64::MAX);
        let background = count(self.queue.background());
        let foreground = count(self.waiting()) - background;
        self.parts.metrics.queue_length[Lane::Foreground as usize].add(foreground - self.shown.0);
        self.parts.metrics.queue_length[Lane::Background as usize].add(background - self.shown.1);
        self.shown = (foreground, background);
    }

    /// Tells the polls whose turn would come too late, as things stand: of those called forward, too, but for the one that is
    /// next, unless nothing is granted. Gives when to look again.
    fn judge(&mut self, now: Instant) -> Option<Instant> {
        if self.waiting() == 0 {
            return None;
        }
        let backoff = self.parts.backoff.lock().clone();
        let resumed = backoff.resumed();
        let first = now.max(self.pacer.due()).max(resumed);
        let stretch = self.pacer.pace().full_second().as_secs_f64() / self.parts.share(now);
        let paced = |position: usize| {
            let permits = u32::try_from(position).unwrap_or(u32::MAX);
            first + backoff.time_for(f64::from(permits) * stretch, first)
        };
        let turn = |position| self.connections.turn(position, paced);
        if !self.admission.may_be_late(turn(self.waiting() - 1)) {
            return None;
        }
        let not_yet = self.admission.not_yet(now);
        if not_yet.is_none() {
            let called = self.called.flights().enumerate();
            let called = called.map(|(position, flight)| (flight, position == 0 && resumed <= now));
            let waiting = self.queue.forecast().map(|flight| (flight, false));
            self.admission.judge(called.chain(waiting), turn, now);
        }
        not_yet
    }

    /// Calls so many flights forward that the pace is kept while connections open: as many more as could be served in the
    /// time that takes lately or, while too few have one, since the first of those that have none was called. So connections
    /// that open slowly are opened in parallel, in whatever order they do, and where they open at once nobody is called
    /// early, nor where there are too few, and they would wait for one to come free. Gives when one more may come.
    fn call_forward(&mut self, now: Instant, is_task: bool) -> Option<Instant> {
        if self.queue.waiting() == 0 {
            return None;
        }
        let limit = usize::try_from(self.pacer.pace().limit.get()).unwrap_or(usize::MAX);
        let interval = self.pacer.pace().interval();
        let paced = interval.as_secs_f64() / self.parts.share(now);
        let paced = Duration::try_from_secs_f64(paced).unwrap_or(Duration::MAX);
        let freed = self.connections.apart();
        let in_time = self.leaves.as_nanos() / paced.max(freed).as_nanos().max(1);
        let longest = self.max_queue.min(usize::try_from(in_time).unwrap_or(usize::MAX));
        // Who is called forward gives way to nobody any more: in a short queue, or where few turns are in time, that must
        // not be everybody.
        let ahead = (limit / 8).clamp(LEAST_AHEAD, MOST_AHEAD).min(longest / 2).max(1);
        let most = (limit + 1).clamp(LEAST_CALLED, MOST_CALLED);
        while self.called.len() < most {
            let extra = (self.called.len() + 1).saturating_sub(ahead);
            // It would only wait for one to come free.
            if extra > 0
                && let Err(until) = self.connections.one_is_free(self.called.len(), now)
            {
                return until;
            }
            let extra = u32::try_from(extra).unwrap_or(u32::MAX);
            let served_in = interval.saturating_mul(extra);
            if served_in > self.called.opening() {
                let slowest = self.called.slowest().filter(|_| self.called.ready() < ahead)?;
                let may_come = slowest + served_in;
                if may_come > now || !is_task {
                    return (self.queue.waiting() > 0).then_some(may_come);
                }
            }
            let flight = self.queue.pop()?;
            if let Some(call) = self.calls.remove(&flight) {
                self.called.call(flight, call, now);
            }
        }
        None
    }

    /// Grants every permit that is due.
    fn grant_due(&mut self, now: Instant, is_task: bool) -> Wake {
        loop {
            let may_come = self.call_forward(now, is_task);
            let wake = self.grant_next(now);
            if let Some(wake) = wake {
                return wake.or_at(may_come);
            }
        }
    }

    /// Grants the next permit, or says what it waits for.
    fn grant_next(&mut self, now: Instant) -> Option<Wake> {
        let Some(ready_since) = self.called.ready_since() else {
            return Some(Wake::default());
        };
        let (resumed, rate) = {
            let backoff = self.parts.backoff.lock();
            (backoff.resumed(), backoff.rate(now))
        };
        if resumed > now {
            return Some(Wake::at(resumed));
        }
        let right = self.parts.shared.as_ref().map(SharedBudget::right);
        let alone = match right {
            Some(Right::Alone(slice)) => NonZeroU32::new(slice),
            Some(Right::Slot(_) | Right::Nothing) | None => None,
        };
        self.pacer.set_alone(alone, now);
        let pace = self.pacer.own_pace();
        let most = usize::try_from(pace.limit.get()).unwrap_or(usize::MAX);
        match self.parts.ring.room(now, most, pace.window()) {
            Room::Free => {}
            Room::Taken { until } => {
                return Some(Wake {
                    at: until,
                    when_changed: true,
                });
            }
        }
        match right {
            Some(Right::Nothing) => return Some(Wake::default()),
            Some(Right::Slot(slot)) => return self.grant_slot(slot, now),
            Some(Right::Alone(_)) | None => {}
        }
        let due = self.pacer.due();
        if due > now {
            return Some(Wake::at(due));
        }
        if self.pacer.spend(ready_since.max(resumed), rate, now) {
            let latest = self.parts.shared.as_ref().map(|shared| now + shared.patience());
            self.hand_over(now, latest);
        }
        None
    }

    /// Spends a permit that replicas share, at its slot; one that is late is as good as none.
    fn grant_slot(&mut self, slot: Slot, now: Instant) -> Option<Wake> {
        self.pacer.set_due(slot.due);
        if slot.due > now {
            return Some(Wake::at(slot.due));
        }
        if now <= slot.latest {
            self.hand_over(now, Some(slot.latest));
        }
        // What is left decides who gets the next.
        self.want(now);
        if let Some(shared) = &self.parts.shared {
            shared.spent();
        }
        None
    }

    /// Tells the other replicas how much is wanted here.
    fn want(&mut self, now: Instant) {
        let Some(shared) = &self.parts.shared else { return };
        let is_paused = self.parts.backoff.lock().resumed() > now;
        let demand = if self.waiting() == 0 {
            Demand::default()
        } else {
            Demand {
                weight: self.queue.weight(self.called.flights()),
                flights: if is_paused { 0 } else { self.called.ready() },
                is_queue: self.waiting() > 1,
            }
        };
        if demand != self.wanted {
            self.wanted = demand;
            shared.want(demand, now);
        }
    }

    /// The pace and the longest queue have changed.
    pub(super) fn configure(&mut self, max_queue: usize) {
        self.max_queue = max_queue;
        self.pacer.configure(&self.parts.backoff.lock());
    }

    /// Gives a permit to the earliest flight that has a connection and is still there.
    fn hand_over(&mut self, now: Instant, latest: Option<Instant>) {
        let mut stamp = self.parts.ring.take(latest);
        while let Some((flight, to)) = self.called.pop_ready() {
            let charged = self.queue.charged(flight);
            let lane = charged.map_or(Lane::Background, |_| Lane::Foreground);
            let Err(back) = to.send(Grant { stamp, lane }) else {
                self.connections.spend(now);
                return self.spending.charge(charged, now);
            };
            stamp = back.stamp;
        }
    }
}
