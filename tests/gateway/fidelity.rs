//! Bytes are sacred: on a miss and on a hit the client gets what upstream sent.

use std::collections::HashSet;
use std::io::Write as _;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::harness::raw::{self, Raw};
use crate::harness::scripted::response;
use crate::harness::{Gateway, Reply, Scripted, Simulator, poll, poll_as};

/// The id that a fixture tells of, or one that upstream may not know.
fn task_of(fixture: &[u8]) -> String {
    let parsed: Option<serde_json::Value> = serde_json::from_slice(fixture).ok();
    let id = parsed.and_then(|body| body["data"]["task_id"].as_str().map(str::to_owned));
    id.unwrap_or_else(|| "some-task".into())
}

fn fixtures() -> Vec<(String, Vec<u8>)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    let mut fixtures: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                std::fs::read(entry.path()).unwrap(),
            )
        })
        .collect();
    fixtures.sort();
    assert!(fixtures.len() >= 23, "the fixtures are there");
    fixtures
}

#[tokio::test]
async fn every_fixture_comes_through_byte_for_byte_on_miss_and_hit() {
    let fixtures = fixtures();
    let by_key = fixtures.clone();
    // The key says which fixture upstream answers: so each is an account of its own, too.
    let upstream = Scripted::start(Duration::ZERO, move |head| {
        let index: usize = head
            .split_once("x-api-key: ak_")
            .unwrap()
            .1
            .split("\r\n")
            .next()
            .unwrap()
            .parse()
            .unwrap();
        response("200 OK", "Content-Type: application/json\r\n", &by_key[index].1)
    })
    .await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for (index, (name, bytes)) in fixtures.iter().enumerate() {
        let (key, task) = (format!("ak_{index}"), task_of(bytes));
        let before = upstream.queries();
        let miss = poll_as(gateway.address, &key, &task).await;
        assert_eq!(miss.body, bytes, "{name}");
        assert_eq!(
            (miss.status.as_u16(), miss.header("content-type")),
            (200, Some("application/json")),
            "{name}"
        );
        miss.assert_is_signed();
        let is_rate_limited = name == "code_429.json";
        assert_eq!(
            upstream.queries() - before,
            if is_rate_limited { 2 } else { 1 },
            "{name}"
        );
        if miss.header("cache-status").unwrap().contains("stored") {
            let hit = poll_as(gateway.address, &key, &task).await;
            assert_eq!(hit.body, bytes, "{name}");
            assert!(
                hit.header("cache-status").unwrap().contains("; hit;"),
                "{name}: {hit:?}"
            );
            assert_eq!(upstream.queries() - before, 1, "{name}");
        }
    }
}

#[tokio::test]
async fn ten_thousand_chunks_that_come_at_once_are_one_answer() {
    let body = "x".repeat(10_000);
    let chunks = format!(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{}0\r\n\r\n",
        "1\r\nx\r\n".repeat(10_000)
    );
    let upstream = Scripted::always(chunks).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let reply = poll(gateway.address, "a").await;
    assert!(reply.status == 200 && reply.body == body, "{reply:?}");
}

#[tokio::test]
async fn what_is_too_large_for_the_cache_is_not_said_to_be_stored() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "cache: { max_bytes: \"2MiB\" }").await;
    for (task, queries) in [("big-2MiB.a", 2), ("big-512KiB.a", 1)] {
        let before = upstream.queries().await;
        let replies = [poll(gateway.address, task).await, poll(gateway.address, task).await];
        assert_eq!(upstream.queries().await - before, queries, "{task}");
        let status = |reply: &Reply| reply.header("cache-status").unwrap().to_owned();
        let is_kept = queries == 1;
        assert_eq!(status(&replies[0]).contains("; stored"), is_kept, "{replies:?}");
        assert_eq!(status(&replies[1]).contains("; hit"), is_kept, "{replies:?}");
    }
}

