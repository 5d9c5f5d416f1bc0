//! An answer in one piece of memory: a head of 40 bytes, the body, and behind it the few things that most answers lack.
//!
//! A million of them lie in the cache, so each byte of a head is a megabyte there, and each piece of memory of its own costs
//! a counter, a pointer and the allocator's rounding. Instants are kept as what they are from the first one on that this
//! process asked for; a task's id is where the body repeats it, as upstream's answers do and what is packed of them mostly
//! still does.

use std::borrow::Cow;
use std::fmt;
use std::mem::size_of;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::time::Duration;

use http::{HeaderValue, StatusCode};
use memchr::memmem::{self, Finder};
use tokio::time::Instant;
use triomphe::{Arc, HeaderSlice};

use super::packed::{unpack, with_packed};
use super::{Draft, Keeping};
use crate::account::AccountId;
use crate::task::{Class, Stage};

/// Content-Types that take no room: what upstream sends, and how it might spell it tomorrow.
static USUAL: [HeaderValue; 3] = [
    HeaderValue::from_static("application/json"),
    HeaderValue::from_static("application/json; charset=utf-8"),
    HeaderValue::from_static("application/json;charset=UTF-8"),
];

/// Any other Content-Type: it stands behind the body.
const UNUSUAL: u8 = u8::MAX;

/// The task's id stands behind the body.
const BEHIND: u16 = u16::MAX;

/// What [`Head::keep`] of this and more counts in seconds: up to 24 days are exact to the millisecond.
const IN_SECONDS: u32 = 1 << 31;

/// Bits of [`Head::marks`]: read since the cache last looked for what nobody reads.
const READ: u8 = 1;
/// What [`Keeping`] says.
const LIVE: u8 = 2;
const ENDED: u8 = 4;
const SETTLING: u8 = 8;
/// The body is packed.
const PACKED: u8 = 16;
/// Upstream has said since that it knows the task no longer.
const OUTDATED: u8 = 32;

/// In no place.
const NOWHERE: u32 = u32::MAX;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Widest fields first, so that none leaves a gap.
struct Head {
    /// In nanoseconds from `START` on; before it, below 0.
    asked: i64,
    /// Of the account's id as much as tells whether the key under which this is kept was another's by chance.
    account: u64,
    /// From `asked` to the last byte, in microseconds.
    took: u32,
    /// How long it is kept, in milliseconds or seconds; 0 for what is not.
    keep: u32,
    /// Where it stands among its account's answers: the cache's own note.
    place: AtomicU32,
    status: StatusCode,
    code: u16,
    /// Where in the body, as it is kept, the task's id is.
    id_at: u16,
    id_len: u16,
    class: Class,
    stage: Option<Stage>,
    /// One more than the number of a usual one; 0 for none.
    content_type: u8,
    marks: AtomicU8,
}

/// An answer, or of one that is not kept all but its body. Cheap to clone.
#[derive(Clone)]
pub struct Block(Arc<HeaderSlice<Head, [u8]>>);

/// What lies behind the head.
struct Parts<'a> {
    /// As it is kept.
    body: &'a [u8],
    id: &'a [u8],
    content_type: &'a [u8],
    settling_since: i64,
    /// Of a body that is packed; 0 for one that is not.
    length: u16,
}

