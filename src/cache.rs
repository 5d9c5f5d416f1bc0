//! The answers that are kept, by account and task.
//!
//! moka evicts by LRU (under `TinyLFU` a task that just ended would not get in) and by weight in bytes. Freshness is the
//! stored value's own business, since moka's clock is not ours. This module adds what moka has not: a state only moves
//! forward, not-found answers live apart so that random ids push nothing out, and one account may hold at most half while
//! others need room. It knows nothing of budgets or flights.

mod shares;

use std::hash::RandomState;
use std::sync::Arc;
use std::time::Duration;

use equivalent::Equivalent;
use moka::Expiry;
use moka::notification::RemovalCause;
use moka::ops::compute::{CompResult, Op};
use moka::policy::EvictionPolicy;
use tokio::time::Instant;

use crate::account::AccountId;
use crate::metrics::{Eviction, Metrics};
use crate::stored::Answer;
use crate::task::{Class, TaskId};
use shares::Shares;

/// What an entry costs beside its body and id, in bytes: the answer, a Content-Type, moka's nodes and our own, and the
/// allocator's rounding. 660 to 675 were measured at one to three million entries (`an_entry_weighs_what_it_takes`),
/// rounded up because tables double.
const OVERHEAD: usize = 750;

/// Not-found answers together, in bytes.
const NOT_FOUND_BYTES: u64 = 8 << 20;

/// How many answers that were read one put spares at most, so that it takes no time worth speaking of.
const MOST_SPARED: usize = 32;

type Key = (AccountId, TaskId);

/// A [`Key`], to look it up by without a copy.
#[derive(Hash)]
struct Place<'a>(AccountId, &'a str);

impl Equivalent<Key> for Place<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        self.0 == key.0 && *self.1 == *key.1.as_str()
    }
}

type Map = moka::sync::Cache<Key, Arc<Answer>, RandomState>;

/// The answers that are kept.
#[derive(Debug)]
pub struct Cache {
    tasks: Map,
    not_found: Map,
    shares: Arc<Shares>,
    max_bytes: u64,
    metrics: Arc<Metrics>,
}

impl Cache {
    /// An empty cache that may weigh `max_bytes`.
    pub fn new(max_bytes: u64, metrics: Arc<Metrics>) -> Self {
        let shares = Arc::new(Shares::new(max_bytes));
        let builder = |most: u64| {
            moka::sync::Cache::builder()
                .max_capacity(most)
                .weigher(|key: &Key, answer: &Arc<Answer>| weight(key, answer))
                .eviction_policy(EvictionPolicy::lru())
                .expire_after(KeepsFor)
        };
        let listener = {
            let (shares, metrics) = (Arc::clone(&shares), Arc::clone(&metrics));
            move |key: Arc<Key>, answer: Arc<Answer>, cause: RemovalCause| {
                shares.remove(key.0, &answer, weight(&key, &answer));
                match cause {
                    RemovalCause::Size => metrics.evicted(Eviction::Size),
                    RemovalCause::Expired => metrics.evicted(Eviction::Expired),
                    // `make_room` counts its own.
                    RemovalCause::Replaced | RemovalCause::Explicit => {}
                }
            }
        };
        Self {
            tasks: builder(max_bytes)
                .eviction_listener(listener)
                .build_with_hasher(RandomState::new()),
            not_found: builder(NOT_FOUND_BYTES.min(max_bytes)).build_with_hasher(RandomState::new()),
            shares,
            max_bytes,
            metrics,
        }
    }

    /// What is kept for a task at `now`, fresh or stale: of a state and a not-found answer the one that counts. `live` is
    /// the freshness lifetime of live answers.
    pub fn get(&self, account: AccountId, task: &TaskId, now: Instant, live: Duration) -> Option<Arc<Answer>> {
        let task = task.as_str();
        let state = self.state(account, task, now);
        if state.as_ref().is_some_and(|state| state.is_fresh(now, live)) {
            return state;
        }
        let since = state.as_ref().map(|state| state.asked);
        let not_found = self
            .not_found
            .get(&Place(account, task))
            .filter(|answer| answer.is_fresh(now, live) && since.is_none_or(|since| answer.asked >= since));
        not_found.or(state)
    }

