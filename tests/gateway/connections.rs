//! Client and upstream connections: their time-outs, their limits, and who shares them.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::harness::client::bare;
use crate::harness::paused::{self, Behaviour, Paused};
use crate::harness::raw::{self, Raw};
use crate::harness::scripted::response;
use crate::harness::{Gateway, KEY, Scripted, Simulator, TASK_INFO, poll, poll_as, request};

const QUEUE: &str = "crun_gateway_budget_queue_length{account=\"other\",lane=\"foreground\"}";

/// What a busy machine may add.
const SLACK: Duration = Duration::from_millis(1500);

async fn quick() -> Simulator {
    Simulator::start(&["--latency", "0ms"]).await
}

#[tokio::test]
async fn header_timeout_counts_from_a_requests_first_byte() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "limits: { header_timeout: \"1s\" }").await;
    let mut idle = Raw::connect(gateway.address).await;
    assert!(idle.poll("ended.a").await.is(200));
    let mut halves = [Raw::connect(gateway.address).await, Raw::connect(gateway.address).await];
    assert!(halves[1].poll("ended.a").await.is(200));
    let started = Instant::now();
    for half in &mut halves {
        half.send("GET / HTTP/1.1\r\nhost: ").await.unwrap();
    }
    // More bytes win no more time.
    sleep(Duration::from_millis(500)).await;
    for half in &mut halves {
        half.send("gate").await.unwrap();
    }
    for half in &mut halves {
        let reply = half.reply().await;
        assert!(reply.is(408), "{reply:?}");
        assert_eq!(
            reply.json()["message"],
            "crun-gateway: the request's head took longer than limits.header_timeout"
        );
        half.assert_ends().await;
    }
    let ended = started.elapsed();
    assert!(
        ended >= Duration::from_millis(950) && ended < Duration::from_secs(1) + SLACK,
        "{ended:?}"
    );
    // Idle for longer than header_timeout all the while.
    assert!(idle.poll("ended.a").await.is(200));
}

#[tokio::test]
async fn idle_timeout_ends_a_connection_with_a_fin() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "limits: { idle_timeout: \"1s\" }").await;
    let mut used = Raw::connect(gateway.address).await;
    let mut unused = Raw::connect(gateway.address).await;
    // An answer that takes longer is no idleness.
    assert!(used.poll("slow-1500ms.a").await.is(200));
    let idle_since = Instant::now();
    unused.assert_ends().await;
    used.assert_ends().await;
    let ended = idle_since.elapsed();
    assert!(
        ended >= Duration::from_millis(950) && ended < Duration::from_secs(1) + SLACK,
        "{ended:?}"
    );
    for connection in [&mut used, &mut unused] {
        connection.send(raw::poll("ended.a")).await.unwrap();
        connection.assert_ends().await;
    }
    drop((used, unused));
    gateway.shows("crun_gateway_connections", 0.0).await;
}

async fn the_third_connection_is_turned_away(limit: &str) {
    let upstream = quick().await;
    let config = format!("limits: {{ {limit}: 2 }}\nlog: {{ level: debug }}");
    let gateway = Gateway::start(&upstream.url, &config).await;
    let mut let_in = [Raw::connect(gateway.address).await, Raw::connect(gateway.address).await];
    for connection in &mut let_in {
        assert!(connection.poll("ended.a").await.is(200));
    }
    let mut third = Raw::connect(gateway.address).await;
    third.send(raw::poll("ended.a")).await.unwrap();
    let refusal = third.reply().await;
    assert!(refusal.is(503) && refusal.says_close(), "{refusal:?}");
    assert_eq!(refusal.header("content-type"), Some("application/json"));
    assert_eq!(refusal.header("cache-control"), Some("no-store"));
    assert_eq!(refusal.header("via"), Some("1.1 crun-gateway"));
    assert_eq!(refusal.header("retry-after"), Some("1"));
    for name in ["x-request-id", "cache-status", "age", "date"] {
        assert!(refusal.header(name).is_some(), "{name}: {refusal:?}");
    }
    let envelope = refusal.json();
    assert_eq!(envelope["code"], 503);
    assert!(envelope["data"].is_null(), "{envelope}");
    let message = envelope["message"].as_str().unwrap();
    assert!(
        message.contains("crun-gateway") && message.contains(&format!("limits.{limit})")),
        "{message}"
    );
    third.assert_ends().await;
    let log = gateway.logged(refusal.header("x-request-id").unwrap(), 1).await;
    assert!(log.contains("request refused"), "{log}");
    // Those let in and the platform notice nothing; a place that is free again is given away.
    assert!(let_in[0].poll("ended.a").await.is(200));
    assert_eq!(gateway.admin("/readyz").await.0, 200);
    gateway.shows("crun_gateway_connections", 2.0).await;
    drop(let_in);
    gateway.shows("crun_gateway_connections", 0.0).await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
}

