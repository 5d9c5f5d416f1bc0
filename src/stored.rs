//! What is kept of an answer, and for how long it is fresh: data and arithmetic, no map, and no clock but
//! the instant from which `stored/block.rs` counts all others.
//!
//! Terms as in RFC 9111 §4.2: an answer is fresh while its age is below its freshness lifetime, and stale after that.
//! A live answer's lifetime is its account's at the moment, since it depends on how many tasks are live: whoever asks
//! brings it along. Ages are taken from the monotonic clock; `complete_at` and the like are compared with the wall clock.
//! How an answer looks outside this process is `stored/encoding.rs`'s business.

mod block;
mod encoding;
mod packed;

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::account::AccountId;
use crate::config;
use crate::task::{Class, Reading, Stage, TaskId, Timestamp, media_lifetime};
pub use block::Block;
pub use encoding::{MOST_AHEAD, Owner, Seal};

/// How long a success without media is kept like a live answer, from first sight: the media may land after the flip.
const SETTLING: Duration = Duration::from_mins(10);

/// An answer of upstream's as it came: its bytes, and what they mean.
#[derive(Debug)]
pub struct Draft {
    /// The HTTP status.
    pub status: StatusCode,
    /// The Content-Type, if there was one.
    pub content_type: Option<HeaderValue>,
    /// The Retry-After, if there was one; it goes out with what the cache does not keep.
    pub retry_after: Option<HeaderValue>,
    /// The Location, if there was one; likewise.
    pub location: Option<HeaderValue>,
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
}

impl Draft {
    /// An answer that is not kept.
    pub fn new(status: StatusCode, body: Bytes, reading: Reading, asked: Instant, received: Instant) -> Self {
        Self {
            status,
            content_type: None,
            retry_after: None,
            location: None,
            body,
            reading,
            asked,
            received,
            keeping: None,
        }
    }

    /// The answer to `account`'s question about `task`. One that is kept goes out without what the cache has no room for: whoever
    /// fetched it gets what all others will.
    pub fn of(mut self, account: AccountId, task: &TaskId) -> Answer {
        if self.keeping.is_some() {
            (self.retry_after, self.location) = (None, None);
        }
        self.answer(account, task.as_str())
    }

    /// An answer that is remembered beside the cache, whoever asks for what.
    pub fn of_nobody(self) -> Answer {
        self.answer(AccountId::default(), "")
    }

    fn answer(self, account: AccountId, task: &str) -> Answer {
        let is_kept = self.keeping.is_some();
        let block = Block::new(&self, if is_kept { &self.body } else { &[] }, account, task);
        let beside = (!is_kept || self.retry_after.is_some()).then(|| {
            Arc::new(Beside {
                body: (!is_kept).then_some(self.body),
                retry_after: self.retry_after,
                location: self.location,
                ..Beside::default()
            })
        });
        Answer { block, beside }
    }

    /// The code that decides, as an HTTP-like number: the HTTP status when there is none in range.
    fn code(&self) -> u16 {
        let code = self.reading.effective_code.and_then(|code| u16::try_from(code).ok());
        code.unwrap_or(self.status.as_u16())
    }
}

/// An answer of upstream's. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Answer {
    block: Block,
    /// What the cache does not keep.
    beside: Option<Arc<Beside>>,
}

#[derive(Debug, Default)]
struct Beside {
    /// The body of an answer that is not kept: as it came, without a copy.
    body: Option<Bytes>,
    retry_after: Option<HeaderValue>,
    location: Option<HeaderValue>,
    room: OnceLock<OwnedSemaphorePermit>,
    /// The cache has not kept it, though it says for how long it might.
    is_left_out: bool,
}

impl From<Block> for Answer {
    fn from(block: Block) -> Self {
        Self { block, beside: None }
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
        let settling_since = before.and_then(|before| before.keeping()?.settling_since);
        Self::since(reading, settling_since, now, unix_now, cache)
    }

