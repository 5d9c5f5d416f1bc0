//! How much of the cache each account holds, and which of its answers go first when it holds too much.
//!
//! An account's answers stand in the order in which they were kept; one that was read since it was last looked at is
//! spared once (CLOCK), which comes close to LRU and leaves reads alone. Each answer carries its place in that order,
//! so that it leaves the order when it leaves the cache, for whatever reason. All orders lie in one table of 20 bytes
//! an answer, which is also what is looked through for answers that are kept no longer: no read is disturbed by that,
//! and no clock other than ours says when.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::account::AccountId;
use crate::stored::Block;

use super::Key;

/// No place.
const NONE: u32 = u32::MAX;

#[derive(Debug)]
pub(super) struct Shares {
    max_bytes: u64,
    holdings: Mutex<Holdings>,
}

#[derive(Debug)]
struct Holdings {
    bytes: u64,
    /// By the half of the account's id that answers carry.
    by_account: HashMap<u64, Holding>,
    /// The last account that was seen to hold more than half: there can be but one.
    largest: Option<u64>,
    places: Vec<Place>,
    /// The first of those that nobody has; each leads to the next.
    vacant: u32,
    /// Where the search for what is kept no longer goes on.
    searched: usize,
}

#[derive(Debug)]
struct Holding {
    bytes: u64,
    first: u32,
    last: u32,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    /// A [`Key`], in parts that need no more alignment than the rest.
    key: [u8; 8],
    before: u32,
    after: u32,
    /// When the answer is kept no longer, in seconds; never, where nobody stands.
    until: u32,
}

impl Shares {
    pub(super) fn new(max_bytes: u64) -> Self {
        Self {
            max_bytes,
            holdings: Mutex::new(Holdings {
                bytes: 0,
                by_account: HashMap::new(),
                largest: None,
                places: Vec::new(),
                vacant: NONE,
                searched: 0,
            }),
        }
    }

    /// Counts an answer that is about to be put, and gives it its place. It is kept until the second `until`.
    pub(super) fn add(&self, key: Key, answer: &Block, weight: u32, until: u32) {
        let mut holdings = self.holdings.lock();
        let Some(place) = holdings.occupy(key, until) else {
            // Four billion answers, and none of them in order.
            return;
        };
        holdings.bytes += u64::from(weight);
        answer.set_place(place);
        holdings.append(answer.account(), place);
        let half = self.max_bytes / 2;
        if let Some(holding) = holdings.by_account.get_mut(&answer.account()) {
            holding.bytes += u64::from(weight);
            if holding.bytes > half {
                holdings.largest = Some(answer.account());
            }
        }
    }

    /// Counts an answer no longer: it was replaced, is gone, or was not put after all.
    pub(super) fn remove(&self, answer: &Block, weight: u32) {
        let mut holdings = self.holdings.lock();
        let Some(place) = answer.take_place() else {
            return;
        };
        holdings.unlink(answer.account(), place);
        holdings.vacate(place);
        holdings.bytes -= u64::from(weight);
        if let Some(holding) = holdings.by_account.get_mut(&answer.account()) {
            holding.bytes -= u64::from(weight);
            if holding.first == NONE {
                holdings.by_account.remove(&answer.account());
            }
        }
    }

    /// Whether an account holds anything.
    pub(super) fn holds(&self, account: AccountId) -> bool {
        self.holdings.lock().by_account.contains_key(&account.half())
    }

    /// While an answer of `weight` for `account` would overfill the cache and somebody holds more than half: the answer
    /// of theirs to evict or to spare, and whether they are that account.
    pub(super) fn candidate(&self, account: AccountId, weight: u32) -> Option<(Key, bool)> {
        let (account, weight) = (account.half(), u64::from(weight));
        let half = self.max_bytes / 2;
        let mut holdings = self.holdings.lock();
        if holdings.bytes + weight <= self.max_bytes {
            return None;
        }
        if holdings.held_by(account) + weight > half {
            return Some((holdings.first_of(account)?, true));
        }
        let largest = holdings.largest?;
        if holdings.held_by(largest) <= half {
            holdings.largest = None;
            return None;
        }
        Some((holdings.first_of(largest)?, false))
    }

