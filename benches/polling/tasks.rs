//! The company's tasks: when each starts and ends, the same in every run.
//!
//! A fixed number is live at any time: where one ends the next begins. Run times are log-normal, and at the start the
//! tasks are as far on as in a company that has been at it for ever.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use rand_distr::{Distribution as _, LogNormal};

/// What a song takes.
const MEDIAN_SECONDS: f64 = 86.0;
const SIGMA: f64 = 0.3;

/// How much of its time a task is pending.
const PENDING: f64 = 0.1;

/// A task, in time since the start of the run.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    pub number: usize,
    /// When clients may begin to poll it: zero for those that are under way at the start.
    pub appears: Duration,
    runs: Duration,
    pub ends: Duration,
}

impl Task {
    /// Its id with upstream.
    pub fn id(&self) -> String {
        format!("task_{:06}", self.number)
    }

    /// What upstream says of it.
    pub fn status(&self, now: Duration) -> &'static str {
        if now >= self.ends {
            "success"
        } else if now + self.runs.mul_f64(1.0 - PENDING) < self.ends {
            "pending"
        } else {
            "running"
        }
    }
}

/// The number in a task's id.
pub fn number(id: &str) -> usize {
    id["task_".len()..].parse().unwrap()
}

/// Every task that appears before `until`, by number; `live` of them at any time.
pub fn tasks(live: usize, until: Duration) -> Vec<Task> {
    let run_time = LogNormal::new(MEDIAN_SECONDS.ln(), SIGMA).unwrap();
    // Whoever looks at a moment finds the long ones more often, in proportion to their length.
    let run_time_found = LogNormal::new(MEDIAN_SECONDS.ln() + SIGMA * SIGMA, SIGMA).unwrap();
    let mut tasks = Vec::new();
    for place in 0..live {
        let mut random = SmallRng::seed_from_u64(place as u64);
        let runs = Duration::from_secs_f64(run_time_found.sample(&mut random));
        let mut task = Task {
            number: 0,
            appears: Duration::ZERO,
            runs,
            ends: runs.mul_f64(random.random()),
        };
        while task.appears < until {
            task.number = tasks.len();
            tasks.push(task);
            let runs = Duration::from_secs_f64(run_time.sample(&mut random));
            task.appears = task.ends;
            task.runs = runs;
            task.ends += runs;
        }
    }
    tasks
}
