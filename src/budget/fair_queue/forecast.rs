//! The order in which the flights that wait would have their turns if nobody came or left: what admission knows a wait
//! from. A replay of the queue's own rules on a copy of its clients; their places are only looked at.

use std::collections::{HashSet, VecDeque, btree_map, btree_set};
use std::iter::Peekable;

use super::{BACKGROUND_SHARE, FairQueue, Flight, Order};

/// The flights that wait, in the order of their turns. Each step is O(1), but for places of flights that went before.
#[derive(Debug)]
pub(in crate::budget) struct Forecast<'a> {
    again: btree_set::Iter<'a, (u64, Flight)>,
    background: Peekable<btree_set::Iter<'a, (Order, Flight)>>,
    since_background: u32,
    /// The one whose turn it is first.
    callers: VecDeque<Caller<'a>>,
    /// Flights that went: they may have places left under other clients.
    gone: HashSet<Flight>,
}

#[derive(Debug)]
struct Caller<'a> {
    weight: u32,
    deficit: u32,
    names: VecDeque<btree_map::Values<'a, Order, Flight>>,
}

impl FairQueue {
    /// The flights that wait, in the order of their turns if nobody came or left.
    pub(in crate::budget) fn forecast(&self) -> Forecast<'_> {
        let callers = self.turns.values().filter_map(|caller| {
            let queue = self.callers.get(caller)?;
            let names = queue.turns.values().filter_map(|name| queue.names.get(name));
            Some(Caller {
                weight: queue.weight,
                deficit: queue.deficit,
                names: names.map(|name| name.places.values()).collect(),
            })
        });
        Forecast {
            again: self.again.iter(),
            background: self.background.iter().peekable(),
            since_background: self.since_background,
            callers: callers.collect(),
            gone: HashSet::new(),
        }
    }
}

impl Iterator for Forecast<'_> {
    type Item = Flight;

    fn next(&mut self) -> Option<Flight> {
        let flight = self.next_in_turn()?;
        self.gone.insert(flight);
        Some(flight)
    }
}

impl Forecast<'_> {
    /// As [`FairQueue::next`] decides.
    fn next_in_turn(&mut self) -> Option<Flight> {
        if let Some((_, flight)) = self.again.next() {
            return Some(*flight);
        }
        let foreground = self.first_place();
        let has_background = self.background.peek().is_some();
        if has_background && (foreground.is_none() || self.since_background + 1 >= BACKGROUND_SHARE) {
            self.since_background = 0;
            return self.background.next().map(|(_, flight)| *flight);
        }
        self.since_background = if has_background { self.since_background + 1 } else { 0 };
        let flight = foreground?;
        let caller = self.callers.front_mut()?;
        caller.names.rotate_left(1);
        if caller.deficit == 0 {
            caller.deficit = caller.weight;
        }
        caller.deficit -= 1;
        if caller.deficit == 0 {
            self.callers.rotate_left(1);
        }
        Some(flight)
    }

    /// The flight whose place comes up first, of those that have not gone; the caller and the name that it stands under
    /// are the first. Whoever has no such place leaves the round.
    fn first_place(&mut self) -> Option<Flight> {
        while let Some(caller) = self.callers.front_mut() {
            while let Some(places) = caller.names.front_mut() {
                while let Some(flight) = places.clone().next() {
                    if !self.gone.contains(flight) {
                        return Some(*flight);
                    }
                    places.next();
                }
                caller.names.pop_front();
            }
            self.callers.pop_front();
        }
        None
    }
}
