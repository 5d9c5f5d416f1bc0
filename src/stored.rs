//! What is kept of an answer, and for how long it is fresh: data and arithmetic, no map and no clock.
//!
//! Terms as in RFC 9111 §4.2: an answer is fresh while its age is below its freshness lifetime, and stale after that.
//! A live answer's lifetime is its account's at the moment, since it depends on how many tasks are live: whoever asks
//! brings it along. Ages are taken from the monotonic clock; `complete_at` and the like are compared with the wall clock.
//! How an answer looks outside this process is `stored/encoding.rs`'s business.

mod encoding;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::config;
use crate::task::{Class, Reading, Stage, media_lifetime};
pub use encoding::{Moment, Owner, Seal};

/// How long a success without media is kept like a live answer, from first sight: the media may land after the flip.
const SETTLING: Duration = Duration::from_mins(10);

/// An answer of upstream's: its bytes as they came, and what they mean.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: StatusCode,
    /// The Content-Type, if there was one.
    pub content_type: Option<Arc<HeaderValue>>,
    /// The Retry-After, if there was one; of errors only, which are never kept.
    pub retry_after: Option<Box<HeaderValue>>,
    /// The body, byte for byte.
    pub body: Bytes,
    /// What they mean.
    pub reading: Meaning,
    /// When the attempt began.
    pub asked: Instant,
    /// When the last byte was there: ages count from here.
    pub received: Instant,
    /// For how long it is kept; `None` is not at all.
    pub keeping: Option<Keeping>,
    /// The share of `limits.body_bytes` of an answer that is not kept, until the last client has it.
    pub room: Option<Box<OwnedSemaphorePermit>>,
    /// Whether it was read since the cache last looked for what nobody reads.
    read: AtomicBool,
    /// Where it stands among its account's answers, once the cache has it.
    place: AtomicU64,
}

/// A Content-Type as it is kept with an answer: the usual one is there once, for all of them.
pub fn content_type(value: &[u8]) -> Option<Arc<HeaderValue>> {
    static JSON: LazyLock<Arc<HeaderValue>> = LazyLock::new(|| Arc::new(HeaderValue::from_static("application/json")));
    if **JSON == *value {
        return Some(Arc::clone(&JSON));
    }
    HeaderValue::from_bytes(value).ok().map(Arc::new)
}

/// Of a [`Reading`], what still matters once it is known for how long the answer is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meaning {
    /// What it means.
    pub class: Class,
    /// How far the task has come.
    pub stage: Option<Stage>,
    /// The code that decides.
    pub effective_code: Option<i64>,
}

impl From<Reading> for Meaning {
    fn from(reading: Reading) -> Self {
        Self {
            class: reading.class,
            stage: reading.stage,
            effective_code: reading.effective_code,
        }
    }
}

/// For how long an answer is kept and fresh, counted from when it was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keeping {
    /// When it is forgotten: the same for ended tasks, later for live ones, whose snapshot may still stand in.
    pub keep: Duration,
    /// Whether the task goes on: then it is fresh for as long as the account's live answers are, else for all that time.
    pub live: bool,
    /// Whether the task has ended, so that nothing is to be asked any more.
    pub ended: bool,
    /// When a success without media was first seen.
    settling_since: Option<Instant>,
}

impl Keeping {
    /// The freshness lifetime, where that of live answers is `live`.
    pub fn lifetime(&self, live: Duration) -> Duration {
        if self.live { live } else { self.keep }
    }

    /// For `lifetime` and no longer: what is remembered beside the cache.
    pub fn briefly(lifetime: Duration) -> Self {
        Self {
            keep: lifetime,
            live: false,
            ended: false,
            settling_since: None,
        }
    }

    /// For how long an answer received at `now` (`unix_now` on the wall clock, in seconds) is kept; `before` is what was
    /// kept for the task so far.
    pub fn of(
        reading: &Reading,
        before: Option<&Answer>,
        now: Instant,
        unix_now: u64,
        cache: &config::Cache,
    ) -> Option<Self> {
        let settling_since = before.and_then(|before| before.keeping?.settling_since);
        Self::since(reading, settling_since, now, unix_now, cache)
    }

