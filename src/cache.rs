//! The answers that are kept, by account and task.
//!
//! moka evicts by LRU (under `TinyLFU` a task that just ended would not get in) and by weight in bytes. Freshness is
//! the stored value's own business, since moka's clock is not ours. This module adds what moka has not: a late answer
//! takes nothing back, not-found answers live apart so that random ids push nothing out, and one account may hold at
//! most half while others need room. It knows nothing of budgets or flights.
//!
//! What an answer of 2,050 bytes takes at a million of them, id and body included, is 2,440 bytes of resident memory
//! (`an_entry_weighs_what_it_takes`). Beside the body: moka's nodes 256 (bucket, value, entry, deque), its table 17 to
//! 34, the key 32, a `Shares` place 20, and 62 of the answer's own, in one piece with its body. It was 2,760 with the
//! key spelt out, an answer and its body apart, a tree of places, and moka's `Expiry`, whose node takes 48.
//!
//! Once an eighth of its room is taken the cache keeps bodies packed (`stored/packed.rs`), so that it holds half as
//! many again to twice as many; a hit of one takes a twentieth longer. Below that there is memory to spare. Only the
//! cache packs: whoever waited for an answer gets it as it came.

mod shares;

use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use moka::Expiry;
use moka::notification::RemovalCause;
use moka::policy::EvictionPolicy;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::account::AccountId;
use crate::metrics::{Eviction, Metrics};
use crate::stored::{Answer, Block};
use crate::task::{Class, TaskId};
use shares::Shares;

/// What an entry costs beside its answer, in bytes: moka's nodes, its key, a place in [`Shares`], and the allocator's
/// rounding (`an_entry_weighs_what_it_takes`).
const OVERHEAD: usize = 365;

/// Not-found answers together, in bytes.
const NOT_FOUND_BYTES: u64 = 8 << 20;

/// Nothing is packed while less than one such part of `max_bytes` is taken.
const ROOMY: u64 = 8;

/// How many answers that were read one put spares at most, so that it takes no time worth speaking of.
const MOST_SPARED: usize = 32;

/// How often one put looks again where another thread is just putting or evicting what it would give up. Then it goes
/// on, and moka evicts whatever was used longest ago. Chosen, not measured.
const MOST_UNSETTLED: usize = 8;

/// How many places are looked through at once for answers that are kept no longer: ten minutes for a million, at one
/// look in five seconds, and none takes more than a few milliseconds.
const MOST_SEARCHED: usize = 1 << 13;

/// What an answer is kept under: a hash of account and task with a key drawn at random. Should two ever have the same,
/// the later takes the place of the earlier; neither is served for the other, since each answer tells whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key(u64);

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0);
    }
}

/// A [`Key`] is one already.
#[derive(Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

type Map = moka::sync::Cache<Key, Block, BuildHasherDefault<Hashed>>;

