//! The simulated upstream over real sockets: what the gateway's own tests rely on.

use std::io::{self, Read as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::time::{Instant, timeout};

use crate::client_tls::Authority;
use crate::harness::client::{bare, poll_as, request};
use crate::harness::raw::{self, Raw, RawReply};
use crate::harness::{KEY, PATIENCE, Simulator, TASK_INFO, poll};

const GZIP: &str = "content-encoding";

/// One that is quick, and never at its limit.
async fn quick(options: &[&str]) -> Simulator {
    Simulator::start(&[&["--latency", "0ms", "--limit", "1000000"], options].concat()).await
}

/// A poll's answer, byte for byte, until the connection ends.
async fn whole(upstream: &Simulator, task: &str) -> io::Result<Vec<u8>> {
    let mut client = Raw::connect(upstream.address).await;
    client.send(raw::poll(task)).await?;
    let mut all = Vec::new();
    timeout(PATIENCE, client.stream.read_to_end(&mut all)).await.unwrap()?;
    Ok(all)
}

/// One request with a key, by its method and path, over a connection that is kept.
async fn ask<S: AsyncRead + AsyncWrite + Unpin>(client: &mut Raw<S>, line: &str) -> RawReply {
    let head = format!("{line} HTTP/1.1\r\nhost: upstream\r\nx-api-key: {KEY}\r\n\r\n");
    client.send(head).await.unwrap();
    client.reply().await
}

fn now() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

/// What an answer says of its task.
fn status(answer: &Value) -> Value {
    answer["data"]["status"].clone()
}

#[tokio::test]
async fn a_task_runs_and_then_succeeds() {
    let upstream = quick(&["--run-time", "600ms"]).await;
    let mut client = Raw::connect(upstream.address).await;
    let first = client.poll("a%20task").await;
    assert_eq!(
        (status(&first.json()), first.json()["data"]["task_id"].clone()),
        (json!("pending"), json!("a task"))
    );
    assert_eq!(first.header("content-type"), Some("application/json"));
    let started = Instant::now();
    let mut seen = vec![json!("pending")];
    while seen.last() != Some(&json!("success")) {
        assert!(started.elapsed() < PATIENCE);
        let status = status(&client.poll("a%20task").await.json());
        if seen.last() != Some(&status) {
            seen.push(status);
        }
    }
    assert!(
        seen == [json!("pending"), json!("running"), json!("success")] || seen == [json!("pending"), json!("success")]
    );
    let ended = client.poll("a%20task").await.json();
    assert_eq!(ended["data"]["result"]["suno_data"].as_array().unwrap().len(), 2);
    assert!(ended["data"]["complete_at"].as_u64() >= ended["data"]["create_at"].as_u64());
}

#[tokio::test]
async fn the_same_state_gives_the_same_bytes() {
    let upstream = quick(&[]).await;
    for id in ["running.1", "ended.1", "ended-failed.1", "gzip.1"] {
        let (first, second) = (poll(upstream.address, id).await, poll(upstream.address, id).await);
        assert_eq!(first.body, second.body, "{id}");
    }
}

#[tokio::test]
async fn ids_steer_the_body() {
    let upstream = quick(&["--run-time", "0s"]).await;
    let poll = |id| poll(upstream.address, id);
    for (id, http, code, expected) in [
        ("ended.1", 200, json!(200), json!("success")),
        ("failed.1", 200, json!(200), json!("failed")),
        ("ended-failed.1", 200, json!(200), json!("failed")),
        ("failed-501.1", 200, json!(501), json!("failed")),
        ("pending.1", 200, json!(200), json!("pending")),
        ("running.1", 200, json!(200), json!("running")),
        ("http-404.1", 404, json!(404), Value::Null),
        ("http-302.1", 302, json!(302), Value::Null),
        ("http-455.1", 455, json!(455), Value::Null),
        ("body-429.1", 200, json!(429), Value::Null),
        ("code-string.1", 200, json!("200"), json!("success")),
        ("data-null.1", 200, json!(200), Value::Null),
        ("no-media.1", 200, json!(200), json!("success")),
        ("media-urls.1", 200, json!(200), json!("success")),
        ("media-info.1", 200, json!(200), json!("success")),
        ("status-SUCCESS.1", 200, json!(200), json!("SUCCESS")),
        ("duplicate.1", 200, json!(200), json!("success")),
        ("lyrics.1", 200, json!(200), json!("running")),
        ("no-store.1", 200, json!(200), json!("running")),
        ("slow-1ms.1", 200, json!(200), json!("success")),
    ] {
        let answer = poll(id).await;
        assert_eq!(
            (
                answer.status.as_u16(),
                answer.json()["code"].clone(),
                status(&answer.json())
            ),
            (http, code, expected),
            "{id}"
        );
    }
    assert_eq!(poll("no-media.1").await.json()["data"]["result"], Value::Null);
    assert_eq!(poll("wrong-id.1").await.json()["data"]["task_id"], "another-task");
    assert_eq!(poll("html.1").await.header("content-type"), Some("text/html"));
    assert_eq!(poll("html-502.1").await.status, 502);
    assert_eq!(poll("no-content-type.1").await.header("content-type"), None);
    assert!(poll("bom.1").await.body.starts_with(b"\xef\xbb\xbf{"));
    assert!(serde_json::from_slice::<Value>(&poll("trailing.1").await.body).is_err());
    assert!(str::from_utf8(&poll("invalid-utf8.1").await.body).is_err());
    let uncacheable = poll("no-store.1").await;
    assert!(uncacheable.header("cache-control").unwrap().contains("no-store"));
    assert!(!uncacheable.header("set-cookie").unwrap().is_empty());
    let duplicate = poll("duplicate.1").await.body;
    assert_eq!(String::from_utf8_lossy(&duplicate).matches("\"status\":").count(), 2);
}

#[tokio::test]
async fn ids_steer_the_transport() {
    let upstream = quick(&[]).await;
    let poll = |id| poll(upstream.address, id);
    assert_eq!(whole(&upstream, "close.1").await.unwrap(), b"");
    assert_eq!(
        whole(&upstream, "reset.1").await.unwrap_err().kind(),
        io::ErrorKind::ConnectionReset
    );
    assert_eq!(whole(&upstream, "cut-head.1").await.unwrap().len(), 30);
    let cut = String::from_utf8_lossy(&whole(&upstream, "cut.1").await.unwrap()).into_owned();
    let (head, body) = cut.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("content-length: 1") && !body.is_empty());
    assert_eq!(whole(&upstream, "flaky-close.1").await.unwrap(), b"");
    assert_eq!(status(&poll("flaky-close.1").await.json()), "success");
    assert_eq!(poll("first-429.1").await.status, 429);
    assert_eq!(status(&poll("first-429.1").await.json()), "success");

    let gzip = poll("gzip.1").await;
    assert_eq!(gzip.header(GZIP), Some("gzip"));
    let plain: Value = serde_json::from_reader(flate2::read::GzDecoder::new(&gzip.body[..])).unwrap();
    assert_eq!(status(&plain), "success");
    assert_eq!(poll("brotli-claimed.1").await.header(GZIP), Some("br"));

    assert!(timeout(Duration::from_millis(100), poll("hang.1")).await.is_err());
    let mut client = Raw::connect(upstream.address).await;
    client.send(raw::poll("drip.1")).await.unwrap();
    let dripped = client.until("{\"c").await;
    assert!(dripped.ends_with("\r\n\r\n{\"c"), "{dripped}");
}