#[tokio::test]
async fn more_connections_than_allowed_are_told_why() {
    the_third_connection_is_turned_away("connections").await;
}

#[tokio::test]
async fn more_connections_of_one_address_than_allowed_are_told_why() {
    the_third_connection_is_turned_away("connections_per_address").await;
}

#[tokio::test]
async fn whoever_is_turned_away_may_go_on_with_an_upload_for_a_while() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "limits: { connections: 1 }").await;
    let mut let_in = Raw::connect(gateway.address).await;
    assert!(let_in.poll("ended.a").await.is(200));
    let mut client = Raw::connect(gateway.address).await;
    let head = format!("POST /api/v1/x HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ncontent-length: 1000000\r\n\r\n");
    client.send(head).await.unwrap();
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(3500) {
        sleep(Duration::from_millis(100)).await;
        client.send([b'x'; 1000]).await.unwrap();
    }
    let reply = client.reply().await;
    assert!(reply.is(503) && reply.says_close(), "{reply:?}");
    client.assert_ends().await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let mut client = Raw::connect(gateway.address).await;
    let tasks = ["slow-300ms.a", "ended.b", "ended.c", "slow-100ms.d", "ended.b"];
    client.send(tasks.map(raw::poll).concat()).await.unwrap();
    for task in tasks {
        let reply = client.reply().await;
        assert!(reply.is(200), "{reply:?}");
        assert_eq!(reply.json()["data"]["task_id"], task);
    }
    assert_eq!(upstream.queries().await, 4);
}

#[tokio::test(start_paused = true)]
async fn requests_of_all_kinds_that_come_while_others_are_answered_are_answered_in_order() {
    let gateway = Paused::start(Behaviour::default(), |_| {});
    let head = format!("HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\n");
    let ask = |number: usize| match number % 5 {
        0 => raw::poll(&format!("t{number}")),
        1 => format!("POST /api/v1/x?task_id=t{number} {head}content-length: 3\r\n\r\nabc"),
        2 => format!("\r\nGET /api/v1/x?task_id=t{number} {head}\r\n"),
        3 => format!("POST /api/v1/x?task_id=t{number} {head}transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
        _ => format!("GET /api/v1/x?task_id=t{number} {head}\r\n"),
    };
    // More than is read ahead, in pieces of any length.
    let all = (0..500).map(ask).collect::<String>().into_bytes();
    for piece in [7, 100, 1000, all.len()] {
        let (mut reading, mut writing) = tokio::io::split(gateway.connect(1 << 16, CancellationToken::new()).stream);
        let all = all.clone();
        tokio::spawn(async move {
            for piece in all.chunks(piece) {
                writing.write_all(piece).await.unwrap();
                sleep(Duration::from_millis(1)).await;
            }
        });
        let mut client = Raw::over(tokio::io::join(&mut reading, tokio::io::sink()));
        for number in 0..500 {
            let reply = client.reply().await;
            assert!(reply.is(200), "{number} in pieces of {piece}: {reply:?}");
            assert_eq!(reply.json()["data"]["task_id"], format!("t{number}"));
        }
    }
}

#[tokio::test]
async fn head_leaves_the_connection_in_step() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let mut client = Raw::connect(gateway.address).await;
    let head = raw::poll("ended.a").replacen("GET", "HEAD", 1);
    client.send(format!("{head}{}", raw::poll("ended.b"))).await.unwrap();
    let both = client.until("ended.b").await;
    assert_eq!(both.matches("HTTP/1.1 200 OK\r\n").count(), 2, "{both}");
    assert_eq!(both.matches("\"task_id\"").count(), 1, "{both}");
}

