//! The polls that wait, by when their turn has to come at the latest: who can no longer be served in time is told so at
//! once, on arrival or when others overtake. The forecast itself is `fair_queue/forecast.rs`'s and the dispatcher's.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::fair_queue::Flight;

/// A forecast looks at every flight that waits, in some 0.2 µs each: so often that it takes a fiftieth of a core at most.
const SPACING: Duration = Duration::from_micros(10);

/// A poll: the latest instant at which a turn is of use to it, and its number.
pub(super) type PollId = (Instant, u64);

#[derive(Debug, Default)]
pub(super) struct Admission {
    polls: BTreeMap<Flight, BTreeMap<PollId, oneshot::Sender<Duration>>>,
    /// No poll of a flight that waits needs its turn earlier.
    earliest: Option<Instant>,
    /// When a forecast may be made again.
    next: Option<Instant>,
}

impl Admission {
    /// A poll waits for `flight`; `late` tells it by how much its turn would come too late.
    pub(super) fn join(&mut self, flight: Flight, poll: PollId, late: oneshot::Sender<Duration>) {
        self.earliest = Some(self.earliest.map_or(poll.0, |earliest| earliest.min(poll.0)));
        self.polls.entry(flight).or_default().insert(poll, late);
    }

    /// The flight waits, from now on: a forecast made before has not seen its polls.
    pub(super) fn enter(&mut self, flight: Flight) {
        let first = self.polls.get(&flight).and_then(BTreeMap::first_key_value);
        let first = first.map(|((latest, _), _)| *latest);
        self.earliest = self.earliest.into_iter().chain(first).min();
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
                while let Some(first) = polls.first_entry().filter(|first| first.key().0 < turn && !is_next) {
                    let (latest, _) = *first.key();
                    // Nobody listens when the poll has just been answered.
                    let _ = first.remove().send(turn - latest);
                }
                let Some(((latest, _), _)) = polls.first_key_value() else {
                    self.polls.remove(&flight);
                    continue;
                };
                self.earliest = Some(self.earliest.map_or(*latest, |earliest| earliest.min(*latest)));
            }
            ahead += 1;
        }
        self.next = Some(now + SPACING.saturating_mul(seen));
    }
}

/// The longest that a line of promised turns makes a poll wait: some clients come back every 30 s at the latest, and those
/// that come back before they were told to would lengthen it for ever.
const LONGEST_LINE: Duration = Duration::from_secs(30);

/// Turns promised to polls that were turned away: they come back later, each in its turn.
#[derive(Debug, Default)]
pub(super) struct Promised {
    /// When the last of them is.
    last: Option<Instant>,
}

impl Promised {
    /// Promises one more turn; gives how long after `now` it is. Turns come at `rate` a second.
    pub(super) fn next(&mut self, rate: f64, now: Instant) -> Duration {
        let each = Duration::try_from_secs_f64(rate.recip()).unwrap_or_default();
        let first = now + each;
        let next = self
            .last
            .map_or(first, |last| first.max(last + each))
            .min(now + LONGEST_LINE);
        self.last = Some(next);
        next - now
    }
}
