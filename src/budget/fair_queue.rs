//! Whose turn it is: a pure structure without a clock.
//!
//! A flight stands in the queue of every client that waits for it, and goes when the first of these places comes up,
//! charged to that client. Clients are served by deficit round robin (Shreedhar and Varghese, 1995) on two levels: callers
//! by weight, and within a caller its names by turns; since every query costs the same, a quantum is a number of flights.
//! Within a client, tasks never seen before go ahead of refreshes, and of these the one whose snapshot is oldest: by arrival
//! alone it would be chance which of many live tasks is refreshed, and some would wait several rounds. Flights that nobody
//! waits for but whose answer is wanted form the background lane, in the same order: it gets what foreground leaves, and at
//! least one turn in ten.
//!
//! When too many wait, whoever has most places gives way, on the same two levels: one caller under many names shall not push
//! the others out. Of equals it is the one served last, also when it left the queue in between (`fair_queue/lately.rs`), and
//! of those not served lately the last to come. By an order that stays, such as of their names, the same would give way for
//! ever; and if it were always the last to come, whoever is served and comes right back would have the place that has just
//! become free, and those turned away would find the queue full for ever. As it is, whoever comes back, however seldom, keeps
//! its place before all who were served since it was.
//!
//! Every step is O(log n), but for giving way, which looks at every name of one caller, for the forecast
//! (`fair_queue/forecast.rs`), which looks at every place once, and for the list of the clients, which people look at.

mod forecast;
mod lately;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use tokio::time::Instant;

use crate::account::{Caller, Client};
use lately::{Lately, ServedAt};

/// A flight, by the number it was given.
pub(super) type Flight = u64;

/// Of so many turns, one is the background's if it has anybody waiting. Chosen, not measured.
const BACKGROUND_SHARE: u32 = 10;

/// Names within a caller are free text: beyond so many waiting at once in an account, the rest share one.
pub(super) const MOST_NAMES: usize = 256;

/// What gave way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shedding {
    /// A flight: it waits no longer.
    Flight(Flight),
    /// One client's place, of a flight that other clients wait for, too.
    Place,
    /// Nothing could.
    Nothing,
}

/// Where a place stands in its client's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Order {
    /// How old its snapshot is: tasks never seen first, then the oldest.
    snapshot: Option<Instant>,
    arrival: u64,
}

/// A position in a round; whoever was served gets a new one, behind all others.
type Turn = u64;

/// A flight's place in the queue of one client.
#[derive(Debug)]
struct Place {
    /// Another than the poll's own once names are many.
    client: Client,
    order: Order,
}

/// Who gives way first: the greatest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    places: usize,
    /// If it was lately.
    served: Option<ServedAt>,
    turn: Turn,
}

#[derive(Debug, Default)]
pub(super) struct FairQueue {
    flights: BTreeMap<Flight, FlightEntry>,
    callers: HashMap<Caller, CallerQueue>,
    /// Callers with places, the one whose turn it is first.
    turns: BTreeMap<Turn, Caller>,
    next_turn: Turn,
    /// Flights that had their turn and need another: before everybody.
    again: BTreeSet<(u64, Flight)>,
    background: BTreeSet<(Order, Flight)>,
    /// Turns of others since the background had one.
    since_background: u32,
    /// Callers with places; the last one gives way first.
    ranks: BTreeMap<Rank, Caller>,
    served_callers: Lately<Caller>,
    served_clients: Lately<Client>,
    names: usize,
    /// Of all callers with places, together.
    weights: u32,
    arrivals: u64,
    /// Flights that wait for a turn.
    waiting: usize,
}

#[derive(Debug)]
struct FlightEntry {
    /// When upstream said what is known of the task.
    snapshot: Option<Instant>,
    /// Its arrival, once it waits for a turn.
    arrival: Option<u64>,
    /// Whether it waits before everybody.
    is_again: bool,
    /// Who waits for it: the client under whose name its place stands, and how many of that client's polls. In an
    /// order, so that the same polls always make the same queue.
    clients: BTreeMap<Client, Waiters>,
    is_kept: bool,
    /// Whose turn it had last: nobody's, if the background's.
    charged: Option<Client>,
}

#[derive(Debug)]
struct Waiters {
    polls: usize,
    weight: u32,
    /// Mostly there is none, and it takes no room.
    place: Option<Box<Place>>,
}