#[tokio::test]
async fn a_client_that_speaks_http_1_0_is_answered_and_its_connection_closed() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for target in [
        format!("GET {TASK_INFO}?task_id=ended.a"),
        "POST /api/v1/chat/completions".to_owned(),
    ] {
        let mut client = Raw::connect(gateway.address).await;
        let asked = format!("{target} HTTP/1.0\r\nx-api-key: {KEY}\r\n\r\n");
        client.send(asked).await.unwrap();
        let mut all = Vec::new();
        loop {
            let some = client.some().await.unwrap();
            if some.is_empty() {
                break;
            }
            all.extend(some);
        }
        let all = String::from_utf8(all).unwrap();
        assert!(all.starts_with("HTTP/1.0 200 OK\r\n"), "{all}");
        assert!(!all.to_ascii_lowercase().contains("transfer-encoding"), "{all}");
        assert!(all.ends_with('}') || all.ends_with("data: [DONE]\n\n"), "{all}");
    }
}

#[tokio::test]
async fn a_client_that_speaks_http_1_0_is_told_whether_its_connection_stays_open() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for (target, stays) in [
        (format!("GET {TASK_INFO}?task_id=ended.a"), true),
        ("POST /api/v1/echo".to_owned(), true),
        ("HEAD /api/v1/echo".to_owned(), true),
        ("POST /api/v1/chat/completions".to_owned(), false),
    ] {
        let mut client = Raw::connect(gateway.address).await;
        let asked = format!("{target} HTTP/1.0\r\nconnection: keep-alive\r\nx-api-key: {KEY}\r\n\r\n");
        client.send(asked).await.unwrap();
        let all = client.until("\r\n\r\n").await.to_ascii_lowercase();
        let says = |word| all.contains(&format!("connection: {word}\r\n"));
        assert!(says("keep-alive") == stays && says("close") != stays, "{all}");
    }
}

/// hyper may come upon an answer's end as it is about to wait, and then waits, though it is to close.
#[tokio::test]
async fn a_streamed_answer_of_unknown_length_ends_with_its_connection_whenever_its_end_comes() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    // Of 500 at once one or two meet it.
    for _ in 0..6 {
        let mut clients = JoinSet::new();
        for _ in 0..500 {
            let mut client = Raw::connect(gateway.address).await;
            clients.spawn(async move {
                let asked = format!("POST /api/v1/chat/completions HTTP/1.0\r\nx-api-key: {KEY}\r\n\r\n");
                client.send(asked).await.unwrap();
                let all = client.until("data: [DONE]\n\n").await;
                assert!(all.starts_with("HTTP/1.0 200 OK\r\n"), "{all}");
                client.assert_ends().await;
            });
        }
        clients.join_all().await;
    }
}

/// Requests that are answered without a look at their bodies: a hit or a miss, 401, 405, 404.
fn answered_unread(fields: &str) -> [(u16, String); 5] {
    let key = format!("x-api-key: {KEY}\r\n");
    let poll = format!("GET {TASK_INFO}?task_id=a");
    [
        (200, poll.clone(), &*key),
        (200, format!("GET {TASK_INFO}?task_id=b"), &*key),
        (401, poll, ""),
        (405, format!("POST {TASK_INFO}?task_id=a"), &*key),
        (404, "POST /elsewhere".to_owned(), &*key),
    ]
    .map(|(status, line, key)| (status, format!("{line} HTTP/1.1\r\nhost: x\r\n{key}{fields}\r\n\r\n")))
}

