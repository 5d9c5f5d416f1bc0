//! Spans tell the life of a request to a collector, and hold up nobody, whatever the collector does.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::harness::client::{bare, poll_request, request};
use crate::harness::collector::{Collector, Span, Takes, socket};
use crate::harness::raw::keep_hitting;
use crate::harness::scripted::response;
use crate::harness::{Gateway, KEY, PATIENCE, Raw, Scripted, Simulator, TASK_INFO, poll};
use crate::tls::Identity;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";
const POLL: &str = "GET /api/v1/client/job/TaskInfo";
const EXPORTED: &str = "crun_gateway_spans_exported_total";

fn dropped(why: &str) -> String {
    format!("crun_gateway_spans_dropped_total{{reason=\"{why}\"}}")
}

/// A configuration that exports to `collector`.
fn to(collector: SocketAddr, more: &str) -> String {
    format!("otlp: {{ endpoint: \"http://{collector}\"{more} }}")
}

const ALL: &str = ", sample_ratio: 1.0";

fn in_trace(mut request: Request<Full<Bytes>>, flags: &str) -> Request<Full<Bytes>> {
    let traceparent = format!("00-{TRACE}-{PARENT}-{flags}");
    request
        .headers_mut()
        .insert("traceparent", traceparent.parse().unwrap());
    request
}

#[track_caller]
fn named<'s>(spans: &'s [Span], name: &str) -> &'s Span {
    let mut found = spans.iter().filter(|span| span.name == name);
    let span = found.next().unwrap_or_else(|| panic!("no {name} in {spans:#?}"));
    assert!(found.next().is_none(), "more than one {name} in {spans:#?}");
    span
}

#[tokio::test]
async fn the_life_of_a_poll_is_told_in_the_clients_trace() {
    let collector = Collector::start(Takes::Everything);
    let upstream = Simulator::start(&["--latency", "50ms"]).await;
    let config = to(collector.address, ", sample_ratio: 0.0");
    let gateway = Gateway::start(&upstream.url, &config).await;
    let mut asked = in_trace(poll_request(KEY, "ended.a"), "01");
    asked.headers_mut().insert("x-request-id", "the-one".parse().unwrap());
    assert_eq!(request(gateway.address, asked).await.status, 200);
    let spans = collector.until("7 spans", |spans| spans.len() >= 7).await;
    assert_eq!(spans.len(), 7, "{spans:#?}");

    let request_span = named(&spans, POLL);
    assert!(
        spans.iter().all(|span| span.trace == TRACE && !span.has_failed),
        "{spans:#?}"
    );
    assert_eq!((request_span.parent.as_deref(), request_span.kind), (Some(PARENT), 2));
    for (key, value) in [
        ("http.request.method", "GET"),
        ("http.route", TASK_INFO),
        ("http.response.status_code", "200"),
        ("crun_gateway.account", "other"),
        ("crun_gateway.task", "ended.a"),
        ("crun_gateway.cache", "miss"),
        ("crun_gateway.code", "200"),
        ("crun_gateway.request_id", "the-one"),
    ] {
        assert_eq!(request_span.says(key), value, "{key}");
    }
    let flight = named(&spans, "flight");
    assert!(flight.is_child_of(request_span) && flight.kind == 1);
    assert!(named(&spans, "cache").is_child_of(request_span));
    let steps = ["wait for turn", "connect", "wait for permit", "query"].map(|name| named(&spans, name));
    for pair in steps.windows(2) {
        assert!(
            pair[0].ended <= pair[1].began + 1_000_000,
            "one after the other: {spans:#?}"
        );
    }
    for step in steps {
        assert!(step.is_child_of(flight), "{step:?}");
        assert!(
            step.began + 1_000_000 >= flight.began && step.ended <= flight.ended + 1_000_000,
            "{step:?}"
        );
    }
    let query = steps[3];
    assert_eq!(query.kind, 3);
    assert!(query.ended - query.began >= 50_000_000, "{query:?}");
    for (key, value) in [
        ("http.response.status_code", "200"),
        ("crun_gateway.outcome", "terminal"),
        ("crun_gateway.attempt", "1"),
    ] {
        assert_eq!(query.says(key), value, "{key}");
    }
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let age = now.saturating_sub(Duration::from_nanos(request_span.ended));
    assert!(age < PATIENCE, "the wall clock's time: {age:?}");

    // Kept by now: nothing but the look at it.
    let again = in_trace(poll_request(KEY, "ended.a"), "01");
    assert_eq!(request(gateway.address, again).await.status, 200);
    let spans = collector.until("9 spans", |spans| spans.len() >= 9).await;
    let hit = spans[7..].iter().find(|span| span.name == POLL).unwrap();
    assert_eq!(hit.says("crun_gateway.cache"), "hit");
    assert!(
        spans[7..]
            .iter()
            .any(|span| span.name == "cache" && span.is_child_of(hit))
    );
    assert_eq!(spans.len(), 9, "{spans:#?}");
}

