//! How much of the cache each account holds, and which of its answers go first when it holds too much.
//!
//! An account's answers stand in the order in which they were kept; one that was read since it was last looked at is
//! spared once (CLOCK), which comes close to LRU and leaves reads alone. Each answer carries its place in that order, so
//! that it leaves the order when it leaves the cache, for whatever reason.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::account::AccountId;
use crate::stored::Answer;
use crate::task::TaskId;

#[derive(Debug)]
pub(super) struct Shares {
    max_bytes: u64,
    holdings: Mutex<Holdings>,
}

#[derive(Debug, Default)]
struct Holdings {
    bytes: u64,
    by_account: HashMap<AccountId, Holding>,
    /// The last account that was seen to hold more than half: there can be but one.
    largest: Option<AccountId>,
    next_place: u64,
}

#[derive(Debug, Default)]
struct Holding {
    bytes: u64,
    order: BTreeMap<u64, TaskId>,
}

impl Shares {
    pub(super) fn new(max_bytes: u64) -> Self {
        Self {
            max_bytes,
            holdings: Mutex::default(),
        }
    }

    /// Counts an answer that is about to be put, and gives it its place.
    pub(super) fn add(&self, account: AccountId, task: &TaskId, answer: &Answer, weight: u32) {
        let mut holdings = self.holdings();
        holdings.bytes += u64::from(weight);
        let place = holdings.place();
        answer.set_place(place);
        let holding = holdings.by_account.entry(account).or_default();
        holding.bytes += u64::from(weight);
        holding.order.insert(place, task.clone());
        if holding.bytes > self.max_bytes / 2 {
            holdings.largest = Some(account);
        }
    }

    /// Counts an answer no longer: it was replaced, is gone, or was not put after all.
    pub(super) fn remove(&self, account: AccountId, answer: &Answer, weight: u32) {
        let mut holdings = self.holdings();
        let Some(holding) = holdings.by_account.get_mut(&account) else {
            return;
        };
        if holding.order.remove(&answer.place()).is_none() {
            return;
        }
        holding.bytes -= u64::from(weight);
        if holding.order.is_empty() {
            holdings.by_account.remove(&account);
        }
        holdings.bytes -= u64::from(weight);
    }

    /// Whether an account holds anything.
    pub(super) fn holds(&self, account: AccountId) -> bool {
        self.holdings().by_account.contains_key(&account)
    }

    /// While an answer of `weight` for `account` would overfill the cache and somebody holds more than half: the answer
    /// of theirs to evict or to spare.
    pub(super) fn candidate(&self, account: AccountId, weight: u32) -> Option<(AccountId, TaskId)> {
        let weight = u64::from(weight);
        let half = self.max_bytes / 2;
        let mut holdings = self.holdings();
        if holdings.bytes + weight <= self.max_bytes {
            return None;
        }
        if holdings.held_by(account) + weight > half {
            return holdings.first_of(account);
        }
        let largest = holdings.largest?;
        if holdings.held_by(largest) <= half {
            holdings.largest = None;
            return None;
        }
        holdings.first_of(largest)
    }

    /// Puts an answer that was looked at behind all others of its account.
    pub(super) fn spare(&self, account: AccountId, answer: &Answer) {
        let mut holdings = self.holdings();
        let place = holdings.place();
        if let Some(holding) = holdings.by_account.get_mut(&account)
            && let Some(task) = holding.order.remove(&answer.place())
        {
            answer.set_place(place);
            holding.order.insert(place, task);
        }
    }

    /// What all accounts hold, in bytes.
    #[cfg(test)]
    pub(super) fn held(&self) -> u64 {
        self.holdings().bytes
    }

    /// What an account holds, in bytes, and of which tasks.
    #[cfg(test)]
    pub(super) fn held_by(&self, account: AccountId) -> (u64, Vec<TaskId>) {
        let holdings = self.holdings();
        let Some(holding) = holdings.by_account.get(&account) else {
            return (0, Vec::new());
        };
        let mut tasks: Vec<_> = holding.order.values().cloned().collect();
        tasks.sort_unstable();
        (holding.bytes, tasks)
    }

    fn holdings(&self) -> MutexGuard<'_, Holdings> {
        self.holdings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Holdings {
    fn place(&mut self) -> u64 {
        self.next_place += 1;
        self.next_place
    }

    fn held_by(&self, account: AccountId) -> u64 {
        self.by_account.get(&account).map_or(0, |holding| holding.bytes)
    }

    fn first_of(&self, account: AccountId) -> Option<(AccountId, TaskId)> {
        let (_, task) = self.by_account.get(&account)?.order.first_key_value()?;
        Some((account, task.clone()))
    }
}
