//! What passes through: everything but TaskInfo, untouched, as it comes, never retried, and on nobody's budget.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use crun_gateway::config::Config;
use crun_gateway::dial::{Dial, Stream};
use crun_gateway::gateway;
use crun_gateway::metrics::Metrics;
use crun_gateway::server::serve_connection;
use http::{Method, Request};
use http_body_util::Full;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::harness::client::{bare, try_request};
use crate::harness::raw::{Raw, header};
use crate::harness::scripted::response;
use crate::harness::{Gateway, KEY, PATIENCE, Reply, Scripted, Simulator, poll, request};

async fn quick() -> Simulator {
    Simulator::start(&["--latency", "0ms"]).await
}

fn with_headers(mut request: Request<Full<Bytes>>, headers: &[(&'static str, &str)]) -> Request<Full<Bytes>> {
    for (name, value) in headers {
        request.headers_mut().append(*name, value.parse().unwrap());
    }
    request
}

/// What the simulated upstream's echo saw of a header; empty without it.
fn seen(echoed: &serde_json::Value, name: &str) -> Vec<String> {
    serde_json::from_value(echoed["headers"][name].clone()).unwrap_or_default()
}

/// An upstream whose every connection is given to the test.
async fn upstream_by_hand() -> (String, mpsc::UnboundedReceiver<Raw>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (accepted, connections) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = accepted.send(Raw::over(stream));
        }
    });
    (url, connections)
}

async fn next(connections: &mut mpsc::UnboundedReceiver<Raw>) -> Raw {
    timeout(PATIENCE, connections.recv())
        .await
        .expect("a connection in time")
        .unwrap()
}

#[tokio::test]
async fn create_task_passes_and_costs_no_query() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let started = Instant::now();
    let mut asked = bare(Method::POST, "/api/v1/client/job/CreateTask");
    *asked.body_mut() = Full::from(r#"{"model":"suno/music-generate"}"#);
    let reply = request(gateway.address, asked).await;
    assert_eq!(reply.status, 200);
    assert!(reply.json()["data"]["task_id"].is_string(), "{reply:?}");
    // In the second in which a budget grants nothing: it waited for none.
    assert!(
        started.elapsed() < Duration::from_millis(900),
        "{:?}",
        started.elapsed()
    );
    let stats = upstream.stats().await;
    assert_eq!(stats["requests"], 0, "{stats}");
    assert_eq!(stats["paths"]["/api/v1/client/job/CreateTask"], 1, "{stats}");
    for (series, count) in [
        ("crun_gateway_passthrough_requests_total{code=\"2xx\"}", 1.0),
        ("crun_gateway_upstream_request_duration_seconds_count", 0.0),
    ] {
        let counted = gateway.metric(series).await;
        assert!((counted - count).abs() < 0.1, "{series} {counted}");
    }
}

#[tokio::test]
async fn requests_for_other_paths_are_counted_whether_they_pass_or_not() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let refused = request(gateway.address, bare(Method::GET, "/not/served")).await;
    assert_eq!(refused.status, 404);
    let counted = gateway
        .metric("crun_gateway_passthrough_requests_total{code=\"4xx\"}")
        .await;
    assert!((counted - 1.0).abs() < 0.1, "{counted}");
    let (_, text) = gateway.admin("/metrics").await;
    let help = "# HELP crun_gateway_passthrough_requests_total Requests for other paths than TaskInfo, streamed through or refused";
    assert!(text.contains(help), "{text}");
}

#[tokio::test]
async fn method_path_headers_and_body_arrive_as_they_were_sent() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let path = "/api/v1/echo/%D0%BD%D0%BE%D1%87%D1%8C/owner%2Fname.mp3;v=1?a=%2f%7E+b&&=&a=%zz&x[]={y}|^`?/:@%00&";
    for method in [
        Method::POST,
        Method::PUT,
        Method::PATCH,
        Method::DELETE,
        Method::OPTIONS,
        Method::GET,
    ] {
        let mut asked = with_headers(
            bare(method.clone(), path),
            &[
                ("authorization", "Bearer sk-llm-0123"),
                ("x-api-key", KEY),
                ("content-type", "application/json; charset=utf-8"),
                ("accept-encoding", "br, gzip"),
                ("cookie", "a=b"),
                ("user-agent", "a client/1"),
                ("x-twice", "one"),
                ("x-twice", "two"),
                ("if-none-match", "\"tag\""),
                ("range", "bytes=0-1"),
            ],
        );
        let has_body = !matches!(method, Method::GET | Method::OPTIONS);
        if has_body {
            *asked.body_mut() = Full::from("{\"a\": 1}\n");
        }
        let reply = request(gateway.address, asked).await;
        let echoed = reply.json();
        assert_eq!(echoed["method"], method.as_str());
        assert_eq!(echoed["path"], path);
        assert_eq!(echoed["body_length"], if has_body { 9 } else { 0 });
        for (name, values) in [
            ("authorization", vec!["Bearer sk-llm-0123"]),
            ("x-api-key", vec![KEY]),
            ("content-type", vec!["application/json; charset=utf-8"]),
            ("accept-encoding", vec!["br, gzip"]),
            ("cookie", vec!["a=b"]),
            ("user-agent", vec!["a client/1"]),
            ("x-twice", vec!["one", "two"]),
            ("if-none-match", vec!["\"tag\""]),
            ("range", vec!["bytes=0-1"]),
            ("via", vec!["1.1 crun-gateway"]),
            ("host", vec![upstream.url.strip_prefix("http://").unwrap()]),
        ] {
            assert_eq!(seen(&echoed, name), values, "{name}: {echoed}");
        }
        assert_eq!(reply.header("via"), Some("1.1 crun-gateway"));
    }
}

