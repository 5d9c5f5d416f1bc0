//! Never more than 15 arrivals in any sliding second, and no fewer than 14 while there is work: exactly, on paused time;
//! and once on real sockets, where the simulated upstream counts by the kernel's stamps in a process of its own.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::harness::paused::{Behaviour, Paused, Query, goodput, json, most_in_a_second, running, success};
use crate::harness::{Gateway, KEY, Reply, Simulator, poll};

/// 300 different tasks at once: everybody is answered, upstream sees each once.
async fn three_hundred_tasks(behaviour: Behaviour) -> Arc<Paused> {
    let gateway = Arc::new(Paused::start(behaviour, |config| {
        config.budget.max_wait = Duration::from_secs(45);
    }));
    let mut polls = JoinSet::new();
    for task in 0..300 {
        let gateway = Arc::clone(&gateway);
        polls.spawn(async move { gateway.poll(KEY, &format!("task-{task}")).await });
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    gateway
}

#[track_caller]
fn assert_paced(gateway: &Paused, queries: usize) {
    let arrivals = gateway.arrivals();
    assert_eq!(arrivals.len(), queries);
    assert!(
        most_in_a_second(&arrivals) <= 15,
        "{} in a second",
        most_in_a_second(&arrivals)
    );
    assert!(goodput(&arrivals) >= 14.0, "{}/s", goodput(&arrivals));
}

#[tokio::test(start_paused = true)]
async fn three_hundred_tasks_at_once() {
    assert_paced(&*three_hundred_tasks(Behaviour::default()).await, 300);
}

#[tokio::test(start_paused = true)]
async fn a_third_of_new_connections_take_300_ms() {
    let opening = |number| {
        if number % 3 == 0 {
            Duration::from_millis(300)
        } else {
            Duration::ZERO
        }
    };
    let behaviour = Behaviour {
        opening,
        // Each connection serves once: the next query needs a new one.
        idle: Some(Duration::from_millis(1)),
        ..Behaviour::default()
    };
    let gateway = three_hundred_tasks(behaviour).await;
    let arrivals = gateway.arrivals();
    assert!(most_in_a_second(&arrivals) <= 15);
    assert!(goodput(&arrivals) >= 14.0, "{}/s", goodput(&arrivals));
}

#[tokio::test(start_paused = true)]
async fn connections_that_open_slowly_and_out_of_order_are_opened_in_parallel() {
    let one_use = Some(Duration::from_millis(1));
    let openings: [fn(usize) -> Duration; 3] = [
        |number| Duration::from_millis(480 + number as u64 * 97 % 240),
        |number| Duration::from_millis(240 + number as u64 * 97 % 120),
        |number| Duration::from_millis(if number.is_multiple_of(2) { 200 } else { 900 }),
    ];
    for (case, opening) in openings.into_iter().enumerate() {
        let behaviour = Behaviour {
            opening,
            idle: one_use,
            ..Behaviour::default()
        };
        let arrivals = three_hundred_tasks(behaviour).await.arrivals();
        assert!(most_in_a_second(&arrivals) <= 15);
        // When it is known how slowly they open.
        let goodput = goodput(&arrivals[30..]);
        assert!(goodput >= 14.0, "{case}: {goodput}/s");
    }
}

#[tokio::test(start_paused = true)]
async fn connections_that_are_hardly_enough_are_opened_in_parallel() {
    let behaviour = Behaviour {
        opening: |_| Duration::from_secs(1),
        latency: Duration::from_secs(1),
        idle: Some(Duration::from_millis(1)),
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |config| {
        config.budget.max_wait = Duration::from_mins(2);
        config.upstream.connections = 14;
    }));
    let mut polls = JoinSet::new();
    for task in 0..150 {
        let gateway = Arc::clone(&gateway);
        polls.spawn(async move { gateway.poll(KEY, &format!("task-{task}")).await.status });
    }
    assert!(polls.join_all().await.iter().all(|status| *status == 200));
    // Each is of use once in 2 s.
    let goodput = goodput(&gateway.arrivals());
    assert!(goodput >= 6.3, "{goodput}/s");
}

