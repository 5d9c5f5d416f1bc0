//! How a poll is answered: with what is kept, in place of an error, or with what its flight has fetched.

use std::time::Duration;

use tokio::time::Instant;

use super::response::CacheStatus;
use crate::outcome::Served;
use crate::stored::Answer;

/// How a poll is answered.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) served: Served,
    pub(super) cache: CacheStatus,
    pub(super) answer: Answer,
}

impl Answered {
    /// With a fresh answer that is kept.
    pub(super) fn hit(answer: Answer) -> Self {
        Self {
            served: Served::Hit,
            cache: CacheStatus::Hit(None),
            answer,
        }
    }

    /// With a snapshot in place of the error that `detail` names. `live` is the freshness lifetime of live answers at `now`.
    pub(super) fn stand_in(answer: Answer, detail: &'static str, now: Instant, live: Duration) -> Self {
        let served = if answer.is_fresh(now, live) {
            Served::Hit
        } else {
            Served::Stale
        };
        Self {
            served,
            cache: CacheStatus::Hit(Some(detail)),
            answer,
        }
    }

    /// With what a flight has fetched: its own or, `collapsed`, somebody else's.
    pub(super) fn forwarded(answer: Answer, was_stale: bool, collapsed: bool) -> Self {
        let served = if collapsed { Served::Collapsed } else { Served::Miss };
        Self {
            served,
            cache: CacheStatus::Forwarded { was_stale, collapsed },
            answer,
        }
    }
}