#[tokio::test]
async fn what_belongs_to_one_connection_is_removed_both_ways() {
    let upstream = Scripted::always(response(
        "207 Multi-Status",
        "Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nConnection: X-Hop, keep-alive\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n\
         Via: 1.1 edge\r\nX-Kept: yes\r\n",
        b"done",
    ))
    .await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let asked = with_headers(
        bare(Method::POST, "/api/v1/x"),
        &[
            ("connection", "x-secret, Keep-Alive"),
            ("connection", "x-other"),
            ("x-secret", "1"),
            ("x-other", "1"),
            ("keep-alive", "timeout=9"),
            ("proxy-connection", "keep-alive"),
            ("te", "trailers"),
            ("via", "1.0 before"),
            ("x-kept", "yes"),
        ],
    );
    let reply = request(gateway.address, asked).await;
    assert_eq!(reply.status, 207);
    assert_eq!(&reply.body[..], b"done");
    let all = |name: &str| -> Vec<_> { reply.headers.get_all(name).iter().collect() };
    assert_eq!(all("set-cookie"), ["a=1", "b=2"]);
    assert_eq!(all("via"), ["1.1 edge", "1.1 crun-gateway"]);
    assert_eq!(all("x-kept"), ["yes"]);
    for name in ["x-hop", "keep-alive", "connection"] {
        assert!(all(name).is_empty(), "{name}: {reply:?}");
    }
    let head = upstream.heads().remove(0).to_ascii_lowercase();
    for name in ["x-secret", "x-other", "keep-alive", "proxy-connection", "te:"] {
        assert!(!head.contains(name), "{name}: {head}");
    }
    assert!(
        head.contains("\r\nvia: 1.0 before\r\n") && head.contains("\r\nvia: 1.1 crun-gateway\r\n"),
        "{head}"
    );
    assert_eq!(header(&head, "x-kept"), Some("yes"));
}

#[tokio::test]
async fn upstreams_refusals_and_redirections_are_the_clients() {
    for status in [
        "204 No Content",
        "302 Found",
        "401 Unauthorized",
        "429 Too Many Requests",
        "500 Oops",
        "599 Odd",
    ] {
        let body: &[u8] = if status.starts_with("204") {
            b""
        } else {
            b"{\"code\": 7}"
        };
        let upstream = Scripted::always(match body {
            b"" => b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
            body => response(status, "Location: /elsewhere\r\nRetry-After: 7\r\n", body),
        })
        .await;
        let gateway = Gateway::start(&upstream.url, "").await;
        let reply = request(gateway.address, bare(Method::POST, "/api/v1/x")).await;
        assert_eq!(reply.status.as_str(), &status[..3]);
        assert_eq!(reply.body, body);
        if !body.is_empty() {
            assert_eq!(reply.header("location"), Some("/elsewhere"));
            assert_eq!(reply.header("retry-after"), Some("7"));
        }
        assert_eq!(upstream.queries(), 1);
    }
}

#[tokio::test]
async fn head_has_the_length_and_no_body() {
    let upstream = Scripted::start(Duration::ZERO, |_| {
        b"HTTP/1.1 200 OK\r\nContent-Length: 123456\r\nContent-Type: audio/mpeg\r\n\r\n".to_vec()
    })
    .await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let reply = request(gateway.address, bare(Method::HEAD, "/api/v1/file.mp3")).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-length"), Some("123456"));
    assert!(reply.body.is_empty());
    assert!(upstream.heads()[0].starts_with("HEAD /api/v1/file.mp3 HTTP/1.1\r\n"));
}