#[tokio::test(start_paused = true)]
async fn upstream_closes_idle_connections() {
    let gateway = three_hundred_tasks(Behaviour {
        idle: Some(Duration::from_millis(30)),
        ..Behaviour::default()
    })
    .await;
    let arrivals = gateway.arrivals();
    assert!(most_in_a_second(&arrivals) <= 15);
    assert!(goodput(&arrivals) >= 14.0, "{}/s", goodput(&arrivals));
}

#[tokio::test(start_paused = true)]
async fn every_answer_takes_two_seconds() {
    assert_paced(
        &*three_hundred_tasks(Behaviour {
            latency: Duration::from_secs(2),
            ..Behaviour::default()
        })
        .await,
        300,
    );
}

#[tokio::test(start_paused = true)]
async fn nothing_is_asked_in_the_first_second_of_a_process() {
    let started = Instant::now();
    let gateway = Paused::start(Behaviour::default(), |_| {});
    assert_eq!(gateway.poll(KEY, "a").await.status, 200);
    let first = gateway.arrivals()[0] - started;
    assert!(
        first >= Duration::from_millis(1030) && first < Duration::from_millis(1040),
        "{first:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn accounts_do_not_wait_for_each_other() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
        config.budget.max_wait = Duration::from_secs(45);
    }));
    let mut polls = JoinSet::new();
    for task in 0..150 {
        for key in ["ak_a", "ak_b"] {
            let gateway = Arc::clone(&gateway);
            polls.spawn(async move { gateway.poll(key, &format!("task-{task}")).await });
        }
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200);
    }
    let arrivals = gateway.arrivals();
    assert!(
        goodput(&arrivals) > 28.0,
        "two accounts, two budgets: {}/s",
        goodput(&arrivals)
    );
}

#[tokio::test(start_paused = true)]
async fn an_upstream_429_pauses_the_account_and_the_flight_tries_once_more() {
    for form in [200, 429] {
        let answer = match form {
            200 => |count: usize, task: &str| if count == 0 { rate_limited(200) } else { success(task) },
            _ => |count: usize, task: &str| if count == 0 { rate_limited(429) } else { success(task) },
        };
        let gateway = Paused::start(
            Behaviour {
                answer,
                ..Behaviour::default()
            },
            |_| {},
        );
        let reply = gateway.poll(KEY, "a").await;
        assert_eq!((reply.status.as_u16(), reply.json()["code"].as_u64()), (200, Some(200)));
        let arrivals = gateway.arrivals();
        assert_eq!(arrivals.len(), 2);
        // The answer takes 100 ms to arrive, and says: not for 2 s.
        let gap = arrivals[1] - arrivals[0];
        assert!(
            gap >= Duration::from_millis(2100) && gap < Duration::from_millis(2200),
            "{form}: {gap:?}"
        );
    }
}

