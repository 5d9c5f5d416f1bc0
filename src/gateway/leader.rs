//! A flight's leader: its way to an answer that is kept, on behalf of all who wait for it.
//!
//! Whoever opened the flight carries it on and may leave; it goes on without them. Until its query is sent it has spent
//! nothing, and gives up as soon as nobody waits, the breaker opens, or the account is no longer what it was; from then
//! on it flies to its end. What follows from an attempt is `gateway::attempt`'s business, and what the followers see of
//! all this `gateway::progress`'s.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::FutureExt as _;
use tokio::time::Instant;

use super::account::Account;
use super::asker::Asker;
use super::attempt::{Attempt, MOST_ATTEMPTS};
use super::clearance::is_in_vain;
use super::keys::Key;
use super::progress::{Landed, Phase, Progress, shown};
use super::shared_cache::Way;
use super::traced::FlightTrace;
use super::{FlightKey, Gateway};
use crate::budget::Entry;
use crate::error::Error;
use crate::flight::{Carried, Leader};
use crate::panics;
use crate::shared::Claim;
use crate::stored::Answer;
use crate::task::{Class, TaskId};
use crate::upstream::{Breaker, Failed, How, Ready};

/// How often a flight tries to open a connection: a failed one costs no permit.
const MOST_CONNECTS: u32 = 2;

/// What a flight's poll has sought in the cache, in vain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sought {
    /// How long live answers are fresh for it.
    pub(super) live: Duration,
    /// [`Cache::puts`](crate::cache::Cache::puts) before it looked.
    pub(super) puts: u64,
}

/// What a flight is for.
#[derive(Debug)]
struct Errand {
    account: Arc<Account>,
    key: Arc<Key>,
    task: TaskId,
    /// `None` when what is kept will not do, however fresh.
    sought: Option<Sought>,
}

impl Gateway {
    /// Gets the leader ready to go, on nobody's behalf, for what is `sought`; without that, what is kept will not do, however
    /// fresh.
    pub(super) fn launch(
        self: &Arc<Self>,
        leader: Leader<FlightKey, Progress>,
        asker: &Asker,
        task: &TaskId,
        sought: Option<Sought>,
        trace: FlightTrace,
    ) -> Carried {
        let errand = Errand {
            account: Arc::clone(&asker.account),
            key: Arc::clone(&asker.key),
            task: task.clone(),
            sought,
        };
        Carried::new(panics::contain(Arc::clone(self).fly(leader, errand, trace)).map(drop))
    }

    /// Whether a flight need not fly: what it is to fetch is kept by now, here or by another replica, or nobody may.
    async fn landed_already(
        &self,
        leader: &Leader<FlightKey, Progress>,
        account: &Account,
        task: &TaskId,
        Sought { live, puts }: Sought,
        trace: &mut FlightTrace,
    ) -> Option<Landed> {
        let launched = Instant::now();
        let is_fresh = |answer: &Answer| answer.is_fresh(launched, live);
        // 1. a poll misses; 2. the flight that was under way keeps its answer and lands; 3. the poll opens this one.
        let is_as_it_was = self.cache.puts() == puts;
        let kept = (!is_as_it_was).then(|| self.cache.get(account.id, task, launched, live));
        if let Some(answer) = kept.flatten().filter(is_fresh) {
            return Some(Landed::Kept(answer));
        }
        self.shared_cache.as_ref()?;
        trace.step("shared store");
        let looking = Box::pin(self.look_elsewhere(account, task, live));
        match while_awaited(leader, account, self.upstream.breaker(), looking).await {
            None => Some(self.given_up(account)),
            Some(answer) => answer.filter(is_fresh).map(Landed::Kept),
        }
    }

    /// Carries a flight from a place in the queue to its landing.
    async fn fly(self: Arc<Self>, leader: Leader<FlightKey, Progress>, errand: Errand, mut trace: FlightTrace) {
        // The claim on this flight: until it lands, other replicas wait for it.
        let mut claim = None;
        let (Ok(landed) | Err(landed)) = self.obtain(&leader, &errand, &mut trace, &mut claim).await;
        leader.land(|progress| progress.landed = Some(landed));
    }

