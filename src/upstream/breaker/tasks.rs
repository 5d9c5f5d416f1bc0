//! Whose failures say nothing of upstream though their account is answered: those of a task that fails each time, while
//! others are answered between. A model under maintenance has many of them, and they would open the breaker again and again.
//!
//! Evidence is weighed by when it was asked for, as in `breaker/state.rs`.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use super::accounts::TROUBLE;
use crate::account::AccountId;
use crate::task::TaskId;

/// So long after an answer to anybody a task's failure says nothing that had failed before that answer.
const SHORTLY: Duration = Duration::from_secs(5);

/// After so many of them it says nothing for as long as an account's in trouble. Chosen, not measured, like [`SHORTLY`]: an
/// upstream that is back for a moment and goes away again a few times is believed each time.
const OFTEN: u32 = 3;

/// So many tasks are remembered. With more of them that always fail, the breaker may open for no other reason.
const MOST_FAILING: usize = 1024;

/// The tasks that have failed since they were answered last.
#[derive(Debug, Default)]
pub(super) struct Tasks(HashMap<(AccountId, TaskId), Failing>);

#[derive(Debug)]
struct Failing {
    /// When the latest query that failed was begun.
    failed: Instant,
    /// How often it has failed though somebody was answered who asked after it had failed before, up to [`OFTEN`].
    contradicted: u32,
}

impl Tasks {
    /// A query for `task` of `account` that was begun at `asked` failed, and the latest that anybody was answered was begun at
    /// `answered`: whether that may say anything of upstream. It may not where the task had failed before, until it is answered
    /// itself, or nobody is for [`SHORTLY`]; for [`TROUBLE`], once that was so [`OFTEN`].
    pub(super) fn failed(
        &mut self,
        account: AccountId,
        task: &TaskId,
        asked: Instant,
        answered: Option<Instant>,
    ) -> bool {
        let key = (account, task.clone());
        if !self.0.contains_key(&key) && self.0.len() >= MOST_FAILING {
            let oldest = self.0.iter().min_by_key(|(_, failing)| failing.failed);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.0.remove(&oldest);
            }
        }
        let failing = self.0.entry(key).or_insert(Failing {
            failed: asked,
            contradicted: 0,
        });
        if answered > Some(failing.failed) {
            failing.contradicted = OFTEN.min(failing.contradicted + 1);
        }
        failing.failed = failing.failed.max(asked);
        let within = match failing.contradicted {
            0 => return true,
            1..OFTEN => SHORTLY,
            OFTEN.. => TROUBLE,
        };
        answered.is_none_or(|answered| asked.saturating_duration_since(answered) >= within)
    }

    /// What was asked of `task` was answered.
    pub(super) fn answered(&mut self, account: AccountId, task: &TaskId) {
        // Usually there is none, and nothing to be hashed for it.
        if !self.0.is_empty() {
            self.0.remove(&(account, task.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn task(name: &str) -> TaskId {
        TaskId::new(name).unwrap()
    }

    /// A task that has failed so often while others were answered that it is its own doing, and when it did last.
    fn failing(tasks: &mut Tasks, name: &str) -> Instant {
        let (account, mut now) = (AccountId::default(), Instant::now());
        assert!(tasks.failed(account, &task(name), now, None));
        for again in 1..=OFTEN {
            now += SHORTLY;
            let answered = now - SHORTLY + MS;
            assert!(!tasks.failed(account, &task(name), now, Some(answered)));
            let may_count = tasks.failed(account, &task(name), answered + SHORTLY, Some(answered));
            assert_eq!(may_count, again < OFTEN, "{again}");
            now += MS;
        }
        now
    }

    #[test]
    fn a_task_that_fails_while_others_are_answered_says_nothing_until_it_is_answered_or_nobody_is_for_a_minute() {
        let (mut tasks, account) = (Tasks::default(), AccountId::default());
        let now = failing(&mut tasks, "a");
        let answered = Some(now - MS);
        assert!(
            tasks.failed(account, &task("b"), now, answered),
            "another has not failed yet"
        );
        assert!(!tasks.failed(account, &task("a"), now + TROUBLE - 2 * MS, answered));
        assert!(tasks.failed(account, &task("a"), now + TROUBLE - MS, answered));
        tasks.answered(account, &task("b"));
        let answered = Some(now + TROUBLE);
        assert!(!tasks.failed(account, &task("a"), now + TROUBLE, answered));
        tasks.answered(account, &task("a"));
        assert!(tasks.failed(account, &task("a"), now + TROUBLE, answered));
    }

    #[test]
    fn failures_without_an_answer_between_count_however_many() {
        let (mut tasks, account, now) = (Tasks::default(), AccountId::default(), Instant::now());
        for failure in 0..100 {
            // The second tells of what was asked for before the first.
            assert!(tasks.failed(account, &task("a"), now + failure * MS, Some(now)));
        }
    }

    #[test]
    fn of_too_many_those_are_forgotten_that_failed_longest_ago() {
        let (mut tasks, account) = (Tasks::default(), AccountId::default());
        let now = failing(&mut tasks, "first");
        let answered = Some(now + MS);
        for number in 1..MOST_FAILING {
            tasks.failed(account, &task(&number.to_string()), now + 2 * MS, answered);
        }
        assert!(!tasks.failed(account, &task("first"), now + MS, answered));
        tasks.failed(account, &task("another"), now + 2 * MS, answered);
        assert_eq!(tasks.0.len(), MOST_FAILING);
        assert!(tasks.failed(account, &task("first"), now + 2 * MS, answered));
    }
}