#[derive(Debug)]
struct CallerQueue {
    weight: u32,
    /// Flights that this caller may still send in this round.
    deficit: u32,
    /// Of all its names, together.
    places: usize,
    /// When one of them was served last, if that is remembered.
    served: Option<ServedAt>,
    turn: Turn,
    names: HashMap<Client, NameQueue>,
    turns: BTreeMap<Turn, Client>,
}

#[derive(Debug)]
struct NameQueue {
    served: Option<ServedAt>,
    turn: Turn,
    places: BTreeMap<Order, Flight>,
}

impl CallerQueue {
    fn rank(&self) -> Rank {
        Rank {
            places: self.places,
            served: self.served,
            turn: self.turn,
        }
    }
}

impl NameQueue {
    fn rank(&self) -> Rank {
        Rank {
            places: self.places.len(),
            served: self.served,
            turn: self.turn,
        }
    }
}

impl FlightEntry {
    /// Where it stands in the background, if it waits for a turn.
    fn order(&self) -> Option<Order> {
        let (snapshot, arrival) = (self.snapshot, self.arrival?);
        Some(Order { snapshot, arrival })
    }

    /// Whether it stands in any client's queue.
    fn has_place(&self) -> bool {
        self.clients.values().any(|waiters| waiters.place.is_some())
    }
}

impl FairQueue {
    /// A flight that will wait for turns; of a task that has a `snapshot` since that instant, or of one never seen.
    pub(super) fn open(&mut self, flight: Flight, snapshot: Option<Instant>) {
        let entry = FlightEntry {
            snapshot,
            arrival: None,
            is_again: false,
            clients: BTreeMap::new(),
            is_kept: false,
            charged: None,
        };
        self.flights.insert(flight, entry);
    }

    /// Whether the flight is open.
    pub(super) fn has(&self, flight: Flight) -> bool {
        self.flights.contains_key(&flight)
    }

    /// One more poll of `client` waits for `flight`.
    pub(super) fn join(&mut self, flight: Flight, client: &Client, weight: u32) {
        let Some(entry) = self.flights.get_mut(&flight) else {
            return;
        };
        if let Some(waiters) = entry.clients.get_mut(client) {
            waiters.polls += 1;
            // Else it has given way, and this poll stands anew.
            if waiters.place.is_some() {
                return;
            }
        } else {
            let waiters = Waiters {
                polls: 1,
                weight,
                place: None,
            };
            entry.clients.insert(client.clone(), waiters);
        }
        if let Some(order) = entry.order() {
            self.background.remove(&(order, flight));
            if !entry.is_again {
                self.place(flight, client);
            }
        }
    }

    /// One poll of `client` waits no longer.
    pub(super) fn leave(&mut self, flight: Flight, client: &Client) {
        let Some(entry) = self.flights.get_mut(&flight) else {
            return;
        };
        let Some(waiters) = entry.clients.get_mut(client) else {
            return;
        };
        waiters.polls -= 1;
        if waiters.polls > 0 {
            return;
        }
        let place = entry.clients.remove(client).and_then(|waiters| waiters.place);
        self.unplace(place);
        self.stand(flight);
    }

    /// Whether nobody waits or not: the flight's answer is wanted.
    pub(super) fn keep(&mut self, flight: Flight) {
        if let Some(entry) = self.flights.get_mut(&flight) {
            entry.is_kept = true;
            self.stand(flight);
        }
    }

    /// The flight waits for a turn from now on; `again`: it had one, and goes before everybody.
    pub(super) fn enter(&mut self, flight: Flight, again: bool) {
        self.arrivals += 1;
        let Some(entry) = self.flights.get_mut(&flight) else {
            return;
        };
        if entry.arrival.replace(self.arrivals).is_none() {
            self.waiting += 1;
        }
        entry.is_again = again;
        if again {
            self.again.insert((self.arrivals, flight));
            return;
        }
        self.stand(flight);
    }

    /// Where nobody waits, a flight that would has its turn at once, as if it had entered: false, and nothing is done, where
    /// somebody does, or it is nobody's.
    pub(super) fn passes(&mut self, flight: Flight) -> bool {
        if self.waiting > 0 {
            return false;
        }
        let Some(entry) = self.flights.get_mut(&flight) else {
            return false;
        };
        let Some(client) = entry.clients.keys().next() else {
            return false;
        };
        entry.charged = Some(client.clone());
        self.since_background = 0;
        true
    }

    /// The next flight in turn; it waits no longer, until it enters again.
    pub(super) fn pop(&mut self) -> Option<Flight> {
        let flight = self.next()?;
        self.withdraw(flight);
        Some(flight)
    }

