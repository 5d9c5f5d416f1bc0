//! How long a live answer is served before upstream is asked again: as long as it takes to refresh all live tasks within
//! four fifths of the account's rate, no less than the floor, no more than the ceiling; and how a client shortens it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::harness::client::poll_request;
use crate::harness::paused::{Behaviour, Paused, json, most_in_a_second, success};
use crate::harness::{Gateway, KEY, Reply, Simulator, poll, poll_as};

const LIVE_TASKS: &str = "crun_gateway_live_tasks{account=\"other\"}";
const FRESHNESS: &str = "crun_gateway_freshness_seconds{account=\"other\"}";

/// What the default pace allows.
const RATE: f64 = 15.0 / 1.03;

fn running(task: &str) -> Response<Full<Bytes>> {
    json(&serde_json::json!({ "code": 200, "message": "success", "data": { "task_id": task, "status": "running" } }))
}

/// Tasks go on, but for those that are named after how they end: `ended…`, `lost…`, and after the first answer `ends…` and
/// `goes…`.
fn as_named(count: usize, task: &str) -> Response<Full<Bytes>> {
    if task.starts_with("ended") || (task.starts_with("ends") && count > 0) {
        success(task)
    } else if task.starts_with("lost") || (task.starts_with("goes") && count > 0) {
        json(&serde_json::json!({ "code": 404, "message": "Task not found", "data": null }))
    } else {
        running(task)
    }
}

fn start() -> Arc<Paused> {
    let behaviour = Behaviour {
        answer: as_named,
        ..Behaviour::default()
    };
    Arc::new(Paused::start(behaviour, |config| {
        config.budget.max_wait = Duration::from_secs(45);
        config.budget.max_queue = 10_000;
    }))
}