#[tokio::test(start_paused = true)]
async fn a_body_that_comes_a_moment_after_its_request_costs_the_next_one_nothing() {
    let gateway = Paused::start(Behaviour::default(), |_| {});
    assert_eq!(gateway.poll(KEY, "a").await.status, 200);
    let chunked = ["2\r\n{", "}\r\n", "0\r\n\r\n"];
    for (fields, pieces) in [
        ("content-length: 2", &["{}"][..]),
        ("content-length: 2", &["{", "}"]),
        ("transfer-encoding: chunked", &chunked),
        ("transfer-encoding: chunked", &[&chunked.concat()]),
    ] {
        for (status, head) in answered_unread(fields) {
            let mut client = gateway.connect(1 << 16, CancellationToken::new());
            client.send(&head).await.unwrap();
            for piece in pieces {
                sleep(Duration::from_millis(50)).await;
                client.send(piece).await.unwrap();
            }
            let reply = client.reply().await;
            assert!(reply.is(status) && !reply.says_close(), "{head}{pieces:?}: {reply:?}");
            assert!(client.poll("a").await.is(200), "{head}{pieces:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_is_answered_without_a_body_that_does_not_come_is_told_that_nothing_may_follow() {
    let gateway = Paused::start(Behaviour::default(), |_| {});
    for task in ["a", "b"] {
        assert_eq!(gateway.poll(KEY, task).await.status, 200);
    }
    let at_once = Duration::ZERO;
    let soon = Duration::from_millis(200);
    for (fields, body, after) in [
        ("content-length: 2", "", soon),
        ("content-length: 2", "{", soon),
        ("transfer-encoding: chunked", "2\r\n{}\r\n", soon),
        ("content-length: 65537", "{}", at_once),
        ("content-length: 2\r\nexpect: 100-continue", "", at_once),
    ] {
        for (status, head) in answered_unread(fields) {
            let mut client = gateway.connect(1 << 16, CancellationToken::new());
            let started = Instant::now();
            client.send(head.clone() + body).await.unwrap();
            let reply = client.reply().await;
            assert!(reply.is(status) && reply.says_close(), "{head}{body}: {reply:?}");
            assert_eq!(started.elapsed(), after, "{head}{body}");
            client.assert_ends().await;
        }
    }
}

/// What a client offers that would rather speak HTTP/2: Java's, unless it is told not to.
const OFFER: &str = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n";

#[tokio::test(start_paused = true)]
async fn a_refused_upload_may_go_on_for_a_while() {
    const SECOND: Duration = Duration::from_secs(1);
    let gateway = Paused::start(Behaviour::default(), |_| {});
    // What it sends, how often, when a stop comes, what it offers, and for how long it is read.
    for (pieces, pause, stops, offer, lasts) in [
        (25, SECOND, None, "", 25),
        (60, SECOND, None, "", 30),
        (25, 3 * SECOND, None, "", 2),
        (25, SECOND, Some(10), "", 12),
        (25, SECOND, None, OFFER, 25),
        (60, SECOND, None, OFFER, 30),
    ] {
        let draining = CancellationToken::new();
        let mut client = gateway.connect(1 << 16, draining.clone());
        let head = format!("POST /elsewhere HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n{offer}\r\n");
        client.send(head).await.unwrap();
        let started = Instant::now();
        if let Some(stops) = stops {
            tokio::spawn(async move {
                sleep(stops * SECOND + SECOND / 2).await;
                draining.cancel();
            });
        }
        let mut sent = 0;
        while sent < pieces {
            sleep(pause).await;
            if client.send([b'x'; 1000]).await.is_err() {
                break;
            }
            sent += 1;
        }
        let took = started.elapsed();
        if lasts == pieces {
            assert_eq!(sent, pieces);
        } else {
            assert!(
                took > lasts * SECOND && took <= lasts * SECOND + pause,
                "{took:?} for {lasts} s"
            );
        }
        let reply = client.reply().await;
        assert!(reply.is(404) && reply.says_close(), "{reply:?}");
        client.assert_ends().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_offer_of_another_protocol_takes_nothing_from_a_connections_last_answer() {
    let behaviour = Behaviour {
        answer: |_, _| {
            let message = "x".repeat(48 << 10);
            paused::json(&serde_json::json!({ "code": 422, "message": message, "data": null }))
        },
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |_| {});
    // The answer is the last since nobody wants the body, and the connection does not hold it all at once.
    for offer in ["", OFFER] {
        let mut client = gateway.connect(1024, CancellationToken::new());
        let head = raw::poll("a").replace("\r\n\r\n", &format!("\r\ncontent-length: 65537\r\n{offer}\r\n"));
        client.send(head).await.unwrap();
        let reply = client.reply().await;
        assert!(reply.is(200) && reply.says_close(), "{offer}: {}", reply.head);
        client.assert_ends().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_takes_too_long_may_not_go_on() {
    const SECOND: Duration = Duration::from_secs(1);
    let gateway = Paused::start(Behaviour::default(), |_| {});
    let mut client = gateway.connect(1 << 16, CancellationToken::new());
    let started = Instant::now();
    let ends = loop {
        if client.send("G").await.is_err() {
            break started.elapsed();
        }
        sleep(SECOND / 2).await;
    };
    // limits.header_timeout, and then the time to close.
    assert!(ends > 12 * SECOND && ends <= 13 * SECOND, "{ends:?}");
    assert!(client.reply().await.is(408));
    client.assert_ends().await;
}

#[tokio::test]
async fn a_client_that_has_said_all_it_has_to_say_is_answered_when_the_answer_is_there() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    let mut client = Raw::connect(gateway.address).await;
    client.send(raw::poll("ended.a")).await.unwrap();
    client.stream.shutdown().await.unwrap();
    assert!(client.reply().await.is(200));
    client.assert_ends().await;
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_unsent_flight_with_it() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "budget: { limit: 1 }").await;
    // The first takes the only permit that the next second has.
    let mut stays = Raw::connect(gateway.address).await;
    stays.send(raw::poll("ended.stays")).await.unwrap();
    gateway.shows(QUEUE, 1.0).await;
    let mut leaving = Vec::new();
    for number in 0..20 {
        let mut client = Raw::connect(gateway.address).await;
        // Some have sent a little more.
        let behind = ["", "\r\n", "GET /", &raw::poll("ended.never")][number % 4].to_owned();
        let asked = raw::poll(&format!("ended.{number}"));
        client.send(asked + &behind).await.unwrap();
        leaving.push(client);
    }
    gateway.shows("crun_gateway_connections", 21.0).await;
    drop(leaving);
    gateway.shows("crun_gateway_connections", 1.0).await;
    assert!(stays.reply().await.is(200));
    gateway.shows(QUEUE, 0.0).await;
    // Whoever had stayed in the queue would have come before this one.
    assert_eq!(poll(gateway.address, "ended.last").await.status, 200);
    assert!(upstream.queries().await <= 3, "{}", upstream.stats().await);
}

#[tokio::test]
async fn an_account_may_always_open_a_connection() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "limits: { upstream_connections: 1 }").await;
    let address = gateway.address;
    let mut polls = JoinSet::new();
    for number in 0..20 {
        polls.spawn(async move {
            let key = format!("ak_{}", number % 2);
            poll_as(address, &key, &format!("slow-200ms.{number}")).await
        });
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
}

#[tokio::test]
async fn an_idle_connection_makes_room_for_what_is_passed_through() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "limits: { upstream_connections: 1 }").await;
    for number in 0..3 {
        assert_eq!(poll(gateway.address, &format!("ended.{number}")).await.status, 200);
        let reply = request(gateway.address, bare(http::Method::POST, "/api/v1/echo")).await;
        assert_eq!(reply.status, 200, "{reply:?}");
    }
}

#[tokio::test]
async fn one_upstream_connection_serves_one_after_the_other() {
    let upstream = Scripted::start(Duration::from_millis(300), |_| {
        response("200 OK", "", br#"{"code":404,"message":"Task not found","data":null}"#)
    })
    .await;
    let config = format!("upstream: {{ url: \"{}\", connections: 1 }}", upstream.url);
    let gateway = Gateway::start(&upstream.url, &config).await;
    let address = gateway.address;
    let mut polls = JoinSet::new();
    let started = Instant::now();
    for number in 0..8 {
        polls.spawn(async move { poll(address, &format!("t{number}")).await });
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    // Eight answers of 300 ms, one after the other.
    assert!(
        started.elapsed() >= Duration::from_millis(2400),
        "{:?}",
        started.elapsed()
    );
    let connections = gateway.metric("crun_gateway_upstream_connections").await;
    assert!((connections - 1.0).abs() < 0.1, "{connections}");
}

/// Answers, but closes connections on which nothing is asked for 200 ms.
async fn impatient_upstream() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut client = Raw::over(stream);
                while let Ok(Some(_)) = timeout(Duration::from_millis(200), client.head()).await {
                    let body = br#"{"code":404,"message":"Task not found","data":null}"#;
                    client.send(response("200 OK", "", body)).await?;
                }
                std::io::Result::Ok(())
            });
        }
    });
    url
}

