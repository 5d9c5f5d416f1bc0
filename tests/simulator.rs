//! The simulated upstream over real sockets: what the gateway's own tests rely on.
//!
//! - a task's life: `a_task_runs_and_then_succeeds`, `the_same_state_gives_the_same_bytes`
//! - steering: `ids_steer_the_body`, `ids_steer_the_transport`, `ids_steer_what_no_library_would_write`, `keys_steer`, `padding_…`, `a_bomb_…`
//! - the limiter: `a_sixteenth_quick_query_…`, `accounts_…`, `a_429_…`, `arrivals_carry_the_kernel's stamp`
//! - connections: `tls_…`, `an_idle_connection_…`, `a_connection_closes_…`, `a_held_back_…`
//! - the other endpoints: `other_paths_…`, `chat_streams_…`, `echo_…`, `mirror_…`

#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall fail")]

use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use crun_gateway::simulator::{RateLimitForm, RetryAfter, UpstreamArgs, serve};
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

const PATIENCE: Duration = Duration::from_secs(20);
const GZIP: &str = "content-encoding";

/// A simulated upstream that ends with the test.
struct Upstream {
    address: SocketAddr,
    _running: DropGuard,
}

/// Quick, and never at its limit.
fn quick() -> UpstreamArgs {
    UpstreamArgs {
        latency: Duration::ZERO,
        limit: 1_000_000,
        ..UpstreamArgs::default()
    }
}

impl Upstream {
    async fn start(args: UpstreamArgs) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        tokio::spawn(serve(listener, args, shutdown.clone().cancelled_owned()));
        Self {
            address,
            _running: shutdown.drop_guard(),
        }
    }

    async fn connect(&self) -> Client {
        Client::over(TcpStream::connect(self.address).await.unwrap()).await
    }

    async fn poll(&self, id: &str) -> Answer {
        self.connect().await.poll(id).await
    }

    async fn stats(&self) -> Value {
        self.connect().await.get("/__stats").await.json()
    }

    /// Sends the poll of `id` as raw bytes and returns all that came back until the end.
    async fn raw(&self, id: &str) -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(self.address).await?;
        stream.write_all(raw_poll(id).as_bytes()).await?;
        let mut all = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut all)).await.unwrap()?;
        Ok(all)
    }
}

fn raw_poll(id: &str) -> String {
    format!("GET /api/v1/client/job/TaskInfo?task_id={id} HTTP/1.1\r\nhost: upstream\r\nx-api-key: k\r\n\r\n")
}

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, std::convert::Infallible>;

/// One connection.
struct Client(SendRequest<Body>);