impl Block {
    /// The answer to `account`'s question about the task `id`, with this much of its body.
    pub(super) fn new(draft: &Draft, body: &[u8], account: AccountId, id: &str) -> Self {
        let id_at = find(id.as_bytes(), body);
        let text = draft.content_type.as_ref().map(HeaderValue::as_bytes);
        let usual = text.and_then(|text| USUAL.iter().position(|usual| usual == text));
        let unusual = text.filter(|text| usual.is_none() && u16::try_from(text.len()).is_ok());
        let usual = usual.and_then(|number| u8::try_from(number + 1).ok());
        let settling_since = draft.keeping.and_then(|keeping| keeping.settling_since);
        let mark = |is_so: bool, mark| if is_so { mark } else { 0 };
        let head = Head {
            asked: nanos(draft.asked),
            account: account.half(),
            took: micros(draft.received.saturating_duration_since(draft.asked)),
            keep: draft.keeping.map_or(0, |keeping| in_32_bits(keeping.keep)),
            place: AtomicU32::new(NOWHERE),
            status: draft.status,
            code: draft.code(),
            id_at,
            id_len: u16::try_from(id.len()).unwrap_or(0),
            class: draft.reading.class,
            stage: draft.reading.stage,
            content_type: usual.unwrap_or(if unusual.is_some() { UNUSUAL } else { 0 }),
            marks: AtomicU8::new(
                mark(draft.keeping.is_some_and(|keeping| keeping.live), LIVE)
                    | mark(draft.keeping.is_some_and(|keeping| keeping.ended), ENDED)
                    | mark(settling_since.is_some(), SETTLING),
            ),
        };
        if id_at != BEHIND && unusual.is_none() && settling_since.is_none() {
            return Self(Arc::from_header_and_slice(head, body));
        }
        let mut bytes = body.to_vec();
        let parts = Parts {
            body,
            id: id.as_bytes(),
            content_type: unusual.unwrap_or_default(),
            settling_since: settling_since.map_or(0, nanos),
            length: 0,
        };
        parts.add(&head, &mut bytes);
        Self(Arc::from_header_and_slice(head, &bytes))
    }

    /// A copy with its body packed; `None` if that saves nothing worth speaking of.
    pub fn packed(&self) -> Option<Self> {
        if self.is_packed() {
            return None;
        }
        let parts = self.parts();
        let length = u16::try_from(parts.body.len()).ok()?;
        with_packed(parts.body, |bytes| {
            let head = Head {
                place: AtomicU32::new(NOWHERE),
                id_at: find(parts.id, bytes),
                marks: AtomicU8::new(self.0.header.marks.load(Ordering::Relaxed) | PACKED),
                ..self.0.header
            };
            Parts { length, ..parts }.add(&head, bytes);
            Self(Arc::from_header_and_slice(head, bytes))
        })
    }

    /// Whether it answers `account`'s question about `task`.
    pub fn is_of(&self, account: AccountId, task: &str) -> bool {
        self.0.header.account == account.half() && self.parts().id == task.as_bytes()
    }

    /// The part of the account's id that is kept with it.
    pub fn account(&self) -> u64 {
        self.0.header.account
    }

    /// How much memory it takes, in bytes, before the allocator rounds it up.
    pub fn size(&self) -> usize {
        size_of::<usize>() + size_of::<Head>() + self.0.slice.len()
    }

    pub(super) fn status(&self) -> StatusCode {
        self.0.header.status
    }

    pub(super) fn code(&self) -> u16 {
        self.0.header.code
    }

    pub(super) fn class(&self) -> Class {
        self.0.header.class
    }

    pub(super) fn stage(&self) -> Option<Stage> {
        self.0.header.stage
    }

    pub(super) fn asked(&self) -> Instant {
        instant(self.0.header.asked)
    }

    pub(super) fn received(&self) -> Instant {
        self.asked() + Duration::from_micros(self.0.header.took.into())
    }

    pub(super) fn keep(&self) -> Duration {
        let keep = self.0.header.keep;
        match keep.checked_sub(IN_SECONDS) {
            Some(seconds) => Duration::from_secs(seconds.into()),
            None => Duration::from_millis(keep.into()),
        }
    }

    /// When it is kept no longer.
    pub fn kept_until(&self) -> Instant {
        self.received() + self.keep()
    }

