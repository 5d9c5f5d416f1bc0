//! What the gateway tells of itself at one instant: the admin port's `/status.json`, which the status page draws.
//!
//! Field names and units stand in the README and stay as they are. No key is in it, nor anything derived from one: an
//! unlisted account goes by the number in which it came. All listed accounts are told of, of the unlisted ones those that
//! ask most, so that it costs about the same however many there are. Nothing is changed by looking.

use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::Gateway;
use super::account::Account;
use super::tally::Polls;
use crate::account::{Caller, Client};
use crate::budget::Usage;
use crate::outcome::Served;

/// Of the unlisted accounts, so many are told of.
const MOST_UNLISTED: usize = 20;

/// Everything that the status page shows.
#[derive(Debug, Serialize)]
pub struct Status {
    version: &'static str,
    uptime_seconds: f64,
    /// Queries a second that upstream allows each account.
    limit: u32,
    /// Queries a second that an account's pace allows while nothing slows it down: `limit` less the margin.
    full_rate: f64,
    client_connections: i64,
    upstream: UpstreamStatus,
    cache: CacheSize,
    /// `None`: no replicas share budgets through a store.
    shared: Option<SharedStatus>,
    /// The listed ones by name, then those of the unlisted ones that ask most, in the order in which they came.
    accounts: Vec<AccountStatus>,
    other_accounts: OtherAccounts,
}

#[derive(Debug, Serialize)]
struct UpstreamStatus {
    host: String,
    /// `closed`, or `open` while upstream is only probed.
    breaker: &'static str,
    /// Until the next probe may go.
    next_probe_seconds: f64,
    /// Nine answers in ten took no longer, lately.
    p90_seconds: f64,
    connections: i64,
}

#[derive(Debug, Serialize)]
struct CacheSize {
    entries: i64,
    bytes: i64,
}

#[derive(Debug, Serialize)]
struct SharedStatus {
    /// How this replica takes part: `waiting`, `lending`, `cut_off` or `alone`.
    standing: &'static str,
    /// Replicas that lend, as the store said last; 0 without its word.
    leases: u32,
    max_replicas: u32,
}

#[derive(Debug, Serialize)]
struct AccountStatus {
    name: String,
    listed: bool,
    /// Queries a second that the pace allows now.
    rate: f64,
    /// What part of the limit is this replica's, as things stand.
    share: f64,
    /// For how long upstream's 429 pauses it yet.
    paused_seconds: f64,
    /// In each of the last whole seconds, the oldest first.
    queries: Vec<u32>,
    /// Flights that wait for a permit.
    waiting: usize,
    queue: Queue,
    live_tasks: usize,
    freshness_seconds: f64,
    polls: PollsStatus,
    polls_total: PollsStatus,
    spent: Spent,
}

#[derive(Debug, Serialize)]
struct Queue {
    clients: usize,
    by_client: Vec<Named<Places>>,
    background: usize,
}

#[derive(Debug, Serialize)]
struct Spent {
    span_seconds: f64,
    by_client: Vec<Named<Permits>>,
    background: u64,
    rest: u64,
}

#[derive(Debug, Serialize)]
struct Places {
    flights: usize,
}

#[derive(Debug, Serialize)]
struct Permits {
    permits: u64,
}

/// A client, and what there is to say of it.
#[derive(Debug, Serialize)]
struct Named<T> {
    /// A token's configured name, the name in the client's certificate, or the peer's address.
    caller: String,
    has_token: bool,
    /// What the client calls itself, free text.
    name: Option<String>,
    #[serde(flatten)]
    count: T,
}

#[derive(Debug, Serialize)]
struct PollsStatus {
    span_seconds: f64,
    hit: u64,
    collapsed: u64,
    stale: u64,
    forwarded: u64,
    refused: u64,
    /// Hits, collapsed and stale ones that opened no flight of their own.
    calls_saved: u64,
}

/// Unlisted accounts that are not told of one by one.
#[derive(Debug, Serialize)]
struct OtherAccounts {
    accounts: usize,
    waiting: usize,
    /// In the last three minutes.
    queries: u64,
}

