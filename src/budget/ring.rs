//! The guarantee proper: every instant of the last second (and a little) at which a query was written.
//!
//! The pace alone is not enough, since a permit may be used late and then bunch with those behind it. So a permit is
//! granted only while fewer than `limit` queries lie within the window, and one not yet written counts as now.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::history::History;

/// The written instants of one account.
#[derive(Debug, Default)]
pub(super) struct Ring {
    slots: Mutex<Slots>,
    /// A permit was written, or dropped unused.
    pub(super) changed: Notify,
}

#[derive(Debug, Default)]
struct Slots {
    /// Permits granted and not yet written.
    unwritten: usize,
    /// In order.
    written: VecDeque<Instant>,
    /// Of the last minutes: nobody's permit depends on it.
    history: History,
}

/// Whether there is room for one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Now.
    Free,
    /// Not before a permit that was granted is written or dropped, or the oldest written query that stands in the way
    /// leaves the window.
    Taken { until: Option<Instant> },
}

impl Ring {
    /// Whether fewer than `limit` queries lie within the `window` that ends at `now`.
    pub(super) fn room(&self, now: Instant, limit: usize, window: Duration) -> Room {
        let mut slots = self.slots.lock();
        while slots.written.front().is_some_and(|oldest| *oldest + window <= now) {
            slots.written.pop_front();
        }
        let taken = slots.unwritten + slots.written.len();
        if taken < limit {
            return Room::Free;
        }
        let in_the_way = slots.written.get(taken - limit);
        Room::Taken {
            until: in_the_way.map(|written| *written + window),
        }
    }

    /// Queries written in each of the last whole seconds before `now`, the oldest first.
    pub(super) fn history(&self, now: Instant) -> Vec<u32> {
        self.slots.lock().history.seconds(now)
    }

    /// How many they are.
    pub(super) fn recent(&self, now: Instant) -> u64 {
        self.slots.lock().history.total(now)
    }

    /// Takes a slot, from now until it is written and a window has passed, or until it is dropped unused.
    pub(super) fn take(self: &Arc<Self>, latest: Option<Instant>) -> Stamp {
        self.slots.lock().unwritten += 1;
        Stamp {
            ring: Arc::clone(self),
            latest,
        }
    }
}

/// A slot of the ring.
#[derive(Debug)]
pub(super) struct Stamp {
    ring: Arc<Ring>,
    /// After this it may not be written: other replicas count on it.
    latest: Option<Instant>,
}

impl Stamp {
    /// Whether it may be written no more.
    pub(super) fn is_late(&self, now: Instant) -> bool {
        self.latest.is_some_and(|latest| latest < now)
    }

    /// The query was written, `at` this instant. Where two connections' stamps come in the wrong order, the earlier one
    /// counts as late as the other.
    pub(super) fn written(self, at: Instant) {
        let mut slots = self.ring.slots.lock();
        let at = slots.written.back().map_or(at, |last| at.max(*last));
        slots.written.push_back(at);
        slots.history.count(at);
    }
}

impl Drop for Stamp {
    fn drop(&mut self) {
        self.ring.slots.lock().unwritten -= 1;
        self.ring.changed.notify_one();
    }
}