#[tokio::test]
async fn ids_steer_what_no_library_would_write() {
    let upstream = quick(&[]).await;
    let first = async |id: &str, least: usize| {
        let mut client = Raw::connect(upstream.address).await;
        client.send(raw::poll(id)).await.unwrap();
        let mut bytes = Vec::new();
        while bytes.len() < least {
            let some = client.some().await.unwrap();
            assert!(!some.is_empty());
            bytes.extend(some);
        }
        (String::from_utf8(bytes).unwrap(), client)
    };
    assert!(first("garbage.1", 30).await.0.contains("neither HTTP"));
    let (extra, _) = first("extra.1", 3000).await;
    assert_eq!(extra.matches("HTTP/1.1 200 OK").count(), 2);
    assert!(extra.contains("\"success\"") && extra.contains("\"forged!\""));
    let (both, _) = first("length-and-chunked.1", 1500).await;
    assert!(both.contains("\r\nContent-Length: 1") && both.contains("\r\nTransfer-Encoding: chunked\r\n"));
    assert!(
        first("endless-interim.1", 1 << 20)
            .await
            .0
            .starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100")
    );
    assert!(!first("endless-headers.1", 1 << 20).await.0.contains("\r\n\r\n"));
    // The connection goes on.
    let (short, mut client) = first("short-length.1", 1500).await;
    let (head, body) = short.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}", body.len() / 2)), "{short}");
    client.send(raw::poll("pending.1")).await.unwrap();
    client.until("\"pending\"").await;
}

