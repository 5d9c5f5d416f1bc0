//! The platform's edge: metrics, health and status page, on a thread and runtime of their own, so that it answers when
//! the main one is busy. Whoever comes is let in, and whoever came first makes room. Nothing here changes state, and
//! upstream's health is part of nothing here: cached answers outlive an outage.

mod page;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use socket2::SockRef;
use tokio::task::{JoinHandle, yield_now};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::gateway::{Gateway, Status};
use crate::listen::{Failing, is_of_one_connection};
use crate::metrics::Metrics;
use crate::moment::millis;
use page::Page;

/// How long the main runtime may stand still before `/livez` says so.
const STUCK: Duration = Duration::from_secs(30);

/// How often the main runtime shows that it turns.
const BEAT: Duration = Duration::from_secs(1);

/// Scrapes and probes are few; this bounds what stray clients may take together.
const MOST_CONNECTIONS: usize = 64;

/// Newcomers who are let in before those who are there have another turn: a probe has had several, and its answer,
/// before as many have come after it as there are places.
const AT_ONCE: u64 = 8;

/// How long hyper waits for a request's head. Chosen, not measured: a connection that says nothing may have to make
/// room earlier.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);

/// What the system may hold of answers to one connection, in bytes; it takes twice that. Left to itself it takes
/// megabytes, a hundred answers to somebody who asks for them at once and reads none.
const SEND_BUFFER: usize = 32 << 10;

/// Whether the process serves, and whether its main runtime turns.
#[derive(Debug)]
pub struct Health {
    started: Instant,
    /// Milliseconds from the start to the main runtime's last sign of life.
    beat_ms: AtomicU64,
    is_serving: AtomicBool,
    draining: CancellationToken,
}

impl Health {
    /// Not serving yet. `draining` ends readiness.
    pub fn new(draining: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            beat_ms: AtomicU64::new(0),
            is_serving: AtomicBool::new(false),
            draining,
        })
    }

    /// Clients are accepted from now on.
    pub fn serving(&self) {
        self.is_serving.store(true, Ordering::Relaxed);
    }

    /// Shows, for as long as it is polled, that the runtime it is polled on turns.
    pub async fn beat(&self) {
        loop {
            self.beat_ms.store(self.ms(), Ordering::Relaxed);
            sleep(BEAT).await;
        }
    }

    fn is_live(&self) -> bool {
        let silent = self.ms().saturating_sub(self.beat_ms.load(Ordering::Relaxed));
        u128::from(silent) < STUCK.as_millis()
    }

    fn is_ready(&self) -> bool {
        self.is_serving.load(Ordering::Relaxed) && !self.draining.is_cancelled()
    }

    fn ms(&self) -> u64 {
        millis(self.started.elapsed())
    }
}

/// Serves the admin port on a thread of its own until `stop` is cancelled.
///
/// # Errors
/// When the thread or its runtime cannot be started.
pub fn spawn(
    listener: TcpListener,
    health: Arc<Health>,
    gateway: Arc<Gateway>,
    stop: CancellationToken,
) -> anyhow::Result<thread::JoinHandle<()>> {
    listener.set_nonblocking(true).context("admin")?;
    // Whoever is accepted has it from the listener.
    SockRef::from(&listener)
        .set_send_buffer_size(SEND_BUFFER)
        .context("admin")?;
    let admin = Arc::new(Admin {
        health,
        gateway,
        page: Page::new()?,
    });
    let (built, is_built) = mpsc::channel();
    let serve = move || {
        // Not before: where this thread cannot be had, it would be dropped on another runtime's, and that is a panic.
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(built.send(Err(error))),
        };
        drop(built.send(Ok(())));
        runtime.block_on(async {
            match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => tokio::select! {
                    () = accept(listener, admin) => {}
                    () = stop.cancelled() => {}
                },
                Err(error) => tracing::error!(%error, "the admin port cannot be served"),
            }
        });
    };
    let thread = thread::Builder::new()
        .name("admin".into())
        .spawn(serve)
        .context("admin thread")?;
    is_built.recv().context("admin runtime")?.context("admin runtime")?;
    Ok(thread)
}

