//! Whose failures say nothing of upstream: those of an account that fails while others are answered. And whose refusals say
//! nothing against an outage: those of an account that is refused while others fail.
//!
//! Evidence is weighed by when it was asked for, as in `breaker/state.rs`.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::state::{FORGOTTEN_AFTER, MOST_FAILURES};
use crate::account::AccountId;
use crate::task::TaskId;

/// So long after an account asked what was answered, another's failures alone are its own.
pub(super) const LATELY: Duration = Duration::from_secs(2);

/// So long after nobody else was answered, an account that failed while others were answered may say something of upstream
/// again: as long as the breaker waits for somebody who asks.
const TROUBLE: Duration = FORGOTTEN_AFTER;

/// So many accounts are remembered.
const MOST_KNOWN: usize = 64;

/// The accounts to which upstream said anything last, the last at the back.
#[derive(Debug, Default)]
pub(super) struct Accounts(VecDeque<Known>);

/// What upstream said to an account.
#[derive(Debug)]
struct Known {
    account: AccountId,
    /// When the latest query that was answered was begun.
    answered: Option<Instant>,
    /// How many were answered since another task failed than the one that had failed last, up to [`MOST_FAILURES`].
    answers: u32,
    /// How many have failed since the last answer, up to [`MOST_FAILURES`].
    failures: u32,
    /// When the latest of these was begun.
    failed: Option<Instant>,
    /// When the latest of all that failed was begun.
    last_failed: Option<Instant>,
    /// The task that failed last.
    failing: Option<TaskId>,
    /// Whether another has failed since anything was heard.
    several_fail: bool,
    /// When the latest to which anything else was said was begun, be it a refusal.
    heard: Option<Instant>,
    /// Whether somebody else was answered who asked after so many failures.
    is_in_trouble: bool,
}

impl Known {
    fn new(account: AccountId) -> Self {
        Self {
            account,
            answered: None,
            answers: 0,
            failures: 0,
            failed: None,
            last_failed: None,
            failing: None,
            several_fail: false,
            heard: None,
            is_in_trouble: false,
        }
    }

    fn fails(&mut self, task: &TaskId, asked: Instant) {
        if Some(asked) < self.heard {
            return;
        }
        if self.failing.as_ref() != Some(task) {
            self.several_fail |= self.unheard().is_some();
            self.failing = Some(task.clone());
            // A task that always fails keeps the account in trouble no longer than the others do.
            self.answers = 0;
        }
        self.last_failed = self.last_failed.max(Some(asked));
    }

    fn hears(&mut self, asked: Instant) {
        self.heard = self.heard.max(Some(asked));
        self.several_fail &= self.unheard().is_some();
    }

    /// When the latest that failed was begun, if nothing was heard that was asked for since, not even a refusal.
    fn unheard(&self) -> Option<Instant> {
        self.last_failed.filter(|failed| Some(*failed) > self.heard)
    }
}

impl Accounts {
    /// A query of `account` that was begun at `asked` failed: whether that may say anything of upstream. It may not once the
    /// account has failed so often that it would open the breaker, and then somebody else was answered, until it is answered
    /// as often itself, with no more than one task that fails between, or nobody else is for [`TROUBLE`] who does not fail by
    /// now: else the two would open and close the breaker for ever.
    pub(super) fn failed(&mut self, account: AccountId, task: &TaskId, asked: Instant) -> bool {
        let mut known = self.take(account);
        known.fails(task, asked);
        if known.failures < MOST_FAILURES {
            known.failures += 1;
            known.failed = known.failed.max(Some(asked));
        }
        let may_count = !known.is_in_trouble || !self.others_do_well(account, asked);
        self.put(known);
        may_count
    }

    /// The same while the breaker is open: a failure that is expected says nothing of the account.
    pub(super) fn still_fails(&mut self, account: AccountId, task: &TaskId, asked: Instant) {
        let mut known = self.take(account);
        known.fails(task, asked);
        self.put(known);
    }

    /// A query of `account` that was begun at `asked` was answered by what tells of its task.
    pub(super) fn answered(&mut self, account: AccountId, asked: Instant) {
        let mut known = self.take(account);
        known.answered = known.answered.max(Some(asked));
        known.hears(asked);
        known.answers = MOST_FAILURES.min(known.answers + 1);
        known.failures = 0;
        known.failed = None;
        known.is_in_trouble &= known.answers < MOST_FAILURES;
        for other in &mut self.0 {
            if !other.is_in_trouble && other.failures == MOST_FAILURES && other.failed < Some(asked) {
                other.is_in_trouble = true;
                other.answers = 0;
            }
        }
        self.put(known);
    }

    /// A query of `account` that was begun at `asked` was answered by what tells nothing of its task: whether the
    /// account had failed in the [`TROUBLE`] before, so that this is a change. One that has never been anything but
    /// refused is not remembered: there may be any number of such keys.
    pub(super) fn refused(&mut self, account: AccountId, asked: Instant) -> bool {
        let Some(known) = self.0.iter_mut().find(|known| known.account == account) else {
            return false;
        };
        let lately = |failed| failed < asked && asked.saturating_duration_since(failed) < TROUBLE;
        let had_failed = known.unheard().is_some_and(lately);
        known.hears(asked);
        had_failed
    }

