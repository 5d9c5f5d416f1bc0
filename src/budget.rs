//! Each account's queries a second, paced: the only source of [`Permit`]s.
//!
//! A flight takes a [`Place`] in its account's queue, is called forward ([`Turn`]), opens a connection of its own, and
//! only then gets its [`Permit`]. Upstream can be asked only by giving a permit away, so whatever is added later (a retry,
//! a refresh, a long poll) has paid, or does not compile.
//!
//! One dispatcher task an account (`budget/dispatcher.rs`) holds the queue and the pace; `budget/ring.rs` holds the
//! instants at which requests were really written, which is what the promise is about: never more than `limit` of them in
//! any sliding second. What happens to the answers is none of this module's business.

mod dispatcher;
mod ring;

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::metrics::AccountMetrics;
use dispatcher::{Dispatcher, Message};
use ring::Stamp;

/// How an account's queries are paced.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Queries a second that upstream allows.
    pub limit: NonZeroU32,
    /// `limit` emission intervals last 1 s plus this.
    pub margin: Duration,
    /// Nothing is granted before: 1 s plus `margin` after the process started, so that a restart cannot spend a second
    /// twice.
    pub not_before: Instant,
}

impl Pace {
    /// The time between two permits: GCRA's emission interval.
    pub fn interval(&self) -> Duration {
        (Duration::from_secs(1) + self.margin) / self.limit.get()
    }

    /// How long a written query counts against `limit`: 1 s, plus the third of `margin` that is left for the way
    /// upstream to differ between two of them.
    fn window(&self) -> Duration {
        Duration::from_secs(1) + self.margin / 3
    }

    /// Permits a second.
    fn rate(&self) -> f64 {
        self.interval().as_secs_f64().recip()
    }
}

/// One account's budget. Cheap to clone; the dispatcher ends when the last clone and the last place are gone.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    inbox: mpsc::UnboundedSender<Message>,
    pace: Pace,
    max_queue: usize,
    /// Flights that wait for a permit, called forward or not.
    waiting: AtomicUsize,
    /// Tickets count up for flights that queue, and down for those that go back to the head.
    next_back: AtomicI64,
    next_front: AtomicI64,
    paused_until: Mutex<Option<Instant>>,
    metrics: AccountMetrics,
}

/// The queue is as long as it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueFull;

/// Where a flight enters the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Behind everybody: first come, first served.
    Back,
    /// Before everybody, however long the queue: a second attempt, whose flight has had its turn.
    Front,
}

/// Proof that a connection is open: what a permit is granted for. A permit that then waits for a handshake would arrive
/// late and bunch with those behind it.
pub trait Connected {}

impl Budget {
    /// A budget with an empty queue.
    ///
    /// # Panics
    /// Outside a tokio runtime: the dispatcher is spawned here.
    pub fn new(pace: Pace, max_queue: usize, metrics: AccountMetrics) -> Self {
        let (inbox, messages) = mpsc::unbounded_channel();
        metrics.rate.set(pace.rate());
        tokio::spawn(Dispatcher::new(pace, metrics.paused.clone(), messages).run());
        Self(Arc::new(Shared {
            inbox,
            pace,
            max_queue,
            waiting: AtomicUsize::new(0),
            next_back: AtomicI64::new(0),
            next_front: AtomicI64::new(-1),
            paused_until: Mutex::new(None),
            metrics,
        }))
    }

