//! One breaker for the upstream: while upstream is away, nobody waits for it and next to nothing is spent on it.
//!
//! Here is what everybody shares of it: the lock, the log, the metric, and a watch for whoever waits. When it opens and
//! closes is `breaker/state.rs`'s business, what is answered meanwhile `gateway/outage.rs`'s.

mod accounts;
mod state;
mod tasks;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus::IntGauge;
use scopeguard::{ScopeGuard, defer, guard};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until};

use crate::account::AccountId;
use crate::error::Error;
use crate::task::TaskId;
use state::{Change, LONGEST_WITHOUT, State};

/// How often whoever wants to probe looks whether it may.
const NEXT_LOOK: Duration = Duration::from_millis(50);

/// What the log says when an answer closes it.
const BACK: &str = "upstream is back: the breaker is closed";

/// What the upstream's health allows. Its changes are logged once each, here.
#[derive(Debug)]
pub struct Breaker {
    state: Mutex<State>,
    is_open: watch::Sender<bool>,
    gauge: IntGauge,
}

impl Breaker {
    pub(super) fn new(gauge: IntGauge) -> Self {
        Self {
            state: Mutex::new(State::new()),
            is_open: watch::Sender::new(false),
            gauge,
        }
    }

    /// Whether nobody but a probe may ask upstream: open, or half-open.
    pub fn is_open(&self) -> bool {
        *self.is_open.borrow()
    }

    /// Resolves once it is open.
    ///
    /// Cancel safe.
    pub async fn opened(&self) {
        // The sender is ours, so it is there.
        let _ = self.is_open.subscribe().wait_for(|is_open| *is_open).await;
    }

    /// How long it takes, from `now`, until the next probe may start.
    pub fn until_probe(&self, now: Instant) -> Duration {
        self.state.lock().until_probe(now)
    }

    /// Whether a connection that is idle since `since` may still be one to a healthy upstream: one from before an outage
    /// may be dead, and nothing would tell.
    pub(super) fn trusts(&self, since: Instant) -> bool {
        self.state.lock().last_opened().is_none_or(|opened| opened <= since)
    }

    /// Puts `task` of `account` first in line to be probed; `None` if the breaker is closed, or another is first that was probed
    /// no later. The receiver gets the right to ask once a poll comes when a probe is due, or fails when the breaker closes or
    /// another takes its place.
    pub fn line_up(&self, account: AccountId, task: &TaskId) -> Option<oneshot::Receiver<Probe>> {
        self.state.lock().line_up(account, task)
    }

    /// A poll that it keeps from upstream: as long as there are any, an outage is no old news. If a probe is due at `now`, it
    /// starts for whoever is first in line: one, or another beside one that is silent, and none while anybody waits for
    /// [`Self::next_probe`].
    pub fn kept_back(self: &Arc<Self>, now: Instant) {
        let begun = {
            let mut state = self.state.lock();
            state.keep_back(now);
            state.probe(now)
        };
        if let Some((number, turn)) = begun {
            // Not taken, it is dropped: the next one may start.
            let _ = turn.send(self.begun(number));
        }
    }

    /// The right to probe for somebody who has a connection, as soon as one is due; `None` once the breaker is closed.
    ///
    /// Cancel safe.
    pub async fn next_probe(self: &Arc<Self>, account: AccountId, task: &TaskId) -> Option<Probe> {
        self.state.lock().connected();
        defer! { self.state.lock().no_longer_connected() }
        while self.is_open() {
            let now = Instant::now();
            let begun = self.state.lock().probe_connected(account, task, now);
            if let Some(number) = begun {
                return Some(self.begun(number));
            }
            // One that is due may still not start: another is under way.
            sleep_until(now + self.until_probe(now).max(NEXT_LOOK)).await;
        }
        None
    }

    fn begun(self: &Arc<Self>, number: u64) -> Probe {
        Probe {
            breaker: Arc::clone(self),
            number,
        }
    }

    /// An attempt of `account` for `task`, begun at `asked`, got an answer that tells of it.
    pub fn answered(&self, account: AccountId, task: &TaskId, asked: Instant) {
        let mut state = self.state.lock();
        let change = state.answered(account, task, asked, Instant::now());
        self.note_closed(change, BACK);
    }

    /// An attempt of `account`, begun at `asked`, got an answer that tells nothing of its task.
    pub fn refused(&self, account: AccountId, asked: Instant) {
        let mut state = self.state.lock();
        let change = state.refused(account, asked, Instant::now());
        self.note_closed(change, BACK);
    }

