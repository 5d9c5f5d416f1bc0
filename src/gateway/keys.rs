//! What upstream last said of each key, and of an account's credits: state alone, asked on every poll, so mostly atomics.
//!
//! A refusal is remembered, with upstream's own bytes, for seconds; then one poll may ask again, and until its answer is
//! there everybody else still gets the remembered one: that bounds what a refused key costs, however many tasks are polled
//! with it. That upstream accepts a key is good for ten minutes. Answers arrive in any order: what was asked later counts.
//! What follows for a poll: `gateway::clearance`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use http::HeaderValue;
use parking_lot::Mutex;
use prometheus::IntGauge;
use tokio::time::Instant;

use crate::account::ApiKey;
use crate::error::envelope;
use crate::stored::{Answer, Keeping, Seal};

/// How long a refusal is remembered. Clients poll every 2 to 5 s, so a key that is accepted again, or an account that has
/// credits again, is without answers for hardly longer than one interval, and what is refused costs a query in 5 s, 1.4 %
/// of the budget.
const REMEMBERED: Duration = Duration::from_secs(5);

/// The longest that upstream's `Retry-After` makes a refusal remembered. It knows when credits or a key come back no better
/// than we do: an operator who has just mended it shall not wait for more than a minute.
const LONGEST_REMEMBERED: Duration = Duration::from_mins(1);

/// How long a key is good after an answer that accepted it, and how long a client token's earlier key, once refused, is
/// left alone.
const CONFIRMED: Duration = Duration::from_mins(10);

/// The largest body that is remembered for each key: refusals are some hundred bytes. Whoever makes keys up has as many of
/// them remembered as there may be unlisted accounts.
const LARGEST_BODY: usize = 4 << 10;

/// A key, and what upstream thinks of it.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) secret: ApiKey,
    /// Tells it from all others for as long as the process runs.
    pub(super) number: u64,
    pub(super) refusal: Refusal,
    /// What answers fetched with it are sealed with where they outlive the process.
    pub(super) seal: Arc<Seal>,
    epoch: Instant,
    /// Microseconds after `epoch` from which on upstream's last word is too old; 0 when there is none.
    due_us: AtomicU64,
    /// When upstream last answered a query with it and said nothing of it.
    in_vain_us: AtomicU64,
}

impl Key {
    /// A key of which upstream has said nothing. `epoch` is an instant before all others, `refused` the gauge of its account's
    /// refused keys.
    pub(super) fn new(secret: ApiKey, number: u64, epoch: Instant, refused: IntGauge) -> Self {
        Self {
            seal: Arc::new(Seal::of(&secret)),
            secret,
            number,
            refusal: Refusal::new(refused),
            epoch,
            due_us: AtomicU64::new(0),
            in_vain_us: AtomicU64::new(0),
        }
    }

    /// Whether upstream refused it when it was last asked.
    pub(super) fn is_refused(&self) -> bool {
        self.refusal.stands()
    }

    /// Whether upstream has said nothing of it for [`CONFIRMED`], and no answer that says nothing of it has come since `now`:
    /// whoever waited for one need not ask again.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        let now = self.us(now);
        self.due_us.load(Ordering::Relaxed) <= now && self.in_vain_us.load(Ordering::Relaxed) <= now
    }

    /// Claims the query that finds out, for one of those who saw that it is due.
    pub(super) fn claim(&self, now: Instant) -> bool {
        let due = self.due_us.load(Ordering::Relaxed);
        let next = self.us(now + CONFIRMED);
        due <= self.us(now)
            && self
                .due_us
                .compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// The query that was claimed at `claimed` was not sent after all: somebody else may, a little later, unless upstream has
    /// said something since.
    pub(super) fn disclaim(&self, claimed: Instant, now: Instant) {
        let (next, soon) = (self.us(claimed + CONFIRMED), self.us(now + REMEMBERED));
        // It fails where there is nothing to take back.
        let _ = (self.due_us).compare_exchange(next, soon, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Upstream said something to a query with it at this instant, and nothing of it.
    pub(super) fn asked_in_vain(&self, received: Instant) {
        self.in_vain_us.fetch_max(self.us(received), Ordering::Relaxed);
    }

    /// Upstream said something of it, to a question `asked` at this instant.
    pub(super) fn heard(&self, asked: Instant) {
        self.due_us.fetch_max(self.us(asked + CONFIRMED), Ordering::Relaxed);
    }

    fn us(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.epoch).as_micros()).unwrap_or(u64::MAX)
    }
}

