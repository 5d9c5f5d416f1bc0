//! Which account a key belongs to, and what each account has: its budget, its connections, its live tasks, its counters.
//!
//! Listed keys are looked up without a lock; a changed configuration swaps the whole directory. A key that is listed
//! nowhere is an account of its own; at most `max_accounts` of these are remembered, and one that was idle for a minute is
//! forgotten, never while upstream has it paused. Its id follows from the key, so its cached answers outlive that.

mod known;
mod maker;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::HeaderValue;
use parking_lot::{Mutex, RwLock};
use tokio::time::Instant;

use super::account::Account;
use super::asker::Asker;
use super::others::Others;
use crate::account::{AccountId, AccountIds, ApiKey, KeyText};
use crate::budget::Budget;
use crate::config::{Config, UnknownKeys};
use crate::error::Error;
use crate::metrics::{Metrics, OTHER};
use crate::moment::millis;
use crate::shared::Replica;
use crate::upstream::Upstream;
use known::Known;
use maker::{Maker, Rules};

/// How long an unlisted account is remembered after its last poll: much longer than a second's queries count.
const IDLE: Duration = Duration::from_mins(1);

/// What configuration says, as it is looked up: swapped whole.
#[derive(Debug)]
struct Directory {
    /// By key and by client token.
    listed: HashMap<ApiKey, Asker>,
    /// What keys spend that were listed once: upstream does not forget because we do.
    retired: HashMap<ApiKey, Budget>,
    rules: Rules,
}

/// Every account there is.
#[derive(Debug)]
pub(super) struct Accounts {
    directory: ArcSwap<Directory>,
    unlisted: RwLock<HashMap<ApiKey, Arc<Account>>>,
    /// Accounts of earlier configurations: flights may still be under way with what they were. Locked while one is taken
    /// over.
    earlier: Mutex<Vec<Weak<Account>>>,
    started: Instant,
    make: Maker,
}

impl Accounts {
    /// The accounts of `config`; those that it does not list form as they are asked for. Nothing is granted before
    /// `started` plus 1 s plus `budget.margin`.
    pub(super) fn new(
        config: &Config,
        upstream: Upstream,
        replica: Option<Replica>,
        metrics: Arc<Metrics>,
        started: Instant,
    ) -> Self {
        let make = Maker {
            ids: AccountIds::default(),
            upstream,
            other: metrics.account(OTHER),
            others: Arc::new(Others::new(OTHER, Arc::clone(&metrics))),
            metrics,
            known: Known::new(started),
            replica,
            unlisted: AtomicU64::new(0),
        };
        let rules = Rules::of(config, started);
        let accounts = config.accounts.iter().map(|configured| {
            let budget = make.listed_budget(&configured.name, &rules);
            make.listed(configured, None, budget, &rules)
        });
        let listed = make.askers(&config.accounts, accounts.collect());
        Self {
            directory: ArcSwap::from_pointee(Directory {
                listed,
                retired: HashMap::new(),
                rules,
            }),
            unlisted: RwLock::default(),
            earlier: Mutex::default(),
            started,
            make,
        }
    }

