//! Every response that the gateway writes itself: the headers that go with an answer, and errors in upstream's envelope.

use std::cell::{Cell, RefCell};
use std::time::{Duration, UNIX_EPOCH};

use bytes::{Buf, Bytes};
use http::header::{AGE, ALLOW, CACHE_CONTROL, CONTENT_TYPE, LOCATION, RETRY_AFTER, VIA};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version};
use hyper::ext::ReasonPhrase;
use tokio::time::Instant;
use uuid::Uuid;

use super::body::{Body, Data};
use crate::error::{Error, envelope};
use crate::moment::{millis, unix_now};
use crate::stored::{Answer, Freshness};
use crate::upstream::{Streamed, connection_options};

/// RFC 9211.
const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
/// RFC 9209.
const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
/// draft-ietf-httpapi-ratelimit-headers-11: what an account may ask, and when it may again.
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
/// Not a standard, but what everybody's logs are searched by.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// RFC 9110 §7.6.3.
pub(super) static VIA_GATEWAY: HeaderValue = HeaderValue::from_static("1.1 crun-gateway");

/// No cache between us and a client knows when a task goes on.
static NO_STORE: HeaderValue = HeaderValue::from_static("no-store");

/// What Cache-Status says of every hit, before its `ttl`.
const HIT: &str = "crun-gateway; hit; ttl=";
/// And of every answer of upstream's, before its status.
const FWD_URI_MISS: &str = "crun-gateway; fwd=uri-miss; fwd-status=";
const FWD_STALE: &str = "crun-gateway; fwd=stale; fwd-status=";

/// Bytes that the head of a hit mostly fits.
const USUAL_HEAD: usize = 384;

/// Bytes that a Cache-Status mostly fits.
const USUAL_CACHE_STATUS: usize = 96;

/// How the cache took part in an answer: what Cache-Status (RFC 9211) says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CacheStatus {
    /// From the cache; with a detail where something fresher could not be had.
    Hit(Option<&'static str>),
    /// By a flight: this poll's own, or one that it joined.
    Forwarded {
        /// A stale answer was there.
        was_stale: bool,
        collapsed: bool,
    },
}

impl CacheStatus {
    /// Its value, in pieces, for an answer that is fresh for so many seconds yet.
    fn write(self, answer: &Answer, ttl: i64, mut add: impl FnMut(&[u8])) {
        let mut number = itoa::Buffer::new();
        let (was_stale, collapsed) = match self {
            Self::Hit(detail) => {
                add(HIT.as_bytes());
                add(number.format(ttl).as_bytes());
                if let Some(detail) = detail {
                    add(b"; detail=");
                    add(detail.as_bytes());
                }
                return;
            }
            Self::Forwarded { was_stale, collapsed } => (was_stale, collapsed),
        };
        add(if was_stale { FWD_STALE } else { FWD_URI_MISS }.as_bytes());
        add(answer.status().as_str().as_bytes());
        if collapsed {
            add(b"; collapsed");
        }
        if answer.is_stored() {
            add(b"; stored; ttl=");
            add(number.format(ttl).as_bytes());
        }
    }
}

/// What a poll gets, until it is written.
#[derive(Debug)]
pub struct Reply(Kind);

#[derive(Debug)]
enum Kind {
    FromUpstream(FromUpstream),
    /// Whatever else.
    Made(Box<Response<Body>>),
}

/// Upstream's answer as the client gets it: its bytes and status, and few headers, since most of upstream's speak of a
/// connection or a moment that is not this client's.
#[derive(Debug)]
struct FromUpstream {
    answer: Answer,
    cache: CacheStatus,
    freshness: Freshness,
    request_id: Option<HeaderValue>,
}

