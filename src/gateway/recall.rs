//! Ended tasks that outlive the process: written to disk as they end, and read when memory has nothing of a task.
//!
//! A poll looks there before it asks whether upstream is away or a turn can be had: none of that matters for what has
//! ended. Polls of one task share one reading of it. An answer that opens is proof that upstream accepted the key it is
//! sealed with when it was asked for; so a restart costs no query to confirm a key that was confirmed a minute ago.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::account::Account;
use super::keys::Key;
use super::{Gateway, Poll};
use crate::error::Error;
use crate::moment::Moment;
use crate::stored::Answer;
use crate::task::TaskId;

/// How long a poll waits for the disk at most; and no more than a quarter of `budget.max_wait`, so that there is time to
/// ask upstream after all.
const PATIENCE: Duration = Duration::from_secs(2);

/// What came of reading.
#[derive(Clone, Debug)]
pub(super) enum Recall {
    UnderWay,
    Done(Result<Option<Answer>, Error>),
}

impl Gateway {
    /// Has an ended task's answer, fetched with `key` here or by another replica, kept on disk.
    pub(super) fn keep_on_disk(&self, account: &Account, key: &Key, task: &TaskId, answer: &Answer) {
        let Some(disk) = self.disk.as_ref().filter(|_| answer.has_ended()) else {
            return;
        };
        let (owner, now) = (account.owner, Moment::now());
        let (seal, task) = (Arc::clone(&key.seal), task.clone());
        // Without what it may hold of `limits.body_bytes` for its clients: what waits to be written has room of its own, and a
        // disk that stands still keeps no answer from anybody.
        let answer = Answer::from(answer.block().clone());
        let said_ms = now.unix_ms(answer.received());
        disk.put(owner.place(&task), said_ms, answer.body_len(), move || {
            seal.close(owner, &task, &answer, now)
        });
    }

    /// What the disk has of a task of which memory has nothing; from then on memory has it, too.
    ///
    /// # Errors
    /// [`Error::NoRoom`] when there is none to send it from.
    ///
    /// Cancel safe: reading goes on, for whoever else waits.
    pub(super) async fn recall(self: &Arc<Self>, poll: &Poll<'_>) -> Result<Option<Answer>, Error> {
        let account = &poll.asker.account;
        let Some(disk) = &self.disk else { return Ok(None) };
        let place = account.owner.place(&poll.terms.task);
        if !disk.may_hold(place) {
            return Ok(None);
        }
        let _reading = poll.trace.part("disk");
        let (mut recall, leader) = self
            .recalls
            .join((account.id, poll.terms.task.clone()), || Recall::UnderWay);
        if let Some(leader) = leader {
            let (gateway, account, task) = (Arc::clone(self), Arc::clone(account), poll.terms.task.clone());
            tokio::spawn(async move {
                // 1. a poll finds nothing in memory; 2. the reading that was under way ends; 3. the poll begins this one.
                let answer = match gateway.cache.snapshot(account.id, &task, Instant::now()) {
                    None => gateway.read(&account, &task, place).await,
                    kept => Ok(kept),
                };
                leader.land(|recall| *recall = Recall::Done(answer));
            });
        }
        let done = recall.wait_for(|recall| matches!(recall, Recall::Done(_))).await;
        match done.as_deref() {
            Ok(Recall::Done(answer)) => answer.clone(),
            Ok(Recall::UnderWay) | Err(_) => Ok(None),
        }
    }

    async fn read(&self, account: &Arc<Account>, task: &TaskId, place: u128) -> Result<Option<Answer>, Error> {
        let Some(disk) = &self.disk else { return Ok(None) };
        let config = self.config();
        let patience = PATIENCE.min(config.budget.max_wait / 4);
        let (account, asked) = (Arc::clone(account), task.clone());
        let opened = disk.get(place, patience, move |sealed| {
            let (key, answer) = account.open(account.owner, &asked, sealed, Moment::now(), &config.cache)?;
            answer.has_ended().then(|| (account.id, Arc::clone(key), answer))
        });
        let Some((account, key, answer)) = opened.await else {
            return Ok(None);
        };
        key.heard(answer.asked());
        let answer = self.cache.put(account, task, &answer, Instant::now());
        self.hold(&answer).await.map_err(|failed| failed.error)?;
        Ok(Some(answer))
    }
}
