//! Which account a key belongs to, and what each account has: its budget, its connections, its live tasks, its counters.
//!
//! Listed keys are looked up without a lock. A key that is listed nowhere is an account of its own; at most `max_accounts`
//! of these are remembered, and one that was idle for a minute is forgotten, never while upstream has it paused. Its id
//! follows from the key, so its cached answers outlive that.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use tokio::time::Instant;

use super::asker::{Asker, Token};
use super::keys::{Key, Refusal};
use crate::account::{AccountId, AccountIds, ApiKey};
use crate::budget::{Budget, Pace};
use crate::config::{Config, Fresh, UnknownKeys};
use crate::error::Error;
use crate::metrics::{AccountMetrics, ClientRequests, Metrics, OTHER};
use crate::upstream::{Pool, Upstream};
use crate::watch::Watch;

/// How long an unlisted account is remembered after its last poll: much longer than a second's queries count.
const IDLE: Duration = Duration::from_mins(1);

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
    /// The counters of clients that are not configured.
    pub(super) others: ClientRequests,
    /// Upstream's 402.
    pub(super) credits: Refusal,
    /// Its keys, in their order: what client tokens stand for.
    pub(super) keys: Vec<Arc<Key>>,
    /// Milliseconds from the directory's start to the last poll, or to the last sweep that found it in use.
    asked_ms: AtomicU64,
}

impl Account {
    /// The freshness lifetime of its live answers at `now`.
    pub(super) fn lifetime(&self, now: Instant) -> Duration {
        self.watch.lifetime(self.budget.rate(now), now)
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
    others: ClientRequests,
    pace: Pace,
    max_queue: usize,
    fresh: Fresh,
    started: Instant,
}

/// The directory of accounts.
#[derive(Debug)]
pub(super) struct Accounts {
    /// By key and by client token.
    listed: HashMap<ApiKey, Asker>,
    unlisted: RwLock<HashMap<ApiKey, Arc<Account>>>,
    /// What is known of unlisted keys whose accounts are forgotten.
    dormant: Mutex<HashMap<ApiKey, Arc<Key>>>,
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
        let maker = Maker {
            ids: AccountIds::default(),
            upstream,
            other: metrics.account(OTHER),
            others: metrics.client(OTHER, OTHER),
            metrics,
            pace: Pace {
                limit: config.budget.limit,
                margin,
                not_before: started + Duration::from_secs(1) + margin,
            },
            max_queue: config.budget.max_queue,
            fresh: config.cache.fresh,
            started,
        };
        let mut listed = HashMap::new();
        for configured in &config.accounts {
            let keys = configured.keys.iter().map(|listed| listed.key.clone());
            let account = Arc::new(maker.listed(&configured.name, keys));
            for client in &configured.clients {
                let token = Arc::new(Token {
                    name: client.name.as_str().into(),
                    weight: client.weight,
                    passthrough: client.passthrough,
                    requests: maker.metrics.client(&configured.name, &client.name),
                });
                // An account without a key is refused by `config`.
                let Some(key) = account.keys.first().cloned() else {
                    continue;
                };
                let (account, token) = (Arc::clone(&account), Some(token));
                listed.insert(client.token.key.clone(), Asker { account, key, token });
            }
            for key in account.keys.iter().cloned() {
                let (account, token) = (Arc::clone(&account), None);
                listed.insert(key.secret.clone(), Asker { account, key, token });
            }
        }
        Self {
            listed,
            unlisted: RwLock::default(),
            dormant: Mutex::default(),
            unknown_keys: config.unknown_keys,
            max_unlisted: config.max_accounts,
            started,
            make: maker,
        }
    }

    /// Who presents `key`, an account's or a client token.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] when unlisted keys are rejected, [`Error::TooManyAccounts`] when too many are remembered.
    pub(super) fn of(&self, key: &ApiKey, now: Instant) -> Result<Asker, Error> {
        if let Some(asker) = self.listed.get(key) {
            return Ok(asker.clone());
        }
        let account = self.unlisted(key, now)?;
        // An unlisted account is its key's.
        let key = account.keys.first().cloned().ok_or(Error::Internal)?;
        let token = None;
        Ok(Asker { account, key, token })
    }

    fn unlisted(&self, key: &ApiKey, now: Instant) -> Result<Arc<Account>, Error> {
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
        let known = self.dormant().remove(key);
        let account = Arc::new(self.make.unlisted(key, known, asked_ms));
        unlisted.insert(key.clone(), Arc::clone(&account));
        Ok(account)
    }

    /// Who presents `key`, if configuration lists it.
    pub(super) fn listed(&self, key: &ApiKey) -> Option<&Asker> {
        self.listed.get(key)
    }

    /// Whether a key that is listed nowhere may go upstream.
    pub(super) fn forwards_unknown(&self) -> bool {
        self.unknown_keys == UnknownKeys::Forward
    }

