//! A poll that cannot be served by its deadline hears so at once, and when to come back.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::harness::paused::{Behaviour, Paused, goodput, json, most_in_a_second, running, success};
use crate::harness::{KEY, Reply};

const GREEDY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
const MODEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

/// `budget.max_wait` as shipped, and how long nothing is granted after the start.
const MAX_WAIT: Duration = Duration::from_secs(10);
const HOLD: Duration = Duration::from_millis(1030);

/// What is answered in no more time than this was answered at once.
const AT_ONCE: Duration = Duration::from_millis(20);

/// One poll: how long it took, and what came.
struct Polled {
    task: String,
    took: Duration,
    reply: Reply,
}

impl Polled {
    /// The seconds after which a poll that was turned away may come back; everything about its answer is as promised.
    #[track_caller]
    fn retry_after(&self) -> u64 {
        self.reply.assert_is_our_error(429);
        let wait = self.reply.header("retry-after").unwrap();
        assert_eq!(self.reply.header("ratelimit-policy"), Some("\"account\";q=15;w=1"));
        assert_eq!(
            self.reply.header("ratelimit"),
            Some(&*format!("\"account\";r=0;t={wait}"))
        );
        assert_eq!(self.reply.header("cache-status"), Some("crun-gateway; detail=budget"));
        wait.parse().unwrap()
    }
}

/// Polls of as many tasks, all at once.
async fn rush(gateway: &Arc<Paused>, peer: IpAddr, tasks: impl Iterator<Item = String>) -> Vec<Polled> {
    let mut polls = JoinSet::new();
    for task in tasks {
        let gateway = Arc::clone(gateway);
        polls.spawn(async move {
            let asked = Instant::now();
            let reply = gateway.poll_from(peer, KEY, &task).await;
            let took = asked.elapsed();
            Polled { task, took, reply }
        });
    }
    polls.join_all().await
}

fn tasks(name: &str, count: u32) -> impl Iterator<Item = String> {
    (0..count).map(move |number| format!("{name}-{number}"))
}

/// Whoever asked at `started` and was `refused` heard so at once, and is served when told to come back.
async fn are_served_when_told_to_come_back(gateway: &Arc<Paused>, started: Instant, refused: Vec<Polled>) {
    let mut again = JoinSet::new();
    for polled in refused {
        assert!(polled.took <= AT_ONCE, "{:?}", polled.took);
        let come_back = started + Duration::from_secs(polled.retry_after());
        let gateway = Arc::clone(gateway);
        again.spawn(async move {
            sleep_until(come_back).await;
            gateway.poll_from(GREEDY, KEY, &polled.task).await
        });
    }
    for reply in again.join_all().await {
        assert_eq!(reply.status, 200, "came back when it was told to: {reply:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_cannot_be_served_in_time_hears_so_at_once_and_is_served_when_told_to_come_back() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |_| {}));
    // So that the time upstream takes is known.
    assert_eq!(gateway.poll(KEY, "first").await.status, 200);
    sleep_until(Instant::now() + Duration::from_secs(1)).await;
    let started = Instant::now();
    let polled = rush(&gateway, GREEDY, tasks("task", 300)).await;
    let (served, refused): (Vec<_>, Vec<_>) = polled.into_iter().partition(|polled| polled.reply.status == 200);
    // One every 68.7 ms for 10 s, less the 100 ms that an answer takes.
    assert!((143..=146).contains(&served.len()), "{} served", served.len());
    for polled in &served {
        assert!(polled.took <= MAX_WAIT, "{:?}", polled.took);
    }
    are_served_when_told_to_come_back(&gateway, started, refused).await;
    assert!(started.elapsed() < Duration::from_secs(23), "{:?}", started.elapsed());
    assert_eq!(gateway.arrivals().len(), 301, "whoever was refused cost nothing");
    assert!(most_in_a_second(&gateway.arrivals()) <= 15);
    let shed = "crun_gateway_budget_shed_total{account=\"other\",reason=\"admission\"}";
    let turned_away = gateway.metric(shed) - (300 - served.len()) as f64;
    assert!(turned_away.abs() < 0.5, "{turned_away} more than refused");
}

#[tokio::test(start_paused = true)]
async fn in_the_first_rush_after_a_start_nobody_waits_for_an_answer_that_comes_too_late() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |_| {}));
    let started = Instant::now();
    let mut refused = rush(&gateway, GREEDY, tasks("task", 300)).await;
    refused.retain(|polled| polled.reply.status != 200);
    are_served_when_told_to_come_back(&gateway, started, refused).await;
}

