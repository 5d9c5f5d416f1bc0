//! The way to the upstream: connections, and the one method that asks it about a task.
//!
//! [`Ready::send`] takes a [`Permit`] by value, and nothing else here can reach TaskInfo; so the compiler keeps the budget.
//! A connection is held *before* its permit is paid for ([`Pool::connect`]), which is why this is a small pool of our own
//! over `hyper::client::conn`: hyper-util's legacy client cannot do that, and resends by itself. HTTP/1.1 only: the instant
//! at which bytes are written must belong to one request.
//!
//! Pools are an account's own, so that an answer out of step could never reach another account. What an answer means is
//! `task`'s business.

mod body;
mod breaker;
mod recent;
mod wire;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, RETRY_AFTER, TRANSFER_ENCODING, USER_AGENT,
};
use http::{HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::Empty;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::{Instant, timeout};

use crate::account::{API_KEY_HEADER, ApiKey};
use crate::budget::{Connected, Permit};
use crate::config;
use crate::dial::{self, Handshake};
pub use crate::dial::{Dial, Dialing, Stream, tcp};
use crate::error::Error;
use crate::metrics::Metrics;
use crate::stored::content_type;
use crate::task::TaskId;
use crate::trace::TRACEPARENT;
pub use breaker::{Breaker, Probe};
use recent::Recent;
use wire::Wire;

/// The path of the one endpoint that costs budget.
pub const TASK_INFO_PATH: &str = "/api/v1/client/job/TaskInfo";

/// Connections idle for longer are closed by us: most servers close theirs after 60 s or more, and one that closes just as
/// a request is written costs a second permit.
const IDLE_LIFETIME: Duration = Duration::from_secs(30);

/// How long a probe waits for its connection: an upstream that is back is found out soon, and so is one that is not.
const PROBE_CONNECT_TIMEOUT: Duration = Duration::from_millis(400);

/// The upstream, and every connection to it.
#[derive(Clone, Debug)]
pub struct Upstream(Arc<Inner>);

struct Inner {
    dial: Dial,
    tls: Option<Handshake>,
    host: HeaderValue,
    settings: config::Upstream,
    /// `limits.upstream_connections`.
    most_connections: usize,
    connections: Mutex<Connections>,
    /// A connection was closed or became idle.
    freed: Notify,
    room: body::Room,
    breaker: Arc<Breaker>,
    recent: Recent,
    metrics: Arc<Metrics>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("url", &self.settings.url)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Connections {
    open: usize,
    next_id: u64,
    pools: HashMap<u64, PoolState>,
}

#[derive(Default)]
struct PoolState {
    open: usize,
    /// The one used last is at the back and is used next, so that the others grow old and go.
    idle: VecDeque<Idle>,
}

struct Idle {
    id: u64,
    sender: SendRequest<Empty<Bytes>>,
    wire: Wire,
    since: Instant,
}

/// What came of asking for a connection.
enum Admission {
    Idle(Idle),
    Open(Slot),
    Full,
}

impl Upstream {
    /// The upstream that `settings` name, reached through `dial`.
    ///
    /// # Errors
    /// When `settings.url` names no host or `settings.ca_file` cannot be read.
    pub fn new(
        settings: &config::Upstream,
        limits: &config::Limits,
        dial: Dial,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Self> {
        let authority = settings.url.authority().context("upstream.url: no host")?;
        let host = HeaderValue::from_str(authority.as_str()).context("upstream.url: host")?;
        let tls = dial::tls(&settings.url, settings.ca_file.as_deref(), "upstream")?;
        Ok(Self(Arc::new(Inner {
            dial,
            tls,
            host,
            settings: settings.clone(),
            most_connections: limits.upstream_connections,
            connections: Mutex::default(),
            freed: Notify::new(),
            room: body::Room::new(limits.body_bytes, settings.max_body),
            breaker: Arc::new(Breaker::new(metrics.upstream_breaker_open.clone())),
            recent: Recent::default(),
            metrics,
        })))
    }

    /// A new account's pool, empty. Dropping it closes its idle connections.
    pub fn pool(&self) -> Pool {
        let mut connections = self.0.connections();
        connections.next_id += 1;
        let id = connections.next_id;
        connections.pools.insert(id, PoolState::default());
        Pool(Arc::new(PoolHandle {
            upstream: Arc::clone(&self.0),
            id,
        }))
    }

    /// Streams a request through on a connection of its own: one that was idle could close under a POST, which may not be
    /// sent twice. The caller has seen to it that it is no TaskInfo query; hop-by-hop headers and Host are its business.
    ///
    /// # Errors
    /// When upstream cannot be reached, no place for a connection is free within `upstream.connect_timeout`, or upstream
    /// breaks off before it answers.
    pub async fn stream<B>(&self, request: Request<B>) -> Result<Response<Incoming>, Error>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: std::error::Error + Send + Sync + 'static,
    {
        let slot = timeout(self.0.settings.connect_timeout, self.0.slot_of_nobody())
            .await
            .map_err(|_| Error::NoConnection)?;
        let (mut sender, wire) = self.0.open(slot).await?;
        let response = sender.send_request(request).await.map_err(|_| Error::UpstreamBroken)?;
        wire.answered();
        in_http(response)
    }

    /// Whether upstream may be asked at all.
    pub fn breaker(&self) -> &Arc<Breaker> {
        &self.0.breaker
    }

    /// How long upstream takes to answer, lately: nine answers in ten take no longer. Zero before the first.
    pub fn p90(&self) -> Duration {
        self.0.recent.p90()
    }

    /// The value of the Host header.
    pub fn host(&self) -> &HeaderValue {
        &self.0.host
    }

    /// Closes connections that have been idle for long.
    pub fn sweep(&self, now: Instant) {
        let mut old = Vec::new();
        for pool in self.0.connections().pools.values_mut() {
            while pool.idle.front().is_some_and(|idle| idle.since + IDLE_LIFETIME <= now) {
                old.extend(pool.idle.pop_front());
            }
        }
    }
}

/// The connections of one account. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Pool(Arc<PoolHandle>);

#[derive(Debug)]
struct PoolHandle {
    upstream: Arc<Inner>,
    id: u64,
}

impl Drop for PoolHandle {
    fn drop(&mut self) {
        let closed = self.upstream.connections().pools.remove(&self.id);
        drop(closed);
    }
}

impl Pool {
    /// A connection of one's own, to ask for `task`: an idle one, else a new one; with `fresh`, always a new one. Waits
    /// while the account or the process has as many as it may.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// [`Error::NoConnection`] when DNS, TCP or TLS fail or take longer than `upstream.connect_timeout` together.
    pub async fn connect(&self, task: &TaskId, fresh: bool) -> Result<Ready, Error> {
        let upstream = &self.0.upstream;
        loop {
            let freed = upstream.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let admission = upstream.connections().admit(upstream, self.0.id, fresh, Instant::now());
            match admission {
                Admission::Idle(Idle {
                    id, mut sender, wire, ..
                }) => {
                    if sender.ready().await.is_ok() {
                        return Ok(Ready(Some(Held {
                            pool: self.clone(),
                            id,
                            sender,
                            wire,
                        })));
                    }
                }
                Admission::Open(slot) => {
                    let id = slot.id;
                    let (sender, wire) = upstream.breaker.watch(task, upstream.open(slot)).await?;
                    return Ok(Ready(Some(Held {
                        pool: self.clone(),
                        id,
                        sender,
                        wire,
                    })));
                }
                Admission::Full => freed.await,
            }
        }
    }

    /// A connection to probe upstream with, within 400 ms. One that takes longer is finished all the same, within
    /// `upstream.connect_timeout`, and then idle: so an upstream that is slow to connect to is found out by the next probe.
    ///
    /// # Errors
    /// [`Error::NoConnection`] when there is none by then.
    pub async fn connect_to_probe(&self, task: &TaskId) -> Result<Ready, Error> {
        let (pool, task) = (self.clone(), task.clone());
        let patience = self.0.upstream.settings.connect_timeout;
        let connecting = tokio::spawn(async move { timeout(patience, pool.connect(&task, false)).await });
        match timeout(PROBE_CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(Ok(connected))) => connected,
            Ok(Ok(Err(_)) | Err(_)) | Err(_) => Err(Error::NoConnection),
        }
    }

    fn hand_back(&self, id: u64, sender: SendRequest<Empty<Bytes>>, wire: Wire) {
        if sender.is_closed() {
            return;
        }
        let idle = Idle {
            id,
            sender,
            wire,
            since: Instant::now(),
        };
        // A pool that is gone has no use for it: then it closes here.
        if let Some(pool) = self.0.upstream.connections().pools.get_mut(&self.0.id) {
            pool.idle.push_back(idle);
        }
        self.0.upstream.freed.notify_waiters();
    }
}

/// A connection that is open and belongs to one flight. Dropped unused, it is idle again.
#[derive(Debug)]
pub struct Ready(Option<Held>);

struct Held {
    pool: Pool,
    id: u64,
    sender: SendRequest<Empty<Bytes>>,
    wire: Wire,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Connected for Ready {}

impl Drop for Ready {
    fn drop(&mut self) {
        if let Some(Held { pool, id, sender, wire }) = self.0.take() {
            pool.hand_back(id, sender, wire);
        }
    }
}

/// What upstream answered, as it came, but decoded.
#[derive(Debug)]
pub struct Fetched {
    /// The HTTP status.
    pub status: StatusCode,
    /// The Content-Type, if there was one.
    pub content_type: Option<Arc<HeaderValue>>,
    /// The Retry-After, if there was one.
    pub retry_after: Option<HeaderValue>,
    /// The body, byte for byte.
    pub body: Bytes,
    /// When the attempt began: an answer shows the task no later than this.
    pub asked: Instant,
    /// When the last byte was there.
    pub received: Instant,
    /// The body's share of `limits.body_bytes`, until the last holder is done with it.
    pub room: Option<OwnedSemaphorePermit>,
    /// What it came on.
    pub connection: Answered,
}

/// A connection that has brought an answer. Dropped, it is closed: what came may not have been an answer to what was asked.
#[derive(Debug)]
pub struct Answered(Held);

impl Answered {
    /// Keeps it for the next query.
    pub fn reuse(self) {
        let Held {
            pool,
            id,
            mut sender,
            wire,
        } = self.0;
        // Idle again once hyper has seen that nothing is left over; mostly it has.
        tokio::spawn(async move {
            if sender.ready().await.is_ok() {
                pool.hand_back(id, sender, wire);
            }
        });
    }
}

/// An attempt that brought no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// Why.
    pub error: Error,
    /// Whether the connection closed before any byte of a response: then, and only then, asking again may help.
    pub unanswered: bool,
    /// Whether nothing was sent at all: the permit was too late to be used.
    pub unspent: bool,
}

impl Failed {
    /// One that was sent, as far as is known, and is not to be sent again.
    fn after(error: Error) -> Self {
        Self {
            error,
            unanswered: false,
            unspent: false,
        }
    }
}

impl Ready {
    /// Whether upstream has closed it since.
    pub fn is_closed(&self) -> bool {
        self.0.as_ref().is_none_or(|held| held.sender.is_closed())
    }

    /// Asks upstream about a task: the only way to TaskInfo, and it costs the permit.
    ///
    /// Not cancel safe: dropped midway, the query is spent and the connection closed.
    ///
    /// # Errors
    /// When there is no complete answer within `upstream.timeout`, or one that is too large or cannot be decoded.
    pub async fn send(
        mut self,
        permit: Permit,
        key: &ApiKey,
        task: &TaskId,
        traceparent: Option<HeaderValue>,
    ) -> Result<Fetched, Failed> {
        let closed = || Failed {
            unanswered: true,
            ..Failed::after(Error::UpstreamBroken)
        };
        let Held {
            pool,
            id,
            mut sender,
            wire,
        } = self.0.take().ok_or_else(closed)?;
        let upstream = Arc::clone(&pool.0.upstream);
        let request = upstream.query(key, task, traceparent).map_err(Failed::after)?;
        let asked = Instant::now();
        if permit.is_late(asked) {
            pool.hand_back(id, sender, wire);
            return Err(Failed {
                unspent: true,
                ..closed()
            });
        }
        wire.arm(permit);
        let exchange = async {
            let response = sender.send_request(request).await.map_err(|_| Error::UpstreamBroken)?;
            wire.answered();
            let (head, body) = in_http(response)?.into_parts();
            let (body, room) = body::read(&head.headers, body, &upstream.room).await?;
            Ok((head, body, room))
        };
        let (head, body, room) = match timeout(upstream.settings.timeout, exchange).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                return Err(Failed {
                    unanswered: !wire.heard(),
                    unspent: wire.was_late(),
                    error,
                });
            }
            Err(_) => return Err(Failed::after(Error::UpstreamTimeout)),
        };
        let received = Instant::now();
        upstream.recent.note(received - asked);
        Ok(Fetched {
            status: head.status,
            // A copy of its own: hyper's is a slice of the connection's read buffer, which would be kept with it.
            content_type: (head.headers.get(CONTENT_TYPE)).and_then(|value| content_type(value.as_bytes())),
            retry_after: head.headers.get(RETRY_AFTER).cloned(),
            body,
            asked,
            received,
            room,
            connection: Answered(Held { pool, id, sender, wire }),
        })
    }
}

