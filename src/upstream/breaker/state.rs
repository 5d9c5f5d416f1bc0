//! The breaker's state machine: closed, open, half-open. Pure: `now` is passed in, nothing is logged or awaited.
//!
//! It opens on 5 failures in a row over at least 2 tasks, since a task that always fails says little about upstream
//! (`breaker/tasks.rs`), as does an account that fails while others are answered (`breaker/accounts.rs`); or when no
//! connection came about for 2 s while somebody wanted one. The pause behind an attempt that failed is part of these;
//! the one behind an attempt that was given up is not: nobody knows what would have become of it. Evidence is weighed
//! by when it was *asked for*: a time-out that comes in after upstream has recovered tells of the outage, and an answer
//! that was on its way when the breaker opened does not close it. Nothing but an answer does, and of answers that
//! refuse only one that contradicts somebody's failures; unless nobody has asked for a minute: then there is nobody to
//! be kept from upstream, and nobody is told of an outage that may be over.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Probe;
use super::accounts::Accounts;
use super::tasks::Tasks;
use crate::account::AccountId;
use crate::task::TaskId;

/// So many failures in a row, over at least two tasks, open it.
pub(super) const MOST_FAILURES: u32 = 5;

/// So many do between which there were only answers that say nothing against them.
const MOST_BESIDE_REFUSALS: u32 = 2 * MOST_FAILURES;

/// So long without a connection, while somebody wants one, opens it.
pub(super) const LONGEST_WITHOUT: Duration = Duration::from_secs(2);

/// From the start of one probe to that of the next, at least.
pub(super) const PROBE_INTERVAL: Duration = Duration::from_millis(1500);

/// So many probed tasks are remembered.
const MOST_PROBED: usize = 64;

/// So long after anybody asked last, nothing is known of upstream any more: whoever comes then finds out as if it had never
/// been away.
pub(super) const FORGOTTEN_AFTER: Duration = Duration::from_mins(1);

/// The breaker became another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Opened,
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Closed,
    Open,
    /// Open, while a probe is under way.
    HalfOpen,
}

/// Whom the next probe is for.
#[derive(Debug)]
struct Candidate {
    account: AccountId,
    task: TaskId,
    /// Tells them that it is due.
    turn: oneshot::Sender<Probe>,
}

/// What is known of upstream's health.
#[derive(Debug)]
pub(super) struct State {
    phase: Phase,
    /// When it opened last.
    opened: Option<Instant>,
    /// Failures since the last answer that was none, and says something against them.
    failures: u32,
    /// How many of these open it.
    enough: u32,
    /// The task of the first of them, and whose it is.
    failing: Option<(Option<AccountId>, TaskId)>,
    /// Whether another task is among them, or has failed beside them.
    several_fail: bool,
    /// Whether another account is among them.
    several_accounts_fail: bool,
    /// A task that has failed since, and does not count (`breaker/tasks.rs`).
    beside: Option<TaskId>,
    accounts: Accounts,
    tasks: Tasks,
    /// When the latest attempt that got an answer was begun: of those begun before, nothing is news.
    answered: Option<Instant>,
    /// Connections that are being opened.
    wanted: usize,
    /// When a connection was last wanted.
    last_wanted: Option<Instant>,
    /// How long none came about, up to `without_since`.
    without: Duration,
    /// Since when none comes about, while that is known: one is being opened, or the last that was has failed.
    without_since: Option<Instant>,
    /// Probes so far.
    probes: u64,
    /// When the next probe may start.
    next_probe: Option<Instant>,
    /// The tasks that were probed last, and whose they are, the last at the back: the next outage goes on where the last one
    /// ended, else whoever polls most would be probed first each time, though it may be what opens the breaker.
    probed: VecDeque<(AccountId, TaskId)>,
    /// Whether the last that was heard since the last probe began was a refusal.
    was_refused: bool,
    /// Of those that were kept back and not probed since, the one that goes first.
    candidate: Option<Candidate>,
    /// When anybody asked last.
    asked: Option<Instant>,
    /// Those who have a connection and wait to probe with it.
    connected: usize,
}

