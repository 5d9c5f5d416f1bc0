//! Each account's queries a second, paced and shared out: the only source of [`Permit`]s.
//!
//! A [`QueuedFlight`] has a place under every client that waits for it. Its leader enters the queue, is called forward
//! ([`Turn`]), opens a connection of its own, and only then gets its [`Permit`]. Upstream can be asked only by giving a permit
//! away, so whatever is added later (a retry, a refresh, a long poll) has paid, or does not compile.
//!
//! One dispatcher an account (`budget/dispatcher.rs`) grants the permits; `budget/fair_queue.rs` says whose turn it is,
//! `budget/called.rs` who has been called forward, `budget/pacer.rs` when the next permit is due, `budget/backoff.rs` what an
//! upstream 429 does to the pace, `budget/admission.rs` who cannot be served in time, `budget/promised.rs` when they may
//! come back, `budget/connections.rs` when there is a connection, and `budget/ring.rs` holds the instants at which requests
//! were really written, which is what the promise is about: never more than `limit` of them in any sliding second.
//! `budget/history.rs` and `budget/spending.rs` remember the last minutes, for people to look at. What happens to the
//! answers is none of this module's business.

mod admission;
mod backoff;
mod called;
mod connections;
mod dispatcher;
mod fair_queue;
mod history;
mod pacer;
mod promised;
mod ring;
mod spending;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::account::Client;
use crate::metrics::AccountMetrics;
use crate::outcome::Shed;
use crate::panics::supervise;
use crate::shared::SharedBudget;
use crate::task::TaskId;
use admission::PollId;
use backoff::Backoff;
use called::Grant;
use dispatcher::{Desk, Dispatcher};
use fair_queue::Flight;
use promised::Promised;
use ring::{Ring, Stamp};
pub use spending::Spent;

/// Of an account's clients, so many are shown by name.
const MOST_SHOWN: usize = 20;

/// How an account's queries are paced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Queries a second that upstream allows.
    pub limit: NonZeroU32,
    /// `limit` emission intervals last 1 s plus this.
    pub margin: Duration,
    /// Nothing is granted before: for 1 s plus `margin` at least after the process started, so that a restart cannot spend a
    /// second twice, and after a reload brought keys that spent another budget.
    pub not_before: Instant,
}

impl Pace {
    /// The time between two permits: GCRA's emission interval.
    pub fn interval(&self) -> Duration {
        self.full_second() / self.limit.get()
    }

    /// How long `limit` emission intervals last.
    fn full_second(&self) -> Duration {
        Duration::from_secs(1) + self.margin
    }

    /// Permits a second, while nothing slows the account down.
    pub fn rate(&self) -> f64 {
        self.interval().as_secs_f64().recip()
    }

    /// How long a written query counts against `limit`: 1 s, plus the third of `margin` that is left for the way
    /// upstream to differ between two of them.
    fn window(&self) -> Duration {
        Duration::from_secs(1) + self.margin / 3
    }
}

/// One account's budget. Cheap to clone; its task ends when the last clone and the last flight are gone.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    desk: Arc<Desk>,
    next_flight: AtomicU64,
    next_poll: AtomicU64,
    promised: Mutex<Promised>,
}

/// What an account's handles share with its dispatcher, and need not wait for its lock to look at.
#[derive(Debug)]
struct Parts {
    backoff: Mutex<Backoff>,
    /// Flights that wait for a permit, called forward or not: the dispatcher's count.
    waiting: AtomicUsize,
    ring: Arc<Ring>,
    /// Where replicas share the budget: the way to their permits.
    shared: Option<SharedBudget>,
    metrics: AccountMetrics,
}

impl Parts {
    fn new(pace: Pace, shared: Option<SharedBudget>, metrics: AccountMetrics) -> Self {
        Self {
            backoff: Mutex::new(Backoff::new(pace)),
            waiting: AtomicUsize::new(0),
            ring: Arc::default(),
            shared,
            metrics,
        }
    }

    /// As [`Budget::share`].
    fn share(&self, now: Instant) -> f64 {
        self.shared.as_ref().map_or(1.0, |shared| shared.share(now))
    }
}

