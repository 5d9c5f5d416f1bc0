//! Paused time: the gateway over in-memory connections, upstream and clients alike, so that a promise about time is
//! tested exactly and at once. Everything but the sockets is what runs in production.

use std::collections::HashMap;
use std::future::poll_fn;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use crun_gateway::account::{ApiKey, Caller};
use crun_gateway::config::{self, Config};
use crun_gateway::dial::{Dial, Stream};
use crun_gateway::gateway::Gateway;
use crun_gateway::metrics::Metrics;
use crun_gateway::reload::{self, Source};
use crun_gateway::server::{Tls, serve_connection, serve_tls_connection};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, duplex};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::client::{Reply, over, poll_request};
use super::raw::Raw;
use super::value_of;

/// A buffer that holds any answer of these tests.
const PIPE: usize = 1 << 16;

/// How the upstream in memory behaves. Connections are numbered from 0.
#[derive(Clone)]
pub struct Behaviour {
    /// How long the connection with this number takes to open.
    pub opening: fn(usize) -> Duration,
    /// How long an answer takes.
    pub latency: Duration,
    /// How much longer the answer about this task takes.
    pub varies: fn(&str) -> Duration,
    /// How long a connection may be idle after a query before upstream closes it, without a word; `None` is for ever.
    pub idle: Option<Duration>,
    /// The same before its first query.
    pub unused: Option<Duration>,
    /// The answer to the n-th query (from 0) of a task.
    pub answer: fn(usize, &str) -> Response<Full<Bytes>>,
    /// What upstream says to a key, so long after the start and whatever the task; `None` is what `answer` says.
    pub to_key: fn(&str, Duration) -> Option<Response<Full<Bytes>>>,
    /// From when until when, since the start, upstream is away, and how.
    pub outage: Option<(Range<Duration>, Away)>,
}

/// How an upstream is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Away {
    /// Connections are refused, and those that are open are cut at the next query.
    Refuses,
    /// Connections are never opened, and queries never answered.
    Silent,
    /// Connections are opened, and closed without a byte where an answer would be due.
    HangsUp,
    /// Every query is answered with this code, as HTTP status.
    Status(u16),
    /// Every query is answered with HTTP 200 and this code in the body.
    Code(u16),
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            opening: |_| Duration::ZERO,
            latency: Duration::from_millis(100),
            varies: |_| Duration::ZERO,
            idle: None,
            unused: None,
            answer: |_, task| success(task),
            to_key: |_, _| None,
            outage: None,
        }
    }
}

/// A gateway in memory.
pub struct Paused {
    gateway: Arc<Gateway>,
    config: Config,
    metrics: Arc<Metrics>,
    queries: Arc<Mutex<Vec<Query>>>,
    dials: Arc<Mutex<Vec<Instant>>>,
}

/// A query as it arrived upstream.
#[derive(Clone, Debug)]
pub struct Query {
    pub at: Instant,
    pub key: String,
    pub task: String,
}

impl Paused {
    pub fn start(behaviour: Behaviour, configure: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        config.upstream.url = "http://upstream".parse().unwrap();
        configure(&mut config);
        let queries = Arc::new(Mutex::new(Vec::new()));
        let dials = Arc::new(Mutex::new(Vec::new()));
        let dial = dial(behaviour, Arc::clone(&queries), Arc::clone(&dials));
        let metrics = Arc::new(Metrics::new().unwrap());
        let gateway = Gateway::new(config.clone(), dial, Arc::clone(&metrics)).unwrap();
        Self {
            gateway,
            config,
            metrics,
            queries,
            dials,
        }
    }

    /// Forgets from now on what nobody uses any more, as a running gateway does.
    pub fn sweep(&self) {
        let gateway = Arc::clone(&self.gateway);
        tokio::spawn(async move { gateway.sweep().await });
    }

    /// Writes what is on its way to disk, as a stop does.
    pub async fn close_disk(&self) {
        self.gateway.close_disk().await;
    }

    /// Polls over a connection of its own.
    pub async fn poll(&self, key: &str, task: &str) -> Reply {
        self.ask(poll_request(key, task)).await
    }