    /// Takes a changed configuration over, from the next poll and the next permit on.
    ///
    /// An account that keeps its name keeps its budget and its answers, whatever keys it has now; a key that is listed no
    /// longer keeps its budget, and not its answers. Where replicas share budgets it gets the one that a replica would give
    /// it that never knew it listed, or both would be spent. Where a key comes under another budget than it had, flights of
    /// the old one end unspent, and the new one grants nothing until what the old one spent no longer counts.
    ///
    /// Polls with unlisted keys wait while it takes its place, and for nothing that grows with the accounts listed.
    pub(super) fn configure(&self, config: &Config) {
        let mut earlier = self.earlier.lock();
        let before = self.directory.load_full();
        let after = Arc::new(self.changed_directory(config, &before));
        let rules = after.rules;
        let hold = |gained: &[Gained]| {
            let now = Instant::now();
            let until = now + Duration::from_secs(1) + rules.pace.margin;
            for Gained { budget, spent } in gained {
                budget.take_over(spent, now);
                rules.hold_for(budget, until);
            }
        };
        let mut gained = after.gained(&before);
        hold(&gained);
        let (listed_now, unlisted_yet) = {
            let mut unlisted = self.unlisted.write();
            let listed = unlisted.extract_if(|key, _| after.listed.contains_key(key));
            let listed: Vec<_> = listed.map(|(_, account)| account).collect();
            let theirs: Vec<_> = listed.iter().flat_map(|account| after.superseding(account)).collect();
            hold(&theirs);
            gained.extend(theirs);
            self.directory.store(Arc::clone(&after));
            (listed, unlisted.values().cloned().collect::<Vec<_>>())
        };
        let listed_before = before.keys().map(|asker| &asker.account);
        earlier.extend(listed_before.chain(&listed_now).map(Arc::downgrade));
        let mut seen = HashSet::new();
        earlier.retain(|account| account.strong_count() > 0 && seen.insert(account.as_ptr()));
        for account in earlier.iter().filter_map(Weak::upgrade) {
            if after.superseding(&account).next().is_some() {
                account.superseded.cancel();
            }
        }
        // Till now the old ones could be spent.
        hold(&gained);
        for account in &unlisted_yet {
            account.watch.configure(rules.fresh);
            rules.hold_for(&account.budget, account.budget.pace().not_before);
        }
        self.show_moved(&before, &after);
    }

    /// The directory of a configuration that follows on `before`.
    fn changed_directory(&self, config: &Config, before: &Directory) -> Directory {
        let rules = Rules::of(config, self.started);
        let named: HashMap<&str, &Arc<Account>> = before
            .keys()
            .map(|asker| (&*asker.account.label, &asker.account))
            .collect();
        let accounts = config.accounts.iter().map(|configured| {
            let prior = named.get(configured.name.as_str()).copied();
            let budget = prior.map_or_else(
                || self.make.listed_budget(&configured.name, &rules),
                |prior| prior.budget.clone(),
            );
            rules.hold_for(&budget, budget.pace().not_before);
            self.make.listed(configured, prior, budget, &rules)
        });
        let listed = self.make.askers(&config.accounts, accounts.collect());
        let delisted = before.keys().map(|asker| (&asker.key.secret, &asker.account));
        let delisted = delisted.filter(|(key, _)| !listed.contains_key(*key));
        let delisted = delisted.map(|(key, account)| (key.clone(), self.make.retired_budget(key, account, &rules)));
        let retired = before.retired.iter().filter(|(key, _)| !listed.contains_key(*key));
        let retired = retired.map(|(key, budget)| (key.clone(), budget.clone()));
        let retired: HashMap<_, _> = retired.chain(delisted).collect();
        for budget in retired.values() {
            rules.hold_for(budget, budget.pace().not_before);
        }
        Directory { listed, retired, rules }
    }

    /// Shows refused keys under the accounts that they have come under, and accounts that are gone no longer.
    fn show_moved(&self, before: &Directory, after: &Directory) {
        for Asker { account, key, .. } in after.keys() {
            let prior = before.account(&key.secret);
            if prior.is_none_or(|prior| prior.label != account.label) {
                key.refusal.show_in(&account.metrics.keys_refused);
            }
        }
        let named: HashSet<_> = after.keys().map(|asker| &asker.account.label).collect();
        for Asker { account, key, .. } in before.keys() {
            if after.account(&key.secret).is_none() {
                key.refusal.show_in(&self.make.other.keys_refused);
            }
            if !named.contains(&account.label) {
                self.make.metrics.forget(&account.label);
            }
        }
    }