#[tokio::test]
async fn a_connection_that_upstream_closes_while_it_waits_for_its_permit_costs_no_attempt() {
    let upstream = impatient_upstream().await;
    // Where there is place for but one connection, the closed one is not in its own successor's way.
    for connections in [32, 1] {
        let config = format!(
            "upstream: {{ url: \"{upstream}\", connections: {connections} }}\nbudget: {{ limit: 1, max_wait: \"9s\" }}"
        );
        let gateway = Gateway::start(&upstream, &config).await;
        let address = gateway.address;
        let mut polls = JoinSet::new();
        for number in 0..3 {
            polls.spawn(async move { poll(address, &format!("t{number}")).await });
        }
        for reply in polls.join_all().await {
            assert_eq!(reply.status, 200, "{connections} connections: {reply:?}");
        }
        let attempts = gateway
            .metric("crun_gateway_upstream_request_duration_seconds_count")
            .await;
        assert!((attempts - 3.0).abs() < 0.1, "{attempts}");
    }
}

/// Answers the first query of each connection, once there are two of them, and ends with the second.
async fn upstream_of_one_answer_a_connection() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = watch::Sender::new(0);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let asked = asked.clone();
            tokio::spawn(async move {
                let mut client = Raw::over(stream);
                client.head().await;
                asked.send_modify(|asked| *asked += 1);
                let _ = asked.subscribe().wait_for(|asked| *asked >= 2).await;
                let body = br#"{"code":404,"message":"Task not found","data":null}"#;
                client.send(response("200 OK", "", body)).await?;
                client.head().await;
                std::io::Result::Ok(())
            });
        }
    });
    url
}

