//! Which polls may be answered with the key that they bring: what upstream said of a key stands above whatever is kept.
//!
//! A key that upstream refused (401, 403) gets upstream's refusal, no kept answer, no snapshot and no answer to another
//! key's query, until upstream accepts it again: then it has flown alone. An account without credits (402) keeps its
//! fresh answers; only what needs a query is told so. A key of which upstream has said nothing for ten minutes is asked
//! about in the background, with the task just polled, and answers go on meanwhile. A client token goes from a refused
//! key to the next, and comes back when the refused one is accepted again.

use std::sync::Arc;

use tokio::time::Instant;

use super::account::Account;
use super::asker::Asker;
use super::attempt::retry_after;
use super::keys::Key;
use super::progress::Phase;
use super::response::CacheStatus;
use super::{Answered, Gateway, Poll, Progress};
use crate::error::Error;
use crate::outcome::Served;
use crate::stored::Answer;

/// What Cache-Status says of a remembered refusal.
const KEY_REFUSED: &str = "key_refused";
const NO_CREDITS: &str = "no_credits";

impl Gateway {
    /// The answer for one poll, if upstream accepts its key; else what upstream said.
    pub(super) async fn answer_to_key(self: &Arc<Self>, poll: &mut Poll<'_>) -> Result<Answered, Error> {
        if let Err(refusal) = poll.asker.admit(poll.arrived) {
            return Ok(remembered(refusal, KEY_REFUSED));
        }
        let answered = self.answer(poll).await;
        // Refused while the poll waited: what it got is not for this key, unless its own query brought it.
        if let Some(refusal) = poll.asker.refused_since(poll.arrived) {
            return match answered {
                Ok(own) if own.served == Served::Miss || is_refused_key(&own.answer) => Ok(own),
                Ok(_) | Err(_) => Ok(remembered(refusal, KEY_REFUSED)),
            };
        }
        if answered.is_ok() {
            self.confirm(poll);
        }
        answered
    }

    /// Asks upstream about a key that it has said nothing of lately, on nobody's behalf: a paid query like any other, for
    /// the task just polled, whatever is kept of it.
    fn confirm(self: &Arc<Self>, poll: &Poll<'_>) {
        let (now, account) = (poll.arrived, &poll.asker.account);
        let Some(key) = poll.asker.due(now) else { return };
        if self.upstream.breaker().is_open() || !key.claim(now) {
            return;
        }
        tracing::debug!(
            account = &*account.label,
            key = account.place(key),
            "key not confirmed lately"
        );
        let flight = (account.id, poll.terms.task.clone(), Some(key.number));
        let mut trace = None;
        let (mut progress, leader) = self.flights.join(flight, || {
            let trace = trace.insert(poll.trace.flight());
            Progress::new(account.budget.flight(None), trace.link(), false)
        });
        if let (Some(leader), Some(trace)) = (leader, trace) {
            let asker = poll.asker.with(key);
            // Nobody waits for it here.
            drop(self.launch(leader, &asker, &poll.terms.task, None, trace));
        }
        progress.borrow().queued.keep();
        // Somebody has to wait for it, or it would be given up.
        let key = Arc::clone(key);
        tokio::spawn(async move {
            let landed = progress.wait_for(|progress| progress.landed.is_some()).await;
            let is_spent = landed.is_ok_and(|progress| matches!(progress.phase, Phase::Sent(_)));
            if !is_spent {
                key.disclaim(now, Instant::now());
            }
        });
    }

    /// Upstream's 402, for a poll that needs a query while it is remembered.
    pub(super) fn out_of_credits(asker: &Asker, arrived: Instant) -> Option<Answered> {
        // A refused key learns nothing of the account's, and asks once in a while at its own cost.
        let refusal = (!asker.is_refused()).then(|| asker.account.credits.recall(arrived))?;
        refusal.map(|answer| remembered(answer, NO_CREDITS))
    }

    /// What upstream said since `arrived` of the asker's key, if the asker has no other, or of its account's credits.
    pub(super) fn refused_meanwhile(asker: &mut Asker, arrived: Instant) -> Option<Answered> {
        if let Some(refusal) = asker.key.refusal.since(arrived)
            && !asker.take_next_key(arrived)
        {
            return Some(remembered(refusal, KEY_REFUSED));
        }
        let refusal = asker.account.credits.since(arrived)?;
        Some(remembered(refusal, NO_CREDITS))
    }
}

/// Whether a query with `key`, wanted at `wanted`, would only be told what upstream has said meanwhile.
pub(super) fn is_in_vain(account: &Account, key: &Key, wanted: Instant) -> bool {
    key.refusal.since(wanted).is_some() || account.credits.since(wanted).is_some()
}

/// Learns from an answer what upstream thinks of the key that was sent, and of the account's credits.
pub(super) fn learn(account: &Account, key: &Key, answer: &Answer) {
    let (label, place, code) = (&*account.label, account.place(key), answer.code());
    match code {
        401 | 403 => {
            key.heard(answer.asked());
            if key.refusal.set(answer, retry_after(answer)) {
                tracing::warn!(account = label, key = place, code, "upstream refuses this key");
            }
        }
        402 => {
            // It has looked at the key, or it would not know whose credits are missing.
            accepts(account, key, answer);
            if account.credits.set(answer, retry_after(answer)) {
                tracing::warn!(account = label, "upstream says that this account has no credits");
            }
        }
        // Whatever stands before the API may say anything else, without having looked at the key.
        _ if !answer.class().is_stored() => key.asked_in_vain(answer.received()),
        _ => {
            accepts(account, key, answer);
            if account.credits.clear(answer.asked()) {
                tracing::info!(account = label, "upstream says nothing of missing credits any more");
            }
        }
    }
}

fn accepts(account: &Account, key: &Key, answer: &Answer) {
    key.heard(answer.asked());
    if key.refusal.clear(answer.asked()) {
        let (account, key) = (&*account.label, account.place(key));
        tracing::info!(account, key, "upstream accepts this key again");
    }
}

/// Whether an answer is about the key that was sent rather than about the task.
pub(super) fn is_refused_key(answer: &Answer) -> bool {
    matches!(answer.code(), 401 | 403)
}

fn remembered(answer: Answer, detail: &'static str) -> Answered {
    Answered {
        served: Served::Hit,
        cache: CacheStatus::Hit(Some(detail)),
        answer: answer.repeated(Instant::now()),
    }
}