    /// The same from another peer.
    pub async fn poll_from(&self, peer: impl Into<Caller>, key: &str, task: &str) -> Reply {
        self.ask_from(peer, poll_request(key, task)).await
    }

    /// The same over a connection whose task nobody may wake: the first to do so after `planted` is set panics.
    pub async fn poll_planted(&self, key: &str, task: &str, planted: &Arc<AtomicBool>) -> Reply {
        let (near, far) = duplex(PIPE);
        let (gateway, limits) = (Arc::clone(&self.gateway), self.config.limits.clone());
        let planted = Arc::clone(planted);
        tokio::spawn(async move {
            let peer = IpAddr::from(Ipv4Addr::LOCALHOST);
            let mut serving = pin!(serve_connection(far, peer, gateway, &limits, CancellationToken::new()));
            poll_fn(|cx| {
                let (planted, waker) = (Arc::clone(&planted), cx.waker().clone());
                let planted = Waker::from(Arc::new(Planted { planted, waker }));
                serving.as_mut().poll(&mut Context::from_waker(&planted))
            })
            .await;
        });
        over(near, poll_request(key, task)).await.unwrap()
    }

    /// Sends any request over a connection of its own.
    pub async fn ask(&self, request: Request<Full<Bytes>>) -> Reply {
        self.ask_from(IpAddr::from(Ipv4Addr::LOCALHOST), request).await
    }

    /// What a log or a panic would print of the gateway and all its parts.
    pub fn debug(&self) -> String {
        format!("{:?}", self.gateway)
    }

    /// The client's end of a connection that holds `room` bytes each way.
    pub fn connect(&self, room: usize, draining: CancellationToken) -> Raw<DuplexStream> {
        let (near, far) = duplex(room);
        self.serve(far, draining);
        Raw::over(near)
    }

    /// Serves a connection that a test has made.
    pub fn serve<S>(&self, stream: S, draining: CancellationToken)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (gateway, limits) = (Arc::clone(&self.gateway), self.config.limits.clone());
        let peer = IpAddr::from(Ipv4Addr::LOCALHOST);
        tokio::spawn(async move { serve_connection(stream, peer, gateway, &limits, draining).await });
    }

    /// The client's end of a connection that begins with a TLS handshake.
    pub fn connect_tls(&self, tls: config::Tls, draining: CancellationToken) -> DuplexStream {
        let (near, far) = duplex(PIPE);
        let tls = Tls::load(tls, Arc::clone(&self.metrics)).unwrap();
        let (gateway, limits) = (Arc::clone(&self.gateway), self.config.limits.clone());
        let peer = Ipv4Addr::LOCALHOST.into();
        tokio::spawn(async move {
            serve_tls_connection(far, peer, tls, gateway, &limits, draining).await;
        });
        near
    }

    /// The same for any request.
    pub async fn ask_from(&self, peer: impl Into<Caller>, request: Request<Full<Bytes>>) -> Reply {
        let peer = peer.into();
        let (near, far) = duplex(PIPE);
        let limits = self.config.limits.clone();
        let gateway = Arc::clone(&self.gateway);
        tokio::spawn(async move { serve_connection(far, peer, gateway, &limits, CancellationToken::new()).await });
        over(near, request).await.unwrap()
    }

    /// Takes over a configuration that lists these accounts, each with its keys.
    pub fn list(&self, accounts: &[(&str, &[&str])]) {
        let account = |(name, keys): &(&str, &[&str])| config::Account {
            name: (*name).to_owned(),
            keys: keys.iter().map(|key| listed(key)).collect(),
            clients: Vec::new(),
        };
        self.configure(|config| config.accounts = accounts.iter().map(account).collect());
    }

    /// Takes a changed configuration over: that of the start, and what `change` makes of it.
    pub fn configure(&self, change: impl FnOnce(&mut Config)) {
        let mut config = self.config.clone();
        change(&mut config);
        self.gateway.configure(config);
    }

    /// Runs with the configuration at `path`, and takes over what becomes of it, as a running gateway does.
    pub fn watch(&self, path: &Path) {
        let written = Config::load(path, &|_| None).unwrap();
        self.gateway.configure(written.clone());
        let mut source = Source {
            path: path.to_owned(),
            written,
            now: Arc::new(Notify::new()),
            fit: Box::new(|_| {}),
            set_level: Box::new(|_| {}),
        };
        let gateway = Arc::clone(&self.gateway);
        tokio::spawn(async move { reload::watch(&mut source, &gateway).await });
    }

    /// When each connection to upstream began to be opened, in order.
    pub fn dials(&self) -> Vec<Instant> {
        self.dials.lock().clone()
    }

    /// What `/status.json` tells of the gateway.
    pub fn status(&self) -> serde_json::Value {
        serde_json::to_value(self.gateway.status()).unwrap()
    }

    /// The lines of `/metrics` that begin with `family`.
    pub fn series(&self, family: &str) -> String {
        self.gateway.refresh_metrics();
        let text = String::from_utf8(self.metrics.render().unwrap()).unwrap();
        text.lines()
            .filter(|line| line.starts_with(family))
            .map(|line| line.to_owned() + "\n")
            .collect()
    }

    /// The value of one series, named as in `/metrics`.
    pub fn metric(&self, series: &str) -> f64 {
        self.gateway.refresh_metrics();
        let text = String::from_utf8(self.metrics.render().unwrap()).unwrap();
        value_of(series, &text)
    }

    /// Each query that arrived upstream, in order.
    pub fn queries(&self) -> Vec<Query> {
        let mut queries = self.queries.lock().clone();
        queries.sort_by_key(|query| query.at);
        queries
    }

    /// When each of them arrived.
    pub fn arrivals(&self) -> Vec<Instant> {
        self.queries().into_iter().map(|query| query.at).collect()
    }

    /// When those with `key` arrived.
    pub fn arrivals_with(&self, key: &str) -> Vec<Instant> {
        let queries = self.queries().into_iter().filter(|query| query.key == key);
        queries.map(|query| query.at).collect()
    }
}

