//! What upstream's 429 does to an account's pace: a pause, and a lower rate for a while. Pure: `now` is passed in.
//!
//! Others spend the account, too (the web playground, other hosts), so the rate is cut by half once a pause and recovers
//! by a thirtieth of the limit each second: additive increase, multiplicative decrease (Chiu and Jain, 1989), under which
//! spenders that cannot see each other come to share.

use std::time::Duration;

use tokio::time::Instant;

use super::Pace;
use crate::shared::Backed;

/// Where upstream does not say how long: the first pause, and the longest that doubling leads to.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

/// Seconds from a standstill to the full rate: `RECOVERY` of `shared/lend.lua`.
const RECOVERY_S: f64 = 30.0;

/// Queries a second that are left however often upstream answers 429; of a limit of 1, half.
const SLOWEST: f64 = 1.0;

#[derive(Clone, Debug)]
pub(super) struct Backoff {
    pace: Pace,
    paused_until: Option<Instant>,
    /// The rate when the last pause ended, from which it recovers.
    cut: Option<(f64, Instant)>,
    /// When it was cut, or heard to be.
    cut_at: Option<Instant>,
    /// The last pause of our own choosing, doubled while the rate has not recovered.
    chosen: Duration,
}

impl Backoff {
    pub(super) fn new(pace: Pace) -> Self {
        Self {
            pace,
            paused_until: None,
            cut: None,
            cut_at: None,
            chosen: Duration::ZERO,
        }
    }

    /// The pace when nothing slows it down.
    pub(super) fn pace(&self) -> Pace {
        self.pace
    }

    /// Changes it; what upstream said stands.
    pub(super) fn set_pace(&mut self, pace: Pace) {
        self.pace = pace;
    }

    fn limit(&self) -> f64 {
        f64::from(self.pace.limit.get())
    }

    /// The lowest rate, before the margin takes its part: less than the limit, or nothing would tell that it has not
    /// recovered.
    fn slowest(&self) -> f64 {
        (SLOWEST * self.pace.full_second().as_secs_f64()).min(self.limit() / 2.0)
    }

    /// Notes a 429 to a query that was `asked` then, gives how long the pause is from `now` on.
    pub(super) fn rate_limited(&mut self, retry_after: Option<Duration>, asked: Instant, now: Instant) -> Duration {
        let in_pause = self.paused_until(now);
        // What was on its way when the rate was cut says nothing of the rate since: at most for how long to pause.
        let is_news = in_pause.is_none() && self.cut_at.is_none_or(|cut_at| asked > cut_at);
        if is_news {
            let rate = self.rate(now);
            self.chosen = if rate < self.limit() {
                (self.chosen * 2).clamp(FIRST, LONGEST)
            } else {
                FIRST
            };
            self.cut = Some(((rate / 2.0).max(self.slowest()), now));
            self.cut_at = Some(now);
        }
        let Some(pause) = retry_after.or(is_news.then_some(self.chosen)) else {
            return in_pause.map_or(Duration::ZERO, |until| until - now);
        };
        let until = in_pause.map_or(now + pause, |before| before.max(now + pause));
        self.paused_until = Some(until);
        // Nothing recovers in a pause.
        self.cut = Some((self.rate(now), until));
        until - now
    }

    /// What the last 429 did, for other replicas.
    pub(super) fn backed(&self) -> Option<Backed> {
        let (rate, until) = self.cut?;
        let chosen = self.chosen;
        Some(Backed { until, rate, chosen })
    }

    /// Takes over what another replica heard, where it heard it later.
    pub(super) fn take_over(&mut self, heard: Backed, now: Instant) {
        if self.cut.is_none_or(|(_, until)| until < heard.until) {
            self.cut = Some((heard.rate.clamp(self.slowest(), self.limit()), heard.until));
            // A pause that is over may be long over: what was asked since is news.
            self.cut_at = Some(now.min(heard.until));
            self.paused_until = Some(heard.until);
            self.chosen = heard.chosen;
        }
    }