    /// How long an answer may be kept, where a success without media was first seen at `settling_since`.
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

/// How fresh an answer is at some instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freshness {
    /// How old it is then.
    pub age: Duration,
    /// Its freshness lifetime; `None` for what is not kept.
    lifetime: Option<Duration>,
}

impl Freshness {
    /// Whether the answer is within its freshness lifetime.
    pub fn is_fresh(self) -> bool {
        self.lifetime.is_some_and(|lifetime| self.age < lifetime)
    }

    /// What is left of the freshness lifetime, in whole seconds; 0 or less once stale (RFC 9211 `ttl`), and 0 of what is
    /// not kept.
    pub fn ttl(self) -> i64 {
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        self.lifetime
            .map_or(0, |lifetime| seconds(lifetime) - seconds(self.age))
    }
}

impl Answer {
    /// What the cache keeps of it.
    pub fn block(&self) -> &Block {
        &self.block
    }

    /// Holds `room`, its share of `limits.body_bytes`, until the last client has it; what is kept needs none.
    pub fn hold(&self, room: OwnedSemaphorePermit) {
        if let Some(beside) = &self.beside {
            // Once: whoever fetched it does.
            let _ = beside.room.set(room);
        }
    }

    /// The answer where the cache has not kept it. Elsewhere it still may be: on disk, by other replicas.
    #[must_use]
    pub fn left_out(self) -> Self {
        let beside = Beside {
            is_left_out: true,
            ..Beside::default()
        };
        let beside = Some(Arc::new(beside));
        Self { beside, ..self }
    }

    /// A copy to be kept otherwise; without the room that it holds.
    pub fn draft(&self) -> Draft {
        let reading = Reading {
            class: self.class(),
            stage: self.block.stage(),
            effective_code: Some(self.code().into()),
            complete_at: Timestamp::Absent,
            create_at: Timestamp::Absent,
        };
        let body = Bytes::from(self.body().into_owned());
        Draft {
            content_type: self.content_type().map(Cow::into_owned),
            retry_after: self.retry_after().cloned(),
            keeping: self.keeping(),
            ..Draft::new(self.status(), body, reading, self.asked(), self.received())
        }
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.block.status()
    }

