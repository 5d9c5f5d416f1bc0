//! Which account a key belongs to, and what each account has: its budget, its connections, its live tasks, its counters.
//!
//! Listed keys are looked up without a lock. A key that is listed nowhere is an account of its own; at most `max_accounts`
//! of these are remembered, and one that was idle for a minute is forgotten, never while upstream has it paused. Its id
//! follows from the key, so its cached answers outlive that.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::time::Instant;

use crate::account::{AccountId, AccountIds, ApiKey};
use crate::budget::{Budget, Pace};
use crate::config::{Config, Fresh, UnknownKeys};
use crate::error::Error;
use crate::metrics::{AccountMetrics, Metrics, OTHER};
use crate::upstream::{Pool, Upstream};
use crate::watch::Watch;

/// How long an unlisted account is remembered after its last poll: much longer than a second's queries count.
const IDLE: Duration = Duration::from_secs(60);

/// An account, from here on without its keys.
#[derive(Debug)]
pub(super) struct Account {
    pub(super) id: AccountId,
    /// The configured name, or `other`: metric label and log field.
    pub(super) label: Arc<str>,
    pub(super) budget: Budget,
    pub(super) pool: Pool,
    pub(super) watch: Watch,
    pub(super) metrics: AccountMetrics,
    /// Milliseconds from the directory's start to the last poll.
    asked_ms: AtomicU64,
}

impl Account {
    /// The freshness lifetime of its live answers at `now`.
    pub(super) fn lifetime(&self, now: Instant) -> Duration {
        self.watch.lifetime(self.budget.rate(), now)
    }
}

/// What a new account is made of.
#[derive(Debug)]
struct Maker {
    ids: AccountIds,
    upstream: Upstream,
    metrics: Arc<Metrics>,
    /// The handles that all unlisted accounts share.
    other: AccountMetrics,
    pace: Pace,
    max_queue: usize,
    fresh: Fresh,
}

/// The directory of accounts.
#[derive(Debug)]
pub(super) struct Accounts {
    listed: HashMap<ApiKey, Arc<Account>>,
    unlisted: RwLock<HashMap<ApiKey, Arc<Account>>>,
    unknown_keys: UnknownKeys,
    max_unlisted: usize,
    started: Instant,
    make: Maker,
}

impl Accounts {
    /// The accounts of `config`; those that it does not list form as they are asked for. Nothing is granted before
    /// `started` plus 1 s plus `budget.margin`.
    pub(super) fn new(config: &Config, upstream: Upstream, metrics: Arc<Metrics>, started: Instant) -> Self {
        let margin = config.budget.margin;
        let make = Maker {
            ids: AccountIds::default(),
            upstream,
            other: metrics.account(OTHER),
            metrics,
            pace: Pace {
                limit: config.budget.limit,
                margin,
                not_before: started + Duration::from_secs(1) + margin,
            },
            max_queue: config.budget.max_queue,
            fresh: config.cache.fresh,
        };
        let mut listed = HashMap::new();
        for account in &config.accounts {
            let made = Arc::new(make.listed(&account.name));
            listed.extend(
                account
                    .keys
                    .iter()
                    .map(|listed| (listed.key.clone(), Arc::clone(&made))),
            );
        }
        Self {
            listed,
            unlisted: RwLock::default(),
            unknown_keys: config.unknown_keys,
            max_unlisted: config.max_accounts,
            started,
            make,
        }
    }

    /// The account that `key` belongs to.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] when unlisted keys are rejected, [`Error::TooManyAccounts`] when too many are remembered.
    pub(super) fn of(&self, key: &ApiKey, now: Instant) -> Result<Arc<Account>, Error> {
        if let Some(account) = self.listed.get(key) {
            return Ok(Arc::clone(account));
        }
        if self.unknown_keys == UnknownKeys::Reject {
            return Err(Error::UnknownKey);
        }
        let asked_ms = self.ms(now);
        let known = self
            .unlisted
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(key)
            .cloned();
        if let Some(account) = known {
            account.asked_ms.store(asked_ms, Ordering::Relaxed);
            return Ok(account);
        }
        let mut unlisted = self.unlisted.write().unwrap_or_else(PoisonError::into_inner);
        // Between the two locks another poll may have formed it.
        if let Some(account) = unlisted.get(key) {
            return Ok(Arc::clone(account));
        }
        if unlisted.len() >= self.max_unlisted {
            return Err(Error::TooManyAccounts);
        }
        let account = Arc::new(self.make.unlisted(key, asked_ms));
        unlisted.insert(key.clone(), Arc::clone(&account));
        Ok(account)
    }

    /// Whether `key` may spend money upstream: it is listed, or unlisted ones are forwarded.
    pub(super) fn admits(&self, key: Option<&ApiKey>) -> bool {
        self.unknown_keys == UnknownKeys::Forward || key.is_some_and(|key| self.listed.contains_key(key))
    }

    /// Forgets unlisted accounts that nobody has asked for in a minute.
    pub(super) fn sweep(&self, now: Instant) {
        let oldest = self.ms(now.checked_sub(IDLE).unwrap_or(self.started));
        let mut unlisted = self.unlisted.write().unwrap_or_else(PoisonError::into_inner);
        let forgotten: Vec<_> = unlisted
            .extract_if(|_, account| {
                // A poll or a flight under way holds the account, too.
                account.asked_ms.load(Ordering::Relaxed) < oldest
                    && Arc::strong_count(account) == 1
                    && !account.budget.is_paused(now)
            })
            .collect();
        drop(unlisted);
        drop(forgotten);
    }

    /// Shows each account's live tasks and their freshness lifetime at `now`; of the unlisted ones, which share a label,
    /// all live tasks and the longest lifetime.
    pub(super) fn show_live(&self, now: Instant) {
        for account in self.listed.values() {
            account.metrics.live(account.watch.live(now), account.lifetime(now));
        }
        let unlisted = self.unlisted.read().unwrap_or_else(PoisonError::into_inner);
        let nobody = (0, self.make.fresh.floor);
        let (tasks, lifetime) = unlisted.values().fold(nobody, |(tasks, longest), account| {
            (tasks + account.watch.live(now), longest.max(account.lifetime(now)))
        });
        self.make.other.live(tasks, lifetime);
    }

    fn ms(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }
}

impl Maker {
    fn listed(&self, name: &str) -> Account {
        self.account(self.ids.listed(name), name.into(), self.metrics.account(name), 0)
    }

    fn unlisted(&self, key: &ApiKey, asked_ms: u64) -> Account {
        self.account(self.ids.unlisted(key), OTHER.into(), self.other.clone(), asked_ms)
    }

    fn account(&self, id: AccountId, label: Arc<str>, metrics: AccountMetrics, asked_ms: u64) -> Account {
        Account {
            id,
            label,
            budget: Budget::new(self.pace, self.max_queue, metrics.clone()),
            pool: self.upstream.pool(),
            watch: Watch::new(self.fresh),
            metrics,
            asked_ms: AtomicU64::new(asked_ms),
        }
    }
}