    /// The state that is kept for a task at `now`, fresh or stale, for somebody who reads it.
    pub fn state(&self, account: AccountId, task: &str, now: Instant) -> Option<Arc<Answer>> {
        let place = Place(account, task);
        let state = self.tasks.get(&place).filter(|answer| answer.is_kept(now))?;
        state.note_read();
        Some(state)
    }

    /// The state that is kept for a task at `now`, fresh or stale.
    pub fn snapshot(&self, account: AccountId, task: &TaskId, now: Instant) -> Option<Arc<Answer>> {
        let place = Place(account, task.as_str());
        self.tasks.get(&place).filter(|answer| answer.is_kept(now))
    }

    /// Keeps an answer that says for how long; not if what is kept tells of a later state, or it alone would take more
    /// than an account's share.
    pub fn put(&self, account: AccountId, task: &TaskId, answer: &Arc<Answer>, now: Instant) {
        let key = (account, task.clone());
        if answer.keeping.is_none() {
            return;
        }
        if answer.reading.class == Class::NotFound {
            self.not_found.insert(key, Arc::clone(answer));
            return;
        }
        let weight = weight(&key, answer);
        if u64::from(weight) > self.max_bytes / 2 {
            return;
        }
        self.make_room(account, weight);
        self.shares.add(account, task, answer, weight);
        let put = self.tasks.entry(key.clone()).and_compute_with(|kept| match kept {
            Some(kept) if kept.value().is_kept(now) && !answer.replaces(kept.value()) => Op::Nop,
            Some(_) | None => Op::Put(Arc::clone(answer)),
        });
        if matches!(put, CompResult::Unchanged(_) | CompResult::StillNone(_)) {
            self.shares.remove(account, answer, weight);
        }
        self.not_found.invalidate(&key);
    }

    /// Whether any state of the account's tasks is kept.
    pub fn holds_any(&self, account: AccountId) -> bool {
        self.shares.holds(account)
    }

    /// Lets moka do what it has put off, and shows how much is kept.
    pub fn maintain(&self) {
        self.tasks.run_pending_tasks();
        self.not_found.run_pending_tasks();
        let entries = self.tasks.entry_count() + self.not_found.entry_count();
        let bytes = self.tasks.weighted_size() + self.not_found.weighted_size();
        self.metrics
            .cache_entries
            .set(i64::try_from(entries).unwrap_or(i64::MAX));
        self.metrics.cache_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Before moka evicts whatever was used longest ago: the account that holds more than half gives up its own.
    fn make_room(&self, account: AccountId, weight: u32) {
        let (mut spared, mut unsettled) = (0, 0);
        while unsettled < 8
            && let Some(key) = self.shares.candidate(account, weight)
        {
            match self.tasks.get(&key) {
                Some(answer) if spared < MOST_SPARED && answer.take_read() => {
                    self.shares.spare(key.0, &answer);
                    spared += 1;
                }
                Some(_) if self.tasks.remove(&key).is_some() => {
                    let for_itself = key.0 == account;
                    let cause = if for_itself {
                        Eviction::Size
                    } else {
                        Eviction::AccountShare
                    };
                    self.metrics.evicted(cause);
                }
                // Expired, and moka has not told yet; or another thread is just putting or evicting it.
                Some(_) | None => {
                    self.tasks.run_pending_tasks();
                    unsettled += 1;
                }
            }
        }
    }
}

/// An entry's weight in bytes.
fn weight(key: &Key, answer: &Answer) -> u32 {
    let bytes = OVERHEAD + key.1.as_str().len() + answer.body.len();
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// moka forgets an answer when it is kept no longer.
struct KeepsFor;

#[allow(clippy::disallowed_types, reason = "moka's own clock; nothing here reads it")]
type StdInstant = std::time::Instant;

impl Expiry<Key, Arc<Answer>> for KeepsFor {
    fn expire_after_create(&self, _: &Key, answer: &Arc<Answer>, _: StdInstant) -> Option<Duration> {
        keeps_for(answer)
    }

    fn expire_after_update(
        &self,
        _: &Key,
        answer: &Arc<Answer>,
        _: StdInstant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        keeps_for(answer)
    }
}

/// How long it is kept yet: it may have been read from elsewhere, days old.
fn keeps_for(answer: &Answer) -> Option<Duration> {
    let age = answer.age(Instant::now());
    answer.keeping.map(|keeping| keeping.keep.saturating_sub(age))
}

#[cfg(test)]
mod tests;