    /// Puts an answer that was looked at behind all others of its account.
    pub(super) fn spare(&self, answer: &Block) {
        let mut holdings = self.holdings.lock();
        if let Some(place) = answer.place() {
            holdings.unlink(answer.account(), place);
            holdings.append(answer.account(), place);
        }
    }

    /// Looks at the next `most` places: which answers are kept no longer in the second `now`.
    pub(super) fn ended(&self, now: u32, most: usize) -> Vec<Key> {
        let mut holdings = self.holdings.lock();
        let from = holdings.searched;
        let looked_at = holdings.places.iter().skip(from).take(most);
        let ended = looked_at.filter(|place| place.until <= now).map(Place::key);
        let ended = ended.collect();
        let next = from + most;
        holdings.searched = if next < holdings.places.len() { next } else { 0 };
        ended
    }

    /// What all accounts hold, in bytes.
    #[cfg(test)]
    pub(super) fn held(&self) -> u64 {
        self.holdings.lock().bytes
    }

    /// What an account holds, in bytes, and under which keys, in order.
    #[cfg(test)]
    pub(super) fn held_by(&self, account: AccountId) -> (u64, Vec<Key>) {
        let holdings = self.holdings.lock();
        let Some(holding) = holdings.by_account.get(&account.half()) else {
            return (0, Vec::new());
        };
        let next = |at: &u32| holdings.places.get(*at as usize).map(|place| place.after);
        let all = std::iter::successors(Some(holding.first), next).filter_map(|at| holdings.places.get(at as usize));
        (holding.bytes, all.map(Place::key).collect())
    }
}

impl Holdings {
    fn held_by(&self, account: u64) -> u64 {
        self.by_account.get(&account).map_or(0, |holding| holding.bytes)
    }

    fn first_of(&self, account: u64) -> Option<Key> {
        let first = self.by_account.get(&account)?.first;
        self.places.get(first as usize).map(Place::key)
    }

    /// A place that nobody has.
    fn occupy(&mut self, key: Key, until: u32) -> Option<u32> {
        let place = Place::new(key, until);
        if let Some(vacant) = self.places.get_mut(self.vacant as usize) {
            let at = self.vacant;
            self.vacant = vacant.after;
            *vacant = place;
            return Some(at);
        }
        let at = u32::try_from(self.places.len()).ok().filter(|at| *at != NONE)?;
        self.places.push(place);
        Some(at)
    }

    fn vacate(&mut self, at: u32) {
        let next = self.vacant;
        if let Some(place) = self.at(at) {
            (place.until, place.after) = (NONE, next);
            self.vacant = at;
        }
    }

    /// Puts a place behind all others of an account.
    fn append(&mut self, account: u64, at: u32) {
        let holding = self.by_account.entry(account).or_insert(Holding {
            bytes: 0,
            first: NONE,
            last: NONE,
        });
        let before = std::mem::replace(&mut holding.last, at);
        if before == NONE {
            holding.first = at;
        }
        if let Some(place) = self.at(before) {
            place.after = at;
        }
        if let Some(place) = self.at(at) {
            (place.before, place.after) = (before, NONE);
        }
    }

    /// Takes a place from between its neighbours.
    fn unlink(&mut self, account: u64, at: u32) {
        let Some(Place { before, after, .. }) = self.at(at).copied() else {
            return;
        };
        if let Some(place) = self.at(before) {
            place.after = after;
        } else if let Some(holding) = self.by_account.get_mut(&account) {
            holding.first = after;
        }
        if let Some(place) = self.at(after) {
            place.before = before;
        } else if let Some(holding) = self.by_account.get_mut(&account) {
            holding.last = before;
        }
    }

    /// None for no place.
    fn at(&mut self, at: u32) -> Option<&mut Place> {
        self.places.get_mut(at as usize)
    }
}

impl Place {
    fn new(Key(key): Key, until: u32) -> Self {
        Self {
            key: key.to_ne_bytes(),
            before: NONE,
            after: NONE,
            until,
        }
    }

    fn key(&self) -> Key {
        Key(u64::from_ne_bytes(self.key))
    }
}
