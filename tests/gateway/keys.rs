//! What upstream says of a key stands above whatever is kept: a refused key costs next to nothing and gets nothing, one
//! not confirmed lately is asked about behind everybody's back, and a client token goes to the next one.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use crun_gateway::account::ApiKey;
use crun_gateway::config::{Account, Client, Config, Key, KeySource};
use http::{Response, StatusCode};
use http_body_util::Full;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::harness::paused::{Away, Behaviour, Paused, json, most_in_a_second, running, success};
use crate::harness::{Gateway, KEY, Reply, Simulator, poll_as};

const OTHER_REFUSED: &str = "crun_gateway_upstream_keys_refused{account=\"other\"}";

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Upstream's refusal, as HTTP status or in a body.
fn refusal(status: u16, code: u16) -> Response<Full<Bytes>> {
    let mut response = json(&serde_json::json!({ "code": code, "message": "upstream's own words", "data": null }));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

fn listed(key: &str) -> Key {
    Key {
        key: ApiKey::new(key).unwrap(),
        source: KeySource::Env("KEY".to_owned()),
    }
}

/// One account with these keys, and a token for all of them.
fn one_account(keys: &[&str]) -> impl FnOnce(&mut Config) {
    let account = Account {
        name: "music".to_owned(),
        keys: keys.iter().map(|key| listed(key)).collect(),
        clients: vec![Client {
            name: "studio".to_owned(),
            token: listed("token"),
            weight: 1,
            passthrough: false,
        }],
    };
    |config| config.accounts = vec![account]
}

fn detail(reply: &Reply) -> Option<&str> {
    let (_, detail) = reply.header("cache-status")?.split_once("detail=")?;
    Some(detail)
}

#[track_caller]
fn assert_code(reply: &Reply, code: u16) {
    assert_eq!(reply.json()["code"], code, "{reply:?}");
}

/// Served from the cache, and not because there was nothing better.
#[track_caller]
fn assert_hit(reply: &Reply) {
    assert_eq!(reply.status, 200, "{reply:?}");
    let status = reply.header("cache-status").unwrap();
    assert!(status.contains("; hit; ") && detail(reply).is_none(), "{status}");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_remembered_for_five_seconds_and_costs_one_query() {
    for (key, status, code) in [
        ("ak_http_401", 401, 401),
        ("ak_http_403", 403, 403),
        ("ak_body_401", 200, 401),
        ("ak_body_403", 200, 403),
    ] {
        let gateway = Arc::new(Paused::start(
            Behaviour {
                to_key: |key, _| {
                    let code = key.rsplit_once('_')?.1.parse().ok()?;
                    Some(refusal(if key.contains("http") { code } else { 200 }, code))
                },
                ..Behaviour::default()
            },
            |_| {},
        ));
        let first = gateway.poll(key, "task").await;
        let refused = Instant::now();
        assert_eq!(first.status, status);
        assert_code(&first, code);
        assert!(first.header("cache-status").unwrap().contains("; fwd=uri-miss; "));
        for tenth in 1..50 {
            sleep_until(refused + Duration::from_millis(100) * tenth).await;
            let before = Instant::now();
            let reply = gateway.poll(key, &format!("task-{tenth}")).await;
            assert!(before.elapsed() < Duration::from_millis(1), "at once");
            assert_eq!((reply.status, &reply.body), (first.status, &first.body));
            assert_eq!(detail(&reply), Some("key_refused"));
            assert_eq!(reply.header("age"), Some((tenth / 10).to_string().as_str()));
        }
        assert_eq!(gateway.arrivals().len(), 1, "{key}");
        assert!((gateway.metric(OTHER_REFUSED) - 1.0).abs() < 0.1);
        // Then one of them all asks again.
        sleep_until(refused + seconds(5)).await;
        let mut polls = JoinSet::new();
        for task in 0..100 {
            let gateway = Arc::clone(&gateway);
            polls.spawn(async move { gateway.poll(key, &format!("again-{task}")).await });
        }
        for reply in polls.join_all().await {
            assert_eq!((reply.status, &reply.body), (first.status, &first.body));
        }
        assert_eq!(gateway.arrivals().len(), 2, "{key}");
    }
}

#[tokio::test(start_paused = true)]
async fn upstreams_retry_after_makes_it_longer() {
    let gateway = Paused::start(
        Behaviour {
            to_key: |_, _| {
                let mut response = refusal(403, 403);
                response.headers_mut().insert("retry-after", 20.into());
                Some(response)
            },
            ..Behaviour::default()
        },
        |_| {},
    );
    gateway.poll(KEY, "a").await;
    let refused = Instant::now();
    for second in 1..20 {
        sleep_until(refused + seconds(second)).await;
        let reply = gateway.poll(KEY, "a").await;
        let ttl = format!("; ttl={};", 20 - second);
        assert!(reply.header("cache-status").unwrap().contains(&ttl), "{reply:?}");
        // What is left of it.
        let left = (20 - second).to_string();
        assert_eq!(reply.header("retry-after"), Some(&*left), "{reply:?}");
    }
    assert_eq!(gateway.arrivals().len(), 1);
    sleep_until(refused + seconds(20)).await;
    gateway.poll(KEY, "a").await;
    assert_eq!(gateway.arrivals().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_queues_with_a_key_when_it_is_refused_is_not_spent() {
    for code in [401, 402] {
        let gateway = Arc::new(Paused::start(
            Behaviour {
                to_key: |key, _| {
                    let code = key.strip_prefix("ak_")?.parse().ok()?;
                    Some(refusal(code, code))
                },
                ..Behaviour::default()
            },
            |_| {},
        ));
        // In the first second nothing is granted, so all of these queue.
        let mut polls = JoinSet::new();
        for task in 0..100 {
            let gateway = Arc::clone(&gateway);
            polls.spawn(async move { gateway.poll(&format!("ak_{code}"), &format!("task-{task}")).await });
        }
        for reply in polls.join_all().await {
            assert_eq!(reply.status, code);
        }
        // What was sent before the first answer was there, 100 ms later.
        assert!(gateway.arrivals().len() <= 3, "{:?}", gateway.arrivals());
    }
}

const GOOD: &str = "ak_good";
const BAD: &str = "ak_bad";

/// Of two keys of one account, the bad one is refused from 100 s until 120 s; in between something before the API
/// fails.
fn bad_for_a_while() -> Behaviour {
    Behaviour {
        answer: |_, task| if task == "live" { running(task) } else { success(task) },
        to_key: |key, after| match after.as_secs() {
            100..110 if key == BAD => Some(refusal(401, 401)),
            110..120 if key == BAD => Some(refusal(503, 503)),
            _ => None,
        },
        ..Behaviour::default()
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_key_gets_nothing_that_is_kept_until_it_is_accepted_again() {
    let start = Instant::now();
    let gateway = Paused::start(bad_for_a_while(), one_account(&[GOOD, BAD]));
    gateway.poll(GOOD, "ended").await;
    gateway.poll(BAD, "own").await;
    assert_hit(&gateway.poll(BAD, "ended").await);
    sleep_until(start + seconds(99)).await;
    gateway.poll(GOOD, "live").await;
    sleep_until(start + seconds(101)).await;
    assert_code(&gateway.poll(BAD, "new").await, 401);
    for task in ["ended", "own", "live"] {
        let reply = gateway.poll(BAD, task).await;
        assert_code(&reply, 401);
        assert_eq!(detail(&reply), Some("key_refused"));
    }
    assert_hit(&gateway.poll(GOOD, "ended").await);
    // On trial, with a query of its own, whatever is kept.
    let before = gateway.arrivals_with(BAD).len();
    sleep_until(start + seconds(108)).await;
    assert_code(&gateway.poll(BAD, "ended").await, 401);
    assert_eq!(gateway.arrivals_with(BAD).len(), before + 1);
    // An error that says nothing of the key leaves it refused: no snapshot.
    sleep_until(start + seconds(115)).await;
    assert_code(&gateway.poll(BAD, "live").await, 503);
    assert_code(&gateway.poll(BAD, "ended").await, 401);
    let refused = "crun_gateway_upstream_keys_refused{account=\"music\"}";
    assert!((gateway.metric(refused) - 1.0).abs() < 0.1);
    // And what another key fetches at the same moment is not for it.
    sleep_until(start + seconds(121)).await;
    let before = gateway.queries().len();
    let (good, bad) = tokio::join!(gateway.poll(GOOD, "both"), gateway.poll(BAD, "both"));
    assert_eq!((good.status.as_u16(), bad.status.as_u16()), (200, 200));
    let mut keys: Vec<_> = gateway.queries()[before..]
        .iter()
        .map(|query| query.key.clone())
        .collect();
    keys.sort();
    assert_eq!(keys, [BAD, GOOD], "it flew alone");
    assert_hit(&gateway.poll(BAD, "ended").await);
    assert!(gateway.metric(refused).abs() < 0.1);
}

#[tokio::test(start_paused = true)]
async fn only_what_tells_of_a_task_shows_that_a_refused_key_is_accepted_again() {
    let start = Instant::now();
    let gateway = Paused::start(
        Behaviour {
            answer: |_, task| success(task),
            to_key: |key, after| match after.as_secs() {
                100..110 if key == BAD => Some(refusal(401, 401)),
                110..120 if key == BAD => Some(refusal(302, 302)),
                120..130 if key == BAD => Some(refusal(400, 400)),
                130..140 if key == BAD => Some(refusal(200, 422)),
                140..150 if key == BAD => Some(refusal(200, 200)),
                150..160 if key == BAD => Some(refusal(200, 404)),
                _ => None,
            },
            ..Behaviour::default()
        },
        one_account(&[GOOD, BAD]),
    );
    gateway.poll(GOOD, "ended").await;
    sleep_until(start + seconds(101)).await;
    assert_code(&gateway.poll(BAD, "new").await, 401);
    for (at, code) in [(111, 302), (121, 400), (131, 422), (141, 200)] {
        sleep_until(start + seconds(at)).await;
        let own = gateway.poll(BAD, "new").await;
        assert_code(&own, code);
        assert_eq!(detail(&own), None);
        let kept = gateway.poll(BAD, "ended").await;
        assert_code(&kept, 401);
        assert_eq!(detail(&kept), Some("key_refused"), "after {code}");
    }
    sleep_until(start + seconds(151)).await;
    assert_code(&gateway.poll(BAD, "new").await, 404);
    assert_hit(&gateway.poll(BAD, "ended").await);
}

#[tokio::test(start_paused = true)]
async fn missing_credits_say_that_a_refused_key_is_good_again() {
    let start = Instant::now();
    let gateway = Paused::start(
        Behaviour {
            to_key: |_, after| match after.as_secs() {
                100..110 => Some(refusal(401, 401)),
                110.. => Some(refusal(200, 402)),
                _ => None,
            },
            ..Behaviour::default()
        },
        one_account(&[GOOD]),
    );
    gateway.poll(GOOD, "ended").await;
    sleep_until(start + seconds(101)).await;
    assert_code(&gateway.poll(GOOD, "new").await, 401);
    sleep_until(start + seconds(111)).await;
    assert_code(&gateway.poll(GOOD, "new").await, 402);
    assert_hit(&gateway.poll(GOOD, "ended").await);
    let reply = gateway.poll(GOOD, "new").await;
    assert_code(&reply, 402);
    assert_eq!(detail(&reply), Some("no_credits"));
    let refused = "crun_gateway_upstream_keys_refused{account=\"music\"}";
    assert!(gateway.metric(refused).abs() < 0.1);
}

#[tokio::test(start_paused = true)]
async fn a_refused_key_stays_refused_wherever_a_changed_configuration_lists_it() {
    let start = Instant::now();
    let gateway = Paused::start(bad_for_a_while(), one_account(&[BAD, GOOD]));
    gateway.poll(GOOD, "ended").await;
    sleep_until(start + seconds(101)).await;
    assert_code(&gateway.poll(BAD, "new").await, 401);
    for keys in [&["ak_new", BAD, GOOD][..], &[GOOD, BAD], &[BAD]] {
        gateway.list(&[("music", keys)]);
        let reply = gateway.poll(BAD, "ended").await;
        assert_code(&reply, 401);
        assert_eq!(detail(&reply), Some("key_refused"));
    }
    assert_eq!(gateway.arrivals_with(BAD).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_refused_key_stays_refused_whatever_account_it_comes_under() {
    let behaviour = Behaviour {
        to_key: |key, after| (key == BAD && after.as_secs() < 60).then(|| refusal(401, 401)),
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, one_account(&[GOOD]));
    gateway.list(&[("music", &[GOOD]), ("film", &["ak_film"])]);
    for key in [GOOD, "ak_film"] {
        gateway.poll(key, "ended").await;
    }
    assert_code(&gateway.poll(BAD, "own").await, 401);
    let assert_shown_under = |account: &str| {
        for label in ["other", "music", "film"] {
            let series = format!("crun_gateway_upstream_keys_refused{{account=\"{label}\"}}");
            let shown = gateway.metric(&series);
            let expected = f64::from(u8::from(label == account));
            assert!((shown - expected).abs() < 0.1, "{label}: {shown}, under {account}");
        }
    };
    assert_shown_under("other");
    for (account, music, film) in [
        ("music", &[GOOD, BAD][..], &["ak_film"][..]),
        ("film", &[GOOD], &[BAD, "ak_film"]),
        ("other", &[GOOD], &["ak_film"]),
        ("film", &[GOOD], &["ak_film", BAD]),
    ] {
        gateway.list(&[("music", music), ("film", film)]);
        let reply = gateway.poll(BAD, "ended").await;
        assert_code(&reply, 401);
        assert_eq!(detail(&reply), Some("key_refused"), "under {account}");
        assert_shown_under(account);
    }
    assert_eq!(gateway.arrivals_with(BAD).len(), 1);
    // Accepted where it stands now.
    sleep(seconds(60)).await;
    assert_code(&gateway.poll(BAD, "own").await, 200);
    assert_shown_under("nobody");
}

#[tokio::test(start_paused = true)]
async fn what_is_answered_after_a_key_has_come_under_another_account_counts_there() {
    let behaviour = Behaviour {
        latency: seconds(1),
        to_key: |key, _| (key == BAD).then(|| refusal(401, 401)),
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, one_account(&[GOOD]));
    gateway.poll(GOOD, "ended").await;
    let change = async {
        while gateway.arrivals_with(BAD).is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
        gateway.list(&[("music", &[GOOD, BAD])]);
    };
    let (own, ()) = tokio::join!(gateway.poll(BAD, "own"), change);
    assert_code(&own, 401);
    let reply = gateway.poll(BAD, "ended").await;
    assert_code(&reply, 401);
    assert_eq!(detail(&reply), Some("key_refused"));
}

#[tokio::test(start_paused = true)]
async fn a_key_refused_meanwhile_does_not_get_what_another_key_fetched() {
    let gateway = Arc::new(Paused::start(
        Behaviour {
            latency: seconds(1),
            to_key: |key, _| (key == BAD).then(|| refusal(403, 403)),
            ..Behaviour::default()
        },
        one_account(&[GOOD, BAD]),
    ));
    sleep(seconds(2)).await;
    let later = |after: u64, key: &'static str, task: &'static str| {
        let gateway = Arc::clone(&gateway);
        async move {
            sleep(Duration::from_millis(after)).await;
            gateway.poll(key, task).await
        }
    };
    // Refused 1 s after it was sent, when the other's has half a second to go.
    let (own, good, joined) = tokio::join!(
        later(0, BAD, "own"),
        later(500, GOOD, "shared"),
        later(600, BAD, "shared")
    );
    assert_code(&own, 403);
    assert_code(&good, 200);
    assert_code(&joined, 403);
    assert_eq!(detail(&joined), Some("key_refused"));
    assert_eq!(gateway.arrivals().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn without_credits_fresh_answers_go_on_and_the_rest_costs_one_query_in_five_seconds() {
    for [one, other] in [["ak_http_1", "ak_http_2"], ["ak_body_1", "ak_body_2"]] {
        let start = Instant::now();
        let gateway = Paused::start(
            Behaviour {
                answer: |_, task| if task == "live" { running(task) } else { success(task) },
                to_key: |key, after| {
                    let status = if key.contains("body") { 200 } else { 402 };
                    (100..112).contains(&after.as_secs()).then(|| refusal(status, 402))
                },
                ..Behaviour::default()
            },
            one_account(&[one, other]),
        );
        for key in [one, other] {
            gateway.poll(key, &format!("ended-{key}")).await;
        }
        gateway.poll(one, "live").await;
        sleep_until(start + seconds(101)).await;
        let before = gateway.arrivals().len();
        let first = gateway.poll(one, "live").await;
        let refused = Instant::now();
        assert_code(&first, 402);
        for tenth in 1..50 {
            sleep_until(refused + Duration::from_millis(100) * tenth).await;
            // A snapshot is no answer to missing credits, and they are the account's, not the key's.
            for (key, task) in [(one, "live"), (other, "live"), (other, "new"), ("token", "new")] {
                let reply = gateway.poll(key, task).await;
                assert_eq!((reply.status, &reply.body), (first.status, &first.body));
                assert_eq!(detail(&reply), Some("no_credits"));
            }
            for key in [one, other, "token"] {
                assert_hit(&gateway.poll(key, &format!("ended-{one}")).await);
            }
        }
        assert_eq!(gateway.arrivals().len(), before + 1);
        let missing = "crun_gateway_upstream_credits_missing{account=\"music\"}";
        assert!((gateway.metric(missing) - 1.0).abs() < 0.1);
        assert!(
            gateway
                .metric("crun_gateway_upstream_keys_refused{account=\"music\"}")
                .abs()
                < 0.1
        );
        sleep_until(refused + seconds(5)).await;
        assert_code(&gateway.poll(other, "live").await, 402);
        assert_eq!(gateway.arrivals().len(), before + 2);
        // Credits again: the next one to ask finds out for all.
        sleep_until(start + seconds(113)).await;
        for task in ["live", "new"] {
            assert_eq!(gateway.poll(one, task).await.status, 200);
        }
        assert!(gateway.metric(missing).abs() < 0.1);
    }
}

#[tokio::test(start_paused = true)]
async fn missing_credits_are_forgotten_where_whoever_asks_again_hears_of_a_failure_only() {
    for code in [500, 503] {
        let start = Instant::now();
        let gateway = Paused::start(
            Behaviour {
                answer: |_, task| running(task),
                to_key: |key, after| match after.as_secs() {
                    10..12 => Some(refusal(200, 402)),
                    12.. if key.ends_with("500") => Some(refusal(500, 500)),
                    12.. => Some(refusal(503, 503)),
                    _ => None,
                },
                ..Behaviour::default()
            },
            |_| {},
        );
        let (key, other) = (format!("ak_{code}"), format!("ak_other_{code}"));
        let tasks = ["a", "b", "c"];
        for task in tasks {
            assert_code(&gateway.poll(&key, task).await, 200);
            assert_code(&gateway.poll(&other, task).await, 200);
        }
        sleep_until(start + seconds(11)).await;
        for key in [&key, &other] {
            assert_code(&gateway.poll(key, "a").await, 402);
        }
        sleep_until(start + seconds(14)).await;
        for task in tasks {
            assert_eq!(detail(&gateway.poll(&key, task).await), Some("no_credits"));
        }
        // Whoever asks now hears of no more than that upstream fails, and from then on everybody.
        sleep_until(start + seconds(17)).await;
        for _ in 0..10 {
            for task in tasks {
                assert_code(&gateway.poll(&key, task).await, 200);
                sleep(Duration::from_millis(200)).await;
            }
        }
        // While nobody may ask, the other account can hear of nothing else.
        if code == 503 {
            assert!((gateway.metric("crun_gateway_upstream_breaker_open") - 1.0).abs() < 0.1);
            for task in tasks {
                assert_code(&gateway.poll(&other, task).await, 200);
            }
        }
    }
}

/// Polls an ended task every ten seconds from now until so many seconds after the start; says when it was answered 200.
async fn poll_ended(gateway: &Paused, key: &str, start: Instant, until: u64) -> Vec<Duration> {
    let mut answered = Vec::new();
    while start.elapsed() < seconds(until) {
        let before = Instant::now();
        let reply = gateway.poll(key, "ended").await;
        if reply.status == 200 {
            answered.push(before - start);
            assert!(
                before - start < seconds(2) || before.elapsed() < Duration::from_millis(1),
                "nobody waits"
            );
            assert_eq!(reply.json()["data"]["status"], "success", "a state only moves forward");
        } else {
            assert_code(&reply, 401);
        }
        sleep(seconds(10)).await;
    }
    answered
}

/// An ended task of which upstream says `running` when asked again, as a late answer would.
fn ended_once() -> Behaviour {
    Behaviour {
        answer: |count, task| if count == 0 { success(task) } else { running(task) },
        ..Behaviour::default()
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_is_confirmed_once_in_ten_minutes_and_nobody_waits_for_it() {
    let start = Instant::now();
    let gateway = Paused::start(ended_once(), one_account(&[GOOD]));
    let mut answered = poll_ended(&gateway, GOOD, start, 620).await;
    assert_eq!(gateway.arrivals().len(), 2);
    // What it was told then, `running`, is no news of a task that has ended.
    let live = gateway.metric("crun_gateway_live_tasks{account=\"music\"}");
    assert!(live.abs() < 0.1, "{live}");
    answered.extend(poll_ended(&gateway, GOOD, start, 3600).await);
    assert_eq!(answered.len(), 360);
    let arrivals = gateway.arrivals();
    assert_eq!(arrivals.len(), 6, "{arrivals:?}");
    for pair in arrivals.windows(2) {
        assert!((seconds(600)..seconds(611)).contains(&(pair[1] - pair[0])), "{pair:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_revoked_key_is_answered_for_ten_minutes_after_its_last_confirmation_and_no_longer() {
    let start = Instant::now();
    let gateway = Paused::start(
        Behaviour {
            to_key: |_, after| (after > seconds(30)).then(|| refusal(401, 401)),
            ..ended_once()
        },
        one_account(&[GOOD]),
    );
    let answered = poll_ended(&gateway, GOOD, start, 1200).await;
    let last = *answered.last().unwrap();
    // The poll that sets the confirmation off is still answered.
    assert!((seconds(600)..seconds(612)).contains(&last), "{last:?}");
    // From then on the key is tried once in five seconds at most, here with every poll.
    assert!(gateway.arrivals().len() <= 63, "{}", gateway.arrivals().len());
}

#[tokio::test(start_paused = true)]
async fn upstream_away_changes_nothing_and_the_confirmation_is_made_up_for() {
    let start = Instant::now();
    let gateway = Paused::start(
        Behaviour {
            outage: Some((seconds(590)..seconds(700), Away::Refuses)),
            to_key: |_, after| (after > seconds(700)).then(|| refusal(401, 401)),
            ..ended_once()
        },
        one_account(&[GOOD]),
    );
    let answered = poll_ended(&gateway, GOOD, start, 900).await;
    let last = *answered.last().unwrap();
    assert!((seconds(699)..seconds(725)).contains(&last), "{last:?}");
}

#[tokio::test(start_paused = true)]
async fn a_key_that_never_flew_is_confirmed_with_its_first_hit() {
    let gateway = Paused::start(Behaviour::default(), one_account(&[GOOD, BAD]));
    gateway.poll(GOOD, "ended").await;
    for _ in 0..20 {
        assert_hit(&gateway.poll(BAD, "ended").await);
        sleep(seconds(20)).await;
    }
    assert_eq!(gateway.arrivals_with(GOOD).len(), 1);
    assert_eq!(gateway.arrivals_with(BAD).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_says_nothing_of_the_key_sets_no_other_query_off() {
    let behaviour = Behaviour {
        answer: |_, _| refusal(500, 500),
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |_| {}));
    let mut polls = JoinSet::new();
    for _ in 0..5 {
        let gateway = Arc::clone(&gateway);
        polls.spawn(async move { gateway.poll(KEY, "fails").await });
    }
    for reply in polls.join_all().await {
        assert_code(&reply, 500);
    }
    sleep(seconds(3)).await;
    assert_eq!(gateway.arrivals().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_always_fails_puts_no_confirmation_off() {
    let behaviour = Behaviour {
        answer: |count, task| match (task, count) {
            ("fails", _) => refusal(500, 500),
            (_, 0) => success(task),
            _ => running(task),
        },
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, one_account(&[GOOD]));
    let ended = || gateway.queries().iter().filter(|query| query.task == "ended").count();
    let start = Instant::now();
    while start.elapsed() < seconds(620) {
        assert_eq!(gateway.poll(GOOD, "ended").await.status, 200);
        assert_code(&gateway.poll(GOOD, "fails").await, 500);
        sleep(seconds(2)).await;
    }
    assert_eq!(ended(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_is_known_of_an_unlisted_key_outlives_its_idle_account() {
    // Accepted: polled every two minutes, so forgotten in between.
    let start = Instant::now();
    let gateway = Paused::start(Behaviour::default(), |_| {});
    gateway.sweep();
    while start.elapsed() < seconds(1500) {
        assert_eq!(gateway.poll(KEY, "ended").await.status, 200);
        sleep(seconds(120)).await;
    }
    assert_eq!(gateway.arrivals().len(), 3, "{:?}", gateway.arrivals());
    // Refused: nothing that is kept for it comes out when it is back.
    let start = Instant::now();
    let gateway = Paused::start(
        Behaviour {
            to_key: |_, after| (after > seconds(30)).then(|| refusal(403, 403)),
            ..Behaviour::default()
        },
        |_| {},
    );
    gateway.sweep();
    gateway.poll(KEY, "ended").await;
    sleep_until(start + seconds(40)).await;
    assert_code(&gateway.poll(KEY, "other").await, 403);
    for minutes in [5, 20, 60] {
        sleep_until(start + seconds(60) * minutes).await;
        assert_code(&gateway.poll(KEY, "ended").await, 403);
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_key_gets_nothing_from_disk_either_however_long_it_was_idle() {
    let folder = tempfile::tempdir().unwrap();
    let behaviour = Behaviour {
        to_key: |_, after| (after > seconds(30)).then(|| refusal(403, 403)),
        ..Behaviour::default()
    };
    let start = |behaviour| {
        Paused::start(behaviour, |config| {
            config.cache.disk = Some(folder.path().join("answers"));
        })
    };
    let before = start(behaviour.clone());
    before.poll(KEY, "ended").await;
    before.close_disk().await;
    drop(before);
    let gateway = start(behaviour);
    gateway.sweep();
    let started = Instant::now();
    sleep_until(started + seconds(40)).await;
    assert_code(&gateway.poll(KEY, "new").await, 403);
    for minutes in [5, 20, 60] {
        sleep_until(started + seconds(60) * minutes).await;
        assert_code(&gateway.poll(KEY, "ended").await, 403);
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_leaves_a_refused_key_and_comes_back_when_it_is_accepted_again() {
    let start = Instant::now();
    let gateway = Paused::start(
        Behaviour {
            to_key: |key, after| (key == BAD && after < seconds(700)).then(|| refusal(401, 401)),
            ..Behaviour::default()
        },
        one_account(&[BAD, GOOD]),
    );
    let mut polls = 0;
    while start.elapsed() < seconds(1190) {
        let reply = gateway.poll("token", &format!("task-{polls}")).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        polls += 1;
        // A hit, too: the refused key is tried again on whatever comes.
        assert_hit(&gateway.poll("token", "task-0").await);
        sleep(seconds(10)).await;
    }
    // At first, and in the background ten minutes later: not yet accepted.
    let tried = gateway.arrivals_with(BAD);
    assert_eq!(tried.len(), 2, "{tried:?}");
    assert!((seconds(600)..seconds(612)).contains(&(tried[1] - tried[0])));
    // Accepted again since: found out ten minutes later, and used from then on.
    sleep_until(start + seconds(1220)).await;
    gateway.poll("token", "sets-off").await;
    sleep(seconds(1)).await;
    let good = gateway.arrivals_with(GOOD).len();
    for task in 0..10 {
        assert_eq!(gateway.poll("token", &format!("back-{task}")).await.status, 200);
    }
    assert_eq!(gateway.arrivals_with(GOOD).len(), good);
    assert_eq!(gateway.arrivals_with(BAD).len(), 13);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_waits_while_its_accounts_key_is_rotated_uses_the_new_one() {
    for keys in [&[GOOD][..], &[BAD, GOOD]] {
        let revoked = |key: &str, after| (key == BAD && after > seconds(4)).then(|| refusal(401, 401));
        let behaviour = Behaviour {
            to_key: revoked,
            ..Behaviour::default()
        };
        let gateway = Arc::new(Paused::start(behaviour, one_account(&[BAD])));
        let mut polls = JoinSet::new();
        for task in 0..60 {
            let gateway = Arc::clone(&gateway);
            polls.spawn(async move { gateway.poll("token", &format!("task-{task}")).await });
        }
        sleep(seconds(2)).await;
        gateway.configure(one_account(keys));
        for reply in polls.join_all().await {
            assert_code(&reply, 200);
        }
        assert!(!gateway.arrivals_with(BAD).is_empty());
        assert!(gateway.arrivals_with(GOOD).len() > 10);
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_all_of_whose_keys_are_refused_gets_upstreams_refusal() {
    let gateway = Paused::start(
        Behaviour {
            to_key: |_, _| Some(refusal(403, 403)),
            ..Behaviour::default()
        },
        one_account(&[BAD, GOOD]),
    );
    let first = gateway.poll("token", "a").await;
    assert_code(&first, 403);
    assert_eq!(gateway.arrivals().len(), 2, "each was tried");
    for task in 0..40 {
        let reply = gateway.poll("token", &format!("task-{task}")).await;
        assert_eq!((reply.status, &reply.body), (first.status, &first.body));
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(gateway.arrivals().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn random_ids_of_one_client_take_nothing_from_another() {
    const RANDOM: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const MODEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
    let gateway = Arc::new(Paused::start(
        Behaviour {
            answer: |_, task| {
                if task.starts_with("random") {
                    refusal(200, 404)
                } else if task.starts_with("live") {
                    running(task)
                } else {
                    success(task)
                }
            },
            ..Behaviour::default()
        },
        |config| {
            config.budget.max_wait = seconds(90);
            // Room for some thirty answers, and not found for ever: thousands would push everything out.
            config.cache.max_bytes = 64 << 10;
            config.cache.not_found = seconds(3600);
        },
    ));
    for task in 0..5 {
        gateway.poll_from(MODEST, KEY, &format!("ended-{task}")).await;
    }
    let mut random = JoinSet::new();
    for client in 0..40 {
        let gateway = Arc::clone(&gateway);
        random.spawn(async move {
            for number in 0..50 {
                gateway
                    .poll_from(RANDOM, KEY, &format!("random-{client}-{number}"))
                    .await;
            }
        });
    }
    let flood = tokio::spawn(random.join_all());
    let mut refetched = 0;
    while !flood.is_finished() {
        for task in 0..5 {
            let before = Instant::now();
            let reply = gateway.poll_from(MODEST, KEY, &format!("live-{task}")).await;
            assert_code(&reply, 200);
            // Two who were called forward before it, every second turn, 100 ms for the answer; forty wait.
            assert!(before.elapsed() <= Duration::from_millis(500), "{:?}", before.elapsed());
            refetched += usize::from(reply.header("cache-status").unwrap().contains("fwd="));
        }
        sleep(seconds(1)).await;
    }
    assert!(refetched > 100, "{refetched}");
    // Nobody has asked for these since, so they would have been the first to go.
    for task in 0..5 {
        assert_hit(&gateway.poll_from(MODEST, KEY, &format!("ended-{task}")).await);
    }
    let arrivals = gateway.arrivals();
    assert!(arrivals.len() > 2000 && most_in_a_second(&arrivals) <= 15);
}

#[tokio::test(start_paused = true)]
async fn a_not_found_answer_is_not_asked_for_again_in_its_time() {
    let gateway = Paused::start(
        Behaviour {
            answer: |_, _| refusal(200, 404),
            ..Behaviour::default()
        },
        |_| {},
    );
    assert_code(&gateway.poll(KEY, "random").await, 404);
    let answered = Instant::now();
    assert!((gateway.metric("crun_gateway_cache_entries") - 1.0).abs() < 0.1);
    assert!(gateway.metric("crun_gateway_cache_bytes") > 0.0);
    for tenth in 1..50 {
        sleep_until(answered + Duration::from_millis(100) * tenth).await;
        assert_code(&gateway.poll(KEY, "random").await, 404);
    }
    assert_eq!(gateway.arrivals().len(), 1);
    sleep_until(answered + seconds(5)).await;
    gateway.poll(KEY, "random").await;
    assert_eq!(gateway.arrivals().len(), 2);
}

#[tokio::test]
async fn on_real_sockets_refused_keys_and_missing_credits_cost_next_to_nothing() {
    let upstream = Simulator::start(&["--latency", "20ms"]).await;
    let config = "accounts:\n  - name: music\n    keys: [{ env: REFUSED }, { env: GOOD }]\n    clients: [{ name: studio, token: { env: TOKEN } }]";
    let env = [
        ("REFUSED", "ak_refused_S3cr3t"),
        ("GOOD", "ak_S3cr3t"),
        ("TOKEN", "token-S3cr3t"),
    ];
    let gateway = Gateway::start_with_env(&upstream.url, config, &env).await;
    let address = gateway.address;
    let started = Instant::now();
    // The token finds the key that works, and stays with it.
    for task in 0..20 {
        assert_eq!(
            poll_as(address, "token-S3cr3t", &format!("ended.{task}")).await.status,
            200
        );
    }
    assert_eq!(upstream.queries().await, 21);
    for key in [
        "ak_refused_S3cr3t",
        "ak_refused-body_S3cr3t",
        "ak_disabled_S3cr3t",
        "ak_no-credits_S3cr3t",
    ] {
        let before = upstream.queries().await;
        let first = poll_as(address, key, "ended.0").await;
        let mut polls = JoinSet::new();
        for task in 0..200 {
            polls.spawn(async move { poll_as(address, key, &format!("ended.{task}")).await });
        }
        for reply in polls.join_all().await {
            assert_eq!((reply.status, &reply.body), (first.status, &first.body));
            assert!(reply.json()["code"].as_u64().unwrap() > 400, "{reply:?}");
        }
        let most = 2 + started.elapsed().as_secs() / 5;
        let spent = upstream.queries().await - before;
        assert!(spent <= most, "{key}: {spent}");
    }
    // The last of what is to be logged.
    let log = gateway.logged("has no credits", 1).await;
    assert_eq!(log.matches("upstream refuses this key").count(), 3, "{log}");
    assert!(log.contains("account=\"music\" key=1 code=401"), "{log}");
    assert_eq!(log.matches("has no credits").count(), 1, "{log}");
    assert!(!log.contains("S3cr3t"), "{log}");
    assert_eq!(upstream.stats().await["violations"], 0);
}
