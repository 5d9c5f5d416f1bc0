//! What other replicas have fetched, and the flights that are theirs.
//!
//! A flight looks in the shared store before it queues, and again when its turn has come: then it flies for all replicas,
//! or, where another does, gives its turn back and waits for what that one keeps. As long as this process may spend nothing it
//! claims nothing, and gives back what it has claimed: another may be able to fly. While nobody may fly here, a poll for
//! which memory has nothing fresh looks there, too. Whatever may be kept is published to all.
//!
//! Answers are sealed as on disk, bound to what the names of the store's keys begin with and to what stands beside them in
//! the clear. So one that opens is this account's, this task's and as upstream gave it, and tells which key upstream
//! accepted. How old it is, is counted on the store's clock, and judged by who asks. Whatever does not open is a miss, and makes
//! room for what we fetch.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::account::Account;
use super::keys::Key;
use super::progress::Phase;
use super::{FlightKey, Gateway, Poll, Progress};
use crate::budget::Turn;
use crate::flight::Leader;
use crate::metrics::{SharedFlight, SharedRead};
use crate::shared::{Away, Claim, Found, Label, SharedCache, Wanted, Whose};
use crate::stored::{Answer, Owner};
use crate::task::{Stage, TaskId};

/// How a flight goes on whose turn has come.
pub(super) enum Way {
    /// To upstream.
    On(Turn),
    /// It need not: another replica has fetched this.
    Kept(Answer),
    /// To the queue: another replica has flown, and brought nothing.
    Back,
}

impl Gateway {
    /// What other replicas have of a task, if it says more than what memory has: fresh or stale; from then on memory has
    /// it, too. `live` is how long live answers are fresh for whoever asks.
    ///
    /// Cancel safe.
    pub(super) async fn look_elsewhere(&self, account: &Account, task: &TaskId, live: Duration) -> Option<Answer> {
        let store = self.shared_cache.as_ref()?;
        let (read, answer) = match store
            .look(place(store, account, task), self.wanted(account, task, live))
            .await
        {
            Err(Away) => (SharedRead::Away, None),
            Ok(None) => (SharedRead::Miss, None),
            Ok(Some(found)) => match self.take_over(store, account, task, &found) {
                None => (SharedRead::Doubtful, None),
                Some(answer) if answer.is_fresh(Instant::now(), live) => (SharedRead::Hit, Some(answer)),
                Some(answer) => (SharedRead::Stale, Some(answer)),
            },
        };
        store.metrics().read(read);
        answer
    }

    /// What other replicas have, for a poll for which memory has nothing fresh, and nobody may fly.
    pub(super) async fn look_grounded(&self, poll: &Poll<'_>, live: Duration) -> Option<Answer> {
        let account = &poll.asker.account;
        self.shared_cache.as_ref()?;
        if !self.upstream.breaker().is_open() && !account.credits.stands() {
            return None;
        }
        let _looking = poll.trace.part("shared store");
        self.look_elsewhere(account, &poll.terms.task, live).await
    }

    /// Whether memory has a snapshot of a task that is being fetched, for all that is known another replica's.
    pub(super) fn has_taken_over(&self, account: &Account, task: &TaskId) -> bool {
        self.shared_cache.is_some() && self.cache.snapshot(account.id, task, Instant::now()).is_some()
    }

    /// Claims the flight for this replica, at its `turn`, or waits for the one that has. Where no answer may be shared
    /// (no `live`), where there is no store, or it is away, the flight goes on by itself.
    ///
    /// Cancel safe.
    pub(super) async fn claim(
        &self,
        leader: &Leader<FlightKey, Progress>,
        (account, task): (&Account, &TaskId),
        live: Option<Duration>,
        turn: Turn,
        claimed: &mut Option<Claim>,
    ) -> Way {
        let (Some(store), Some(live), None) = (self.shared_cache.as_ref(), live, claimed.as_ref()) else {
            return Way::On(turn);
        };
        // On the heap: a flight has no need of it where there is no store.
        Box::pin(self.claim_in(store, leader, (account, task), live, turn, claimed)).await
    }

    /// What `permit` gives; or `None` as soon as this process may spend nothing, if it has claimed the flight. Then the claim
    /// is given back.
    pub(super) async fn while_spending<T>(
        &self,
        claimed: &mut Option<Claim>,
        permit: impl Future<Output = T>,
    ) -> Option<T> {
        tokio::select! {
            biased;
            permit = permit => Some(permit),
            () = self.until(false), if claimed.is_some() => {
                *claimed = None;
                None
            }
        }
    }