/// An account whose one task is answered 429 the second and the third time, so that its flight fails, too; and another
/// that wants more than its budget. Both forms.
#[tokio::test(start_paused = true)]
async fn an_upstream_429_is_felt_by_its_account_alone_and_by_nobody_who_has_a_snapshot() {
    fn answer(count: usize, task: &str, status: u16) -> Response<Full<Bytes>> {
        match (task, count) {
            ("limited", 1 | 2) => rate_limited(status),
            (task, _) if task.starts_with("busy") => success(task),
            _ => running(task),
        }
    }
    let with_status = Behaviour {
        answer: |count, task| answer(count, task, 429),
        ..Behaviour::default()
    };
    let in_body = Behaviour {
        answer: |count, task| answer(count, task, 200),
        ..Behaviour::default()
    };
    for behaviour in [with_status, in_body] {
        let (start, latency) = (Instant::now(), behaviour.latency);
        let gateway = Arc::new(Paused::start(behaviour, |_| {}));
        let mut busy = JoinSet::new();
        // For nine seconds.
        for task in 0..120 {
            let gateway = Arc::clone(&gateway);
            busy.spawn(async move { gateway.poll("ak_busy", &format!("busy-{task}")).await });
        }
        let mut polls = JoinSet::new();
        for (number, task) in (0..10)
            .map(|task| format!("live-{task}"))
            .chain(["limited".to_owned()])
            .enumerate()
        {
            // Out of step with the pace.
            let mut next = start + Duration::from_millis(11 * number as u64);
            let gateway = Arc::clone(&gateway);
            polls.spawn(async move {
                let mut replies = vec![gateway.poll(KEY, &task).await];
                while next < start + Duration::from_secs(15) {
                    next += Duration::from_millis(500);
                    sleep_until(next).await;
                    replies.push(gateway.poll(KEY, &task).await);
                }
                replies
            });
        }
        let replies: Vec<_> = polls.join_all().await.into_iter().flatten().collect();
        for reply in &replies {
            assert_eq!(reply.status, 200, "{reply:?}");
            assert_eq!(reply.json()["data"]["status"], "running", "{reply:?}");
        }
        let stood_in = |reply: &Reply| reply.header("cache-status").unwrap().ends_with("detail=rate_limited");
        assert!(replies.iter().any(stood_in));
        busy.join_all().await;
        let queries = gateway.queries();
        let of = |key: &'static str| queries.iter().filter(move |query| query.key == key);
        for count in [1, 2] {
            let limited = of(KEY).filter(|query| query.task == "limited").nth(count).unwrap();
            let read = limited.at + latency;
            let resumed = read + Duration::from_secs(2);
            let in_pause = |query: &&Query| (read..resumed).contains(&query.at);
            assert_eq!(of(KEY).filter(in_pause).count(), 0, "{queries:?}");
            let others = of("ak_busy").filter(in_pause).count();
            assert!(others >= 28, "{others} in two seconds");
            // Who waited goes on when the pause is over, at half the pace or less.
            let after: Vec<_> = of(KEY).map(|query| query.at).filter(|at| *at >= resumed).collect();
            assert!(after[0] <= resumed + Duration::from_millis(1), "{after:?}");
            assert!(after[1] - after[0] >= Duration::from_millis(130), "{after:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_pause_outlasts_the_minute_for_which_an_unlisted_account_is_remembered() {
    let behaviour = Behaviour {
        answer: |_, _| {
            let mut response = rate_limited(429);
            response.headers_mut().insert("retry-after", 200.into());
            response
        },
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |_| {});
    gateway.sweep();
    assert_eq!(gateway.poll(KEY, "a").await.json()["message"], "Rate limit exceeded");
    tokio::time::sleep(Duration::from_secs(150)).await;
    gateway.poll(KEY, "b").await.assert_is_our_error(429);
    assert_eq!(gateway.arrivals().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn polls_that_wait_for_longer_than_an_unlisted_account_is_remembered_bring_nothing_more_upstream() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
        config.budget.limit = std::num::NonZeroU32::MIN;
        config.budget.max_wait = Duration::from_secs(200);
    }));
    gateway.sweep();
    let mut polls = JoinSet::new();
    for (first, number) in [(0, 100), (100, 10)] {
        for task in first..first + number {
            let gateway = Arc::clone(&gateway);
            polls.spawn(async move { gateway.poll(KEY, &format!("task-{task}")).await.status });
        }
        tokio::time::sleep(Duration::from_secs(90)).await;
    }
    assert!(polls.join_all().await.into_iter().all(|status| status == 200));
    assert_eq!(most_in_a_second(&gateway.arrivals()), 1);
}

#[tokio::test(start_paused = true)]
async fn the_second_attempt_takes_nobodys_place_in_a_full_queue() {
    let behaviour = Behaviour {
        answer: |count, task| {
            if (count, task) == (0, "limited") {
                rate_limited(429)
            } else {
                success(task)
            }
        },
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |config| {
        config.budget.limit = std::num::NonZeroU32::MIN;
        config.budget.max_wait = Duration::from_secs(100);
        config.budget.max_queue = 3;
    }));
    let mut polls = JoinSet::new();
    for task in ["limited", "a", "b", "c"] {
        let own = Arc::clone(&gateway);
        polls.spawn(async move { own.poll(KEY, task).await });
        // The others come while it is asked for.
        while gateway.arrivals().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    assert_eq!(gateway.arrivals().len(), 5);
}

#[tokio::test(start_paused = true)]
async fn the_rate_that_is_shown_is_the_one_that_a_poll_would_find() {
    let rate = "crun_gateway_budget_rate{account=\"other\"}";
    let behaviour = Behaviour {
        answer: |count, task| if count == 0 { rate_limited(429) } else { success(task) },
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |_| {});
    let whole = 15.0 / 1.03;
    assert_about(gateway.metric(rate), whole);
    gateway.poll(KEY, "a").await;
    assert_about(gateway.metric(rate), whole / 2.0);
    // Of accounts that share a label, the slowest.
    gateway.poll("ak_another", "a").await;
    assert!(gateway.metric(rate) < 0.6 * whole);
    // It has recovered though nobody asks.
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_about(gateway.metric(rate), whole);
}

#[track_caller]
fn assert_about(value: f64, expected: f64) {
    assert!((value / expected - 1.0).abs() < 0.02, "{value}, not {expected}");
}

fn rate_limited(status: u16) -> Response<Full<Bytes>> {
    let mut response = json(&serde_json::json!({ "code": 429, "message": "Rate limit exceeded", "data": null }));
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
    response.headers_mut().insert("retry-after", "2".parse().unwrap());
    response
}

#[tokio::test(start_paused = true)]
async fn after_two_429s_everyone_gets_upstreams_own_words() {
    let behaviour = Behaviour {
        answer: |_, _| rate_limited(429),
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |_| {});
    let reply = gateway.poll(KEY, "a").await;
    assert_eq!(reply.status, 429);
    assert_eq!(reply.json()["message"], "Rate limit exceeded");
    assert_eq!(reply.header("retry-after"), Some("2"));
    assert_eq!(gateway.arrivals().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn where_upstream_does_not_say_how_long_pauses_double_to_thirty_seconds_at_any_limit() {
    for limit in [1, 2, 15] {
        let behaviour = Behaviour {
            answer: |_, _| json(&serde_json::json!({ "code": 429, "message": "slow down", "data": null })),
            ..Behaviour::default()
        };
        let gateway = Arc::new(Paused::start(behaviour, |config| {
            config.budget.limit = std::num::NonZeroU32::new(limit).unwrap();
        }));
        let mut polls = JoinSet::new();
        for task in 0..100 {
            let gateway = Arc::clone(&gateway);
            polls.spawn(async move { gateway.poll(KEY, &format!("task-{task}")).await });
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let arrivals = gateway.arrivals();
        let longest = arrivals.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
        assert!(longest >= Duration::from_secs(30), "at {limit} a second {longest:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_poll_is_answered_at_its_deadline_and_the_flights_answer_is_kept() {
    let behaviour = Behaviour {
        latency: Duration::from_secs(5),
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |config| config.budget.max_wait = Duration::from_secs(3));
    let started = Instant::now();
    let late = gateway.poll(KEY, "a").await;
    late.assert_is_our_error(504);
    // Its time is not over yet.
    assert_eq!(late.header("cache-status"), Some("crun-gateway; detail=upstream_slow"));
    assert_eq!(started.elapsed().as_millis() / 10, 300, "{:?}", started.elapsed());
    tokio::time::sleep(Duration::from_secs(5)).await;
    let later = gateway.poll(KEY, "a").await;
    assert!(later.header("cache-status").unwrap().contains("; hit;"), "{later:?}");
    assert_eq!(gateway.arrivals().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_poll_whose_turn_never_came_is_told_when_to_come_back() {
    let behaviour = Behaviour {
        answer: |_, _| rate_limited(429),
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |config| {
        config.budget.limit = std::num::NonZeroU32::MIN;
        config.budget.max_wait = Duration::from_secs(1);
    });
    let reply = gateway.poll(KEY, "a").await;
    reply.assert_is_our_error(429);
    assert!(reply.header("retry-after").is_some());
    assert_eq!(
        gateway.arrivals().len(),
        0,
        "nothing was spent on a client that has left"
    );
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(gateway.arrivals().len(), 0, "{:?}", gateway.arrivals());
}

#[tokio::test(start_paused = true)]
async fn a_live_snapshot_beats_an_error() {
    let answer = |count: usize, task: &str| match count {
        0 => {
            json(&serde_json::json!({ "code": 200, "message": "ok", "data": { "task_id": task, "status": "running" } }))
        }
        1 => json(&serde_json::json!({ "code": 500, "message": "oops", "data": null })),
        2 => json(&serde_json::json!({ "code": 455, "message": "maintenance", "data": null })),
        _ => json(&serde_json::json!({ "code": 422, "message": "no", "data": null })),
    };
    let gateway = Paused::start(
        Behaviour {
            answer,
            ..Behaviour::default()
        },
        |_| {},
    );
    assert_eq!(gateway.poll(KEY, "a").await.json()["data"]["status"], "running");
    for detail in ["failed", "unavailable"] {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let reply = gateway.poll(KEY, "a").await;
        assert_eq!(reply.json()["data"]["status"], "running");
        assert!(reply.header("age").unwrap().parse::<u64>().unwrap() >= 3);
        let status = reply.header("cache-status").unwrap();
        assert!(
            status.contains("; hit; ttl=-") && status.contains(&format!("detail={detail}")),
            "{status}"
        );
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(
        gateway.poll(KEY, "a").await.json()["code"],
        422,
        "what is said about the request goes through"
    );
    tokio::time::sleep(Duration::from_mins(10)).await;
    assert_eq!(gateway.arrivals().len(), 4);
}

#[tokio::test]
async fn upstream_may_close_a_connection_sooner_than_its_permit_is_due() {
    let upstream = Simulator::start(&["--idle-close", "30ms", "--latency", "20ms"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let address = gateway.address;
    let mut polls = JoinSet::new();
    for task in 0..60 {
        polls.spawn(async move { poll(address, &format!("ended.{task}")).await });
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    assert_eq!(upstream.stats().await["violations"], 0);
}

/// On real sockets, counted in upstream's own process.
async fn three_hundred_tasks_on_real_sockets(options: &[&str]) {
    let upstream = Simulator::start(options).await;
    let gateway = Gateway::start(&upstream.url, "budget: { max_wait: \"45s\" }").await;
    let address = gateway.address;
    let mut polls = JoinSet::new();
    for task in 0..300 {
        polls.spawn(async move { poll(address, &format!("ended.{task}")).await });
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    let stats = upstream.stats().await;
    let number = |name: &str| stats[name].as_u64().unwrap();
    assert!(number("highest_in_any_second") <= 15, "{stats}");
    assert_eq!(number("violations"), 0, "{stats}");
    assert_eq!(number("rate_limited"), 0, "{stats}");
    let span = (number("last_arrival_unix_ns") - number("first_arrival_unix_ns")) as f64 / 1e9;
    let goodput = (number("requests") - 1) as f64 / span;
    assert!(goodput >= 14.0, "{goodput}/s: {stats}");
}

#[tokio::test]
async fn on_real_sockets() {
    three_hundred_tasks_on_real_sockets(&[]).await;
}
