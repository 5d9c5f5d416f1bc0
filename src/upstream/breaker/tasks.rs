//! Whose failures say nothing of upstream though their account is answered: those of a task that fails each time, while
//! others are answered between. A model under maintenance has many of them, and they would open the breaker again and again.
//!
//! Evidence is weighed by when it was asked for, as in `breaker/state.rs`.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::account::AccountId;
use crate::task::TaskId;

/// So long after an answer to anybody a task's failure says nothing that had failed before that answer.
const SHORTLY: Duration = Duration::from_secs(5);

/// After so many of them it says nothing for longer. Chosen, not measured, like [`SHORTLY`]: an upstream that is back for a
/// moment and goes away again a few times is believed each time.
const OFTEN: u32 = 3;
/// So long: clients that poll every 15 s, as upstream recommends, are answered between. As long an outage is not seen of
/// which nobody else hears.
const LONGER: Duration = Duration::from_secs(20);

/// So many tasks are remembered. With more of them that always fail, the breaker may open for no other reason.
const MOST_FAILING: usize = 1024;

/// The tasks that have failed since they were answered last.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    failing: HashMap<(AccountId, TaskId), Failing>,
    /// When the latest query was begun that was answered, whose it was or whatever it asked for.
    answered: Option<Instant>,
}

#[derive(Debug)]
struct Failing {
    /// When the latest query that failed was begun.
    failed: Instant,
    /// How often it has failed though somebody was answered who asked after it had failed before, up to [`OFTEN`].
    contradicted: u32,
}

impl Tasks {
    /// A query for `task` of `account` that was begun at `asked` failed: whether that may say anything of upstream. It may not
    /// where the task had failed before anybody asked who was answered, until it is answered itself, or nobody is for
    /// [`SHORTLY`]; for [`LONGER`], once that was so [`OFTEN`].
    pub(super) fn failed(&mut self, account: AccountId, task: &TaskId, asked: Instant) -> bool {
        let key = (account, task.clone());
        if !self.failing.contains_key(&key) && self.failing.len() >= MOST_FAILING {
            let oldest = self.failing.iter().min_by_key(|(_, failing)| failing.failed);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.failing.remove(&oldest);
            }
        }
        let failing = self.failing.entry(key).or_insert(Failing {
            failed: asked,
            contradicted: 0,
        });
        if self.answered > Some(failing.failed) {
            failing.contradicted = OFTEN.min(failing.contradicted + 1);
        }
        failing.failed = failing.failed.max(asked);
        let within = match failing.contradicted {
            0 => return true,
            1..OFTEN => SHORTLY,
            OFTEN.. => LONGER,
        };
        let answered = self.answered;
        answered.is_none_or(|answered| asked.saturating_duration_since(answered) >= within)
    }

    /// A query for `task` that was begun at `asked` was answered by what tells of it.
    pub(super) fn answered(&mut self, account: AccountId, task: &TaskId, asked: Instant) {
        self.answered = self.answered.max(Some(asked));
        // Usually there is none, and nothing to be hashed for it.
        if !self.failing.is_empty() {
            self.failing.remove(&(account, task.clone()));
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

    /// A task that has failed so often while others were answered that it is its own doing, and when somebody was last.
    fn failing(tasks: &mut Tasks, name: &str) -> Instant {
        let (account, mut now) = (AccountId::default(), Instant::now());
        assert!(tasks.failed(account, &task(name), now));
        for again in 1..=OFTEN {
            now += MS;
            tasks.answered(account, &task("answered"), now);
            assert!(!tasks.failed(account, &task(name), now + SHORTLY - MS));
            let may_count = tasks.failed(account, &task(name), now + SHORTLY);
            assert_eq!(may_count, again < OFTEN, "{again}");
            now += SHORTLY;
        }
        now - SHORTLY
    }

    #[test]
    fn a_task_that_fails_while_others_are_answered_says_nothing_until_it_is_answered_or_nobody_is_for_long() {
        let (mut tasks, account) = (Tasks::default(), AccountId::default());
        let now = failing(&mut tasks, "a");
        assert!(tasks.failed(account, &task("b"), now), "another has not failed yet");
        assert!(!tasks.failed(account, &task("a"), now + LONGER - MS));
        assert!(tasks.failed(account, &task("a"), now + LONGER));
        tasks.answered(account, &task("b"), now + LONGER);
        assert!(!tasks.failed(account, &task("a"), now + LONGER));
        tasks.answered(account, &task("a"), now + LONGER);
        assert!(tasks.failed(account, &task("a"), now + LONGER));
    }

    #[test]
    fn failures_without_an_answer_between_count_however_many() {
        let (mut tasks, account, now) = (Tasks::default(), AccountId::default(), Instant::now());
        tasks.answered(account, &task("answered"), now);
        for failure in 0..100 {
            assert!(tasks.failed(account, &task("a"), now + failure * MS));
        }
    }

    #[test]
    fn of_too_many_those_are_forgotten_that_failed_longest_ago() {
        let (mut tasks, account) = (Tasks::default(), AccountId::default());
        let now = failing(&mut tasks, "first") + LONGER;
        for number in 1..MOST_FAILING {
            tasks.failed(account, &task(&number.to_string()), now);
        }
        tasks.answered(account, &task("answered"), now - MS);
        assert!(!tasks.failed(account, &task("first"), now - MS));
        tasks.failed(account, &task("another"), now);
        assert_eq!(tasks.failing.len(), MOST_FAILING);
        assert!(tasks.failed(account, &task("first"), now));
    }
}
