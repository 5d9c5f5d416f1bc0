//! How long upstream takes, lately: what admission reckons with beside the wait for a turn. Each account knows of its own
//! queries alone, so that one whose answers are slow has nobody turned away who polls with another.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;

/// Answers that count: seven seconds' worth at 15 a second.
const ANSWERS: usize = 100;

/// For how long they count: what made upstream slow may be over long before a hundred others have come.
const COUNT: Duration = Duration::from_mins(1);

/// Once there are as many, their ranks are reckoned anew only after so many new ones: each time all of them are looked at.
const SELDOM: usize = 10;

/// Where some have become too old, the mean is of so many of them, and mostly of the last ones.
const FEW: usize = 32;

/// Of so many queries without an answer it is upstream that is silent: one alone may be about a task that hangs.
const SILENT: usize = 2;

/// By how much the slowest answers are exceeded now and then: by this, and half of what lies between them and the median, or
/// as much as nine in ten take, if that is less: a few that are far slower than all others are no distribution.
const SLACK: Duration = Duration::from_millis(50);

/// How long the last answers took, and for how long there has been none. There may be thousands: without an answer it is
/// small.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<Times>);

#[derive(Debug, Default)]
struct Times {
    /// When each came, and how long it took.
    answers: VecDeque<(Instant, Duration)>,
    /// For how long the last few, in the mean, had a place in which no connection was open yet.
    opening: Duration,
    /// How many came since their ranks were reckoned; enough to do so again, where some have gone.
    unreckoned: usize,
    mean: Duration,
    median: Duration,
    p90: Duration,
    /// What all but a few take less than; nothing where there are none.
    nearly_all: Option<Duration>,
    /// Queries that are not answered yet.
    out: usize,
    /// Since when there have been as many as are no chance, without an answer to any.
    silent_since: Option<Instant>,
}

/// How long the next answer is thought to take. Where upstream has been silent for longer than is usual, that is half as
/// long again, by the first two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outlook {
    /// At least, more likely than not.
    pub at_least: Duration,
    /// In the mean: for so long a query keeps its connection.
    pub mean: Duration,
    /// For how long a query has a place before, in the mean, in which no connection is open yet: nothing while there are
    /// more places.
    pub opening: Duration,
    /// What all but about one answer in a hundred take less than. The less of the time that nine in ten leave would be left
    /// by that, the nearer to what these take: answers that take longer than anybody waits are lost whenever they are asked
    /// for. `None` if nothing is known of the last minute.
    pub nearly_all: Option<Duration>,
}

/// A query under way.
#[derive(Debug)]
pub(super) struct Query<'r> {
    recent: &'r Recent,
    asked: Instant,
    opening: Duration,
}

impl Recent {
    /// A query goes out, which has had a place for so long in which no connection was open yet.
    pub(super) fn ask(&self, asked: Instant, opening: Duration) -> Query<'_> {
        let mut times = self.0.lock();
        if times.out < SILENT {
            times.silent_since = Some(asked);
        }
        times.out += 1;
        Query {
            recent: self,
            asked,
            opening,
        }
    }

    /// One that was `asked` then is answered.
    pub(super) fn note(&self, asked: Instant, received: Instant) {
        self.0.lock().note(received, received.saturating_duration_since(asked));
    }

    /// What nine answers in ten do not exceed; nothing where there are none.
    pub(super) fn p90(&self, now: Instant) -> Duration {
        self.as_of(now).p90
    }

    /// What is to be expected of a query that goes out at `now`, for whoever waits `within` so long at most.
    pub(super) fn outlook(&self, within: Duration, now: Instant) -> Outlook {
        let times = self.as_of(now);
        let silence = times.silence(now);
        Outlook {
            at_least: silence.unwrap_or(times.median),
            mean: silence.unwrap_or(times.mean),
            opening: times.opening,
            nearly_all: times.nearly_all_within(within),
        }
    }

    /// What is known at `now`.
    fn as_of(&self, now: Instant) -> MutexGuard<'_, Times> {
        let mut times = self.0.lock();
        times.forget_old(now);
        // Only now: of all accounts together the ranks are mostly asked for by nobody.
        let is_full = times.answers.len() == ANSWERS;
        if times.unreckoned >= if is_full { SELDOM } else { 1 } {
            times.reckon();
        }
        times
    }
}

impl Query<'_> {
    /// It is answered.
    pub(super) fn answered(self, received: Instant) {
        let mut times = self.recent.0.lock();
        times.silent_since = Some(received);
        times.opening = moving_mean(times.opening, self.opening);
        times.note(received, received.saturating_duration_since(self.asked));
    }
}

impl Drop for Query<'_> {
    fn drop(&mut self) {
        self.recent.0.lock().out -= 1;
    }
}