#[tokio::test]
async fn padding_is_as_long_as_asked() {
    let upstream = quick(&[]).await;
    for (id, size) in [
        ("big-0B.1", 0),
        ("big-3KiB.1", 3 << 10),
        ("big-1MiB.1", 1 << 20),
        ("big-200000B.1", 200_000),
    ] {
        let answer = poll(upstream.address, id).await.json();
        assert_eq!(answer["data"]["param"].as_str().unwrap().len(), size, "{id}");
    }
    let deep = poll(upstream.address, "deep.1").await.body;
    let deep = str::from_utf8(&deep).unwrap();
    // The rest of the body has nine pairs.
    assert_eq!(deep.matches('[').count(), 100_009);
    assert_eq!(deep.matches(']').count(), 100_009);
}

#[tokio::test]
async fn a_bomb_is_small_until_it_is_unpacked() {
    let upstream = quick(&[]).await;
    let bomb = poll(upstream.address, "bomb.1").await;
    assert_eq!(bomb.header(GZIP), Some("gzip"));
    assert!(bomb.body.len() < 8 << 20);
    let mut start = Vec::new();
    flate2::read::GzDecoder::new(&bomb.body[..])
        .take(3 << 20)
        .read_to_end(&mut start)
        .unwrap();
    assert!(start.len() == 3 << 20 && start.iter().all(|&byte| byte == 0));
    assert_eq!(bomb.body[bomb.body.len() - 4..], (1_u32 << 30).to_le_bytes());
}

#[tokio::test]
async fn keys_steer() {
    let upstream = quick(&[]).await;
    let get = |path: &str| request(upstream.address, bare(Method::GET, path));
    let keyless = get(&format!("{TASK_INFO}?task_id=ended.1")).await;
    assert_eq!((keyless.status.as_u16(), &keyless.json()["code"]), (401, &json!(401)));
    for (key, http, code) in [
        ("a-refused-key", 401, 401),
        ("refused-body", 200, 401),
        ("disabled", 403, 403),
        ("no-credits", 402, 402),
        ("ak_1", 200, 200),
    ] {
        let answer = poll_as(upstream.address, key, "ended.1").await;
        assert_eq!(
            (answer.status.as_u16(), answer.json()["code"].clone()),
            (http, json!(code)),
            "{key}"
        );
    }
    let mut client = Raw::connect(upstream.address).await;
    assert!(ask(&mut client, &format!("GET {TASK_INFO}")).await.is(422));
}

#[tokio::test]
async fn a_sixteenth_quick_query_is_a_violation() {
    let upstream = Simulator::start(&["--latency", "0ms", "--limit", "15"]).await;
    let mut client = Raw::connect(upstream.address).await;
    let before = now();
    let mut answers = Vec::new();
    for number in 0..16 {
        answers.push(client.poll(&format!("task-{number}")).await);
    }
    if now() - before >= 1_000_000_000 {
        // The machine was too busy for sixteen to be quick.
        return;
    }
    assert!(answers[..15].iter().all(|answer| answer.is(200)), "{answers:?}");
    assert!(answers[15].is(429), "{answers:?}");
    let stats = upstream.stats().await;
    assert_eq!(
        (&stats["requests"], &stats["violations"], &stats["rate_limited"]),
        (&json!(16), &json!(1), &json!(1))
    );
    assert_eq!(stats["highest_in_any_second"], 16);
    assert_eq!(stats["tasks"]["task-3"], 1);
    assert_eq!(
        stats["accounts"],
        json!([{"requests": 16, "violations": 1, "highest_in_any_second": 16}])
    );
    ask(&mut client, "POST /__reset").await;
    assert!(client.poll("task-1").await.is(200));
    assert_eq!(upstream.queries().await, 1);
}