#[tokio::test]
async fn who_joins_a_flight_is_linked_to_it() {
    let collector = Collector::start(Takes::Everything);
    let upstream = Simulator::start(&["--latency", "200ms"]).await;
    let gateway = Gateway::start(&upstream.url, &to(collector.address, ALL)).await;
    // Nothing is granted in the first second: all of them find the first one's flight.
    let mut polls = JoinSet::new();
    for _ in 0..5 {
        let address = gateway.address;
        polls.spawn(async move { poll(address, "ended.a").await });
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200);
    }
    let polled = |spans: &[Span]| spans.iter().filter(|span| span.name == POLL).count() == 5;
    let is_told = |spans: &[Span]| polled(spans) && spans.iter().any(|span| span.name == "flight");
    let spans = collector.until("5 polls and a flight", is_told).await;
    let flight = named(&spans, "flight");
    let (leaders, followers): (Vec<_>, Vec<_>) = spans
        .iter()
        .filter(|span| span.name == POLL)
        .partition(|span| flight.is_child_of(span));
    assert_eq!((leaders.len(), followers.len()), (1, 4), "{spans:#?}");
    assert!(leaders[0].links.is_empty() && leaders[0].says("crun_gateway.cache") == "miss");
    for follower in followers {
        assert_ne!(follower.trace, flight.trace);
        let [link] = &follower.links[..] else {
            panic!("{follower:?}")
        };
        assert_eq!((&link.trace_id, &link.span_id), (&flight.trace, &flight.id));
        assert_eq!(follower.says("crun_gateway.cache"), "collapsed");
    }
}

#[tokio::test]
async fn what_is_streamed_through_is_told_to_its_last_byte() {
    let collector = Collector::start(Takes::Everything);
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, &to(collector.address, ALL)).await;
    for (method, path) in [
        (Method::POST, "/api/v1/echo"),
        (Method::from_bytes(b"BREW").unwrap(), "/api/v1/echo"),
        (Method::GET, "/nowhere/at/all"),
    ] {
        request(gateway.address, in_trace(bare(method, path), "01")).await;
    }
    let spans = collector.until("5 spans", |spans| spans.len() >= 5).await;
    let posted = named(&spans, "POST /api/v1/");
    assert_eq!((posted.kind, posted.says("http.response.status_code")), (2, "200"));
    let call = named(&spans, "POST");
    assert!(call.is_child_of(posted) && call.kind == 3);
    assert_eq!(call.says("http.response.status_code"), "200");
    assert!(posted.ended >= call.ended, "both to the last byte: {spans:#?}");
    assert_eq!(named(&spans, "HTTP /api/v1/").says("http.request.method"), "_OTHER");
    let nowhere = named(&spans, "GET");
    assert_eq!(
        (
            nowhere.says("http.response.status_code"),
            nowhere.says("crun_gateway.detail")
        ),
        ("404", "path")
    );
    assert!(!nowhere.has_failed && spans.len() == 5, "{spans:#?}");
}

#[tokio::test]
async fn upstreams_part_has_failed_where_it_cannot_be_asked() {
    let collector = Collector::start(Takes::Everything);
    let gone = socket();
    let url = format!("http://{}", gone.local_addr().unwrap());
    let gateway = Gateway::start(&url, &to(collector.address, ALL)).await;
    request(gateway.address, bare(Method::POST, "/api/v1/x")).await;
    let spans = collector.until("2 spans", |spans| spans.len() >= 2).await;
    for name in ["POST", "POST /api/v1/"] {
        let span = named(&spans, name);
        assert!(span.has_failed, "{span:?}");
        assert_eq!(span.says("crun_gateway.detail"), "no_connection");
    }
}

#[tokio::test]
async fn whatever_is_not_answered_in_time_has_failed() {
    let collector = Collector::start(Takes::Everything);
    // Connections open, and nobody reads what comes on them.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let config = "budget: { max_wait: \"1s\" }\nlimits: { request_timeout: \"1s\" }\n";
    let config = config.to_owned() + &to(collector.address, ALL);
    let gateway = Gateway::start(&url, &config).await;
    assert_eq!(
        request(gateway.address, bare(Method::POST, "/api/v1/x")).await.status,
        504
    );
    let spans = collector.until("2 spans", |spans| spans.len() >= 2).await;
    for name in ["POST", "POST /api/v1/"] {
        let span = named(&spans, name);
        assert!(span.has_failed, "{span:?}");
        assert_eq!(span.says("crun_gateway.detail"), "request_timeout");
    }
}

