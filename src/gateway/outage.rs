//! What a poll gets while upstream is away, and the probes that find out when it is back.
//!
//! While the breaker is open, snapshots are served, polls without one are refused at once, and nothing is spent but on
//! probes: a probe is paid for like every query, its answer is kept like any other, and no client waits for it.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use super::Gateway;
use super::account::Account;
use super::asker::Asker;
use super::attempt::Attempt;
use super::progress::Landed;
use super::traced::FlightTrace;
use crate::budget::{Entry, Permit};
use crate::error::Error;
use crate::task::TaskId;
use crate::upstream::{Probe, Ready};

/// How long a probe waits for its connection before another may go: an upstream that is back is found out soon, and so is
/// one that is not.
const PROBE_CONNECT_TIMEOUT: Duration = Duration::from_millis(400);

/// How long a probe waits for its permit before another account's may go: its own may have been paused.
const PROBE_PATIENCE: Duration = Duration::from_millis(1500);

impl Gateway {
    /// Why a poll is not let through while the breaker is open. A probe goes in its place once one is due, unless others go
    /// first.
    pub(super) fn turn_away(self: &Arc<Self>, asker: &Asker, task: &TaskId) -> Error {
        let now = Instant::now();
        let breaker = self.upstream.breaker();
        // A paused account's probe would hold up the others'.
        if !asker.account.budget.is_paused(now)
            && let Some(turn) = breaker.line_up(asker.account.id, task)
        {
            tokio::spawn(Arc::clone(self).probe(turn, asker.clone(), task.clone()));
        }
        breaker.kept_back(now);
        self.unavailable(&asker.account)
    }

    /// How a flight of `account` ends that may go no further, unspent: the account is no longer what it was, or the breaker is
    /// open, or nobody is there to hear it.
    pub(super) fn given_up(&self, account: &Account) -> Landed {
        if account.superseded.is_cancelled() {
            Landed::Superseded
        } else {
            Landed::Failed(self.unavailable(account))
        }
    }

    /// Why nobody flies while the breaker is open.
    pub(super) fn unavailable(&self, account: &Account) -> Error {
        let now = Instant::now();
        // Whoever comes back within the account's pause could not ask, either.
        let retry_after = self
            .upstream
            .breaker()
            .until_probe(now)
            .max(account.budget.paused_for(now));
        Error::UpstreamUnavailable { retry_after }
    }

    /// Asks for a task in the background once it is its `turn`, to learn whether upstream is back. Without an answer that
    /// says so, dropping the probe lets the next one start.
    async fn probe(self: Arc<Self>, turn: oneshot::Receiver<Probe>, asker: Asker, task: TaskId) {
        let account = &asker.account;
        let approached = tokio::select! {
            biased;
            // Its key may be another budget's by now.
            () = account.superseded.cancelled() => None,
            approached = self.approach(turn, account, &task) => approached,
        };
        if let Some((probe, ready, permit)) = approached {
            // What comes of it, `ask` tells the breaker.
            let trace = FlightTrace::probe(self.exporter.as_ref());
            let attempt = Attempt::only(&trace);
            let _ = self.ask(account, &asker.key, &task, attempt, ready, permit).await;
            drop(probe);
        }
    }

    /// A probe's way to its permit. Nobody waits in the queue meanwhile, so the connection may come first.
    async fn approach(
        &self,
        turn: oneshot::Receiver<Probe>,
        account: &Account,
        task: &TaskId,
    ) -> Option<(Probe, Ready, Permit)> {
        let probe = turn.await.ok()?;
        let mut connecting = pin!(account.pool.connect(task, false));
        let (probe, mut ready) = if let Ok(ready) = timeout(PROBE_CONNECT_TIMEOUT, &mut connecting).await {
            (probe, ready.ok()?)
        } else {
            // Another account's may go meanwhile. But where all of them take that long, each would leave its connection
            // behind, and the next one begin anew: so whoever has one is the next to ask.
            drop(probe);
            let patience = self.config.load().upstream.connect_timeout;
            let mut ready = timeout(patience, connecting).await.ok()?.ok()?;
            let probe = self.upstream.breaker().next_probe(account.id, task).await?;
            // Upstream may have closed it while its turn was not yet due. Given back, the turn would go to one that begins
            // anew, and ends no better.
            if ready.is_closed() {
                ready = timeout(patience, ready.reopen(task)).await.ok()?.ok()?;
            }
            (probe, ready)
        };
        if ready.is_closed() {
            return None;
        }
        let queued = account.budget.flight(None);
        // In the background lane: nobody stands in the queue for it.
        queued.keep();
        let latest = Instant::now() + PROBE_PATIENCE;
        let turn = timeout_at(latest, queued.enter(Entry::InTurn)).await.ok()?.ok()?;
        let permit = timeout_at(latest, turn.permit(&ready)).await.ok()??;
        Some((probe, ready, permit))
    }
}