    /// Forgets unlisted accounts that nobody has used in a minute. What upstream said of their keys stays known as long as
    /// it counts: an accepted key's for ten minutes, a refused key's while any answer is kept (`holds`) that it must not get.
    pub(super) fn sweep(&self, now: Instant, holds: impl Fn(AccountId) -> bool) {
        let (now_ms, oldest) = (self.ms(now), self.ms(now.checked_sub(IDLE).unwrap_or(self.started)));
        let mut unlisted = self.unlisted.write().unwrap_or_else(PoisonError::into_inner);
        let forgotten: HashMap<_, _> = unlisted
            .extract_if(|_, account| {
                // A poll or a flight under way holds the account, too. It may ask upstream long after its poll came, and
                // a budget formed anew knows nothing of that.
                if Arc::strong_count(account) > 1 {
                    account.asked_ms.store(now_ms, Ordering::Relaxed);
                }
                account.asked_ms.load(Ordering::Relaxed) < oldest && !account.budget.is_paused(now)
            })
            .collect();
        {
            // Under both locks: whoever forms an account anew finds what was known.
            let mut dormant = self.dormant();
            for (secret, account) in &forgotten {
                dormant.extend(account.keys.first().map(|key| (secret.clone(), Arc::clone(key))));
            }
            dormant.retain(|secret, key| {
                if key.is_refused() {
                    holds(self.make.ids.unlisted(secret))
                } else {
                    !key.is_due(now)
                }
            });
        }
        drop(unlisted);
        drop(forgotten);
    }

    fn dormant(&self) -> MutexGuard<'_, HashMap<ApiKey, Arc<Key>>> {
        self.dormant.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows each account's rate, its live tasks and their freshness lifetime at `now`; of the unlisted ones, which share
    /// a label, the lowest rate, all live tasks and the longest lifetime.
    pub(super) fn show(&self, now: Instant) {
        for asker in self.listed.values() {
            let account = &asker.account;
            account.metrics.rate(account.budget.rate(now));
            account.metrics.live(account.watch.live(now), account.lifetime(now));
        }
        let unlisted = self.unlisted.read().unwrap_or_else(PoisonError::into_inner);
        let nobody = (self.make.pace.rate(), 0, self.make.fresh.floor);
        let (rate, tasks, lifetime) = unlisted.values().fold(nobody, |(lowest, tasks, longest), account| {
            let rate = lowest.min(account.budget.rate(now));
            (
                rate,
                tasks + account.watch.live(now),
                longest.max(account.lifetime(now)),
            )
        });
        self.make.other.rate(rate);
        self.make.other.live(tasks, lifetime);
    }

    fn ms(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }
}

impl Maker {
    fn listed(&self, name: &str, secrets: impl Iterator<Item = ApiKey>) -> Account {
        let (id, metrics) = (self.ids.listed(name), self.metrics.account(name));
        let others = self.metrics.client(name, OTHER);
        let key = |(place, secret)| Arc::new(self.key(secret, place + 1, &metrics));
        Account {
            keys: secrets.enumerate().map(key).collect(),
            ..self.account(id, name.into(), metrics, others)
        }
    }

    fn unlisted(&self, secret: &ApiKey, known: Option<Arc<Key>>, asked_ms: u64) -> Account {
        let id = self.ids.unlisted(secret);
        let key = known.unwrap_or_else(|| Arc::new(self.key(secret.clone(), 1, &self.other)));
        Account {
            keys: vec![key],
            asked_ms: AtomicU64::new(asked_ms),
            ..self.account(id, OTHER.into(), self.other.clone(), self.others.clone())
        }
    }

    fn key(&self, secret: ApiKey, place: usize, metrics: &AccountMetrics) -> Key {
        Key::new(secret, place, self.started, metrics.keys_refused.clone())
    }