/// Upstream's last refusal, for as long as nothing says otherwise. Shown in a gauge while it stands.
#[derive(Debug)]
pub(super) struct Refusal {
    /// Whether `word` holds one: most polls look at nothing else.
    stands: AtomicBool,
    word: Mutex<Word>,
}

/// Upstream's last word.
#[derive(Debug)]
struct Word {
    shown: IntGauge,
    refused: Option<Remembered>,
    /// When the latest question was asked to which upstream gave another answer.
    otherwise: Option<Instant>,
}

#[derive(Debug)]
struct Remembered {
    answer: Answer,
    until: Instant,
    /// Until when, by upstream's word alone.
    lapses: Instant,
}

impl Refusal {
    pub(super) fn new(shown: IntGauge) -> Self {
        Self {
            stands: AtomicBool::new(false),
            word: Mutex::new(Word {
                shown,
                refused: None,
                otherwise: None,
            }),
        }
    }

    /// From now on it counts in another gauge.
    pub(super) fn show_in(&self, shown: &IntGauge) {
        let mut word = self.word.lock();
        let before = std::mem::replace(&mut word.shown, shown.clone());
        if word.refused.is_some() {
            word.shown.inc();
            before.dec();
        }
    }

    /// Whether upstream refused when it was last asked, remembered or not.
    pub(super) fn stands(&self) -> bool {
        self.stands.load(Ordering::Relaxed)
    }

    /// The refusal, while it is remembered at `now`. `None` lets the one who asked go and ask upstream: the refusal is
    /// then remembered for a while longer, for all others.
    pub(super) fn recall(&self, now: Instant) -> Option<Answer> {
        if !self.stands() {
            return None;
        }
        let mut word = self.word.lock();
        let remembered = word.refused.as_mut()?;
        if remembered.until <= now {
            remembered.until = now + REMEMBERED;
            return None;
        }
        Some(remembered.answer.clone())
    }

    /// The refusal, if it came at `start` or later.
    pub(super) fn since(&self, start: Instant) -> Option<Answer> {
        if !self.stands() {
            return None;
        }
        let answer = self.word.lock().refused.as_ref()?.answer.clone();
        (answer.received() >= start).then_some(answer)
    }

    /// Upstream refused, and wants to be left alone for `retry_after`. True when it had not before.
    pub(super) fn set(&self, answer: &Answer, retry_after: Option<Duration>) -> bool {
        let keep = retry_after.map_or(REMEMBERED, |asked| asked.clamp(REMEMBERED, LONGEST_REMEMBERED));
        let mut word = self.word.lock();
        let last = word.refused.as_ref().map(|refused| refused.answer.asked());
        if last.max(word.otherwise).is_some_and(|last| last > answer.asked()) {
            return false;
        }
        let until = answer.received() + keep;
        let before = word.refused.replace(Remembered {
            answer: remembered(answer, keep),
            until,
            lapses: until,
        });
        self.stands.store(true, Ordering::Relaxed);
        if before.is_none() {
            word.shown.inc();
        }
        before.is_none()
    }

    /// Upstream gave another answer, to a question `asked` at this instant. True when a refusal stood till then.
    pub(super) fn clear(&self, asked: Instant) -> bool {
        let mut word = self.word.lock();
        word.otherwise = word.otherwise.max(Some(asked));
        let is_over = word
            .refused
            .as_ref()
            .is_some_and(|refused| refused.answer.asked() <= asked);
        if is_over {
            self.forget(&mut word);
        }
        is_over
    }

