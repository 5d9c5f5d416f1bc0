//! Why a poll got no answer of upstream's: one variant a reason, and what each means as methods.
//!
//! A 4xx or 5xx *from* upstream is an answer, not an error. Turning an error into a response is `gateway::response`'s
//! business.

use std::fmt;
use std::num::NonZeroU32;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use serde::Serialize;
use thiserror::Error;

use crate::outcome::{EdgeRefusal, Shed};
use crate::task::TaskIdError;

/// When a place may be free of those that others hold: most requests are answered by then.
const PLACE_FREE: Duration = Duration::from_secs(1);

/// When an unlisted key may have a place: an idle one is forgotten after so long (`gateway/accounts.rs`).
const KEY_FORGOTTEN: Duration = Duration::from_mins(1);

/// When upstream may answer again: within a client's usual interval of 2 to 5 s. Chosen, not measured.
const UPSTREAM_BACK: Duration = Duration::from_secs(2);

/// A reason to answer in the gateway's own words. Messages go to clients: they name the field and the fix, and never
/// hold a key or what a client sent.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// The request carries no key.
    #[error("no API key: send it in the x-api-key header")]
    MissingKey,
    /// The request carries two different keys, one that no header may hold, or one longer than
    /// [`LONGEST_KEY`](crate::account::LONGEST_KEY).
    #[error("the API key is ambiguous or malformed: send one x-api-key header of at most 512 visible ASCII characters")]
    MalformedKey,
    /// `unknown_keys: reject`, and the key is listed nowhere.
    #[error("this API key is not configured here: ask the gateway's operator to list it under accounts")]
    UnknownKey,
    /// A client token on a path that is streamed through, without `clients[].passthrough`.
    #[error("this client token is for polling only: have the operator set passthrough for this client")]
    TokenMayNotPass,
    /// More unlisted keys at once than `max_accounts`.
    #[error("too many different API keys at once: try again later, or have the operator raise max_accounts")]
    TooManyAccounts,
    /// `task_id` is missing, empty, repeated or malformed.
    #[error(transparent)]
    TaskId(#[from] TaskIdError),
    /// `TaskInfo` with another method than GET or HEAD.
    #[error("TaskInfo answers GET and HEAD only")]
    MethodNotAllowed,
    /// A path that is neither `TaskInfo` nor passed through.
    #[error("no such path here: the gateway serves GET /api/v1/client/job/TaskInfo and its passthrough paths")]
    NotFound,
    /// What came is no request of HTTP/1.1 or 1.0, or one that two servers could read differently.
    #[error("bad request: {0}")]
    Malformed(&'static str),
    /// A head that is larger than `limits.header_bytes` or has more fields than `limits.headers`.
    #[error("the request's head is larger than limits.header_bytes, or has more fields than limits.headers")]
    HeadTooLarge,
    /// A request's body that is larger than `limits.request_body`.
    #[error("the request's body is larger than limits.request_body")]
    BodyTooLarge,
    /// As many requests are being answered as `limits.requests` allows.
    #[error("too many requests at once (limits.requests): try again")]
    Overloaded,
    /// As many connections are open as this field allows.
    #[error("too many connections ({0}): keep connections alive and share them")]
    TooManyConnections(&'static str),
    /// Plain HTTP where TLS is spoken.
    #[error("this port speaks TLS: use https://")]
    PlainHttp,
    /// A request's head has begun and did not end within `limits.header_timeout`.
    #[error("the request's head took longer than limits.header_timeout")]
    HeaderTimeout,
    /// A request has taken longer than `limits.request_timeout`, and its client is not at its end.
    #[error("the request took longer than limits.request_timeout")]
    RequestTimeout,
    /// The budget turns the poll away.
    #[error("{why}")]
    Shed {
        /// Why.
        why: Shed,
        /// The account's budget, in queries a second.
        limit: NonZeroU32,
        /// When a place in the queue is free.
        retry_after: Duration,
    },
    /// The breaker is open: upstream was unavailable lately.
    #[error("upstream is unavailable: it is probed until it answers again")]
    UpstreamUnavailable {
        /// When it is asked next.
        retry_after: Duration,
    },
    /// No connection could be opened (twice), or none was there by the deadline.
    #[error("upstream cannot be reached")]
    NoConnection,
    /// An attempt was sent, and is not answered by the poll's deadline; it goes on.
    #[error("upstream has not answered within budget.max_wait: its answer will be kept")]
    UpstreamSlow,
    /// An attempt was sent and not answered within `upstream.timeout`.
    #[error("upstream did not answer in time")]
    UpstreamTimeout,
    /// Upstream has all that a client has sent of a request that is streamed through, or could have it, and does not answer
    /// within `limits.request_timeout`.
    #[error("upstream did not answer within limits.request_timeout")]
    UpstreamSilent,
    /// Upstream has stopped taking a request that is streamed through, before it answered.
    #[error("upstream took nothing more of the request's body for a minute")]
    UploadStalled,
    /// The connection broke, or what came was no HTTP answer.
    #[error("upstream closed the connection without a complete answer")]
    UpstreamBroken,
    /// What comes before the answer's body is more than is read of it.
    #[error("upstream's answer has more than 100 header fields, or 64 KiB of them")]
    UpstreamHeadTooLarge,
    /// The answer is larger than `upstream.max_body`.
    #[error("upstream's answer is larger than upstream.max_body")]
    UpstreamTooLarge,
    /// The answer is compressed in a way that was not asked for and cannot be undone.
    #[error("upstream's answer has a Content-Encoding that cannot be decoded")]
    UpstreamEncoding,
    /// Nothing of `limits.body_bytes` is left for the answer.
    #[error("too many of upstream's answers are being taken at once (limits.body_bytes): try again")]
    NoRoom,
    /// A bug of the gateway's: something panicked.
    #[error("internal error")]
    Internal,
}

impl Error {
    /// The HTTP status, which is also the envelope's `code`.
    pub fn status(&self) -> StatusCode {
        self.meaning().status
    }

    /// What Cache-Status and the log say: one token.
    pub fn detail(&self) -> &'static str {
        match self.meaning().detail {
            Detail::Edge(refusal) => refusal.into(),
            Detail::Other(detail) => detail,
        }
    }

    /// What it counts as where a request is refused at the edge, if it is of that kind.
    pub fn edge_refusal(&self) -> Option<EdgeRefusal> {
        match self.meaning().detail {
            Detail::Edge(refusal) => Some(refusal),
            Detail::Other(_) => None,
        }
    }

    /// The error token of RFC 9209 (Proxy-Status) that says why; `None` where the client's request was at fault.
    pub fn proxy_status(&self) -> Option<&'static str> {
        self.meaning().proxy_status
    }

    /// When asking again is worth while; `None` where waiting does not help.
    pub fn retry_after(&self) -> Option<Duration> {
        self.meaning().retry_after
    }

    fn meaning(&self) -> Meaning {
        use EdgeRefusal as E;
        use Meaning as M;
        use StatusCode as S;
        match *self {
            Self::MissingKey => M::theirs(S::UNAUTHORIZED, "missing_key"),
            Self::MalformedKey => M::theirs(S::UNAUTHORIZED, "malformed_key"),
            Self::UnknownKey => M::theirs(S::UNAUTHORIZED, "unknown_key"),
            Self::TokenMayNotPass => M::theirs(S::FORBIDDEN, "passthrough"),
            Self::TooManyAccounts => M::denied(S::TOO_MANY_REQUESTS, E::TooManyAccounts, KEY_FORGOTTEN),
            Self::TaskId(_) => M::theirs(S::UNPROCESSABLE_ENTITY, "task_id"),
            Self::MethodNotAllowed => M::theirs(S::METHOD_NOT_ALLOWED, "method"),
            Self::NotFound => M::theirs(S::NOT_FOUND, "path"),
            Self::Malformed(_) => M::theirs(S::BAD_REQUEST, E::Malformed),
            Self::HeadTooLarge => M::theirs(S::REQUEST_HEADER_FIELDS_TOO_LARGE, E::HeadTooLarge),
            Self::BodyTooLarge => M::theirs(S::PAYLOAD_TOO_LARGE, E::BodyTooLarge),
            Self::Overloaded => M::denied(S::SERVICE_UNAVAILABLE, E::Overloaded, PLACE_FREE),
            Self::TooManyConnections(_) => M::denied(S::SERVICE_UNAVAILABLE, E::Connections, PLACE_FREE),
            Self::PlainHttp => M::theirs(S::BAD_REQUEST, "plain_http"),
            Self::HeaderTimeout => M::theirs(S::REQUEST_TIMEOUT, E::HeaderTimeout),
            Self::RequestTimeout => M::theirs(S::GATEWAY_TIMEOUT, E::RequestTimeout),
            Self::Shed { why, retry_after, .. } => M::denied(S::TOO_MANY_REQUESTS, why.detail(), retry_after),
            Self::UpstreamUnavailable { retry_after } => M::away("upstream_unavailable", retry_after),
            Self::NoConnection => M::away("no_connection", UPSTREAM_BACK),
            Self::UpstreamSlow => M::silent("upstream_slow"),
            Self::UpstreamTimeout => M::silent("upstream_timeout"),
            // The limit is the same as RequestTimeout's.
            Self::UpstreamSilent => M::silent(E::RequestTimeout),
            Self::UploadStalled => M::silent("upload_stalled"),
            Self::UpstreamBroken => M::unusable("upstream_broken", "http_response_incomplete", Some(UPSTREAM_BACK)),
            Self::UpstreamHeadTooLarge => {
                M::unusable("upstream_head_too_large", "http_response_header_section_size", None)
            }
            Self::UpstreamTooLarge => M::unusable("upstream_too_large", "http_response_body_size", None),
            Self::UpstreamEncoding => M::unusable("upstream_encoding", "http_response_content_coding", None),
            Self::NoRoom => M::denied(S::SERVICE_UNAVAILABLE, "no_room", PLACE_FREE),
            Self::Internal => M {
                status: S::INTERNAL_SERVER_ERROR,
                detail: E::Internal.into(),
                proxy_status: Some("proxy_internal_error"),
                retry_after: None,
            },
        }
    }
}