    /// The flight is over.
    pub(super) fn close(&mut self, flight: Flight) {
        self.withdraw(flight);
        self.flights.remove(&flight);
    }

    /// Makes one flight give way: the background's youngest, else the youngest place of the caller with most places, under
    /// the name that has most of them.
    pub(super) fn shed(&mut self) -> Shedding {
        if let Some((_, flight)) = self.background.last().copied() {
            self.withdraw(flight);
            return Shedding::Flight(flight);
        }
        let Some((flight, place)) = self.first_to_give_way() else {
            return Shedding::Nothing;
        };
        self.unplace(Some(place));
        if self.flights.get(&flight).is_some_and(FlightEntry::has_place) {
            return Shedding::Place;
        }
        self.withdraw(flight);
        Shedding::Flight(flight)
    }

    fn first_to_give_way(&mut self) -> Option<(Flight, Box<Place>)> {
        let (_, caller) = self.ranks.last_key_value()?;
        let names = self.callers.get(caller)?.names.values();
        let (order, flight) = names.max_by_key(|name| name.rank())?.places.last_key_value()?;
        let clients = &mut self.flights.get_mut(flight)?.clients;
        let stands = |waiters: &&mut Waiters| waiters.place.as_ref().is_some_and(|place| place.order == *order);
        let place = clients.values_mut().find(stands)?.place.take()?;
        Some((*flight, place))
    }

    /// Flights that wait for a turn.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Flights that wait and that nobody waits for.
    pub(super) fn background(&self) -> usize {
        self.background.len()
    }

    /// The client whose turn the flight had, and has its second attempts from; `None` if it was the background's.
    pub(super) fn charged(&self, flight: Flight) -> Option<&Client> {
        self.flights.get(&flight)?.charged.as_ref()
    }

    /// The sum of the weights of the callers that wait, in tenths, of which the background has one: those with places, and
    /// those of flights that were `called` forward.
    pub(super) fn weight(&self, called: impl Iterator<Item = Flight>) -> u32 {
        let mut others = BTreeMap::new();
        for entry in called.filter_map(|flight| self.flights.get(&flight)) {
            if let Some(client) = &entry.charged
                && !self.callers.contains_key(&client.caller)
            {
                let weight = entry.clients.get(client).map_or(1, |waiters| waiters.weight.max(1));
                others.insert(&client.caller, weight);
            }
        }
        let others: u32 = others.values().sum();
        self.weights.saturating_add(others).saturating_mul(10).max(1)
    }

    /// Clients and how many flights of each wait, in the queue or `called` forward, most first; and how many wait on nobody's
    /// behalf.
    pub(super) fn places(&self, called: impl Iterator<Item = Flight>) -> (Vec<(&Client, usize)>, usize) {
        let names = self.callers.values().flat_map(|caller| &caller.names);
        let mut places: BTreeMap<_, _> = names.map(|(client, name)| (client, name.places.len())).collect();
        let mut nobodys = self.background();
        // They have no place in any client's queue.
        let ahead = called.chain(self.again.iter().map(|(_, flight)| *flight));
        for entry in ahead.filter_map(|flight| self.flights.get(&flight)) {
            nobodys += usize::from(entry.clients.is_empty());
            for client in entry.clients.keys() {
                *places.entry(client).or_default() += 1;
            }
        }
        let mut places: Vec<_> = places.into_iter().collect();
        places.sort_unstable_by_key(|(client, places)| Reverse((*places, *client)));
        (places, nobodys)
    }

    fn next(&mut self) -> Option<Flight> {
        if let Some((_, flight)) = self.again.first() {
            return Some(*flight);
        }
        let background = self.background.first().map(|(_, flight)| *flight);
        let is_backgrounds_turn = self.turns.is_empty() || self.since_background + 1 >= BACKGROUND_SHARE;
        if let Some(flight) = background.filter(|_| is_backgrounds_turn) {
            self.since_background = 0;
            return Some(flight);
        }
        self.since_background = if background.is_some() {
            self.since_background + 1
        } else {
            0
        };
        let (_, caller) = self.turns.first_key_value()?;
        let queue = self.callers.get_mut(caller)?;
        if queue.deficit == 0 {
            queue.deficit = queue.weight;
        }
        queue.deficit -= 1;
        let caller = self.ranks.remove(&queue.rank())?;
        queue.served = Some(self.served_callers.serve(&caller));
        if queue.deficit == 0 {
            self.next_turn += 1;
            let (_, caller) = self.turns.pop_first()?;
            queue.turn = self.next_turn;
            self.turns.insert(queue.turn, caller);
        }
        self.ranks.insert(queue.rank(), caller);
        self.next_turn += 1;
        let (_, name) = queue.turns.pop_first()?;
        let served = queue.names.get_mut(&name)?;
        served.served = Some(self.served_clients.serve(&name));
        served.turn = self.next_turn;
        let (_, flight) = served.places.first_key_value()?;
        self.flights.get_mut(flight)?.charged = Some(name.clone());
        queue.turns.insert(served.turn, name);
        Some(*flight)
    }

