//! What is kept of an answer, and for how long it is fresh: data and arithmetic, no map and no clock.
//!
//! Terms as in RFC 9111 §4.2: an answer is fresh while its age is below its freshness lifetime, and stale after that.
//! A live answer's lifetime is its account's at the moment, since it depends on how many tasks are live: whoever asks
//! brings it along. Ages are taken from the monotonic clock; `complete_at` and the like are compared with the wall clock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::config;
use crate::task::{Class, Reading, Stage, media_lifetime};

/// How long a success without media is kept like a live answer, from first sight: the media may land after the flip.
const SETTLING: Duration = Duration::from_mins(10);

/// An answer of upstream's: its bytes as they came, and what they mean.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: StatusCode,
    /// The Content-Type, if there was one.
    pub content_type: Option<HeaderValue>,
    /// The Retry-After, if there was one; of errors only, which are never kept.
    pub retry_after: Option<HeaderValue>,
    /// The body, byte for byte.
    pub body: Bytes,
    /// What they mean.
    pub reading: Reading,
    /// When the attempt began.
    pub asked: Instant,
    /// When the last byte was there: ages count from here.
    pub received: Instant,
    /// For how long it is kept; `None` is not at all.
    pub keeping: Option<Keeping>,
    /// The share of `limits.body_bytes` of an answer that is not kept, until the last client has it.
    pub room: Option<OwnedSemaphorePermit>,
    /// Whether it was read since the cache last looked for what nobody reads.
    read: AtomicBool,
    /// Where it stands among its account's answers, once the cache has it.
    place: AtomicU64,
}

/// For how long an answer is kept and fresh, counted from when it was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keeping {
    /// The freshness lifetime; `None` while the task goes on: then it is what the account's live answers have.
    pub lifetime: Option<Duration>,
    /// When it is forgotten: the same for ended tasks, later for live ones, whose snapshot may still stand in.
    pub keep: Duration,
    /// Whether the task has ended, so that nothing is to be asked any more.
    pub ended: bool,
    /// When a success without media was first seen.
    settling_since: Option<Instant>,
}

impl Keeping {
    /// For how long an answer received at `now` (`unix_now` on the wall clock, in seconds) is kept; `before` is what was
    /// kept for the task so far.
    pub fn of(
        reading: &Reading,
        before: Option<&Answer>,
        now: Instant,
        unix_now: u64,
        cache: &config::Cache,
    ) -> Option<Self> {
        let live = |settling_since| Self {
            lifetime: None,
            keep: cache.max_stale.max(cache.fresh.ceiling),
            ended: false,
            settling_since,
        };
        let ended = || {
            let dead = cache.fresh.ceiling;
            let keep = media_lifetime(reading.complete_at, reading.create_at, unix_now, cache.terminal, dead);
            Self {
                lifetime: Some(keep),
                keep,
                ended: true,
                settling_since: None,
            }
        };
        match reading.class {
            Class::Live => Some(live(None)),
            Class::Settling => {
                let since = before.and_then(|before| before.keeping?.settling_since).unwrap_or(now);
                let settles = now.saturating_duration_since(since) < SETTLING;
                Some(if settles {
                    live(Some(since))
                } else {
                    Self {
                        settling_since: Some(since),
                        ..ended()
                    }
                })
            }
            Class::Terminal => Some(ended()),
            Class::NotFound => {
                let keep = cache.not_found;
                Some(Self {
                    lifetime: Some(keep),
                    keep,
                    ended: false,
                    settling_since: None,
                })
            }
            Class::RateLimited
            | Class::Refused
            | Class::Unavailable
            | Class::Failed
            | Class::Unrecognised
            | Class::Unreadable => None,
        }
    }
}

impl Answer {
    /// An answer that nobody has read yet.
    pub fn new(status: StatusCode, body: Bytes, reading: Reading, asked: Instant, received: Instant) -> Self {
        Self {
            status,
            content_type: None,
            retry_after: None,
            body,
            reading,
            asked,
            received,
            keeping: None,
            room: None,
            read: AtomicBool::new(true),
            place: AtomicU64::new(0),
        }
    }

    /// How old it is at `now`.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.received)
    }

    /// Whether it is within its freshness lifetime at `now`; `live` is that of live answers.
    pub fn is_fresh(&self, now: Instant, live: Duration) -> bool {
        self.keeping
            .is_some_and(|keeping| self.age(now) < keeping.lifetime.unwrap_or(live))
    }

    /// Whether it tells that the task goes on.
    pub fn is_live(&self) -> bool {
        self.keeping.is_some_and(|keeping| keeping.lifetime.is_none())
    }

    /// Whether it is still kept at `now`.
    pub fn is_kept(&self, now: Instant) -> bool {
        self.keeping.is_some_and(|keeping| self.age(now) < keeping.keep)
    }

    /// Whether it tells that the task has ended.
    pub fn has_ended(&self) -> bool {
        self.keeping.is_some_and(|keeping| keeping.ended)
    }

    /// Whether it may stand in for an error: a task's state, however stale, that is no older than `max_stale`. An ended
    /// task's, while kept, always may.
    pub fn may_stand_in(&self, now: Instant, max_stale: Duration) -> bool {
        self.reading.class != Class::NotFound && self.is_kept(now) && (self.has_ended() || self.age(now) <= max_stale)
    }

    /// What is left of the freshness lifetime at `now`, in whole seconds; negative once stale (RFC 9211 `ttl`). `live` is
    /// the lifetime of live answers.
    pub fn ttl(&self, now: Instant, live: Duration) -> i64 {
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        self.keeping.map_or(0, |keeping| {
            seconds(keeping.lifetime.unwrap_or(live)) - seconds(self.age(now))
        })
    }

    /// Whether it should take the place of `kept`: a state only moves forward, and of two answers that tell of the same
    /// stage the one that was asked for later is newer.
    pub fn replaces(&self, kept: &Self) -> bool {
        let order = |answer: &Self| (answer.reading.stage.unwrap_or(Stage::NotFound), answer.asked);
        order(self) >= order(kept)
    }

    /// The code that decides, as an HTTP-like number: the HTTP status when there is none in range.
    pub fn code(&self) -> u16 {
        let code = self.reading.effective_code.and_then(|code| u16::try_from(code).ok());
        code.unwrap_or(self.status.as_u16())
    }

    /// Notes that it was read.
    pub fn note_read(&self) {
        // Most reads find it set: a load that all cores share costs nothing, a store would.
        if !self.read.load(Ordering::Relaxed) {
            self.read.store(true, Ordering::Relaxed);
        }
    }

    /// Where it stands among its account's answers: the cache's own note.
    pub fn place(&self) -> u64 {
        self.place.load(Ordering::Relaxed)
    }

    /// Notes where it stands.
    pub fn set_place(&self, place: u64) {
        self.place.store(place, Ordering::Relaxed);
    }

    /// Whether it was read since this was last asked.
    pub fn take_read(&self) -> bool {
        self.read.swap(false, Ordering::Relaxed)
    }
}