impl Gateway {
    /// What the gateway is doing now.
    pub fn status(&self) -> Status {
        let now = Instant::now();
        let breaker = self.upstream.breaker();
        let (accounts, other_accounts) = self.accounts_status(now);
        Status {
            version: env!("CARGO_PKG_VERSION"),
            uptime_seconds: self.accounts.uptime(now).as_secs_f64(),
            limit: self.config.load().budget.limit.get(),
            full_rate: self.accounts.full_rate(),
            client_connections: self.metrics.connections.get(),
            upstream: UpstreamStatus {
                host: self.upstream.host().to_str().unwrap_or_default().to_owned(),
                breaker: if breaker.is_open() { "open" } else { "closed" },
                next_probe_seconds: breaker.until_probe(now).as_secs_f64(),
                p90_seconds: self.upstream.p90(now).as_secs_f64(),
                connections: self.metrics.upstream_connections.get(),
            },
            cache: CacheSize {
                entries: self.metrics.cache_entries.get(),
                bytes: self.metrics.cache_bytes.get(),
            },
            shared: self.replica.as_ref().map(|replica| SharedStatus {
                standing: replica.standing(now).into(),
                leases: replica.alive(),
                max_replicas: replica.max_replicas(),
            }),
            accounts,
            other_accounts,
        }
    }

    /// The accounts to tell of, and the rest.
    fn accounts_status(&self, now: Instant) -> (Vec<AccountStatus>, OtherAccounts) {
        let tell = |account: &Account| AccountStatus::new(account, now);
        let mut accounts = self.accounts.each_listed(tell);
        accounts.sort_by(|account, other| account.name.cmp(&other.name));
        let (unlisted, rest) = self.accounts.with_unlisted(|unlisted| {
            let activity = |account: &Account| (account.budget.recent(now), account.budget.waiting());
            let mut ranked: Vec<_> = unlisted.map(|account| (activity(account), account)).collect();
            let told = ranked.len().min(MOST_UNLISTED);
            let order = |((queries, waiting), account): &((u64, usize), &Account)| {
                let activity = queries.saturating_add(u64::try_from(*waiting).unwrap_or(u64::MAX));
                (std::cmp::Reverse(activity), account.number)
            };
            if told < ranked.len() {
                ranked.select_nth_unstable_by_key(told, order);
            }
            let rest = ranked.split_off(told);
            // In an order that does not change from one look to the next.
            ranked.sort_by_key(|(_, account)| account.number);
            let told: Vec<_> = ranked.into_iter().map(|(_, account)| tell(account)).collect();
            let rest = OtherAccounts {
                accounts: rest.len(),
                waiting: rest.iter().map(|((_, waiting), _)| waiting).sum(),
                queries: rest.iter().map(|((queries, _), _)| queries).sum(),
            };
            (told, rest)
        });
        accounts.extend(unlisted);
        (accounts, rest)
    }
}

impl AccountStatus {
    fn new(account: &Account, now: Instant) -> Self {
        let budget = &account.budget;
        let paused = if budget.is_paused(now) {
            budget.paused_for(now)
        } else {
            Duration::ZERO
        };
        let (span, polls) = account.tally.lately(now);
        let Usage {
            clients,
            places,
            background,
            spent,
        } = budget.usage();
        Self {
            name: account
                .number
                .map_or_else(|| account.label.to_string(), |number| format!("other #{number}")),
            listed: account.number.is_none(),
            rate: budget.rate(now),
            share: budget.share(now),
            paused_seconds: paused.as_secs_f64(),
            queries: budget.history(now),
            waiting: budget.waiting(),
            queue: Queue {
                clients,
                by_client: named(places, |flights| Places { flights }),
                background,
            },
            live_tasks: account.watch.live(now),
            freshness_seconds: account.lifetime(now).as_secs_f64(),
            polls: PollsStatus::new(span, polls),
            polls_total: PollsStatus::new(account.tally.age(now), account.tally.total()),
            spent: Spent {
                span_seconds: spent.span.as_secs_f64(),
                by_client: named(spent.by_client, |permits| Permits { permits }),
                background: spent.background,
                rest: spent.rest,
            },
        }
    }
}

fn named<N, T>(clients: Vec<(Client, N)>, count: impl Fn(N) -> T) -> Vec<Named<T>> {
    let name = |(client, number): (Client, N)| {
        let (caller, has_token) = match client.caller {
            Caller::Token(name) => (name.to_string(), true),
            Caller::Certificate(name) => (name.to_string(), false),
            Caller::Address(address) => (address.to_string(), false),
        };
        Named {
            caller,
            has_token,
            name: client.name.map(|name| name.to_string()),
            count: count(number),
        }
    };
    clients.into_iter().map(name).collect()
}

impl PollsStatus {
    fn new(span: Duration, polls: Polls) -> Self {
        Self {
            span_seconds: span.as_secs_f64(),
            hit: polls.of(Served::Hit),
            collapsed: polls.of(Served::Collapsed),
            stale: polls.of(Served::Stale),
            forwarded: polls.of(Served::Miss),
            refused: polls.of(Served::None),
            calls_saved: polls.saved(),
        }
    }
}
