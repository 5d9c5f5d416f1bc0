//! The way to the upstream: connections, and the one method that asks it about a task.
//!
//! [`Ready::send`] takes a [`Permit`] by value, and nothing else here can reach TaskInfo; so the compiler keeps the budget.
//! A connection is held *before* its permit is paid for ([`Pool::connect`]), which is why `upstream/pool.rs` is a small pool
//! of our own over `hyper::client::conn`: hyper-util's legacy client cannot do that, and resends by itself. HTTP/1.1 only:
//! the instant at which bytes are written must belong to one request.
//!
//! What an answer means is `task`'s business.

mod body;
mod breaker;
mod line;
mod pool;
mod recent;
mod streamed;
mod wire;

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, LOCATION, RETRY_AFTER, TRANSFER_ENCODING, USER_AGENT,
};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::Empty;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{self, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::{Instant, timeout};

use crate::account::{API_KEY, ApiKey};
use crate::budget::Permit;
use crate::config;
use crate::dial::{self, Dial, Handshake, Stream};
use crate::error::{Error, envelope};
use crate::metrics::Metrics;
use crate::task::{self, TaskId};
use crate::trace::TRACEPARENT;
pub use breaker::{Breaker, Probe};
use line::Line;
pub use pool::{Answered, Place, Pool, Ready};
use pool::{Connections, Slot};
pub use recent::Outlook;
use recent::Recent;
use streamed::Interest;
pub use streamed::{Streamed, connection_options};
use wire::{Heard, Wire};

/// The path of the one endpoint that costs budget.
pub const TASK_INFO_PATH: &str = "/api/v1/client/job/TaskInfo";

/// What answers are.
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The upstream, and every connection to it.
#[derive(Clone, Debug)]
pub struct Upstream(Arc<Inner>);

struct Inner {
    dial: Dial,
    tls: Option<Handshake>,
    host: HeaderValue,
    /// What every query has in common.
    headers: HeaderMap,
    settings: config::Upstream,
    /// `limits.upstream_connections`.
    most_connections: usize,
    connections: Mutex<Connections>,
    /// A connection was closed or became idle.
    freed: Notify,
    room: body::Room,
    breaker: Arc<Breaker>,
    /// Every account's answers: for people to look at, and nobody else.
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

impl Upstream {
    /// The upstream that `settings` name, reached through `dial`.
    ///
    /// # Errors
    /// When `settings.url` names no host.
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
            headers: headers(&host),
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
        Pool::new(Arc::clone(&self.0))
    }

    /// Streams a request through on a connection of its own: one that was idle could close under a POST, which may not be
    /// sent twice. The caller has seen to it that it is no TaskInfo query; hop-by-hop headers and Host are its business.
    ///
    /// # Errors
    /// When upstream cannot be reached, no place for a connection is free within `upstream.connect_timeout`, or upstream
    /// breaks off before it answers, takes nothing more of the request, or answers with a head that is too large or can be
    /// read in two ways.
    ///
    /// Cancel safe: the connection closes.
    pub async fn stream<B>(&self, request: Request<B>) -> Result<Response<Streamed>, Error>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let slot = timeout(self.0.settings.connect_timeout, self.0.slot_of_nobody())
            .await
            .map_err(|_| Error::NoConnection)?;
        let (mut sender, connection, wire) = self.0.open(streamed::impatient).await?;
        let interest = Interest::in_connection(connection, slot);
        let response = sender.send_request(request).await;
        let response = response.map_err(|error| {
            if streamed::has_stalled(&error) {
                Error::UploadStalled
            } else {
                headless(&error, &wire)
            }
        })?;
        wire.answered();
        Ok(Streamed::in_response(in_http(response)?, interest))
    }

    /// Room for an answer of so many bytes that is not kept, until the last client has it.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// [`Error::NoRoom`] when answers that their clients do not take have it all.
    pub async fn hold(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Failed> {
        self.0.room.hold(bytes).await.map_err(Failed::after)
    }

    /// Whether upstream may be asked at all.
    pub fn breaker(&self) -> &Arc<Breaker> {
        &self.0.breaker
    }

    /// How long upstream takes to answer whomever, lately: nine answers in ten take no longer. Zero if nothing is known.
    pub fn p90(&self, now: Instant) -> Duration {
        self.0.recent.p90(now)
    }

    /// The value of the Host header.
    pub fn host(&self) -> &HeaderValue {
        &self.0.host
    }

    /// Closes connections that have been idle for long, and those that upstream has closed; forgets an outage that nobody
    /// has asked about for long.
    pub fn sweep(&self, now: Instant) {
        self.0.sweep(now);
        self.0.breaker.sweep(now);
    }
}

/// What upstream answered, as it came, but decoded.
#[derive(Debug)]
pub struct Fetched {
    /// The HTTP status.
    pub status: StatusCode,
    /// The Content-Type, if there was one.
    pub content_type: Option<HeaderValue>,
    /// The Retry-After, if there was one.
    pub retry_after: Option<HeaderValue>,
    /// The Location, if there was one.
    pub location: Option<HeaderValue>,
    /// The body, byte for byte; of an error whose body is not to be had, what says so.
    pub body: Bytes,
    /// When the attempt began: an answer shows the task no later than this.
    pub asked: Instant,
    /// When the last byte was there.
    pub received: Instant,
    /// Whether more came behind it: then nobody knows what upstream means, and it is for nobody but who has asked for it.
    pub has_surplus: bool,
    /// What of `limits.body_bytes` it was read with, until it is known who has it now ([`Upstream::hold`]).
    pub room: Option<OwnedSemaphorePermit>,
    /// What it came on.
    pub connection: Answered,
}

/// An attempt that brought no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// Why.
    pub error: Error,
    /// How far it came.
    pub how: How,
}