    fn account(&self, id: AccountId, label: Arc<str>, metrics: AccountMetrics, others: ClientRequests) -> Account {
        Account {
            id,
            label,
            budget: Budget::new(self.pace, self.max_queue, metrics.clone()),
            pool: self.upstream.pool(),
            watch: Watch::new(self.fresh),
            credits: Refusal::new(metrics.credits_missing.clone()),
            metrics,
            others,
            keys: Vec::new(),
            asked_ms: AtomicU64::new(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Key, KeySource};
    use crate::upstream::tcp;

    const MUSIC: [&str; 2] = ["ak_music_1", "ak_music_2"];

    fn key(key: &str) -> ApiKey {
        ApiKey::new(key).unwrap()
    }

    fn directory(change: impl FnOnce(&mut Config)) -> Accounts {
        let listed = |name: &str, keys: &[&str]| config::Account {
            name: name.to_owned(),
            keys: keys
                .iter()
                .map(|text| Key {
                    key: key(text),
                    source: KeySource::Env("KEY".to_owned()),
                })
                .collect(),
            clients: Vec::new(),
        };
        let mut config = Config {
            accounts: vec![listed("music", &MUSIC), listed("video", &["ak_video"])],
            ..Config::default()
        };
        change(&mut config);
        let metrics = Arc::new(Metrics::new().unwrap());
        let dial = tcp(config.upstream.url.clone());
        let upstream = Upstream::new(&config.upstream, &config.limits, dial, Arc::clone(&metrics)).unwrap();
        Accounts::new(&config, upstream, metrics, Instant::now())
    }

    impl Accounts {
        /// The account of a key that was asked for `seconds` after the start.
        fn asked_at(&self, seconds: u64, text: &str) -> Arc<Account> {
            self.of(&key(text), self.at(seconds)).unwrap().account
        }

        fn at(&self, seconds: u64) -> Instant {
            self.started + Duration::from_secs(seconds)
        }

        fn remembered(&self) -> usize {
            self.unlisted.read().unwrap().len()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_keys_of_a_listed_account_share_it() {
        let accounts = directory(|_| {});
        let [one, other] = MUSIC.map(|key| accounts.asked_at(0, key));
        assert!(Arc::ptr_eq(&one, &other));
        assert_eq!(&*one.label, "music");
        let video = accounts.asked_at(0, "ak_video");
        assert_ne!(one.id, video.id);
        assert_eq!(accounts.remembered(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_unlisted_key_is_an_account_of_its_own() {
        let accounts = directory(|_| {});
        let one = accounts.asked_at(0, "ak_one");
        assert!(Arc::ptr_eq(&one, &accounts.asked_at(1, "ak_one")));
        assert_ne!(one.id, accounts.asked_at(0, "ak_other").id);
        assert_ne!(one.id, accounts.asked_at(0, MUSIC[0]).id);
        assert_eq!(&*one.label, OTHER, "a stranger's key makes no label");
    }

    #[tokio::test(start_paused = true)]
    async fn an_unlisted_account_is_forgotten_after_an_idle_minute_and_keeps_its_id() {
        let accounts = directory(|_| {});
        let id = accounts.asked_at(0, "ak_one").id;
        accounts.sweep(accounts.at(60), |_| false);
        assert_eq!(accounts.remembered(), 1);
        accounts.asked_at(30, "ak_one");
        accounts.sweep(accounts.at(61), |_| false);
        assert_eq!(accounts.remembered(), 1, "it was asked for 31 s ago");
        accounts.sweep(accounts.at(91), |_| false);
        assert_eq!(accounts.remembered(), 0);
        assert_eq!(
            accounts.asked_at(100, "ak_one").id,
            id,
            "its cached answers are found again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_account_is_not_forgotten_while_a_flight_holds_it() {
        let accounts = directory(|_| {});
        let flight = accounts.asked_at(0, "ak_one");
        accounts.sweep(accounts.at(600), |_| false);
        assert!(Arc::ptr_eq(&flight, &accounts.asked_at(0, "ak_one")));
        accounts.sweep(accounts.at(600), |_| false);
        drop(flight);
        accounts.sweep(accounts.at(660), |_| false);
        assert_eq!(accounts.remembered(), 1, "what the flight asked for still counts");
        accounts.sweep(accounts.at(661), |_| false);
        assert_eq!(accounts.remembered(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_account_is_not_forgotten_while_it_is_paused() {
        let accounts = directory(|_| {});
        let pause = Some(Duration::from_mins(5));
        let budget = accounts.asked_at(0, "ak_one").budget.clone();
        assert_eq!(budget.rate_limited(pause, accounts.at(0)), Duration::from_mins(5));
        accounts.sweep(accounts.at(299), |_| false);
        assert_eq!(accounts.remembered(), 1);
        accounts.sweep(accounts.at(300), |_| false);
        assert_eq!(accounts.remembered(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_listed_account_is_never_forgotten() {
        let accounts = directory(|_| {});
        let id = accounts.asked_at(0, MUSIC[0]).id;
        accounts.sweep(accounts.at(6000), |_| false);
        assert_eq!(accounts.asked_at(6000, MUSIC[1]).id, id);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_strangers_than_max_accounts_are_remembered() {
        let accounts = directory(|config| config.max_accounts = 2);
        for known in ["ak_one", "ak_two", "ak_one", MUSIC[0]] {
            accounts.asked_at(0, known);
        }
        let refused = accounts.of(&key("ak_three"), accounts.at(0));
        assert_eq!(refused.unwrap_err(), Error::TooManyAccounts);
        accounts.asked_at(50, "ak_two");
        accounts.sweep(accounts.at(61), |_| false);
        accounts.asked_at(61, "ak_three");
        assert_eq!(accounts.remembered(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn unlisted_keys_may_be_rejected() {
        let accounts = directory(|config| config.unknown_keys = UnknownKeys::Reject);
        let refused = accounts.of(&key("ak_one"), accounts.at(0));
        assert_eq!(refused.unwrap_err(), Error::UnknownKey);
        accounts.asked_at(0, MUSIC[0]);
        assert!(!accounts.forwards_unknown());
    }
}
