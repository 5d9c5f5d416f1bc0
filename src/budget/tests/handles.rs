//! The dispatcher as the task that it is, told what to do by the handles that flights have, on tokio's paused clock.

use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};

use super::super::*;
use super::world::{MARGIN, hold, interval};
use super::{SECOND, ms};
use crate::account::Caller;
use crate::metrics::Metrics;
use crate::outcome::Lane;

/// Longer than any turn takes to come.
const FOR_EVER: Duration = Duration::from_hours(1);

/// A connection, as far as the budget looks at it.
struct Open;

impl Connected for Open {}

fn client() -> Client {
    Client {
        caller: Caller::Token("client".into()),
        name: None,
    }
}

fn metrics() -> AccountMetrics {
    Metrics::new().unwrap().account("music")
}

fn budget(limit: u32, metrics: AccountMetrics) -> Budget {
    let pace = Pace {
        limit: NonZeroU32::new(limit).unwrap(),
        margin: MARGIN,
        not_before: Instant::now() + hold(),
    };
    Budget::new(pace, 1_000_000, None, metrics)
}

/// A flight's whole way to its permit.
async fn permit(budget: &Budget) -> Permit {
    let flight = budget.flight(None);
    let _place = flight.join(client(), 1, Instant::now() + FOR_EVER, Duration::ZERO);
    let turn = flight.enter(Entry::InTurn).await.unwrap();
    turn.permit(&Open).await.unwrap()
}

/// So many flights, each of which writes at once; gives when.
fn flights(budget: &Budget, count: usize) -> JoinSet<Instant> {
    let mut flights = JoinSet::new();
    for _ in 0..count {
        let budget = budget.clone();
        flights.spawn(async move {
            let permit = permit(&budget).await;
            let now = Instant::now();
            permit.written(now);
            now
        });
    }
    flights
}

/// Lets everybody do what there is to do now.
async fn settle() {
    sleep(ms(1)).await;
}

/// tokio's timers tell milliseconds.
#[track_caller]
fn assert_at(at: Instant, expected: Instant) {
    assert!(
        at >= expected && at <= expected + ms(1),
        "{:?} from when it should be",
        expected.max(at) - expected.min(at)
    );
}

#[tokio::test(start_paused = true)]
async fn the_dispatcher_ends_when_the_last_budget_and_the_last_standing_are_gone() {
    let dispatchers = || Handle::current().metrics().num_alive_tasks();
    let budget = budget(15, metrics());
    let another = budget.clone();
    drop(budget);
    let flight = another.flight(None);
    drop(another);
    settle().await;
    assert_eq!(dispatchers(), 1, "a flight stands");
    let place = flight.join(client(), 1, Instant::now() + FOR_EVER, Duration::ZERO);
    let turn = flight.enter(Entry::InTurn).await.unwrap();
    drop((flight, place));
    settle().await;
    assert_eq!(dispatchers(), 1, "it has been called forward");
    let permit = turn.permit(&Open).await.unwrap();
    settle().await;
    assert_eq!(dispatchers(), 0, "it has what it came for");
    permit.written(Instant::now());
}