#[tokio::test]
async fn accounts_have_limits_of_their_own_and_shared_keys_share_one() {
    let upstream = Simulator::start(&["--latency", "0ms", "--limit", "0", "--account-keys", "a,b"]).await;
    for key in ["a", "b", "c"] {
        assert_eq!(poll_as(upstream.address, key, "ended.1").await.status, 429);
    }
    let violations: Vec<_> = upstream.stats().await["accounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|account| account["violations"].clone())
        .collect();
    assert_eq!(violations, [2, 1]);
}

#[tokio::test]
async fn a_429_has_the_form_that_was_asked_for() {
    let limited = async |form, retry_after| {
        let options = ["--rate-limit-form", form, "--retry-after", retry_after];
        let upstream = Simulator::start(&[&["--latency", "0ms", "--limit", "0"], &options[..]].concat()).await;
        poll(upstream.address, "ended.1").await
    };
    for (form, http) in [("http", 429), ("body", 200)] {
        let answer = limited(form, "7").await;
        assert_eq!(
            (answer.status.as_u16(), answer.header("retry-after")),
            (http, Some("7"))
        );
        assert_eq!(
            answer.json(),
            json!({"code": 429, "message": "Rate limit exceeded", "data": null})
        );
    }
    let dated = limited("http", "date").await;
    assert!(httpdate::parse_http_date(dated.header("retry-after").unwrap()).is_ok());
    assert_eq!(limited("http", "none").await.header("retry-after"), None);
}

/// While its first read is held back, a request waits in the socket: it arrived when the kernel got it all the same.
#[tokio::test]
async fn arrivals_carry_the_stamp_of_the_kernel() {
    let upstream = quick(&["--open-delay", "400ms", "--open-delay-every", "2"]).await;
    // The kernel begins to stamp a moment after the first socket asked.
    let mut warm = Raw::connect(upstream.address).await;
    warm.poll("ended.1").await;
    ask(&mut warm, "POST /__reset").await;
    let mut client = Raw::connect(upstream.address).await;
    let before = now();
    client.send(raw::poll("ended.1")).await.unwrap();
    let after = now();
    client.reply().await;
    assert!(now() - before >= 300_000_000, "it was held back");
    let stamp = upstream.stats().await["first_arrival_unix_ns"].as_u64().unwrap();
    assert!(
        (before..=after + 50_000_000).contains(&stamp),
        "{before} {stamp} {after}"
    );
}

#[tokio::test]
async fn latency_is_kept() {
    let upstream = Simulator::start(&["--latency", "150ms"]).await;
    let mut client = Raw::connect(upstream.address).await;
    let started = Instant::now();
    client.poll("ended.1").await;
    assert!(started.elapsed() >= Duration::from_millis(145));
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let upstream = quick(&["--idle-close", "100ms"]).await;
    Raw::connect(upstream.address).await.assert_ends().await;
    let answer = whole(&upstream, "slow-300ms.1").await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n") && answer.ends_with(b"}"));
}

#[tokio::test]
async fn a_connection_closes_after_a_response_without_a_word() {
    let upstream = quick(&["--close-after-response"]).await;
    for id in ["ended.1", "big-1MiB.1", "http-404.1"] {
        let answer = String::from_utf8(whole(&upstream, id).await.unwrap()).unwrap();
        assert!(answer.ends_with('}'), "{id}");
        assert!(!answer.to_lowercase().contains("connection:"), "{id}");
    }
}