/// The answers that are kept.
#[derive(Debug)]
pub struct Cache {
    tasks: Map,
    not_found: Map,
    /// Mostly none is kept, and then nobody looks.
    may_hold_not_found: AtomicBool,
    /// How often an answer was put here.
    puts: AtomicU64,
    keys: RandomState,
    /// Whoever holds it is the only one to put a state because of what is kept, or to give it back: moka's own way to
    /// do that (`and_compute_with`) costs as much again as all else that a put does. It is held while an answer is
    /// copied and packed: for 2 µs if that is of 2 KiB, for some ms if it is of 16 MiB (which are only copied).
    changing: Mutex<()>,
    /// Seconds of [`Shares`] count from here.
    start: Instant,
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
                .weigher(|_: &Key, answer: &Block| weight(answer))
                .eviction_policy(EvictionPolicy::lru())
        };
        let listener = {
            let (shares, metrics) = (Arc::clone(&shares), Arc::clone(&metrics));
            move |_: Arc<Key>, answer: Block, cause: RemovalCause| {
                shares.remove(&answer, weight(&answer));
                match cause {
                    RemovalCause::Size => metrics.evicted(Eviction::Size),
                    // `make_room` and `give_back` count their own.
                    RemovalCause::Expired | RemovalCause::Replaced | RemovalCause::Explicit => {}
                }
            }
        };
        Self {
            tasks: builder(max_bytes)
                .eviction_listener(listener)
                .build_with_hasher(BuildHasherDefault::default()),
            not_found: builder(most_not_found(max_bytes))
                .expire_after(KeepsFor)
                .build_with_hasher(BuildHasherDefault::default()),
            may_hold_not_found: AtomicBool::new(false),
            puts: AtomicU64::new(0),
            keys: RandomState::new(),
            changing: Mutex::default(),
            start: Instant::now(),
            shares,
            max_bytes,
            metrics,
        }
    }

    /// What is kept for a task at `now`, fresh or stale: of a state and a not-found answer the one that counts. `live`
    /// is the freshness lifetime of live answers.
    pub fn get(&self, account: AccountId, task: &TaskId, now: Instant, live: Duration) -> Option<Answer> {
        let state = self.state(account, task.as_str(), now);
        if state.as_ref().is_some_and(|state| state.is_fresh(now, live)) {
            return state;
        }
        self.or_not_found(state, account, task.as_str(), now)
    }

    /// The state that is kept for a task at `now`, fresh or stale, for somebody who reads it.
    pub fn state(&self, account: AccountId, task: &str, now: Instant) -> Option<Answer> {
        kept(&self.tasks, self.key(account, task), account, task, now).inspect(Answer::note_read)
    }

    /// What counts at `now` for a task whose `state`, if one is kept, is not fresh: the not-found answer that is kept,
    /// where it was asked for no earlier than the state; else the state.
    pub fn or_not_found(&self, state: Option<Answer>, account: AccountId, task: &str, now: Instant) -> Option<Answer> {
        if !self.may_hold_not_found.load(Ordering::Acquire) {
            return state;
        }
        let since = state.as_ref().map(Answer::asked);
        let not_found = kept(&self.not_found, self.key(account, task), account, task, now)
            .filter(|answer| since.is_none_or(|since| answer.asked() >= since));
        not_found.or(state)
    }

    /// How often an answer was put here so far. While that is the same, whoever has looked need not look again: to be
    /// asked before the first look.
    pub fn puts(&self) -> u64 {
        self.puts.load(Ordering::Acquire)
    }

    /// The state that is kept for a task at `now`, fresh or stale.
    pub fn snapshot(&self, account: AccountId, task: &TaskId, now: Instant) -> Option<Answer> {
        let task = task.as_str();
        kept(&self.tasks, self.key(account, task), account, task, now)
    }

    /// Keeps an answer that says for how long; not if it is late ([`Answer::replaces`]), or alone would take more
    /// than an account's share. Gives it, and then it knows ([`Answer::is_stored`]).
    pub fn put(&self, account: AccountId, task: &TaskId, answer: &Answer, now: Instant) -> Answer {
        self.put_after(account, task, now, |_| answer.clone())
    }

    /// Keeps, as [`Self::put`] does, the answer that `make` makes, given the state that is kept so far.
    pub fn put_after(
        &self,
        account: AccountId,
        task: &TaskId,
        now: Instant,
        make: impl FnOnce(Option<&Answer>) -> Answer,
    ) -> Answer {
        let task = task.as_str();
        let key = self.key(account, task);
        let _changing = self.changing.lock();
        let kept = kept(&self.tasks, key, account, task, now);
        let answer = make(kept.as_ref());
        if !answer.is_stored() {
            return answer;
        }
        if !self.put_under(key, account, &answer, kept.as_ref()) {
            return answer.left_out();
        }
        self.puts.fetch_add(1, Ordering::Release);
        answer
    }

    /// Gives whether it is kept.
    fn put_under(&self, key: Key, account: AccountId, answer: &Answer, kept: Option<&Answer>) -> bool {
        if answer.class() == Class::NotFound {
            if let Some(kept) = kept.filter(|kept| answer.asked() >= kept.asked()) {
                // A hit looks at the state alone.
                kept.outdate();
            }
            if u64::from(weight(answer.block())) > most_not_found(self.max_bytes) {
                return false;
            }
            self.may_hold_not_found.store(true, Ordering::Release);
            self.not_found.insert(key, answer.block().clone());
            return true;
        }
        let is_roomy = self.tasks.weighted_size() < self.max_bytes / ROOMY;
        let packed = if is_roomy { None } else { answer.block().packed() };
        let block = packed.as_ref().unwrap_or_else(|| answer.block());
        let weight = weight(block);
        let is_newest = kept.is_none_or(|kept| answer.replaces(kept));
        let is_kept = is_newest && u64::from(weight) <= self.max_bytes / 2;
        if is_kept {
            self.make_room(account, weight);
            let ends = self.second(block.kept_until()).saturating_add(1);
            self.shares.add(key, block, weight, ends);
            self.tasks.insert(key, block.clone());
        } else if is_newest {
            // An older state would stand in for it later, and the task go back.
            self.tasks.remove(&key);
        }
        if self.may_hold_not_found.load(Ordering::Relaxed) {
            self.not_found.invalidate(&key);
        }
        is_kept
    }

    /// Whether any state of the account's tasks is kept.
    pub fn holds_any(&self, account: AccountId) -> bool {
        self.shares.holds(account)
    }

    /// Gives back what is kept no longer, a part at each call, lets moka do what it has put off, and shows how much is
    /// kept.
    pub fn maintain(&self) {
        self.give_back(Instant::now());
        self.tasks.run_pending_tasks();
        self.forget_not_found();
        let entries = self.tasks.entry_count() + self.not_found.entry_count();
        let bytes = self.tasks.weighted_size() + self.not_found.weighted_size();
        self.metrics
            .cache_entries
            .set(i64::try_from(entries).unwrap_or(i64::MAX));
        self.metrics.cache_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    fn key(&self, account: AccountId, task: &str) -> Key {
        Key(self.keys.hash_one((account, task)))
    }

    /// Lets moka forget the not-found answers that are kept no longer, and takes notice once there are none.
    fn forget_not_found(&self) {
        // Nobody puts one meanwhile.
        let _changing = self.changing.lock();
        self.not_found.run_pending_tasks();
        if self.not_found.entry_count() == 0 {
            self.may_hold_not_found.store(false, Ordering::Release);
        }
    }

    fn second(&self, at: Instant) -> u32 {
        u32::try_from(at.saturating_duration_since(self.start).as_secs()).unwrap_or(u32::MAX)
    }

    /// moka could know when each answer ends, for 48 bytes each and by a clock of its own.
    fn give_back(&self, now: Instant) {
        for key in self.shares.ended(self.second(now), MOST_SEARCHED) {
            let _changing = self.changing.lock();
            // Meanwhile a newer one may have come.
            let is_over = self.tasks.get(&key).is_some_and(|kept| !kept.is_kept(now));
            if is_over && self.tasks.remove(&key).is_some() {
                self.metrics.evicted(Eviction::Expired);
            }
        }
    }

    /// Before moka evicts whatever was used longest ago: the account that holds more than half gives up its own.
    fn make_room(&self, account: AccountId, weight: u32) {
        let (mut spared, mut unsettled) = (0, 0);
        while unsettled < MOST_UNSETTLED
            && let Some((key, for_itself)) = self.shares.candidate(account, weight)
        {
            match self.tasks.get(&key) {
                Some(answer) if spared < MOST_SPARED && answer.take_read() => {
                    self.shares.spare(&answer);
                    spared += 1;
                }
                Some(_) if self.tasks.remove(&key).is_some() => {
                    let cause = if for_itself {
                        Eviction::Size
                    } else {
                        Eviction::AccountShare
                    };
                    self.metrics.evicted(cause);
                }
                // Another thread is just putting or evicting it.
                Some(_) | None => {
                    self.tasks.run_pending_tasks();
                    unsettled += 1;
                }
            }
        }
    }
}

