//! The poll that is a hit and nothing else: answered without a wait, a lock that all share, or a copy of what it asks.
//!
//! Most polls are. They take the same decisions as every poll, in the same order (`Gateway::poll`), but look things up by
//! what stands in the request. Whatever is not as plain as can be is left to that longer way: a key or an id that has to be
//! decoded, two keys or a Bearer, a key that upstream refuses or is to be asked about, an answer that is not fresh.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, Request, Response};
use tokio::time::Instant;

use super::asker::Asker;
use super::credential::plain_key;
use super::max_age;
use super::response::{self, CacheStatus};
use super::traced::Trace;
use super::{Body, Gateway};
use crate::account::Caller;
use crate::outcome::Served;
use crate::task::TaskId;
use crate::upstream::TASK_INFO_PATH;

impl Gateway {
    /// The answer to `request`, if it is a hit and plain.
    pub(super) fn hit<B>(
        &self,
        request: &Request<B>,
        caller: &Caller,
        request_id: &HeaderValue,
    ) -> Option<Response<Body>> {
        let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
        if !is_read || request.uri().path() != TASK_INFO_PATH {
            return None;
        }
        let key = plain_key(request.headers())?;
        let task = TaskId::plain(request.uri().query()?)?;
        let arrived = Instant::now();
        self.accounts.with(key, arrived, |asker| {
            self.hit_of(asker, task, request.headers(), caller, arrived, request_id)
        })?
    }

    fn hit_of(
        &self,
        asker: &Asker,
        task: &str,
        headers: &HeaderMap,
        caller: &Caller,
        arrived: Instant,
        request_id: &HeaderValue,
    ) -> Option<Response<Body>> {
        if !asker.is_settled(arrived) {
            return None;
        }
        let account = &*asker.account;
        let answer = self.cache.state(account.id, task, arrived)?;
        // An answer that says for how long it is fresh needs no lifetime of its account's.
        let lifetime = if answer.is_live() {
            account.watch.asked(task, arrived);
            account.lifetime(arrived)
        } else {
            Duration::ZERO
        };
        let wanted = || self.lifetime_wanted(account, max_age::wanted(headers), lifetime);
        if !answer.is_fresh(arrived, if answer.is_live() { wanted() } else { lifetime }) {
            return None;
        }
        let now = Instant::now();
        let took = now.saturating_duration_since(arrived);
        account.answered(&asker.requests(caller), Served::Hit, answer.code(), took);
        tracing::debug!(
            request_id = request_id.to_str().unwrap_or_default(),
            trace_id = %Trace::of(headers).id(),
            account = &*account.label,
            task,
            cache = Served::Hit.label(),
            code = answer.code(),
            took_s = took.as_secs_f64(),
            "poll answered"
        );
        Some(response::answer(answer, CacheStatus::Hit(None), now, lifetime))
    }
}
