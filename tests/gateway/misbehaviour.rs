//! Upstream misbehaves: the answer is honest and bounded in time, nothing of it is kept, its connection is not used
//! again, and nobody else notices.
//!
//! What the simulated upstream can do wrong by itself is in `fidelity`; here each byte is scripted.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};

use crate::harness::raw::Raw;
use crate::harness::scripted::response;
use crate::harness::{Gateway, Reply, poll, poll_as};

/// `upstream.timeout` of the gateways here.
const TIMEOUT: Duration = Duration::from_secs(1);

/// What a busy machine may add.
const SLACK: Duration = Duration::from_millis(1500);

/// What upstream answers to one query.
#[derive(Clone)]
struct Misdeed {
    bytes: Vec<u8>,
    then: Then,
}

/// What follows.
#[derive(Clone)]
enum Then {
    /// It keeps the connection and answers what comes next.
    Listens,
    /// It closes the connection.
    Closes,
    /// It sends these for ever, so long apart.
    Repeats(Vec<u8>, Duration),
}

fn sends(bytes: impl Into<Vec<u8>>, then: Then) -> Misdeed {
    Misdeed {
        bytes: bytes.into(),
        then,
    }
}

/// Bytes that never end.
fn floods(bytes: &str, piece: impl Into<Vec<u8>>) -> Misdeed {
    sends(bytes, Then::Repeats(piece.into(), Duration::ZERO))
}

/// Bytes that never end, and come slowly.
fn drips(bytes: &str, piece: &str) -> Misdeed {
    sends(bytes, Then::Repeats(piece.into(), Duration::from_millis(50)))
}

/// An answer about a task that has failed: one that would be kept for days.
fn ended(task: &str) -> Vec<u8> {
    format!(
        r#"{{"code":200,"message":"success","data":{{"task_id":"{task}","status":"failed","result":{{"message":"no"}}}}}}"#
    )
    .into_bytes()
}

/// A query as upstream saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Query {
    connection: usize,
    task: String,
}

/// An upstream that answers queries for the tasks named in its list as that says, and all others as it should.
struct Upstream {
    url: String,
    seen: Arc<Mutex<Vec<Query>>>,
}

impl Upstream {
    async fn start(misdeeds: Vec<(&'static str, Misdeed)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&seen);
        let misdeeds = Arc::new(misdeeds);
        tokio::spawn(async move {
            for connection in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                let (misdeeds, told) = (Arc::clone(&misdeeds), Arc::clone(&told));
                // It ends with the gateway's side of the connection.
                tokio::spawn(async move { serve(Raw::over(stream), connection, &misdeeds, &told).await });
            }
        });
        Self { url, seen }
    }

    fn seen(&self) -> Vec<Query> {
        self.seen.lock().clone()
    }

    fn queries(&self, task: &str) -> usize {
        self.seen().iter().filter(|query| query.task == task).count()
    }
}

async fn serve(
    mut gateway: Raw,
    connection: usize,
    misdeeds: &[(&str, Misdeed)],
    seen: &Mutex<Vec<Query>>,
) -> std::io::Result<()> {
    while let Some(head) = gateway.head().await {
        let asked = head.split_once("task_id=").unwrap().1;
        let task = asked.split(' ').next().unwrap().to_owned();
        seen.lock().push(Query {
            connection,
            task: task.clone(),
        });
        let Some((_, misdeed)) = misdeeds.iter().find(|(name, _)| *name == task) else {
            gateway.send(response("200 OK", "", &ended(&task))).await?;
            continue;
        };
        gateway.send(&misdeed.bytes).await?;
        match &misdeed.then {
            Then::Listens => {}
            Then::Closes => return Ok(()),
            Then::Repeats(piece, pause) => loop {
                gateway.send(piece).await?;
                if !pause.is_zero() {
                    sleep(*pause).await;
                }
            },
        }
    }
    Ok(())
}

async fn gateway(upstream: &Upstream) -> Gateway {
    let config = format!(
        "upstream: {{ url: \"{}\", timeout: \"1s\", max_body: \"1MiB\" }}\nbudget: {{ limit: 1000 }}",
        upstream.url
    );
    Gateway::start(&upstream.url, &config).await
}