/// A task's waker, with a bug for whoever uses it.
struct Planted {
    planted: Arc<AtomicBool>,
    waker: Waker,
}

impl Wake for Planted {
    fn wake(self: Arc<Self>) {
        self.waker.wake_by_ref();
        let is_planted = self.planted.swap(false, Ordering::Relaxed);
        assert!(!is_planted, "a bug, planted");
    }
}

/// A key or a token that the configuration lists.
pub fn listed(text: &str) -> config::Key {
    config::Key {
        key: ApiKey::new(text).unwrap(),
        source: config::KeySource::Env("KEY".to_owned()),
    }
}

/// The account `music` with this key, of which `studio` has this token.
pub fn music(key: &str, token: &str) -> config::Account {
    config::Account {
        name: "music".to_owned(),
        keys: vec![listed(key)],
        clients: vec![config::Client {
            name: "studio".to_owned(),
            token: listed(token),
            weight: 1,
            passthrough: false,
        }],
    }
}

/// The most arrivals in any half-open second.
pub fn most_in_a_second(arrivals: &[Instant]) -> usize {
    let mut arrivals = arrivals.to_vec();
    arrivals.sort_unstable();
    let second = |(first, start): (usize, &Instant)| {
        let end = *start + Duration::from_secs(1);
        arrivals[first..].partition_point(|at| *at < end)
    };
    arrivals.iter().enumerate().map(second).max().unwrap_or(0)
}

/// (arrivals − 1) ÷ (last − first arrival), a second.
pub fn goodput(arrivals: &[Instant]) -> f64 {
    let span = *arrivals.last().unwrap() - arrivals[0];
    (arrivals.len() - 1) as f64 / span.as_secs_f64()
}

/// An ended task's answer.
pub fn success(task: &str) -> Response<Full<Bytes>> {
    json(&serde_json::json!({
        "code": 200, "message": "success",
        "data": { "task_id": task, "status": "success", "result": { "media_urls": ["https://media.example/x"] } },
    }))
}

/// Any answer, as JSON.
pub fn json(body: &serde_json::Value) -> Response<Full<Bytes>> {
    Response::new(Full::new(Bytes::from(body.to_string())))
}

