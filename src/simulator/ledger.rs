//! What the simulated upstream remembers: accounts with their arrivals and tasks, and what `/__stats` tells of them.
//!
//! Keys are only ever looked up; no figure carries one. Pure: stamps come from the connections.

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;

use super::options::AccountKeys;
use super::window::Window;

/// Tasks remembered at once, of all accounts. One beyond is first seen at each request.
const MAX_TASKS: usize = 1_000_000;
/// Ids and paths told by `/__stats`.
const MAX_TOLD: usize = 100_000;

/// See the module.
pub(super) struct Ledger {
    limit: usize,
    /// The keys that share an account.
    shared: Vec<AccountKeys>,
    accounts: Vec<Account>,
    by_key: HashMap<String, usize>,
    tasks: usize,
    requests: u64,
    rate_limited: u64,
    first_arrival: Option<u64>,
    last_arrival: Option<u64>,
    connections: u64,
    paths: HashMap<String, u64>,
}

struct Account {
    window: Window,
    /// Which of the shared sets formed it.
    shared: Option<usize>,
    tasks: HashMap<String, Task>,
}

#[derive(Default)]
struct Task {
    requests: u64,
    sight: Option<Sight>,
}

/// A task, as a request that was let through finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sight {
    /// In nanoseconds of the wall clock.
    pub(super) first_seen: u64,
    /// The latest arrival so far; a task's time does not run backwards.
    latest: u64,
    /// One at first.
    pub(super) times: u64,
}

impl Sight {
    /// How long ago the task was first seen.
    pub(super) fn age(&self) -> Duration {
        Duration::from_nanos(self.latest - self.first_seen)
    }
}

/// What becomes of an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// No key: nobody's.
    NoKey,
    /// The account's second is full.
    OverLimit,
    /// Within the limit, and without an id.
    NoTask,
    /// Within the limit.
    Seen(Sight),
}

#[derive(Serialize)]
struct Stats<'a> {
    requests: u64,
    rate_limited: u64,
    violations: u64,
    highest_in_any_second: usize,
    first_arrival_unix_ns: Option<u64>,
    last_arrival_unix_ns: Option<u64>,
    connections: u64,
    paths: &'a HashMap<String, u64>,
    tasks: HashMap<&'a str, u64>,
    accounts: Vec<AccountStats>,
}

#[derive(Serialize)]
struct AccountStats {
    requests: u64,
    violations: u64,
    highest_in_any_second: usize,
}

impl Ledger {
    pub(super) fn new(limit: usize, shared: Vec<AccountKeys>) -> Self {
        Self {
            limit,
            shared,
            accounts: Vec::new(),
            by_key: HashMap::new(),
            tasks: 0,
            requests: 0,
            rate_limited: 0,
            first_arrival: None,
            last_arrival: None,
            connections: 0,
            paths: HashMap::new(),
        }
    }

    /// Forgets everything.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.limit, std::mem::take(&mut self.shared));
    }

    /// A connection was opened.
    pub(super) fn opened(&mut self) {
        self.connections += 1;
    }

    /// A request for a path that is not `TaskInfo`.
    pub(super) fn elsewhere(&mut self, path: &str) {
        if let Some(count) = self.paths.get_mut(path) {
            *count += 1;
        } else if self.paths.len() < MAX_TOLD {
            self.paths.insert(path.to_owned(), 1);
        }
    }

    /// A `TaskInfo` query that arrived at `stamp`.
    pub(super) fn arrived(&mut self, key: Option<&str>, id: Option<&str>, stamp: u64) -> Verdict {
        self.requests += 1;
        self.first_arrival = Some(self.first_arrival.map_or(stamp, |first| first.min(stamp)));
        self.last_arrival = Some(self.last_arrival.map_or(stamp, |last| last.max(stamp)));
        let Some(key) = key else {
            return Verdict::NoKey;
        };
        let number = self.account_of(key);
        let account = &mut self.accounts[number];
        let within = account.window.record(stamp);
        if !within {
            self.rate_limited += 1;
        }
        let Some(id) = id else {
            return if within { Verdict::NoTask } else { Verdict::OverLimit };
        };
        let mut unremembered = Task::default();
        let task = if account.tasks.contains_key(id) || self.tasks < MAX_TASKS {
            account.tasks.entry(id.to_owned()).or_insert_with(|| {
                self.tasks += 1;
                Task::default()
            })
        } else {
            &mut unremembered
        };
        task.requests += 1;
        if within {
            Verdict::Seen(task.seen(stamp))
        } else {
            Verdict::OverLimit
        }
    }

    /// The figures, as JSON.
    pub(super) fn stats(&self) -> serde_json::Result<String> {
        let mut tasks = HashMap::new();
        for (id, task) in self.accounts.iter().flat_map(|account| &account.tasks) {
            if tasks.len() < MAX_TOLD || tasks.contains_key(id.as_str()) {
                *tasks.entry(id.as_str()).or_default() += task.requests;
            }
        }
        let windows = || self.accounts.iter().map(|account| &account.window);
        serde_json::to_string(&Stats {
            requests: self.requests,
            rate_limited: self.rate_limited,
            violations: windows().map(Window::violations).sum(),
            highest_in_any_second: windows().map(Window::highest).max().unwrap_or(0),
            first_arrival_unix_ns: self.first_arrival,
            last_arrival_unix_ns: self.last_arrival,
            connections: self.connections,
            paths: &self.paths,
            tasks,
            accounts: windows()
                .map(|window| AccountStats {
                    requests: window.requests(),
                    violations: window.violations(),
                    highest_in_any_second: window.highest(),
                })
                .collect(),
        })
    }

    fn account_of(&mut self, key: &str) -> usize {
        if let Some(&number) = self.by_key.get(key) {
            return number;
        }
        let shared = self.shared.iter().position(|keys| keys.contains(key));
        let known = shared.and_then(|_| self.accounts.iter().position(|account| account.shared == shared));
        let number = known.unwrap_or_else(|| {
            self.accounts.push(Account {
                window: Window::new(self.limit),
                shared,
                tasks: HashMap::new(),
            });
            self.accounts.len() - 1
        });
        self.by_key.insert(key.to_owned(), number);
        number
    }
}

