//! What accounts are made of: formed as configuration lists them, or by an unlisted key that is asked with, and formed anew
//! where a changed configuration says something else of one.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::super::account::Account;
use super::super::asker::{Asker, Token};
use super::super::keys::{Key, Refusal};
use super::super::others::Others;
use super::super::tally::Tally;
use super::known::Known;
use crate::account::{AccountId, AccountIds, ApiKey};
use crate::budget::{Budget, Pace};
use crate::config::{self, Config, Fresh, UnknownKeys};
use crate::metrics::{AccountMetrics, Metrics, OTHER};
use crate::shared::Replica;
use crate::stored::Owner;
use crate::upstream::Upstream;
use crate::watch::Watch;

/// What accounts are made of, whatever configuration says.
#[derive(Debug)]
pub(super) struct Maker {
    pub(super) ids: AccountIds,
    pub(super) upstream: Upstream,
    pub(super) metrics: Arc<Metrics>,
    /// The handles that all unlisted accounts share.
    pub(super) other: AccountMetrics,
    pub(super) others: Arc<Others>,
    pub(super) known: Known,
    /// By which replicas share the budgets.
    pub(super) replica: Option<Replica>,
    /// Unlisted accounts that ever formed.
    pub(super) unlisted: AtomicU64,
}

/// What configuration says of every account.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) unknown_keys: UnknownKeys,
    pub(super) max_unlisted: usize,
    /// A new account's.
    pub(super) pace: Pace,
    pub(super) max_queue: usize,
    pub(super) fresh: Fresh,
}

impl Rules {
    pub(super) fn of(config: &Config, started: Instant) -> Self {
        let margin = config.budget.margin;
        let second = Duration::from_secs(1) + margin;
        let (limit, hold) = match &config.shared {
            // Without a store each replica owns its part, and never more.
            Some(shared) if shared.store.is_none() => {
                let part = config.budget.limit.get() / shared.max_replicas;
                (NonZeroU32::new(part).unwrap_or(NonZeroU32::MIN), second)
            }
            Some(_) => (config.budget.limit, Replica::hold(config)),
            None => (config.budget.limit, second),
        };
        Self {
            unknown_keys: config.unknown_keys,
            max_unlisted: config.max_accounts,
            pace: Pace {
                limit,
                margin,
                not_before: started + hold,
            },
            max_queue: config.budget.max_queue,
            fresh: config.cache.fresh,
        }
    }

    /// Brings them to a budget that is there, which grants nothing before `not_before`.
    pub(super) fn hold_for(&self, budget: &Budget, not_before: Instant) {
        let pace = Pace {
            not_before,
            ..self.pace
        };
        budget.configure(pace, self.max_queue);
    }
}

impl Maker {
    /// The budget of a configured account.
    pub(super) fn listed_budget(&self, name: &str, rules: &Rules) -> Budget {
        let shared = self
            .replica
            .as_ref()
            .map(|replica| replica.budget(&format!("name:{name}")));
        Budget::new(rules.pace, rules.max_queue, shared, self.metrics.account(name))
    }

    /// The budget of an account that an unlisted key forms.
    pub(super) fn unlisted_budget(&self, key: &ApiKey, rules: &Rules) -> Budget {
        let budget = |replica: &Replica| replica.budget(&format!("key:{}", key.digest()));
        let shared = self.replica.as_ref().map(budget);
        Budget::new(rules.pace, rules.max_queue, shared, self.other.clone())
    }

    /// The same of a key that `account` lists no longer: what it spent before, or, where replicas share budgets, what it
    /// spends at those that never knew it listed.
    pub(super) fn retired_budget(&self, key: &ApiKey, account: &Account, rules: &Rules) -> Budget {
        match self.replica {
            Some(_) => self.unlisted_budget(key, rules),
            None => account.budget.clone(),
        }
    }

    /// A configured account. Of the one before under its name, `prior`, it keeps all that its keys do not decide.
    pub(super) fn listed(
        &self,
        configured: &config::Account,
        prior: Option<&Arc<Account>>,
        budget: Budget,
        rules: &Rules,
    ) -> Arc<Account> {
        let secrets = || configured.keys.iter().map(|listed| &listed.key);
        if let Some(prior) = prior {
            prior.watch.configure(rules.fresh);
            if secrets().eq(prior.keys.iter().map(|key| &key.secret)) {
                return Arc::clone(prior);
            }
        }
        let id = (self.ids.listed(&configured.name), Owner::listed(&configured.name));
        let label = configured.name.as_str().into();
        let metrics = self.metrics.account(&configured.name);
        let others = prior.map_or_else(
            || Arc::new(Others::new(&configured.name, Arc::clone(&self.metrics))),
            |prior| Arc::clone(&prior.others),
        );
        let key = |secret| self.known.key(secret, &metrics.keys_refused);
        let keys = secrets().map(key).collect();
        let account = self.account(id, label, keys, budget, rules, metrics, others);
        Arc::new(match prior {
            Some(prior) => Account {
                pool: prior.pool.clone(),
                watch: Arc::clone(&prior.watch),
                credits: Arc::clone(&prior.credits),
                tally: Arc::clone(&prior.tally),
                ..account
            },
            None => account,
        })
    }

    /// Who may present what, by key and by client token.
    pub(super) fn askers(&self, configured: &[config::Account], accounts: Vec<Arc<Account>>) -> HashMap<ApiKey, Asker> {
        let mut listed = HashMap::new();
        for (configured, account) in configured.iter().zip(accounts) {
            for client in &configured.clients {
                let token = Arc::new(Token {
                    name: client.name.as_str().into(),
                    weight: client.weight,
                    passthrough: client.passthrough,
                    requests: Arc::new(self.metrics.client(&configured.name, &client.name)),
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
        listed
    }

    pub(super) fn unlisted(&self, secret: &ApiKey, budget: Budget, rules: &Rules, asked_ms: u64) -> Account {
        let key = self.known.key(secret, &self.other.keys_refused);
        let id = (self.ids.unlisted(secret), Owner::unlisted(secret));
        let (metrics, others) = (self.other.clone(), Arc::clone(&self.others));
        Account {
            number: Some(self.unlisted.fetch_add(1, Ordering::Relaxed) + 1),
            asked_ms: AtomicU64::new(asked_ms),
            ..self.account(id, OTHER.into(), vec![key], budget, rules, metrics, others)
        }
    }

    #[allow(clippy::too_many_arguments, reason = "they are what an account is")]
    fn account(
        &self,
        (id, owner): (AccountId, Owner),
        label: Arc<str>,
        keys: Vec<Arc<Key>>,
        budget: Budget,
        rules: &Rules,
        metrics: AccountMetrics,
        others: Arc<Others>,
    ) -> Account {
        Account {
            id,
            owner,
            label,
            budget,
            pool: self.upstream.pool(),
            watch: Arc::new(Watch::new(rules.fresh)),
            credits: Arc::new(Refusal::new(metrics.credits_missing.clone())),
            metrics,
            number: None,
            tally: Arc::new(Tally::new(Instant::now())),
            others,
            keys,
            superseded: CancellationToken::new(),
            asked_ms: AtomicU64::new(0),
        }
    }
}