    /// The leader's way to an answer that is kept; `Err` where it ends without one. Until its query is sent it gives up when
    /// nobody waits any more.
    async fn obtain(
        &self,
        leader: &Leader<FlightKey, Progress>,
        errand: &Errand,
        trace: &mut FlightTrace,
        claim: &mut Option<Claim>,
    ) -> Result<Landed, Landed> {
        let launched = Instant::now();
        let (account, key, task) = (&*errand.account, &*errand.key, &errand.task);
        let live = errand.sought.map(|sought| sought.live);
        if let Some(sought) = errand.sought
            && let Some(landed) = self.landed_already(leader, account, task, sought, trace).await
        {
            return Ok(landed);
        }
        let breaker = self.upstream.breaker();
        let given_up = || self.given_up(account);
        let queued = leader.stage().queued.clone();
        let (mut attempt, mut entry) = (1, Entry::InTurn);
        loop {
            trace.step("wait for turn");
            let entering = queued.enter(std::mem::replace(&mut entry, Entry::Again));
            let entered = while_awaited(leader, account, breaker, entering).await;
            let turn = entered.ok_or_else(given_up)?.map_err(|_| Landed::Shed)?;
            if is_in_vain(account, key, launched) {
                return Err(Landed::InVain);
            }
            let claiming = self.claim(leader, (account, task), live, turn, claim);
            let claimed = while_awaited(leader, account, breaker, claiming).await;
            let turn = match claimed.ok_or_else(given_up)? {
                Way::Kept(answer) => return Ok(Landed::Kept(answer)),
                Way::Back => continue,
                Way::On(turn) => turn,
            };
            // After an unanswered attempt any other idle connection may be as dead.
            let mut ready = self.connect(leader, account, task, attempt > 1, trace).await?;
            trace.step("wait for permit");
            let granting = shown(leader, |_| Phase::Waiting, turn.permit(&ready));
            let granted = while_awaited(leader, account, breaker, self.while_spending(claim, granting)).await;
            let Some(granted) = granted.ok_or_else(given_up)? else {
                continue;
            };
            // The dispatcher has panicked.
            let permit = granted.ok_or(Landed::Failed(Error::Internal))?;
            if is_in_vain(account, key, launched) {
                return Err(Landed::InVain);
            }
            // Upstream may have closed it while the permit was not yet due. The permit counts as spent now for as long as it
            // is not written, so it may wait for another connection: that one is late, and still within the limit.
            if ready.is_closed() {
                let reopening = shown(leader, Phase::Connecting, ready.reopen(task));
                let reopened = while_awaited(leader, account, breaker, reopening).await;
                ready = reopened.ok_or_else(given_up)?.map_err(Landed::Failed)?;
            }
            let is_taken_over = live.is_some() && self.has_taken_over(account, task);
            leader.update(|progress| {
                progress.phase = Phase::Sent(Instant::now());
                progress.was_stale |= is_taken_over;
            });
            trace.approached();
            if let Some(claim) = claim {
                claim.asks();
            }
            let number = Attempt::new(attempt, trace);
            match self.ask(account, key, task, number, ready, permit).await {
                Ok(answer) if answer.class() == Class::RateLimited && attempt < MOST_ATTEMPTS => {
                    leader.update(|progress| {
                        progress.phase = Phase::Waiting;
                        progress.last_error = Some(answer);
                    });
                }
                Ok(answer) => return Ok(Landed::Fetched(answer, Arc::clone(&errand.key))),
                // Nothing was sent: a permit that came too late for its slot is no attempt.
                Err(Failed { how: How::Unspent, .. }) => {
                    leader.update(|progress| progress.phase = Phase::Waiting);
                    continue;
                }
                Err(Failed {
                    how: How::Unanswered, ..
                }) if attempt < MOST_ATTEMPTS => {
                    leader.update(|progress| progress.phase = Phase::Waiting);
                }
                Err(failed) => return Err(Landed::Failed(failed.error)),
            }
            attempt += 1;
        }
    }

    /// A connection for a flight whose turn has come; a `fresh` one is opened for it.
    async fn connect(
        &self,
        leader: &Leader<FlightKey, Progress>,
        account: &Account,
        task: &TaskId,
        fresh: bool,
        trace: &mut FlightTrace,
    ) -> Result<Ready, Landed> {
        let breaker = self.upstream.breaker();
        let given_up = || self.given_up(account);
        let mut connects = 1;
        loop {
            let placing = shown(leader, Phase::Crowded, account.pool.place(fresh));
            let place = while_awaited(leader, account, breaker, placing).await;
            let place = place.ok_or_else(given_up)?;
            trace.step("connect");
            let connecting = shown(leader, Phase::Connecting, place.connect(task));
            let connected = while_awaited(leader, account, breaker, connecting).await;
            match connected.ok_or_else(given_up)? {
                Err(_) if connects < MOST_CONNECTS => connects += 1,
                connected => return connected.map_err(Landed::Failed),
            }
        }
    }
}

/// What `future` gives, or `None` once nobody waits for the flight, the breaker has opened, or a changed configuration has
/// taken one of the account's keys elsewhere.
async fn while_awaited<T>(
    leader: &Leader<FlightKey, Progress>,
    account: &Account,
    breaker: &Breaker,
    future: impl Future<Output = T>,
) -> Option<T> {
    let is_off = || breaker.is_open() || account.superseded.is_cancelled();
    tokio::select! {
        biased;
        // What is there at once costs no place in anybody's list of those to wake.
        () = until(is_off) => None,
        value = future => Some(value),
        () = breaker.opened() => None,
        () = account.superseded.cancelled() => None,
        () = leader.deserted() => None,
    }
}

/// Ready when, on being polled for another reason, `is_so`.
async fn until(is_so: impl Fn() -> bool) {
    poll_fn(|_| if is_so() { Poll::Ready(()) } else { Poll::Pending }).await;
}