/// Of an answer to a HEAD nothing of it has to be believed to know where that ends.
#[tokio::test]
async fn a_length_that_upstream_says_twice_is_said_once_or_is_a_lie_whatever_was_asked() {
    let upstream = Scripted::start(Duration::ZERO, |head| {
        let lengths = &head.split(' ').nth(1).unwrap()["/api/v1/".len()..];
        let lengths = lengths.replace(';', "\r\nContent-Length: ");
        let body = if head.starts_with("GET") { "ab" } else { "" };
        format!("HTTP/1.1 200 OK\r\nContent-Length: {lengths}\r\n\r\n{body}").into_bytes()
    })
    .await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for method in ["GET", "HEAD"] {
        for (lengths, is_one) in [
            ("2", true),
            ("2;2", true),
            ("2,2", true),
            ("2,2;2", true),
            ("2;3", false),
            ("2,3", false),
            ("-2", false),
            ("+2", false),
            ("many", false),
            ("2,", false),
            ("", false),
            ("18446744073709551616", false),
        ] {
            let mut client = Raw::connect(gateway.address).await;
            let asked = format!(
                "{method} /api/v1/{lengths} HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\nconnection: close\r\n\r\n"
            );
            client.send(asked).await.unwrap();
            let head = client.head().await.unwrap_or_default().to_ascii_lowercase();
            let status = if is_one { 200 } else { 502 };
            assert!(
                head.starts_with(&format!("http/1.1 {status} ")),
                "{method} {lengths:?}: {head}"
            );
            let said = head.matches("content-length: ").count();
            assert!(
                !is_one || said == 1 && head.contains("content-length: 2\r\n"),
                "{method} {lengths:?}: {head}"
            );
        }
    }
}

#[tokio::test]
async fn events_stream_through_as_they_come() {
    let (url, mut connections) = upstream_by_hand().await;
    let gateway = Gateway::start(&url, "").await;
    let mut client = Raw::connect(gateway.address).await;
    let asked = "POST /api/v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n";
    client.send(asked).await.unwrap();
    let mut upstream = next(&mut connections).await;
    upstream.head().await.unwrap();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    upstream.send(head).await.unwrap();
    // Each is sent only when the one before it has arrived.
    let arrived = client.until("text/event-stream").await;
    assert!(arrived.starts_with("HTTP/1.1 200 OK\r\n"), "{arrived}");
    for number in 0..5 {
        let event = format!("data: {number}\n\n");
        let chunk = format!("{:x}\r\n{event}\r\n", event.len());
        upstream.send(chunk).await.unwrap();
        client.until(&event).await;
    }
    upstream.send("0\r\n\r\n").await.unwrap();
    client.until("0\r\n\r\n").await;
}

#[tokio::test]
async fn a_conversation_streams_both_ways() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let mut client = Raw::connect(gateway.address).await;
    let asked = "POST /api/v1/mirror HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    client.send(asked).await.unwrap();
    for number in 0..5 {
        let part = format!("part {number};");
        client.send(format!("{:x}\r\n{part}\r\n", part.len())).await.unwrap();
        client.until(&part).await;
    }
    client.send("0\r\n\r\n").await.unwrap();
    client.until("0\r\n\r\n").await;
}

