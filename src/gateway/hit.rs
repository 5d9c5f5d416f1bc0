//! The poll that is a hit and nothing else: answered without a wait, a lock that all share, a header map, or a copy of what
//! it asks.
//!
//! Most polls are. They take the same decisions as every poll, in the same order (`Gateway::poll`), but on what stands in
//! the request. Whatever is not as plain as can be is left to that longer way: a key or an id that has to be decoded, two
//! keys or a Bearer, a wish for a fresher answer, a key that upstream refuses or is to be asked about, an answer that is
//! not fresh; and every poll while hits are logged or their spans kept. Both ways give the same answer, byte for byte
//! (`tests/gateway/hits.rs`).

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tracing::{Level, enabled};

use super::asker::Asker;
use super::{Data, Gateway, InFlight, response};
use crate::account::Caller;
use crate::outcome::Served;
use crate::panics;
use crate::task::TaskId;

/// A poll as plain as can be: a GET of one task with one key, on a connection that stays open.
#[derive(Clone, Copy)]
pub struct PlainPoll<'r> {
    /// What stands in `x-api-key`.
    pub key: &'r str,
    /// What stands behind the `?`.
    pub query: &'r str,
    /// What stands in the first `x-request-id`.
    pub request_id: Option<&'r [u8]>,
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

impl Gateway {
    /// What to send for `poll`, if it is a hit: the status line and all headers are added to `head`, and it is counted.
    /// Otherwise nothing has happened, and the poll is [`handle`](Self::handle)'s.
    pub fn hit(&self, poll: PlainPoll<'_>, caller: &Caller, head: &mut Vec<u8>) -> Option<Hit> {
        // The longer way tells of each poll.
        if self.exporter.is_some() || enabled!(Level::DEBUG) {
            return None;
        }
        panics::contain_now(|| self.look_up(poll, caller, head))?
    }

    fn look_up(&self, poll: PlainPoll<'_>, caller: &Caller, head: &mut Vec<u8>) -> Option<Hit> {
        let task = TaskId::plain(poll.query)?;
        let in_flight = self.place().ok()?;
        let arrived = Instant::now();
        let hit = |asker: &Asker| {
            let account = &*asker.account;
            if !asker.is_settled(arrived) {
                return None;
            }
            let answer = self.cache.state(account.id, task, arrived)?;
            // An answer that says for how long it is fresh needs no lifetime of its account's.
            let live = if answer.is_live() {
                account.watch.asked(task, arrived);
                account.lifetime(arrived)
            } else {
                Duration::ZERO
            };
            let freshness = answer.freshness(arrived, live);
            if !freshness.is_fresh() {
                return None;
            }
            response::write_hit(head, &answer, freshness, poll.request_id);
            let took = arrived.elapsed();
            account.answered(&asker.requests(caller), Served::Hit, false, answer.code(), took);
            Some(answer)
        };
        let answer = self.accounts.with(poll.key, arrived, hit)??;
        let body = if answer.unpack(head) {
            Data::Bytes(Bytes::new())
        } else {
            answer.into()
        };
        Some(Hit {
            body,
            arrived,
            in_flight,
        })
    }
}