    /// The same, where a success without media was first seen at `settling_since`.
    fn since(
        reading: &Reading,
        settling_since: Option<Instant>,
        now: Instant,
        unix_now: u64,
        cache: &config::Cache,
    ) -> Option<Self> {
        let live = |settling_since| Self {
            live: true,
            keep: cache.max_stale.max(cache.fresh.ceiling),
            ended: false,
            settling_since,
        };
        let ended = || {
            let dead = cache.fresh.ceiling;
            let keep = media_lifetime(reading.complete_at, reading.create_at, unix_now, cache.terminal, dead);
            Self {
                keep,
                live: false,
                ended: true,
                settling_since: None,
            }
        };
        match reading.class {
            Class::Live => Some(live(None)),
            Class::Settling => {
                let since = settling_since.unwrap_or(now);
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
            Class::NotFound => Some(Self::briefly(cache.not_found)),
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
    pub fn new(
        status: StatusCode,
        body: Bytes,
        reading: impl Into<Meaning>,
        asked: Instant,
        received: Instant,
    ) -> Self {
        Self {
            status,
            content_type: None,
            retry_after: None,
            body,
            reading: reading.into(),
            asked,
            received,
            keeping: None,
            room: None,
            read: AtomicBool::new(false),
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
            .is_some_and(|keeping| self.age(now) < keeping.lifetime(live))
    }

    /// Whether it tells that the task goes on.
    pub fn is_live(&self) -> bool {
        self.keeping.is_some_and(|keeping| keeping.live)
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

    /// What is left of the freshness lifetime at `now`, in whole seconds; 0 or less once stale (RFC 9211 `ttl`). `live` is
    /// the lifetime of live answers.
    pub fn ttl(&self, now: Instant, live: Duration) -> i64 {
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        self.keeping
            .map_or(0, |keeping| seconds(keeping.lifetime(live)) - seconds(self.age(now)))
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::task::Timestamp;

    const UNIX_NOW: u64 = 1_800_000_000;
    /// The freshness lifetime of live answers.
    const LIVE: Duration = Duration::from_secs(2);
    const DAY: Duration = Duration::from_hours(24);

    static SETTINGS: LazyLock<config::Cache> = LazyLock::new(|| config::Config::default().cache);

    fn reading(stage: Stage) -> Reading {
        Reading {
            class: stage.class(),
            stage: Some(stage),
            effective_code: Some(200),
            complete_at: Timestamp::Absent,
            create_at: Timestamp::Absent,
        }
    }

    fn answer(stage: Stage, before: Option<&Answer>, now: Instant) -> Answer {
        let reading = reading(stage);
        let mut answer = Answer::new(StatusCode::OK, Bytes::new(), reading, now, now);
        answer.keeping = Keeping::of(&reading, before, now, UNIX_NOW, &SETTINGS);
        answer
    }

    fn of(reading: &Reading, cache: &config::Cache) -> Option<Keeping> {
        Keeping::of(reading, None, Instant::now(), UNIX_NOW, cache)
    }

    fn minutes(minutes: u64) -> Duration {
        Duration::from_mins(minutes)
    }

    #[test]
    fn a_live_answer_is_kept_for_max_stale_and_brings_no_lifetime() {
        for stage in [Stage::Pending, Stage::Running] {
            let kept = of(&reading(stage), &SETTINGS).unwrap();
            assert_eq!((kept.live, kept.keep), (true, SETTINGS.max_stale));
            assert!(!kept.ended);
        }
    }

    #[test]
    fn what_is_fresh_is_kept_whatever_max_stale_says() {
        let mut cache = SETTINGS.clone();
        cache.max_stale = Duration::ZERO;
        let kept = of(&reading(Stage::Running), &cache).unwrap();
        assert_eq!((kept.live, kept.keep), (true, cache.fresh.ceiling));
    }

    #[test]
    fn an_ended_answer_is_fresh_as_long_as_it_is_kept() {
        let kept = of(&reading(Stage::Ended), &SETTINGS).unwrap();
        assert_eq!((kept.live, kept.keep), (false, SETTINGS.terminal));
        assert!(kept.ended);
    }

    #[test]
    fn an_ended_answer_is_forgotten_a_day_before_its_media_die() {
        let ended_ago = |ago: Duration| {
            let mut reading = reading(Stage::Ended);
            reading.complete_at = Timestamp::At(UNIX_NOW - ago.as_secs());
            of(&reading, &SETTINGS).unwrap().keep
        };
        assert_eq!(ended_ago(DAY * 3), SETTINGS.terminal);
        assert_eq!(ended_ago(DAY * 10), DAY * 3);
        assert_eq!(ended_ago(DAY * 20), SETTINGS.fresh.ceiling, "dead already");
    }

    #[test]
    fn a_not_found_is_kept_briefly() {
        let kept = of(&reading(Stage::NotFound), &SETTINGS).unwrap();
        assert_eq!((kept.live, kept.keep), (false, SETTINGS.not_found));
        assert!(!kept.ended);
    }

    #[test]
    fn nothing_else_is_kept() {
        for class in [
            Class::RateLimited,
            Class::Refused,
            Class::Unavailable,
            Class::Failed,
            Class::Unrecognised,
            Class::Unreadable,
        ] {
            let mut reading = reading(Stage::Ended);
            (reading.class, reading.stage) = (class, None);
            assert_eq!(of(&reading, &SETTINGS), None, "{class:?}");
            assert!(!class.is_stored());
        }
    }

    #[test]
    fn a_success_without_media_settles_for_ten_minutes_from_first_sight() {
        let first_seen = Instant::now();
        let mut kept = answer(Stage::Settling, None, first_seen);
        for minute in 1..10 {
            assert!(!kept.has_ended(), "minute {minute}");
            assert!(kept.is_live());
            kept = answer(Stage::Settling, Some(&kept), first_seen + minutes(minute));
        }
        let just_before = first_seen + minutes(10) - Duration::from_nanos(1);
        assert!(!answer(Stage::Settling, Some(&kept), just_before).has_ended());
        kept = answer(Stage::Settling, Some(&kept), first_seen + minutes(10));
        assert!(kept.has_ended());
        assert_eq!(kept.keeping.unwrap().keep, SETTINGS.terminal);
        kept = answer(Stage::Settling, Some(&kept), first_seen + minutes(11));
        assert!(kept.has_ended(), "it does not settle twice");
    }

    #[test]
    fn the_time_before_success_is_no_time_of_settling() {
        let start = Instant::now();
        let running = answer(Stage::Running, None, start);
        let settling = answer(Stage::Settling, Some(&running), start + minutes(60));
        assert!(!settling.has_ended());
        assert!(!answer(Stage::Settling, Some(&settling), start + minutes(69)).has_ended());
    }

    #[test]
    fn media_that_land_end_the_settling() {
        let start = Instant::now();
        let settling = answer(Stage::Settling, None, start);
        let ended = answer(Stage::Ended, Some(&settling), start + minutes(1));
        assert!(ended.has_ended() && ended.replaces(&settling));
    }

    #[test]
    fn an_answer_is_fresh_below_its_lifetime_and_kept_below_its_keep() {
        let received = Instant::now();
        let live = answer(Stage::Running, None, received);
        let tick = Duration::from_nanos(1);
        let (stale, gone) = (received + LIVE, received + SETTINGS.max_stale);
        assert!(live.is_fresh(stale - tick, LIVE) && !live.is_fresh(stale, LIVE));
        assert!(live.is_kept(gone - tick) && !live.is_kept(gone));
        assert_eq!(live.age(received - tick), Duration::ZERO, "never younger than new");
    }

    #[test]
    fn only_a_state_that_is_young_enough_or_ended_stands_in() {
        let received = Instant::now();
        let later = received + minutes(2);
        let live = answer(Stage::Running, None, received);
        assert!(live.may_stand_in(later, minutes(2)));
        assert!(!live.may_stand_in(later, minutes(1)));
        assert!(answer(Stage::Ended, None, received).may_stand_in(later, minutes(1)));
        assert!(!answer(Stage::NotFound, None, received).may_stand_in(received, minutes(2)));
        assert!(!answer(Stage::Ended, None, received).may_stand_in(received + DAY * 30, minutes(1)));
    }

    #[test]
    fn what_is_not_kept_is_neither_fresh_nor_a_stand_in() {
        let now = Instant::now();
        let mut answer = answer(Stage::Running, None, now);
        answer.keeping = None;
        assert!(!answer.is_fresh(now, LIVE) && !answer.is_kept(now) && !answer.may_stand_in(now, DAY));
        assert_eq!(answer.ttl(now, LIVE), 0);
    }

    #[test]
    fn the_code_that_decides_is_the_effective_one() {
        let mut answer = answer(Stage::Running, None, Instant::now());
        answer.reading.effective_code = Some(429);
        assert_eq!(answer.code(), 429);
        for out_of_range in [None, Some(-1), Some(70_000)] {
            answer.reading.effective_code = out_of_range;
            assert_eq!(answer.code(), 200);
        }
    }

    #[test]
    fn a_read_is_noted_once() {
        let answer = answer(Stage::Running, None, Instant::now());
        assert!(!answer.take_read(), "nobody has read it yet");
        answer.note_read();
        assert!(answer.take_read());
        assert!(!answer.take_read());
    }

    proptest! {
        #[test]
        fn the_time_to_live_is_what_is_left(lifetime in 0..100_000_u64, age in 0..200_000_u64) {
            let received = Instant::now();
            let mut answer = answer(Stage::Running, None, received);
            answer.keeping = answer.keeping.map(|keeping| Keeping {
                keep: Duration::from_millis(lifetime),
                live: false,
                ..keeping
            });
            let now = received + Duration::from_millis(age);
            let seconds = |ms: u64| i64::try_from(ms / 1000).unwrap();
            let ttl = answer.ttl(now, LIVE);
            prop_assert_eq!(ttl, seconds(lifetime) - seconds(age));
            let tells_freshness = if answer.is_fresh(now, LIVE) { ttl >= 0 } else { ttl <= 0 };
            prop_assert!(tells_freshness);
        }
    }
}