    /// The Content-Type, if there was one.
    pub fn content_type(&self) -> Option<Cow<'static, HeaderValue>> {
        self.block.content_type()
    }

    /// The answer as it is given again at `now`: of a Retry-After in seconds what is left, at least 1.
    #[must_use]
    pub fn repeated(self, now: Instant) -> Self {
        let wait = self.retry_after().and_then(seconds);
        let Some(left) = wait.map(|wait| wait.saturating_sub(self.age(now).as_secs()).max(1)) else {
            return self;
        };
        let beside = Beside {
            body: self.beside.as_ref().and_then(|beside| beside.body.clone()),
            retry_after: Some(HeaderValue::from(left)),
            location: self.location().cloned(),
            ..Beside::default()
        };
        let beside = Some(Arc::new(beside));
        Self { beside, ..self }
    }

    /// The Retry-After, if there was one; the cache keeps none.
    pub fn retry_after(&self) -> Option<&HeaderValue> {
        self.beside.as_ref()?.retry_after.as_ref()
    }

    /// The Location, if there was one and it is not kept.
    pub fn location(&self) -> Option<&HeaderValue> {
        self.beside.as_ref()?.location.as_ref()
    }

    /// The body, byte for byte; a copy of one that is kept packed.
    pub fn body(&self) -> Cow<'_, [u8]> {
        match self.beside_body() {
            Some(body) => Cow::Borrowed(body),
            None => self.block.body(),
        }
    }

    /// The body's length, in bytes.
    pub fn body_len(&self) -> usize {
        self.beside_body().map_or_else(|| self.block.body_len(), <[u8]>::len)
    }

    /// Adds a body that is kept packed to `out`; gives whether this is one.
    pub fn unpack(&self, out: &mut Vec<u8>) -> bool {
        self.block.unpack(out)
    }

    fn beside_body(&self) -> Option<&[u8]> {
        self.beside.as_ref()?.body.as_deref()
    }

    /// How far the task has come, if it says.
    pub fn stage(&self) -> Option<Stage> {
        self.block.stage()
    }

    /// What it means.
    pub fn class(&self) -> Class {
        self.block.class()
    }

    /// When the attempt began.
    pub fn asked(&self) -> Instant {
        self.block.asked()
    }

    /// When the last byte was there, to the microsecond: ages count from here.
    pub fn received(&self) -> Instant {
        self.block.received()
    }

    /// For how long it is kept; `None` is not at all.
    pub fn keeping(&self) -> Option<Keeping> {
        self.block.keeping()
    }

    /// Whether the cache keeps it, or will where it has not been put yet.
    pub fn is_stored(&self) -> bool {
        let is_left_out = self.beside.as_ref().is_some_and(|beside| beside.is_left_out);
        !is_left_out && !self.block.keep().is_zero()
    }

    /// How old it is at `now`.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.received())
    }

    /// How fresh it is at `now`; `live` is the freshness lifetime of live answers.
    pub fn freshness(&self, now: Instant, live: Duration) -> Freshness {
        Freshness {
            age: self.age(now),
            lifetime: self.lifetime(live),
        }
    }

    /// Whether it is within its freshness lifetime at `now`; `live` is that of live answers.
    pub fn is_fresh(&self, now: Instant, live: Duration) -> bool {
        self.freshness(now, live).is_fresh()
    }

    /// Whether it tells that the task goes on.
    pub fn is_live(&self) -> bool {
        self.block.is_live()
    }

    /// Whether it is still kept at `now`.
    pub fn is_kept(&self, now: Instant) -> bool {
        self.block.is_kept(now)
    }

    /// Whether it tells that the task has ended.
    pub fn has_ended(&self) -> bool {
        self.block.has_ended()
    }

    /// Whether it may stand in for an error: a task's state, however stale, that is no older than `max_stale`. An ended
    /// task's, while kept, always may.
    pub fn may_stand_in(&self, now: Instant, max_stale: Duration) -> bool {
        self.class() != Class::NotFound && self.is_kept(now) && (self.has_ended() || self.age(now) <= max_stale)
    }

    /// Whether it should take the place of `kept`. Late answers take nothing back: a state moves forward, and of two answers
    /// that tell of the same stage the one that was asked for later is newer. What upstream was asked for only once `kept` was
    /// there is not late: of a task that has not ended its last word counts, or a task that steps back would be asked for with
    /// every poll.
    pub fn replaces(&self, kept: &Self) -> bool {
        let order = |answer: &Self| (answer.block.stage().unwrap_or(Stage::NotFound), answer.asked());
        let is_last_word = !kept.has_ended() && self.asked() >= kept.received();
        is_last_word || order(self) >= order(kept)
    }

    /// The code that decides, as an HTTP-like number: the HTTP status when there is none in range.
    pub fn code(&self) -> u16 {
        self.block.code()
    }

    /// Notes that it was read.
    pub fn note_read(&self) {
        self.block.note_read();
    }

    /// Notes that upstream has said since that it knows the task no longer: a live answer is fresh no longer, then.
    pub fn outdate(&self) {
        self.block.outdate();
    }

    /// The freshness lifetime, where that of live answers is `live`; `None` for what is not kept.
    fn lifetime(&self, live: Duration) -> Option<Duration> {
        let keep = || Some(self.block.keep()).filter(|keep| !keep.is_zero());
        match (self.is_live(), self.block.is_outdated()) {
            (true, true) => Some(Duration::ZERO),
            (true, false) => Some(live),
            (false, _) => keep(),
        }
    }
}