impl Task {
    fn seen(&mut self, stamp: u64) -> Sight {
        let sight = self.sight.get_or_insert(Sight {
            first_seen: stamp,
            latest: stamp,
            times: 0,
        });
        sight.latest = sight.latest.max(stamp);
        sight.times += 1;
        *sight
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const MS: u64 = 1_000_000;
    const START: u64 = 1_768_900_378_000 * MS;

    fn ledger(limit: usize, shared: &[&str]) -> Ledger {
        let Ok(shared) = shared.iter().map(|keys| keys.parse()).collect();
        Ledger::new(limit, shared)
    }

    fn stats(ledger: &Ledger) -> Value {
        serde_json::from_str(&ledger.stats().unwrap()).unwrap()
    }

    #[test]
    fn each_key_has_a_limit_of_its_own_unless_it_shares_an_account() {
        let mut ledger = ledger(1, &["a,b"]);
        assert!(matches!(ledger.arrived(Some("a"), Some("t"), START), Verdict::Seen(_)));
        assert_eq!(ledger.arrived(Some("b"), Some("t"), START + MS), Verdict::OverLimit);
        assert!(matches!(
            ledger.arrived(Some("c"), Some("t"), START + MS),
            Verdict::Seen(_)
        ));
        let stats = stats(&ledger);
        assert_eq!(stats["accounts"].as_array().unwrap().len(), 2);
        assert_eq!(stats["accounts"][0]["violations"], 1);
        assert_eq!(stats["tasks"]["t"], 3);
        assert_eq!((&stats["requests"], &stats["rate_limited"]), (&3.into(), &1.into()));
    }

    #[test]
    fn a_task_starts_when_first_let_through_and_its_time_never_runs_backwards() {
        let mut ledger = ledger(15, &[]);
        let mut age_at = |stamp| {
            let verdict = ledger.arrived(Some("k"), Some("t"), stamp);
            let Verdict::Seen(sight) = verdict else {
                panic!("{verdict:?}");
            };
            (sight.age(), sight.times)
        };
        assert_eq!(age_at(START), (Duration::ZERO, 1));
        assert_eq!(age_at(START + 5 * MS), (Duration::from_millis(5), 2));
        assert_eq!(age_at(START + 4 * MS), (Duration::from_millis(5), 3));
    }

    #[test]
    fn no_figure_carries_a_key_and_a_reset_forgets_all() {
        let mut ledger = ledger(15, &["ak_secret,ak_other"]);
        ledger.arrived(Some("ak_secret"), Some("t"), START);
        ledger.arrived(None, None, START);
        ledger.opened();
        ledger.elsewhere("/x");
        assert!(!ledger.stats().unwrap().contains("ak_"));
        ledger.reset();
        let stats = stats(&ledger);
        assert_eq!(stats["requests"], 0);
        assert_eq!(stats["connections"], 0);
        assert_eq!(stats["paths"], serde_json::json!({}));
        assert_eq!(stats["first_arrival_unix_ns"], Value::Null);
    }
}