/// How far an attempt came that brought no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Nothing was sent at all: the permit was too late to be used.
    Unspent,
    /// The connection closed before any byte of a response: then, and only then, asking again may help.
    Unanswered,
    /// It was sent, as far as is known, and is not to be sent again.
    Spent,
}

impl Failed {
    fn after(error: Error) -> Self {
        let how = How::Spent;
        Self { error, how }
    }
}

impl Ready {
    /// Asks upstream about a task: the only way to TaskInfo, and it costs the permit.
    ///
    /// Not cancel safe: dropped midway, the query is spent and the connection closed.
    ///
    /// # Errors
    /// When there is no complete answer within `upstream.timeout`, be it for want of room to read it, or one that is too
    /// large or cannot be decoded; but an error's status says enough without its body.
    pub async fn send(
        self,
        permit: Permit,
        key: &ApiKey,
        task: &TaskId,
        traceparent: Option<HeaderValue>,
    ) -> Result<Fetched, Failed> {
        let broken = |how| Failed {
            error: Error::UpstreamBroken,
            how,
        };
        let mut connection = self.take().ok_or(broken(How::Unanswered))?;
        let upstream = Arc::clone(connection.pool.upstream());
        let request = upstream.query(key, task, traceparent).map_err(Failed::after)?;
        let asked = Instant::now();
        if permit.is_late(asked) {
            connection.hand_back();
            return Err(broken(How::Unspent));
        }
        let Line {
            sender,
            driver,
            wire,
            opening,
            ..
        } = &mut *connection.line;
        wire.arm(permit);
        let (mut head, mut has_waited) = (None, false);
        let query = connection.pool.recent().ask(asked, std::mem::take(opening));
        let answered = {
            // Each move of it would take its room again.
            let exchange = pin!(async {
                let response = sender.send_request(request).await;
                let response = response.map_err(|error| headless(&error, wire))?;
                wire.answered();
                let (parts, body) = in_http(response)?.into_parts();
                let head = head.insert(parts);
                body::read(&head.headers, body, &upstream.room, &mut has_waited).await
            });
            timeout(upstream.settings.timeout, driver.run(exchange)).await
        };
        let read = match answered {
            Ok(read) => read.map_err(|error| {
                let how = match (wire.was_late(), wire.heard()) {
                    (true, _) => How::Unspent,
                    (false, false) => How::Unanswered,
                    (false, true) => How::Spent,
                };
                Failed { error, how }
            }),
            // Upstream may have been quick enough.
            Err(_) if has_waited => Err(Failed::after(Error::NoRoom)),
            Err(_) => Err(Failed::after(Error::UpstreamTimeout)),
        };
        let is_whole = read.is_ok();
        let (head, body, room) = match (head, read) {
            (Some(head), Ok((body, room))) => (head, body, room),
            (Some(mut head), Err(failed)) if task::says_enough(head.status.as_u16()) => {
                head.headers.insert(CONTENT_TYPE, JSON);
                let body = in_place_of_body(head.status, &failed.error);
                (head, body, None)
            }
            (_, read) => return Err(read.err().unwrap_or(Failed::after(Error::Internal))),
        };
        let received = Instant::now();
        query.answered(received);
        upstream.recent.note(asked, received);
        Ok(Fetched {
            status: head.status,
            // A copy of its own: hyper's is a slice of the connection's read buffer, which would be kept with it.
            content_type: (head.headers.get(CONTENT_TYPE))
                .and_then(|value| HeaderValue::from_bytes(value.as_bytes()).ok()),
            retry_after: head.headers.get(RETRY_AFTER).cloned(),
            location: head.headers.get(LOCATION).cloned(),
            body,
            asked,
            received,
            has_surplus: connection.line.has_surplus(),
            room,
            connection: Answered(is_whole.then_some(connection)),
        })
    }
}

