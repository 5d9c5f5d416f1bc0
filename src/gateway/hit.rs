//! The poll that is a hit and nothing else: answered without a wait, a lock that all share, or a copy of what it asks.
//!
//! Most polls are. They take the same decisions as every poll, in the same order (`Gateway::poll`), but look things up by
//! what stands in the request. Whatever is not as plain as can be is left to that longer way: a key or an id that has to be
//! decoded, two keys or a Bearer, a key that upstream refuses or is to be asked about, an answer that is not fresh.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, Request, Response};
use tokio::time::Instant;

use super::credential::plain_key;
use super::max_age;
use super::traced::Trace;
use super::{Asked, Body, Gateway, hit};
use crate::account::Caller;
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
            let asked = Asked {
                asker,
                caller,
                task,
                arrived,
                request_id,
            };
            self.hit_of(asked, request.headers())
        })?
    }

    fn hit_of(&self, asked: Asked<'_>, headers: &HeaderMap) -> Option<Response<Body>> {
        let Asked {
            asker, task, arrived, ..
        } = asked;
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
        Some(asked.answered(hit(answer), Instant::now(), lifetime, || Trace::of(headers).id()))
    }
}
