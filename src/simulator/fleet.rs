//! The demo's clients: each watches several tasks, and each task is watched by several clients.
//!
//! A watch polls its task every 1 to 2 s on a connection of its own, as real pollers do. When a task ends, whoever sees
//! it first starts the next one in its place; the others move on once they have seen the end themselves.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http::StatusCode;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use super::client::Client;

/// The key that all clients poll with: one account.
const KEY: &str = "ak_demo";
/// Errors that are told in full.
const MAX_TOLD: usize = 5;

/// How large the fleet is.
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub(super) clients: usize,
    /// Tasks at once.
    pub(super) tasks: usize,
    /// Clients that poll each task.
    pub(super) watchers: usize,
}

/// The clients, at work until dropped.
pub(super) struct Fleet {
    tally: Arc<Tally>,
    _watches: JoinSet<()>,
}

/// What the clients saw.
#[derive(Default)]
pub(super) struct Tally {
    polls: AtomicU64,
    ended: AtomicU64,
    errors: AtomicU64,
    slowest_ms: AtomicU64,
    first_errors: Mutex<Vec<String>>,
}

/// A [`Tally`] at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Tallied {
    /// Polls that were answered as they should.
    pub(super) polls: u64,
    pub(super) ended: u64,
    pub(super) errors: u64,
    pub(super) slowest: Duration,
    pub(super) first_errors: Vec<String>,
}

/// The tasks that run at once: one id in each place.
struct Places(Mutex<Vec<String>>);

#[derive(Deserialize)]
struct Envelope {
    code: u16,
    data: Option<Data>,
}

#[derive(Deserialize)]
struct Data {
    task_id: String,
    status: String,
}

impl Fleet {
    /// Sets the clients to work on the gateway at `gateway`.
    pub(super) fn start(gateway: SocketAddr, size: Size) -> Self {
        let tally = Arc::new(Tally::default());
        let places = Arc::new(Places::new(size.tasks));
        let mut watches = JoinSet::new();
        let count = size.tasks * size.watchers;
        for number in 0..count {
            let client = number * size.clients / count;
            let watch = Watch {
                place: number % size.tasks,
                client: Client::new(
                    gateway,
                    vec![
                        ("x-api-key", KEY.to_owned()),
                        ("x-client-id", format!("client-{:02}", client + 1)),
                    ],
                ),
                places: places.clone(),
                tally: tally.clone(),
                jitter: Jitter::new(number),
            };
            watches.spawn(watch.run());
        }
        Self {
            tally,
            _watches: watches,
        }
    }

    /// What the clients saw so far.
    pub(super) fn tallied(&self) -> Tallied {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Tallied {
            polls: read(&self.tally.polls),
            ended: read(&self.tally.ended),
            errors: read(&self.tally.errors),
            slowest: Duration::from_millis(read(&self.tally.slowest_ms)),
            first_errors: self.tally.first_errors.lock().clone(),
        }
    }
}

impl Tally {
    fn failed(&self, error: &anyhow::Error) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        let mut told = self.first_errors.lock();
        if told.len() < MAX_TOLD {
            told.push(format!("{error:#}"));
        }
    }
}

impl Places {
    fn new(count: usize) -> Self {
        Self(Mutex::new((0..count).map(|_| new_id()).collect()))
    }

    fn current(&self, place: usize) -> String {
        self.0.lock()[place].clone()
    }

    /// Starts another task where `ended` was, if nobody did yet.
    fn replace(&self, place: usize, ended: &str) -> bool {
        let mut places = self.0.lock();
        let first = places[place] == ended;
        if first {
            places[place] = new_id();
        }
        first
    }
}

fn new_id() -> String {
    Uuid::now_v7().to_string()
}

struct Watch {
    place: usize,
    client: Client,
    places: Arc<Places>,
    tally: Arc<Tally>,
    jitter: Jitter,
}