#[tokio::test(start_paused = true)]
async fn upstreams_own_time_counts() {
    let slow = Behaviour {
        latency: Duration::from_secs(3),
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(slow, |_| {}));
    assert_eq!(gateway.poll(KEY, "first").await.status, 200);
    for polled in rush(&gateway, GREEDY, tasks("task", 300)).await {
        if polled.reply.status != 200 {
            polled.retry_after();
            assert!(polled.took <= AT_ONCE, "{:?}", polled.took);
        }
    }
    let served = gateway.arrivals().len() - 1;
    assert!(
        (100..=103).contains(&served),
        "in the 7 s that leave upstream its 3: {served}"
    );
}

/// A gateway that may have so many connections, and has answered a rush of `known` polls, so that it is known how long
/// `latency` is; nobody waits any more.
async fn with_connections(connections: usize, limit: u32, latency: Duration, known: u32) -> Arc<Paused> {
    let slow = Behaviour {
        latency,
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(slow, |config| {
        config.upstream.connections = connections;
        config.budget.limit = limit.try_into().unwrap();
    }));
    sleep(HOLD).await;
    for polled in rush(&gateway, GREEDY, tasks("known", known)).await {
        assert_eq!(polled.reply.status, 200, "{:?}", polled.reply);
    }
    gateway
}

#[tokio::test(start_paused = true)]
async fn where_connections_are_too_few_the_turns_are_no_faster_than_they_come_free() {
    let gateway = with_connections(4, 15, Duration::from_secs(1), 8).await;
    let started = Instant::now();
    let polled = rush(&gateway, GREEDY, tasks("task", 100)).await;
    let (served, refused): (Vec<_>, Vec<_>) = polled.into_iter().partition(|polled| polled.reply.status == 200);
    // Four a second in the 9 s that are left to be asked in.
    assert!((34..=37).contains(&served.len()), "{} served", served.len());
    are_served_when_told_to_come_back(&gateway, started, refused).await;
    assert!(started.elapsed() < Duration::from_secs(28), "{:?}", started.elapsed());
}

/// So many polls a second for as long as `OVERLOAD`: those that were answered, and those that were not.
async fn one_after_the_other(gateway: &Arc<Paused>, each_second: u32) -> (Vec<Polled>, Vec<Polled>) {
    let (began, apart) = (Instant::now(), Duration::from_secs(1) / each_second);
    let mut polls = JoinSet::new();
    let mut number = 0;
    while began.elapsed() < OVERLOAD {
        let gateway = Arc::clone(gateway);
        polls.spawn(async move { rush(&gateway, MODEST, tasks(&format!("task-{number}"), 1)).await });
        number += 1;
        sleep_until(began + apart * number).await;
    }
    let polled = polls.join_all().await.into_iter().flatten();
    polled.partition(|polled| polled.reply.status == 200)
}

