//! The poll that is as plain as can be: if it is a hit, it is answered without a wait, a lock that is held for longer than a
//! look-up, a header map, or a copy of what it asks.
//!
//! Most polls are. They take the same decisions as every poll, in the same order (`Gateway::poll`), but on what stands in
//! the request. What is no hit goes on from there, with what has been found out by then, and without the rest of the
//! request: no other field has a say in the answer. Whatever is not so plain is left to the longer way: a key or an id that
//! has to be decoded, two keys or a Bearer, a wish for a fresher answer. No hit are a key that upstream refuses or is to be
//! asked about, an answer that is not fresh, and every poll while hits are logged, or spans have a collector, whether this
//! one's are sent there or not. All ways give the same answer, byte for byte (`tests/gateway/hits.rs`).

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method};
use tokio::time::Instant;
use tracing::{Level, enabled};

use super::asker::Asker;
use super::traced::Trace;
use super::{Data, Gateway, Terms, response};
use crate::account::{ApiKey, Caller};
use crate::metrics::InFlight;
use crate::outcome::Served;
use crate::panics;
use crate::stored::Answer;
use crate::task::TaskId;
use crate::trace::{TRACEPARENT, TraceContext};
use crate::upstream::TASK_INFO_PATH;

/// A poll as plain as can be: a GET of one task with one key.
#[derive(Clone, Copy)]
pub struct PlainPoll<'r> {
    /// What stands in `x-api-key`.
    pub key: &'r str,
    /// What stands behind the `?`.
    pub query: &'r str,
    /// What stands in the first `x-request-id`.
    pub request_id: Option<&'r [u8]>,
    /// All of its head: well-formed, but for what may be in its query.
    pub head: &'r [u8],
}

/// What became of a plain poll.
#[derive(Debug)]
pub enum Looked {
    /// It is answered.
    Hit(Hit),
    /// It has to wait.
    Miss(Box<Miss>),
}

/// A poll that is a hit, until its answer is sent.
#[derive(Debug)]
pub struct Hit {
    /// The answer's body, if it does not stand behind the head already.
    pub body: Data,
    /// When it was asked for.
    pub arrived: Instant,
    /// Its place among all requests.
    pub in_flight: InFlight,
}

/// A plain poll that is no hit.
#[derive(Debug)]
pub struct Miss {
    pub(super) request_id: HeaderValue,
    pub(super) trace: Trace,
    pub(super) terms: Terms,
    /// What a look has shown.
    pub(super) seen: Option<Lookup>,
    pub(super) in_flight: InFlight,
}

/// What has been found out of a poll whose key upstream accepts.
#[derive(Debug)]
pub(super) struct Lookup {
    pub(super) arrived: Instant,
    pub(super) asker: Asker,
    /// [`Cache::puts`](crate::cache::Cache::puts) before the look.
    pub(super) puts: u64,
    /// What the cache has, not fresh, or not found.
    pub(super) kept: Option<Answer>,
}

impl Gateway {
    /// Looks up a plain poll. What to send for a hit, and only if it `may_hit`, is added to `head`, status line and all
    /// headers, and it is counted. `None` of a poll that is not so plain after all, or has no place among all requests:
    /// nothing has happened then, and it is [`handle`](Self::handle)'s.
    pub fn look(&self, poll: PlainPoll<'_>, may_hit: bool, caller: &Caller, head: &mut Vec<u8>) -> Option<Looked> {
        panics::contain_now(|| self.look_up(poll, may_hit, caller, head))?
    }

    fn look_up(&self, poll: PlainPoll<'_>, may_hit: bool, caller: &Caller, head: &mut Vec<u8>) -> Option<Looked> {
        let task = TaskId::plain(poll.query)?;
        let in_flight = self.place().ok()?;
        // The longer way tells of each poll.
        if !may_hit || self.exporter.is_some() || enabled!(Level::DEBUG) {
            return self.miss(poll, task, None, in_flight);
        }
        let arrived = Instant::now();
        let hit = |asker: &Asker| {
            let account = &*asker.account;
            if !asker.is_settled(arrived) {
                return Err(None);
            }
            let puts = self.cache.puts();
            let state = self.cache.state(account.id, task, arrived);
            // An answer that says for how long it is fresh needs no lifetime of its account's.
            let live = if state.as_ref().is_some_and(Answer::is_live) {
                account.watch.asked(task, arrived);
                account.lifetime(arrived)
            } else {
                Duration::ZERO
            };
            let freshness = state.as_ref().map(|answer| answer.freshness(arrived, live));
            let (Some(answer), Some(freshness)) = (&state, freshness.filter(|freshness| freshness.is_fresh())) else {
                return Err(Some(Lookup {
                    arrived,
                    asker: asker.clone(),
                    puts,
                    kept: self.cache.or_not_found(state, account.id, task, arrived),
                }));
            };
            response::write_hit(head, answer, freshness, poll.request_id);
            let took = arrived.elapsed();
            account.answered(&asker.requests(caller), Served::Hit, false, answer.code(), took);
            Ok(state)
        };
        let answer = match self.accounts.with(poll.key, arrived, hit) {
            Some(Ok(answer)) => answer?,
            Some(Err(seen)) => return self.miss(poll, task, seen, in_flight),
            None => return self.miss(poll, task, None, in_flight),
        };
        let body = if answer.unpack(head) {
            Data::Bytes(Bytes::new())
        } else {
            answer.into()
        };
        Some(Looked::Hit(Hit {
            body,
            arrived,
            in_flight,
        }))
    }

    /// What has to be kept of `poll`, which asks for `task`, while it waits.
    fn miss(&self, poll: PlainPoll<'_>, task: &str, seen: Option<Lookup>, in_flight: InFlight) -> Option<Looked> {
        let key = match &seen {
            // Whoever has no token presents the key itself.
            Some(Lookup { asker, .. }) if !asker.has_token() => asker.key.secret.clone(),
            Some(_) | None => ApiKey::new(poll.key)?,
        };
        let request_id = response::request_id_of(poll.request_id);
        let config = self.config.load();
        let [names, traces] = poll.fields([config.client_header.as_str(), TRACEPARENT.as_str()]);
        let told = TraceContext::among(traces.into_iter());
        Some(Looked::Miss(Box::new(Miss {
            trace: self.trace(told, &Method::GET, TASK_INFO_PATH, &request_id),
            request_id,
            terms: Terms {
                key,
                task: TaskId::new(task).ok()?,
                name: names.first().and_then(|name| HeaderValue::from_bytes(name).ok()),
                max_age: None,
            },
            seen,
            in_flight,
        })))
    }
}

impl<'r> PlainPoll<'r> {
    /// What stands in each field that is called by one of `names`.
    fn fields<const N: usize>(&self, names: [&str; N]) -> [Vec<&'r [u8]>; N] {
        let mut fields = [const { Vec::new() }; N];
        let mut start = 0;
        for end in memchr::memchr_iter(b'\n', self.head) {
            let line = &self.head[start..end];
            start = end + 1;
            for (name, values) in names.iter().zip(&mut fields) {
                if let Some((field, value)) = line.split_at_checked(name.len())
                    && let Some(value) = value.strip_prefix(b":")
                    && field.eq_ignore_ascii_case(name.as_bytes())
                {
                    values.push(value.trim_ascii());
                }
            }
        }
        fields
    }
}