#[tokio::test]
async fn a_body_of_unknown_length_passes_whatever_the_method() {
    let (url, mut connections) = upstream_by_hand().await;
    let gateway = Gateway::start(&url, "").await;
    for method in ["GET", "HEAD", "DELETE", "OPTIONS", "POST"] {
        let mut client = Raw::connect(gateway.address).await;
        let head = format!("{method} /api/v1/search HTTP/1.1\r\nhost: x\r\n");
        let chunked = format!("{head}transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
        client.send(chunked).await.unwrap();
        let mut upstream = next(&mut connections).await;
        let head_there = upstream.head().await.unwrap();
        assert_eq!(
            header(&head_there, "transfer-encoding"),
            Some("chunked"),
            "{head_there}"
        );
        assert_eq!(upstream.until("0\r\n\r\n").await, "5\r\nhello\r\n0\r\n\r\n", "{method}");
        upstream.send("HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        assert!(client.reply().await.is(204));
        // And one that is not there is none.
        client.send(format!("{head}\r\n")).await.unwrap();
        let head_there = next(&mut connections).await.head().await.unwrap();
        assert_eq!(header(&head_there, "transfer-encoding"), None, "{head_there}");
    }
}

#[tokio::test]
async fn large_bodies_pass_both_ways_byte_for_byte() {
    let upstream = quick().await;
    // Larger than any TaskInfo answer may be, and than all of those together.
    let config = format!(
        "upstream: {{ url: \"{}\", max_body: \"1MiB\" }}\nlimits: {{ body_bytes: \"2MiB\" }}",
        upstream.url
    );
    let gateway = Gateway::start(&upstream.url, &config).await;
    let body: Bytes = (0..24_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut asked = bare(Method::POST, "/api/v1/mirror");
    *asked.body_mut() = Full::from(body.clone());
    let reply = request(gateway.address, asked).await;
    assert_eq!(reply.status, 200);
    assert!(
        reply.body == body,
        "{} bytes came back of {}",
        reply.body.len(),
        body.len()
    );
}

#[tokio::test]
async fn a_request_that_upstream_breaks_off_is_never_sent_again() {
    let (url, mut connections) = upstream_by_hand().await;
    let gateway = Gateway::start(&url, "").await;
    let address = gateway.address;
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&requests);
    tokio::spawn(async move {
        while let Some(mut connection) = connections.recv().await {
            connection.head().await;
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    for method in [Method::POST, Method::GET] {
        let reply = request(address, bare(method, "/api/v1/x")).await;
        reply.assert_is_our_error(502);
    }
    assert_eq!(requests.load(Ordering::SeqCst), 2);
}

/// Upstream may have carried it out, and be paid for it.
#[tokio::test]
async fn what_becomes_of_a_request_that_was_sent_on_is_logged_at_info() {
    let (url, mut connections) = upstream_by_hand().await;
    let gateway = Gateway::start(&url, "log: { level: info }").await;
    let address = gateway.address;
    let post = async |path| request(address, bare(Method::POST, path)).await;

    assert_eq!(post("/not/served").await.status, 404);
    let (reply, _) = tokio::join!(post("/api/v1/x"), async {
        let mut connection = next(&mut connections).await;
        connection.head().await;
        connection
            .send("HTTP/1.1 201 Created\r\nX-Request-Id: up-1\r\nContent-Length: 0\r\n\r\n")
            .await
            .unwrap();
        connection
    });
    assert_eq!(reply.status, 201);
    let (reply, ()) = tokio::join!(post("/api/v1/x"), async {
        next(&mut connections).await.head().await;
    });
    reply.assert_is_our_error(502);
    let leaving = tokio::spawn(try_request(address, bare(Method::POST, "/api/v1/x")));
    let mut connection = next(&mut connections).await;
    connection.head().await;
    leaving.abort();
    gateway.logged("request passed through", 3).await;
    // Its client is to blame, and not upstream, whose connection ends with it.
    let mut client = Raw::connect(gateway.address).await;
    let method = "M".repeat(999);
    let head = format!("{method} /api/v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    client.send(head).await.unwrap();
    let mut connection = next(&mut connections).await;
    connection.head().await;
    client.send("z\r\n").await.unwrap();
    assert!(client.reply().await.is(400));

    let log = gateway.logged("request passed through", 4).await;
    let told = log.lines().filter(|line| line.contains("request passed through"));
    let told: Vec<_> = told.collect();
    for (line, words) in told.iter().zip([
        [r#"code=201 upstream_request_id="up-1""#, r#"method="POST""#],
        [r#"method="POST""#, "code=502"],
        [r#"method="POST""#, r#"detail="unanswered""#],
        [r#"method="_OTHER""#, "code=400"],
    ]) {
        assert!(words.iter().all(|word| line.contains(word)), "{words:?}: {line}");
    }
    assert!(
        !log.contains("request refused"),
        "what was not sent on is told at debug: {log}"
    );
}

#[tokio::test]
async fn an_answer_that_breaks_off_breaks_off_for_the_client_too() {
    let (url, mut connections) = upstream_by_hand().await;
    let gateway = Gateway::start(&url, "").await;
    let mut client = Raw::connect(gateway.address).await;
    let asked = "GET /api/v1/x HTTP/1.1\r\nhost: x\r\nx-request-id: the-one\r\n\r\n";
    client.send(asked).await.unwrap();
    let mut upstream = next(&mut connections).await;
    upstream.head().await.unwrap();
    upstream
        .send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        .await
        .unwrap();
    client.until("half").await;
    drop(upstream);
    assert!(!matches!(client.some().await, Ok(more) if !more.is_empty()));
    let log = gateway.logged("answer broken off", 1).await;
    let line = log.lines().find(|line| line.contains("answer broken off")).unwrap();
    assert!(line.contains("INFO") && line.contains("the-one"), "{line}");
}

#[tokio::test]
async fn an_answer_of_an_older_http_is_framed_as_any() {
    let (url, mut connections) = upstream_by_hand().await;
    let gateway = Gateway::start(&url, "").await;
    let mut client = Raw::connect(gateway.address).await;
    let asked = "GET /api/v1/x HTTP/1.1\r\nhost: x\r\n\r\n";
    client.send([asked, asked].concat()).await.unwrap();
    for body in ["first", "second"] {
        let mut upstream = next(&mut connections).await;
        upstream.head().await.unwrap();
        upstream.send(format!("HTTP/1.0 200 OK\r\n\r\n{body}")).await.unwrap();
        drop(upstream);
        let arrived = client.until("0\r\n\r\n").await;
        assert!(arrived.starts_with("HTTP/1.1 200 OK\r\n"), "{arrived}");
        assert_eq!(header(&arrived, "transfer-encoding"), Some("chunked"), "{arrived}");
        assert!(arrived.contains(body), "{arrived}");
    }
}

#[tokio::test]
async fn upstream_that_is_silent_is_told_from_a_client_that_is() {
    let (url, mut connections) = upstream_by_hand().await;
    let config = "budget: { max_wait: \"1s\" }\nlimits: { request_timeout: \"1s\" }";
    let gateway = Gateway::start(&url, config).await;
    let half = "POST /api/v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n\r\nhalf";
    let whole = format!("{half}half");
    // It does not fit into what lies between it and an upstream that reads none of it.
    let large = format!(
        "POST /api/v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{}",
        64 << 20,
        "x".repeat(32 << 20)
    );
    for (asked, is_upstreams) in [
        ("GET /api/v1/x HTTP/1.1\r\nhost: x\r\n\r\n", true),
        (&whole, true),
        (&large, true),
        (half, false),
    ] {
        let client = Raw::connect(gateway.address).await;
        let (mut answers, mut asks) = client.stream.into_split();
        let asked = asked.to_owned();
        let asking = tokio::spawn(async move {
            let _ = asks.write_all(asked.as_bytes()).await;
            asks
        });
        let _upstream = next(&mut connections).await;
        let mut answer = vec![0; 4096];
        let read = timeout(PATIENCE, answers.read(&mut answer)).await.unwrap().unwrap();
        let answer = String::from_utf8_lossy(&answer[..read]);
        asking.abort();
        assert!(
            answer.starts_with("HTTP/1.1 504 ") && answer.contains("limits.request_timeout"),
            "{answer}"
        );
        let [why, when] = ["proxy-status", "retry-after"].map(|name| header(&answer, name));
        let expected = [Some("crun-gateway; error=http_response_timeout"), Some("2")];
        assert_eq!([why, when], if is_upstreams { expected } else { [None; 2] }, "{answer}");
    }
}

#[tokio::test]
async fn upstream_that_is_down_is_503() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    let gateway = Gateway::start(&url, "").await;
    let reply = request(gateway.address, bare(Method::POST, "/api/v1/x")).await;
    reply.assert_is_our_error(503);
    assert!(reply.header("retry-after").is_some());
}

#[tokio::test]
async fn what_is_not_open_is_404_and_upstream_never_asked() {
    let upstream = quick().await;
    let ask = async |config: &str, path: &'static str| -> Reply {
        let gateway = Gateway::start(&upstream.url, config).await;
        request(gateway.address, bare(Method::POST, path)).await
    };
    for (config, path, is_open) in [
        ("", "/api/v1/echo", true),
        ("", "/api/v2/echo", false),
        ("", "/api/v1", false),
        ("", "/", false),
        ("", "/metrics", false),
        ("passthrough: []", "/api/v1/echo", false),
        ("passthrough: [\"/api/v1/echo/\"]", "/api/v1/echo/x", true),
        ("passthrough: [\"/api/v1/echo/\"]", "/api/v1/echo", false),
        ("passthrough: [\"/api/v1/echo/\"]", "/api/v1/echo/../mirror", false),
        ("passthrough: [\"/api/v1/echo/\"]", "/api/v1/mirror", false),
    ] {
        let reply = ask(config, path).await;
        if is_open {
            assert_eq!(reply.json()["path"], path);
        } else {
            reply.assert_is_our_error(404);
        }
    }
    let gateway = Gateway::start(&upstream.url, "passthrough: []").await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    assert_eq!(
        upstream.stats().await["paths"]["/api/v1/mirror"],
        serde_json::Value::Null
    );
}

#[tokio::test]
async fn unknown_keys_are_rejected_here_too() {
    let upstream = quick().await;
    let config = "unknown_keys: reject\naccounts: [{ name: music, keys: [{ env: \"MUSIC_KEY\" }] }]";
    let gateway = Gateway::start_with_env(&upstream.url, config, &[("MUSIC_KEY", "ak_known")]).await;
    for (headers, status) in [
        (&[("x-api-key", "ak_unknown")][..], 401),
        (&[("authorization", "Bearer ak_unknown")], 401),
        (
            &[("x-api-key", "ak_unknown"), ("authorization", "Bearer ak_known")],
            401,
        ),
        (&[("x-api-key", "ak_known")], 200),
        (&[("authorization", "Bearer ak_known")], 200),
        (&[("authorization", "bearer  ak_known")], 200),
    ] {
        let asked = with_headers(bare(Method::POST, "/api/v1/echo"), headers);
        let reply = request(gateway.address, asked).await;
        if status == 401 {
            reply.assert_is_our_error(401);
        } else {
            assert_eq!(reply.status, status, "{headers:?}: {reply:?}");
        }
    }
    assert_eq!(upstream.stats().await["paths"]["/api/v1/echo"], 3);
    // Who sends none is not told to have it listed.
    for headers in [&[][..], &[("authorization", "Basic ak_known")], &[("x-api-key", "")]] {
        let asked = with_headers(bare(Method::POST, "/api/v1/echo"), headers);
        let reply = request(gateway.address, asked).await;
        reply.assert_is_our_error(401);
        let message = reply.json()["message"].to_string();
        assert!(message.contains("send it in the x-api-key header"), "{message}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_request_with_it() {
    let (url, mut connections) = upstream_by_hand().await;
    let gateway = Gateway::start(&url, "").await;
    let get = "GET /api/v1/x HTTP/1.1\r\nhost: x\r\n\r\n";
    let upload = "POST /api/v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf";
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n";
    for (asked, behind, later, answered) in [
        // Before upstream has answered, as it answers and says no more, and in the middle of an upload.
        (get, "", "", ""),
        (get, "", "", chunked),
        (upload, "", "", ""),
        (upload, "", "", chunked),
        // It has asked for more.
        (get, "\r\n", "", ""),
        (get, get, "", ""),
        (get, "", get, ""),
        (get, get, "", chunked),
        (get, get, &get.repeat(500), ""),
    ] {
        let mut client = Raw::connect(gateway.address).await;
        client.send(format!("{asked}{behind}")).await.unwrap();
        let mut upstream = next(&mut connections).await;
        upstream.head().await.unwrap();
        client.send(later).await.unwrap();
        if asked == upload {
            upstream.until("half").await;
        }
        if !answered.is_empty() {
            upstream.send(answered).await.unwrap();
            client.until("half").await;
        }
        drop(client);
        let end = upstream.some().await;
        assert!(
            !matches!(&end, Ok(more) if !more.is_empty()),
            "{asked}{behind}{answered}: {end:?}"
        );
    }
    gone(&gateway).await;
}

/// Waits until the gateway has no connection to upstream any more.
async fn gone(gateway: &Gateway) {
    let has_none = gateway.shows("crun_gateway_upstream_connections", 0.0);
    timeout(Duration::from_secs(5), has_none).await.expect("it is closed");
}

/// What was counted, by class of the code.
async fn counted<const N: usize>(gateway: &Gateway, codes: [&str; N]) -> [String; N] {
    let mut counts = [const { String::new() }; N];
    for (count, code) in counts.iter_mut().zip(codes) {
        let series = format!("crun_gateway_passthrough_requests_total{{code=\"{code}\"}}");
        *count = gateway.metric(&series).await.to_string();
    }
    counts
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_is_counted_and_logged() {
    let (url, mut connections) = upstream_by_hand().await;
    let gateway = Gateway::start(&url, "log: { level: debug, format: json }").await;
    let mut client = Raw::connect(gateway.address).await;
    let asked = "POST /api/v1/x HTTP/1.1\r\nhost: x\r\nx-request-id: left\r\ncontent-length: 4\r\n\r\nbody";
    client.send(asked).await.unwrap();
    let mut upstream = next(&mut connections).await;
    upstream.until("body").await;
    drop(client);
    let log = gateway.logged("unanswered", 1).await;
    let line = log.lines().find(|line| line.contains("\"left\"")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(
        (&line["level"], &line["trace_id"].as_str().unwrap().len()),
        (&"INFO".into(), &32)
    );
    assert_eq!(log.matches("\"left\"").count(), 1, "{log}");
    assert_eq!(counted(&gateway, ["499", "5xx"]).await, ["1", "0"]);
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_an_answer_is_logged_once() {
    let (url, mut connections) = upstream_by_hand().await;
    let gateway = Gateway::start(&url, "log: { format: json }").await;
    for (begins, leaves) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", true),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
            true,
        ),
        // Upstream breaks off: that is told already.
        ("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", false),
        ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhalf", false),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n\r\n",
            false,
        ),
    ] {
        let mut client = Raw::connect(gateway.address).await;
        let asked = "GET /api/v1/x HTTP/1.1\r\nhost: x\r\nx-request-id: left\r\n\r\n";
        client.send(asked).await.unwrap();
        let mut upstream = next(&mut connections).await;
        upstream.head().await.unwrap();
        upstream.send(begins).await.unwrap();
        client.until("half").await;
        if leaves {
            drop(client);
            assert!(!matches!(upstream.some().await, Ok(more) if !more.is_empty()));
        } else {
            drop(upstream);
            gone(&gateway).await;
        }
    }
    let log = gateway.logged("answer abandoned", 2).await;
    let lines: Vec<serde_json::Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let told: Vec<_> = lines
        .iter()
        .filter(|line| line["request_id"] == "left" && line.get("method").is_none())
        .collect();
    assert_eq!(told.len(), 3, "{log}");
    for line in &told {
        assert_eq!(
            (&line["level"], line["trace_id"].as_str().unwrap().len()),
            (&"INFO".into(), 32),
            "{line}"
        );
    }
    assert_eq!(log.matches("answer abandoned").count(), 2, "{log}");
    assert_eq!(log.matches("answer broken off").count(), 1, "{log}");
}

/// How a client goes.
enum Leaves {
    WithReset,
    WithFin,
    /// It only says nothing more.
    Half,
}

#[tokio::test]
async fn a_body_that_its_client_does_not_end_is_not_upstreams_failure() {
    let (url, mut connections) = upstream_by_hand().await;
    let gateway = Gateway::start(&url, "log: { level: debug }").await;
    for (times, leaves) in (1..).zip([Leaves::WithReset, Leaves::WithFin, Leaves::Half]) {
        let mut client = Raw::connect(gateway.address).await;
        let half = "POST /api/v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf";
        client.send(half).await.unwrap();
        let mut upstream = next(&mut connections).await;
        upstream.until("half").await;
        match leaves {
            Leaves::WithReset => {
                client.stream.set_zero_linger().unwrap();
                drop(client);
            }
            Leaves::WithFin => drop(client),
            Leaves::Half => {
                client.stream.shutdown().await.unwrap();
                assert!(client.reply().await.is(400));
            }
        }
        // Told of as what was sent on, and as what was refused.
        gateway.logged("detail=\"malformed\"", 2 * times).await;
    }
    assert_eq!(counted(&gateway, ["4xx", "5xx"]).await, ["3", "0"]);
}

#[tokio::test]
async fn a_poll_whose_client_leaves_is_logged() {
    let upstream = Simulator::start(&["--latency", "10s"]).await;
    let gateway = Gateway::start(&upstream.url, "log: { level: debug }").await;
    let mut client = Raw::connect(gateway.address).await;
    client.send(crate::harness::raw::poll("ended.a")).await.unwrap();
    gateway.reaches("crun_gateway_requests_in_flight", 1).await;
    drop(client);
    let log = gateway.logged("poll abandoned", 1).await;
    assert!(log.contains("DEBUG"), "{log}");
    assert_eq!(counted(&gateway, ["499"]).await, ["0"]);
}

#[tokio::test]
async fn a_body_that_breaks_a_rule_under_way_is_counted_and_logged_once() {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    let (url, mut connections) = upstream_by_hand().await;
    let config = "limits: { request_body: \"1KiB\" }\nlog: { level: debug, format: json }";
    let gateway = Gateway::start(&url, config).await;
    let too_large = format!("400\r\n{}\r\n", "x".repeat(1 << 10));
    for (times, (rest, code, detail)) in [("ZZ\r\n", 400, "malformed"), (&too_large, 413, "body_too_large")]
        .into_iter()
        .enumerate()
    {
        let mut client = Raw::connect(gateway.address).await;
        let head = format!(
            "POST /api/v1/x HTTP/1.1\r\nhost: x\r\nx-request-id: {detail}\r\n\
             traceparent: 00-{TRACE}-00f067aa0ba902b7-01\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"
        );
        client.send(head).await.unwrap();
        let mut upstream = next(&mut connections).await;
        upstream.until("half").await;
        client.send(rest).await.unwrap();
        assert!(client.reply().await.is(code));
        let log = gateway.logged("request refused", times + 1).await;
        let lines: Vec<_> = log.lines().filter(|line| line.contains("request refused")).collect();
        assert_eq!(lines.len(), times + 1, "{log}");
        let line: serde_json::Value = serde_json::from_str(lines[times]).unwrap();
        for (field, value) in [("request_id", detail), ("trace_id", TRACE), ("detail", detail)] {
            assert_eq!(line[field], value, "{line}");
        }
        assert_eq!(line["code"], code, "{line}");
        let refused = format!("crun_gateway_refused_total{{reason=\"{detail}\"}}");
        assert!((gateway.metric(&refused).await - 1.0).abs() < 0.1);
    }
    assert_eq!(counted(&gateway, ["4xx", "5xx"]).await, ["2", "0"]);
}

#[tokio::test]
async fn an_early_refusal_of_a_large_upload_reaches_the_client() {
    let (url, mut connections) = upstream_by_hand().await;
    let gateway = Gateway::start(&url, "").await;
    // Its last answer on that connection, in either version.
    for (version, connection) in [("HTTP/1.1", "Connection: close\r\n"), ("HTTP/1.0", "")] {
        let mut client = Raw::connect(gateway.address).await;
        let head = "POST /api/v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\nfirst";
        client.send(head).await.unwrap();
        let mut upstream = next(&mut connections).await;
        upstream.head().await.unwrap();
        let refusal = format!("{version} 413 Content Too Large\r\n{connection}Content-Length: 9\r\n\r\ntoo large");
        upstream.send(refusal).await.unwrap();
        let reply = client.reply().await;
        assert!(reply.is(413), "{reply:?}");
        assert_eq!(reply.body, b"too large");
        assert!(
            reply.says_close(),
            "{version}: nobody reads the rest, so nobody finds the next request"
        );
    }
}

/// A client's connection to a gateway in memory, and the connections that it opens to upstream.
fn in_memory(draining: CancellationToken) -> (Raw<DuplexStream>, mpsc::UnboundedReceiver<Raw<DuplexStream>>) {
    let (dialled, connections) = mpsc::unbounded_channel();
    let dial: Dial = Arc::new(move || {
        let (near, far) = duplex(1 << 16);
        let _ = dialled.send(Raw::over(far));
        Box::pin(async move { Ok(Box::new(near) as Box<dyn Stream>) })
    });
    let mut config = Config::default();
    config.upstream.url = "http://upstream".parse().unwrap();
    let limits = config.limits.clone();
    let gateway = gateway::Gateway::new(config, dial, Arc::new(Metrics::new().unwrap())).unwrap();
    let (client, far) = duplex(1 << 16);
    tokio::spawn(async move {
        let peer = IpAddr::from(Ipv4Addr::LOCALHOST);
        serve_connection(far, peer, gateway, &limits, draining).await;
    });
    (Raw::over(client), connections)
}

#[tokio::test(start_paused = true)]
async fn an_upload_goes_on_for_a_while_behind_its_answer() {
    const SECOND: Duration = Duration::from_secs(1);
    // It takes so long, and its client goes on for so long.
    for (takes, goes_on) in [(14, 14), (20, 20), (20, 0)] {
        let (mut client, mut connections) = in_memory(CancellationToken::new());
        let length = takes * 1000;
        let head = format!("POST /api/v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
        client.send(head).await.unwrap();
        let mut upstream = connections.recv().await.unwrap();
        upstream.head().await.unwrap();
        upstream.send(response("200 OK", "", b"early")).await.unwrap();
        assert_eq!(client.reply().await.body, b"early");
        let answered = Instant::now();
        for _ in 0..goes_on.min(15) {
            sleep(SECOND).await;
            client.send([b'x'; 1000]).await.unwrap();
        }
        let mut came = 0;
        while came < length
            && let Ok(some) = upstream.some().await
            && !some.is_empty()
        {
            came += some.len();
        }
        if goes_on == takes && takes < 15 {
            assert_eq!(came, length);
            client.send("GET /elsewhere HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
            assert!(client.reply().await.is(404));
        } else {
            assert_eq!((came, answered.elapsed()), (goes_on.min(14) * 1000, 15 * SECOND));
            client.assert_ends().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_upstream_stops_taking_ends_after_a_minute() {
    let (mut client, mut connections) = in_memory(CancellationToken::new());
    let head = "POST /api/v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n";
    client.send(head).await.unwrap();
    let mut upstream = connections.recv().await.unwrap();
    upstream.head().await.unwrap();
    // As long as upstream takes some now and then, it goes on.
    let started = Instant::now();
    let (mut reading, mut writing) = tokio::io::split(client.stream);
    let uploading = tokio::spawn(async move { while writing.write_all(&[b'x'; 1 << 14]).await.is_ok() {} });
    let mut taken = vec![0; 1 << 17];
    for _ in 0..5 {
        sleep(Duration::from_secs(50)).await;
        upstream.stream.read_exact(&mut taken).await.unwrap();
    }
    let mut client = Raw::over(tokio::io::join(&mut reading, tokio::io::sink()));
    let head = client.head().await.unwrap();
    assert!(head.starts_with("HTTP/1.1 504 "), "{head}");
    assert_eq!(header(&head, "connection"), Some("close"));
    let detail = Some("crun-gateway; detail=upload_stalled");
    assert_eq!(header(&head, "cache-status"), detail);
    assert_eq!(started.elapsed().as_secs(), 5 * 50 + 60);
    uploading.abort();
}

#[tokio::test(start_paused = true)]
async fn who_reads_slowly_is_not_idle() {
    let (mut client, mut connections) = in_memory(CancellationToken::new());
    client.send("GET /api/v1/x HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut upstream = connections.recv().await.unwrap();
    upstream.head().await.unwrap();
    // More than the client's side takes at once, and no more than is taken off upstream before it is sent.
    let large = vec![b'x'; 200 << 10];
    upstream.send(response("200 OK", "", &large)).await.unwrap();
    sleep(2 * Config::default().limits.idle_timeout).await;
    assert_eq!(client.reply().await.body, large);
    client.send("GET /elsewhere HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(client.reply().await.is(404), "and may ask on");
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_take_away_what_is_asked_behind_an_answer_that_is_still_being_sent() {
    let draining = CancellationToken::new();
    let (mut client, mut connections) = in_memory(draining.clone());
    let get = "GET /api/v1/x HTTP/1.1\r\nhost: x\r\n\r\n";
    client.send(get).await.unwrap();
    let mut upstream = connections.recv().await.unwrap();
    upstream.head().await.unwrap();
    let large = vec![b'x'; 1 << 20];
    let answer = response("200 OK", "", &large);
    tokio::spawn(async move {
        let _ = upstream.send(answer).await;
    });
    let head = client.head().await.unwrap();
    assert_eq!(header(&head, "connection"), None, "it may ask on");
    draining.cancel();
    // Longer than an idle connection stays open.
    sleep(Duration::from_secs(10)).await;
    client.send(get).await.unwrap();
    client.body(large.len()).await.unwrap();
    let mut upstream = connections.recv().await.unwrap();
    upstream.head().await.unwrap();
    upstream.send(response("200 OK", "", b"second")).await.unwrap();
    let second = client.reply().await;
    assert!(second.body == b"second" && second.says_close(), "{second:?}");
    client.assert_ends().await;
}

#[tokio::test]
async fn a_client_that_expects_100_continue_is_told_to_go_on() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let mut client = Raw::connect(gateway.address).await;
    let head = "POST /api/v1/echo HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
    client.send(head).await.unwrap();
    assert_eq!(client.until("\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    client.send("body").await.unwrap();
    let reply = client.reply().await;
    assert!(reply.is(200));
    assert_eq!(reply.json()["body_length"], 4);
    assert!(client.poll("ended.a").await.is(200));
}