/// All of them are turned away for want of a turn, and hardly one of them waits for it.
#[track_caller]
fn hear_at_once(refused: &[Polled]) {
    for polled in refused {
        let detail = polled.reply.header("cache-status");
        assert_eq!(detail, Some("crun-gateway; detail=budget"), "{:?}", polled.reply);
    }
    let waited = refused.iter().filter(|polled| polled.took > AT_ONCE).count();
    assert!(
        waited * 100 <= refused.len() && !refused.is_empty(),
        "{waited} of {} waited",
        refused.len()
    );
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_a_connection_to_come_free_hears_at_once_that_it_will_not_in_time() {
    for (connections, limit, latency, each_second) in [(4, 15, 1, 8), (4, 100, 1, 8), (1, 15, 3, 2), (120, 100, 3, 60)]
    {
        let gateway = with_connections(connections, limit, Duration::from_secs(latency), 2).await;
        let (served, refused) = one_after_the_other(&gateway, each_second).await;
        hear_at_once(&refused);
        // Every connection is of use all the time.
        let most = connections as f64 / latency as f64 * (OVERLOAD + MAX_WAIT).as_secs_f64();
        assert!(served.len() as f64 >= 0.9 * most, "{} served, not {most}", served.len());
    }
}

#[tokio::test(start_paused = true)]
async fn nor_does_anybody_wait_in_vain_where_the_process_has_few_connections_or_each_has_to_be_opened() {
    const TENTH: Duration = Duration::from_millis(100);
    let shared = Paused::start(
        Behaviour {
            latency: TENTH * 10,
            ..Behaviour::default()
        },
        |config| config.limits.upstream_connections = 4,
    );
    let closing = Paused::start(
        Behaviour {
            opening: |_| TENTH * 3,
            latency: TENTH,
            answer: |_, task| {
                let mut answer = success(task);
                let headers = answer.headers_mut();
                headers.insert("connection", "close".parse().unwrap());
                answer
            },
            ..Behaviour::default()
        },
        |config| config.upstream.connections = 4,
    );
    for (gateway, each_second, possible) in [(shared, 8, 4.0), (closing, 14, 10.0)] {
        let gateway = Arc::new(gateway);
        sleep(HOLD).await;
        rush(&gateway, GREEDY, tasks("known", 8)).await;
        let (served, refused) = one_after_the_other(&gateway, each_second).await;
        hear_at_once(&refused);
        let most = possible * (OVERLOAD + MAX_WAIT).as_secs_f64();
        assert!(served.len() as f64 >= 0.9 * most, "{} served, not {most}", served.len());
    }
}

#[tokio::test(start_paused = true)]
async fn that_the_first_few_connections_are_slow_to_open_has_nobody_turned_away() {
    let behaviour = Behaviour {
        opening: |_| Duration::from_millis(500),
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |config| config.upstream.connections = 4));
    sleep(HOLD).await;
    for polled in rush(&gateway, MODEST, tasks("task", 130)).await {
        assert_eq!(polled.reply.status, 200, "{:?}", polled.reply);
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_a_silent_upstream_hears_that_it_is_in_vain_though_nothing_else_happens() {
    let behaviour = Behaviour {
        varies: |task| Duration::from_secs(if task.starts_with("hangs") { 100 } else { 0 }),
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |config| config.upstream.connections = 4));
    sleep(HOLD).await;
    rush(&gateway, MODEST, tasks("known", 12)).await;
    sleep(Duration::from_secs(1)).await;
    let polled = rush(&gateway, MODEST, tasks("hangs", 30)).await;
    let refused = polled.iter().filter(|polled| polled.reply.status == 429);
    let took: Vec<_> = refused.map(|polled| polled.took).collect();
    // Four have connections, and one is the next to have one.
    assert_eq!(took.len(), 25);
    let longest = took.iter().max().unwrap();
    assert!(*longest < Duration::from_secs(4), "{longest:?}");
}

#[tokio::test(start_paused = true)]
async fn whoever_has_waited_longest_has_the_connection_that_comes_free() {
    let behaviour = Behaviour {
        latency: Duration::from_millis(400),
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |config| {
        config.upstream.connections = 2;
        config.budget.max_wait = Duration::from_secs(4);
    }));
    sleep(HOLD).await;
    let mut pollers = JoinSet::new();
    for poller in 0..12 {
        let gateway = Arc::clone(&gateway);
        pollers.spawn(async move {
            for task in 0..20 {
                let asked = Instant::now();
                let reply = gateway.poll_from(MODEST, KEY, &format!("task-{poller}-{task}")).await;
                assert_eq!(reply.status, 200, "{reply:?}");
                // Twelve, two at a time.
                let took = asked.elapsed();
                assert!(took <= Duration::from_millis(2900), "{took:?}");
            }
        });
    }
    pollers.join_all().await;
}