impl Inner {
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request upstream sees. Nothing of the client's but the task's id and its key, and its trace where that is wanted.
    fn query(
        &self,
        key: &ApiKey,
        task: &TaskId,
        traceparent: Option<HeaderValue>,
    ) -> Result<Request<Empty<Bytes>>, Error> {
        let uri = Uri::try_from(format!("{TASK_INFO_PATH}?{}", task.to_query())).map_err(|_| Error::Internal)?;
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        headers.insert(HOST, self.host.clone());
        headers.insert(API_KEY_HEADER, key.header_value());
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(
            USER_AGENT,
            HeaderValue::from_static(concat!("crun-gateway/", env!("CARGO_PKG_VERSION"))),
        );
        if let Some(traceparent) = traceparent {
            headers.insert(TRACEPARENT, traceparent);
        }
        Ok(request)
    }

    /// A place for a connection that is no account's, as soon as one is free.
    async fn slot_of_nobody(self: &Arc<Self>) -> Slot {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let slot = self.connections().slot_of_nobody(self);
            match slot {
                Some(slot) => return slot,
                None => freed.await,
            }
        }
    }

    /// Opens a connection in `slot`, which is free again when it closes.
    async fn open<B>(self: &Arc<Self>, slot: Slot) -> Result<(SendRequest<B>, Wire), Error>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: std::error::Error + Send + Sync + 'static,
    {
        let connecting = async {
            let (stream, wire) = Wire::attach((self.dial)().await?, self.tls.as_ref()).await?;
            let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(async move {
                let _slot = slot;
                // How it ends, whoever uses it learns from its own request.
                let _ = connection.await;
            });
            anyhow::Ok((sender, wire))
        };
        let error = match timeout(self.settings.connect_timeout, connecting).await {
            Ok(Ok(opened)) => return Ok(opened),
            Ok(Err(error)) => error,
            Err(_) => anyhow::anyhow!("not open within upstream.connect_timeout"),
        };
        self.metrics.upstream_connect_failures.inc();
        let error = format!("{error:#}");
        if self.breaker.is_open() {
            // The breaker has said so, once; that its probes fail is no news.
            tracing::debug!(error, "upstream connection failed");
        } else {
            tracing::warn!(error, "upstream connection failed");
        }
        Err(Error::NoConnection)
    }
}