/// Who waits for an account's permits, and who got them lately.
#[derive(Clone, Debug)]
pub struct Usage {
    /// Clients of which flights wait.
    pub clients: usize,
    /// Those with most of them, and how many each has: a flight counts under every client that waits for it.
    pub places: Vec<(Client, usize)>,
    /// Flights that wait on nobody's behalf.
    pub background: usize,
    /// Who got permits.
    pub spent: Spent,
}

/// What upstream is thought to take, as far as is known by now.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// What an answer takes at least.
    pub at_least: Duration,
    /// What opening a connection takes of a turn, in the mean.
    pub opening: Duration,
    /// What an answer takes in the mean: for so long its connection is in use.
    pub mean: Duration,
    /// How many the account may have.
    pub connections: usize,
    /// What is left of the longest that a poll may wait: turns that come later are of no use to it.
    pub leaves: Duration,
}

/// How a flight enters the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// When the turn of one of its clients comes.
    InTurn,
    /// Before everybody: a second attempt, whose flight has had its turn.
    Again,
}

/// Proof that a connection is open: what a permit is granted for. A permit that then waits for a handshake would arrive
/// late and bunch with those behind it.
pub trait Connected {}

impl Budget {
    /// A budget with an empty queue; one that replicas share spends what comes by `shared`.
    ///
    /// # Panics
    /// Outside a tokio runtime: the dispatcher's task is spawned here.
    pub fn new(pace: Pace, max_queue: usize, shared: Option<SharedBudget>, metrics: AccountMetrics) -> Self {
        let desk = Arc::new(Desk::new(max_queue, Parts::new(pace, shared, metrics)));
        tokio::spawn({
            let desk = Arc::clone(&desk);
            supervise("budget", async move || desk.run().await)
        });
        Self(Arc::new(Inner {
            desk,
            next_flight: AtomicU64::new(0),
            next_poll: AtomicU64::new(0),
            promised: Mutex::default(),
        }))
    }

    fn parts(&self) -> &Parts {
        &self.0.desk.parts
    }

    /// Changes the pace and the longest queue, from the next permit on. What was spent counts on, so old and new together
    /// stay within the limit that holds when a permit is granted.
    pub fn configure(&self, pace: Pace, max_queue: usize) {
        self.parts().backoff.lock().set_pace(pace);
        self.0.tell(|dispatcher| dispatcher.configure(max_queue));
    }

    /// Whether both are handles of one budget.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The pace when nothing slows it down.
    pub fn pace(&self) -> Pace {
        self.parts().backoff.lock().pace()
    }

    /// A new flight: of a task that has a `snapshot` since that instant, or of one never seen.
    pub fn flight(&self, snapshot: Option<Instant>) -> QueuedFlight {
        let budget = Arc::clone(&self.0);
        let flight = budget.next_flight.fetch_add(1, Ordering::Relaxed);
        budget.tell(|dispatcher| dispatcher.open(flight, snapshot));
        QueuedFlight(Arc::new(Held {
            budget,
            flight,
            is_kept: AtomicBool::new(false),
        }))
    }

    /// Upstream answered 429 to a query that was `asked` then, and said for how long: nothing is granted until then, and
    /// the pace is cut for a while. Gives how long the pause is; a pause is only ever extended.
    pub fn rate_limited(&self, retry_after: Option<Duration>, asked: Instant, now: Instant) -> Duration {
        self.back_off(now, |backoff| backoff.rate_limited(retry_after, asked, now))
    }

    /// Takes over what upstream's 429s did to another budget: a key that spent that one spends this one from now on.
    pub fn take_over(&self, other: &Self, now: Instant) {
        let Some(backed) = other.parts().backoff.lock().backed() else {
            return;
        };
        self.back_off(now, |backoff| backoff.take_over(backed, now));
    }

    /// Changes the backoff, and tells whoever goes by it.
    fn back_off<T>(&self, now: Instant, change: impl FnOnce(&mut Backoff) -> T) -> T {
        let (before, changed, backed) = {
            let mut backoff = self.parts().backoff.lock();
            let before = backoff.backed();
            (before, change(&mut backoff), backoff.backed())
        };
        // What is no news is kept from the others: they may have heard something since.
        if let (Some(shared), Some(backed)) = (&self.parts().shared, backed.filter(|_| backed != before)) {
            shared.back_off(backed);
        }
        self.0.tell(|dispatcher| dispatcher.backed_off(now));
        changed
    }