impl FromUpstream {
    /// Shows each header but those that say where the body ends and when it was sent.
    fn each_header(&self, mut show: impl FnMut(HeaderName, &[u8])) {
        let content_type = self.answer.content_type();
        for (name, value) in [
            (CONTENT_TYPE, content_type.as_deref()),
            (RETRY_AFTER, self.answer.retry_after()),
            (LOCATION, self.answer.location()),
        ] {
            if let Some(value) = value {
                show(name, value.as_bytes());
            }
        }
        let mut status = Vec::with_capacity(USUAL_CACHE_STATUS);
        let ttl = self.freshness.ttl();
        (self.cache).write(&self.answer, ttl, |part| status.extend_from_slice(part));
        show(CACHE_STATUS, &status);
        show(AGE, itoa::Buffer::new().format(self.freshness.age.as_secs()).as_bytes());
        show(CACHE_CONTROL, NO_STORE.as_bytes());
        show(VIA, VIA_GATEWAY.as_bytes());
        if let Some(request_id) = &self.request_id {
            show(REQUEST_ID, request_id.as_bytes());
        }
    }
}

impl From<Response<Body>> for Reply {
    fn from(response: Response<Body>) -> Self {
        Self(Kind::Made(Box::new(response)))
    }
}

impl Reply {
    /// `live` is the freshness lifetime of live answers at `now`.
    pub(super) fn new(answer: Answer, cache: CacheStatus, now: Instant, live: Duration) -> Self {
        Self(Kind::FromUpstream(FromUpstream {
            freshness: answer.freshness(now, live),
            answer,
            cache,
            request_id: None,
        }))
    }

    /// Gives it the `x-request-id` that it is called by.
    pub(super) fn called(mut self, id: HeaderValue) -> Self {
        match &mut self.0 {
            Kind::FromUpstream(answered) => answered.request_id = Some(id),
            Kind::Made(response) => drop(response.headers_mut().insert(REQUEST_ID, id)),
        }
        self
    }

    /// What it is called by.
    pub fn request_id(&self) -> Option<&HeaderValue> {
        match &self.0 {
            Kind::FromUpstream(answered) => answered.request_id.as_ref(),
            Kind::Made(response) => response.headers().get(REQUEST_ID),
        }
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match &self.0 {
            Kind::FromUpstream(answered) => answered.answer.status(),
            Kind::Made(response) => response.status(),
        }
    }

    /// The reply as hyper sends it.
    pub(super) fn into_response(self) -> Response<Body> {
        let answered = match self.0 {
            Kind::FromUpstream(answered) => answered,
            Kind::Made(response) => return *response,
        };
        let mut response = Response::new(Body::Whole(None));
        *response.status_mut() = answered.answer.status();
        if response.status().canonical_reason().is_none() {
            // Or hyper makes one up, which some clients show.
            response.extensions_mut().insert(ReasonPhrase::from_static(b""));
        }
        answered.each_header(|name, value| {
            if let Ok(value) = HeaderValue::from_bytes(value) {
                response.headers_mut().insert(name, value);
            }
        });
        *response.body_mut() = Body::Whole(Some(answered.answer.into()));
        response
    }

    /// Writes to `head` what hyper would of its head, to a GET, and that it `is_last` on its connection if so; gives the body.
    pub fn write(self, head: &mut Vec<u8>, is_last: bool) -> Data {
        let status = self.status();
        head.reserve(USUAL_HEAD);
        write_status(head, status);
        let mut add = |part: &[u8]| head.extend_from_slice(part);
        let body = match self.0 {
            Kind::FromUpstream(answered) => {
                answered.each_header(|name, value| add_header(&mut add, &name, value));
                Some(answered.answer.into())
            }
            Kind::Made(mut response) => {
                for (name, value) in response.headers() {
                    add_header(&mut add, name, value.as_bytes());
                }
                response.body_mut().take()
            }
        };
        if is_last {
            add(b"\r\nconnection: close");
        }
        let body = body.filter(|_| may_have_body(status));
        if may_have_body(status) {
            let length = body.as_ref().map_or(0, Data::remaining);
            add(b"\r\ncontent-length: ");
            add(itoa::Buffer::new().format(length).as_bytes());
        }
        add(b"\r\ndate: ");
        with_date(unix_now(), |date| add(date.as_bytes()));
        add(b"\r\n\r\n");
        body.unwrap_or(Data::Bytes(Bytes::new()))
    }
}