#[tokio::test]
async fn tls_is_served_and_its_handshake_held_back() {
    let authority = Authority::new();
    let [cert, key] = ["tls.crt", "tls.key"].map(|name| authority.file(name).display().to_string());
    let tls = ["--tls-cert", &cert, "--tls-key", &key];
    let delay = ["--open-delay", "300ms", "--open-delay-every", "2"];
    let upstream = quick(&[tls, delay].concat()).await;
    let client = authority.client_with(&["h2", "http/1.1"], None);
    let open = async || {
        let started = Instant::now();
        let stream = client.connect(upstream.address).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        (Raw::over(stream), started.elapsed())
    };
    let (mut first, _) = open().await;
    assert_eq!(status(&first.poll("ended.1").await.json()), "success");
    let before = now();
    let (mut second, took) = open().await;
    assert!(took >= Duration::from_millis(290));
    assert_eq!(status(&second.poll("ended.2").await.json()), "success");
    let stats = ask(&mut first, "GET /__stats").await.json();
    assert_eq!((&stats["connections"], &stats["requests"]), (&json!(2), &json!(2)));
    let last = stats["last_arrival_unix_ns"].as_u64().unwrap();
    assert!(
        (before + 290_000_000..=now()).contains(&last),
        "the handshake is not the request"
    );
}

#[tokio::test]
async fn other_paths_are_counted_and_answered() {
    let upstream = quick(&[]).await;
    let mut client = Raw::connect(upstream.address).await;
    let created = ask(&mut client, "POST /api/v1/client/job/CreateTask").await;
    assert_eq!(created.json()["data"]["task_id"].as_str().unwrap().len(), 36);
    let balance = ask(&mut client, "GET /api/v1/client/account/balance").await;
    assert_eq!(balance.json()["data"]["balance"], 1000);
    let lower_case = ask(&mut client, "GET /api/v1/client/job/taskinfo?task_id=x").await;
    assert!(lower_case.is(404));
    let with_slash = ask(&mut client, &format!("GET {TASK_INFO}/")).await;
    assert_eq!(with_slash.json()["code"], 404);
    let posted = ask(&mut client, &format!("POST {TASK_INFO}?task_id=x")).await;
    assert!(posted.is(405));
    let stats = ask(&mut client, "GET /__stats").await.json();
    assert_eq!(stats["paths"]["/api/v1/client/job/taskinfo"], 1);
    assert_eq!(stats["paths"].as_object().unwrap().len(), 4);
    assert_eq!((&stats["requests"], &stats["connections"]), (&json!(1), &json!(1)));
}

#[tokio::test]
async fn chat_streams_events() {
    let upstream = quick(&[]).await;
    let mut client = Raw::connect(upstream.address).await;
    let started = Instant::now();
    let asked = "POST /api/v1/chat/completions HTTP/1.1\r\nhost: upstream\r\ncontent-length: 2\r\n\r\n{}";
    client.send(asked).await.unwrap();
    let begin = client.until("\n\n").await;
    assert!(begin.contains("\r\ndata: {") && started.elapsed() < Duration::from_millis(400));
    assert_eq!(raw::header(&begin, "content-type"), Some("text/event-stream"));
    assert_eq!(raw::header(&begin, "transfer-encoding"), Some("chunked"));
    client.until("data: [DONE]\n\n\r\n0\r\n\r\n").await;
    assert!(started.elapsed() >= Duration::from_millis(395));
}

#[tokio::test]
async fn echo_tells_what_came_in() {
    let upstream = quick(&[]).await;
    let asked = Request::put("/api/v1/echo/a%20b?c=d")
        .header("host", "upstream")
        .header("x-api-key", "k")
        .body(Full::from("hello"))
        .unwrap();
    let told = request(upstream.address, asked).await.json();
    let mut checksum = flate2::Crc::new();
    checksum.update(b"hello");
    assert_eq!(
        told,
        json!({
            "method": "PUT",
            "path": "/api/v1/echo/a%20b?c=d",
            "headers": {"host": ["upstream"], "x-api-key": ["k"], "content-length": ["5"]},
            "body_length": 5,
            "body_crc32": checksum.sum(),
        })
    );
}

#[tokio::test]
async fn mirror_streams_the_body_back_as_it_comes() {
    let upstream = quick(&[]).await;
    let mut client = Raw::connect(upstream.address).await;
    let head = "POST /api/v1/mirror HTTP/1.1\r\nhost: upstream\r\ntransfer-encoding: chunked\r\n\r\n";
    client.send(head).await.unwrap();
    for piece in ["3\r\none\r\n", "3\r\ntwo\r\n", "0\r\n\r\n"] {
        client.send(piece).await.unwrap();
        let back = client.until(piece).await;
        assert!(back.ends_with(piece), "{back}");
    }
}