#[tokio::test(start_paused = true)]
async fn whoever_has_a_snapshot_waits_for_a_connection_no_longer_than_for_an_answer() {
    let behaviour = Behaviour {
        answer: |_, task| running(task),
        varies: |task| Duration::from_secs(if task == "hangs" { 8 } else { 0 }),
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |config| config.upstream.connections = 1));
    assert_eq!(gateway.poll(KEY, "a").await.status, 200);
    sleep(Duration::from_secs(3)).await;
    let hanging = Arc::clone(&gateway);
    tokio::spawn(async move { hanging.poll(KEY, "hangs").await });
    sleep(Duration::from_millis(500)).await;
    let asked = Instant::now();
    let reply = gateway.poll(KEY, "a").await;
    assert_eq!(asked.elapsed().as_millis() / 100, 10, "{:?}", asked.elapsed());
    let status = reply.header("cache-status").unwrap();
    assert!(status.ends_with("detail=upstream_slow"), "{status}");
}

/// A number from 0 to 1, another for each task.
fn drawn(task: &str) -> f64 {
    let mut hasher = DefaultHasher::new();
    task.hash(&mut hasher);
    hasher.finish() as f64 / u64::MAX as f64
}

/// For how long there are more polls than the budget allows.
const OVERLOAD: Duration = Duration::from_secs(40);

/// What comes of a rush of 120 polls and 18 a second after it.
async fn overload(latency: Duration, varies: fn(&str) -> Duration) -> Vec<Polled> {
    let upstream = Behaviour {
        latency,
        varies,
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(upstream, |_| {}));
    sleep(HOLD).await;
    let (began, apart) = (Instant::now(), Duration::from_secs(1) / 18);
    let mut polls = JoinSet::new();
    let mut number = 0;
    while began.elapsed() < OVERLOAD {
        let (gateway, name, count) = (
            Arc::clone(&gateway),
            format!("task-{number}"),
            if number == 0 { 120 } else { 1 },
        );
        polls.spawn(async move { rush(&gateway, MODEST, tasks(&name, count)).await });
        number += 1;
        sleep_until(began + apart * number).await;
    }
    polls.join_all().await.into_iter().flatten().collect()
}