#[tokio::test]
async fn what_an_idle_connection_has_swallowed_is_asked_again_on_a_new_one() {
    let upstream = upstream_of_one_answer_a_connection().await;
    let gateway = Gateway::start(&upstream, "").await;
    let address = gateway.address;
    let (a, b) = tokio::join!(poll(address, "a"), poll(address, "b"));
    assert!(a.status == 200 && b.status == 200, "{a:?}, {b:?}");
    assert!((gateway.metric("crun_gateway_upstream_connections").await - 2.0).abs() < 0.1);
    let reply = poll(address, "c").await;
    assert_eq!(reply.status, 200, "{reply:?}");
}

/// Sends answers of 48 KiB in 16 chunks, 20 ms apart, and never says how long they are.
async fn upstream_that_answers_by_and_by() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut client = Raw::over(stream);
                while client.head().await.is_some() {
                    client
                        .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                        .await?;
                    for _ in 0..16 {
                        client.send(format!("c00\r\n{}\r\n", "x".repeat(0xc00))).await?;
                        sleep(Duration::from_millis(20)).await;
                    }
                    client.send("0\r\n\r\n").await?;
                }
                std::io::Result::Ok(())
            });
        }
    });
    url
}

#[tokio::test]
async fn little_room_for_bodies_still_serves_everybody() {
    let upstream = upstream_that_answers_by_and_by().await;
    let config =
        format!("upstream: {{ url: \"{upstream}\", max_body: \"64KiB\" }}\nlimits: {{ body_bytes: \"128KiB\" }}");
    let gateway = Gateway::start(&upstream, &config).await;
    let address = gateway.address;
    let mut polls = JoinSet::new();
    for number in 0..16 {
        polls.spawn(async move { poll(address, &format!("t{number}")).await });
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
        assert_eq!(reply.body.len(), 48 << 10);
    }
}

/// Has four clients that do not read ask for large answers of this kind, for one of which there is room.
async fn serve_the_deaf(kind: &str, outcome: &str) {
    let behaviour = Behaviour {
        answer: |_, task| {
            let message = "x".repeat(60 << 10);
            if task.starts_with("odd") {
                return paused::json(&serde_json::json!({ "code": 422, "message": message, "data": null }));
            }
            if task.starts_with("large") {
                return paused::json(&serde_json::json!({
                    "code": 200, "message": message, "data": { "task_id": task, "status": "failed" },
                }));
            }
            paused::success(task)
        },
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |config| {
        config.upstream.max_body = 64 << 10;
        config.limits.body_bytes = 128 << 10;
        // Half of it is less than a large one takes.
        config.cache.max_bytes = 100 << 10;
    });
    let mut deaf = Vec::new();
    for number in 0..4 {
        let mut client = gateway.connect(1024, CancellationToken::new());
        client.send(raw::poll(&format!("{kind}{number}"))).await.unwrap();
        deaf.push(client);
    }
    for number in 0..30 {
        let reply = gateway.poll(KEY, &format!("ended{number}")).await;
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    let mut served = 0;
    for client in &mut deaf {
        let reply = client.reply().await;
        served += usize::from(reply.is(200));
        assert!(
            reply.is(200) || reply.is(503) && reply.header("retry-after").is_some(),
            "{}",
            reply.head
        );
    }
    assert_eq!(served, 1);
    let answered = gateway.metric(&format!(
        "crun_gateway_upstream_requests_total{{account=\"other\",outcome=\"{outcome}\"}}"
    ));
    assert!(answered > 3.9, "{answered}");
}

#[tokio::test(start_paused = true)]
async fn clients_that_do_not_read_keep_no_answer_from_being_read() {
    serve_the_deaf("odd", "refused").await;
}

#[tokio::test(start_paused = true)]
async fn what_is_too_large_for_the_cache_is_held_like_what_may_not_be_kept() {
    serve_the_deaf("large", "terminal").await;
}