    /// Whether it is still kept at `now`.
    pub fn is_kept(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.received()) < self.keep()
    }

    pub(super) fn is_live(&self) -> bool {
        self.is_marked(LIVE)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.is_marked(ENDED)
    }

    pub(super) fn keeping(&self) -> Option<Keeping> {
        let keep = self.keep();
        let settling_since = || instant(self.parts().settling_since);
        (!keep.is_zero()).then(|| Keeping {
            keep,
            live: self.is_live(),
            ended: self.has_ended(),
            settling_since: self.is_marked(SETTLING).then(settling_since),
        })
    }

    /// The body, byte for byte; a copy if it is packed.
    pub(super) fn body(&self) -> Cow<'_, [u8]> {
        let mut body = Vec::new();
        if self.unpack(&mut body) {
            Cow::Owned(body)
        } else {
            Cow::Borrowed(self.parts().body)
        }
    }

    /// The body's length, in bytes.
    pub(super) fn body_len(&self) -> usize {
        let Parts { body, length, .. } = self.parts();
        if self.is_packed() { length.into() } else { body.len() }
    }

    /// Adds a body that is packed to `out`; gives whether it is.
    ///
    /// # Panics
    /// If memory has changed: what is packed was unpacked before it was kept.
    pub(super) fn unpack(&self, out: &mut Vec<u8>) -> bool {
        let is_packed = self.is_packed();
        if is_packed {
            let Parts { body, length, .. } = self.parts();
            assert!(unpack(body, length.into(), out), "a kept body does not unpack");
        }
        is_packed
    }

    pub(super) fn content_type(&self) -> Option<Cow<'static, HeaderValue>> {
        match self.0.header.content_type {
            0 => None,
            UNUSUAL => HeaderValue::from_bytes(self.parts().content_type).ok().map(Cow::Owned),
            usual => USUAL.get(usize::from(usual) - 1).map(Cow::Borrowed),
        }
    }

    pub(super) fn note_read(&self) {
        // Most reads find it set: a load that all cores share costs nothing, a store would.
        if !self.is_marked(READ) {
            self.0.header.marks.fetch_or(READ, Ordering::Relaxed);
        }
    }

    /// Whether it was read since this was last asked.
    pub fn take_read(&self) -> bool {
        self.0.header.marks.fetch_and(!READ, Ordering::Relaxed) & READ != 0
    }

    /// Notes that a newer word than this is kept, in another place.
    pub(super) fn outdate(&self) {
        self.0.header.marks.fetch_or(OUTDATED, Ordering::Relaxed);
    }

    pub(super) fn is_outdated(&self) -> bool {
        self.is_marked(OUTDATED)
    }

    /// Notes where it stands among its account's answers.
    pub fn set_place(&self, place: u32) {
        self.0.header.place.store(place, Ordering::Relaxed);
    }

    /// Where it stands among its account's answers.
    pub fn place(&self) -> Option<u32> {
        let place = self.0.header.place.load(Ordering::Relaxed);
        (place != NOWHERE).then_some(place)
    }

    /// Where it stood among its account's answers: nowhere from now on.
    pub fn take_place(&self) -> Option<u32> {
        let place = self.0.header.place.swap(NOWHERE, Ordering::Relaxed);
        (place != NOWHERE).then_some(place)
    }

    fn is_packed(&self) -> bool {
        self.is_marked(PACKED)
    }

    fn is_marked(&self, mark: u8) -> bool {
        self.0.header.marks.load(Ordering::Relaxed) & mark != 0
    }

    /// From the end to the beginning of what [`Parts::add`] put there.
    fn parts(&self) -> Parts<'_> {
        let (head, mut body) = (&self.0.header, &self.0.slice);
        let (mut length, mut settling_since, mut content_type) = (0, 0, &[][..]);
        if self.is_packed()
            && let Some((before, unpacked)) = body.split_last_chunk()
        {
            (body, length) = (before, u16::from_ne_bytes(*unpacked));
        }
        if self.is_marked(SETTLING)
            && let Some((before, since)) = body.split_last_chunk()
        {
            (body, settling_since) = (before, i64::from_ne_bytes(*since));
        }
        if head.content_type == UNUSUAL
            && let Some((before, length)) = body.split_last_chunk()
        {
            (body, content_type) = cut(before, usize::from(u16::from_ne_bytes(*length)));
        }
        let id_len = usize::from(head.id_len);
        let id;
        if head.id_at == BEHIND {
            (body, id) = cut(body, id_len);
        } else {
            let at = usize::from(head.id_at);
            id = body.get(at..at + id_len).unwrap_or_default();
        }
        Parts {
            body,
            id,
            content_type,
            settling_since,
            length,
        }
    }
}

impl Parts<'_> {
    /// Adds to the body what `head` says stands behind it.
    fn add(&self, head: &Head, bytes: &mut Vec<u8>) {
        let marks = head.marks.load(Ordering::Relaxed);
        if head.id_at == BEHIND {
            bytes.extend(self.id);
        }
        if head.content_type == UNUSUAL {
            bytes.extend(self.content_type);
            bytes.extend(u16::try_from(self.content_type.len()).unwrap_or(0).to_ne_bytes());
        }
        if marks & SETTLING != 0 {
            bytes.extend(self.settling_since.to_ne_bytes());
        }
        if marks & PACKED != 0 {
            bytes.extend(self.length.to_ne_bytes());
        }
    }
}

