//! What came of a run, and the table of all.

use std::fmt::{self, Display};
use std::ops::Range;
use std::time::Duration;

use crate::client::Said;
use crate::fleet::{Company, PATIENCE};
use crate::tasks::Task;
use crate::upstream::Arrival;

/// What the clients saw within a span of the run.
pub struct Seen {
    span: Range<Duration>,
    polls: usize,
    errors: usize,
    /// How late each watcher noticed that a task had ended.
    late: Vec<Duration>,
}

/// What came of a run.
pub struct Outcome {
    calls_a_second: f64,
    refused: f64,
    errors: f64,
    /// Watchers of tasks that ended.
    watches: usize,
    /// How late those were that noticed in time, in order.
    late: Vec<Duration>,
    /// Arrivals in the fullest sliding second of the whole run.
    pub most_in_a_second: usize,
}

impl Seen {
    /// Nothing yet. Later, what happens within `span`.
    pub fn new(span: Range<Duration>) -> Self {
        Self {
            span,
            polls: 0,
            errors: 0,
            late: Vec::new(),
        }
    }

    /// A poll was answered.
    pub fn poll(&mut self, now: Duration, said: Said) {
        if self.span.contains(&now) {
            self.polls += 1;
            self.errors += usize::from(matches!(said, Said::Error(_)));
        }
    }

    /// A watcher read the end of a task.
    pub fn end(&mut self, task: &Task, now: Duration) {
        let late = now.saturating_sub(task.ends);
        if self.span.contains(&task.ends) && late <= PATIENCE {
            self.late.push(late);
        }
    }

    /// The outcome for a company with these tasks, of which upstream saw these queries.
    pub fn outcome(&self, company: Company, tasks: &[Task], arrivals: &[Arrival]) -> Outcome {
        let within = || arrivals.iter().filter(|arrival| self.span.contains(&arrival.at));
        let calls = within().count() as f64;
        let refused = within().filter(|arrival| arrival.refused).count() as f64;
        let ended = tasks.iter().filter(|task| self.span.contains(&task.ends)).count();
        let mut late = self.late.clone();
        late.sort_unstable();
        Outcome {
            calls_a_second: calls / self.span.end.saturating_sub(self.span.start).as_secs_f64(),
            refused: refused / calls,
            errors: self.errors as f64 / self.polls as f64,
            watches: ended * company.watchers(),
            late,
            most_in_a_second: most_in_a_second(arrivals),
        }
    }
}

/// The most arrivals in any half-open second.
fn most_in_a_second(arrivals: &[Arrival]) -> usize {
    let mut first = 0;
    let within = |(last, arrival): (usize, &Arrival)| {
        while arrivals[first].at + Duration::from_secs(1) <= arrival.at {
            first += 1;
        }
        last - first + 1
    };
    arrivals.iter().enumerate().map(within).max().unwrap_or(0)
}

impl Outcome {
    /// How late the given share of all watchers had noticed; `None` if fewer than that ever did.
    fn late(&self, share: f64) -> Option<Duration> {
        let rank = (share * self.watches as f64).ceil() as usize;
        self.late.get(rank.max(1) - 1).copied()
    }

    fn unnoticed(&self) -> f64 {
        1.0 - self.late.len() as f64 / self.watches as f64
    }
}

/// The table's head.
pub fn head() {
    println!(
        "| tasks | clients | every | upstream calls a second | most in one | of them 429 | polls that failed | end read \
         after, median | p99 | not within {} s |",
        PATIENCE.as_secs()
    );
    println!("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
}

/// A company's row: each figure without the gateway, then with it.
pub fn row(company: Company, direct: &Outcome, gateway: &Outcome) {
    let Company {
        tasks,
        clients,
        interval,
    } = company;
    let both = |figure: &dyn Fn(&Outcome) -> String| format!("{} → {}", figure(direct), figure(gateway));
    println!(
        "| {tasks} | {clients} | {} s | {} | {} | {} | {} | {} | {} | {} |",
        interval.as_secs(),
        both(&|outcome| format!("{:.1}", outcome.calls_a_second)),
        both(&|outcome| outcome.most_in_a_second.to_string()),
        both(&|outcome| Percent(outcome.refused).to_string()),
        both(&|outcome| Percent(outcome.errors).to_string()),
        both(&|outcome| Late(outcome.late(0.5)).to_string()),
        both(&|outcome| Late(outcome.late(0.99)).to_string()),
        both(&|outcome| Percent(outcome.unnoticed()).to_string()),
    );
}

struct Percent(f64);

impl Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match 100.0 * self.0 {
            0.0 => f.write_str("0"),
            percent if percent < 0.1 => f.write_str("< 0.1 %"),
            percent => write!(f, "{percent:.1} %"),
        }
    }
}

struct Late(Option<Duration>);

impl Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(late) => write!(f, "{:.1} s", late.as_secs_f64()),
            None => write!(f, "> {} s", PATIENCE.as_secs()),
        }
    }
}
