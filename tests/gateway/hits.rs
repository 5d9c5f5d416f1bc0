//! A hit is answered before hyper sees it, where it is as plain as can be: nobody can tell, but by the time it takes.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::harness::paused::{Behaviour, Paused, json, music, running, success};
use crate::harness::raw::{self, RawReply};
use crate::harness::{self, Gateway, KEY, Raw, Simulator, TASK_INFO};

const ROOM: usize = 1 << 16;

fn start() -> Paused {
    let behaviour = Behaviour {
        answer: |_, task| {
            if task == "goes-on" {
                running(task)
            } else {
                success(task)
            }
        },
        ..Behaviour::default()
    };
    Paused::start(behaviour, |_| {})
}

fn poll(task: &str, headers: &str) -> String {
    format!("GET {TASK_INFO}?task_id={task} HTTP/1.1\r\nhost: gateway\r\nx-api-key: {KEY}\r\n{headers}\r\n")
}

/// All of an answer but the clock's second, which may turn between two answers.
fn shown(reply: &RawReply) -> (String, &[u8]) {
    let head = reply.head.lines().filter(|line| !line.starts_with("date: "));
    (head.collect::<Vec<_>>().join("\n"), &reply.body)
}

#[tokio::test(start_paused = true)]
async fn both_ways_give_the_same_bytes() {
    let gateway = start();
    let mut client = gateway.connect(ROOM, CancellationToken::new());
    for task in ["ended", "goes-on"] {
        assert!(client.poll(task).await.is(200));
        client.send(poll(task, "x-request-id: abc\r\n")).await.unwrap();
        let plain = client.reply().await;
        assert!(plain.header("cache-status").unwrap().contains("hit; ttl="), "{plain:?}");
        assert_eq!(plain.header("x-request-id"), Some("abc"));
        let date = plain.header("date").unwrap();
        httpdate::parse_http_date(date).unwrap();
        // Each of these has a meaning, or might have, and changes nothing here.
        for headers in [
            "cache-control: max-stale\r\nx-request-id: abc\r\n",
            "connection: keep-alive, x\r\nx-request-id: abc\r\n",
            "expect: nothing\r\nx-request-id: abc\r\n",
            "authorization: Basic a\r\nx-request-id: abc\r\n",
            "x-request-id: abc\r\nx-request-id: def\r\n",
            &format!("x-api-key: {KEY}\r\nx-request-id: abc\r\n"),
            // And these not even that.
            "X-Request-ID:\tabc \r\nconnection: Keep-Alive\r\ncontent-length: 0\r\n",
            "x-request-id: abc\r\nuser-agent: a\r\naccept: */*\r\naccept-encoding: gzip\r\ntraceparent: x\r\n",
        ] {
            client.send(poll(task, headers)).await.unwrap();
            assert_eq!(shown(&client.reply().await), shown(&plain), "{headers:?}");
        }
        for spelled in [format!("{task}&other=1"), task.replace('e', "%65")] {
            client.send(poll(&spelled, "x-request-id: abc\r\n")).await.unwrap();
            assert_eq!(shown(&client.reply().await), shown(&plain), "{spelled}");
        }
    }
    assert_eq!(gateway.queries().len(), 2);
    let hits = gateway.metric("crun_gateway_upstream_calls_saved_total{account=\"other\",how=\"hit\"}");
    assert!((hits - 22.0).abs() < f64::EPSILON, "{hits}");
}