impl State {
    /// Closed: nothing is known yet.
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Closed,
            opened: None,
            failures: 0,
            enough: MOST_FAILURES,
            failing: None,
            several_fail: false,
            beside: None,
            several_accounts_fail: false,
            accounts: Accounts::default(),
            tasks: Tasks::default(),
            answered: None,
            wanted: 0,
            last_wanted: None,
            without: Duration::ZERO,
            without_since: None,
            probes: 0,
            next_probe: None,
            probed: VecDeque::new(),
            was_refused: false,
            candidate: None,
            asked: None,
            connected: 0,
        }
    }

    /// Whether nobody but a probe may ask upstream.
    pub(super) fn is_open(&self) -> bool {
        self.phase != Phase::Closed
    }

    /// When it opened last, however it is now.
    pub(super) fn last_opened(&self) -> Option<Instant> {
        self.opened
    }

    /// How long it takes, from `now`, until the next probe may start.
    pub(super) fn until_probe(&self, now: Instant) -> Duration {
        let next = self.next_probe.filter(|_| self.is_open());
        next.map_or(Duration::ZERO, |next| next.saturating_duration_since(now))
    }

    /// An attempt of `account` for `task`, begun at `asked`, failed in a way that says that upstream is unavailable; of no
    /// account where there was no connection, which is the same for all.
    pub(super) fn failed(
        &mut self,
        account: Option<AccountId>,
        task: &TaskId,
        asked: Instant,
        now: Instant,
    ) -> Option<Change> {
        if self.is_open() {
            if let Some(account) = account {
                self.accounts.still_fails(account, task, asked);
            }
            return None;
        }
        if self.answered.is_some_and(|answered| asked < answered) {
            return None;
        }
        if let Some(account) = account {
            if !self.tasks.failed(account, task, asked) {
                self.accounts.still_fails(account, task, asked);
                // It is another task than whichever fails next to it.
                self.several_fail |= self.failing.as_ref().is_some_and(|(_, failing)| failing != task);
                self.beside.get_or_insert_with(|| task.clone());
                return None;
            }
            if !self.accounts.failed(account, task, asked) {
                return None;
            }
        }
        self.several_fail |= self.beside.as_ref().is_some_and(|beside| beside != task);
        self.failures = self.failures.saturating_add(1);
        match &self.failing {
            None => self.failing = Some((account, task.clone())),
            Some((first, failing)) => {
                self.several_fail |= failing != task;
                self.several_accounts_fail |= *first != account;
            }
        }
        let is_enough = self.failures >= self.enough && self.several_fail;
        let is_contradicted = |account| self.accounts.others_were_answered(account, asked);
        let is_its_own = !self.several_accounts_fail && account.is_some_and(is_contradicted);
        (is_enough && !is_its_own).then(|| self.open(now))
    }

    /// An attempt of `account` for `task`, begun at `asked`, got an answer that tells of it.
    pub(super) fn answered(
        &mut self,
        account: AccountId,
        task: &TaskId,
        asked: Instant,
        now: Instant,
    ) -> Option<Change> {
        let was_open = self.is_open();
        if self.is_old_news(asked) {
            return None;
        }
        self.tasks.answered(account, task, asked);
        self.accounts.answered(account, asked);
        self.is_back(asked);
        self.reached(now);
        was_open.then_some(Change::Closed)
    }

    /// An attempt of `account`, begun at `asked`, got an answer that tells nothing of its task: a refusal of the key or of the
    /// rate may come from something that stands before the API, and is there without it. So where the account had not failed,
    /// and others lately have and heard nothing since, it closes nothing, and failures are in a row only since then, but are not
    /// forgotten.
    pub(super) fn refused(&mut self, account: AccountId, asked: Instant, now: Instant) -> Option<Change> {
        let was_open = self.is_open();
        if self.is_old_news(asked) {
            return None;
        }
        self.was_refused = true;
        let is_change = self.accounts.refused(account, asked);
        self.reached(now);
        if !is_change && self.accounts.others_hear_nothing(account, asked) {
            self.enough = MOST_BESIDE_REFUSALS.min(self.failures.saturating_add(MOST_FAILURES));
            return None;
        }
        if was_open {
            self.is_back(asked);
        } else {
            // And no more: what others asked before may yet turn out to have failed, and be the first that tells.
            self.forget_failures();
        }
        was_open.then_some(Change::Closed)
    }

    /// Whether what was asked for at `asked` tells of the time before the outage.
    fn is_old_news(&self, asked: Instant) -> bool {
        self.is_open() && self.opened.is_some_and(|opened| asked < opened)
    }

    fn is_back(&mut self, asked: Instant) {
        self.close();
        self.forget_failures();
        self.answered = self.answered.max(Some(asked));
    }

    /// Upstream was reached at `now`, be it by an answer that counts as a failure.
    pub(super) fn reached(&mut self, now: Instant) {
        self.without = Duration::ZERO;
        self.without_since = (self.wanted > 0).then_some(now);
    }

    /// A connection is being opened.
    pub(super) fn connecting(&mut self, now: Instant) {
        // What was long ago is no part of an outage now; but between two attempts there may be a pause.
        let continues = self.wanted > 0
            || self
                .last_wanted
                .is_some_and(|last| now.saturating_duration_since(last) < LONGEST_WITHOUT);
        if !continues {
            self.reached(now);
        }
        self.without_since.get_or_insert(now);
        self.wanted += 1;
        self.last_wanted = Some(now);
    }

    /// One that was being opened is no more: it failed, or it is there, which [`Self::reached`] says next.
    pub(super) fn no_longer_connecting(&mut self, now: Instant) {
        self.wanted = self.wanted.saturating_sub(1);
        self.last_wanted = Some(now);
    }

    /// One that was being opened is no more, and nobody knows what would have become of it.
    pub(super) fn gave_up(&mut self, now: Instant) {
        self.no_longer_connecting(now);
        if self.wanted == 0 {
            self.without = self.without_for(now);
            self.without_since = None;
        }
    }

    /// When to look whether there was no connection for too long: while closed, with one being opened.
    pub(super) fn next_look(&self) -> Option<Instant> {
        let since = self.without_since.filter(|_| !self.is_open() && self.wanted > 0)?;
        Some(since + LONGEST_WITHOUT.saturating_sub(self.without))
    }

    /// Looks whether there was no connection for too long, as one is being opened or has just failed.
    pub(super) fn look(&mut self, now: Instant) -> Option<Change> {
        let is_long = self.without_for(now) >= LONGEST_WITHOUT;
        (is_long && !self.is_open()).then(|| self.open(now))
    }

    /// How long no connection has come about.
    fn without_for(&self, now: Instant) -> Duration {
        let lately = self.without_since.map(|since| now.saturating_duration_since(since));
        self.without + lately.unwrap_or_default()
    }

    /// Somebody would have asked.
    pub(super) fn keep_back(&mut self, now: Instant) {
        self.asked = Some(now);
    }

    /// Makes `task` of `account` the next to be probed, unless another goes first: one that is polled seldom is not there
    /// when a probe is due. They are told when it starts, or the sender is dropped.
    pub(super) fn line_up(&mut self, account: AccountId, task: &TaskId) -> Option<oneshot::Receiver<Probe>> {
        // However many are refused, nobody whom upstream may answer again waits behind them all.
        let rank = |account, task: &TaskId| {
            let is_later = self.was_refused && !self.accounts.may_be_answered(account);
            (is_later, self.last_probed(account, task))
        };
        let goes_first = |other: &Candidate| {
            // Whoever has gone would let the probe go to waste.
            !other.turn.is_closed() && rank(other.account, &other.task) <= rank(account, task)
        };
        if !self.is_open() || self.candidate.as_ref().is_some_and(goes_first) {
            return None;
        }
        let (turn, told) = oneshot::channel();
        let task = task.clone();
        self.candidate = Some(Candidate { account, task, turn });
        Some(told)
    }

    /// Where the account and the task stand among those that were probed: what always fails comes round like all others, and
    /// an account no sooner for having many tasks that do.
    fn last_probed(&self, account: AccountId, task: &TaskId) -> (Option<usize>, Option<usize>) {
        let account_at = self.probed.iter().rposition(|(probed, _)| *probed == account);
        let is_it = |(of, probed): &(AccountId, TaskId)| *of == account && probed == task;
        (account_at, self.probed.iter().position(is_it))
    }

    /// Lets a probe start now, if one may, for whoever goes first: then it is half-open until [`Self::answered`] or
    /// [`Self::probe_ended`], which takes the probe's number.
    pub(super) fn probe(&mut self, now: Instant) -> Option<(u64, oneshot::Sender<Probe>)> {
        // Its connection may be as late as theirs was: each would give its right back, and nobody ever ask.
        if self.connected > 0 {
            return None;
        }
        let first = self.candidate.as_ref().filter(|first| !first.turn.is_closed())?;
        let (account, task) = (first.account, first.task.clone());
        // While one is silent that may be about a task which hangs, another task's may go.
        let silent = self.probed.back();
        let may_overtake = silent.is_some_and(|(of, silent)| (*of, silent) != (account, &task));
        let number = self.start_probe(account, task, may_overtake, now)?;
        Some((number, self.candidate.take()?.turn))
    }

    /// Somebody has a connection and waits to probe with it: until [`Self::no_longer_connected`] nobody else may.
    pub(super) fn connected(&mut self) {
        self.connected += 1;
    }

    /// It has probed, or waits no longer.
    pub(super) fn no_longer_connected(&mut self) {
        self.connected = self.connected.saturating_sub(1);
    }

    /// Lets one of them probe, whichever task was probed last: that one was not asked for. Beside a silent one, too: nobody
    /// else may while they wait.
    pub(super) fn probe_connected(&mut self, account: AccountId, task: &TaskId, now: Instant) -> Option<u64> {
        self.start_probe(account, task.clone(), true, now)
    }

    fn start_probe(&mut self, account: AccountId, task: TaskId, may_overtake: bool, now: Instant) -> Option<u64> {
        let turn = match self.phase {
            Phase::Open => self.next_probe,
            Phase::HalfOpen if may_overtake => self.next_probe.map(|next| next + PROBE_INTERVAL),
            Phase::Closed | Phase::HalfOpen => return None,
        };
        if turn.is_some_and(|turn| now < turn) {
            return None;
        }
        self.phase = Phase::HalfOpen;
        self.probes += 1;
        self.was_refused = false;
        self.next_probe = Some(now + PROBE_INTERVAL);
        let probed = (account, task);
        self.probed.retain(|other| *other != probed);
        if self.probed.len() == MOST_PROBED {
            self.probed.pop_front();
        }
        self.probed.push_back(probed);
        Some(self.probes)
    }

    /// Closes it where nobody has asked for so long that it says nothing of upstream any more.
    pub(super) fn forget(&mut self, now: Instant) -> Option<Change> {
        let last = self.asked.max(self.opened).max(self.next_probe);
        let is_news = last.is_some_and(|last| now.saturating_duration_since(last) < FORGOTTEN_AFTER);
        if self.phase != Phase::Open || is_news {
            return None;
        }
        self.close();
        self.reached(now);
        Some(Change::Closed)
    }

    /// The probe is over. If its answer did not close the breaker, it is open again.
    pub(super) fn probe_ended(&mut self, number: u64) {
        // One that is late may have been overtaken: closed by another answer, opened again, another probe.
        if self.phase == Phase::HalfOpen && self.probes == number {
            self.phase = Phase::Open;
        }
    }

    fn open(&mut self, now: Instant) -> Change {
        self.phase = Phase::Open;
        self.opened = Some(now);
        self.was_refused = false;
        self.forget_failures();
        self.next_probe = Some(now + PROBE_INTERVAL);
        Change::Opened
    }

    fn close(&mut self) {
        self.phase = Phase::Closed;
        self.candidate = None;
    }

    fn forget_failures(&mut self) {
        self.failures = 0;
        self.enough = MOST_FAILURES;
        self.failing = None;
        self.several_fail = false;
        self.beside = None;
        self.several_accounts_fail = false;
    }
}

#[cfg(test)]
mod tests;