#[tokio::test(start_paused = true)]
async fn under_steady_overload_hardly_anybody_waits_for_an_answer_that_comes_too_late() {
    let uniform: fn(&str) -> Duration = |task| Duration::from_millis(450).mul_f64(drawn(task));
    let exponential: fn(&str) -> Duration =
        |task| Duration::from_millis(300).mul_f64(-(1.0 - drawn(task)).max(1e-6).ln());
    let constant: fn(&str) -> Duration = |_| Duration::ZERO;
    for (ms, varies) in [(50, uniform), (0, exponential), (4500, constant), (6000, constant)] {
        let latency = Duration::from_millis(ms);
        let polled = overload(latency, varies).await;
        let with = |status: u16| polled.iter().filter(|polled| polled.reply.status == status).count();
        let (served, late) = (with(200), with(504));
        assert!(
            late * 100 <= polled.len(),
            "{ms} ms: {late} of {} too late",
            polled.len()
        );
        // Every permit is of use, until upstream's own time is all that is left of the last poll's.
        let in_time = (OVERLOAD + MAX_WAIT).as_secs_f64() - latency.as_secs_f64();
        let least = 14.0 * (in_time - 1.0);
        assert!(served as f64 >= least, "{ms} ms: {served} served, not {least}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_that_hangs_has_nobody_turned_away_who_asks_for_others() {
    let behaviour = Behaviour {
        varies: |task| Duration::from_secs(if task == "hangs" { 100 } else { 0 }),
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |_| {}));
    sleep(HOLD).await;
    rush(&gateway, MODEST, tasks("before", 12)).await;
    let hanging = tokio::spawn({
        let gateway = Arc::clone(&gateway);
        async move { gateway.poll_from(GREEDY, KEY, "hangs").await }
    });
    sleep(Duration::from_secs(7)).await;
    for polled in rush(&gateway, MODEST, tasks("after", 30)).await {
        assert_eq!(polled.reply.status, 200, "{:?}", polled.reply);
    }
    hanging.abort();
}

/// The answers about tasks of this name take 7 s.
const SLOW: &str = "slow";

/// Answers in 100 ms, but for those.
fn slow_about_some() -> Arc<Paused> {
    let behaviour = Behaviour {
        varies: |task| Duration::from_millis(if task.starts_with(SLOW) { 6900 } else { 0 }),
        ..Behaviour::default()
    };
    Arc::new(Paused::start(behaviour, |_| {}))
}

#[tokio::test(start_paused = true)]
async fn an_account_whose_answers_are_slow_has_nobody_turned_away_who_polls_with_another() {
    let gateway = slow_about_some();
    sleep(HOLD).await;
    let mut slow = JoinSet::new();
    for task in tasks(SLOW, 30) {
        let gateway = Arc::clone(&gateway);
        slow.spawn(async move { gateway.poll_from(GREEDY, "ak_slow", &task).await });
    }
    for reply in slow.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    for polled in rush(&gateway, MODEST, tasks("task", 120)).await {
        assert_eq!(polled.reply.status, 200, "{:?}", polled.reply);
    }
}

#[tokio::test(start_paused = true)]
async fn answers_that_are_older_than_a_minute_have_nobody_turned_away() {
    let gateway = slow_about_some();
    sleep(HOLD).await;
    rush(&gateway, MODEST, tasks(SLOW, 30)).await;
    let served = async |name| {
        let polled = rush(&gateway, MODEST, tasks(name, 120)).await;
        polled.iter().filter(|polled| polled.reply.status == 200).count()
    };
    sleep(Duration::from_secs(55)).await;
    let soon = served("soon").await;
    assert!(soon < 60, "{soon} served: what is known of the last minute counts");
    sleep(Duration::from_mins(1)).await;
    rush(&gateway, MODEST, tasks(SLOW, 30)).await;
    sleep(Duration::from_secs(61)).await;
    assert_eq!(served("later").await, 120);
}

#[tokio::test(start_paused = true)]
async fn an_upstream_slower_than_any_poll_may_wait_is_still_asked() {
    let slow = Behaviour {
        latency: Duration::from_secs(3),
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(slow, |config| {
        config.budget.max_wait = Duration::from_secs(2);
    }));
    sleep(HOLD).await;
    for task in ["one", "two"] {
        assert_eq!(gateway.poll(KEY, task).await.status, 504);
        sleep(Duration::from_secs(2)).await;
        assert_eq!(gateway.poll(KEY, task).await.status, 200, "its answer was kept");
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_is_served_at_once_and_refreshed_in_the_background() {
    let live = Behaviour {
        answer: |_, task| if task == "mine" { running(task) } else { success(task) },
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(live, |_| {}));
    assert_eq!(gateway.poll(KEY, "mine").await.status, 200);
    sleep(Duration::from_secs(5)).await;
    let others = {
        let gateway = Arc::clone(&gateway);
        tokio::spawn(async move { rush(&gateway, GREEDY, tasks("task", 300)).await })
    };
    sleep(Duration::from_millis(1)).await;
    // From the same client, so that its place is behind all of them.
    let asked = Instant::now();
    let reply = gateway.poll_from(GREEDY, KEY, "mine").await;
    assert!(asked.elapsed() <= AT_ONCE, "{:?}", asked.elapsed());
    assert_eq!(reply.status, 200);
    let cache_status = reply.header("cache-status").unwrap();
    assert!(
        cache_status.starts_with("crun-gateway; hit; ") && cache_status.ends_with("; detail=budget"),
        "{cache_status}"
    );
    assert_eq!(reply.header("age"), Some("5"));
    for name in ["retry-after", "ratelimit", "ratelimit-policy"] {
        assert_eq!(reply.header(name), None, "{name} is for those who are turned away");
    }
    // One turn in ten is the background's.
    sleep(Duration::from_secs(1)).await;
    let reply = gateway.poll_from(GREEDY, KEY, "mine").await;
    let age: u64 = reply.header("age").unwrap().parse().unwrap();
    assert!(age <= 1, "{age}");
    let others = others.await.unwrap();
    let served = others.iter().filter(|polled| polled.reply.status == 200).count();
    let waited = |lane| {
        let labels = format!("{{account=\"other\",lane=\"{lane}\"}}");
        gateway.metric(&format!("crun_gateway_budget_wait_seconds_count{labels}"))
    };
    // The first answer of `mine`, and its refresh.
    assert!((waited("foreground") - (1 + served) as f64).abs() < 0.5);
    assert!((waited("background") - 1.0).abs() < 0.5);
}

#[tokio::test(start_paused = true)]
async fn a_place_that_others_overtake_past_its_deadline_is_answered_then() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |_| {}));
    assert_eq!(gateway.poll(KEY, "first").await.status, 200);
    let greedy = {
        let gateway = Arc::clone(&gateway);
        tokio::spawn(async move { rush(&gateway, GREEDY, tasks("greedy", 140)).await })
    };
    sleep(Duration::from_secs(2)).await;
    let modest = rush(&gateway, MODEST, tasks("modest", 20)).await;
    for polled in modest {
        assert_eq!(polled.reply.status, 200);
        assert!(polled.took <= Duration::from_secs(3), "{:?}", polled.took);
    }
    let greedy = greedy.await.unwrap();
    let refused: Vec<_> = greedy.iter().filter(|polled| polled.reply.status != 200).collect();
    assert!((14..=20).contains(&refused.len()), "{} refused", refused.len());
    for polled in refused {
        polled.retry_after();
        let overtaken = Duration::from_secs(2);
        assert!(
            (overtaken..=overtaken + AT_ONCE).contains(&polled.took),
            "{:?}",
            polled.took
        );
    }
}