    /// Takes a flight out of every queue.
    pub(super) fn withdraw(&mut self, flight: Flight) {
        let Some(entry) = self.flights.get_mut(&flight) else {
            return;
        };
        let Some(order) = entry.order() else { return };
        entry.arrival = None;
        let places: Vec<_> = entry.clients.values_mut().map(|waiters| waiters.place.take()).collect();
        for place in places {
            self.unplace(place);
        }
        self.background.remove(&(order, flight));
        self.again.remove(&(order.arrival, flight));
        self.waiting -= 1;
    }

    /// Sees to it that a waiting flight stands somewhere: in the queue of everybody who waits for it, also of those who have
    /// given way where others had a place; where nobody waits, in the background if it is to be kept.
    fn stand(&mut self, flight: Flight) {
        let Some(entry) = self.flights.get(&flight) else {
            return;
        };
        let Some(order) = entry.order() else { return };
        if entry.is_again || entry.has_place() {
            return;
        }
        if entry.clients.is_empty() && entry.is_kept {
            self.background.insert((order, flight));
        }
        let clients: Vec<_> = entry.clients.keys().cloned().collect();
        for client in clients {
            self.place(flight, &client);
        }
    }

    fn place(&mut self, flight: Flight, client: &Client) {
        let Some(entry) = self.flights.get_mut(&flight) else {
            return;
        };
        let Some(waiters) = entry.clients.get_mut(client) else {
            return;
        };
        self.arrivals += 1;
        let order = Order {
            snapshot: entry.snapshot,
            arrival: self.arrivals,
        };
        let queue = self.callers.entry(client.caller.clone()).or_insert_with(|| {
            self.next_turn += 1;
            self.turns.insert(self.next_turn, client.caller.clone());
            CallerQueue {
                weight: 1,
                deficit: 0,
                places: 0,
                served: self.served_callers.last(&client.caller),
                turn: self.next_turn,
                names: HashMap::new(),
                turns: BTreeMap::new(),
            }
        });
        let weight = waiters.weight.max(1);
        let before = if queue.names.is_empty() { 0 } else { queue.weight };
        self.weights = self.weights - before + weight;
        queue.weight = weight;
        let is_known = queue.names.contains_key(client);
        let client = if is_known || self.names < MOST_NAMES {
            client.clone()
        } else {
            client.nameless()
        };
        let name = queue.names.entry(client.clone()).or_insert_with(|| {
            self.next_turn += 1;
            queue.turns.insert(self.next_turn, client.clone());
            self.names += 1;
            NameQueue {
                served: self.served_clients.last(&client),
                turn: self.next_turn,
                places: BTreeMap::new(),
            }
        });
        name.places.insert(order, flight);
        let caller = self.ranks.remove(&queue.rank());
        queue.places += 1;
        let caller = caller.unwrap_or_else(|| client.caller.clone());
        self.ranks.insert(queue.rank(), caller);
        waiters.place = Some(Box::new(Place { client, order }));
    }

    fn unplace(&mut self, place: Option<Box<Place>>) {
        let Some(place) = place else { return };
        let Place { client, order } = *place;
        let Some(queue) = self.callers.get_mut(&client.caller) else {
            return;
        };
        let Some(name) = queue.names.get_mut(&client) else {
            return;
        };
        name.places.remove(&order);
        if name.places.is_empty() {
            queue.turns.remove(&name.turn);
            queue.names.remove(&client);
            self.names -= 1;
        }
        let caller = self.ranks.remove(&queue.rank());
        queue.places -= 1;
        if let Some(caller) = caller.filter(|_| queue.places > 0) {
            self.ranks.insert(queue.rank(), caller);
        } else {
            self.turns.remove(&queue.turn);
            self.weights -= queue.weight;
            self.callers.remove(&client.caller);
        }
    }
}

#[cfg(test)]
mod tests;