#[tokio::test]
async fn what_a_client_is_told_of_its_broken_body_is_told_of_its_poll() {
    let collector = Collector::start(Takes::Everything);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let gateway = Gateway::start(&url, &to(collector.address, ALL)).await;
    let mut client = Raw::connect(gateway.address).await;
    let head = format!("GET {TASK_INFO}?task_id=a HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\n");
    client.send(head + "transfer-encoding: chunked\r\n\r\n").await.unwrap();
    // Upstream has the query, and hangs up on both attempts only when the body is broken.
    for attempt in 1..=2 {
        let mut upstream = Raw::over(listener.accept().await.unwrap().0);
        upstream.head().await.unwrap();
        if attempt == 1 {
            client.send("no size\r\n").await.unwrap();
        }
    }
    assert!(client.reply().await.is(400));
    let is_poll = |span: &Span| span.name == POLL;
    let spans = collector.until("poll", |spans| spans.iter().any(is_poll)).await;
    let poll = named(&spans, POLL);
    assert_eq!(poll.says("http.response.status_code"), "400");
    assert_eq!(poll.says("crun_gateway.detail"), "malformed");
}

#[tokio::test]
async fn an_answer_that_breaks_off_has_failed() {
    let collector = Collector::start(Takes::Everything);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let gateway = Gateway::start(&url, &to(collector.address, ALL)).await;
    let mut client = Raw::connect(gateway.address).await;
    let asked = "POST /api/v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n";
    client.send(asked).await.unwrap();
    let mut upstream = Raw::over(listener.accept().await.unwrap().0);
    upstream.head().await.unwrap();
    let half = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf";
    upstream.send(half).await.unwrap();
    client.until("half").await;
    drop(upstream);
    let spans = collector.until("2 spans", |spans| spans.len() >= 2).await;
    for name in ["POST", "POST /api/v1/"] {
        let span = named(&spans, name);
        assert!(span.has_failed, "{span:?}");
        assert_eq!(span.says("http.response.status_code"), "200");
    }
}

#[tokio::test]
async fn whoever_began_a_trace_decides_whether_it_is_kept() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    for (ratio, of_own) in [(", sample_ratio: 0.0", false), (ALL, true)] {
        let collector = Collector::start(Takes::Everything);
        let gateway = Gateway::start(&upstream.url, &to(collector.address, ratio)).await;
        assert_eq!(poll(gateway.address, "ended.own").await.status, 200);
        request(gateway.address, in_trace(poll_request(KEY, "ended.unsampled"), "00")).await;
        request(gateway.address, in_trace(poll_request(KEY, "ended.sampled"), "01")).await;
        let is_task =
            |task: &'static str| move |span: &Span| span.says.get("crun_gateway.task").is_some_and(|of| of == task);
        let spans = collector
            .until("the sampled", |spans| spans.iter().any(is_task("ended.sampled")))
            .await;
        assert!(!spans.iter().any(is_task("ended.unsampled")), "{spans:#?}");
        assert_eq!(spans.iter().any(is_task("ended.own")), of_own, "{spans:#?}");
    }
}

#[tokio::test]
async fn a_key_in_the_wrong_place_is_in_no_span() {
    const SECRET: &str = "ak_S3cr3tS3cr3tS3cr3tS3cr3t";
    let collector = Collector::start(Takes::Everything);
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let config = format!(
        "accounts: [{{ name: music, keys: [{{ env: MUSIC }}] }}]\n{}",
        to(collector.address, ALL)
    );
    let gateway = Gateway::start_with_env(&upstream.url, &config, &[("MUSIC", SECRET)]).await;
    let mut asked = poll_request(SECRET, SECRET);
    asked.headers_mut().insert("x-request-id", SECRET.parse().unwrap());
    request(gateway.address, asked).await;
    let path = format!("/api/v1/{SECRET}?key={SECRET}");
    request(
        gateway.address,
        bare(Method::from_bytes(SECRET.as_bytes()).unwrap(), &path),
    )
    .await;
    let spans = collector.until("two requests", |spans| spans.len() >= 9).await;
    assert_eq!(named(&spans, POLL).says("crun_gateway.account"), "music");
    for body in collector.bodies() {
        assert!(!String::from_utf8_lossy(&body).contains("S3cr3t"), "{body:?}");
    }
}

#[tokio::test]
async fn upstream_is_told_of_the_query_where_it_is_told() {
    let collector = Collector::start(Takes::Everything);
    let upstream = Scripted::start(Duration::ZERO, |_| {
        response(
            "200 OK",
            "",
            br#"{"code":200,"message":"","data":{"task_id":"a","status":"failed"}}"#,
        )
    })
    .await;
    let config = format!(
        "upstream: {{ url: \"{}\", traceparent: true }}\n{}",
        upstream.url,
        to(collector.address, "")
    );
    let gateway = Gateway::start(&upstream.url, &config).await;
    request(gateway.address, in_trace(poll_request(KEY, "a"), "01")).await;
    request(gateway.address, in_trace(bare(Method::POST, "/api/v1/x"), "01")).await;
    let spans = collector.until("9 spans", |spans| spans.len() >= 9).await;
    for (head, name) in upstream.heads().iter().zip(["query", "POST"]) {
        let told = format!("traceparent: 00-{TRACE}-{}-01\r\n", named(&spans, name).id);
        assert!(head.contains(&told), "{told} in {head}");
    }
}