/// Polls `count` different tasks at once, each once.
async fn poll_all(gateway: &Arc<Paused>, name: &str, count: usize) {
    let mut polls = JoinSet::new();
    for number in 0..count {
        let (gateway, task) = (Arc::clone(gateway), format!("{name}-{number}"));
        polls.spawn(async move { gateway.poll(KEY, &task).await });
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
}

/// Polls with a Cache-Control of the client's.
async fn poll_with(gateway: &Paused, task: &str, cache_control: &str) -> Reply {
    let mut request = poll_request(KEY, task);
    request
        .headers_mut()
        .insert("cache-control", cache_control.parse().unwrap());
    gateway.ask(request).await
}

fn age(reply: &Reply) -> f64 {
    reply.header("age").unwrap().parse().unwrap()
}

#[track_caller]
fn assert_hit(reply: &Reply) {
    let status = reply.header("cache-status").unwrap();
    assert!(status.starts_with("crun-gateway; hit;"), "{status}");
}

#[track_caller]
fn assert_refetched(reply: &Reply) {
    let status = reply.header("cache-status").unwrap();
    assert!(status.starts_with("crun-gateway; fwd=stale;"), "{status}");
    assert_eq!(reply.header("age"), Some("0"));
}

#[track_caller]
fn assert_about(value: f64, expected: f64) {
    assert!((value - expected).abs() < 0.01, "{value}, not {expected}");
}

#[tokio::test(start_paused = true)]
async fn two_hundred_live_tasks_polled_for_a_minute_by_fifty_clients() {
    let gateway = start();
    poll_all(&gateway, "live", 200).await;
    let start = Instant::now();
    let (before, lifetime) = (gateway.arrivals().len(), gateway.metric(FRESHNESS));
    assert_eq!(before, 200);
    assert_about(lifetime, 200.0 / (0.8 * RATE));
    let mut clients = JoinSet::new();
    for client in 0..50 {
        let gateway = Arc::clone(&gateway);
        clients.spawn(async move {
            // They do not come in step.
            let mut next = start + Duration::from_millis(40 * client);
            let mut polls = JoinSet::new();
            while next < start + Duration::from_mins(1) {
                sleep_until(next).await;
                next += Duration::from_secs(2);
                for task in 0..4 {
                    let (gateway, task) = (Arc::clone(&gateway), format!("live-{}", 4 * client + task));
                    polls.spawn(async move { gateway.poll(KEY, &task).await });
                }
            }
            polls.join_all().await
        });
    }
    let replies = clients.join_all().await.into_iter().flatten().collect::<Vec<_>>();
    assert_eq!(replies.len(), 50 * 4 * 30);
    for reply in replies {
        assert_eq!(reply.status, 200, "{reply:?}");
        assert_eq!(reply.json()["data"]["status"], "running");
        assert!(age(&reply) <= lifetime + 1.0, "{reply:?}");
    }
    let arrivals = gateway.arrivals();
    let most = most_in_a_second(&arrivals);
    assert!(most <= 15, "{most} in a second");
    // Each is refreshed as often as its lifetime allows, by the first poll after that.
    let refreshed = arrivals.len() - before;
    assert!((500..=800).contains(&refreshed), "{refreshed}");
}

#[tokio::test(start_paused = true)]
async fn every_client_may_poll_every_task() {
    let gateway = start();
    poll_all(&gateway, "live", 200).await;
    let lifetime = gateway.metric(FRESHNESS);
    for _ in 0..12 {
        let mut polls = JoinSet::new();
        for poll in 0..600 {
            let (gateway, task) = (Arc::clone(&gateway), format!("live-{}", poll % 200));
            polls.spawn(async move { gateway.poll(KEY, &task).await });
        }
        for reply in polls.join_all().await {
            assert_eq!(reply.status, 200, "{reply:?}");
            assert!(age(&reply) <= lifetime + 1.0, "{reply:?}");
        }
        sleep(Duration::from_secs(2)).await;
    }
    assert!(most_in_a_second(&gateway.arrivals()) <= 15);
}

#[tokio::test(start_paused = true)]
async fn few_live_tasks_are_fresh_for_the_floor() {
    let gateway = start();
    assert_about(gateway.metric(LIVE_TASKS), 0.0);
    assert_about(gateway.metric(FRESHNESS), 2.0);
    poll_all(&gateway, "live", 10).await;
    assert_about(gateway.metric(LIVE_TASKS), 10.0);
    assert_about(gateway.metric(FRESHNESS), 2.0);
    assert_hit(&gateway.poll(KEY, "live-9").await);
    sleep(Duration::from_secs(2)).await;
    assert_refetched(&gateway.poll(KEY, "live-9").await);
}

/// Tasks that go on, and then wait to begin again.
fn steps_back(count: usize, task: &str) -> Response<Full<Bytes>> {
    let status = if count == 0 { "running" } else { "pending" };
    json(&serde_json::json!({ "code": 200, "message": "success", "data": { "task_id": task, "status": status } }))
}

#[tokio::test(start_paused = true)]
async fn a_live_task_that_steps_back_is_asked_for_no_more_often_than_any_other() {
    let behaviour = Behaviour {
        answer: steps_back,
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |_| {});
    assert_eq!(gateway.poll(KEY, "live").await.json()["data"]["status"], "running");
    sleep(Duration::from_secs(2)).await;
    assert_refetched(&gateway.poll(KEY, "live").await);
    for _ in 0..10 {
        let reply = gateway.poll(KEY, "live").await;
        assert_hit(&reply);
        assert_eq!(reply.json()["data"]["status"], "pending");
    }
    assert_eq!(gateway.arrivals().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn many_live_tasks_are_fresh_for_longer_up_to_the_ceiling() {
    let gateway = start();
    poll_all(&gateway, "live", 100).await;
    let stretched = 100.0 / (0.8 * RATE);
    assert_about(gateway.metric(FRESHNESS), stretched);
    sleep(Duration::from_secs_f64(stretched - 1.0)).await;
    assert_hit(&gateway.poll(KEY, "live-99").await);
    poll_all(&gateway, "more", 400).await;
    assert_about(gateway.metric(LIVE_TASKS), 500.0);
    assert_about(gateway.metric(FRESHNESS), 30.0);
    let last = gateway.poll(KEY, "more-399").await;
    assert_hit(&last);
    assert!(last.header("cache-status").unwrap().contains("ttl=30"), "{last:?}");
    sleep(Duration::from_secs(30)).await;
    assert_refetched(&gateway.poll(KEY, "more-399").await);
}

#[tokio::test(start_paused = true)]
async fn a_fresh_answer_may_be_older_than_a_snapshot() {
    let behaviour = Behaviour {
        answer: as_named,
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |config| {
        config.budget.max_wait = Duration::from_secs(45);
        config.cache.max_stale = Duration::from_secs(1);
    }));
    poll_all(&gateway, "live", 100).await;
    sleep(Duration::from_secs(5)).await;
    assert_hit(&gateway.poll(KEY, "live-99").await);
}

#[tokio::test(start_paused = true)]
async fn that_a_task_is_not_found_any_more_is_the_newer_word_though_it_was_running() {
    let gateway = start();
    poll_all(&gateway, "live", 200).await;
    assert_eq!(gateway.poll(KEY, "goes").await.status, 200);
    sleep(Duration::from_secs(3)).await;
    let newer = poll_with(&gateway, "goes", "max-age=0").await;
    assert_eq!(newer.json()["code"], 404);
    for _ in 0..4 {
        let reply = gateway.poll(KEY, "goes").await;
        assert_eq!(reply.json()["code"], 404, "{reply:?}");
        assert_hit(&reply);
        let reply = poll_with(&gateway, "goes", "max-age=0").await;
        assert_eq!(reply.json()["code"], 404, "{reply:?}");
        sleep(Duration::from_secs(1)).await;
    }
    // Once it is kept no longer, upstream is asked, and not believed what it said before.
    sleep(Duration::from_secs(2)).await;
    let again = gateway.poll(KEY, "goes").await;
    assert_eq!(again.json()["code"], 404, "{again:?}");
    assert_refetched(&again);
}

#[tokio::test(start_paused = true)]
async fn the_lifetime_moves_for_what_is_kept_already() {
    let gateway = start();
    gateway.poll(KEY, "live").await;
    poll_all(&gateway, "ends", 200).await;
    let old = gateway.poll(KEY, "live").await;
    assert_hit(&old);
    assert!(age(&old) >= 12.0, "kept when two seconds were the lifetime: {old:?}");
    let ttl: f64 = {
        let status = old.header("cache-status").unwrap();
        status.split_once("ttl=").unwrap().1.parse().unwrap()
    };
    assert!((ttl - (17.0 - age(&old))).abs() <= 1.0, "{old:?}");
    sleep(Duration::from_secs(18)).await;
    poll_all(&gateway, "ends", 200).await;
    assert_about(gateway.metric(LIVE_TASKS), 1.0);
    assert_about(gateway.metric(FRESHNESS), 2.0);
    assert_refetched(&gateway.poll(KEY, "live").await);
    sleep(Duration::from_secs(2)).await;
    assert_refetched(&gateway.poll(KEY, "live").await);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_nobody_asks_for_any_more_stops_counting_after_twice_the_ceiling() {
    let gateway = start();
    poll_all(&gateway, "live", 100).await;
    for _ in 0..50 {
        sleep(Duration::from_secs(1)).await;
        gateway.poll(KEY, "live-0").await;
    }
    assert_about(gateway.metric(LIVE_TASKS), 100.0);
    sleep(Duration::from_secs(20)).await;
    assert_about(gateway.metric(LIVE_TASKS), 1.0);
    assert_about(gateway.metric(FRESHNESS), 2.0);
}

#[tokio::test(start_paused = true)]
async fn a_poll_that_is_a_hit_asks_for_its_task_like_any_other() {
    let gateway = start();
    gateway.poll(KEY, "live").await;
    sleep(Duration::from_millis(1900)).await;
    assert_hit(&gateway.poll(KEY, "live").await);
    sleep(Duration::from_millis(59_900)).await;
    assert_about(gateway.metric(LIVE_TASKS), 1.0);
    sleep(Duration::from_millis(200)).await;
    assert_about(gateway.metric(LIVE_TASKS), 0.0);
}

#[tokio::test(start_paused = true)]
async fn ids_that_are_not_found_stretch_nothing() {
    let gateway = start();
    poll_all(&gateway, "lost", 300).await;
    poll_all(&gateway, "ended", 300).await;
    assert_about(gateway.metric(LIVE_TASKS), 0.0);
    assert_about(gateway.metric(FRESHNESS), 2.0);
}

#[tokio::test(start_paused = true)]
async fn accounts_have_lifetimes_of_their_own() {
    let gateway = start();
    poll_all(&gateway, "live", 200).await;
    gateway.poll("ak_another", "live-0").await;
    assert_about(gateway.metric(LIVE_TASKS), 201.0);
    assert_about(gateway.metric(FRESHNESS), 200.0 / (0.8 * RATE));
    sleep(Duration::from_secs(3)).await;
    assert_hit(&gateway.poll(KEY, "live-199").await);
    assert_refetched(&gateway.poll("ak_another", "live-0").await);
}

#[tokio::test(start_paused = true)]
async fn a_client_may_want_a_live_answer_to_be_younger_but_not_below_the_floor() {
    let gateway = start();
    poll_all(&gateway, "live", 200).await;
    assert_hit(&poll_with(&gateway, "live-199", "max-age=0").await);
    sleep(Duration::from_secs(3)).await;
    for (task, has_no_effect) in [
        ("live-190", "max-age=4"),
        ("live-191", "max-age=3600"),
        ("live-192", "max-age=-1"),
        ("live-193", "no-store"),
    ] {
        assert_hit(&poll_with(&gateway, task, has_no_effect).await);
    }
    for (task, wish) in [
        ("live-194", "max-age=3"),
        ("live-195", "max-age=0"),
        ("live-196", "no-cache"),
        ("live-197", "no-store, Max-Age=\"0\""),
    ] {
        let queries = gateway.arrivals().len();
        assert_refetched(&poll_with(&gateway, task, wish).await);
        assert_hit(&poll_with(&gateway, task, wish).await);
        assert_eq!(gateway.arrivals().len(), queries + 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_cannot_have_ended_tasks_or_unknown_ids_asked_for_again() {
    let gateway = start();
    poll_all(&gateway, "ended", 1).await;
    sleep(Duration::from_secs(3)).await;
    poll_all(&gateway, "lost", 1).await;
    sleep(Duration::from_secs(3)).await;
    assert_hit(&poll_with(&gateway, "ended-0", "max-age=0").await);
    assert_hit(&poll_with(&gateway, "lost-0", "no-cache").await);
    assert_eq!(gateway.arrivals().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_client_cannot_have_a_younger_answer_while_others_wait_for_their_turn() {
    let gateway = start();
    poll_all(&gateway, "live", 200).await;
    sleep(Duration::from_secs(3)).await;
    let others = {
        let gateway = Arc::clone(&gateway);
        tokio::spawn(async move { poll_all(&gateway, "other", 20).await })
    };
    sleep(Duration::from_millis(500)).await;
    assert_hit(&poll_with(&gateway, "live-199", "max-age=0").await);
    others.await.unwrap();
    assert_refetched(&poll_with(&gateway, "live-199", "max-age=0").await);
}

#[tokio::test]
async fn a_configured_account_shows_its_live_tasks() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let accounts = "accounts: [{ name: music, keys: [{ env: MUSIC_KEY }] }]";
    let gateway = Gateway::start_with_env(&upstream.url, accounts, &[("MUSIC_KEY", "ak_music")]).await;
    let live = "crun_gateway_live_tasks{account=\"music\"}";
    assert_about(gateway.metric(live).await, 0.0);
    assert_about(
        gateway
            .metric("crun_gateway_freshness_seconds{account=\"music\"}")
            .await,
        2.0,
    );
    poll_as(gateway.address, "ak_music", "running.a").await;
    poll(gateway.address, "ended.a").await;
    assert_about(gateway.metric(live).await, 1.0);
    assert_about(gateway.metric(LIVE_TASKS).await, 0.0);
}