/// What a header says that is nothing but digits.
fn seconds(value: &HeaderValue) -> Option<u64> {
    let digits = value.to_str().ok()?;
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

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

    fn draft(stage: Stage, before: Option<&Answer>, now: Instant) -> Draft {
        let reading = reading(stage);
        Draft {
            keeping: Keeping::of(&reading, before, now, UNIX_NOW, &SETTINGS),
            ..Draft::new(StatusCode::OK, Bytes::new(), reading, now, now)
        }
    }

    fn answer(stage: Stage, before: Option<&Answer>, now: Instant) -> Answer {
        draft(stage, before, now).of_nobody()
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
        assert_eq!(kept.keeping().unwrap().keep, SETTINGS.terminal);
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
        let draft = Draft {
            keeping: None,
            ..draft(Stage::Running, None, now)
        };
        let answer = draft.of_nobody();
        assert!(!answer.is_fresh(now, LIVE) && !answer.is_kept(now) && !answer.may_stand_in(now, DAY));
        assert_eq!(answer.freshness(now, LIVE).ttl(), 0);
    }

    #[test]
    fn the_code_that_decides_is_the_effective_one() {
        let code = |effective_code| {
            let mut draft = draft(Stage::Running, None, Instant::now());
            draft.reading.effective_code = effective_code;
            draft.of_nobody().code()
        };
        assert_eq!(code(Some(429)), 429);
        for out_of_range in [None, Some(-1), Some(70_000)] {
            assert_eq!(code(out_of_range), 200);
        }
    }

    #[test]
    fn of_a_retry_after_in_seconds_what_is_left_is_repeated() {
        const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
        let received = Instant::now();
        for (said, after_ms, left) in [
            ("20", 0, "20"),
            ("20", 11_999, "9"),
            ("20", 12_000, "8"),
            ("20", 19_000, "1"),
            ("20", 60_000, "1"),
            ("0", 0, "1"),
            ("+5", 2_000, "+5"),
            ("", 2_000, ""),
            (DATE, 2_000, DATE),
        ] {
            for keeping in [None, Some(Keeping::briefly(minutes(1)))] {
                let draft = Draft {
                    retry_after: Some(HeaderValue::from_static(said)),
                    keeping,
                    ..draft(Stage::Running, None, received)
                };
                let draft = Draft {
                    body: Bytes::from_static(b"body"),
                    ..draft
                };
                let repeated = draft.of_nobody().repeated(received + Duration::from_millis(after_ms));
                assert_eq!(repeated.retry_after().unwrap(), left, "{said} after {after_ms} ms");
                assert_eq!((&*repeated.body(), repeated.keeping()), (&b"body"[..], keeping));
            }
        }
        let none = answer(Stage::Running, None, received).repeated(received);
        assert_eq!(none.retry_after(), None);
    }

    #[test]
    fn a_read_is_noted_once() {
        let answer = answer(Stage::Running, None, Instant::now());
        assert!(!answer.block().take_read(), "nobody has read it yet");
        answer.note_read();
        assert!(answer.block().take_read());
        assert!(!answer.block().take_read());
    }

    proptest! {
        #[test]
        fn the_time_to_live_is_what_is_left(lifetime in 0..100_000_u64, age in 0..200_000_u64) {
            let received = Instant::now();
            let draft = Draft {
                keeping: Some(Keeping::briefly(Duration::from_millis(lifetime))),
                ..draft(Stage::Ended, None, received)
            };
            let answer = draft.of_nobody();
            let now = received + Duration::from_millis(age);
            let seconds = |ms: u64| i64::try_from(ms / 1000).unwrap();
            let ttl = answer.freshness(now, LIVE).ttl();
            let left = if lifetime == 0 { 0 } else { seconds(lifetime) - seconds(age) };
            prop_assert_eq!(ttl, left);
            let tells_freshness = if answer.is_fresh(now, LIVE) { ttl >= 0 } else { ttl <= 0 };
            prop_assert!(tells_freshness);
        }
    }
}