/// The first query of each task is answered 429, with a pause of a minute.
fn pauses_for_a_minute(count: usize, task: &str) -> Response<Full<Bytes>> {
    if count > 0 {
        return success(task);
    }
    let mut response = json(&serde_json::json!({ "code": 429, "message": "slow down", "data": null }));
    response.headers_mut().insert("retry-after", "60".parse().unwrap());
    response
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_pause_that_outlasts_every_deadline() {
    let upstream = Behaviour {
        answer: |count, task| {
            if task.starts_with("pauses") {
                pauses_for_a_minute(count, task)
            } else {
                success(task)
            }
        },
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(upstream, |_| {}));
    sleep(HOLD).await;
    let asked = Instant::now();
    let met = gateway.poll(KEY, "pauses").await;
    assert_eq!(met.json()["code"], 429, "upstream's own bytes: {met:?}");
    assert_eq!(met.header("retry-after"), Some("60"), "{met:?}");
    assert!(asked.elapsed() <= Duration::from_millis(120), "{:?}", asked.elapsed());
    let paused = Instant::now();
    let polled = rush(&gateway, MODEST, tasks("other", 30)).await;
    let mut again = JoinSet::new();
    for polled in polled {
        assert!(polled.took <= AT_ONCE, "{:?}", polled.took);
        let wait = Duration::from_secs(polled.retry_after());
        // Coming then it waits for the end of the pause, and no longer than it may.
        assert!(
            (Duration::from_secs(50)..Duration::from_secs(56)).contains(&wait),
            "{wait:?}"
        );
        let gateway = Arc::clone(&gateway);
        again.spawn(async move {
            sleep_until(paused + wait).await;
            gateway.poll_from(MODEST, KEY, &polled.task).await
        });
    }
    for reply in again.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    let arrivals = gateway.arrivals();
    assert!(arrivals[1] >= paused + Duration::from_mins(1), "the pause is kept");
}

#[tokio::test(start_paused = true)]
async fn nor_does_the_first_who_comes_while_only_a_refresh_waits_for_the_end_of_a_pause() {
    let upstream = Behaviour {
        answer: |count, task| match (task, count) {
            ("live", 0) => running(task),
            ("live", _) => pauses_for_a_minute(0, task),
            _ => success(task),
        },
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(upstream, |_| {}));
    assert_eq!(gateway.poll(KEY, "live").await.status, 200);
    sleep(Duration::from_secs(3)).await;
    assert_eq!(gateway.poll(KEY, "live").await.status, 200, "its snapshot");
    sleep(Duration::from_secs(1)).await;
    for task in ["one", "another"] {
        let polled = rush(&gateway, MODEST, std::iter::once(task.to_owned())).await.remove(0);
        assert!(polled.took <= AT_ONCE, "{:?}", polled.took);
        assert!(polled.retry_after() >= 45);
    }
}

#[tokio::test(start_paused = true)]
async fn a_poll_that_is_turned_away_counts_once_whoever_shared_its_flight() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
        config.budget.max_queue = 20;
    }));
    // Its youngest task, for which it polls five times, is the first to give way.
    let greedy = tasks("task", 20).chain(vec!["last".to_owned(); 5]);
    let newcomers = async {
        // Nothing is granted yet.
        sleep(HOLD / 2).await;
        rush(&gateway, MODEST, tasks("new", 10)).await
    };
    let (greedy, newcomers) = tokio::join!(rush(&gateway, GREEDY, greedy), newcomers);
    let is_refused = |polled: &&Polled| polled.reply.header("cache-status") == Some("crun-gateway; detail=queue_full");
    let last: Vec<_> = greedy.iter().filter(|polled| polled.task == "last").collect();
    assert_eq!((last.len(), last.into_iter().filter(is_refused).count()), (5, 5));
    let refused = greedy.iter().chain(&newcomers).filter(is_refused).count();
    let shed = gateway.metric("crun_gateway_budget_shed_total{account=\"other\",reason=\"queue_full\"}");
    assert!((shed - refused as f64).abs() < 0.5, "{shed} counted, {refused} refused");
}