/// A task that goes on.
pub fn running(task: &str) -> Response<Full<Bytes>> {
    json(&serde_json::json!({
        "code": 200, "message": "success", "data": { "task_id": task, "status": "running" },
    }))
}

impl Behaviour {
    /// How upstream is away, so long after the start.
    fn away(&self, after: Duration) -> Option<Away> {
        let (when, away) = self.outage.as_ref()?;
        when.contains(&after).then_some(*away)
    }
}

fn error(status: u16, code: u16) -> Response<Full<Bytes>> {
    let mut response = json(&serde_json::json!({ "code": code, "message": "upstream is away", "data": null }));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

fn dial(behaviour: Behaviour, queries: Arc<Mutex<Vec<Query>>>, dials: Arc<Mutex<Vec<Instant>>>) -> Dial {
    let start = Instant::now();
    let opened = Arc::new(Mutex::new(0));
    let counts = Arc::new(Mutex::new(HashMap::<String, usize>::new()));
    Arc::new(move || {
        let number = {
            let mut opened = opened.lock();
            *opened += 1;
            *opened - 1
        };
        let (behaviour, queries, counts) = (behaviour.clone(), Arc::clone(&queries), Arc::clone(&counts));
        dials.lock().push(Instant::now());
        Box::pin(async move {
            match behaviour.away(start.elapsed()) {
                Some(Away::Refuses) => return Err(std::io::ErrorKind::ConnectionRefused.into()),
                Some(Away::Silent) => std::future::pending().await,
                Some(Away::HangsUp | Away::Status(_) | Away::Code(_)) | None => {}
            }
            sleep((behaviour.opening)(number)).await;
            let (near, far) = duplex(PIPE);
            let (idle, unused) = (behaviour.idle, behaviour.unused);
            let (busy, mut is_busy) = watch::channel(false);
            let busy = Arc::new(busy);
            let service = service_fn(move |request: Request<Incoming>| {
                let task = request
                    .uri()
                    .query()
                    .unwrap()
                    .strip_prefix("task_id=")
                    .unwrap()
                    .to_owned();
                let at = Instant::now();
                let key = request.headers()["x-api-key"].to_str().unwrap().to_owned();
                queries.lock().push(Query {
                    at,
                    key: key.clone(),
                    task: task.clone(),
                });
                let count = {
                    let mut counts = counts.lock();
                    let count = counts.entry(task.clone()).or_default();
                    *count += 1;
                    *count - 1
                };
                let (behaviour, busy) = (behaviour.clone(), Arc::clone(&busy));
                busy.send_replace(true);
                async move {
                    match behaviour.away(start.elapsed()) {
                        Some(Away::Refuses) => return Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)),
                        Some(Away::Silent) => std::future::pending().await,
                        Some(Away::HangsUp | Away::Status(_) | Away::Code(_)) | None => {}
                    }
                    let away = behaviour.away(start.elapsed());
                    sleep(behaviour.latency + (behaviour.varies)(&task)).await;
                    if away == Some(Away::HangsUp) {
                        return Err(std::io::ErrorKind::ConnectionReset.into());
                    }
                    busy.send_replace(false);
                    Ok(match away {
                        Some(Away::Status(status)) => error(status, status),
                        Some(Away::Code(code)) => error(200, code),
                        Some(Away::Refuses | Away::Silent | Away::HangsUp) | None => {
                            (behaviour.to_key)(&key, at - start).unwrap_or_else(|| (behaviour.answer)(count, &task))
                        }
                    })
                }
            });
            tokio::spawn(async move {
                let idle_too_long = async move {
                    let mut most = unused.unwrap_or(Duration::MAX);
                    while timeout(most, is_busy.wait_for(|busy| *busy)).await.is_ok() {
                        is_busy.wait_for(|busy| !busy).await.ok();
                        most = idle.unwrap_or(Duration::MAX);
                    }
                };
                tokio::select! {
                    _ = server::Builder::new().serve_connection(TokioIo::new(far), service) => {}
                    () = idle_too_long => {}
                }
            });
            Ok(Box::new(near) as Box<dyn Stream>)
        })
    })
}
