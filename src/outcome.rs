//! The words for how things ended: how a poll was answered, in whose turn a permit came, and why the budget or the edge went
//! no further.
//!
//! Pure. One enum serves metric label, log field and header alike: the word is the variant's name.

use strum::{AsRefStr, IntoStaticStr, VariantArray};
use thiserror::Error;

/// How a poll was answered: the `cache` label of the request metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, AsRefStr, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Served {
    /// From the cache, within its freshness lifetime.
    Hit,
    /// From a snapshot past its freshness lifetime, because nothing fresher could be had.
    Stale,
    /// By a flight that this poll started.
    Miss,
    /// By a flight that another poll had started.
    Collapsed,
    /// By the gateway itself: a refusal.
    None,
}

impl Served {
    /// Those that save a call upstream, where the poll has opened no flight all the same.
    pub const SAVING: [Self; 3] = [Self::Hit, Self::Stale, Self::Collapsed];
}

/// In whose turn a flight gets its permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Lane {
    /// A client's that waits for it.
    Foreground,
    /// Nobody's: its answer is wanted all the same.
    Background,
}

/// Why the budget turns a poll away: answered 429.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Shed {
    /// `budget.max_queue` flights wait already.
    #[error("too many tasks wait for this account's budget (budget.max_queue)")]
    QueueFull,
    /// It was known that its turn would not come in time, so nobody waited for it in vain.
    #[error("this account's budget is spent: no turn within budget.max_wait")]
    Admission,
    /// `budget.max_wait` passed first.
    #[error("this account's budget is spent: no turn within budget.max_wait")]
    Deadline,
}

impl Shed {
    /// What Cache-Status and the log say: to a client it is one whether its turn was known to come too late, or did.
    pub fn detail(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::Admission | Self::Deadline => "budget",
        }
    }
}

/// Why the edge goes no further with a request or a connection: what is said of it, and the `reason` of the metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum EdgeRefusal {
    /// No request of HTTP/1.1 or 1.0, or one that two servers could read differently.
    Malformed,
    /// More than `limits.header_bytes` or `limits.headers`.
    HeadTooLarge,
    /// More than `limits.request_body`.
    BodyTooLarge,
    /// As many requests are being answered as `limits.requests` allows.
    Overloaded,
    /// `limits.header_timeout` passed first.
    HeaderTimeout,
    /// `limits.request_timeout` passed before the answer.
    RequestTimeout,
    /// `limits.request_timeout` passed before the answer's end.
    AnswerCut,
    /// As many connections are open as may be, in all or of this address.
    Connections,
    /// There was no file descriptor to accept a connection with.
    Accept,
    /// More unlisted keys at once than `max_accounts`.
    TooManyAccounts,
    /// A bug of the gateway's.
    Internal,
}