/// How long those are told to wait, at the most, who gave way in a full queue: about so many.
#[track_caller]
fn longest_told(polled: &[Polled], about: usize) -> u64 {
    let refused = polled.iter().filter(|polled| polled.reply.status != 200);
    let told: Vec<u64> = refused
        .map(|polled| {
            let cache_status = polled.reply.header("cache-status");
            assert_eq!(cache_status, Some("crun-gateway; detail=queue_full"));
            polled.reply.header("retry-after").unwrap().parse().unwrap()
        })
        .collect();
    assert!(told.len().abs_diff(about) <= 2, "{} gave way", told.len());
    told.into_iter().max().unwrap()
}

#[tokio::test(start_paused = true)]
async fn whoever_gives_way_in_a_full_queue_is_told_a_turn_in_its_own_line() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
        config.budget.max_queue = 20;
    }));
    let modest = async {
        // Nothing is granted yet.
        sleep(HOLD / 2).await;
        rush(&gateway, MODEST, tasks("modest", 30)).await
    };
    let (greedy, modest) = tokio::join!(rush(&gateway, GREEDY, tasks("greedy", 300)), modest);
    // Each has ten places. The greedy one was alone when most of the others were turned away.
    let longest = longest_told(&greedy, 290);
    assert!((19..=23).contains(&longest), "{longest}");
    // Twenty turns at half of the rate.
    let longest = longest_told(&modest, 20);
    assert!(longest <= 4, "{longest}");
}

/// Polls, and does as told until it is served: how often it was turned away.
async fn persist(gateway: Arc<Paused>, peer: IpAddr, task: String) -> usize {
    let mut refusals = 0;
    loop {
        let reply = gateway.poll_from(peer, KEY, &task).await;
        if reply.status == 200 {
            return refusals;
        }
        reply.assert_is_our_error(429);
        let wait = reply.header("retry-after").unwrap().parse().unwrap();
        sleep(Duration::from_secs(wait)).await;
        refusals += 1;
    }
}

/// How many were turned away so often: never, once, twice and so on.
fn tally(refusals: impl IntoIterator<Item = usize>) -> BTreeMap<usize, usize> {
    let mut tally = BTreeMap::new();
    for count in refusals {
        *tally.entry(count).or_default() += 1;
    }
    tally
}

