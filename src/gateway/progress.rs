//! How far a flight is, as all who wait for it see it, and how it ends.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::FlightKey;
use super::keys::Key;
use crate::budget::QueuedFlight;
use crate::error::Error;
use crate::flight::Leader;
use crate::stored::Answer;
use crate::trace::TraceContext;

/// How far a flight is, as its followers see it.
#[derive(Clone, Debug)]
pub(super) struct Progress {
    pub(super) queued: QueuedFlight,
    /// The span that whoever joins is linked to.
    pub(super) trace: Option<TraceContext>,
    pub(super) phase: Phase,
    /// Whether it fetches anew what is kept, and stale.
    pub(super) was_stale: bool,
    /// What upstream answered to the first attempt, while a second is under way.
    pub(super) last_error: Option<Answer>,
    pub(super) landed: Option<Landed>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// For its turn, or for its permit.
    Waiting,
    /// Its turn came at this instant, and all connections are in use.
    Crowded(Instant),
    /// Since this instant, for another replica's flight.
    Elsewhere(Instant),
    /// Its connection is being opened since this instant.
    Connecting(Instant),
    /// Spent at this instant: it will be finished and kept, whoever waits.
    Sent(Instant),
}

#[derive(Clone, Debug)]
pub(super) enum Landed {
    /// Another flight, or another replica, had just kept a fresh answer.
    Kept(Answer),
    /// Upstream's answer to a query with this key.
    Fetched(Answer, Arc<Key>),
    /// Unspent: meanwhile upstream refused the key, or had no credits for the account.
    InVain,
    /// Unspent: it gave way in a full queue.
    Shed,
    /// Unspent: a changed configuration has taken a key of the account that flew elsewhere.
    Superseded,
    Failed(Error),
}

impl Progress {
    /// A flight that has just been opened, by who has a stale answer or not.
    pub(super) fn new(queued: QueuedFlight, trace: Option<TraceContext>, was_stale: bool) -> Self {
        Self {
            queued,
            trace,
            phase: Phase::Waiting,
            was_stale,
            last_error: None,
            landed: None,
        }
    }
}

impl Landed {
    /// Whether nothing has been asked, nor will be.
    pub(super) fn is_unspent(&self) -> bool {
        match self {
            Self::Kept(_) | Self::InVain | Self::Superseded => true,
            // A query may have gone out; and after `Shed` its polls are answered, and do not go on.
            Self::Fetched(..) | Self::Failed(_) | Self::Shed => false,
        }
    }
}

/// How a flight ends, for whoever waits.
pub(super) async fn landing(mut progress: watch::Receiver<Progress>) -> Landed {
    match progress.wait_for(|progress| progress.landed.is_some()).await {
        Ok(progress) => progress.landed.clone().unwrap_or(Landed::Failed(Error::Internal)),
        // The leader is gone without a landing: it panicked.
        Err(_) => Landed::Failed(Error::Internal),
    }
}

/// What `future` gives. That it has to be waited for shows as `phase`, which begins then: mostly nothing has to be.
pub(super) async fn shown<T>(
    leader: &Leader<FlightKey, Progress>,
    phase: impl FnOnce(Instant) -> Phase,
    future: impl Future<Output = T>,
) -> T {
    let (mut phase, mut future) = (Some(phase), pin!(future));
    poll_fn(|cx| {
        let polled = future.as_mut().poll(cx);
        if polled.is_pending()
            && let Some(phase) = phase.take()
        {
            leader.update(|progress| progress.phase = phase(Instant::now()));
        }
        polled
    })
    .await
}
