//! When there is a connection for a turn: each is in use for as long as an answer takes, and before that while it opens,
//! where it has to. Where there are too few, turns come no faster than they come free. Pure: instants are passed in.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

#[derive(Debug)]
pub(super) struct Connections {
    most: usize,
    /// How long a turn waits for its own to open, in the mean.
    opening: Duration,
    /// How long one is in use from the permit on, in the mean.
    takes: Duration,
    /// When permits were granted, as far back as one of them may still be in use.
    used: VecDeque<Instant>,
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            most: usize::MAX,
            opening: Duration::ZERO,
            takes: Duration::ZERO,
            used: VecDeque::new(),
        }
    }
}

impl Connections {
    /// So many there may be, and each is in use for as long as an answer `takes`, once it is open.
    pub(super) fn expect(&mut self, most: usize, opening: Duration, takes: Duration) {
        (self.most, self.opening, self.takes) = (most.max(1), opening, takes);
    }

    /// How long one serves one turn.
    fn cycle(&self) -> Duration {
        self.opening + self.takes
    }

    /// How far apart they come free while all are in use.
    pub(super) fn apart(&self) -> Duration {
        self.cycle() / u32::try_from(self.most).unwrap_or(u32::MAX)
    }

    /// A permit is granted `now`.
    pub(super) fn spend(&mut self, now: Instant) {
        self.used.push_back(now);
        // Twice as long, since it may turn out that answers take longer.
        let counts = self.cycle() * 2;
        let is_free = |used: Instant| used + counts < now;
        while self.used.len() > self.most || self.used.front().is_some_and(|used| is_free(*used)) {
            self.used.pop_front();
        }
    }

    /// Whether one is free at `now`, where so many are for flights that are called forward already.
    ///
    /// # Errors
    /// When one will be, as far as that is known.
    pub(super) fn one_is_free(&self, called: usize, now: Instant) -> Result<(), Option<Instant>> {
        let free = self.used.partition_point(|used| *used + self.takes <= now);
        match (self.used.len() - free + called).checked_sub(self.most) {
            None => Ok(()),
            Some(too_many) => Err(self.used.get(free + too_many).map(|used| *used + self.takes)),
        }
    }

    /// When the turn at this position comes, counted from 0, and has its connection open, if those of all positions come as
    /// they are `paced`: it has the connection of the turn as many before it as there are connections.
    pub(super) fn turn(&self, position: usize, paced: impl Fn(usize) -> Instant) -> Instant {
        let (round, place) = (position / self.most, position % self.most);
        let used = (self.used.len() + place).checked_sub(self.most);
        let free = used
            .and_then(|used| self.used.get(used))
            .map(|used| *used + self.cycle());
        let first = paced(place);
        let first = free.map_or(first, |free| free.max(first));
        if round == 0 {
            return first;
        }
        let rounds = u32::try_from(round).unwrap_or(u32::MAX);
        paced(position).max(first + self.cycle().saturating_mul(rounds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_turn_has_the_connection_of_the_one_as_many_before_it() {
        let (mut connections, start) = (Connections::default(), Instant::now());
        let paced = |now: Instant| move |position| now + SECOND / 10 * u32::try_from(position).unwrap();
        let turns = |connections: &Connections, now, positions: &[usize]| {
            let turn = |position: &usize| (connections.turn(*position, paced(now)) - start).as_millis();
            positions.iter().map(turn).collect::<Vec<_>>()
        };
        assert_eq!(
            turns(&connections, start, &[0, 1, 99]),
            [0, 100, 9900],
            "nothing is known yet"
        );
        connections.expect(3, Duration::ZERO, SECOND);
        assert_eq!(
            turns(&connections, start, &[0, 1, 2, 3, 4, 6]),
            [0, 100, 200, 1000, 1100, 2000]
        );
        connections.spend(start);
        connections.spend(start + SECOND / 2);
        assert_eq!(connections.one_is_free(0, start + SECOND / 2), Ok(()));
        assert_eq!(
            connections.one_is_free(1, start + SECOND / 2),
            Err(Some(start + SECOND))
        );
        assert_eq!(connections.one_is_free(3, start + SECOND / 2), Err(None));
        assert_eq!(connections.one_is_free(1, start + SECOND), Ok(()));
        // One is free, one will be after a second, and one half a second later.
        let now = start + SECOND / 2;
        assert_eq!(
            turns(&connections, now, &[0, 1, 2, 3, 4, 5]),
            [500, 1000, 1500, 1500, 2000, 2500]
        );
        // Both are, long since.
        let now = start + 3 * SECOND;
        assert_eq!(turns(&connections, now, &[0, 1, 2, 3]), [3000, 3100, 3200, 4000]);
        connections.spend(now);
        assert_eq!(connections.used.len(), 1);
    }

    #[test]
    fn one_that_has_to_be_opened_serves_its_turn_later_and_is_free_no_later() {
        let (mut connections, start) = (Connections::default(), Instant::now());
        connections.expect(2, SECOND / 2, SECOND);
        connections.spend(start);
        connections.spend(start);
        let turn = |position| connections.turn(position, |_| start) - start;
        assert_eq!([0, 2].map(turn), [SECOND * 3 / 2, SECOND * 3]);
        assert_eq!(connections.apart(), SECOND * 3 / 4);
        assert_eq!(connections.one_is_free(0, start), Err(Some(start + SECOND)));
        assert_eq!(connections.one_is_free(1, start + SECOND), Ok(()));
    }

    #[test]
    fn as_many_as_there_are_allow_the_pace_if_each_has_its_answer_by_then() {
        let mut connections = Connections::default();
        connections.expect(10, Duration::ZERO, SECOND);
        let start = Instant::now();
        let paced = |position| start + SECOND / 10 * u32::try_from(position).unwrap();
        for position in 0..100 {
            assert_eq!(connections.turn(position, paced), paced(position));
        }
        assert_eq!(connections.apart(), SECOND / 10);
    }
}