/// What is no hit, too: an answer, or a refusal.
#[tokio::test(start_paused = true)]
async fn both_ways_give_the_same_bytes_of_what_was_not_there() {
    let behaviour = Behaviour {
        answer: |_, task| match &task[..3] {
            "run" => running(task),
            "end" => success(task),
            // A status without a body, one without a name, and errors.
            status => {
                let mut response = success(task);
                *response.status_mut() = status.parse().unwrap();
                response
            }
        },
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |config| config.max_accounts = 1);
    let mut client = gateway.connect(ROOM, CancellationToken::new());
    for what in ["run", "end", "200", "204", "299", "304", "404", "500"] {
        let [plain, longer] = [("", "-a"), ("expect: nothing\r\n", "-b")].map(|(header, task)| {
            let headers = format!("{header}x-request-id: abc\r\n");
            poll(&format!("{what}{task}"), &headers)
        });
        client.send(plain).await.unwrap();
        let plain = client.reply().await;
        client.send(longer).await.unwrap();
        let longer = client.reply().await;
        assert!(
            plain.header("cache-status").unwrap().contains("fwd=uri-miss"),
            "{plain:?}"
        );
        let (head, body) = shown(&longer);
        let body = String::from_utf8(body.to_vec()).unwrap().replace("-b", "-a");
        assert_eq!(shown(&plain), (head, body.as_bytes()));
    }
    for headers in ["", "expect: nothing\r\n"] {
        let stranger = poll("other", headers).replace(KEY, "ak_stranger");
        client.send(stranger).await.unwrap();
        assert!(client.reply().await.is(429), "too many accounts");
    }
}

