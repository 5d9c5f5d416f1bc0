//! One attempt, and all that follows from it: what is kept, counted and logged, and what is learnt of upstream and the
//! account. Flights and probes make the same ones.

use std::pin::pin;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout};

use super::Gateway;
use super::account::Account;
use super::clearance::learn;
use super::keys::Key;
use super::traced::FlightTrace;
use crate::budget::Permit;
use crate::error::Error;
use crate::moment::unix_now;
use crate::stored::{Answer, Draft, Keeping};
use crate::task::{self, Class, TaskId};
use crate::upstream::{Failed, Fetched, How, Ready};

/// A flight makes at most two attempts, both paid.
pub(super) const MOST_ATTEMPTS: u32 = 2;

/// How often, while an attempt is under way, those who wait hear what its silence says. Chosen, not measured: before,
/// some heard of it only when the attempt had ended.
const SILENCE_LOOKS: Duration = Duration::from_millis(250);

/// Which attempt of which flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt<'t> {
    number: u32,
    is_last: bool,
    trace: &'t FlightTrace,
}

impl<'t> Attempt<'t> {
    /// The first is 1.
    pub(super) fn new(number: u32, trace: &'t FlightTrace) -> Self {
        let is_last = number >= MOST_ATTEMPTS;
        Self { number, is_last, trace }
    }

    /// The first, after which there is no other.
    pub(super) fn only(trace: &'t FlightTrace) -> Self {
        Self {
            number: 1,
            is_last: true,
            trace,
        }
    }
}

impl Gateway {
    /// One attempt, and all that follows from it: what is kept, counted, logged, and learnt of upstream and the account.
    pub(super) async fn ask(
        &self,
        account: &Account,
        key: &Key,
        task: &TaskId,
        attempt: Attempt<'_>,
        ready: Ready,
        permit: Permit,
    ) -> Result<Answer, Failed> {
        let sent = Instant::now();
        self.reckon(account);
        let is_told = self.config.load().upstream.traceparent;
        let query = attempt.trace.query(attempt.number);
        let traceparent = is_told.then(|| query.context.header()).flatten();
        let mut sending = pin!(ready.send(permit, &key.secret, task, traceparent));
        let result = loop {
            match timeout(SILENCE_LOOKS, &mut sending).await {
                Ok(result) => break result,
                // Where all connections are in use, nothing else may happen before the attempts have ended.
                Err(_) if account.budget.waiting() > 0 => {
                    self.reckon(account);
                    account.budget.judge();
                }
                Err(_) => {}
            }
        };
        let took = sent.elapsed();
        self.reckon(account);
        let breaker = self.upstream.breaker();
        match result {
            Ok(mut fetched) => {
                let room = fetched.room.take();
                let answer = self.keep(account, task, fetched);
                self.publish(account, key, task, &answer);
                self.keep_on_disk(account, key, task, &answer);
                let outcome = answer.class();
                account.metrics.attempted(outcome, took);
                query.answered(&answer, outcome);
                log_attempt(account, task, &attempt, outcome.as_ref(), Some(&answer), took);
                if outcome == Class::RateLimited {
                    pause(account, &answer);
                }
                learn(account, key, &answer);
                if outcome.yields_to_snapshot() {
                    account.credits.lapse(sent);
                }
                // Closed only now: whoever asks from here on finds the answer kept and the account paused.
                if outcome == Class::Unavailable {
                    breaker.answered_unavailable(account.id, task, sent, format_args!("code {}", answer.code()));
                } else if outcome.is_stored() {
                    breaker.answered(account.id, task, sent);
                } else {
                    breaker.refused(account.id, sent);
                }
                self.hold(&answer).await?;
                drop(room);
                Ok(answer)
            }
            Err(failed) if failed.how == How::Unspent => {
                query.unsent();
                Err(failed)
            }
            Err(failed) => {
                let (outcome, detail) = (failure(&failed.error), failed.error.detail());
                account.metrics.attempted(outcome, took);
                query.failed(&failed.error, outcome);
                log_attempt(account, task, &attempt, detail, None, took);
                account.credits.lapse(sent);
                if outcome != Class::Unavailable {
                    breaker.refused(account.id, sent);
                } else if failed.how != How::Unanswered || attempt.is_last {
                    // Else it may only have been an idle connection that upstream had closed: the next attempt will tell.
                    breaker.failed(account.id, task, sent, detail);
                }
                Err(failed)
            }
        }
    }