impl Connections {
    fn admit(&mut self, upstream: &Arc<Inner>, pool_id: u64, fresh: bool, now: Instant) -> Admission {
        let full = self.open >= upstream.most_connections;
        let Some(pool) = self.pools.get_mut(&pool_id) else {
            return Admission::Full;
        };
        if !fresh {
            while let Some(idle) = pool.idle.pop_back() {
                let is_young = idle.since + IDLE_LIFETIME > now && upstream.breaker.trusts(idle.since);
                if is_young && !idle.sender.is_closed() {
                    return Admission::Idle(idle);
                }
            }
        }
        if pool.open >= upstream.settings.connections {
            // Its slot is free, and this is asked again, once it has closed.
            drop(pool.idle.pop_front());
            return Admission::Full;
        }
        // An account may always open one, or a full process would shut it out.
        if full && pool.open > 0 {
            self.close_longest_idle();
            return Admission::Full;
        }
        pool.open += 1;
        Admission::Open(self.slot(upstream, Some(pool_id)))
    }

    fn slot_of_nobody(&mut self, upstream: &Arc<Inner>) -> Option<Slot> {
        if self.open >= upstream.most_connections {
            self.close_longest_idle();
            return None;
        }
        Some(self.slot(upstream, None))
    }

    fn slot(&mut self, upstream: &Arc<Inner>, pool: Option<u64>) -> Slot {
        self.open += 1;
        self.next_id += 1;
        upstream.metrics.upstream_connections.inc();
        Slot {
            upstream: Arc::clone(upstream),
            pool,
            id: self.next_id,
        }
    }