    /// Who presents `key`, an account's or a client token.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] when unlisted keys are rejected, [`Error::TooManyAccounts`] when too many are remembered.
    pub(super) fn of(&self, key: &ApiKey, now: Instant) -> Result<Asker, Error> {
        if let Some(asker) = self.directory.load().listed.get(key) {
            return Ok(asker.clone());
        }
        self.unlisted(key, now)
    }

    /// What `answer` makes of who presents `key`, where that is known already.
    pub(super) fn with<T>(&self, key: &str, now: Instant, answer: impl FnOnce(&Asker) -> T) -> Option<T> {
        let key: &dyn KeyText = &key;
        let directory = self.directory.load();
        if let Some(asker) = directory.listed.get(key) {
            return Some(answer(asker));
        }
        if directory.rules.unknown_keys == UnknownKeys::Reject {
            return None;
        }
        let known = self.known_unlisted(key)?;
        known.asked_ms.store(self.ms(now), Ordering::Relaxed);
        of_its_own(known).ok().as_ref().map(answer)
    }

    fn known_unlisted(&self, key: &dyn KeyText) -> Option<Arc<Account>> {
        let unlisted = self.unlisted.read();
        unlisted.get(key).cloned()
    }

    fn unlisted(&self, key: &ApiKey, now: Instant) -> Result<Asker, Error> {
        let asked_ms = self.ms(now);
        if let Some(account) = self.known_unlisted(key)
            && self.forwards_unknown()
        {
            account.asked_ms.store(asked_ms, Ordering::Relaxed);
            return of_its_own(account);
        }
        let mut unlisted = self.unlisted.write();
        // Before this lock another poll may have formed it, or a changed configuration may list it.
        let directory = self.directory.load();
        if let Some(asker) = directory.listed.get(key) {
            return Ok(asker.clone());
        }
        if directory.rules.unknown_keys == UnknownKeys::Reject {
            return Err(Error::UnknownKey);
        }
        if let Some(account) = unlisted.get(key) {
            return of_its_own(Arc::clone(account));
        }
        if unlisted.len() >= directory.rules.max_unlisted {
            return Err(Error::TooManyAccounts);
        }
        let budget = directory.retired.get(key).cloned();
        let budget = budget.unwrap_or_else(|| self.make.unlisted_budget(key, &directory.rules));
        let account = Arc::new(self.make.unlisted(key, budget, &directory.rules, asked_ms));
        unlisted.insert(key.clone(), Arc::clone(&account));
        of_its_own(account)
    }

    /// Who presents `key`, if configuration lists it.
    pub(super) fn listed(&self, key: &ApiKey) -> Option<Asker> {
        self.directory.load().listed.get(key).cloned()
    }

    /// Whether `text` is a client token.
    pub(super) fn is_token(&self, text: &str) -> bool {
        let key: &dyn KeyText = &text;
        self.directory.load().listed.get(key).is_some_and(Asker::has_token)
    }

    /// How many bytes the shortest client token has, if there is one.
    pub(super) fn shortest_token(&self) -> Option<usize> {
        let directory = self.directory.load();
        let tokens = directory.listed.iter().filter(|(_, asker)| asker.has_token());
        tokens.map(|(token, _)| token.expose().len()).min()
    }

    /// Whether what a client calls itself is a secret that is known: an account's key, or a token. That is nobody's name.
    pub(super) fn is_secret(&self, name: &HeaderValue) -> bool {
        let Some(key) = name.to_str().ok().and_then(ApiKey::new) else {
            return false;
        };
        self.directory.load().listed.contains_key(&key) || self.make.known.has(&key)
    }

    /// What `tell` says of each listed account.
    pub(super) fn each_listed<T>(&self, tell: impl Fn(&Account) -> T) -> Vec<T> {
        let mut seen = HashSet::new();
        let directory = self.directory.load();
        let accounts = directory.keys().map(|asker| &*asker.account);
        accounts.filter(|account| seen.insert(account.id)).map(tell).collect()
    }