fn kept(map: &Map, key: Key, account: AccountId, task: &str, now: Instant) -> Option<Answer> {
    let block = map.get(&key)?;
    (block.is_of(account, task) && block.is_kept(now)).then(|| Answer::from(block))
}

/// What not-found answers may weigh together, in a cache of `max_bytes`.
fn most_not_found(max_bytes: u64) -> u64 {
    NOT_FOUND_BYTES.min(max_bytes)
}

/// An entry's weight in bytes.
fn weight(answer: &Block) -> u32 {
    u32::try_from(OVERHEAD + answer.size()).unwrap_or(u32::MAX)
}

/// moka forgets a not-found answer when it is kept no longer.
struct KeepsFor;

#[allow(clippy::disallowed_types, reason = "moka's own clock; nothing here reads it")]
type StdInstant = std::time::Instant;

impl Expiry<Key, Block> for KeepsFor {
    fn expire_after_create(&self, _: &Key, answer: &Block, _: StdInstant) -> Option<Duration> {
        Some(keeps_for(answer))
    }

    fn expire_after_update(&self, _: &Key, answer: &Block, _: StdInstant, _: Option<Duration>) -> Option<Duration> {
        Some(keeps_for(answer))
    }
}

/// How long it is kept yet: it may have been read from elsewhere, a while ago.
fn keeps_for(answer: &Block) -> Duration {
    answer.kept_until().saturating_duration_since(Instant::now())
}

#[cfg(test)]
mod tests;