#[tokio::test(start_paused = true)]
async fn both_ways_take_the_same_for_a_key() {
    let gateway = start();
    let mut client = gateway.connect(ROOM, CancellationToken::new());
    for (key, status) in [
        (format!(" \t{KEY}\t "), 200),
        // White space to Unicode, and none to HTTP.
        (format!("\u{a0}{KEY}"), 401),
        (format!("{KEY}\u{2003}"), 401),
    ] {
        for headers in ["", "expect: nothing\r\n"] {
            for task in ["ended", "another"] {
                client.send(poll(task, headers).replace(KEY, &key)).await.unwrap();
                let reply = client.reply().await;
                assert!(reply.is(status), "{key:?}, {headers:?}: {reply:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn both_ways_refuse_a_key_with_the_token_of_another() {
    let account = music("ak_listed", "token");
    let gateway = Paused::start(Behaviour::default(), |config| config.accounts = vec![account]);
    let mut client = gateway.connect(ROOM, CancellationToken::new());
    assert!(client.poll("ended").await.is(200));
    for (bearer, status) in [("no-token", 200), ("token", 401)] {
        for headers in ["", "expect: nothing\r\n"] {
            let headers = format!("authorization: Bearer {bearer}\r\n{headers}");
            client.send(poll("ended", &headers)).await.unwrap();
            let reply = client.reply().await;
            assert!(reply.is(status), "{headers:?}: {reply:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_id_that_is_none_is_replaced_and_each_poll_has_its_own() {
    let gateway = start();
    let mut client = gateway.connect(ROOM, CancellationToken::new());
    assert!(client.poll("ended").await.is(200));
    let mut ids = Vec::new();
    for headers in ["", "", "x-request-id: a b\r\n", "x-request-id:\r\n"] {
        client.send(poll("ended", headers)).await.unwrap();
        let id = client.reply().await.header("x-request-id").unwrap().to_owned();
        assert_eq!(uuid::Uuid::parse_str(&id).unwrap().get_version_num(), 7, "{id}");
        ids.push(id);
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 4);
}

/// Hits stand between what hyper answers, in any pieces: every request has its answer, in order.
#[tokio::test(start_paused = true)]
async fn answers_keep_the_order_of_their_requests() {
    let gateway = start();
    let other = "GET / HTTP/1.1\r\nhost: gateway\r\n\r\n";
    for room in [ROOM, 64] {
        for length in [1, 7, 100, 10_000] {
            let mut client = gateway.connect(room, CancellationToken::new());
            assert!(client.poll("hit").await.is(200));
            let miss = format!("miss-{room}-{length}");
            let requests = ["hit", "hit", &miss, "hit", "", "", "hit", "hit", &miss, "", "hit"];
            let bytes = requests.map(|task| match task {
                "" => other.to_owned(),
                task => raw::poll(task),
            });
            let bytes = bytes.concat();
            let (mut near, mut writer) = tokio::io::split(client.stream);
            let writing = tokio::spawn(async move {
                use tokio::io::AsyncWriteExt as _;
                for piece in bytes.as_bytes().chunks(length) {
                    writer.write_all(piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
                writer
            });
            let mut replies = Raw::over(tokio::io::join(&mut near, tokio::io::sink()));
            for task in requests {
                let reply = replies.reply().await;
                if task.is_empty() {
                    assert!(reply.is(404), "{reply:?}");
                } else {
                    assert_eq!(reply.json()["data"]["task_id"], task);
                }
            }
            writing.await.unwrap();
        }
    }
}

/// What a client does not take at once is not lost, nor mixed with what comes after.
#[tokio::test(start_paused = true)]
async fn a_slow_reader_gets_all_of_every_hit() {
    let gateway = start();
    let mut client = gateway.connect(100, CancellationToken::new());
    assert!(client.poll("ended").await.is(200));
    client.send(raw::poll("ended")).await.unwrap();
    sleep(Duration::from_secs(20)).await;
    // As much of the next request as fits.
    client.send(&raw::poll("ended")[..60]).await.unwrap();
    sleep(Duration::from_secs(20)).await;
    assert_eq!(client.reply().await.json()["data"]["task_id"], "ended");
    client.send(&raw::poll("ended")[60..]).await.unwrap();
    assert_eq!(client.reply().await.json()["data"]["task_id"], "ended");
    // The beginning of a head has its time from when the answer before it was taken.
    client.send(raw::poll("ended")).await.unwrap();
    client.send("GET / HT").await.unwrap();
    sleep(Duration::from_secs(20)).await;
    assert_eq!(client.reply().await.json()["data"]["task_id"], "ended");
    let started = tokio::time::Instant::now();
    assert!(client.reply().await.is(408));
    assert_eq!(started.elapsed(), Duration::from_secs(10));
    client.assert_ends().await;
}

/// An upstream where every task has ended, its body as long as its id says.
fn of_length() -> Behaviour {
    Behaviour {
        answer: |_, task| {
            let media = "x".repeat(task.parse().unwrap());
            json(&serde_json::json!({
                "code": 200, "message": "success",
                "data": { "task_id": task, "status": "success", "result": { "media_urls": [media] } },
            }))
        },
        ..Behaviour::default()
    }
}

/// Small answers go out in one piece and large ones in two, as the client takes them: it sees no difference. Nor does it
/// where they are packed, since there is room for few.
#[tokio::test(start_paused = true)]
async fn a_hit_of_any_size_arrives_whole_at_any_pace() {
    for (max_bytes, most) in [(256 << 20, 400_000.0), (1 << 20, 250_000.0)] {
        let gateway = Paused::start(of_length(), |config| config.cache.max_bytes = max_bytes);
        let mut first = gateway.connect(ROOM, CancellationToken::new());
        assert!(first.poll("140000").await.is(200));
        // An eighth of the smaller cache, once it is counted.
        gateway.metric("crun_gateway_cache_bytes");
        for length in [1, 15_000, 16_150, 17_000, 60_000, 100_000] {
            hits_arrive_whole(&gateway, length).await;
        }
        assert_eq!(gateway.queries().len(), 7);
        let held = gateway.metric("crun_gateway_cache_bytes");
        assert!(held < most && held > most - 50_000.0, "{held}");
    }
}

async fn hits_arrive_whole(gateway: &Paused, length: usize) {
    let task = length.to_string();
    for room in [100, 320, 4096, ROOM] {
        for headers in ["", "expect: nothing\r\n"] {
            let client = gateway.connect(room, CancellationToken::new());
            let polls = poll(&task, headers).repeat(3);
            let (mut near, mut writer) = tokio::io::split(client.stream);
            let writing = tokio::spawn(async move {
                use tokio::io::AsyncWriteExt as _;
                writer.write_all(polls.as_bytes()).await.unwrap();
                writer
            });
            let mut replies = Raw::over(tokio::io::join(&mut near, tokio::io::sink()));
            for _ in 0..3 {
                sleep(Duration::from_secs(1)).await;
                let reply = replies.reply().await;
                let body = reply.json();
                let media = body["data"]["result"]["media_urls"][0].as_str().unwrap();
                assert_eq!(media.len(), length, "through {room} bytes: {}", reply.head);
                assert!(media.bytes().all(|byte| byte == b'x'));
            }
            writing.await.unwrap();
        }
    }
}

/// Polls that differ in one thing only are told apart, be it the task or the key, in any order on one connection.
#[tokio::test(start_paused = true)]
async fn polls_that_look_alike_have_their_own_answers() {
    let behaviour = Behaviour {
        answer: |_, task| success(task),
        to_key: |key, _| {
            (key == "ak_refused").then(|| json(&serde_json::json!({ "code": 401, "message": "no", "data": null })))
        },
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |_| {});
    let mut client = gateway.connect(ROOM, CancellationToken::new());
    let head = |task, key| format!("GET {TASK_INFO}?task_id={task} HTTP/1.1\r\nhost: a\r\nx-api-key: {key}\r\n\r\n");
    for _ in 0..3 {
        for (task, key) in [
            ("task-one", "ak_granted"),
            ("task-two", "ak_granted"),
            ("task-two", "ak_refused"),
            ("task-one", "ak_another"),
            ("task-one", "ak_granted"),
            ("task-9", "ak_granted"),
        ] {
            client.send(head(task, key)).await.unwrap();
            let reply = client.reply().await;
            if key == "ak_refused" {
                assert_eq!(reply.json()["code"], 401, "{reply:?}");
            } else {
                assert_eq!(reply.json()["data"]["task_id"], task, "{reply:?}");
            }
        }
    }
    let asked_with = |key| gateway.arrivals_with(key).len();
    assert_eq!((asked_with("ak_granted"), asked_with("ak_another")), (3, 1));
}

/// Nobody holds a place among `limits.requests` for ever by taking no answer.
#[tokio::test(start_paused = true)]
async fn a_hit_that_nobody_takes_is_given_up() {
    let gateway = start();
    let mut client = gateway.connect(100, CancellationToken::new());
    assert!(client.poll("ended").await.is(200));
    client.send(raw::poll("ended")).await.unwrap();
    sleep(Duration::from_secs(10)).await;
    let in_flight = || gateway.metric("crun_gateway_requests_in_flight");
    assert!((in_flight() - 1.0).abs() < f64::EPSILON, "{}", in_flight());
    sleep(Duration::from_mins(16)).await;
    assert!(in_flight().abs() < f64::EPSILON, "{}", in_flight());
    let cut = gateway.metric("crun_gateway_refused_total{reason=\"answer_cut\"}");
    assert!((cut - 1.0).abs() < f64::EPSILON, "{cut}");
}

#[tokio::test]
async fn a_hit_that_is_cut_is_named_in_the_log() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let config = "budget: { max_wait: \"3s\" }\nlimits: { request_timeout: \"3s\" }";
    let gateway = Gateway::start(&upstream.url, config).await;
    // More than the sockets hold.
    let task = "big-14MiB.a";
    assert_eq!(harness::poll(gateway.address, task).await.status, 200);
    let mut client = Raw::connect(gateway.address).await;
    client.send(poll(task, "x-request-id: the-one\r\n")).await.unwrap();
    let log = gateway.logged("answer cut", 1).await;
    let line = log.lines().find(|line| line.contains("answer cut")).unwrap();
    assert!(line.contains("the-one"), "{line}");
}

#[tokio::test(start_paused = true)]
async fn a_hit_at_a_stop_says_that_it_is_the_last_and_one_under_way_is_finished() {
    let gateway = start();
    let draining = CancellationToken::new();
    let mut asks = gateway.connect(ROOM, draining.clone());
    let mut reads = gateway.connect(100, draining.clone());
    assert!(asks.poll("ended").await.is(200));
    assert!(reads.poll("ended").await.is(200));
    reads.send(raw::poll("ended")).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    draining.cancel();
    let last = asks.poll("ended").await;
    assert!(last.is(200) && last.says_close(), "{last:?}");
    asks.assert_ends().await;
    sleep(Duration::from_secs(30)).await;
    assert_eq!(reads.reply().await.json()["data"]["task_id"], "ended");
    reads.assert_ends().await;
}