/// Its one token.
enum Detail {
    /// Counted, too.
    Edge(EdgeRefusal),
    Other(&'static str),
}

impl From<EdgeRefusal> for Detail {
    fn from(refusal: EdgeRefusal) -> Self {
        Self::Edge(refusal)
    }
}

impl From<&'static str> for Detail {
    fn from(detail: &'static str) -> Self {
        Self::Other(detail)
    }
}

/// What an [`enum@Error`] means, to a client and to the log.
struct Meaning {
    status: StatusCode,
    detail: Detail,
    proxy_status: Option<&'static str>,
    retry_after: Option<Duration>,
}

impl Meaning {
    /// The client's request is at fault, and would be again.
    fn theirs(status: StatusCode, detail: impl Into<Detail>) -> Self {
        Self {
            status,
            detail: detail.into(),
            proxy_status: None,
            retry_after: None,
        }
    }

    /// The gateway will not, for now.
    fn denied(status: StatusCode, detail: impl Into<Detail>, retry_after: Duration) -> Self {
        Self {
            status,
            detail: detail.into(),
            proxy_status: Some("http_request_denied"),
            retry_after: Some(retry_after),
        }
    }

    /// Upstream was not asked, since it cannot be.
    fn away(detail: &'static str, retry_after: Duration) -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            detail: detail.into(),
            proxy_status: Some("destination_unavailable"),
            retry_after: Some(retry_after),
        }
    }

    /// Upstream was asked, and has not answered.
    fn silent(detail: impl Into<Detail>) -> Self {
        Self {
            status: StatusCode::GATEWAY_TIMEOUT,
            detail: detail.into(),
            proxy_status: Some("http_response_timeout"),
            retry_after: Some(UPSTREAM_BACK),
        }
    }

    /// Upstream has answered, with what is of no use.
    fn unusable(detail: &'static str, proxy_status: &'static str, retry_after: Option<Duration>) -> Self {
        Self {
            status: StatusCode::BAD_GATEWAY,
            detail: detail.into(),
            proxy_status: Some(proxy_status),
            retry_after,
        }
    }
}

/// A message of the gateway's own in upstream's envelope, which every answer of upstream's has in common.
pub fn envelope(code: u16, message: &impl fmt::Display) -> Bytes {
    #[derive(Serialize)]
    struct Envelope {
        code: u16,
        message: String,
        /// Always null.
        data: (),
    }
    let envelope = Envelope {
        code,
        message: format!("crun-gateway: {message}"),
        data: (),
    };
    // Numbers and text always serialise.
    serde_json::to_vec(&envelope).unwrap_or_default().into()
}
