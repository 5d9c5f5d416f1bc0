//! The company's services: each task is polled by several until they have read its end.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::{Instant, sleep, sleep_until};

use crate::client::{Client, Connect, Said};
use crate::report::Seen;
use crate::tasks::Task;

/// A task concerns a worker, a web backend and a dashboard.
const WATCHERS: usize = 3;

/// How long after its end a task is still polled by a client that has not noticed.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// How much longer than it should a pause is at most: loops drift, or the same polls would meet the same crowd every time.
const JITTER: f64 = 0.1;

/// How large a company is and how it polls.
#[derive(Clone, Copy, Debug)]
pub struct Company {
    /// Tasks at any time.
    pub tasks: usize,
    pub clients: usize,
    /// From an answer to the next poll.
    pub interval: Duration,
}

impl Company {
    /// Clients that poll each task.
    pub fn watchers(&self) -> usize {
        WATCHERS.min(self.clients)
    }
}

/// Sets every client to work, on what `connect` leads to.
pub fn start(company: Company, tasks: &[Task], start: Instant, connect: &Connect, seen: &Arc<Mutex<Seen>>) {
    let client = |number| Arc::new(Client::new(number, Arc::clone(connect)));
    let clients: Vec<_> = (0..company.clients).map(client).collect();
    for task in tasks {
        // Another stream than that of the run times.
        let mut random = SmallRng::seed_from_u64(!(task.number as u64));
        let first: usize = random.random_range(0..company.clients);
        for watcher in 0..company.watchers() {
            // Nobody is in step with anybody.
            let phase = company.interval.mul_f64(random.random());
            let number = first + watcher * company.clients / company.watchers();
            let watch = Watch {
                task: *task,
                client: Arc::clone(&clients[number % company.clients]),
                interval: company.interval,
                start,
                seen: Arc::clone(seen),
                random: SmallRng::seed_from_u64(random.random()),
            };
            tokio::spawn(watch.run(phase));
        }
    }
}

/// A client's eye on a task.
struct Watch {
    task: Task,
    client: Arc<Client>,
    interval: Duration,
    start: Instant,
    seen: Arc<Mutex<Seen>>,
    random: SmallRng,
}

impl Watch {
    async fn run(mut self, phase: Duration) {
        sleep_until(self.start + self.task.appears + phase).await;
        let id = self.task.id();
        while self.start.elapsed() < self.task.ends + PATIENCE {
            let said = self.client.poll(&id).await;
            let now = self.start.elapsed();
            self.seen.lock().poll(now, said);
            let pause = match said {
                Said::Ended => {
                    self.seen.lock().end(&self.task, now);
                    return;
                }
                Said::Error(Some(retry_after)) if self.client.heeds_retry_after() => retry_after.max(self.interval),
                Said::Error(_) | Said::GoesOn => self.interval,
            };
            sleep(pause.mul_f64(self.random.random_range(1.0..1.0 + JITTER))).await;
        }
    }
}
