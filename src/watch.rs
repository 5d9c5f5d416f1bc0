//! Which of an account's tasks are live, and how long their answers are fresh because of that: data and arithmetic, no
//! clock and no I/O.
//!
//! A task is live from its first live answer on, so that ids which upstream does not know count for nothing, until it
//! ends or nobody has asked for it in twice `cache.fresh.ceiling`. The freshness lifetime is what lets all of them be
//! refreshed within four fifths of the account's rate; the rest is left for tasks that are new.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;

use crate::config::Fresh;
use crate::task::TaskId;

/// The share of an account's rate that refreshing its live tasks may take.
const SHARE: f64 = 0.8;

/// Tasks remembered per account. With as many the lifetime is at its ceiling long since, unless that is set to hours.
const MOST_TASKS: usize = 100_000;

/// One account's live tasks.
#[derive(Debug)]
pub struct Watch {
    tasks: Mutex<Tasks>,
}

#[derive(Debug)]
struct Tasks {
    fresh: Fresh,
    by_id: HashMap<TaskId, Asked>,
    /// Every task once, under an instant no later than when it was last asked for. A poll moves `Asked::last` alone, so
    /// it neither allocates nor sorts; a task is filed anew when its old instant comes up, once in a window.
    filed: BTreeSet<(Instant, TaskId)>,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    last: Instant,
    filed: Instant,
}

impl Watch {
    /// Nothing is live yet.
    pub fn new(fresh: Fresh) -> Self {
        let (by_id, filed) = (HashMap::new(), BTreeSet::new());
        Self {
            tasks: Mutex::new(Tasks { fresh, by_id, filed }),
        }
    }

    /// Changes the bounds of the freshness lifetime.
    pub fn configure(&self, fresh: Fresh) {
        self.tasks.lock().fresh = fresh;
    }

    /// Somebody asked for a task at `now`: if it is live, it stays so.
    pub fn asked(&self, task: &str, now: Instant) {
        if let Some(asked) = self.current(now).by_id.get_mut(task) {
            // Polls of several threads come here in any order.
            asked.last = asked.last.max(now);
        }
    }

    /// Upstream said at `now` that a task goes on. That is no asking: it makes nothing stay that is live already.
    pub fn goes_on(&self, task: &TaskId, now: Instant) {
        let mut tasks = self.current(now);
        if tasks.by_id.len() < MOST_TASKS && !tasks.by_id.contains_key(task) {
            tasks.by_id.insert(task.clone(), Asked { last: now, filed: now });
            tasks.filed.insert((now, task.clone()));
        }
    }

    /// Upstream said that a task has ended.
    pub fn ended(&self, task: &TaskId) {
        let mut tasks = self.tasks.lock();
        if let Some(Asked { filed, .. }) = tasks.by_id.remove(task) {
            tasks.filed.remove(&(filed, task.clone()));
        }
    }

    /// How many tasks are live at `now`.
    pub fn live(&self, now: Instant) -> usize {
        self.current(now).by_id.len()
    }

    /// How long a live answer is fresh at `now`, for an account that may ask `rate` times a second.
    pub fn lifetime(&self, rate: f64, now: Instant) -> Duration {
        let tasks = self.current(now);
        freshness(tasks.by_id.len(), rate, tasks.fresh)
    }

    /// The tasks without those that nobody has asked for in a window before `now`.
    fn current(&self, now: Instant) -> MutexGuard<'_, Tasks> {
        let mut tasks = self.tasks.lock();
        tasks.expire(now);
        tasks
    }
}

impl Tasks {
    fn expire(&mut self, now: Instant) {
        let window = self.fresh.ceiling * 2;
        let is_over = |since: Instant| now.saturating_duration_since(since) > window;
        while self.filed.first().is_some_and(|(filed, _)| is_over(*filed))
            && let Some((_, task)) = self.filed.pop_first()
        {
            match self.by_id.get_mut(&task) {
                Some(asked) if !is_over(asked.last) => {
                    asked.filed = asked.last;
                    self.filed.insert((asked.filed, task));
                }
                Some(_) | None => {
                    self.by_id.remove(&task);
                }
            }
        }
    }
}

/// The freshness lifetime of live answers with which `live` tasks are refreshed within four fifths of `rate` a second,
/// between `fresh.floor` and `fresh.ceiling`.
pub fn freshness(live: usize, rate: f64, fresh: Fresh) -> Duration {
    let live = f64::from(u32::try_from(live).unwrap_or(u32::MAX));
    // Without any rate there is nothing to refresh them with: the quotient is no duration.
    let lifetime = Duration::try_from_secs_f64(live / (SHARE * rate)).unwrap_or(fresh.ceiling);
    lifetime.min(fresh.ceiling).max(fresh.floor)
}

#[cfg(test)]
mod tests;