    /// An attempt of `account` for `task`, begun at `asked`, got an answer that says that upstream is unavailable.
    pub fn answered_unavailable(&self, account: AccountId, task: &TaskId, asked: Instant, cause: impl fmt::Display) {
        self.state.lock().reached(Instant::now());
        self.failed(account, task, asked, cause);
    }

    /// An attempt of `account` for `task`, begun at `asked`, failed.
    pub fn failed(&self, account: AccountId, task: &TaskId, asked: Instant, cause: impl fmt::Display) {
        self.count(Some(account), task, asked, cause);
    }

    /// A failure, of no account where no connection came about.
    fn count(&self, account: Option<AccountId>, task: &TaskId, asked: Instant, cause: impl fmt::Display) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let change = state.failed(account, task, asked, now);
        self.note(change, cause);
    }

    /// Watches a connection being opened for `task`.
    ///
    /// Cancel safe, as far as `opening` is.
    pub(super) async fn watch<T>(
        &self,
        task: &TaskId,
        opening: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let began = Instant::now();
        self.state.lock().connecting(began);
        let given_up = guard((), |()| self.state.lock().gave_up(Instant::now()));
        tokio::pin!(opening);
        let result = loop {
            let look = self.state.lock().next_look();
            tokio::select! {
                biased;
                result = &mut opening => break result,
                () = sleep_until(look.unwrap_or(began)), if look.is_some() => self.look(),
            }
        };
        // It was not: it is there, or has failed.
        ScopeGuard::into_inner(given_up);
        self.state.lock().no_longer_connecting(Instant::now());
        match &result {
            Ok(_) => self.state.lock().reached(Instant::now()),
            Err(error) => {
                self.count(None, task, began, error.detail());
                self.look();
            }
        }
        result
    }

    /// Closes it where nobody has asked for so long that nothing is known of upstream any more. To be called every few
    /// seconds.
    pub(super) fn sweep(&self, now: Instant) {
        let mut state = self.state.lock();
        let change = state.forget(now);
        self.note_closed(
            change,
            "nobody has asked for a minute: the breaker is closed, the next poll will tell",
        );
    }

    fn look(&self) {
        let mut state = self.state.lock();
        let change = state.look(Instant::now());
        self.note(
            change,
            format_args!("no connection for {} s", LONGEST_WITHOUT.as_secs()),
        );
    }

    /// Called under the lock, so that changes are shown in their order.
    fn note(&self, change: Option<Change>, cause: impl fmt::Display) {
        if change == Some(Change::Opened) {
            self.show(true);
            tracing::warn!(
                %cause,
                "upstream is unavailable: the breaker is open, snapshots are served and upstream is only probed"
            );
        }
    }

    /// The same for a change the other way, of which `why` tells.
    fn note_closed(&self, change: Option<Change>, why: &str) {
        if change == Some(Change::Closed) {
            self.show(false);
            tracing::info!("{why}");
        }
    }

    fn show(&self, is_open: bool) {
        self.gauge.set(i64::from(is_open));
        self.is_open.send_replace(is_open);
    }
}

/// A probe under way. Dropped without an answer, be it for want of a permit, it lets the next one start.
#[derive(Debug)]
pub struct Probe {
    breaker: Arc<Breaker>,
    number: u64,
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.breaker.state.lock().probe_ended(self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt as _;
    use tokio::time::advance;

    use super::state::PROBE_INTERVAL;
    use super::*;

    fn task(name: &str) -> TaskId {
        TaskId::new(name).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_with_a_connection_is_the_next_to_probe() {
        let breaker = Arc::new(Breaker::new(IntGauge::new("open", "open").unwrap()));
        let account = AccountId::default();
        for name in ["a", "b", "a", "b", "a"] {
            breaker.failed(account, &task(name), Instant::now(), "a test");
        }
        let probe = |name| {
            let turn = breaker.line_up(account, &task(name));
            breaker.kept_back(Instant::now());
            turn?.try_recv().ok()
        };
        advance(PROBE_INTERVAL).await;
        drop(probe("a").unwrap());
        {
            let a = task("a");
            let mut waits = pin!(breaker.next_probe(account, &a));
            assert!(waits.as_mut().now_or_never().is_none());
            advance(PROBE_INTERVAL).await;
            // Its timer may wake it later than this.
            assert!(probe("b").is_none(), "it would have to connect first");
            assert!(waits.as_mut().now_or_never().is_some(), "it has waited an interval");
            advance(PROBE_INTERVAL).await;
        }
        drop(probe("b").expect("nobody waits any more"));
        let b = task("b");
        {
            let mut gives_up = pin!(breaker.next_probe(account, &b));
            assert!(gives_up.as_mut().now_or_never().is_none());
        }
        advance(PROBE_INTERVAL).await;
        assert!(probe("a").is_some());
    }
}