    /// What `tell` says of the unlisted accounts; none can form meanwhile.
    pub(super) fn with_unlisted<T>(&self, tell: impl FnOnce(&mut dyn Iterator<Item = &Account>) -> T) -> T {
        let unlisted = self.unlisted.read();
        tell(&mut unlisted.values().map(|account| &**account))
    }

    /// Queries a second that an account's pace allows while nothing slows it down.
    pub(super) fn full_rate(&self) -> f64 {
        self.directory.load().rules.pace.rate()
    }

    /// How long the process has run.
    pub(super) fn uptime(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.started)
    }

    /// Whether a key that is listed nowhere may go upstream.
    pub(super) fn forwards_unknown(&self) -> bool {
        self.directory.load().rules.unknown_keys == UnknownKeys::Forward
    }

    /// Forgets unlisted accounts that nobody has used in a minute, and of the others the polls of long ago. What upstream
    /// said of keys that have no account stays known as long as it counts: of an accepted one for ten minutes, of a refused
    /// one while any answer may be kept (`may_hold`) that it must not get, the latest `max_accounts` of them.
    pub(super) fn sweep(&self, now: Instant, may_hold: impl Fn(AccountId) -> bool) {
        self.each_listed(|account| account.tally.forget_old(now));
        let (now_ms, oldest) = (self.ms(now), self.ms(now.checked_sub(IDLE).unwrap_or(self.started)));
        let mut unlisted = self.unlisted.write();
        let forgotten: Vec<_> = unlisted
            .extract_if(|_, account| {
                account.tally.forget_old(now);
                // A poll or a flight under way holds the account, too. It may ask upstream long after its poll came, and
                // a budget formed anew knows nothing of that.
                if Arc::strong_count(account) > 1 {
                    account.asked_ms.store(now_ms, Ordering::Relaxed);
                }
                account.asked_ms.load(Ordering::Relaxed) < oldest && !account.budget.is_paused(now)
            })
            .collect();
        drop(unlisted);
        drop(forgotten);
        let most = self.directory.load().rules.max_unlisted;
        self.make.known.sweep(most, |key| {
            if key.is_refused() {
                may_hold(self.make.ids.unlisted(&key.secret))
            } else {
                !key.is_due(now)
            }
        });
    }

    /// Shows each account's rate, its live tasks and their freshness lifetime at `now`; of the unlisted ones, which share
    /// a label, the lowest rate, all live tasks and the longest lifetime.
    pub(super) fn show(&self, now: Instant) {
        let directory = self.directory.load();
        for Asker { account, .. } in directory.keys() {
            account.metrics.rate(account.budget.rate(now));
            account.metrics.live(account.watch.live(now), account.lifetime(now));
        }
        let unlisted = self.unlisted.read();
        let nobody = (directory.rules.pace.rate(), 0, directory.rules.fresh.floor);
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
        millis(now.saturating_duration_since(self.started))
    }
}

impl Directory {
    /// Who presents each listed key; client tokens are no keys.
    fn keys(&self) -> impl Iterator<Item = &Asker> {
        self.listed.values().filter(|asker| !asker.has_token())
    }

    /// The account that lists a key.
    fn account(&self, key: &ApiKey) -> Option<&Arc<Account>> {
        let asker = self.listed.get(key).filter(|asker| !asker.has_token())?;
        Some(&asker.account)
    }

    /// What a key spends that is listed, or was.
    fn budget(&self, key: &ApiKey) -> Option<&Budget> {
        let listed = self.account(key).map(|account| &account.budget);
        listed.or_else(|| self.retired.get(key))
    }

    /// Budgets under which keys have come that spent another one `before`.
    fn gained(&self, before: &Self) -> Vec<Gained> {
        let listed = self.keys().map(|asker| (&asker.key.secret, &asker.account.budget));
        let moved = |(key, budget): (&ApiKey, &Budget)| Gained::over(before.budget(key)?, budget);
        listed.chain(&self.retired).filter_map(moved).collect()
    }