    /// Whether the last that upstream said to `account` was no refusal: it has failed since, or was answered.
    pub(super) fn may_be_answered(&self, account: AccountId) -> bool {
        let was_answered = |known: &Known| known.answered.is_some() && known.answered == known.heard;
        self.0
            .iter()
            .any(|known| known.account == account && (known.unheard().is_some() || was_answered(known)))
    }

    /// Whether other accounts than `account` have failed [`TROUBLE`] before `asked`, or since, with at least two tasks, and heard
    /// nothing afterwards.
    pub(super) fn others_hear_nothing(&self, account: AccountId, asked: Instant) -> bool {
        let lately = |failed| asked.saturating_duration_since(failed) < TROUBLE;
        let mut others = self
            .0
            .iter()
            .filter(|known| known.account != account && known.unheard().is_some_and(lately));
        others
            .next()
            .is_some_and(|first| first.several_fail || others.next().is_some())
    }

    /// Whether another account than `account` was answered what it asked [`LATELY`] before `asked`, or since.
    pub(super) fn others_were_answered(&self, account: AccountId, asked: Instant) -> bool {
        let lately = |answered| asked.saturating_duration_since(answered) < LATELY;
        self.0
            .iter()
            .any(|known| known.account != account && known.answered.is_some_and(lately))
    }

    /// The same within [`TROUBLE`], of those to whom nothing has failed [`LATELY`] after their last answer, or later: who fails
    /// itself contradicts nobody.
    fn others_do_well(&self, account: AccountId, asked: Instant) -> bool {
        let lately = |answered| asked.saturating_duration_since(answered) < TROUBLE;
        self.0.iter().any(|known| {
            let fails = known.unheard().zip(known.answered);
            let does_well = fails.is_none_or(|(failed, answered)| failed.saturating_duration_since(answered) < LATELY);
            known.account != account && does_well && known.answered.is_some_and(lately)
        })
    }

    fn take(&mut self, account: AccountId) -> Known {
        let at = self.0.iter().position(|known| known.account == account);
        at.and_then(|at| self.0.remove(at))
            .unwrap_or_else(|| Known::new(account))
    }