impl Times {
    /// Half as long again as upstream has been silent, if that is longer than is usual.
    fn silence(&self, now: Instant) -> Option<Duration> {
        let since = self.silent_since.filter(|_| self.out >= SILENT)?;
        let silent = now.saturating_duration_since(since);
        (silent > self.nearly_all.unwrap_or_default()).then(|| silent * 3 / 2)
    }

    /// [`Outlook::nearly_all`], for whoever waits `within` so long.
    fn nearly_all_within(&self, within: Duration) -> Option<Duration> {
        let (p90, nearly_all) = (self.p90, self.nearly_all?);
        let (half, left) = (within.saturating_sub(p90) / 2, within.saturating_sub(nearly_all));
        let beyond_p90 = nearly_all.saturating_sub(p90);
        Some(if beyond_p90 <= half {
            nearly_all
        } else if left.is_zero() {
            p90
        } else {
            p90 + beyond_p90.mul_f64(left.div_duration_f64(half))
        })
    }

    fn forget_old(&mut self, now: Instant) {
        let before = self.answers.len();
        while self.answers.front().is_some_and(|answer| is_old(answer, now)) {
            self.answers.pop_front();
        }
        if self.answers.len() < before {
            self.unreckoned = SELDOM;
            self.mean = self.mean_of_few();
        }
    }

    fn note(&mut self, received: Instant, took: Duration) {
        self.forget_old(received);
        if self.answers.len() == ANSWERS {
            self.answers.pop_front();
        }
        self.mean = if self.answers.is_empty() {
            took
        } else {
            moving_mean(self.mean, took)
        };
        self.answers.push_back((received, took));
        self.unreckoned += 1;
    }

    fn mean_of_few(&self) -> Duration {
        let before = self.answers.len().saturating_sub(FEW);
        let last = self.answers.iter().skip(before).map(|(_, took)| *took);
        last.reduce(moving_mean).unwrap_or_default()
    }

    fn reckon(&mut self) {
        self.unreckoned = 0;
        let mut taken = [Duration::ZERO; ANSWERS];
        let taken = &mut taken[..self.answers.len()];
        // The slowest is one in a hundred, or of fewer: it is left out.
        let (mut slowest, mut p99) = (None, None);
        for (place, (_, took)) in taken.iter_mut().zip(&self.answers) {
            *place = *took;
            p99 = p99.max(slowest.min(Some(*took)));
            slowest = slowest.max(Some(*took));
        }
        if slowest.is_none() {
            (self.opening, self.median, self.p90, self.nearly_all) = Default::default();
            return;
        }
        // Only these two ranks are asked for: the rest need not be sorted.
        let (half, most) = (taken.len() / 2, taken.len() * 9 / 10);
        let (below, p90, _) = taken.select_nth_unstable(most);
        self.p90 = *p90;
        self.median = if half < most {
            *below.select_nth_unstable(half).1
        } else {
            self.p90
        };
        let p99 = p99.unwrap_or(self.p90);
        let more = p99.saturating_sub(self.median) / 2;
        self.nearly_all = Some(p99 + more.min(self.p90) + SLACK);
    }
}

/// The mean of the last few, the `latest` among them.
fn moving_mean(mean: Duration, latest: Duration) -> Duration {
    (mean * 7 + latest) / 8
}