#[tokio::test]
async fn what_may_be_kept_is_kept_and_nothing_else() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(
        &upstream.url,
        "cache: { fresh: { floor: \"1h\", ceiling: \"2h\" } }\nbudget: { limit: 1000 }",
    )
    .await;
    for (task, stored) in [
        ("ended.a", true),
        ("ended-failed.a", true),
        ("failed-501.a", true),
        ("running.a", true),
        ("pending.a", true),
        ("media-urls.a", true),
        ("media-info.a", true),
        ("no-media.a", true),
        ("lyrics.a", true),
        ("deep.a", true),
        ("big-10MiB.a", true),
        ("bom.a", true),
        ("gzip.a", true),
        ("no-content-type.a", true),
        ("no-store.a", true),
        ("http-404.a", true),
        ("body-404.a", true),
        ("code-string.a", false),
        ("data-null.a", false),
        ("status-archived.a", false),
        ("wrong-id.a", false),
        ("duplicate.a", false),
        ("trailing.a", false),
        ("invalid-utf8.a", false),
        ("html.a", false),
        ("html-502.a", false),
        ("body-422.a", false),
        ("http-455.a", false),
        ("body-455.a", false),
        ("http-500.a", false),
        ("body-501.a", false),
        ("http-505.a", false),
        ("http-302.a", false),
    ] {
        let first = poll(gateway.address, task).await;
        assert_eq!(
            first.header("cache-status").unwrap().contains("stored"),
            stored,
            "{task}: {first:?}"
        );
        let second = poll(gateway.address, task).await;
        assert_eq!(
            second.header("cache-status").unwrap().contains("; hit;"),
            stored,
            "{task}"
        );
        if task != "status-archived.a" {
            assert_eq!(first.body, second.body, "{task}");
        }
        assert_eq!(first.status, second.status, "{task}");
    }
}

#[tokio::test]
async fn what_clients_are_told_alike_is_counted_alike() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for (outcome, tasks) in [
        ("live", ["running.a", "no-media.a"]),
        ("terminal", ["ended.a", "ended-failed.a"]),
        ("unrecognised", ["data-null.a", "html.a"]),
    ] {
        for task in tasks {
            poll(gateway.address, task).await;
        }
        let series = format!("crun_gateway_upstream_requests_total{{account=\"other\",outcome=\"{outcome}\"}}");
        assert_eq!(gateway.metric(&series).await.to_string(), "2", "{outcome}");
    }
    let (_, metrics) = gateway.admin("/metrics").await;
    let series = metrics
        .matches("\ncrun_gateway_upstream_requests_total{account=\"other\"")
        .count();
    assert_eq!(series, 8, "{metrics}");
}

#[tokio::test]
async fn both_forms_of_an_error_come_through_in_their_own_form() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "budget: { limit: 1000 }").await;
    // Never five in a row that say that upstream is unavailable, and with a key of its own each: a refusal is remembered.
    for code in [401, 455, 402, 502, 403, 503, 404, 504, 422, 500, 501, 505] {
        let http = poll_as(gateway.address, &format!("ak_http_{code}"), &format!("http-{code}.a")).await;
        let body = poll_as(gateway.address, &format!("ak_body_{code}"), &format!("body-{code}.a")).await;
        assert_eq!((http.status.as_u16(), body.status.as_u16()), (code, 200));
        assert_eq!(http.json()["code"], code);
        assert_eq!(body.json()["code"], code);
        assert!(
            !http.json()["message"].as_str().unwrap().contains("crun-gateway"),
            "upstream's own words"
        );
    }
}

#[tokio::test]
async fn a_status_without_a_usual_phrase_gets_none_made_up() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let plain = raw::poll("http-455.a");
    let not_plain = plain.replacen("host:", "cache-control: max-age=9\r\nhost:", 1);
    for asked in [plain, not_plain] {
        let mut client = Raw::connect(gateway.address).await;
        client.send(asked).await.unwrap();
        let reply = client.reply().await;
        assert!(reply.head.starts_with("HTTP/1.1 455 \r\n"), "{reply:?}");
    }
}