impl Inner {
    /// The request upstream sees. Nothing of the client's but the task's id and its key, and its trace where that is wanted.
    fn query(
        &self,
        key: &ApiKey,
        task: &TaskId,
        traceparent: Option<HeaderValue>,
    ) -> Result<Request<Empty<Bytes>>, Error> {
        let uri = Uri::try_from(task.to_target(TASK_INFO_PATH)).map_err(|_| Error::Internal)?;
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        headers.clone_from(&self.headers);
        headers.insert(API_KEY, key.header_value());
        if let Some(traceparent) = traceparent {
            headers.insert(TRACEPARENT, traceparent);
        }
        Ok(request)
    }

    /// Opens a connection in `slot`, which is free again when it closes.
    async fn open_line(&self, slot: Slot) -> Result<Box<Line>, Error> {
        let (sender, connection, wire) = self.open(|stream| stream).await?;
        Ok(Box::new(Line::new(sender, connection, wire, slot)))
    }

    /// Opens a connection over what `over` makes of its stream.
    async fn open<B>(
        &self,
        over: impl FnOnce(Box<dyn Stream>) -> Box<dyn Stream>,
    ) -> Result<(SendRequest<B>, Connection<TokioIo<Heard>, B>, Wire), Error>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let connecting = async {
            let (stream, wire) = Wire::attach(over((self.dial)().await?), self.tls.as_ref()).await?;
            let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            anyhow::Ok((sender, connection, wire))
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

/// What every query to `host` has in common.
fn headers(host: &HeaderValue) -> HeaderMap {
    const AGENT: &str = concat!("crun-gateway/", env!("CARGO_PKG_VERSION"));
    let mut headers = HeaderMap::new();
    headers.insert(HOST, host.clone());
    headers.insert(ACCEPT, JSON);
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
    // Each query's own is put in its place: a copy of the map has no room for one more.
    headers.insert(API_KEY, HeaderValue::from_static(""));
    headers
}

/// Why no answer has begun.
fn headless(error: &hyper::Error, wire: &Wire) -> Error {
    if error.is_parse_too_large() || !wire.may_go_on() {
        Error::UpstreamHeadTooLarge
    } else {
        Error::UpstreamBroken
    }
}

/// What clients get for an error's body that is not to be had: upstream's envelope.
fn in_place_of_body(status: StatusCode, error: &Error) -> Bytes {
    let code = status.as_u16();
    envelope(
        code,
        &format_args!("upstream answered {code}, and nothing more is known of it: {error}"),
    )
}

/// Nobody asked for another protocol: an Upgrade goes no further than to us. And of two lengths one is a lie, told to make
/// somebody take the end of an answer for the next one (RFC 9112 §6.3); where they are the same, one is enough.
fn in_http(mut response: Response<Incoming>) -> Result<Response<Incoming>, Error> {
    let is_switch = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    // hyper looks at it only where a body follows, and forwards no second one.
    let length = content_length(headers)?;
    if is_switch || (length.is_some() && headers.contains_key(TRANSFER_ENCODING)) {
        return Err(Error::UpstreamBroken);
    }
    if let Some(length) = length {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    Ok(response)
}

/// The one length that all lines name, be it in a list (RFC 9110 §8.6).
fn content_length(headers: &HeaderMap) -> Result<Option<u64>, Error> {
    let lines = headers.get_all(CONTENT_LENGTH).iter();
    let lines = lines.map(|line| line.to_str().unwrap_or_default());
    let mut lengths = lines.flat_map(|line| line.split(',')).map(|length| {
        let length = length.trim_matches([' ', '\t']);
        // A sign is none of its digits, though `parse` takes one.
        let parsed = length.parse().ok().filter(|_| !length.starts_with('+'));
        parsed.ok_or(Error::UpstreamBroken)
    });
    let Some(first) = lengths.next().transpose()? else {
        return Ok(None);
    };
    if lengths.all(|length| length == Ok(first)) {
        Ok(Some(first))
    } else {
        Err(Error::UpstreamBroken)
    }
}

#[cfg(test)]
mod tests {
    use std::future;

    use tokio::io::{DuplexStream, duplex};
    use tokio::sync::mpsc;

    use super::*;
    use crate::config::Config;

    /// An upstream behind pipes that hold little, and its ends of them.
    pub(super) fn in_memory() -> (Upstream, mpsc::UnboundedReceiver<DuplexStream>, Arc<Metrics>) {
        let (opened, connections) = mpsc::unbounded_channel();
        let dial: Dial = Arc::new(move || {
            let (near, far) = duplex(1024);
            opened.send(far).unwrap();
            Box::pin(future::ready(Ok(Box::new(near) as Box<dyn Stream>)))
        });
        let mut config = Config::default();
        config.upstream.url = "http://upstream".parse().unwrap();
        let metrics = Arc::new(Metrics::new().unwrap());
        let upstream = Upstream::new(&config.upstream, &config.limits, dial, Arc::clone(&metrics)).unwrap();
        (upstream, connections, metrics)
    }
}