    /// The end of the pause, while there is one.
    pub(super) fn paused_until(&self, now: Instant) -> Option<Instant> {
        self.paused_until.filter(|until| *until > now)
    }

    /// When the last pause, or the start's hold, ends or ended.
    pub(super) fn resumed(&self) -> Instant {
        self.paused_until
            .map_or(self.pace.not_before, |until| until.max(self.pace.not_before))
    }

    /// Queries a second, of `limit`, that may be asked at `now`; the margin is the pace's own.
    pub(super) fn rate(&self, now: Instant) -> f64 {
        self.cut.map_or(self.limit(), |(rate, since)| {
            let recovered = now.saturating_duration_since(since).as_secs_f64() * self.limit() / RECOVERY_S;
            (rate + recovered).min(self.limit())
        })
    }

    /// How long `permits` take from the instant `from` on, at a rate that recovers meanwhile.
    pub(super) fn time_for(&self, permits: f64, from: Instant) -> Duration {
        let (rate, growth) = (self.rate(from), self.limit() / RECOVERY_S);
        let until_full = (self.limit() - rate) / growth;
        let meanwhile = until_full * f64::midpoint(rate, self.limit());
        let seconds = if permits < meanwhile {
            // rate × t + growth ÷ 2 × t² = permits
            ((rate * rate + 2.0 * growth * permits).sqrt() - rate) / growth
        } else {
            until_full + (permits - meanwhile) / self.limit()
        };
        Duration::try_from_secs_f64(seconds).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn backoff() -> (Backoff, Instant) {
        backoff_at(15)
    }

    fn backoff_at(limit: u32) -> (Backoff, Instant) {
        let now = Instant::now();
        let pace = Pace {
            limit: NonZeroU32::new(limit).unwrap(),
            margin: Duration::ZERO,
            not_before: now,
        };
        (Backoff::new(pace), now)
    }

    #[track_caller]
    fn assert_rate(backoff: &Backoff, at: Instant, expected: f64) {
        let rate = backoff.rate(at);
        assert!((rate - expected).abs() < 1e-6, "{rate} is not {expected}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_429_halves_the_rate_once_a_pause_and_it_recovers() {
        let (mut backoff, now) = backoff();
        assert_rate(&backoff, now, 15.0);
        assert_eq!(backoff.rate_limited(Some(2 * SECOND), now, now), 2 * SECOND);
        assert_eq!(backoff.rate_limited(Some(2 * SECOND), now, now), 2 * SECOND);
        assert_rate(&backoff, now + 2 * SECOND, 7.5);
        assert_rate(&backoff, now + 6 * SECOND, 9.5);
        assert_rate(&backoff, now + 17 * SECOND, 15.0);
        assert_rate(&backoff, now + 100 * SECOND, 15.0);
    }

    #[tokio::test(start_paused = true)]
    async fn how_long_permits_take_follows_the_rate_as_it_recovers() {
        let (mut backoff, now) = backoff();
        let seconds = |backoff: &Backoff, permits| backoff.time_for(permits, now + 2 * SECOND).as_secs_f64();
        assert!((seconds(&backoff, 150.0) - 10.0).abs() < 1e-6);
        backoff.rate_limited(Some(2 * SECOND), now, now);
        // 7.5/s at first and half a query a second more each second: 16 in 2 s, 168.75 until it is full after 15 s.
        for (permits, expected) in [(0.0, 0.0), (16.0, 2.0), (168.75, 15.0), (183.75, 16.0)] {
            let took = seconds(&backoff, permits);
            assert!((took - expected).abs() < 1e-6, "{permits} permits take {took} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_only_ever_extended() {
        let (mut backoff, now) = backoff();
        assert_eq!(backoff.rate_limited(Some(20 * SECOND), now, now), 20 * SECOND);
        assert_eq!(backoff.rate_limited(Some(SECOND), now, now + SECOND), 19 * SECOND);
        assert_eq!(backoff.rate_limited(Some(300 * SECOND), now, now), 300 * SECOND);
        assert_eq!(backoff.paused_until(now + 299 * SECOND), Some(now + 300 * SECOND));
        assert_eq!(backoff.paused_until(now + 300 * SECOND), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_query_asked_before_the_rate_was_cut_neither_cuts_it_again_nor_doubles_the_pause() {
        let (mut backoff, asked) = backoff();
        let first = asked + SECOND;
        assert_eq!(backoff.rate_limited(None, asked, first), SECOND);
        // In the pause, and after it.
        assert_eq!(backoff.rate_limited(None, asked, first + SECOND / 2), SECOND / 2);
        let late = first + 3 * SECOND;
        assert_eq!(backoff.rate_limited(None, asked, late), Duration::ZERO);
        assert_eq!(backoff.paused_until(late), None);
        assert_rate(&backoff, late, 8.5);
        // For as long as upstream wants, the rate stays what it was.
        assert_eq!(backoff.rate_limited(Some(2 * SECOND), asked, late), 2 * SECOND);
        assert_rate(&backoff, late + 2 * SECOND, 8.5);
        // Asked since, a query tells something new.
        assert_eq!(
            backoff.rate_limited(None, late + 2 * SECOND, late + 3 * SECOND),
            2 * SECOND
        );
        assert_rate(&backoff, late + 5 * SECOND, 4.5);
    }

    #[tokio::test(start_paused = true)]
    async fn what_another_replica_heard_is_no_news_when_it_is_heard_here() {
        let (mut backoff, asked) = backoff();
        let (chosen, rate) = (SECOND, 7.5);
        let until = asked + 2 * SECOND;
        backoff.take_over(Backed { until, rate, chosen }, asked + SECOND);
        assert_eq!(backoff.rate_limited(None, asked, until + SECOND), Duration::ZERO);
        assert_rate(&backoff, until + SECOND, 8.0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_that_is_long_over_makes_nothing_old_that_was_asked_since() {
        let (mut backoff, until) = backoff();
        let (chosen, rate) = (SECOND, 7.5);
        let asked = until + 3600 * SECOND;
        backoff.take_over(Backed { until, rate, chosen }, asked + SECOND);
        assert_eq!(backoff.rate_limited(None, asked, asked + 2 * SECOND), SECOND);
        assert_rate(&backoff, asked + 3 * SECOND, 7.5);
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_of_our_own_choosing_double_up_to_thirty_seconds_and_the_rate_never_falls_below_one() {
        let (mut backoff, mut now) = backoff();
        let margin = Duration::from_millis(30);
        backoff.set_pace(Pace {
            margin,
            ..backoff.pace()
        });
        for expected in [1, 2, 4, 8, 16, 30, 30] {
            let pause = backoff.rate_limited(None, now, now);
            assert_eq!(pause, expected * SECOND);
            now += pause;
            assert!(backoff.rate(now) >= 1.03);
        }
        // Of so many emission intervals in 1.03 s, one a second.
        assert_rate(&backoff, now, 1.03);
        now += 60 * SECOND;
        assert_eq!(backoff.rate_limited(None, now, now), SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn the_lowest_limit_is_halved_too_also_where_another_replica_heard_of_it() {
        let (mut backoff, mut now) = backoff_at(1);
        for expected in [1, 2, 4] {
            let pause = backoff.rate_limited(None, now, now);
            assert_eq!(pause, expected * SECOND);
            now += pause;
            assert_rate(&backoff, now, 0.5);
        }
        let (mut another, _) = backoff_at(1);
        another.take_over(backoff.backed().unwrap(), now);
        assert_rate(&another, now, 0.5);
        assert_eq!(another.rate_limited(None, now + SECOND, now + SECOND), 8 * SECOND);
        assert_rate(&backoff, now + 15 * SECOND, 1.0);
    }
}