/// Whether an answer that came so long ago counts no longer.
fn is_old((received, _): &(Instant, Duration), now: Instant) -> bool {
    *received + COUNT <= now
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn note(recent: &Recent, took: Duration) {
        let now = Instant::now();
        recent.ask(now, Duration::ZERO).answered(now + took);
    }

    fn outlook(recent: &Recent) -> Outlook {
        recent.outlook(10 * SECOND, Instant::now())
    }

    #[test]
    fn the_p90_follows_the_last_hundred_answers() {
        let recent = Recent::default();
        let p90 = || recent.p90(Instant::now());
        assert_eq!(p90(), Duration::ZERO);
        note(&recent, ms(500));
        assert_eq!(p90(), ms(500));
        for took in 0..100 {
            note(&recent, ms(took));
        }
        assert_eq!(p90(), ms(90));
        for _ in 0..100 {
            note(&recent, 3 * SECOND);
        }
        assert_eq!(p90(), 3 * SECOND);
    }

    #[test]
    fn the_mean_is_of_the_last_few_answers() {
        let recent = Recent::default();
        let mean = || outlook(&recent).mean;
        assert_eq!(mean(), Duration::ZERO);
        note(&recent, ms(100));
        assert_eq!(mean(), ms(100));
        for _ in 0..24 {
            note(&recent, 4 * SECOND);
        }
        assert!(mean() > ms(3800) && mean() < 4 * SECOND, "{:?}", mean());
    }

    #[test]
    fn nearly_all_leaves_out_a_single_slow_answer_and_those_that_nobody_can_wait_for() {
        let recent = Recent::default();
        assert_eq!(outlook(&recent).nearly_all, None);
        for _ in 0..99 {
            note(&recent, ms(100));
        }
        note(&recent, 20 * SECOND);
        assert_eq!(outlook(&recent).nearly_all, Some(ms(150)));
        for took in 0..100 {
            note(&recent, ms(took));
        }
        // The slowest but one, and half of what it takes more than the median.
        assert_eq!(outlook(&recent).nearly_all, Some(ms(98 + 24 + 50)));
        for _ in 0..5 {
            note(&recent, 20 * SECOND);
        }
        for _ in 0..95 {
            note(&recent, ms(100));
        }
        assert_eq!(outlook(&recent).nearly_all, Some(ms(100)));
    }

    /// Of the last hundred answers two took `slow`, and the others 100 ms.
    fn note_two_slow(recent: &Recent, slow: Duration) {
        for number in 0..100 {
            note(recent, if number % 50 == 0 { slow } else { ms(100) });
        }
    }

    #[test]
    fn a_few_slow_answers_are_no_distribution() {
        let recent = Recent::default();
        note_two_slow(&recent, 3 * SECOND);
        let nearly_all = outlook(&recent).nearly_all.unwrap();
        assert!(nearly_all <= ms(3200), "{nearly_all:?}");
    }

    #[test]
    fn what_is_reckoned_with_changes_little_where_the_slowest_change_little() {
        let within = 10 * SECOND;
        let mut before = None::<Duration>;
        for slow in (1000..12_000).step_by(100) {
            let recent = Recent::default();
            note_two_slow(&recent, ms(slow));
            let nearly_all = recent.outlook(within, Instant::now()).nearly_all.unwrap();
            assert!(nearly_all <= within / 2 + ms(200), "{slow} ms: {nearly_all:?}");
            if let Some(before) = before {
                assert!(
                    nearly_all.abs_diff(before) <= ms(201),
                    "{slow} ms: {before:?}, then {nearly_all:?}"
                );
            }
            before = Some(nearly_all);
        }
        assert_eq!(before, Some(ms(100)), "those that nobody can wait for");
    }

    #[test]
    fn where_most_take_as_long_as_the_slowest_all_of_it_counts() {
        let recent = Recent::default();
        for number in 0..100 {
            note(&recent, ms(8000 + number));
        }
        let nearly_all = outlook(&recent).nearly_all.unwrap();
        assert!(nearly_all >= ms(8098), "{nearly_all:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn answers_count_for_a_minute() {
        let recent = Recent::default();
        let nearly_all = || outlook(&recent).nearly_all;
        note(&recent, 3 * SECOND);
        note(&recent, 3 * SECOND);
        advance(30 * SECOND).await;
        for _ in 0..3 {
            note(&recent, ms(100));
        }
        advance(29 * SECOND).await;
        assert!(nearly_all() > Some(3 * SECOND));
        advance(5 * SECOND).await;
        assert_eq!(nearly_all(), Some(ms(150)));
        // One slow answer is left out, however few there are.
        note(&recent, ms(200));
        note(&recent, 3 * SECOND);
        assert_eq!(nearly_all(), Some(ms(300)));
        advance(70 * SECOND).await;
        assert_eq!(nearly_all(), None, "as at the start");
        let (p90, Outlook { at_least, mean, .. }) = (recent.p90(Instant::now()), outlook(&recent));
        assert_eq!([p90, at_least, mean], [Duration::ZERO; 3]);
    }

    #[test]
    fn a_longer_silence_than_usual_says_that_answers_take_longer() {
        let (recent, start) = (Recent::default(), Instant::now());
        assert_eq!(recent.outlook(10 * SECOND, start).at_least, Duration::ZERO);
        let first = recent.ask(start, Duration::ZERO);
        assert_eq!(
            recent.outlook(10 * SECOND, start + 2 * SECOND).at_least,
            Duration::ZERO,
            "one says nothing"
        );
        let second = recent.ask(start + 2 * SECOND, Duration::ZERO);
        assert_eq!(recent.outlook(10 * SECOND, start + 4 * SECOND).at_least, 3 * SECOND);
        let third = recent.ask(start + 3 * SECOND, Duration::ZERO);
        first.answered(start + 4 * SECOND);
        assert_eq!(
            recent.outlook(10 * SECOND, start + 8 * SECOND).at_least,
            4 * SECOND,
            "no longer than the first took"
        );
        assert_eq!(recent.outlook(10 * SECOND, start + 10 * SECOND).at_least, 9 * SECOND);
        assert_eq!(recent.outlook(10 * SECOND, start + 10 * SECOND).mean, 9 * SECOND);
        drop((second, third));
        assert_eq!(
            recent.outlook(10 * SECOND, start + 20 * SECOND).at_least,
            4 * SECOND,
            "nobody waits for an answer"
        );
    }
}