    /// Budgets under which keys of an account come here that is of another directory, or unlisted, if they are others than
    /// its own.
    fn superseding(&self, account: &Account) -> impl Iterator<Item = Gained> {
        let budgets = account.keys.iter().filter_map(|key| self.budget(&key.secret));
        budgets.filter_map(|budget| Gained::over(&account.budget, budget))
    }
}

/// A budget under which a key comes, and the one that it spent.
struct Gained {
    budget: Budget,
    spent: Budget,
}

impl Gained {
    fn over(spent: &Budget, budget: &Budget) -> Option<Self> {
        (!spent.is(budget)).then(|| Self {
            budget: budget.clone(),
            spent: spent.clone(),
        })
    }
}

/// Who presents an unlisted key, whose account this is.
fn of_its_own(account: Arc<Account>) -> Result<Asker, Error> {
    let key = account.keys.first().cloned().ok_or(Error::Internal)?;
    let token = None;
    Ok(Asker { account, key, token })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::Caller;
    use crate::config::{self, Key, KeySource};
    use crate::dial::tcp;

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
        let shared = Replica::start(&config, &metrics).unwrap();
        Accounts::new(&config, upstream, shared, metrics, Instant::now())
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
            self.unlisted.read().len()
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
    async fn a_key_that_is_listed_no_longer_keeps_its_budget_unless_a_new_replica_could_not_know_it() {
        for is_shared in [false, true] {
            let store = config::Store {
                url: config::StoreUrl {
                    is_tls: false,
                    addresses: vec![("127.0.0.1".to_owned(), 1)],
                    service: None,
                    db: 0,
                },
                prefix: "test:".to_owned(),
                max_bytes: 0,
                username: None,
                password: None,
                sentinel_password: None,
                ca_file: None,
                connect_timeout: Duration::from_secs(1),
                timeout: Duration::from_millis(200),
            };
            let shared = is_shared.then(|| config::Shared {
                max_replicas: std::num::NonZeroU32::MIN,
                store: Some(store),
            });
            let accounts = directory(|config| config.shared.clone_from(&shared));
            let listed = accounts.asked_at(0, MUSIC[0]);
            tokio::time::advance(Duration::from_secs(10)).await;
            accounts.configure(&Config {
                shared,
                ..Config::default()
            });
            let [one, other] = MUSIC.map(|key| accounts.asked_at(10, key).budget.clone());
            assert_eq!(one.is(&listed.budget), !is_shared);
            assert_eq!(one.is(&other), !is_shared);
            assert_eq!(listed.superseded.is_cancelled(), is_shared);
            let held = Duration::from_millis(if is_shared { 1030 } else { 0 });
            assert_eq!(one.paused_for(Instant::now()), held);
        }
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
        assert_eq!(
            budget.rate_limited(pause, accounts.at(0), accounts.at(0)),
            Duration::from_mins(5)
        );
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
    async fn a_token_says_more_of_a_client_than_its_certificate_and_that_more_than_its_address() {
        let accounts = directory(|config| {
            config.accounts[0].clients.push(config::Client {
                name: "studio".to_owned(),
                token: Key {
                    key: key("token"),
                    source: KeySource::Env("TOKEN".to_owned()),
                },
                weight: 1,
                passthrough: false,
            });
        });
        let certificate = Caller::Certificate("laptop".into());
        let address = Caller::from(std::net::IpAddr::from([10, 0, 0, 1]));
        let caller = |text: &str, caller: &Caller| {
            let asker = accounts.of(&key(text), accounts.at(0)).unwrap();
            asker.client(caller, None).caller
        };
        assert_eq!(caller("token", &certificate), Caller::Token("studio".into()));
        assert_eq!(caller(MUSIC[0], &certificate), certificate);
        assert_eq!(caller(MUSIC[0], &address), address);
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