    /// Has an answer hold its room until its clients have it; what the cache keeps counts there.
    pub(super) async fn hold(&self, answer: &Answer) -> Result<(), Failed> {
        if !answer.is_stored() {
            answer.hold(self.upstream.hold(answer.body_len()).await?);
        }
        Ok(())
    }

    /// Reads an answer, and keeps it if it may be kept.
    fn keep(&self, account: &Account, task: &TaskId, fetched: Fetched) -> Answer {
        let Fetched {
            status,
            content_type,
            retry_after,
            location,
            body,
            asked,
            received,
            has_surplus,
            connection,
            ..
        } = fetched;
        let reading = task::read(status.as_u16(), &body, task);
        // What makes no sense may be the end of another answer, or one to another query: then so is all that follows.
        if !matches!(reading.class, Class::Unrecognised | Class::Unreadable) {
            connection.reuse();
        }
        if has_surplus {
            let (account, task) = (&*account.label, task.as_str());
            tracing::warn!(
                account,
                task,
                "upstream sent more than an answer: it is passed on and not kept"
            );
        }
        let mut had_ended = false;
        let answer = self.cache.put_after(account.id, task, received, |before| {
            had_ended = before.is_some_and(Answer::has_ended);
            let unix_now = unix_now().as_secs();
            let keeping = Keeping::of(&reading, before, received, unix_now, &self.config.load().cache);
            let keeping = keeping.filter(|_| !has_surplus);
            let draft = Draft {
                content_type,
                retry_after,
                location,
                keeping,
                ..Draft::new(status, body, reading, asked, received)
            };
            draft.of(account.id, task)
        });
        account.told(task, &answer, had_ended, received);
        answer
    }
}

/// Lets upstream's 429 slow the account down.
fn pause(account: &Account, answer: &Answer) {
    let pause = account
        .budget
        .rate_limited(retry_after(answer), answer.asked(), Instant::now());
    tracing::warn!(
        account = &*account.label,
        pause_s = pause.as_secs_f64(),
        "upstream rate-limits this account: somebody else spends it too, or budget.limit is too high"
    );
}

/// How long upstream wants to be left alone.
pub(super) fn retry_after(answer: &Answer) -> Option<Duration> {
    let value = answer.retry_after()?.to_str().ok()?;
    task::retry_after(value, SystemTime::now())
}

fn log_attempt(
    account: &Account,
    task: &TaskId,
    attempt: &Attempt<'_>,
    outcome: &str,
    answer: Option<&Answer>,
    took: Duration,
) {
    tracing::info!(
        account = &*account.label,
        task = task.as_str(),
        trace_id = %attempt.trace.id(),
        attempt = attempt.number,
        outcome,
        status = answer.map(|answer| answer.status().as_u16()),
        code = answer.map(Answer::code),
        took_s = took.as_secs_f64(),
        "upstream asked"
    );
}

/// What an attempt without an answer counts as.
fn failure(error: &Error) -> Class {
    if matches!(
        error,
        Error::UpstreamHeadTooLarge | Error::UpstreamTooLarge | Error::UpstreamEncoding | Error::NoRoom
    ) {
        Class::Unrecognised
    } else {
        Class::Unavailable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn want_of_room_is_no_outage() {
        assert_eq!(failure(&Error::UpstreamTimeout), Class::Unavailable);
        assert_eq!(failure(&Error::NoRoom), Class::Unrecognised);
    }
}
