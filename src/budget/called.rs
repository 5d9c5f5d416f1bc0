//! The flights called forward: those that open a connection, and those that have one and wait for a permit. How many there
//! should be, and when one gets its permit, is `budget/dispatcher.rs`'s business. Pure: `now` is passed in.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::fair_queue::Flight;
use super::ring::Stamp;
use crate::outcome::Lane;

/// A permit, and in whose turn.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) stamp: Stamp,
    pub(super) lane: Lane,
}

#[derive(Debug, Default)]
pub(super) struct Called {
    /// In the order in which they were called forward.
    calls: BTreeMap<u64, Call>,
    /// Where each of them stands in that order.
    call_of: BTreeMap<Flight, u64>,
    next_call: u64,
    /// Those that have a connection.
    ready: usize,
    /// Since when there has always been one of them, while there is one.
    ready_since: Option<Instant>,
    /// From a call to its connection, in the moving mean of the last few.
    opening: Duration,
}

#[derive(Debug)]
struct Call {
    flight: Flight,
    at: Instant,
    /// Once it has its connection.
    grant: Option<oneshot::Sender<Grant>>,
}

impl Called {
    /// Calls a flight forward.
    pub(super) fn call(&mut self, flight: Flight, call: oneshot::Sender<()>, at: Instant) {
        // Nobody listens when the flight has just given up; its end is on the way.
        if call.send(()).is_ok() {
            self.next_call += 1;
            let grant = None;
            self.calls.insert(self.next_call, Call { flight, at, grant });
            self.call_of.insert(flight, self.next_call);
        }
    }

    /// It has its connection, `since`.
    pub(super) fn connected(&mut self, flight: Flight, since: Instant, grant: oneshot::Sender<Grant>) {
        let call = self.call_of.get(&flight).and_then(|call| self.calls.get_mut(call));
        if let Some(call) = call {
            call.grant = Some(grant);
            let took = since.saturating_duration_since(call.at);
            self.opening = (self.opening * 7 + took) / 8;
            self.ready_since.get_or_insert(since);
            self.ready += 1;
        }
    }

    /// It is called forward no more: gives the way to grant it a permit, if it has a connection.
    pub(super) fn forget(&mut self, flight: Flight) -> Option<oneshot::Sender<Grant>> {
        let call = self.call_of.remove(&flight)?;
        let grant = self.calls.remove(&call)?.grant?;
        self.ready -= 1;
        if self.ready == 0 {
            self.ready_since = None;
        }
        Some(grant)
    }

    /// Forgets the earliest that has a connection, and gives it.
    pub(super) fn pop_ready(&mut self) -> Option<(Flight, oneshot::Sender<Grant>)> {
        let flight = self.calls.values().find(|call| call.grant.is_some())?.flight;
        Some((flight, self.forget(flight)?))
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        *self = Self {
            next_call: self.next_call,
            opening: self.opening,
            ..Self::default()
        };
    }

    pub(super) fn len(&self) -> usize {
        self.calls.len()
    }

    /// How many have a connection.
    pub(super) fn ready(&self) -> usize {
        self.ready
    }

    /// Since when there has always been one with a connection, if there is one.
    pub(super) fn ready_since(&self) -> Option<Instant> {
        self.ready_since
    }

    /// How long it takes from a call to its connection, in the moving mean of the last few.
    pub(super) fn opening(&self) -> Duration {
        self.opening
    }

    /// When the first of those was called that have no connection.
    pub(super) fn slowest(&self) -> Option<Instant> {
        let mut without = self.calls.values().filter(|call| call.grant.is_none());
        without.next().map(|call| call.at)
    }

    /// All of them, those that have a connection first: the order in which they get their permits, as things stand.
    pub(super) fn flights(&self) -> impl Iterator<Item = Flight> {
        let with = |connection| (self.calls.values()).filter(move |call| call.grant.is_some() == connection);
        with(true).chain(with(false)).map(|call| call.flight)
    }
}