impl Client {
    async fn over(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let (sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        key: Option<&str>,
        body: Body,
    ) -> Response<hyper::body::Incoming> {
        let mut request = Request::builder().method(method).uri(path).header("host", "upstream");
        if let Some(key) = key {
            request = request.header("x-api-key", key);
        }
        timeout(PATIENCE, self.0.send_request(request.body(body).unwrap()))
            .await
            .unwrap()
            .unwrap()
    }

    async fn ask(&mut self, method: Method, path: &str, key: Option<&str>, body: &'static str) -> Answer {
        let response = self.send(method, path, key, Full::from(body).boxed_unsync()).await;
        let (head, body) = response.into_parts();
        let body = timeout(PATIENCE, body.collect()).await.unwrap().unwrap().to_bytes();
        Answer { head, body }
    }

    async fn get(&mut self, path: &str) -> Answer {
        self.ask(Method::GET, path, Some("k"), "").await
    }

    async fn poll_as(&mut self, key: Option<&str>, id: &str) -> Answer {
        let id: String = form_urlencoded::byte_serialize(id.as_bytes()).collect();
        let path = format!("/api/v1/client/job/TaskInfo?task_id={id}");
        self.ask(Method::GET, &path, key, "").await
    }

    async fn poll(&mut self, id: &str) -> Answer {
        self.poll_as(Some("k"), id).await
    }
}

struct Answer {
    head: http::response::Parts,
    body: Bytes,
}

impl Answer {
    fn http(&self) -> u16 {
        self.head.status.as_u16()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn status(&self) -> Value {
        self.json()["data"]["status"].clone()
    }

    fn header(&self, name: &str) -> &str {
        self.head.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

fn now() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

#[tokio::test]
async fn a_task_runs_and_then_succeeds() {
    let run_time = Duration::from_millis(600);
    let upstream = Upstream::start(UpstreamArgs { run_time, ..quick() }).await;
    let mut client = upstream.connect().await;
    let first = client.poll("a task").await;
    assert_eq!(
        (first.status(), first.json()["data"]["task_id"].clone()),
        (json!("pending"), json!("a task"))
    );
    assert_eq!(first.header("content-type"), "application/json");
    let started = Instant::now();
    let mut seen = vec![json!("pending")];
    while seen.last() != Some(&json!("success")) {
        assert!(started.elapsed() < PATIENCE);
        let status = client.poll("a task").await.status();
        if seen.last() != Some(&status) {
            seen.push(status);
        }
    }
    assert!(
        seen == [json!("pending"), json!("running"), json!("success")] || seen == [json!("pending"), json!("success")]
    );
    let ended = client.poll("a task").await.json();
    assert_eq!(ended["data"]["result"]["suno_data"].as_array().unwrap().len(), 2);
    assert!(ended["data"]["complete_at"].as_u64() >= ended["data"]["create_at"].as_u64());
}

#[tokio::test]
async fn the_same_state_gives_the_same_bytes() {
    let upstream = Upstream::start(quick()).await;
    for id in ["running.1", "ended.1", "ended-failed.1", "gzip.1"] {
        assert_eq!(upstream.poll(id).await.body, upstream.poll(id).await.body, "{id}");
    }
}

#[tokio::test]
async fn ids_steer_the_body() {
    let upstream = Upstream::start(UpstreamArgs {
        run_time: Duration::ZERO,
        ..quick()
    })
    .await;
    let mut client = upstream.connect().await;
    for (id, http, code, status) in [
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
        let answer = client.poll(id).await;
        assert_eq!(
            (answer.http(), answer.json()["code"].clone(), answer.status()),
            (http, code, status),
            "{id}"
        );
    }
    assert_eq!(client.poll("no-media.1").await.json()["data"]["result"], Value::Null);
    assert_eq!(
        client.poll("wrong-id.1").await.json()["data"]["task_id"],
        "another-task"
    );
    assert_eq!(client.poll("html.1").await.header("content-type"), "text/html");
    assert_eq!(client.poll("html-502.1").await.http(), 502);
    assert_eq!(client.poll("no-content-type.1").await.header("content-type"), "");
    assert!(client.poll("bom.1").await.body.starts_with(b"\xef\xbb\xbf{"));
    assert!(serde_json::from_slice::<Value>(&client.poll("trailing.1").await.body).is_err());
    assert!(str::from_utf8(&client.poll("invalid-utf8.1").await.body).is_err());
    let uncacheable = client.poll("no-store.1").await;
    assert!(uncacheable.header("cache-control").contains("no-store"));
    assert!(!uncacheable.header("set-cookie").is_empty());
    let duplicate = client.poll("duplicate.1").await.body;
    assert_eq!(String::from_utf8_lossy(&duplicate).matches("\"status\":").count(), 2);
}

#[tokio::test]
async fn ids_steer_the_transport() {
    let upstream = Upstream::start(quick()).await;
    assert_eq!(upstream.raw("close.1").await.unwrap(), b"");
    assert_eq!(
        upstream.raw("reset.1").await.unwrap_err().kind(),
        std::io::ErrorKind::ConnectionReset
    );
    assert_eq!(upstream.raw("cut-head.1").await.unwrap().len(), 30);
    let cut = String::from_utf8_lossy(&upstream.raw("cut.1").await.unwrap()).into_owned();
    let (head, body) = cut.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("content-length: 1") && !body.is_empty());
    assert_eq!(upstream.raw("flaky-close.1").await.unwrap(), b"");
    assert_eq!(upstream.poll("flaky-close.1").await.status(), "success");
    assert_eq!(upstream.poll("first-429.1").await.http(), 429);
    assert_eq!(upstream.poll("first-429.1").await.status(), "success");

    let gzip = upstream.poll("gzip.1").await;
    assert_eq!(gzip.header(GZIP), "gzip");
    let plain: Value = serde_json::from_reader(flate2::read::GzDecoder::new(&gzip.body[..])).unwrap();
    assert_eq!(plain["data"]["status"], "success");
    assert_eq!(upstream.poll("brotli-claimed.1").await.header(GZIP), "br");

    let mut hanging = upstream.connect().await;
    assert!(
        timeout(Duration::from_millis(100), hanging.poll("hang.1"))
            .await
            .is_err()
    );
    let mut stream = TcpStream::connect(upstream.address).await.unwrap();
    stream.write_all(raw_poll("drip.1").as_bytes()).await.unwrap();
    let mut dripped = Vec::new();
    while !dripped.ends_with(b"\r\n\r\n{\"c") {
        assert_ne!(
            timeout(PATIENCE, stream.read_buf(&mut dripped)).await.unwrap().unwrap(),
            0
        );
    }
}

#[tokio::test]
async fn ids_steer_what_no_library_would_write() {
    let upstream = Upstream::start(quick()).await;
    let first = async |id: &str, until: usize| {
        let mut stream = TcpStream::connect(upstream.address).await.unwrap();
        stream.write_all(raw_poll(id).as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        while bytes.len() < until {
            assert_ne!(
                timeout(PATIENCE, stream.read_buf(&mut bytes)).await.unwrap().unwrap(),
                0
            );
        }
        (String::from_utf8(bytes).unwrap(), stream)
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
    let (short, mut stream) = first("short-length.1", 1500).await;
    let (head, body) = short.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}", body.len() / 2)), "{short}");
    stream.write_all(raw_poll("pending.1").as_bytes()).await.unwrap();
    let mut next = Vec::new();
    while !String::from_utf8_lossy(&next).contains("\"pending\"") {
        assert_ne!(timeout(PATIENCE, stream.read_buf(&mut next)).await.unwrap().unwrap(), 0);
    }
}

#[tokio::test]
async fn padding_is_as_long_as_asked() {
    let upstream = Upstream::start(quick()).await;
    for (id, size) in [
        ("big-0B.1", 0),
        ("big-3KiB.1", 3 << 10),
        ("big-1MiB.1", 1 << 20),
        ("big-200000B.1", 200_000),
    ] {
        assert_eq!(
            upstream.poll(id).await.json()["data"]["param"].as_str().unwrap().len(),
            size,
            "{id}"
        );
    }
    let deep = upstream.poll("deep.1").await.body;
    let deep = str::from_utf8(&deep).unwrap();
    // The rest of the body has nine pairs.
    assert_eq!(deep.matches('[').count(), 100_009);
    assert_eq!(deep.matches(']').count(), 100_009);
}

#[tokio::test]
async fn a_bomb_is_small_until_it_is_unpacked() {
    let upstream = Upstream::start(quick()).await;
    let bomb = upstream.poll("bomb.1").await;
    assert_eq!(bomb.header(GZIP), "gzip");
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
    let upstream = Upstream::start(quick()).await;
    let mut client = upstream.connect().await;
    for (key, http, code) in [
        (None, 401, 401),
        (Some("a-refused-key"), 401, 401),
        (Some("refused-body"), 200, 401),
        (Some("disabled"), 403, 403),
        (Some("no-credits"), 402, 402),
        (Some("ak_1"), 200, 200),
    ] {
        let answer = client.poll_as(key, "ended.1").await;
        assert_eq!(
            (answer.http(), answer.json()["code"].clone()),
            (http, json!(code)),
            "{key:?}"
        );
    }
    assert_eq!(client.get("/api/v1/client/job/TaskInfo").await.http(), 422);
}

#[tokio::test]
async fn a_sixteenth_quick_query_is_a_violation() {
    let upstream = Upstream::start(UpstreamArgs { limit: 15, ..quick() }).await;
    let mut client = upstream.connect().await;
    let before = now();
    let mut answers = Vec::new();
    for number in 0..16 {
        answers.push(client.poll(&format!("task-{number}")).await.http());
    }
    if now() - before >= 1_000_000_000 {
        // The machine was too busy for sixteen to be quick.
        return;
    }
    assert_eq!(answers[..15], [200; 15]);
    assert_eq!(answers[15], 429);
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
    client.ask(Method::POST, "/__reset", None, "").await;
    assert_eq!(client.poll("task-1").await.http(), 200);
    assert_eq!(upstream.stats().await["requests"], 1);
}

#[tokio::test]
async fn accounts_have_limits_of_their_own_and_shared_keys_share_one() {
    let args = UpstreamArgs {
        limit: 0,
        account_keys: vec!["a,b".parse().unwrap()],
        ..quick()
    };
    let upstream = Upstream::start(args).await;
    let mut client = upstream.connect().await;
    for key in ["a", "b", "c"] {
        assert_eq!(client.poll_as(Some(key), "ended.1").await.http(), 429);
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
    let limited = |rate_limit_form, retry_after| UpstreamArgs {
        limit: 0,
        rate_limit_form,
        retry_after,
        ..quick()
    };
    for (form, http) in [(RateLimitForm::Http, 429), (RateLimitForm::Body, 200)] {
        let answer = Upstream::start(limited(form, RetryAfter::Seconds(7)))
            .await
            .poll("ended.1")
            .await;
        assert_eq!((answer.http(), answer.header("retry-after")), (http, "7"));
        assert_eq!(
            answer.json(),
            json!({"code": 429, "message": "Rate limit exceeded", "data": null})
        );
    }
    let dated = Upstream::start(limited(RateLimitForm::Http, RetryAfter::Date))
        .await
        .poll("x")
        .await;
    assert!(httpdate::parse_http_date(dated.header("retry-after")).is_ok());
    assert_eq!(
        Upstream::start(limited(RateLimitForm::Http, RetryAfter::None))
            .await
            .poll("x")
            .await
            .header("retry-after"),
        ""
    );
}

/// While its first read is held back, a request waits in the socket: it arrived when the kernel got it all the same.
#[tokio::test]
async fn arrivals_carry_the_stamp_of_the_kernel() {
    let open_delay = Some(Duration::from_millis(400));
    let upstream = Upstream::start(UpstreamArgs {
        open_delay,
        open_delay_every: 2,
        ..quick()
    })
    .await;
    // The kernel begins to stamp a moment after the first socket asked.
    let mut warm = upstream.connect().await;
    warm.poll("ended.1").await;
    warm.ask(Method::POST, "/__reset", None, "").await;
    let mut stream = TcpStream::connect(upstream.address).await.unwrap();
    let before = now();
    stream.write_all(raw_poll("ended.1").as_bytes()).await.unwrap();
    let after = now();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert!(now() - before >= 300_000_000, "it was held back");
    let stamp = warm.get("/__stats").await.json()["first_arrival_unix_ns"]
        .as_u64()
        .unwrap();
    assert!(
        (before..=after + 50_000_000).contains(&stamp),
        "{before} {stamp} {after}"
    );
}

#[tokio::test]
async fn latency_is_kept() {
    let latency = Duration::from_millis(150);
    let upstream = Upstream::start(UpstreamArgs { latency, ..quick() }).await;
    let mut client = upstream.connect().await;
    let started = Instant::now();
    client.poll("ended.1").await;
    assert!(started.elapsed() >= Duration::from_millis(145));
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let idle_close = Some(Duration::from_millis(100));
    let upstream = Upstream::start(UpstreamArgs { idle_close, ..quick() }).await;
    let mut silent = TcpStream::connect(upstream.address).await.unwrap();
    assert_eq!(timeout(PATIENCE, silent.read(&mut [0; 9])).await.unwrap().unwrap(), 0);
    let answer = upstream.raw("slow-300ms.1").await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n") && answer.ends_with(b"}"));
}

#[tokio::test]
async fn a_connection_closes_after_a_response_without_a_word() {
    let upstream = Upstream::start(UpstreamArgs {
        close_after_response: true,
        ..quick()
    })
    .await;
    for id in ["ended.1", "big-1MiB.1", "http-404.1"] {
        let answer = String::from_utf8(upstream.raw(id).await.unwrap()).unwrap();
        assert!(answer.ends_with('}'), "{id}");
        assert!(!answer.to_lowercase().contains("connection:"), "{id}");
    }
}

#[tokio::test]
async fn tls_is_served_and_its_handshake_held_back() {
    let directory = tempfile::tempdir().unwrap();
    let (cert, key) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let upstream = Upstream::start(UpstreamArgs {
        tls_cert: Some(cert),
        tls_key: Some(key),
        open_delay: Some(Duration::from_millis(300)),
        open_delay_every: 2,
        ..quick()
    })
    .await;
    let mut roots = tokio_rustls::rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let mut config = tokio_rustls::rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let open = async || {
        let started = Instant::now();
        let stream = TcpStream::connect(upstream.address).await.unwrap();
        let name = "localhost".try_into().unwrap();
        let stream = connector.connect(name, stream).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        (Client::over(stream).await, started.elapsed())
    };
    let (mut first, _) = open().await;
    assert_eq!(first.poll("ended.1").await.status(), "success");
    let before = now();
    let (mut second, took) = open().await;
    assert!(took >= Duration::from_millis(290));
    assert_eq!(second.poll("ended.2").await.status(), "success");
    let stats = first.get("/__stats").await.json();
    assert_eq!((&stats["connections"], &stats["requests"]), (&json!(2), &json!(2)));
    let last = stats["last_arrival_unix_ns"].as_u64().unwrap();
    assert!(
        (before + 290_000_000..=now()).contains(&last),
        "the handshake is not the request"
    );
}

#[tokio::test]
async fn other_paths_are_counted_and_answered() {
    let upstream = Upstream::start(quick()).await;
    let mut client = upstream.connect().await;
    let created = client
        .ask(Method::POST, "/api/v1/client/job/CreateTask", Some("k"), "{}")
        .await;
    assert_eq!(created.json()["data"]["task_id"].as_str().unwrap().len(), 36);
    assert_eq!(
        client.get("/api/v1/client/account/balance").await.json()["data"]["balance"],
        1000
    );
    assert_eq!(client.get("/api/v1/client/job/taskinfo?task_id=x").await.http(), 404);
    assert_eq!(client.get("/api/v1/client/job/TaskInfo/").await.json()["code"], 404);
    assert_eq!(
        client
            .ask(Method::POST, "/api/v1/client/job/TaskInfo?task_id=x", Some("k"), "")
            .await
            .http(),
        405
    );
    let stats = client.get("/__stats").await.json();
    assert_eq!(stats["paths"]["/api/v1/client/job/taskinfo"], 1);
    assert_eq!(stats["paths"].as_object().unwrap().len(), 4);
    assert_eq!((&stats["requests"], &stats["connections"]), (&json!(1), &json!(1)));
}

#[tokio::test]
async fn chat_streams_events() {
    let upstream = Upstream::start(quick()).await;
    let mut client = upstream.connect().await;
    let started = Instant::now();
    let response = client
        .send(
            Method::POST,
            "/api/v1/chat/completions",
            None,
            Full::from("{}").boxed_unsync(),
        )
        .await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert_eq!(response.headers()["transfer-encoding"], "chunked");
    let mut body = response.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(first.starts_with(b"data: {") && started.elapsed() < Duration::from_millis(400));
    let rest = body.collect().await.unwrap().to_bytes();
    assert!(rest.ends_with(b"data: [DONE]\n\n") && started.elapsed() >= Duration::from_millis(395));
}

#[tokio::test]
async fn echo_tells_what_came_in() {
    let upstream = Upstream::start(quick()).await;
    let mut client = upstream.connect().await;
    let told = client
        .ask(Method::PUT, "/api/v1/echo/a%20b?c=d", Some("k"), "hello")
        .await
        .json();
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
    let upstream = Upstream::start(quick()).await;
    let mut client = upstream.connect().await;
    let (pieces, received) = tokio::sync::mpsc::channel::<&'static str>(1);
    let body = StreamBody::new(futures_util::stream::unfold(received, |mut received| async {
        let piece = received.recv().await?;
        Some((Ok(http_body::Frame::data(Bytes::from(piece))), received))
    }));
    pieces.send("one").await.unwrap();
    let mut response = client
        .send(Method::POST, "/api/v1/mirror", None, body.boxed_unsync())
        .await
        .into_body();
    assert_eq!(response.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
    pieces.send("two").await.unwrap();
    assert_eq!(response.frame().await.unwrap().unwrap().into_data().unwrap(), "two");
    drop(pieces);
    assert!(response.frame().await.is_none());
}