struct Admin {
    health: Arc<Health>,
    gateway: Arc<Gateway>,
    page: Page,
}

/// What `/status.json` tells.
#[derive(Serialize)]
struct StatusJson {
    /// What `/livez` and `/readyz` say.
    live: bool,
    ready: bool,
    #[serde(flatten)]
    status: Status,
}

/// Where all places are taken, whoever came first makes room: silent connections, and ones that do not read, may come
/// faster than any time-out ends them, and a probe shall not wait for one. Asking again lengthens no stay, or those who
/// do it without end would push out a probe that has only come.
async fn accept(listener: tokio::net::TcpListener, admin: Arc<Admin>) {
    let mut connections: VecDeque<JoinHandle<()>> = VecDeque::with_capacity(MOST_CONNECTIONS);
    let mut failing = Failing::default();
    for newcomer in 1_u64.. {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) if is_of_one_connection(&error) => continue,
            Err(error) => {
                failing
                    .rest(|| tracing::warn!(%error, "the admin port cannot accept"))
                    .await;
                continue;
            }
        };
        connections.retain(|connection| !connection.is_finished());
        if connections.len() >= MOST_CONNECTIONS
            && let Some(first) = connections.pop_front()
        {
            first.abort();
        }
        let admin = Arc::clone(&admin);
        connections.push_back(tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let answer = admin.answer(request.method(), request.uri().path());
                std::future::ready(Ok::<_, Infallible>(answer))
            });
            // A scraper that goes away is none of our business.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_PATIENCE)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        }));
        if newcomer.is_multiple_of(AT_ONCE) {
            yield_now().await;
        }
    }
}

const INDEX: &str = "crun-gateway, admin port\n\n\
    /metrics  for Prometheus\n\
    /livez    200 while the main runtime turns\n\
    /readyz   200 while clients are served, 503 at a stop\n\
    /status   what happens now, for people; /status.json for programs\n";

impl Admin {
    fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        if method != Method::GET && method != Method::HEAD {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "GET and HEAD only\n");
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match path {
            "/" => text(StatusCode::OK, INDEX),
            "/metrics" => self.metrics(),
            "/livez" if self.health.is_live() => text(StatusCode::OK, "ok\n"),
            "/livez" => text(
                StatusCode::SERVICE_UNAVAILABLE,
                "the main runtime has not turned for 30 s\n",
            ),
            "/readyz" if self.health.is_ready() => text(StatusCode::OK, "ok\n"),
            "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "starting or stopping\n"),
            "/status" => self.page.response(),
            "/status.json" => self.status(),
            _ => text(StatusCode::NOT_FOUND, INDEX),
        }
    }

    fn status(&self) -> Response<Full<Bytes>> {
        let told = StatusJson {
            live: self.health.is_live(),
            ready: self.health.is_ready(),
            status: self.gateway.status(),
        };
        match serde_json::to_vec(&told) {
            Ok(json) => {
                let mut response = text(StatusCode::OK, "");
                *response.body_mut() = Full::new(Bytes::from(json));
                response
                    .headers_mut()
                    .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
                response
            }
            Err(error) => {
                tracing::error!(%error, "the status cannot be told");
                text(StatusCode::INTERNAL_SERVER_ERROR, "the status cannot be told\n")
            }
        }
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        self.gateway.refresh_metrics();
        match self.gateway.metrics().render() {
            Ok(rendered) => {
                let mut response = Response::new(Full::new(Bytes::from(rendered)));
                response
                    .headers_mut()
                    .insert(CONTENT_TYPE, HeaderValue::from_static(Metrics::CONTENT_TYPE));
                response
            }
            Err(error) => {
                tracing::error!(%error, "metrics cannot be rendered");
                text(StatusCode::INTERNAL_SERVER_ERROR, "metrics cannot be rendered\n")
            }
        }
    }
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