    /// What is known by now of what upstream takes: that counts for those who wait already, too.
    pub fn expect(&self, expected: Expected) {
        self.0.desk.expect(expected);
    }

    /// Lets what was [expected](Self::expect) last count at once, not with whatever happens next: that may be long.
    pub fn judge(&self) {
        self.0.tell(|_| {});
    }

    /// Whether the account is paused at `now`.
    pub fn is_paused(&self, now: Instant) -> bool {
        self.parts().backoff.lock().paused_until(now).is_some()
    }

    /// Queries a second that the pace allows at `now`: of a shared budget, what this process can count on.
    pub fn rate(&self, now: Instant) -> f64 {
        let share = self.share(now);
        let backoff = self.parts().backoff.lock();
        share * backoff.rate(now) / backoff.pace().full_second().as_secs_f64()
    }

    /// Turns a second that can be promised at `now`.
    fn turns(&self, now: Instant) -> f64 {
        self.rate(now).min(self.0.desk.apart().as_secs_f64().recip())
    }

    /// What part of the limit this process can count on, from 0 to 1: all of it unless replicas share the budget.
    pub fn share(&self, now: Instant) -> f64 {
        self.parts().share(now)
    }

    /// Whether anybody waits for a permit: here, or at another replica as far as is known at `now`.
    pub fn is_wanted(&self, now: Instant) -> bool {
        let shared = self.parts().shared.as_ref();
        self.waiting() > 0 || shared.is_some_and(|shared| shared.is_contended(now))
    }

    /// How many flights wait for a permit.
    pub fn waiting(&self) -> usize {
        self.parts().waiting.load(Ordering::Relaxed)
    }

    /// Queries written in each of the whole seconds of the three minutes before `now`, the oldest first.
    pub fn history(&self, now: Instant) -> Vec<u32> {
        self.parts().ring.history(now)
    }

    /// How many they are.
    pub fn recent(&self, now: Instant) -> u64 {
        self.parts().ring.recent(now)
    }

    /// Who waits, and who spends.
    pub fn usage(&self) -> Usage {
        self.0.desk.usage()
    }

    /// When a poll of `client` for `task` finds a place that is turned away at `now`, if its turn would have come `late_by`
    /// too late. Each task is promised a turn of its own in its client's line, so that they do not all come back at once.
    pub fn retry_after(
        &self,
        client: &Client,
        weight: u32,
        task: &TaskId,
        late_by: Duration,
        now: Instant,
    ) -> Duration {
        let rate = self.turns(now);
        self.0.promised.lock().next(client, weight, task, late_by, rate, now)
    }

    /// How long before the end of the queue a poll that comes at `now` has to stop, for the places that are promised to
    /// others of its client; not at all if one is promised to itself.
    pub fn kept(&self, client: &Client, task: &TaskId, now: Instant) -> Duration {
        let rate = self.turns(now);
        self.0.promised.lock().kept(client, task, rate, now)
    }

    /// How long nothing is granted from `now` on: until the account's pause ends, or the start's.
    pub fn paused_for(&self, now: Instant) -> Duration {
        let resumed = self.parts().backoff.lock().resumed();
        resumed.saturating_duration_since(now)
    }
}

impl Inner {
    fn tell(&self, what: impl FnOnce(&mut Dispatcher)) {
        self.desk.tell(what);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.desk.close();
    }
}

/// A flight in its account's queue. Cheap to clone; when the last clone is gone the flight is over.
#[derive(Clone, Debug)]
pub struct QueuedFlight(Arc<Held>);

#[derive(Debug)]
struct Held {
    budget: Arc<Inner>,
    flight: Flight,
    is_kept: AtomicBool,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.tell(|dispatcher| dispatcher.close(self.flight));
    }
}

impl QueuedFlight {
    /// A poll of `client` waits, too, for as long as the result is held: the flight stands in that client's queue. It is to
    /// be answered by its `deadline`, and upstream is thought to take so long: a turn that comes later is of no use to it.
    pub fn join(&self, client: Client, weight: u32, deadline: Instant, takes: Duration) -> Waiting {
        let budget = &self.0.budget;
        let poll = (deadline, budget.next_poll.fetch_add(1, Ordering::Relaxed));
        let (late, is_late) = oneshot::channel();
        budget.tell(|dispatcher| dispatcher.join(self.0.flight, &client, weight, poll, takes, late));
        Waiting {
            flight: self.clone(),
            client,
            poll,
            late: is_late,
        }
    }