#[tokio::test]
async fn headers_that_speak_of_upstreams_connection_stay_there() {
    let headers = "Content-Type: application/json; charset=utf-8\r\nSet-Cookie: a=b\r\nConnection: keep-alive, x-hop\r\n\
                   X-Hop: 1\r\nKeep-Alive: timeout=5\r\nX-RateLimit-Remaining: 3\r\nAge: 700\r\nETag: \"x\"\r\n";
    let body = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/running.json")).unwrap();
    let upstream = Scripted::always(response("200 OK", headers, &body)).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let reply = poll(gateway.address, &task_of(&body)).await;
    let mut names: Vec<_> = reply.headers.keys().map(http::HeaderName::as_str).collect();
    names.sort_unstable();
    let expected = [
        "age",
        "cache-control",
        "cache-status",
        "content-length",
        "content-type",
        "date",
        "via",
        "x-request-id",
    ];
    assert_eq!(names, expected);
    assert_eq!(reply.header("content-type"), Some("application/json; charset=utf-8"));
    assert_eq!(reply.header("age"), Some("0"));
}

#[tokio::test]
async fn what_is_kept_has_the_same_headers_whoever_gets_it() {
    let ended = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/success.json")).unwrap();
    let task = task_of(&ended);
    let upstream = Scripted::start(Duration::from_millis(300), move |head| {
        let (status, body) = if head.contains("task_id=unknown ") {
            ("404 Not Found", &b"{}"[..])
        } else {
            ("200 OK", &ended[..])
        };
        response(status, "Retry-After: 7\r\nLocation: /elsewhere\r\n", body)
    })
    .await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for task in [&*task, "unknown"] {
        let (miss, collapsed) = tokio::join!(poll(gateway.address, task), poll(gateway.address, task));
        let hit = poll(gateway.address, task).await;
        for reply in [&miss, &collapsed, &hit] {
            assert_eq!(
                ["retry-after", "location"].map(|name| reply.header(name)),
                [None; 2],
                "{task}: {reply:?}"
            );
        }
        let names = |reply: &Reply| reply.headers.keys().cloned().collect::<HashSet<_>>();
        assert_eq!((names(&miss), names(&collapsed)), (names(&hit), names(&hit)), "{task}");
    }
    assert_eq!(upstream.queries(), 2);
}

#[tokio::test]
async fn a_redirection_says_where_to() {
    let upstream = Scripted::always(response(
        "308 Permanent Redirect",
        "Location: /api/v2/TaskInfo\r\n",
        b"",
    ))
    .await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let reply = poll(gateway.address, "moved").await;
    assert_eq!(reply.status, 308);
    assert_eq!(reply.header("location"), Some("/api/v2/TaskInfo"));
}

#[tokio::test]
async fn a_missing_content_type_stays_missing() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let reply = poll(gateway.address, "no-content-type.a").await;
    assert_eq!(reply.json()["data"]["status"], "success");
    assert_eq!(reply.header("content-type"), None);
}

#[tokio::test]
async fn a_compressed_answer_is_kept_and_served_decoded() {
    let body = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/success.json")).unwrap();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&body).unwrap();
    let upstream = Scripted::always(response(
        "200 OK",
        "Content-Encoding: gzip\r\n",
        &encoder.finish().unwrap(),
    ))
    .await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for _ in 0..2 {
        let reply = poll(gateway.address, &task_of(&body)).await;
        assert_eq!(reply.body, body);
        assert_eq!(reply.header("content-encoding"), None);
    }
    assert_eq!(upstream.queries(), 1);
}

#[tokio::test]
async fn a_body_that_cannot_be_had_is_a_bounded_and_honest_error() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let config = "upstream: { url: \"URL\", timeout: \"1s\", max_body: \"1MiB\" }\nbudget: { limit: 1000 }";
    let gateway = Gateway::start(&upstream.url, &config.replace("URL", &upstream.url)).await;
    for (task, status) in [
        ("bomb.a", 502),
        ("big-2MiB.a", 502),
        ("brotli-claimed.a", 502),
        ("cut.a", 502),
        ("cut-head.a", 502),
        ("close.a", 502),
        ("reset.a", 502),
        ("hang.a", 504),
        ("drip.a", 504),
    ] {
        poll(gateway.address, task).await.assert_is_our_error(status);
        // Nothing of it is left to disturb the next.
        let next = format!("ended.after-{task}");
        assert_eq!(poll(gateway.address, &next).await.status, 200, "after {task}");
    }
}
