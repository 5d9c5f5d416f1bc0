//! An account: what everybody who polls with one of its keys shares.

use std::iter;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::keys::{Key, Refusal};
use super::others::Others;
use super::tally::Tally;
use crate::account::AccountId;
use crate::budget::Budget;
use crate::config;
use crate::metrics::{AccountMetrics, ClientRequests};
use crate::moment::Moment;
use crate::outcome::Served;
use crate::stored::{Answer, Owner};
use crate::task::TaskId;
use crate::upstream::Pool;
use crate::watch::Watch;

/// An account.
#[derive(Debug)]
pub(super) struct Account {
    pub(super) id: AccountId,
    /// What stands for it where answers outlive the process.
    pub(super) owner: Owner,
    /// The configured name, or `other`: metric label and log field.
    pub(super) label: Arc<str>,
    pub(super) budget: Budget,
    pub(super) pool: Pool,
    pub(super) watch: Arc<Watch>,
    pub(super) metrics: AccountMetrics,
    /// Of the unlisted ones that ever formed, which one it is: all that may be told of its name.
    pub(super) number: Option<u64>,
    pub(super) tally: Arc<Tally>,
    /// The counters of clients that are not configured.
    pub(super) others: Arc<Others>,
    /// Upstream's 402.
    pub(super) credits: Arc<Refusal>,
    /// Its keys, in their order: what client tokens stand for.
    pub(super) keys: Vec<Arc<Key>>,
    /// Cancelled: one of its keys has come under another budget. What is not sent yet has to be asked for anew.
    pub(super) superseded: CancellationToken,
    /// Milliseconds from the process's start to the last poll, or to the last sweep that found it in use.
    pub(super) asked_ms: AtomicU64,
}

impl Account {
    /// A key's place among the account's, from 1: all of it that a log may say. 0 when it is listed no longer.
    pub(super) fn place(&self, key: &Key) -> usize {
        let place = self.keys.iter().position(|own| own.number == key.number);
        place.map_or(0, |place| place + 1)
    }

    /// What one of its keys sealed for `owner`, opened as of `now`, and that key.
    pub(super) fn open(
        &self,
        owner: Owner,
        task: &TaskId,
        sealed: Vec<u8>,
        now: Moment,
        cache: &config::Cache,
    ) -> Option<(&Arc<Key>, Answer)> {
        // A key that did not seal it leaves nothing of it: each has a copy of its own, but for the last one.
        let copies = iter::repeat_n(sealed, self.keys.len());
        self.keys.iter().zip(copies).find_map(|(key, sealed)| {
            let draft = key.seal.open(owner, task, sealed, now, cache)?;
            Some((key, draft.of(self.id, task)))
        })
    }

    /// Upstream said `answer` of a task, which was known to have ended or not: whether it goes on, as of `at`.
    pub(super) fn told(&self, task: &TaskId, answer: &Answer, had_ended: bool, at: Instant) {
        if answer.has_ended() {
            self.watch.ended(task);
        } else if answer.is_live() && !had_ended {
            // A late `running` says nothing about a task that is known to have ended.
            self.watch.goes_on(task, at);
        }
    }

    /// The freshness lifetime of its live answers at `now`.
    pub(super) fn lifetime(&self, now: Instant) -> Duration {
        self.watch.lifetime(self.budget.rate(now), now)
    }

    /// Counts a poll of `client` that was answered `served` with `code`, `after` its arrival, and whether it `has_flown`.
    pub(super) fn answered(
        &self,
        client: &ClientRequests,
        served: Served,
        has_flown: bool,
        code: u16,
        after: Duration,
    ) {
        self.tally.count(served, has_flown);
        self.metrics.answered(client, served, code, after);
        if !has_flown {
            self.metrics.saved(served);
        }
    }
}
