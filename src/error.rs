//! Why a poll got no answer of upstream's: one variant a reason, and what each means as methods.
//!
//! A 4xx or 5xx *from* upstream is an answer, not an error. Turning an error into a response is `gateway::response`'s
//! business, in one function; it is logged once, there.

use std::num::NonZeroU32;
use std::time::Duration;

use http::StatusCode;
use thiserror::Error;

use crate::task::TaskIdError;

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
    /// What came is no HTTP/1.1 request, or one that two servers could read differently.
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
    /// Nobody may wait any more.
    #[error("too many tasks wait for this account's budget (budget.max_queue)")]
    QueueFull {
        /// The account's budget, in queries a second.
        limit: NonZeroU32,
        /// When a place in the queue is free.
        retry_after: Duration,
    },
    /// The turn cannot come within `budget.max_wait`, or did not.
    #[error("this account's budget is spent: no turn within budget.max_wait")]
    BudgetSpent {
        /// The account's budget, in queries a second.
        limit: NonZeroU32,
        /// When a place in the queue is free.
        retry_after: Duration,
        /// It was known that the turn would come too late, so nobody waited for it in vain.
        foreseen: bool,
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
        match self {
            Self::MissingKey | Self::MalformedKey | Self::UnknownKey => StatusCode::UNAUTHORIZED,
            Self::TokenMayNotPass => StatusCode::FORBIDDEN,
            Self::TaskId(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Malformed(_) | Self::PlainHttp => StatusCode::BAD_REQUEST,
            Self::HeadTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::HeaderTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::TooManyAccounts | Self::QueueFull { .. } | Self::BudgetSpent { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::UpstreamUnavailable { .. }
            | Self::NoConnection
            | Self::NoRoom
            | Self::Overloaded
            | Self::TooManyConnections(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::UpstreamSlow
            | Self::UpstreamTimeout
            | Self::UpstreamSilent
            | Self::UploadStalled
            | Self::RequestTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::UpstreamBroken | Self::UpstreamHeadTooLarge | Self::UpstreamTooLarge | Self::UpstreamEncoding => {
                StatusCode::BAD_GATEWAY
            }
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// What Cache-Status and the log say: one token.
    pub fn detail(&self) -> &'static str {
        match self {
            Self::MissingKey => "missing_key",
            Self::MalformedKey => "malformed_key",
            Self::UnknownKey => "unknown_key",
            Self::TokenMayNotPass => "passthrough",
            Self::TooManyAccounts => "too_many_accounts",
            Self::TaskId(_) => "task_id",
            Self::MethodNotAllowed => "method",
            Self::NotFound => "path",
            Self::Malformed(_) => "malformed",
            Self::HeadTooLarge => "head_too_large",
            Self::BodyTooLarge => "body_too_large",
            Self::Overloaded => "overloaded",
            Self::TooManyConnections(_) => "connections",
            Self::PlainHttp => "plain_http",
            Self::HeaderTimeout => "header_timeout",
            // The limit is the same.
            Self::RequestTimeout | Self::UpstreamSilent => "request_timeout",
            Self::QueueFull { .. } => "queue_full",
            Self::BudgetSpent { .. } => "budget",
            Self::UpstreamUnavailable { .. } => "upstream_unavailable",
            Self::NoConnection => "no_connection",
            Self::UpstreamSlow => "upstream_slow",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::UploadStalled => "upload_stalled",
            Self::UpstreamBroken => "upstream_broken",
            Self::UpstreamHeadTooLarge => "upstream_head_too_large",
            Self::UpstreamTooLarge => "upstream_too_large",
            Self::UpstreamEncoding => "upstream_encoding",
            Self::NoRoom => "no_room",
            Self::Internal => "internal",
        }
    }

    /// The error token of RFC 9209 (Proxy-Status) that says why; `None` where the client's request was at fault.
    pub fn proxy_status(&self) -> Option<&'static str> {
        match self {
            Self::MissingKey
            | Self::MalformedKey
            | Self::UnknownKey
            | Self::TokenMayNotPass
            | Self::TaskId(_)
            | Self::MethodNotAllowed
            | Self::NotFound
            | Self::Malformed(_)
            | Self::HeadTooLarge
            | Self::BodyTooLarge
            | Self::PlainHttp
            | Self::HeaderTimeout
            | Self::RequestTimeout => None,
            Self::TooManyAccounts
            | Self::QueueFull { .. }
            | Self::BudgetSpent { .. }
            | Self::NoRoom
            | Self::Overloaded
            | Self::TooManyConnections(_) => Some("http_request_denied"),
            Self::UpstreamUnavailable { .. } | Self::NoConnection => Some("destination_unavailable"),
            Self::UpstreamSlow | Self::UpstreamTimeout | Self::UpstreamSilent | Self::UploadStalled => {
                Some("http_response_timeout")
            }
            Self::UpstreamBroken => Some("http_response_incomplete"),
            Self::UpstreamHeadTooLarge => Some("http_response_header_section_size"),
            Self::UpstreamTooLarge => Some("http_response_body_size"),
            Self::UpstreamEncoding => Some("http_response_content_coding"),
            Self::Internal => Some("proxy_internal_error"),
        }
    }

    /// When asking again is worth while; `None` where waiting does not help.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { retry_after, .. }
            | Self::BudgetSpent { retry_after, .. }
            | Self::UpstreamUnavailable { retry_after } => Some(*retry_after),
            Self::TooManyAccounts => Some(Duration::from_mins(1)),
            Self::NoRoom | Self::Overloaded | Self::TooManyConnections(_) => Some(Duration::from_secs(1)),
            Self::NoConnection
            | Self::UpstreamSlow
            | Self::UpstreamTimeout
            | Self::UpstreamSilent
            | Self::UploadStalled
            | Self::UpstreamBroken => Some(Duration::from_secs(2)),
            Self::MissingKey
            | Self::MalformedKey
            | Self::UnknownKey
            | Self::TokenMayNotPass
            | Self::TaskId(_)
            | Self::MethodNotAllowed
            | Self::NotFound
            | Self::Malformed(_)
            | Self::HeadTooLarge
            | Self::BodyTooLarge
            | Self::PlainHttp
            | Self::HeaderTimeout
            | Self::RequestTimeout
            | Self::UpstreamHeadTooLarge
            | Self::UpstreamTooLarge
            | Self::UpstreamEncoding
            | Self::Internal => None,
        }
    }

    /// The account's budget, in queries a second, where that is why nobody was asked.
    pub fn limit(&self) -> Option<NonZeroU32> {
        match self {
            Self::QueueFull { limit, .. } | Self::BudgetSpent { limit, .. } => Some(*limit),
            Self::MissingKey
            | Self::MalformedKey
            | Self::UnknownKey
            | Self::TokenMayNotPass
            | Self::TooManyAccounts
            | Self::TaskId(_)
            | Self::MethodNotAllowed
            | Self::NotFound
            | Self::Malformed(_)
            | Self::HeadTooLarge
            | Self::BodyTooLarge
            | Self::Overloaded
            | Self::TooManyConnections(_)
            | Self::PlainHttp
            | Self::HeaderTimeout
            | Self::RequestTimeout
            | Self::UpstreamUnavailable { .. }
            | Self::NoConnection
            | Self::UpstreamSlow
            | Self::UpstreamTimeout
            | Self::UpstreamSilent
            | Self::UploadStalled
            | Self::UpstreamBroken
            | Self::UpstreamHeadTooLarge
            | Self::UpstreamTooLarge
            | Self::UpstreamEncoding
            | Self::NoRoom
            | Self::Internal => None,
        }
    }
}
