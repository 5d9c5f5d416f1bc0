//! What a poll gets while upstream is slow or away, and the probes that find out when it is back.
//!
//! While the breaker is open, snapshots are served, polls without one are refused at once, and nothing is spent but on
//! probes: a probe is paid for like every query, its answer is kept like any other, and no client waits for it.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::accounts::Account;
use super::admission::leave_behind;
use super::asker::Asker;
use super::attempt::Attempt;
use super::{Answered, FlightKey, FlightTrace, Gateway, Landed, Phase, Poll, Progress, SLOW_ATTEMPT};
use crate::budget::Entry;
use crate::error::Error;
use crate::flight::Leader;
use crate::task::TaskId;
use crate::upstream::Probe;

/// How long a probe waits for connection and permit before another account's may go: its own may have been paused.
const PROBE_PATIENCE: Duration = Duration::from_millis(1500);

/// The first attempt, and a probe's only one.
const FIRST: u32 = 1;

impl Gateway {
    /// Why a poll is not let through while the breaker is open. A probe goes in its place, if one is due.
    pub(super) fn turn_away(self: &Arc<Self>, asker: &Asker, task: &TaskId) -> Error {
        let now = Instant::now();
        // A paused account's probe would hold up the others'.
        if !asker.account.budget.is_paused(now)
            && let Some(probe) = self.upstream.breaker().probe(task, now)
        {
            self.spawn(Arc::clone(self).probe(probe, asker.clone(), task.clone()));
        }
        self.unavailable()
    }

    /// Lands a flight of `account` that may go no further, unspent.
    pub(super) fn give_up(&self, leader: Leader<FlightKey, Progress>, account: &Account) {
        leader.land(self.given_up(account).stage());
    }

    /// How such a flight ends: the account is no longer what it was, or the breaker is open, or nobody is there to hear it.
    pub(super) fn given_up(&self, account: &Account) -> Landed {
        if account.superseded.is_cancelled() {
            Landed::Superseded
        } else {
            Landed::Failed(self.unavailable())
        }
    }

    /// Why nobody flies while the breaker is open.
    pub(super) fn unavailable(&self) -> Error {
        Error::UpstreamUnavailable {
            retry_after: self.upstream.breaker().until_probe(Instant::now()),
        }
    }

    /// Asks for a task in the background, to learn whether upstream is back. Without an answer that says so, dropping
    /// `probe` lets the next one start.
    async fn probe(self: Arc<Self>, probe: Probe, asker: Asker, task: TaskId) {
        let account = &asker.account;
        let standing = account.budget.standing(None);
        // In the background lane: nobody stands in the queue for it.
        standing.keep();
        let approach = async {
            let turn = standing.enter(Entry::InTurn).await.ok()?;
            let ready = account.pool.connect_to_probe(&task).await.ok()?;
            let permit = turn.permit(&ready).await?;
            Some((ready, permit))
        };
        let approached = tokio::select! {
            biased;
            // Its key may be another budget's by now.
            () = account.superseded.cancelled() => None,
            approached = timeout(PROBE_PATIENCE, approach) => approached.ok().flatten(),
        };
        if let Some((ready, permit)) = approached {
            // What comes of it, `ask` tells the breaker.
            let trace = FlightTrace::begin(self.exporter.as_ref(), "probe");
            let attempt = Attempt::new(FIRST, &trace);
            let _ = self.ask(account, &asker.key, &task, attempt, ready, permit).await;
        }
        drop(probe);
    }

    /// The snapshot, once an attempt takes long or the breaker opens. Never ends where there is no snapshot any more.
    ///
    /// Cancel safe.
    pub(super) async fn snapshot_when_slow(
        &self,
        poll: &Poll<'_>,
        mut progress: watch::Receiver<Progress>,
    ) -> Answered {
        let detail = loop {
            let slow = match progress.borrow_and_update().phase {
                Phase::Waiting => None,
                Phase::Elsewhere(since) | Phase::Connecting(since) | Phase::Sent(since) => Some(since + SLOW_ATTEMPT),
            };
            tokio::select! {
                biased;
                Ok(()) = progress.changed() => {}
                () = self.upstream.breaker().opened() => break self.unavailable().detail(),
                () = sleep_until(slow.unwrap_or_else(Instant::now)), if slow.is_some() => break "upstream_slow",
            }
        };
        match self.stand_in(poll, detail) {
            Some(answered) => {
                leave_behind(progress);
                answered
            }
            None => pending().await,
        }
    }
}