    /// Lets the flight go on in the background when nobody waits for it any more. True for the first to say so.
    pub fn keep(&self) -> bool {
        let is_first = !self.0.is_kept.swap(true, Ordering::Relaxed);
        if is_first {
            self.0.budget.tell(|dispatcher| dispatcher.keep(self.0.flight));
        }
        is_first
    }

    /// Enters the queue and waits to be called forward.
    ///
    /// Cancel safe: dropping the future leaves the queue.
    ///
    /// # Errors
    /// [`Shed::QueueFull`] when `max_queue` flights wait and this one has to give way: the youngest place of the client with most
    /// places, of equals the one served last. Also when the dispatcher panics.
    pub async fn enter(&self, entry: Entry) -> Result<Turn, Shed> {
        let (call, called) = oneshot::channel();
        let (flight, is_again, entered) = (self.0.flight, entry == Entry::Again, Instant::now());
        let turn = Turn {
            flight: self.clone(),
            entered,
            is_used: false,
        };
        let budget = &self.0.budget;
        budget.tell(|dispatcher| dispatcher.enter(flight, is_again, call, entered));
        called.await.map_err(|_| Shed::QueueFull)?;
        Ok(turn)
    }
}

/// A poll that waits for a flight. Dropping it takes its client's place away, if it was the client's last.
#[derive(Debug)]
pub struct Waiting {
    flight: QueuedFlight,
    client: Client,
    poll: PollId,
    late: oneshot::Receiver<Duration>,
}

impl Waiting {
    /// Waits until it is known that the turn would come too late: at once where that is so on arrival, later where others
    /// overtake or the account is paused. Gives by how much.
    ///
    /// Cancel safe; not to be asked again once it has told.
    pub async fn late(&mut self) -> Duration {
        match (&mut self.late).await {
            Ok(by) => by,
            // The flight has had its turn.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let held = &self.flight.0;
        held.budget
            .tell(|dispatcher| dispatcher.leave(held.flight, &self.client, self.poll));
    }
}

/// Called forward: the flight opens its connection now. Dropping it lets the next one come forward.
#[derive(Debug)]
pub struct Turn {
    flight: QueuedFlight,
    entered: Instant,
    /// It has become a permit: there is nothing left to let go.
    is_used: bool,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let held = &self.flight.0;
        if !self.is_used {
            held.budget.tell(|dispatcher| dispatcher.withdraw(held.flight));
        }
    }
}

impl Turn {
    /// Waits for the permit. `None` when the dispatcher panics.
    ///
    /// Cancel safe: dropping the future costs nothing but, at worst, one emission interval.
    pub fn permit<C: Connected>(mut self, _connection: &C) -> impl Future<Output = Option<Permit>> + use<C> {
        // It borrows no connection: one that its user drives is not `Sync`, and whoever waits would not be `Send`.
        async move {
            let (grant, granted) = oneshot::channel();
            let held = &self.flight.0;
            let since = Instant::now();
            held.budget
                .tell(|dispatcher| dispatcher.connected(held.flight, since, grant));
            let Grant { stamp, lane } = granted.await.ok()?;
            self.is_used = true;
            let waits = &held.budget.desk.parts.metrics.budget_wait;
            waits[lane as usize].observe(self.entered.elapsed().as_secs_f64());
            Some(Permit(stamp))
        }
    }
}

/// The right to ask upstream once. It counts against the last second until [`Permit::written`] says when it was used;
/// dropped unused, it counts no longer.
#[derive(Debug)]
pub struct Permit(Stamp);

impl Permit {
    /// Whether it has waited too long to be used: where replicas share a budget, a late query could fall into a second that
    /// is another's. It has to be dropped then.
    pub fn is_late(&self, now: Instant) -> bool {
        self.0.is_late(now)
    }

    /// One of a budget of its own, for tests of what becomes of a late one.
    #[cfg(test)]
    pub(crate) fn until(latest: Instant) -> Self {
        Self(Arc::new(Ring::default()).take(Some(latest)))
    }

    /// The request's bytes were given to the network, `at` this instant: one taken *after* the write, so that the stamp
    /// is never earlier than the arrival that it stands for.
    pub fn written(self, at: Instant) {
        self.0.written(at);
    }
}

#[cfg(test)]
mod tests;