    /// Waits until this process may spend, or until it may not: for ever, where no replicas share a budget.
    ///
    /// Cancel safe.
    async fn until(&self, spends: bool) {
        match &self.replica {
            Some(replica) => replica.until(spends).await,
            None => pending().await,
        }
    }

    async fn claim_in(
        &self,
        store: &SharedCache,
        leader: &Leader<FlightKey, Progress>,
        (account, task): (&Account, &TaskId),
        live: Duration,
        turn: Turn,
        claimed: &mut Option<Claim>,
    ) -> Way {
        self.until(true).await;
        let (place, wanted) = (place(store, account, task), self.wanted(account, task, live));
        let (mut before, mut doubtful) = (None, None);
        let whose = loop {
            let insists = before.is_some();
            let Ok((found, whose)) = store.claim(place, wanted, before, doubtful.as_ref()).await else {
                store.metrics().flies(SharedFlight::Alone);
                return Way::On(turn);
            };
            if let Some(found) = found {
                match self.take_over(store, account, task, &found) {
                    Some(answer) if answer.is_fresh(Instant::now(), live) => {
                        store.metrics().read(SharedRead::Hit);
                        return Way::Kept(answer);
                    }
                    Some(_) => {}
                    None => {
                        store.metrics().read(SharedRead::Doubtful);
                        doubtful = Some(found);
                    }
                }
            }
            if insists || (doubtful.is_none() && !matches!(whose, Whose::Nobodys)) {
                break whose;
            }
            before = Some(whose);
        };
        match whose {
            Whose::Ours(claim) => {
                store.metrics().flies(SharedFlight::Ours);
                *claimed = Some(claim);
                Way::On(turn)
            }
            Whose::Nobodys => Way::On(turn),
            Whose::Each => {
                store.metrics().flies(SharedFlight::Alone);
                Way::On(turn)
            }
            Whose::Theirs => {
                store.metrics().flies(SharedFlight::Theirs);
                drop(turn);
                leader.update(|progress| progress.phase = Phase::Elsewhere(Instant::now()));
                store.landing(place).await;
                leader.update(|progress| progress.phase = Phase::Waiting);
                let answer = self.look_elsewhere(account, task, live).await;
                let fresh = answer.filter(|answer| answer.is_fresh(Instant::now(), live));
                fresh.map_or(Way::Back, Way::Kept)
            }
        }
    }

    /// Lets other replicas have an answer fetched with `key`, if it may be kept.
    pub(super) fn publish(&self, account: &Account, key: &Key, task: &TaskId, answer: &Answer) {
        let (Some(store), Some(keeping)) = (&self.shared_cache, answer.keeping()) else {
            return;
        };
        let owner = owner(store, account);
        let (seal, task, answer) = (Arc::clone(&key.seal), task.clone(), answer.clone());
        store.publish(owner.place(&task), move |now| {
            let label = Label {
                stage: answer.stage().unwrap_or(Stage::NotFound) as u8,
                live: answer.is_live(),
                asked_ms: now.unix_ms(answer.asked()),
                received_ms: now.unix_ms(answer.received()),
            };
            let sealed = seal.close(owner.within(label.text().as_bytes()), &task, &answer, now)?;
            Some((label, sealed, keeping.keep.saturating_sub(answer.age(now.at))))
        });
    }

    fn wanted(&self, account: &Account, task: &TaskId, live: Duration) -> Wanted {
        let kept = self.cache.get(account.id, task, Instant::now(), live);
        Wanted {
            fresh: live,
            after: kept.as_ref().map(Answer::asked),
        }
    }

    /// Opens what was found, and keeps it, or what it does not take the place of; `None` on any doubt.
    fn take_over(&self, store: &SharedCache, account: &Account, task: &TaskId, found: &Found) -> Option<Answer> {
        let owner = owner(store, account).within(found.label());
        let (now, config) = (found.clock, self.config());
        let (key, answer) = account.open(owner, task, found.sealed().to_vec(), now, &config.cache)?;
        key.heard(answer.asked());
        let (mut had_ended, mut stands) = (false, None);
        self.cache.put_after(account.id, task, now.at, |before| {
            had_ended = before.is_some_and(Answer::has_ended);
            stands = before.filter(|before| !answer.replaces(before)).cloned();
            answer.clone()
        });
        account.told(task, &answer, had_ended, now.at);
        if !had_ended {
            self.keep_on_disk(account, key, task, &answer);
        }
        Some(stands.unwrap_or(answer))
    }
}

/// The account, as whoever shares the keys that begin like `store`'s knows it.
fn owner(store: &SharedCache, account: &Account) -> Owner {
    account.owner.within(store.prefix().as_bytes())
}

fn place(store: &SharedCache, account: &Account, task: &TaskId) -> u128 {
    owner(store, account).place(task)
}