#[tokio::test(start_paused = true)]
async fn nobody_who_does_as_told_is_turned_away_twice_however_many_they_are() {
    for (limit, count) in [(15, 800), (1, 60)] {
        let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
            config.budget.limit = limit.try_into().unwrap();
        }));
        sleep(HOLD).await;
        let mut polls = JoinSet::new();
        for task in tasks("task", count) {
            polls.spawn(persist(Arc::clone(&gateway), GREEDY, task));
        }
        let refusals = tally(polls.join_all().await);
        assert!(
            refusals.keys().all(|count| *count <= 1),
            "{limit} a second: {refusals:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn newcomers_do_not_take_the_places_of_those_who_come_back_when_told() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |_| {}));
    sleep(HOLD).await;
    let mut polls = JoinSet::new();
    for task in tasks("first", 120) {
        polls.spawn(persist(Arc::clone(&gateway), GREEDY, task));
    }
    let (began, apart) = (Instant::now(), Duration::from_secs(1) / 18);
    let mut number = 0;
    while began.elapsed() < OVERLOAD {
        polls.spawn(persist(Arc::clone(&gateway), GREEDY, format!("new-{number}")));
        number += 1;
        sleep_until(began + apart * number).await;
    }
    let refusals = tally(polls.join_all().await);
    assert!(refusals.keys().all(|count| *count <= 1), "{refusals:?}");
    let arrivals = gateway.arrivals();
    assert!(goodput(&arrivals) > 14.0, "{}", goodput(&arrivals));
}

/// Asks for one task after the other, and never for one that it was refused; waits as long as it is told, or for `wait`.
async fn goes_on(gateway: Arc<Paused>, peer: IpAddr, name: String, wait: Option<Duration>, served: Arc<AtomicUsize>) {
    for number in 0.. {
        let reply = gateway.poll_from(peer, KEY, &format!("{name}-{number}")).await;
        if reply.status == 200 {
            served.fetch_add(1, Ordering::Relaxed);
        } else {
            let told = || Duration::from_secs(reply.header("retry-after").unwrap().parse().unwrap());
            sleep(wait.unwrap_or_else(told)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_whose_refused_tasks_never_come_back_has_its_part_of_the_turns() {
    const OTHERS: [IpAddr; 2] = [
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, 3)),
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, 4)),
    ];
    for max_wait in [2, 3, 4, 10] {
        let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
            config.budget.max_wait = Duration::from_secs(max_wait);
        }));
        sleep(HOLD).await;
        let (modest, all) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut polls = JoinSet::new();
        for number in 0..30 {
            let name = format!("modest-{number}");
            polls.spawn(goes_on(Arc::clone(&gateway), MODEST, name, None, Arc::clone(&modest)));
        }
        for (peer, number) in OTHERS
            .into_iter()
            .flat_map(|peer| (0..8).map(move |number| (peer, number)))
        {
            let (name, wait) = (format!("{peer}-{number}"), Some(Duration::from_millis(500)));
            polls.spawn(goes_on(Arc::clone(&gateway), peer, name, wait, Arc::clone(&all)));
        }
        sleep(Duration::from_secs(8)).await;
        let before = modest.load(Ordering::Relaxed);
        sleep(Duration::from_secs(20)).await;
        let served = modest.load(Ordering::Relaxed) - before;
        // A third of what can be had is 97.
        assert!(served > 60, "{served} within {max_wait} s");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_heed_retry_after_lengthens_nobody_elses() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |_| {}));
    sleep(HOLD).await;
    let mut greedy = JoinSet::new();
    for number in 0..200 {
        let gateway = Arc::clone(&gateway);
        greedy.spawn(async move {
            for poll in 0.. {
                rush(&gateway, GREEDY, tasks(&format!("greedy-{number}-{poll}"), 1)).await;
                sleep(Duration::from_millis(500)).await;
            }
        });
    }
    sleep(Duration::from_secs(4)).await;
    let mut modest = JoinSet::new();
    let began = Instant::now();
    for task in tasks("modest", 110) {
        modest.spawn(persist(Arc::clone(&gateway), MODEST, task));
    }
    let refusals = tally(modest.join_all().await);
    assert!(refusals.keys().all(|count| *count <= 1), "{refusals:?}");
    // Half of the budget is theirs.
    assert!(began.elapsed() < Duration::from_secs(18), "{:?}", began.elapsed());
}