fn add_header(add: &mut impl FnMut(&[u8]), name: &HeaderName, value: &[u8]) {
    for part in [b"\r\n", name.as_str().as_bytes(), b": ", value] {
        add(part);
    }
}

/// Whether a response to a GET may have a body (RFC 9110 §6.4.1).
fn may_have_body(status: StatusCode) -> bool {
    !status.is_informational() && !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

fn write_status(head: &mut Vec<u8>, status: StatusCode) {
    if status == StatusCode::OK {
        return head.extend_from_slice(b"HTTP/1.1 200 OK");
    }
    let reason = status.canonical_reason().unwrap_or_default();
    for part in ["HTTP/1.1 ", status.as_str(), " ", reason] {
        head.extend_from_slice(part.as_bytes());
    }
}

/// Writes the head of a hit's [`Reply`], on a connection that stays open, without making one.
/// `sent` is the `x-request-id` that came with the request.
pub(super) fn write_hit(head: &mut Vec<u8>, answer: &Answer, freshness: Freshness, sent: Option<&[u8]>) {
    let unix = unix_now();
    let mut number = itoa::Buffer::new();
    head.reserve(USUAL_HEAD);
    write_status(head, answer.status());
    let mut add = |part: &[u8]| head.extend_from_slice(part);
    if let Some(content_type) = answer.content_type() {
        add(b"\r\ncontent-type: ");
        add(content_type.as_bytes());
    }
    // No Retry-After, nor Location: what is kept has none.
    add(b"\r\ncache-status: ");
    add(HIT.as_bytes());
    add(number.format(freshness.ttl()).as_bytes());
    add(b"\r\nage: ");
    add(number.format(freshness.age.as_secs()).as_bytes());
    add(b"\r\ncache-control: no-store\r\nvia: 1.1 crun-gateway\r\nx-request-id: ");
    with_request_id(sent, unix, &mut add);
    add(b"\r\ncontent-length: ");
    add(number.format(answer.body_len()).as_bytes());
    add(b"\r\ndate: ");
    with_date(unix, |date| add(date.as_bytes()));
    add(b"\r\n\r\n");
}

/// The time of day as HTTP writes it (RFC 9110 §5.6.7), made once a second.
fn with_date<T>(unix: Duration, show: impl FnOnce(&str) -> T) -> T {
    thread_local! {
        static MADE: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
    }
    MADE.with_borrow_mut(|(second, date)| {
        if *second != unix.as_secs() || date.is_empty() {
            (*second, *date) = (unix.as_secs(), httpdate::fmt_http_date(UNIX_EPOCH + unix));
        }
        show(date)
    })
}

/// An error as the client gets it: `{"code","message","data":null}` with `code` = the HTTP status, and the gateway named
/// in the message.
pub(super) fn error(error: &Error) -> Response<Body> {
    let code = error.status();
    let body = envelope(code.as_u16(), &error);
    let mut response = Response::new(Body::Whole(Some(Data::Bytes(body))));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, NO_STORE.clone());
    headers.insert(VIA, VIA_GATEWAY.clone());
    headers.insert(AGE, HeaderValue::from_static("0"));
    if let Ok(value) = HeaderValue::try_from(format!("crun-gateway; detail={}", error.detail())) {
        headers.insert(CACHE_STATUS, value);
    }
    if let Some(token) = error.proxy_status()
        && let Ok(value) = HeaderValue::try_from(format!("crun-gateway; error={token}"))
    {
        headers.insert(PROXY_STATUS, value);
    }
    if let Some(wait) = error.retry_after().map(whole_seconds) {
        headers.insert(RETRY_AFTER, HeaderValue::from(wait));
        if let Error::Shed { limit, .. } = error {
            for (name, value) in [
                (RATE_LIMIT_POLICY, format!("\"account\";q={limit};w=1")),
                (RATE_LIMIT, format!("\"account\";r=0;t={wait}")),
            ] {
                if let Ok(value) = HeaderValue::try_from(value) {
                    headers.insert(name, value);
                }
            }
        }
    }
    if *error == Error::MethodNotAllowed {
        headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

/// An error as it goes out on a connection of which no request is read, and which closes; logged.
pub fn refusal(error: &Error) -> Vec<u8> {
    let request_id = request_id_of(None);
    tracing::debug!(
        request_id = request_id.to_str().unwrap_or_default(),
        code = error.status().as_u16(),
        detail = error.detail(),
        "request refused"
    );
    let reply = Reply::from(self::error(error)).called(request_id);
    let mut bytes = Vec::new();
    let body = reply.write(&mut bytes, true);
    bytes.extend_from_slice(body.chunk());
    bytes
}

/// Upstream's response to a request that was streamed through: untouched, but for what belongs to one connection.
pub(super) fn streamed(response: Response<Streamed>, request_id: &HeaderValue) -> Response<Body> {
    let mut response = response.map(|body| Body::streamed(body, request_id.clone()));
    // Upstream's is upstream's: to a client of HTTP/1.1 an older one would leave the answer without an end of its own.
    *response.version_mut() = Version::HTTP_11;
    strip_hop_by_hop(response.headers_mut());
    response.headers_mut().append(VIA, VIA_GATEWAY.clone());
    response
        .headers_mut()
        .append(CACHE_STATUS, HeaderValue::from_static("crun-gateway; fwd=bypass"));
    response
}

/// Removes what is meant for the next hop only (RFC 9110 §7.6.1). Framing is hyper's: it writes its own.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = connection_options(headers)
        .filter_map(|name| name.parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ] {
        headers.remove(name);
    }
}

/// Removes the headers of which `is_one` says so, all lines of a name if of one.
pub(super) fn strip(headers: &mut HeaderMap, is_one: impl Fn(&HeaderName, &HeaderValue) -> bool) {
    let lines = headers.iter().filter(|(name, value)| is_one(name, value));
    let names: Vec<HeaderName> = lines.map(|(name, _)| name.clone()).collect();
    for name in names {
        headers.remove(name);
    }
}

/// The `x-request-id` that a client sent, if it is well-formed, else a new one (UUIDv7: sortable by time).
pub(super) fn request_id(headers: &HeaderMap) -> HeaderValue {
    request_id_of(headers.get(REQUEST_ID).map(HeaderValue::as_bytes))
}

/// The `x-request-id` where the request's says `sent`: that, if it is well-formed, else a new one.
pub(super) fn request_id_of(sent: Option<&[u8]>) -> HeaderValue {
    with_request_id(sent, unix_now(), |id| {
        HeaderValue::from_bytes(id).unwrap_or_else(|_| HeaderValue::from_static("none"))
    })
}

/// Whether an `x-request-id` is well-formed: no more of what others call a request is taken over.
pub(super) fn is_request_id(id: &[u8]) -> bool {
    (1..=128).contains(&id.len())
        && id
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

fn with_request_id<T>(sent: Option<&[u8]>, unix: Duration, show: impl FnOnce(&[u8]) -> T) -> T {
    match sent.filter(|sent| is_request_id(sent)) {
        Some(sent) => show(sent),
        None => show(
            new_id(unix)
                .hyphenated()
                .encode_lower(&mut Uuid::encode_buffer())
                .as_bytes(),
        ),
    }
}

/// An id that no other has. Each thread counts on from a random number of its own, so that no lock is shared.
fn new_id(unix: Duration) -> Uuid {
    thread_local! {
        static NEXT: Cell<u128> = Cell::new(Uuid::new_v4().as_u128());
    }
    let random = NEXT.with(|next| next.replace(next.get().wrapping_add(1)));
    let [_, _, _, _, _, _, random @ ..] = random.to_be_bytes();
    uuid::Builder::from_unix_timestamp_millis(millis(unix), &random).into_uuid()
}

/// Rounded up, and at least 1: never an invitation to come too early.
fn whole_seconds(duration: Duration) -> u64 {
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    seconds.max(1)
}