#[tokio::test(start_paused = true)]
async fn the_gauges_that_accounts_share_lose_what_one_that_goes_added_and_no_more() {
    let metrics = metrics();
    let shown = || {
        let queued = |lane| metrics.queue_length[lane as usize].get();
        (queued(Lane::Foreground), queued(Lane::Background), metrics.paused.get())
    };
    let (goes, stays) = (budget(15, metrics.clone()), budget(15, metrics.clone()));
    let waiting = flights(&goes, 5);
    let kept = goes.flight(Some(Instant::now()));
    kept.keep();
    let entered = tokio::spawn({
        let kept = kept.clone();
        async move { kept.enter(Entry::InTurn).await.is_ok() }
    });
    goes.rate_limited(Some(SECOND), Instant::now(), Instant::now());
    let others = flights(&stays, 2);
    settle().await;
    assert_eq!(shown(), (7, 1, 1));
    drop((waiting, goes, kept));
    entered.abort();
    settle().await;
    assert_eq!(shown(), (2, 0, 0));
    others.join_all().await;
    assert_eq!(shown(), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_pause_is_shown_though_nobody_waits_and_no_longer_than_it_lasts() {
    let metrics = metrics();
    let budget = budget(15, metrics.clone());
    settle().await;
    budget.rate_limited(Some(SECOND), Instant::now(), Instant::now());
    assert_eq!(metrics.paused.get(), 1);
    sleep(SECOND + ms(1)).await;
    assert_eq!(metrics.paused.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_million_a_second_is_a_limit_like_any_other() {
    let start = Instant::now();
    let budget = budget(1_000_000, metrics());
    let written = flights(&budget, 10_000).join_all().await;
    assert_at(*written.iter().min().unwrap(), start + hold());
    // Timers tell milliseconds, and each finds as many ready as are called ahead: no million, and no waiting either.
    let last = *written.iter().max().unwrap();
    assert!(last <= start + hold() + SECOND, "{:?}", last - start);
}

/// However long it lasts: the pace does not drift, and nothing piles up.
#[tokio::test(start_paused = true)]
async fn an_hour_of_more_work_than_upstream_allows() {
    let budget = budget(15, metrics());
    let end = Instant::now() + hold() + FOR_EVER;
    let mut clients = JoinSet::new();
    for _ in 0..30 {
        let budget = budget.clone();
        clients.spawn(async move {
            let mut written = Vec::new();
            while Instant::now() < end {
                let permit = permit(&budget).await;
                let now = Instant::now();
                permit.written(now);
                written.push(now);
            }
            written
        });
    }
    let mut written: Vec<_> = clients.join_all().await.into_iter().flatten().collect();
    written.sort_unstable();
    let span = *written.last().unwrap() - written[0];
    assert!(span >= FOR_EVER);
    #[allow(clippy::cast_precision_loss, reason = "some fifty thousand")]
    let rate = (written.len() - 1) as f64 / span.as_secs_f64();
    assert!(rate >= 14.3, "{rate}/s");
    let sixteenth = |sixteen: &[Instant]| sixteen[15] - sixteen[0];
    assert!(written.windows(16).map(sixteenth).all(|apart| apart >= SECOND));
}

#[tokio::test(start_paused = true)]
async fn a_pause_in_the_middle_of_a_queue_holds_everybody_up_and_nobody_rushes_after_it() {
    let start = Instant::now();
    let budget = budget(15, metrics());
    let flights = flights(&budget, 60);
    let paused = start + hold() + interval(15) * 19 + ms(10);
    sleep_until(paused).await;
    budget.rate_limited(Some(SECOND * 2), paused, paused);
    let mut written = flights.join_all().await;
    written.sort();
    for (number, at) in (0..20).zip(&written) {
        assert_at(*at, start + hold() + interval(15) * number);
    }
    assert_at(written[20], paused + SECOND * 2);
    // At half the rate, and then ever a little faster, up to the whole.
    let gaps: Vec<_> = written[20..].windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps[0] >= ms(136) && gaps[0] <= ms(138), "{gaps:?}");
    assert!(gaps.is_sorted_by(|gap, next| *next <= *gap + ms(1)), "{gaps:?}");
    assert!(gaps.iter().all(|gap| *gap >= interval(15)), "{gaps:?}");
    assert!(gaps[38] < ms(110), "{gaps:?}");
}

#[tokio::test(start_paused = true)]
async fn a_permit_counts_from_its_write_and_no_longer_once_it_is_dropped_unused() {
    let first = Instant::now() + hold();
    let due = first + interval(1);
    let used = [
        // Held for so long, written or not, and when the next one comes.
        (ms(1500), true, first + ms(1500) + ms(1010)),
        (ms(500), true, first + ms(500) + ms(1010)),
        (ms(0), true, due),
        (ms(1500), false, first + ms(1500)),
        (ms(500), false, due),
    ];
    let mut played = JoinSet::new();
    for (held, is_written, next) in used {
        let budget = budget(1, metrics());
        played.spawn(async move {
            let of_budget = budget.clone();
            let holder = async move {
                let permit = permit(&of_budget).await;
                assert_at(Instant::now(), first);
                sleep(held).await;
                if is_written {
                    permit.written(Instant::now());
                }
            };
            let (second, ()) = tokio::join!(
                async {
                    // Behind the first.
                    settle().await;
                    let _permit = permit(&budget).await;
                    Instant::now()
                },
                holder
            );
            assert_at(second, next);
        });
    }
    let patience = SECOND * 10;
    timeout(patience, played.join_all())
        .await
        .expect("the second one comes");
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_dispatcher_ends_the_wait_of_those_who_wait_and_nothing_else() {
    let metrics = metrics();
    let budget = budget(15, metrics.clone());
    let mut first = flights(&budget, 5);
    let mut last = Instant::now();
    while let Some(written) = first.join_next().await {
        last = last.max(written.unwrap());
    }
    let opened_before = budget.flight(None);
    let mut waiting = JoinSet::new();
    for _ in 0..20 {
        let flight = budget.flight(None);
        waiting.spawn(async move {
            let _place = flight.join(client(), 1, Instant::now() + FOR_EVER, Duration::ZERO);
            flight.enter(Entry::InTurn).await
        });
    }
    // None of those called forward says that it has a connection, so that the others wait for good.
    let called = waiting.join_next().await.unwrap().unwrap().unwrap();
    budget.0.tell(|_| panic!("on purpose"));
    settle().await;
    assert_eq!(
        (budget.waiting(), metrics.queue_length[Lane::Foreground as usize].get()),
        (0, 0)
    );
    let sent_away = waiting.join_all().await.into_iter().filter(Result::is_err).count();
    assert!(sent_away >= 10, "{sent_away}");
    assert_eq!(opened_before.enter(Entry::InTurn).await.map(drop), Err(Shed::QueueFull));
    assert!(called.permit(&Open).await.is_none());
    // The pace goes on where it was.
    let mut next: Vec<_> = flights(&budget, 20).join_all().await;
    next.sort_unstable();
    assert!(next[0] >= last + interval(15), "{:?}", next[0] - last);
    let took = next[19] - next[0];
    assert!(took.abs_diff(interval(15) * 19) <= ms(1), "{took:?}");
}