/// Where `id` is in a body: mostly where upstream names it first of all, so that no searcher has to be built for it.
fn find(id: &[u8], body: &[u8]) -> u16 {
    static NAMED: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new(br#""task_id":""#));
    let beginning = body.get(..usize::from(BEHIND)).unwrap_or(body);
    let named = || {
        let at = NAMED.find(beginning)? + NAMED.needle().len();
        beginning[at..].starts_with(id).then_some(at)
    };
    let at = named().or_else(|| memmem::find(beginning, id));
    at.and_then(|at| u16::try_from(at).ok()).unwrap_or(BEHIND)
}

/// Without what it tells of who asks for what.
impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block")
            .field("status", &self.status())
            .field("class", &self.class())
            .field("stage", &self.stage())
            .field("keeping", &self.keeping())
            .field("bytes", &self.body_len())
            .finish_non_exhaustive()
    }
}

/// All but the last `length` bytes, and these.
fn cut(bytes: &[u8], length: usize) -> (&[u8], &[u8]) {
    bytes
        .split_at_checked(bytes.len().saturating_sub(length))
        .unwrap_or_default()
}

fn nanos(at: Instant) -> i64 {
    let nanos = |duration: Duration| i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
    match at.checked_duration_since(*START) {
        Some(since) => nanos(since),
        None => -nanos(START.saturating_duration_since(at)),
    }
}