/// What a client gets of it.
#[derive(Clone, Copy)]
enum Gets {
    /// The gateway's own error, with this status.
    Error(u16),
    /// Upstream's own bytes, with this status.
    Upstreams(u16),
}

/// Commits each misdeed twice, with a poll of another task under way and another after it.
async fn nobody_else_notices(misdeeds: Vec<(&'static str, Misdeed, Gets)>) {
    let script = misdeeds.iter().map(|(name, misdeed, _)| (*name, misdeed.clone()));
    let upstream = Upstream::start(script.collect()).await;
    let gateway = gateway(&upstream).await;
    let address = gateway.address;
    for (name, _, gets) in &misdeeds {
        for turn in ["first", "second"] {
            let other = |when: &str| format!("{when}-{turn}-{name}");
            let (before, started) = (upstream.queries(name), Instant::now());
            let (bad, during) = tokio::join!(poll(address, name), poll_ended(address, other("during")));
            let took = started.elapsed();
            assert!(took < TIMEOUT + SLACK, "{name}: {took:?}");
            match gets {
                Gets::Error(status) => {
                    assert_eq!(bad.status, *status, "{name}: {bad:?}");
                    bad.assert_is_our_error(*status);
                }
                Gets::Upstreams(status) => assert_eq!(bad.status, *status, "{name}: {bad:?}"),
            }
            assert!(upstream.queries(name) > before, "{name} was kept");
            drop(during);
            poll_ended(address, other("after")).await;
        }
    }
    for (name, ..) in &misdeeds {
        assert_not_used_again(&upstream.seen(), name);
    }
    let (_, metrics) = gateway.admin("/metrics").await;
    assert!(metrics.contains("crun_gateway_panics_total 0"), "{metrics}");
}

async fn poll_ended(address: std::net::SocketAddr, task: String) -> Reply {
    let reply = poll(address, &task).await;
    assert_eq!(reply.status, 200, "{task}: {reply:?}");
    assert_eq!(reply.body, ended(&task));
    reply
}

/// No query came after one for `task` on its connection.
#[track_caller]
fn assert_not_used_again(seen: &[Query], task: &str) {
    for (index, query) in seen.iter().enumerate().filter(|(_, query)| query.task == task) {
        let after = seen[index + 1..]
            .iter()
            .find(|after| after.connection == query.connection);
        assert_eq!(after, None, "after {query:?}");
    }
}

/// A head with these headers, and what follows it.
fn ok(headers: &str, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\n{headers}\r\n{body}")
}

fn stays(bytes: impl Into<Vec<u8>>) -> Misdeed {
    sends(bytes, Then::Listens)
}

fn closes(bytes: impl Into<Vec<u8>>) -> Misdeed {
    sends(bytes, Then::Closes)
}

const CHUNKED: &str = "Transfer-Encoding: chunked\r\n";

/// Each is a 502.
async fn are_no_answers(misdeeds: Vec<(&'static str, Misdeed)>) {
    let misdeeds = misdeeds.into_iter();
    nobody_else_notices(
        misdeeds
            .map(|(name, misdeed)| (name, misdeed, Gets::Error(502)))
            .collect(),
    )
    .await;
}

#[tokio::test]
async fn a_body_whose_length_is_a_lie_is_a_502() {
    let text = String::from_utf8(ended("x")).unwrap();
    let length = text.len();
    let half = &text[..length / 2];
    let said = |length: &str| format!("Content-Length: {length}\r\n");
    let in_chunks = format!("{length:x}\r\n{text}\r\n0\r\n\r\n");
    let (true_length, more, less) = (length.to_string(), format!("+{length}"), format!("-{length}"));
    let two = said(&true_length) + &said(&(length - 1).to_string());
    are_no_answers(vec![
        ("half-a-body", closes(ok(&said(&true_length), half))),
        ("half-a-chunk", closes(ok(CHUNKED, &format!("{length:x}\r\n{half}")))),
        (
            "no-last-chunk",
            closes(ok(CHUNKED, &format!("{length:x}\r\n{text}\r\n"))),
        ),
        (
            "chunk-without-size",
            stays(ok(CHUNKED, &format!("\r\n{text}\r\n0\r\n\r\n"))),
        ),
        (
            "chunk-of-nonsense",
            stays(ok(CHUNKED, &format!("zz\r\n{text}\r\n0\r\n\r\n"))),
        ),
        (
            "chunk-past-counting",
            stays(ok(CHUNKED, &format!("fffffffffffffffff1\r\n{text}\r\n0\r\n\r\n"))),
        ),
        (
            "chunk-longer-than-said",
            stays(ok(CHUNKED, &format!("{:x}\r\n{text}\r\n0\r\n\r\n", length / 2))),
        ),
        ("two-lengths", stays(ok(&two, &text))),
        ("negative-length", stays(ok(&said(&less), &text))),
        ("signed-length", stays(ok(&said(&more), &text))),
        ("length-of-nonsense", stays(ok(&said("many"), &text))),
        (
            "length-and-chunked",
            stays(ok(&(said(&true_length) + CHUNKED), &in_chunks)),
        ),
        (
            "chunked-and-length",
            stays(ok(&(CHUNKED.to_owned() + &said(&true_length)), &in_chunks)),
        ),
        ("50-megabytes", floods(&ok(&said("52428800"), ""), "a".repeat(65536))),
        ("50-megabytes-unsaid", floods(&ok("", ""), "a".repeat(65536))),
        (
            "endless-chunks",
            floods(&ok(CHUNKED, ""), format!("10000\r\n{}\r\n", "a".repeat(65536))),
        ),
    ])
    .await;
}

#[tokio::test]
async fn a_body_that_cannot_be_decoded_is_a_502() {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(&ended("x")).unwrap();
    let gzip = gzip.finish().unwrap();
    let mut deflate = ZlibEncoder::new(Vec::new(), Compression::best());
    deflate.write_all(&ended("x")).unwrap();
    let deflate = deflate.finish().unwrap();
    let of = |name: &str, bytes: &[u8]| stays(response("200 OK", &format!("Content-Encoding: {name}\r\n"), bytes));
    are_no_answers(vec![
        ("half-of-gzip", of("gzip", &gzip[..gzip.len() / 2])),
        ("gzip-without-checksum", of("gzip", &gzip[..gzip.len() - 4])),
        ("half-of-deflate", of("deflate", &deflate[..deflate.len() / 2])),
        ("deflate-without-checksum", of("deflate", &deflate[..deflate.len() - 4])),
        ("gzip-that-is-none", of("gzip", &ended("x"))),
        ("twice-encoded", of("gzip, gzip", &gzip)),
    ])
    .await;
}

/// Ways in which an error's body is not to be had.
fn without_its_body(status: &str) -> [(&'static str, Vec<u8>, Then); 5] {
    let coded = |coding| {
        response(
            status,
            &format!("Retry-After: 20\r\nContent-Encoding: {coding}\r\n"),
            b"xx",
        )
    };
    let framed = |framing| format!("HTTP/1.1 {status}\r\nRetry-After: 20\r\n{framing}").into_bytes();
    [
        ("in-brotli", coded("br"), Then::Listens),
        ("no-gzip", coded("gzip"), Then::Listens),
        ("cut", framed("Content-Length: 100\r\n\r\nxx"), Then::Closes),
        (
            "cut-chunk",
            framed("Transfer-Encoding: chunked\r\n\r\n5\r\nxx"),
            Then::Closes,
        ),
        ("too-large", framed("Content-Length: 52428800\r\n\r\nxx"), Then::Listens),
    ]
}

#[tokio::test]
async fn an_errors_status_counts_though_its_body_is_not_to_be_had() {
    for (status, line) in [
        (429, "429 Too Many Requests"),
        (401, "401 Unauthorized"),
        (404, "404 Not Found"),
    ] {
        let stalled = format!("HTTP/1.1 {line}\r\nRetry-After: 20\r\nContent-Length: 100\r\n\r\nxx").into_bytes();
        let stalled = ("stalled", stalled, Then::Listens);
        let ways: Vec<_> = without_its_body(line).into_iter().chain([stalled]).collect();
        let script = ways
            .iter()
            .cloned()
            .map(|(name, bytes, then)| (name, sends(bytes, then)));
        let upstream = Upstream::start(script.collect()).await;
        let gateway = gateway(&upstream).await;
        for (name, ..) in &ways {
            // An account of its own for each.
            let reply = poll_as(gateway.address, name, name).await;
            reply.assert_is_our_error(status);
            let (again, goes_on) = match status {
                429 => ("another", "detail=budget"),
                401 => ("another", "detail=key_refused"),
                _ => (*name, "crun-gateway; hit; ttl="),
            };
            assert_eq!(
                reply.header("retry-after"),
                (status != 404).then_some("20"),
                "{name}: {reply:?}"
            );
            let again = poll_as(gateway.address, name, again).await;
            assert_eq!(again.status, status, "{name}: {again:?}");
            assert!(
                again.header("cache-status").unwrap().contains(goes_on),
                "{name}: {again:?}"
            );
            assert_eq!(upstream.queries(name), 1, "{name}");
        }
        assert_eq!(upstream.queries("another"), 0);
        // In a row, and yet no outage.
        poll_ended(gateway.address, "after".into()).await;
        for (name, ..) in &ways {
            assert_not_used_again(&upstream.seen(), name);
        }
    }
}

#[tokio::test]
async fn a_success_without_its_body_is_none() {
    for status in ["200 OK", "206 Partial Content", "501 Not Implemented"] {
        let ways = without_its_body(status);
        are_no_answers(ways.map(|(name, bytes, then)| (name, sends(bytes, then))).into()).await;
    }
}

#[tokio::test]
async fn a_head_that_is_too_large_is_told_as_that_and_is_no_outage() {
    let fields = "x-filler: a\r\n".repeat(101);
    let bytes = format!("x-filler: {}\r\n", "a".repeat(256 << 10));
    let ok_of = |headers: &str| ok(&format!("{headers}Content-Length: 0\r\n"), "");
    // What it has of its 64 KiB beside this field.
    let rest = ok_of("x-filler: \r\n").len();
    let filled = |more: usize| format!("x-filler: {}\r\n", "a".repeat((64 << 10) - rest + more));
    let just_too_many = filled(1);
    let ways = [
        ("fields", &fields),
        ("bytes", &bytes),
        ("a-byte", &just_too_many),
        ("more-fields", &fields),
        ("more-bytes", &bytes),
        ("fields-again", &fields),
    ]
    .map(|(task, head)| (task, stays(ok_of(head))));
    let as_large_as_may_be = ("as-large-as-may-be", stays(ok_of(&filled(0))));
    let upstream = Upstream::start([&ways[..], &[as_large_as_may_be]].concat()).await;
    let gateway = gateway(&upstream).await;
    assert_eq!(poll(gateway.address, "as-large-as-may-be").await.status, 200);
    for (task, _) in &ways {
        let reply = poll(gateway.address, task).await;
        reply.assert_is_our_error(502);
        for (name, value) in [
            ("cache-status", "crun-gateway; detail=upstream_head_too_large"),
            ("proxy-status", "crun-gateway; error=http_response_header_section_size"),
        ] {
            assert_eq!(reply.header(name), Some(value), "{task}: {reply:?}");
        }
    }
    poll_ended(gateway.address, "after".into()).await;
}

#[tokio::test]
async fn what_is_no_http_is_a_502() {
    let line = "HTTP/1.1 200 OK\r\n";
    let filler = "x-filler: abcdefghijklmnopqrstuvwxyz\r\n".repeat(100);
    are_no_answers(vec![
        ("garbage", stays(&b"\x00\xff\x13\x37 \r\n\r\n\x80garbage\r\n\r\n"[..])),
        ("another-protocol", stays("SSH-2.0-OpenSSH_9.6\r\n\r\n")),
        (
            "http-2",
            stays(&b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80\r\n\r\n"[..]),
        ),
        ("http-9", stays("HTTP/9.9 200 OK\r\n\r\n")),
        (
            "switching-protocols",
            stays("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"),
        ),
        (
            "status-of-four-digits",
            stays("HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n"),
        ),
        ("no-status", stays("HTTP/1.1 OK\r\nContent-Length: 0\r\n\r\n")),
        ("header-without-name", stays(ok(": x\r\nContent-Length: 0\r\n", ""))),
        ("a-thousand-headers", stays(ok(&"x-filler: a\r\n".repeat(1000), ""))),
        ("endless-headers", floods(line, filler)),
        ("endless-header", floods(&format!("{line}x-filler: "), "a".repeat(4096))),
        (
            "endless-interim-answers",
            floods("", "HTTP/1.1 100 Continue\r\n\r\n".repeat(100)),
        ),
    ])
    .await;
}

#[tokio::test]
async fn an_answer_that_does_not_end_in_time_is_a_504() {
    let line = "HTTP/1.1 200 OK\r\n";
    let chunked = &ok(CHUNKED, "");
    let misdeeds = vec![
        ("half-a-head", stays(line)),
        ("no-body", stays(ok("Content-Length: 10\r\n", ""))),
        ("headers-drip", drips(line, "x-filler: a\r\n")),
        ("body-drips", drips(&ok("Content-Length: 100000\r\n", ""), "a")),
        ("chunks-drip", drips(chunked, "1\r\na\r\n")),
        ("chunk-extension-drips", drips(&format!("{chunked}1"), ";a=b")),
        (
            "trailers-drip",
            drips(&format!("{chunked}1\r\na\r\n0\r\n"), "x-filler: a\r\n"),
        ),
        ("interim-answers-drip", drips("", "HTTP/1.1 103 Early Hints\r\n\r\n")),
    ];
    let misdeeds = misdeeds.into_iter();
    nobody_else_notices(
        misdeeds
            .map(|(name, misdeed)| (name, misdeed, Gets::Error(504)))
            .collect(),
    )
    .await;
}

#[tokio::test]
async fn an_answer_that_means_nothing_goes_through_and_no_further() {
    let json = "Content-Type: application/json\r\n";
    let misdeeds = vec![
        // What is left of the body after its length belongs to nobody.
        (
            "shorter-length",
            sends(
                [
                    response("200 OK", json, &ended("shorter-length")[..40]),
                    ended("x")[40..].to_vec(),
                ]
                .concat(),
                Then::Listens,
            ),
            Gets::Upstreams(200),
        ),
        (
            "another-task",
            sends(response("200 OK", json, &ended("x")), Then::Listens),
            Gets::Upstreams(200),
        ),
        (
            "not-utf-8",
            sends(
                response("200 OK", json, b"{\"code\":200,\"data\":\"\xff\"}"),
                Then::Listens,
            ),
            Gets::Upstreams(200),
        ),
        (
            "no-content",
            sends("HTTP/1.1 204 No Content\r\n\r\n", Then::Listens),
            Gets::Upstreams(204),
        ),
        // No bytes are none, whatever they are said to be encoded in.
        (
            "no-content-in-gzip",
            sends(
                "HTTP/1.1 204 No Content\r\nContent-Encoding: gzip\r\n\r\n",
                Then::Listens,
            ),
            Gets::Upstreams(204),
        ),
        (
            "nothing-in-brotli",
            sends(response("200 OK", "Content-Encoding: br\r\n", b""), Then::Listens),
            Gets::Upstreams(200),
        ),
        (
            "nothing-in-deflate-and-chunks",
            sends(
                ok(
                    "Content-Encoding: deflate\r\nTransfer-Encoding: chunked\r\n",
                    "0\r\n\r\n",
                ),
                Then::Listens,
            ),
            Gets::Upstreams(200),
        ),
        (
            "not-modified",
            sends("HTTP/1.1 304 Not Modified\r\n\r\n", Then::Listens),
            Gets::Upstreams(304),
        ),
        // The length of the body that would have come, had it changed.
        (
            "not-modified-of-much",
            sends(
                "HTTP/1.1 304 Not Modified\r\nContent-Length: 52428800\r\n\r\n",
                Then::Listens,
            ),
            Gets::Upstreams(304),
        ),
        (
            "redirect",
            sends(
                response(
                    "302 Found",
                    "Location: /api/v1/client/job/TaskInfo?task_id=x\r\nSet-Cookie: a=b\r\n",
                    b"",
                ),
                Then::Listens,
            ),
            Gets::Upstreams(302),
        ),
    ];
    nobody_else_notices(misdeeds).await;
}

#[tokio::test]
async fn bytes_after_a_body_are_nobodys_answer_and_nothing_is_kept_of_it() {
    let forged = response("200 OK", "", br#"{"code":404,"message":"forged","data":null}"#);
    let with_more = |task: &str, more: &[u8]| [response("200 OK", "", &ended(task)), more.to_vec()].concat();
    let body = String::from_utf8(ended("more-than-its-chunks")).unwrap();
    let chunked = ok(CHUNKED, &format!("{:x}\r\n{body}\r\n0\r\n\r\nmore", body.len()));
    let upstream = Upstream::start(vec![
        (
            "another-answer",
            sends(with_more("another-answer", &forged), Then::Listens),
        ),
        (
            "more-text",
            sends(with_more("more-text", b"\r\n\r\nmore"), Then::Listens),
        ),
        ("more-than-its-chunks", sends(chunked, Then::Listens)),
        (
            "later",
            sends(
                with_more("later", b""),
                Then::Repeats(forged.clone(), Duration::from_millis(20)),
            ),
        ),
    ])
    .await;
    let gateway = gateway(&upstream).await;
    for task in ["another-answer", "more-text", "more-than-its-chunks", "later"] {
        // The body itself is whole, and says which task it is about.
        let reply = poll_ended(gateway.address, task.to_owned()).await;
        // Nobody knows what is still to come.
        let is_kept = task == "later";
        assert_eq!(reply.header("cache-status").unwrap().contains("stored"), is_kept);
        if is_kept {
            gateway.shows("crun_gateway_upstream_connections", 0.0).await;
        }
        poll_ended(gateway.address, task.to_owned()).await;
        assert_eq!(upstream.queries(task), if is_kept { 1 } else { 2 }, "{task}");
        poll_ended(gateway.address, format!("after-{task}")).await;
        assert_not_used_again(&upstream.seen(), task);
    }
    gateway.logged("upstream sent more than an answer", 6).await;
}

#[tokio::test]
async fn a_connection_on_which_upstream_speaks_unasked_is_not_used() {
    let upstream = Upstream::start(vec![(
        "good",
        sends(
            response("200 OK", "", &ended("good")),
            Then::Repeats(
                b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n".to_vec(),
                Duration::from_millis(300),
            ),
        ),
    )])
    .await;
    let gateway = gateway(&upstream).await;
    poll_ended(gateway.address, "good".into()).await;
    gateway.shows("crun_gateway_upstream_connections", 0.0).await;
    poll_ended(gateway.address, "next".into()).await;
    assert_not_used_again(&upstream.seen(), "good");
}

#[tokio::test]
async fn a_connection_that_closes_with_its_answer_makes_room_for_the_next() {
    let close = |headers: &str, task| response("200 OK", headers, &ended(task));
    let until_closed = |version: &str, task| {
        let head = format!("{version} 200 OK\r\n\r\n").into_bytes();
        [head, ended(task)].concat()
    };
    let chunked = |task| {
        let body = String::from_utf8(ended(task)).unwrap();
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close";
        format!("{head}\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n", body.len()).into_bytes()
    };
    let endings = vec![
        ("announced", close("Connection: close\r\n", "announced")),
        ("unannounced", close("", "unannounced")),
        ("until-closed", until_closed("HTTP/1.1", "until-closed")),
        ("http-1.0", until_closed("HTTP/1.0", "http-1.0")),
        ("chunked", chunked("chunked")),
    ];
    let script = endings
        .into_iter()
        .map(|(task, bytes)| (task, sends(bytes, Then::Closes)));
    let upstream = Upstream::start(script.clone().collect()).await;
    let config = format!(
        "upstream: {{ url: \"{}\", connections: 1 }}\nbudget: {{ limit: 1000 }}",
        upstream.url
    );
    let gateway = Gateway::start(&upstream.url, &config).await;
    for (task, _) in script {
        assert_eq!(poll(gateway.address, task).await.status, 200, "{task}");
        let next = format!("behind-{task}");
        assert_eq!(poll(gateway.address, &next).await.status, 200, "{next}");
    }
}
