//! The polls that wait, by when their turn has to come at the latest: who can no longer be served in time is told so at
//! once, on arrival or when others overtake. The forecast itself is `fair_queue/forecast.rs`'s and the dispatcher's.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::fair_queue::Flight;

/// A forecast looks at every flight that waits, in some 0.2 µs each: so often that it takes a fiftieth of a core at most.
const SPACING: Duration = Duration::from_micros(10);

/// A poll: when it has to be answered at the latest, and its number.
pub(super) type PollId = (Instant, u64);

#[derive(Debug, Default)]
pub(super) struct Admission {
    polls: BTreeMap<Flight, BTreeMap<PollId, Waiter>>,
    /// What upstream takes at least, as far as is known by now.
    at_least: Duration,
    /// No poll of a flight that waits needs its turn earlier.
    earliest: Option<Instant>,
    /// When a forecast may be made again.
    next: Option<Instant>,
}

#[derive(Debug)]
struct Waiter {
    /// What upstream was thought to take, at most, when it came.
    takes: Duration,
    /// Tells it by how much its turn would come too late.
    late: oneshot::Sender<Duration>,
}

/// The latest instant at which a turn serves a poll. Whoever is in the queue is sent away only for what upstream takes
/// longer than it was thought to: at the edge of what is possible a few waver, and these have waited long.
fn latest((deadline, _): &PollId, poll: &Waiter, at_least: Duration) -> Instant {
    let takes = poll.takes.max(at_least);
    deadline.checked_sub(takes).unwrap_or(*deadline)
}

impl Admission {
    /// A poll waits for `flight`, and upstream is thought to take so long at most; `late` tells it by how much its turn would
    /// come too late.
    pub(super) fn join(&mut self, flight: Flight, poll: PollId, takes: Duration, late: oneshot::Sender<Duration>) {
        self.polls
            .entry(flight)
            .or_default()
            .insert(poll, Waiter { takes, late });
        self.enter(flight);
    }

    /// The flight waits, from now on: a forecast made before has not seen its polls.
    pub(super) fn enter(&mut self, flight: Flight) {
        // One answer is for all: if it is in time for the first, it is for those behind.
        let first = self.polls.get(&flight).and_then(BTreeMap::first_key_value);
        let first = first.map(|(id, poll)| latest(id, poll, self.at_least));
        self.earliest = self.earliest.into_iter().chain(first).min();
    }

    /// Upstream takes so long at least.
    pub(super) fn expect(&mut self, at_least: Duration) {
        let more = at_least.saturating_sub(self.at_least);
        self.earliest = self
            .earliest
            .map(|earliest| earliest.checked_sub(more).unwrap_or(earliest));
        self.at_least = at_least;
    }

    /// It waits no longer.
    pub(super) fn leave(&mut self, flight: Flight, poll: PollId) {
        if let Some(polls) = self.polls.get_mut(&flight) {
            polls.remove(&poll);
            if polls.is_empty() {
                self.polls.remove(&flight);
            }
        }
    }

    /// The flight is over.
    pub(super) fn close(&mut self, flight: Flight) {
        self.polls.remove(&flight);
    }

    /// Whether some poll may be late if the last turn comes at `last`.
    pub(super) fn may_be_late(&self, last: Instant) -> bool {
        self.earliest.is_some_and(|earliest| earliest < last)
    }

    /// When the next forecast may be made, if that is after `now`.
    pub(super) fn not_yet(&self, now: Instant) -> Option<Instant> {
        self.next.filter(|next| *next > now)
    }

    /// Tells every poll whose turn would come too late, given the flights in the order of their turns, whether each is next
    /// and so in time, and the instant of the n-th turn. Whoever is told so leaves, and those behind move up.
    pub(super) fn judge(
        &mut self,
        flights: impl Iterator<Item = (Flight, bool)>,
        turn: impl Fn(usize) -> Instant,
        now: Instant,
    ) {
        self.earliest = None;
        let (mut seen, mut ahead) = (0, 0);
        for (flight, is_next) in flights {
            seen += 1;
            let turn = turn(ahead);
            // Nobody waits for those in the background.
            if let Some(polls) = self.polls.get_mut(&flight) {
                while let Some(first) = polls.first_entry().filter(|_| !is_next) {
                    let latest = latest(first.key(), first.get(), self.at_least);
                    if latest >= turn {
                        break;
                    }
                    // Nobody listens when the poll has just been answered.
                    let _ = first.remove().late.send(turn - latest);
                }
                // All have been told, and will be gone: until then they stand before nobody.
                if polls.is_empty() {
                    continue;
                }
                self.enter(flight);
            }
            ahead += 1;
        }
        self.next = Some(now + SPACING.saturating_mul(seen));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_been_told_and_is_not_gone_yet_stands_before_nobody() {
        let (mut admission, now) = (Admission::default(), Instant::now());
        let turn = |position| now + Duration::from_secs(1) * u32::try_from(position).unwrap();
        let flights = 0..5;
        let join = |flight, admission: &mut Admission| {
            let (late, is_late) = oneshot::channel();
            let poll = (now + Duration::from_secs(1), flight);
            admission.join(flight, poll, Duration::ZERO, late);
            is_late
        };
        let mut told: Vec<_> = flights.clone().map(|flight| join(flight, &mut admission)).collect();
        admission.judge(flights.map(|flight| (flight, false)), turn, now);
        told.push(join(5, &mut admission));
        admission.judge((0..6).map(|flight| (flight, false)), turn, now);
        let late_by: Vec<_> = told.iter_mut().map(|late| late.try_recv().ok()).collect();
        let late = Some(Duration::from_secs(1));
        assert_eq!(late_by, [None, None, late, late, late, late]);
    }
}