    fn put(&mut self, known: Known) {
        if self.0.len() == MOST_KNOWN {
            self.0.pop_front();
        }
        self.0.push_back(known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::AccountIds;

    const MS: Duration = Duration::from_millis(1);

    fn task(name: &str) -> TaskId {
        TaskId::new(name).unwrap()
    }

    fn accounts<const N: usize>() -> (Accounts, [AccountId; N]) {
        let ids = AccountIds::default();
        (Accounts::default(), std::array::from_fn(|n| ids.listed(&n.to_string())))
    }

    #[test]
    fn another_is_contradicted_by_what_was_asked_lately_however_late_its_answer() {
        let (mut accounts, [a, b]) = accounts();
        let now = Instant::now();
        accounts.answered(a, now);
        assert!(accounts.others_were_answered(b, now + LATELY - MS));
        assert!(!accounts.others_were_answered(b, now + LATELY));
        assert!(
            !accounts.others_were_answered(a, now),
            "only another's says that it is the account"
        );
        // An answer that comes after one to a later query.
        accounts.answered(a, now - LATELY);
        assert!(accounts.others_were_answered(b, now));
    }

    #[test]
    fn an_account_is_in_trouble_once_another_is_answered_that_asked_after_five_failures() {
        let (mut accounts, [a, b]) = accounts();
        let now = Instant::now();
        for failure in 0..5 {
            accounts.answered(b, now + failure * MS);
            assert!(accounts.failed(a, &task("a"), now + failure * MS));
        }
        accounts.answered(b, now + 4 * MS);
        assert!(
            accounts.failed(a, &task("a"), now + 5 * MS),
            "that was asked for before"
        );
        accounts.answered(b, now + 5 * MS);
        assert!(!accounts.failed(a, &task("a"), now + 6 * MS));
        assert!(accounts.failed(b, &task("a"), now + 6 * MS));
    }

    #[test]
    fn it_takes_five_answers_since_the_trouble_began() {
        let (mut accounts, [a, b]) = accounts();
        let now = Instant::now();
        // What it was answered before counts for nothing, though it is the same task that fails.
        accounts.failed(a, &task("a"), now);
        for _ in 0..5 {
            accounts.answered(a, now);
        }
        for _ in 0..5 {
            accounts.failed(a, &task("a"), now + MS);
        }
        accounts.answered(b, now + 2 * MS);
        for answer in 0..5 {
            assert!(!accounts.failed(a, &task("a"), now + 3 * MS), "{answer}");
            accounts.answered(a, now + 4 * MS);
        }
        assert!(accounts.failed(a, &task("a"), now + 5 * MS));
    }

    #[test]
    fn several_tasks_fail_where_each_was_asked_for_after_anything_was_heard() {
        let now = Instant::now();
        let fails = |heard_late: bool, asked: [Duration; 2]| {
            let (mut accounts, [a, b]) = accounts();
            accounts.answered(a, now + 5 * MS);
            for (name, asked) in ["x", "y"].into_iter().zip(asked) {
                accounts.failed(a, &task(name), now + asked);
            }
            if heard_late {
                accounts.refused(a, now + 6 * MS);
            }
            accounts.others_hear_nothing(b, now + 20 * MS)
        };
        assert!(fails(false, [10 * MS, 11 * MS]));
        assert!(fails(true, [10 * MS, 11 * MS]), "what was refused was asked for before");
        assert!(!fails(false, [10 * MS, 3 * MS]), "and so was the second");
        assert!(!fails(true, [3 * MS, 10 * MS]));
    }

    #[test]
    fn an_account_is_out_of_trouble_once_it_is_answered_five_times_in_a_row_but_for_a_task_that_always_fails() {
        for (tasks, gets_out) in [(&["a", "a"], true), (&["a", "b"], false)] {
            let (mut accounts, [a, b]) = accounts();
            let now = Instant::now();
            for _ in 0..5 {
                accounts.failed(a, &task("a"), now);
            }
            accounts.answered(b, now + MS);
            let is_out = (0..10).any(|round| {
                accounts.answered(a, now + 2 * MS);
                accounts.failed(a, &task(tasks[round % 2]), now + 2 * MS)
            });
            assert_eq!(is_out, gets_out, "{tasks:?}");
        }
    }

    #[test]
    fn however_many_keys_are_refused_nobody_is_forgotten_for_them() {
        let (mut accounts, [a, b, refused @ ..]) = accounts::<200>();
        let now = Instant::now();
        accounts.answered(b, now);
        for refused in refused {
            accounts.refused(refused, now);
        }
        assert!(accounts.others_were_answered(a, now));
    }

    #[test]
    fn an_account_hears_nothing_from_a_failure_on_until_anything_is_said_to_it() {
        let (mut accounts, [a, b, c]) = accounts();
        let now = Instant::now();
        let fails = |accounts: &mut Accounts, at| {
            accounts.failed(b, &task("a"), at);
            accounts.failed(b, &task("b"), at);
        };
        assert!(!accounts.others_hear_nothing(a, now));
        fails(&mut accounts, now);
        assert!(accounts.others_hear_nothing(a, now + TROUBLE - MS));
        assert!(!accounts.others_hear_nothing(a, now + TROUBLE));
        assert!(!accounts.others_hear_nothing(b, now), "only another's");
        accounts.still_fails(b, &task("a"), now + MS);
        assert!(accounts.others_hear_nothing(a, now + TROUBLE));
        assert!(!accounts.refused(b, now));
        assert!(accounts.may_be_answered(b), "that was asked for before");
        assert!(accounts.refused(b, now + 2 * MS), "a change");
        assert!(!accounts.refused(b, now + 2 * MS));
        assert!(!accounts.may_be_answered(b));
        fails(&mut accounts, now);
        assert!(!accounts.others_hear_nothing(a, now), "old failures that come in late");
        fails(&mut accounts, now + 3 * MS);
        assert!(accounts.others_hear_nothing(a, now));
        accounts.answered(b, now + 3 * MS);
        assert!(!accounts.others_hear_nothing(a, now));
        // One task says little of upstream, two accounts say more.
        accounts.failed(b, &task("c"), now + 4 * MS);
        assert!(!accounts.others_hear_nothing(a, now));
        accounts.failed(c, &task("c"), now + 4 * MS);
        assert!(accounts.others_hear_nothing(a, now));
    }

    #[test]
    fn an_account_in_trouble_counts_again_once_nobody_else_is_answered() {
        let (mut accounts, [a, b]) = accounts();
        let now = Instant::now();
        for _ in 0..5 {
            accounts.failed(a, &task("a"), now);
        }
        accounts.answered(b, now + MS);
        assert!(!accounts.failed(a, &task("a"), now + TROUBLE));
        assert!(accounts.failed(a, &task("a"), now + TROUBLE + MS));
        accounts.answered(b, now + TROUBLE + MS);
        assert!(!accounts.failed(a, &task("a"), now + TROUBLE + 2 * MS));
    }

    #[test]
    fn more_accounts_than_are_remembered_do_not_make_one_forgotten_that_goes_on_failing() {
        let (mut accounts, [a, others @ ..]) = accounts::<100>();
        let now = Instant::now();
        for round in 0..5 {
            let at = now + round * MS;
            accounts.failed(a, &task("a"), at);
            for other in &others[..MOST_KNOWN - 1] {
                accounts.answered(*other, at);
            }
        }
        accounts.answered(others[0], now + 5 * MS);
        assert!(!accounts.failed(a, &task("a"), now + 6 * MS));
        for other in others {
            accounts.answered(other, now);
        }
        assert_eq!(accounts.0.len(), MOST_KNOWN);
    }
}