#[tokio::test]
async fn a_collector_that_hangs_holds_up_neither_requests_nor_a_stop() {
    let collector = Collector::start(Takes::Hangs);
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, &to(collector.address, ALL)).await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    let mut clients = keep_hitting(gateway.address);
    // What does not fit into the queue is dropped, and counted.
    gateway.reaches(&dropped("queue_full"), 1000).await;
    assert!(clients.try_join_next().is_none(), "all of them were answered");
    assert!(collector.asked() >= 1);
    assert_eq!(gateway.metric(EXPORTED).await.to_string(), "0");
    drop(clients);
    gateway.terminate();
    let stopping = Instant::now();
    assert_eq!(gateway.exit().await.code(), Some(0));
    // 2 s for the last requests, 2 s for the last spans, and some for a busy machine.
    assert!(stopping.elapsed() < Duration::from_secs(8), "{:?}", stopping.elapsed());
}

#[tokio::test]
async fn a_collector_that_was_away_gets_what_it_missed() {
    let port = socket();
    let address = port.local_addr().unwrap();
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, &to(address, ALL)).await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    let log = gateway.logged("does not take spans", 1).await;
    assert!(log.contains("WARN"), "{log}");
    let collector = Collector::start_at(port, Takes::Nothing(503), None);
    let asked = async {
        while collector.asked() == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, asked).await.expect("it tries again");
    collector.takes(Takes::Everything);
    let spans = collector.until("7 spans", |spans| spans.len() >= 7).await;
    assert_eq!(named(&spans, POLL).says("crun_gateway.task"), "ended.a");
    let log = gateway.logged("takes spans again", 1).await;
    assert_eq!(
        log.matches("does not take spans").count(),
        1,
        "once for as long as it lasts: {log}"
    );
    gateway.reaches(EXPORTED, 7).await;
}

#[tokio::test]
async fn what_a_collector_refuses_is_counted_and_not_sent_again() {
    let collector = Collector::start(Takes::Nothing(400));
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, &to(collector.address, ALL)).await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    gateway.reaches(&dropped("refused"), 7).await;
    collector.takes(Takes::AllBut(1));
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    gateway.reaches(&dropped("refused"), 8).await;
    assert_eq!(gateway.metric(EXPORTED).await.to_string(), "1");
    assert_eq!(collector.spans().len(), 2, "the hit's, and nothing again");
}

#[tokio::test]
async fn a_stop_loses_no_span() {
    let collector = Collector::start(Takes::Everything);
    // Longer than the grace of a stop: the process ends as soon as the answer is given.
    let upstream = Simulator::start(&["--latency", "3s"]).await;
    let mut gateway = Gateway::start(&upstream.url, &to(collector.address, ALL)).await;
    let address = gateway.address;
    let last = tokio::spawn(async move { poll(address, "ended.last").await });
    upstream.asked(1).await;
    gateway.terminate();
    assert_eq!(last.await.unwrap().status, 200);
    assert_eq!(gateway.exit().await.code(), Some(0));
    let spans = collector.spans();
    assert_eq!(named(&spans, POLL).says("http.response.status_code"), "200");
    assert_eq!(named(&spans, "query").says("crun_gateway.outcome"), "terminal");
}

#[tokio::test]
async fn a_collector_behind_tls_is_trusted_by_the_operators_roots_alone() {
    let identity = Identity::of("127.0.0.1");
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let acceptor = identity.acceptor(&["h2", "http/1.1"]);
    let collector = Collector::start_at(socket(), Takes::Everything, Some(acceptor));
    let config = |more: &str| {
        format!(
            "otlp: {{ endpoint: \"https://{}\", sample_ratio: 1.0{more} }}",
            collector.address
        )
    };
    let distrusts = Gateway::start(&upstream.url, &config("")).await;
    assert_eq!(poll(distrusts.address, "ended.a").await.status, 200);
    let log = distrusts.logged("does not take spans", 1).await;
    assert!(log.contains("certificate"), "{log}");
    assert_eq!(collector.spans().len(), 0);
    let trusts = config(&format!(", ca_file: \"{}\"", identity.file("root.pem")));
    let gateway = Gateway::start(&upstream.url, &trusts).await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    collector
        .until("a poll", |spans| spans.iter().any(|span| span.name == POLL))
        .await;
}