    /// At `asked` upstream was asked in vain, or could not be: a refusal that was to be remembered no longer is forgotten.
    /// Those who ask one by one to hear whether it still stands would hear nothing, and all others of it.
    pub(super) fn lapse(&self, asked: Instant) {
        if !self.stands() {
            return;
        }
        let mut word = self.word.lock();
        if word.refused.as_ref().is_some_and(|refused| refused.lapses <= asked) {
            self.forget(&mut word);
        }
    }

    fn forget(&self, word: &mut Word) {
        word.refused = None;
        self.stands.store(false, Ordering::Relaxed);
        word.shown.dec();
    }
}

impl Drop for Refusal {
    fn drop(&mut self) {
        let word = self.word.lock();
        if word.refused.is_some() {
            word.shown.dec();
        }
    }
}

/// What is remembered of an answer: not its room, which belongs to bodies in flight, nor a body beyond all measure, in
/// whose place goes an envelope that says the same.
fn remembered(answer: &Answer, keep: Duration) -> Answer {
    let mut draft = answer.draft();
    draft.keeping = Some(Keeping::briefly(keep));
    if draft.body.len() > LARGEST_BODY {
        let code = answer.code();
        draft.body = envelope(code, &format_args!("upstream answered code {code} a moment ago"));
        draft.content_type = Some(HeaderValue::from_static("application/json"));
    }
    draft.of_nobody()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::StatusCode;

    use super::*;
    use crate::stored::Draft;
    use crate::task::{self, TaskId};

    const BODY: &[u8] = br#"{"code":401,"message":"Unauthorized","data":null}"#;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A refusal that was asked for and received at these instants.
    fn refused(body: &'static [u8], asked: Instant, received: Instant) -> Answer {
        let task = TaskId::from_query(Some("task_id=a")).unwrap();
        let reading = task::read(401, body, &task);
        let body = Bytes::from_static(body);
        Draft::new(StatusCode::UNAUTHORIZED, body, reading, asked, received).of_nobody()
    }

    fn gauge() -> IntGauge {
        IntGauge::new("refused", "refused").unwrap()
    }

    #[test]
    fn a_refusal_is_remembered_for_seconds_and_then_one_asks_again() {
        let (start, refusal) = (Instant::now(), Refusal::new(gauge()));
        assert!(refusal.recall(start).is_none() && !refusal.stands());
        assert!(refusal.set(&refused(BODY, start, start), None));
        let last = start + REMEMBERED - Duration::from_nanos(1);
        assert_eq!(refusal.recall(last).unwrap().body(), BODY);
        assert!(refusal.recall(start + seconds(5)).is_none(), "one asks again");
        assert!(refusal.recall(start + seconds(5)).is_some(), "and no other");
        assert!(refusal.recall(start + seconds(9)).is_some());
        assert!(refusal.recall(start + seconds(10)).is_none(), "its answer never came");
        assert!(refusal.stands(), "whatever is remembered");
    }

    #[test]
    fn retry_after_makes_it_longer_up_to_a_minute() {
        for (retry_after, remembered) in [(1, 5), (5, 5), (20, 20), (60, 60), (300, 60)] {
            let (start, refusal) = (Instant::now(), Refusal::new(gauge()));
            refusal.set(&refused(BODY, start, start), Some(seconds(retry_after)));
            let end = start + seconds(remembered);
            let answer = refusal.recall(end - Duration::from_nanos(1)).unwrap();
            assert_eq!(
                answer.freshness(start, Duration::ZERO).ttl(),
                i64::try_from(remembered).unwrap()
            );
            assert!(refusal.recall(end).is_none(), "{retry_after}");
        }
    }

    #[test]
    fn what_was_asked_later_counts() {
        let (start, refusal) = (Instant::now(), Refusal::new(gauge()));
        let late = |asked: u64| refused(BODY, start + seconds(asked), start + seconds(9));
        assert!(!refusal.clear(start + seconds(2)), "nothing stood");
        assert!(!refusal.set(&late(1), None) && !refusal.stands());
        assert!(refusal.set(&late(3), None) && refusal.stands());
        assert!(!refusal.clear(start + seconds(2)) && refusal.stands());
        assert!(!refusal.set(&late(4), None), "it stood before");
        assert!(!refusal.set(&late(3), Some(seconds(60))), "older than what stands");
        assert!(refusal.recall(start + seconds(14)).is_none(), "and lengthens nothing");
        assert!(refusal.clear(start + seconds(5)) && !refusal.stands());
    }

    #[test]
    fn since_tells_what_came_meanwhile() {
        let (start, refusal) = (Instant::now(), Refusal::new(gauge()));
        assert!(refusal.since(start).is_none());
        refusal.set(&refused(BODY, start, start + seconds(1)), None);
        assert!(refusal.since(start + seconds(1)).is_some());
        assert!(refusal.since(start + Duration::from_millis(1001)).is_none());
    }

    #[test]
    fn the_gauge_shows_what_stands() {
        let (start, shown) = (Instant::now(), gauge());
        let (one, other) = (Refusal::new(shown.clone()), Refusal::new(shown.clone()));
        one.set(&refused(BODY, start, start), None);
        one.set(&refused(BODY, start, start), None);
        other.set(&refused(BODY, start, start), None);
        assert_eq!(shown.get(), 2);
        one.clear(start);
        one.clear(start);
        assert_eq!(shown.get(), 1);
        let elsewhere = gauge();
        one.show_in(&elsewhere);
        other.show_in(&elsewhere);
        assert_eq!((shown.get(), elsewhere.get()), (0, 1));
        one.set(&refused(BODY, start + seconds(1), start + seconds(1)), None);
        assert_eq!((shown.get(), elsewhere.get()), (0, 2));
        drop((one, other));
        assert_eq!((shown.get(), elsewhere.get()), (0, 0));
    }

    #[test]
    fn a_body_beyond_measure_is_remembered_by_its_code() {
        static HUGE: [u8; LARGEST_BODY + 1] = [b' '; LARGEST_BODY + 1];
        let (start, refusal) = (Instant::now(), Refusal::new(gauge()));
        refusal.set(&refused(&HUGE, start, start), None);
        let answer = refusal.recall(start).unwrap();
        assert!(answer.body().starts_with(br#"{"code":401,"#), "{answer:?}");
        assert_eq!(answer.status(), 401);
        refusal.set(&refused(&HUGE[1..], start, start), None);
        assert_eq!(refusal.recall(start).unwrap().body().len(), LARGEST_BODY);
    }

    #[test]
    fn a_key_is_due_ten_minutes_after_upstreams_last_word() {
        let start = Instant::now();
        let key = Key::new(ApiKey::new("ak_1").unwrap(), 0, start, gauge());
        assert!(key.is_due(start), "nothing was ever said");
        key.heard(start + seconds(1));
        assert!(!key.is_due(start + seconds(600)));
        assert!(key.is_due(start + seconds(601)));
        key.heard(start);
        assert!(key.is_due(start + seconds(601)), "an older answer changes nothing");
        assert!(!key.claim(start + seconds(600)));
        assert!(key.claim(start + seconds(601)));
        assert!(!key.claim(start + seconds(601)), "one claims it");
        assert!(!key.is_due(start + seconds(1200)));
        key.disclaim(start + seconds(601), start + seconds(602));
        assert!(!key.is_due(start + seconds(606)));
        assert!(key.claim(start + seconds(607)));
    }

    #[test]
    fn what_upstream_said_meanwhile_outlives_a_claim_that_came_to_nothing() {
        let start = Instant::now();
        let key = Key::new(ApiKey::new("ak_1").unwrap(), 0, start, gauge());
        assert!(key.claim(start + seconds(1)));
        key.heard(start + seconds(30));
        key.disclaim(start + seconds(1), start + seconds(60));
        assert!(!key.is_due(start + seconds(629)));
        assert!(key.is_due(start + seconds(630)));
    }
}