    fn close_longest_idle(&mut self) {
        let pools = self.pools.values_mut().filter(|pool| !pool.idle.is_empty());
        if let Some(pool) = pools.min_by_key(|pool| pool.idle.front().map(|idle| idle.since)) {
            drop(pool.idle.pop_front());
        }
    }
}

/// A connection's place among `upstream.connections` and `limits.upstream_connections`, from before it is opened until it
/// has closed.
struct Slot {
    upstream: Arc<Inner>,
    pool: Option<u64>,
    id: u64,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut connections = self.upstream.connections();
        connections.open -= 1;
        if let Some(pool) = self.pool.and_then(|pool| connections.pools.get_mut(&pool)) {
            pool.open -= 1;
            pool.idle.retain(|idle| idle.id != self.id);
        }
        drop(connections);
        self.upstream.metrics.upstream_connections.dec();
        self.upstream.freed.notify_waiters();
    }
}

/// Nobody asked for another protocol: an Upgrade goes no further than to us. And of two lengths one is a lie, told to make
/// somebody take the end of an answer for the next one (RFC 9112 §6.3).
fn in_http(response: Response<Incoming>) -> Result<Response<Incoming>, Error> {
    let headers = response.headers();
    if response.status() == StatusCode::SWITCHING_PROTOCOLS
        || (headers.contains_key(CONTENT_LENGTH) && headers.contains_key(TRANSFER_ENCODING))
    {
        return Err(Error::UpstreamBroken);
    }
    Ok(response)
}