fn instant(nanos: i64) -> Instant {
    let from_start = Duration::from_nanos(nanos.unsigned_abs());
    if nanos < 0 {
        START.checked_sub(from_start).unwrap_or(*START)
    } else {
        *START + from_start
    }
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

/// Rounded down; 0 is not kept at all.
fn in_32_bits(keep: Duration) -> u32 {
    let ms = u32::try_from(keep.as_millis()).ok().filter(|ms| *ms < IN_SECONDS);
    let seconds = || u32::try_from(keep.as_secs()).unwrap_or(u32::MAX);
    ms.unwrap_or_else(|| IN_SECONDS.saturating_add(seconds()))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::account::AccountIds;
    use crate::task::{Reading, TaskId, Timestamp};

    fn account(name: &str) -> AccountId {
        static IDS: LazyLock<AccountIds> = LazyLock::new(AccountIds::default);
        IDS.listed(name)
    }

    fn task(id: &str) -> TaskId {
        TaskId::new(id).unwrap()
    }

    fn draft(body: &str, asked: Instant, received: Instant) -> Draft {
        let reading = Reading {
            class: Class::Terminal,
            stage: Some(Stage::Ended),
            effective_code: Some(200),
            complete_at: Timestamp::Absent,
            create_at: Timestamp::Absent,
        };
        let body = Bytes::from(body.to_owned());
        Draft {
            keeping: Some(Keeping::briefly(Duration::from_secs(1))),
            ..Draft::new(StatusCode::OK, body, reading, asked, received)
        }
    }

    #[test]
    fn a_head_has_no_gaps() {
        assert_eq!(size_of::<Head>(), 40);
        let now = Instant::now();
        let usual = Draft {
            content_type: Some(USUAL[1].clone()),
            ..draft(r#"{"task_id":"a1"}"#, now, now)
        };
        let block = usual.of(account("music"), &task("a1")).block;
        assert_eq!(
            block.size(),
            8 + 40 + block.body().len(),
            "what a body repeats takes no room"
        );
    }

    #[test]
    fn what_repeats_itself_is_packed() {
        let body = include_str!("../../tests/fixtures/success.json");
        let (now, id) = (Instant::now(), "d6956973-2f17-43d4-8514-af6cc3a2f55d");
        let plain = draft(body, now, now).of(account("music"), &task(id)).block;
        let packed = plain.packed().unwrap();
        assert!(
            packed.size() * 3 < plain.size() * 2,
            "{} of {}",
            packed.size(),
            plain.size()
        );
        assert_eq!(*packed.body(), *body.as_bytes());
        assert!(
            packed.0.header.id_at != BEHIND,
            "what stands in a body once is not spelt out twice"
        );
        assert!(packed.packed().is_none(), "once is enough");
    }

    #[test]
    fn what_repeats_nothing_or_is_too_long_is_not_packed() {
        let now = Instant::now();
        let mut noise = vec![0; 30_000];
        rand::fill(&mut noise[..]);
        let noise = noise.iter().map(|byte| char::from(byte & 0x7f)).collect::<String>();
        let packed = |body: &str| draft(body, now, now).of_nobody().block.packed();
        assert!(packed(&noise).is_none());
        assert!(packed(&"a".repeat(65_534)).is_some());
        assert!(packed(&"a".repeat(65_535)).is_none());
    }

    #[test]
    fn how_long_is_exact_up_to_24_days_and_to_the_second_beyond() {
        let now = Instant::now();
        let kept = |keep| {
            let draft = Draft {
                keeping: Some(Keeping::briefly(keep)),
                ..draft("", now, now)
            };
            draft.of_nobody().block.keep()
        };
        let (day, tick) = (Duration::from_hours(24), Duration::from_millis(1));
        for exact in [Duration::ZERO, tick, day * 24 + tick, day * 365] {
            assert_eq!(kept(exact), exact);
        }
        assert_eq!(kept(day * 25 + tick), day * 25);
        assert_eq!(
            kept(Duration::MAX),
            Duration::from_secs(u64::from(u32::MAX - IN_SECONDS))
        );
    }

    #[test]
    fn nothing_it_prints_tells_who_asked() {
        let now = Instant::now();
        let answer = draft(r#"{"task_id":"task-4711"}"#, now, now).of(account("music"), &task("task-4711"));
        assert!(!format!("{answer:?}").contains("4711"));
    }

    proptest! {
        #[test]
        fn it_gives_back_what_was_put_in(
            (before, after, id) in ("[ -~]{0,80}", "\\PC{0,80}", "[ -~]{1,256}"),
            (is_repeated, times) in (any::<bool>(), 0..1000_usize),
            content_type in prop_oneof![
                Just(None),
                prop::sample::select(&USUAL[..]).prop_map(|usual| Some(usual.to_str().unwrap().to_owned())),
                "[!-~]{1,300}".prop_map(Some),
            ],
            (asked_ms, took_us, keep_ms) in (-2_000_000_000_i64..2_000_000_000, 0..u32::MAX, 0..2_000_000_000_u64),
            settling in prop::option::of(-2_000_000_000_i64..2_000_000_000),
            (live, ended) in any::<(bool, bool)>(),
        ) {
            let at = |ms: i64| instant(ms * 1_000_000);
            // From what is not worth packing to what is too long for it.
            let body = format!("{before}{}{}", if is_repeated { &id } else { "" }, after.repeat(times));
            let asked = at(asked_ms);
            let received = asked + Duration::from_micros(took_us.into());
            let keeping = Keeping {
                keep: Duration::from_millis(keep_ms),
                live,
                ended,
                settling_since: settling.map(at),
            };
            let content_type = content_type.map(|text| HeaderValue::try_from(text).unwrap());
            let draft = Draft {
                content_type: content_type.clone(),
                keeping: Some(keeping),
                ..draft(&body, asked, received)
            };
            let answer = draft.of(account("music"), &task(&id));
            let packed = answer.block.packed().map(crate::stored::Answer::from);
            let size = answer.block.size();
            prop_assert!(packed.as_ref().is_none_or(|packed| packed.block.size() < size));
            for answer in [Some(answer), packed].into_iter().flatten() {
                prop_assert_eq!(answer.body(), body.as_bytes());
                prop_assert_eq!(answer.body_len(), body.len());
                prop_assert_eq!(answer.content_type().map(Cow::into_owned), content_type.clone());
                prop_assert_eq!(answer.asked(), asked);
                prop_assert_eq!(answer.received(), received);
                prop_assert_eq!(answer.keeping(), (keep_ms > 0).then_some(keeping));
                prop_assert!(answer.block.is_of(account("music"), &id));
                prop_assert!(!answer.block.is_of(account("video"), &id));
                let other = format!("{id}x");
                prop_assert!(!answer.block.is_of(account("music"), &other));
                prop_assert!(!answer.block.is_of(account("music"), ""));
            }
        }
    }
}