impl Watch {
    async fn run(mut self) {
        // Real pollers did not all start together.
        tokio::time::sleep(self.jitter.up_to(Duration::from_secs(1))).await;
        loop {
            let id = self.places.current(self.place);
            self.until_ended(&id).await;
            if self.places.replace(self.place, &id) {
                self.tally.ended.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    async fn until_ended(&mut self, id: &str) {
        loop {
            let asked = Instant::now();
            match self.poll(id).await {
                Ok(ended) => {
                    let took = u64::try_from(asked.elapsed().as_millis()).unwrap_or(u64::MAX);
                    self.tally.slowest_ms.fetch_max(took, Ordering::Relaxed);
                    self.tally.polls.fetch_add(1, Ordering::Relaxed);
                    if ended {
                        return;
                    }
                }
                Err(error) => self.tally.failed(&error),
            }
            let pause = Duration::from_secs(1) + self.jitter.up_to(Duration::from_secs(1));
            tokio::time::sleep(pause).await;
        }
    }

    /// Whether the task has ended.
    async fn poll(&mut self, id: &str) -> anyhow::Result<bool> {
        let path = format!("/api/v1/client/job/TaskInfo?task_id={id}");
        let (status, body) = self.client.get(&path).await?;
        judge(id, status, &body)
    }
}

/// Whether the answer says that the task `id` has ended. An error when it is not an answer that a client may expect.
fn judge(id: &str, status: StatusCode, body: &Bytes) -> anyhow::Result<bool> {
    let excerpt = || String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
    ensure!(status == StatusCode::OK, "HTTP {status}: {}", excerpt());
    let answer: Envelope = serde_json::from_slice(body).with_context(|| format!("not an answer: {}", excerpt()))?;
    ensure!(answer.code == 200, "code {}: {}", answer.code, excerpt());
    let data = answer.data.context("no data")?;
    ensure!(data.task_id == id, "asked for {id}, got {}", data.task_id);
    match data.status.as_str() {
        "pending" | "running" => Ok(false),
        "success" => Ok(true),
        other => bail!("unexpected status {other}"),
    }
}

/// Spreads the polls; the same in every run.
struct Jitter(DefaultHasher);

impl Jitter {
    fn new(seed: usize) -> Self {
        let mut hasher = DefaultHasher::new();
        seed.hash(&mut hasher);
        Self(hasher)
    }

    fn up_to(&mut self, limit: Duration) -> Duration {
        0_u8.hash(&mut self.0);
        limit / 1000 * u32::try_from(self.0.finish() % 1000).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::super::UpstreamArgs;
    use super::super::server::serve;
    use super::*;

    const SMALL: Size = Size {
        clients: 3,
        tasks: 4,
        watchers: 2,
    };

    async fn fleet_without_a_gateway(args: UpstreamArgs) -> Fleet {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, args, std::future::pending()));
        Fleet::start(address, SMALL)
    }

    async fn until(fleet: &Fleet, condition: impl Fn(&Tallied) -> bool) -> Tallied {
        for _ in 0..2000 {
            let tallied = fleet.tallied();
            if condition(&tallied) {
                return tallied;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{:?}", fleet.tallied());
    }

    #[tokio::test]
    async fn tasks_end_and_others_take_their_place() {
        let fleet = fleet_without_a_gateway(UpstreamArgs {
            latency: Duration::ZERO,
            run_time: Duration::from_millis(500),
            limit: 1_000_000,
            ..UpstreamArgs::default()
        })
        .await;
        let tallied = until(&fleet, |tallied| tallied.ended > 4).await;
        assert_eq!(tallied.errors, 0);
        assert!(tallied.polls > tallied.ended);
    }

    #[tokio::test]
    async fn a_429_is_an_error() {
        let fleet = fleet_without_a_gateway(UpstreamArgs {
            latency: Duration::ZERO,
            limit: 0,
            ..UpstreamArgs::default()
        })
        .await;
        let tallied = until(&fleet, |tallied| tallied.errors > 0).await;
        assert_eq!(tallied.polls, 0);
        assert!(tallied.first_errors[0].starts_with("HTTP 429"), "{tallied:?}");
    }

    #[test]
    fn only_the_answer_that_was_asked_for_is_one() {
        let body = |text: &'static str| Bytes::from(text);
        let running = body(r#"{"code":200,"data":{"task_id":"a","status":"running"}}"#);
        assert!(!judge("a", StatusCode::OK, &running).unwrap());
        assert!(judge("b", StatusCode::OK, &running).is_err());
        assert!(judge("a", StatusCode::BAD_GATEWAY, &running).is_err());
        let success = body(r#"{"code":200,"data":{"task_id":"a","status":"success"}}"#);
        assert!(judge("a", StatusCode::OK, &success).unwrap());
        for wrong in [
            "",
            "{}",
            r#"{"code":429,"data":null}"#,
            r#"{"code":200,"data":null}"#,
            r#"{"code":200,"data":{"task_id":"a","status":"failed"}}"#,
        ] {
            assert!(judge("a", StatusCode::OK, &body(wrong)).is_err(), "{wrong}");
        }
    }
}
