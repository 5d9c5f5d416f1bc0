//! What a poll gets when its flight has not landed in time, or is known not to: a snapshot, else what upstream said last,
//! else why.
//!
//! A poll that cannot be served by its deadline hears so at once, on arrival or when others overtake its place: nobody
//! waits ten seconds for a refusal. What the snapshot stands in for is still wanted, or nobody would ever see it fresher:
//! its flight goes on in the background.

use std::future::pending;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::account::Account;
use super::progress::Phase;
use super::{Answered, Gateway, Poll, Progress};
use crate::account::Client;
use crate::budget::Expected;
use crate::error::Error;
use crate::outcome::Shed;

/// What upstream is thought to take before its first answer, if that is a small part of `budget.max_wait`: of the first rush
/// after a start whoever has the last turns would else wait for an answer that comes too late.
const UNKNOWN: Duration = Duration::from_millis(300);

/// How long an attempt may take before a poll that has a snapshot is answered with it.
const SLOW_ATTEMPT: Duration = Duration::from_secs(1);

impl Gateway {
    /// Lets those who wait know what upstream takes by now, and how soon its connections come free. Gives what it is thought
    /// to take of the time that a poll of `account` may wait which comes now, with few exceptions. All of it at most: whoever
    /// has nobody before them is asked for even then, since the answer is kept, and trying is the only way to learn that
    /// upstream is no longer so slow.
    pub(super) fn reckon(&self, account: &Account) -> Duration {
        let max_wait = self.config.load().budget.max_wait;
        let outlook = account.pool.outlook(max_wait, Instant::now());
        let takes = outlook.nearly_all.unwrap_or(UNKNOWN.min(max_wait / 10)).min(max_wait);
        account.budget.expect(Expected {
            at_least: outlook.at_least.min(max_wait),
            opening: outlook.opening,
            mean: outlook.mean,
            connections: account.pool.connections(),
            leaves: max_wait.saturating_sub(takes),
        });
        takes
    }

    /// Answers a poll whose flight has not landed: at its deadline or, where its turn would come `late_by` too late, before.
    pub(super) fn answer_without_landing(
        &self,
        poll: &Poll<'_>,
        progress: watch::Receiver<Progress>,
        late_by: Option<Duration>,
        collapsed: bool,
        client: &Client,
    ) -> Result<Answered, Error> {
        let (phase, last_error, was_stale) = {
            let progress = progress.borrow();
            (progress.phase, progress.last_error.clone(), progress.was_stale)
        };
        let phase = late_by.map_or(phase, |_| Phase::Waiting);
        let why = late_by.map_or(Shed::Deadline, |_| Shed::Admission);
        let detail = match phase {
            Phase::Waiting | Phase::Crowded(_) => why.detail(),
            Phase::Connecting(_) => Error::NoConnection.detail(),
            // Whether upstream was asked here or by another replica.
            Phase::Elsewhere(_) | Phase::Sent(_) => Error::UpstreamSlow.detail(),
        };
        if let Some(snapshot) = self.stand_in(poll, detail) {
            leave_behind(progress);
            return Ok(snapshot);
        }
        if let Some(answer) = last_error {
            return Ok(Answered::forwarded(answer, was_stale, collapsed));
        }
        Err(match phase {
            Phase::Waiting | Phase::Crowded(_) => self.shed(poll, client, why, late_by),
            Phase::Connecting(_) => Error::NoConnection,
            Phase::Elsewhere(_) | Phase::Sent(_) => Error::UpstreamSlow,
        })
    }

    /// The snapshot, once an attempt takes long or the breaker opens. Never ends where there is none, nor comes from another
    /// replica as the flight goes on.
    ///
    /// Cancel safe.
    pub(super) async fn snapshot_when_slow(
        &self,
        poll: &Poll<'_>,
        mut progress: watch::Receiver<Progress>,
    ) -> Answered {
        loop {
            let slow = match progress.borrow_and_update().phase {
                Phase::Waiting => None,
                Phase::Crowded(since) | Phase::Elsewhere(since) | Phase::Connecting(since) | Phase::Sent(since) => {
                    Some(since + SLOW_ATTEMPT)
                }
            };
            let detail = tokio::select! {
                biased;
                Ok(()) = progress.changed() => continue,
                () = self.upstream.breaker().opened() => self.unavailable(&poll.asker.account).detail(),
                () = sleep_until(slow.unwrap_or_else(Instant::now)), if slow.is_some() => Error::UpstreamSlow.detail(),
            };
            if let Some(answered) = self.stand_in(poll, detail) {
                leave_behind(progress);
                return answered;
            }
            if progress.changed().await.is_err() {
                return pending().await;
            }
        }
    }

    /// Answers a poll whose flight gave way in a full queue.
    pub(super) fn answer_without_place(&self, poll: &Poll<'_>, client: &Client) -> Result<Answered, Error> {
        let why = Shed::QueueFull;
        self.stand_in(poll, why.detail())
            .ok_or_else(|| self.shed(poll, client, why, None))
    }

    /// Why a poll is turned away, and until when: its turn would come `late_by` too late, if that is known.
    fn shed(&self, poll: &Poll<'_>, client: &Client, why: Shed, late_by: Option<Duration>) -> Error {
        let (now, budget) = (Instant::now(), &poll.asker.account.budget);
        let late_by = late_by.unwrap_or_else(|| budget.paused_for(now));
        Error::Shed {
            why,
            limit: self.config.load().budget.limit,
            retry_after: budget.retry_after(client, poll.asker.weight(), &poll.terms.task, late_by, now),
        }
    }
}

/// Leaves a flight of which a poll has been answered with a snapshot: somebody waits for it in the background, on nobody's
/// behalf.
fn leave_behind(mut progress: watch::Receiver<Progress>) {
    // Sent or not: an attempt that stays unanswered is made once more, and only the second tells the breaker.
    let is_first = progress.borrow().queued.keep();
    if is_first {
        tokio::spawn(async move { progress.wait_for(|progress| progress.landed.is_some()).await.is_ok() });
    }
}