    /// A place in the queue; dropping it leaves the queue unspent.
    ///
    /// # Errors
    /// [`QueueFull`] when `max_queue` flights wait already and this one comes from behind.
    pub fn enter(&self, entry: Entry) -> Result<Place, QueueFull> {
        let shared = &self.0;
        let order = match entry {
            Entry::Back => {
                let room = |waiting| (waiting < shared.max_queue).then_some(waiting + 1);
                let entered = shared.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room);
                entered.map_err(|_| QueueFull)?;
                shared.next_back.fetch_add(1, Ordering::Relaxed)
            }
            Entry::Front => {
                shared.waiting.fetch_add(1, Ordering::Relaxed);
                shared.next_front.fetch_sub(1, Ordering::Relaxed)
            }
        };
        shared.metrics.queue_length.inc();
        let ticket = Ticket {
            shared: Arc::clone(shared),
            order,
            entered: Instant::now(),
        };
        let (call, called) = oneshot::channel();
        ticket.tell(Message::Enter { order, call });
        Ok(Place { ticket, called })
    }

    /// Grants nothing before `until`. A pause is only ever extended.
    pub fn pause(&self, until: Instant) {
        let mut paused = lock(&self.0.paused_until);
        if paused.is_none_or(|before| before < until) {
            *paused = Some(until);
            // A dispatcher that is gone grants nothing either.
            let _ = self.0.inbox.send(Message::Pause { until });
        }
    }

    /// Whether the account is paused at `now`.
    pub fn is_paused(&self, now: Instant) -> bool {
        lock(&self.0.paused_until).is_some_and(|until| until > now)
    }

    /// How many flights wait for a permit.
    pub fn waiting(&self) -> usize {
        self.0.waiting.load(Ordering::Relaxed)
    }

    /// Permits a second that the account may have at present.
    pub fn rate(&self) -> f64 {
        self.0.pace.rate()
    }

    /// How long a flight that entered at `now` would wait, if nobody left.
    pub fn wait(&self, now: Instant) -> Duration {
        let resume = lock(&self.0.paused_until).unwrap_or(now).max(self.0.pace.not_before);
        let ahead = u32::try_from(self.waiting()).unwrap_or(u32::MAX);
        resume.saturating_duration_since(now) + self.0.pace.interval().saturating_mul(ahead)
    }
}

/// A flight's standing in its account's queue, from entry to permit.
#[derive(Debug)]
struct Ticket {
    shared: Arc<Shared>,
    order: i64,
    entered: Instant,
}

impl Ticket {
    fn tell(&self, message: Message) {
        // The dispatcher lives as long as `shared` holds the sender; only a runtime that shuts down ends it before.
        let _ = self.shared.inbox.send(message);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        self.shared.metrics.queue_length.dec();
        self.tell(Message::Leave { order: self.order });
    }
}

/// A place in the queue. Dropping it leaves the queue.
#[derive(Debug)]
pub struct Place {
    ticket: Ticket,
    called: oneshot::Receiver<()>,
}

impl Place {
    /// Waits to be called forward. `None` when the process is ending.
    ///
    /// Cancel safe: dropping the future leaves the queue.
    pub async fn called(self) -> Option<Turn> {
        self.called.await.ok()?;
        Some(Turn { ticket: self.ticket })
    }
}

/// Called forward: the flight opens its connection now. Dropping it lets the next one come forward.
#[derive(Debug)]
pub struct Turn {
    ticket: Ticket,
}

impl Turn {
    /// Waits for the permit. `None` when the process is ending.
    ///
    /// Cancel safe: dropping the future costs nothing but, at worst, one emission interval.
    pub async fn permit(self, _connection: &impl Connected) -> Option<Permit> {
        let (grant, granted) = oneshot::channel();
        self.ticket.tell(Message::Ready {
            order: self.ticket.order,
            since: Instant::now(),
            grant,
        });
        let stamp = granted.await.ok()?;
        self.ticket
            .shared
            .metrics
            .budget_wait
            .observe(self.ticket.entered.elapsed().as_secs_f64());
        Some(Permit(stamp))
    }
}

/// The right to ask upstream once. It counts against the last second until [`Permit::written`] says when it was used;
/// dropped unused, it counts no longer.
#[derive(Debug)]
pub struct Permit(Stamp);

impl Permit {
    /// The request's bytes were given to the network, `at` this instant: one taken *after* the write, so that the stamp
    /// is never earlier than the arrival that it stands for.
    pub fn written(self, at: Instant) {
        self.0.written(at);
    }
}

/// A poisoned lock means a panic in a few lines that cannot leave half a change behind.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
