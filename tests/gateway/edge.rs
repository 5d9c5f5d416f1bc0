//! What the RFCs call an error, byte for byte: refused in words, the connection closed, and upstream none the wiser.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::Method;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::Level;

use crate::harness::client::bare;
use crate::harness::listener::listen;
use crate::harness::paused::{Behaviour, Paused};
use crate::harness::raw::{self, Raw, RawReply};
use crate::harness::scripted::response;
use crate::harness::{Gateway, KEY, PATIENCE, Scripted, TASK_INFO};

const ENDED: &[u8] = br#"{"code":200,"message":"success","data":{"task_id":"a","status":"success","result":{"media_urls":["https://x/y"]}}}"#;

/// Says the same to everybody, and keeps what it was asked.
async fn recording() -> Scripted {
    Scripted::always(response("200 OK", "Content-Type: application/json\r\n", ENDED)).await
}

/// How many requests came; a chunked body's end looks like a head, too, to an upstream that reads only heads.
fn requests(upstream: &Scripted) -> usize {
    upstream
        .heads()
        .iter()
        .filter(|head| head.contains(" HTTP/1.1\r\n"))
        .count()
}

/// One refused in the envelope, and the connection's end.
async fn assert_refuses(client: &mut Raw, status: u16, what: &str) -> RawReply {
    let reply = client.reply().await;
    assert!(reply.is(status) && reply.says_close(), "{what:?}: {reply:?}");
    let envelope = reply.json();
    assert_eq!(envelope["code"], status, "{what:?}");
    assert!(envelope["data"].is_null(), "{what:?}: {envelope}");
    assert!(
        envelope["message"].as_str().unwrap().contains("crun-gateway"),
        "{envelope}"
    );
    for (name, value) in [
        ("content-type", "application/json"),
        ("cache-control", "no-store"),
        ("via", "1.1 crun-gateway"),
    ] {
        assert_eq!(reply.header(name), Some(value), "{what:?}: {reply:?}");
    }
    assert!(reply.header("x-request-id").is_some(), "{what:?}: {reply:?}");
    client.assert_ends().await;
    reply
}

/// Sends bytes on a connection of their own, whole and byte by byte.
async fn refuses(gateway: &Gateway, bytes: impl AsRef<[u8]>, status: u16) {
    let bytes = bytes.as_ref();
    let what = String::from_utf8_lossy(bytes).into_owned();
    let mut client = Raw::connect(gateway.address).await;
    client.send(bytes).await.unwrap();
    assert_refuses(&mut client, status, &what).await;
    let mut client = Raw::connect(gateway.address).await;
    client.stream.set_nodelay(true).unwrap();
    for byte in bytes.chunks(1) {
        // It may be refused, and closed, before its end.
        if client.send(byte).await.is_err() {
            break;
        }
    }
    assert_refuses(&mut client, status, &what).await;
}

fn head(line: &str, fields: &str) -> String {
    format!("{line}\r\nx-api-key: {KEY}\r\n{fields}\r\n\r\n")
}

/// A poll, and something that is passed through, with these fields.
fn both_kinds(fields: &str) -> [String; 2] {
    [
        head(
            &format!("GET {TASK_INFO}?task_id=a HTTP/1.1"),
            &format!("Host: x\r\n{fields}"),
        ),
        head("POST /api/v1/echo HTTP/1.1", &format!("Host: x\r\n{fields}")),
    ]
}

#[tokio::test]
async fn ambiguous_lengths_never_get_past() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for fields in [
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 3",
        "Content-Length: 3\r\nContent-Length: 3",
        "Content-Length: 3\r\nContent-Length: 4",
        "Content-Length: 3, 3",
        "Content-Length: +3",
        "Content-Length: -3",
        "Content-Length: ",
        "Content-Length: 3a",
        "Content-Length: 99999999999999999999",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity, chunked",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding: x\r\n chunked",
    ] {
        for request in both_kinds(fields) {
            refuses(&gateway, request + "abc", 400).await;
        }
    }
    for fields in [
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 3",
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
    ] {
        refuses(&gateway, head("POST /api/v1/echo HTTP/1.0", fields), 400).await;
    }
    assert_eq!(upstream.queries(), 0);
}

#[tokio::test]
async fn chunks_that_are_not_framed_as_they_must_be_never_get_past() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let [_, request] = both_kinds("Transfer-Encoding: chunked");
    for body in [
        "10000000000000000\r\n",
        "ffffffffffffffffffff\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "3\nabc\n0\n\n",
        "3\r\nabc\n0\r\n\r\n",
        "-1\r\n",
        "0x3\r\nabc\r\n",
        ";\r\n",
        "3;a\nb\r\nabc\r\n0\r\n\r\n",
        "3;=x\r\nabc\r\n0\r\n\r\n",
        "3;a=\"b\r\nabc\r\n0\r\n\r\n",
        "0\r\nContent-Length : 3\r\n\r\n",
    ] {
        let mut client = Raw::connect(gateway.address).await;
        client.send(format!("{request}{body}")).await.unwrap();
        assert_refuses(&mut client, 400, body).await;
    }
    assert_eq!(upstream.queries(), 0);
}

#[tokio::test]
async fn a_body_that_turns_out_broken_is_cut_off_upstream_too() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gateway = Gateway::start(&format!("http://{}", listener.local_addr().unwrap()), "").await;
    let mut client = Raw::connect(gateway.address).await;
    let [_, request] = both_kinds("Transfer-Encoding: chunked");
    client.send(format!("{request}4\r\nhalf\r\n")).await.unwrap();
    let (stream, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    let mut upstream = Raw::over(stream);
    upstream.head().await.unwrap();
    upstream.until("half").await;
    client.send("3\r\nabcd\r\n0\r\n\r\n").await.unwrap();
    assert_refuses(&mut client, 400, "3 abcd").await;
    // Not a byte of the last chunk, and no end that would make it whole.
    loop {
        match upstream.some().await {
            Ok(bytes) if !bytes.is_empty() => {
                let bytes = String::from_utf8_lossy(&bytes).into_owned();
                assert!(!bytes.contains("abc") && !bytes.contains("0\r\n"), "{bytes:?}");
            }
            Ok(_) | Err(_) => break,
        }
    }
}

#[tokio::test]
async fn malformed_heads_never_get_past() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for field in [
        ": a",
        "a b: c",
        "a\t: b",
        "a : b",
        "a(: b",
        "a",
        "\u{e9}: b",
        "a: b\r\n c",
        "a: b\r\n\tc",
        "a: b\rc: d",
        "a: b\nc: d",
        "a: b\0",
        "a\0: b",
        "a: \x01",
        "a: \x7f",
        "a: b\r\r",
    ] {
        for request in both_kinds(field) {
            refuses(&gateway, request, 400).await;
        }
    }
    for request in [
        // Bare LFs all along: a server may take them for line ends, and one before it may not.
        format!("GET {TASK_INFO}?task_id=a HTTP/1.1\nHost: x\nx-api-key: {KEY}\n\n"),
        head(&format!("GET {TASK_INFO}?task_id=a HTTP/1.1\nHost: x"), "a: b"),
        head(&format!("GET {TASK_INFO}?task_id=a\0 HTTP/1.1"), "Host: x"),
        head(&format!("GET {TASK_INFO}?task_id=a#b HTTP/1.1"), "Host: x"),
        head(&format!("GET {TASK_INFO}?task_id=a b HTTP/1.1"), "Host: x"),
        head(&format!("GET {TASK_INFO}?task_id=a"), "Host: x"),
        head(&format!("GET  {TASK_INFO}?task_id=a HTTP/1.1"), "Host: x"),
        head(&format!("GET {TASK_INFO}?task_id=a HTTP/2.0"), "Host: x"),
        head(&format!("GET {TASK_INFO}?task_id=a HTTP/0.9"), "Host: x"),
    ] {
        refuses(&gateway, request, 400).await;
    }
    assert_eq!(upstream.queries(), 0);
}

#[tokio::test]
async fn one_host_is_what_a_request_has() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for line in [
        format!("GET {TASK_INFO}?task_id=a HTTP/1.1"),
        "POST /api/v1/echo HTTP/1.1".to_owned(),
        "GET http://x/api/v1/echo HTTP/1.1".to_owned(),
    ] {
        for hosts in [
            "a: b",
            "Host: x\r\nHost: x",
            "Host: x\r\nhost: y",
            "Host: x/y",
            "Host: x, y",
            "Host: u@x",
            "Host: x:y",
        ] {
            refuses(&gateway, head(&line, hosts), 400).await;
        }
    }
    refuses(&gateway, head("POST /api/v1/echo HTTP/1.0", "Host: x\r\nHost: y"), 400).await;
    assert_eq!(upstream.queries(), 0);
}

#[tokio::test]
async fn connect_and_trace_are_not_served() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for line in [
        "CONNECT api.crun.ai:443 HTTP/1.1".to_owned(),
        "CONNECT /api/v1/echo HTTP/1.1".to_owned(),
        "TRACE /api/v1/echo HTTP/1.1".to_owned(),
        format!("TRACE {TASK_INFO}?task_id=a HTTP/1.1"),
        "trace /api/v1/echo HTTP/1.1".to_owned(),
    ] {
        refuses(&gateway, head(&line, "Host: x"), 400).await;
    }
    assert_eq!(upstream.queries(), 0);
}

#[tokio::test]
async fn other_protocols_are_refused_in_words() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    // HTTP/2 with prior knowledge, and its first frame.
    refuses(&gateway, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", 400).await;
    // A TLS ClientHello, an SSH greeting, HTTP/0.9.
    refuses(&gateway, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", 400).await;
    refuses(&gateway, b"SSH-2.0-OpenSSH_9.2\r\n", 400).await;
    refuses(&gateway, b"GET /\r\n", 400).await;
    assert_eq!(upstream.queries(), 0);
}

#[tokio::test]
async fn bytes_behind_an_offer_of_another_protocol_are_not_taken_for_requests() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let offers = both_kinds("Connection: upgrade, http2-settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__");
    for offer in &offers {
        for more in [
            raw::poll("b").as_bytes(),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x81\x85",
        ] {
            let before = upstream.queries();
            let mut client = Raw::connect(gateway.address).await;
            client.send([offer.as_bytes(), more].concat()).await.unwrap();
            // The offer is declined by an answer like any other.
            let reply = client.reply().await;
            assert!(reply.is(200) && reply.header("upgrade").is_none(), "{reply:?}");
            assert_refuses(&mut client, 400, "Upgrade").await;
            assert!(upstream.queries() <= before + 1);
        }
    }
    assert!(
        upstream
            .heads()
            .iter()
            .all(|head| !head.to_ascii_lowercase().contains("upgrade"))
    );
    assert!(upstream.heads().iter().all(|head| !head.contains("task_id=b")));
    // A client that waits for the answer goes on in HTTP/1.1.
    let mut client = Raw::connect(gateway.address).await;
    for _ in 0..2 {
        client.send(&offers[0]).await.unwrap();
        assert!(client.reply().await.is(200));
    }
}

#[tokio::test]
async fn upstream_cannot_switch_protocols_on_a_client() {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\u{1}hello";
    let upstream = Scripted::always(switch).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let mut client = Raw::connect(gateway.address).await;
    for offer in ["a: b", "Connection: upgrade\r\nUpgrade: websocket"] {
        for request in both_kinds(offer) {
            client.send(request).await.unwrap();
            let reply = client.reply().await;
            assert!(reply.is(502), "{reply:?}");
        }
    }
}

#[tokio::test]
async fn answers_that_are_due_come_before_a_refusal_and_nothing_after_it() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let good = raw::poll("a");
    for bad in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET /\0",
        "POST /api/v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nz\r\n",
    ] {
        let mut client = Raw::connect(gateway.address).await;
        let post = "POST /api/v1/echo HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc";
        client
            .send(format!("{good}{good}{post}{bad}{good}{post}"))
            .await
            .unwrap();
        for _ in 0..3 {
            let reply = client.reply().await;
            assert!(reply.is(200), "{reply:?}");
            assert_eq!(reply.body, ENDED);
        }
        assert_refuses(&mut client, 400, bad).await;
    }
    // One query of the task, and what was passed through three times.
    assert_eq!(upstream.queries(), 4);
    let refused = gateway.metric("crun_gateway_refused_total{reason=\"malformed\"}").await;
    assert!((refused - 3.0).abs() < 0.1, "{refused}");
}

#[tokio::test]
async fn a_refusal_arrives_though_the_client_sends_on() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let mut client = Raw::connect(gateway.address).await;
    client.send("GET / HTTP/1.1\r\n\r\n").await.unwrap();
    client.send(vec![b'x'; 1 << 20]).await.unwrap();
    assert_refuses(&mut client, 400, "no host").await;
    assert_eq!(upstream.queries(), 0);
}

#[tokio::test]
async fn a_body_on_a_get_is_never_taken_for_a_request() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let smuggled = format!("GET {TASK_INFO}?task_id=smuggled HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\n\r\n");
    let with_length = |length: usize| format!("Content-Length: {length}");
    let chunk = format!("{:x}\r\n{smuggled}\r\n0\r\n\r\n", smuggled.len());
    // The first is a miss, all others are hits.
    for _ in 0..2 {
        for (fields, body) in [
            (with_length(smuggled.len()), smuggled.clone()),
            ("Transfer-Encoding: chunked".to_owned(), chunk.clone()),
            (with_length(smuggled.len() << 10), smuggled.repeat(1 << 10)),
            // Announced, and never sent.
            (with_length(1 << 20), String::new()),
        ] {
            for split in [false, true] {
                let [get, _] = both_kinds(&fields);
                let mut client = Raw::connect(gateway.address).await;
                if split {
                    client.send(&get).await.unwrap();
                    assert!(client.reply().await.is(200));
                    // It may be closed by now.
                    let _ = client.send(format!("{body}{}", raw::poll("a"))).await;
                } else {
                    client.send(format!("{get}{body}{}", raw::poll("a"))).await.unwrap();
                    assert!(client.reply().await.is(200));
                }
                // In step, or closed: and where the body is not yet whole, the poll is part of it.
                if let Ok(Some(reply)) = client.try_reply().await {
                    assert!(reply.is(200) && reply.body == ENDED, "{reply:?}");
                    assert!(!body.is_empty());
                }
            }
        }
    }
    assert_eq!(upstream.queries(), 1, "{:?}", upstream.heads());
}

#[tokio::test]
async fn variants_of_the_path_are_never_taken_for_task_info() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for path in [
        "//api/v1/client/job/TaskInfo",
        "/api//v1/client/job/TaskInfo",
        "/api/v1/client/job//TaskInfo",
        "/api/v1/client/job/x/../TaskInfo",
        "/api/v1/client/job/..;/job/TaskInfo",
        "/api/v1/client/job/./TaskInfo",
        "/api/v1/client/job/%2e/TaskInfo",
        "/api/v1/client/job%2fTaskInfo",
        "/api/v1/client/job%2FTaskInfo",
        "/api/v1/client/job%5cTaskInfo",
        "/api/v1/client/job\\TaskInfo",
        "/api/v1/client/job/TaskInf%6F",
        "/api/v1/client/job/TaskInf%256F",
        "/api/v1/client/job/TaskInfo;x",
        "/api/v1/client/job/TaskInfo;x=.css",
        "/api/v1/client/job/TaskInfo.css",
        "/api/v1/client/job/TaskInfo/x.css",
        "/api/v1/client/job/taskinfo",
        "/api/v1/client/job/TASKINFO",
        "/api/v1/client/job/TaskInfo/",
        "/api/v1/client/job/TaskInfo%20",
        "/api/v1/client/job/TaskInfo%00",
        "/api/v1/client/job/TaskInfo%3f",
        "/api/v1/client/job/TaskInfo%23",
        "/api/v1/client/job/Task\u{130}nfo",
        "http://x//api/v1/client/job/TaskInfo",
        "http://x/api/v1/client/job/taskinfo",
    ] {
        for method in ["GET", "POST"] {
            let mut client = Raw::connect(gateway.address).await;
            let asked = head(&format!("{method} {path}?task_id=a HTTP/1.1"), "Host: x");
            client.send(&asked).await.unwrap();
            let reply = client.reply().await;
            assert!(reply.is(404), "{asked:?}: {reply:?}");
        }
    }
    assert_eq!(upstream.queries(), 0, "{:?}", upstream.heads());
    // An absolute target is the same query, and paid like it.
    let mut client = Raw::connect(gateway.address).await;
    let asked = head(&format!("GET http://other{TASK_INFO}?task_id=a HTTP/1.1"), "Host: x");
    client.send(asked).await.unwrap();
    assert!(client.reply().await.is(200));
    let paid = gateway
        .metric("crun_gateway_upstream_requests_total{account=\"other\",outcome=\"terminal\"}")
        .await;
    assert!((paid - 1.0).abs() < 0.1, "{paid}");
}

#[tokio::test]
async fn a_head_in_pieces_is_as_good_as_one() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let mut client = Raw::connect(gateway.address).await;
    client.stream.set_nodelay(true).unwrap();
    let upload = "POST /api/v1/echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    for byte in format!("\r\n{}{upload}{}", raw::poll("a"), raw::poll("a")).bytes() {
        client.send([byte]).await.unwrap();
    }
    for _ in 0..3 {
        assert!(client.reply().await.is(200));
    }
    client.stream.shutdown().await.unwrap();
    client.assert_ends().await;
    assert_eq!(requests(&upstream), 2);
}

#[tokio::test]
async fn large_heads_are_431_at_their_limits() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "limits: { header_bytes: \"2KiB\", headers: 8 }").await;
    let [poll, upload] = both_kinds("a: ");
    for request in [&poll, &upload] {
        let filled = |length: usize| request.replacen("a: ", &format!("a: {}", "x".repeat(length - request.len())), 1);
        let mut client = Raw::connect(gateway.address).await;
        client.send(filled(2048)).await.unwrap();
        assert!(client.reply().await.is(200));
        refuses(&gateway, filled(2049), 431).await;
        // Neither is one that never ends.
        refuses(&gateway, &filled(3000)[..2048], 431).await;
        let fields = |count: usize| request.replacen("a: ", "a: b\r\n".repeat(count - 2).trim_end(), 1);
        client.send(fields(8)).await.unwrap();
        assert!(client.reply().await.is(200));
        refuses(&gateway, fields(9), 431).await;
    }
    assert_eq!(gateway.admin("/readyz").await.0, 200);
    let refused = gateway
        .metric("crun_gateway_refused_total{reason=\"head_too_large\"}")
        .await;
    assert!((refused - 12.0).abs() < 0.1, "{refused}");
}

#[tokio::test]
async fn as_many_fields_as_configured_reach_upstream() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "limits: { headers: 300 }").await;
    let [_, upload] = both_kinds("a: ");
    let fields = upload.replacen("a: ", "a: b\r\n".repeat(298).trim_end(), 1);
    let mut client = Raw::connect(gateway.address).await;
    client.send(fields).await.unwrap();
    assert!(client.reply().await.is(200));
    assert_eq!(upstream.heads()[0].matches("\r\na: b").count(), 298);
}

#[tokio::test]
async fn large_bodies_are_413_at_their_limit() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "limits: { request_body: \"1KiB\" }").await;
    let upload = |length: usize| both_kinds(&format!("Content-Length: {length}"))[1].clone() + &"x".repeat(length);
    let chunked = |length: usize| {
        let [_, head] = both_kinds("Transfer-Encoding: chunked");
        format!("{head}{length:x}\r\n{}\r\n0\r\n\r\n", "x".repeat(length))
    };
    for body in [upload(1024), chunked(1024)] {
        let mut client = Raw::connect(gateway.address).await;
        client.send(body).await.unwrap();
        assert!(client.reply().await.is(200));
    }
    for body in [upload(1025), chunked(1025)] {
        let mut client = Raw::connect(gateway.address).await;
        client.send(body).await.unwrap();
        let reply = assert_refuses(&mut client, 413, "1 KiB and a byte").await;
        assert!(
            reply.json()["message"]
                .as_str()
                .unwrap()
                .contains("limits.request_body")
        );
    }
    assert_eq!(requests(&upstream), 2);
    // Chunks that are too large together.
    let mut client = Raw::connect(gateway.address).await;
    let [_, head] = both_kinds("Transfer-Encoding: chunked");
    client.send(head).await.unwrap();
    for _ in 0..3 {
        client.send(format!("200\r\n{}\r\n", "x".repeat(512))).await.unwrap();
    }
    assert_refuses(&mut client, 413, "three times 512").await;
    assert_eq!(gateway.admin("/readyz").await.0, 200);
}

#[tokio::test]
async fn more_requests_than_allowed_are_told_why() {
    let upstream = Scripted::start(Duration::from_secs(2), |_| response("200 OK", "", ENDED)).await;
    let gateway = Gateway::start(&upstream.url, "limits: { requests: 2 }").await;
    let mut busy = Vec::new();
    for line in [
        &format!("GET {TASK_INFO}?task_id=a HTTP/1.1"),
        "POST /api/v1/echo HTTP/1.1",
    ] {
        let mut client = Raw::connect(gateway.address).await;
        client.send(head(line, "Host: x")).await.unwrap();
        busy.push(client);
    }
    let in_flight = "crun_gateway_requests_in_flight";
    gateway.reaches(in_flight, 2).await;
    let mut third = Raw::connect(gateway.address).await;
    let reply = third.poll("a").await;
    assert!(reply.is(503), "{reply:?}");
    assert_eq!(reply.header("retry-after"), Some("1"));
    assert!(
        reply.json()["message"].as_str().unwrap().contains("limits.requests"),
        "{reply:?}"
    );
    assert_eq!(gateway.admin("/readyz").await.0, 200);
    for client in &mut busy {
        assert!(client.reply().await.is(200));
    }
    // The connection is as good as before, and so are the places.
    assert!(third.poll("a").await.is(200));
    gateway.shows(in_flight, 0.0).await;
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_504_and_its_answer_cut_when_it_has_begun() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let config = "budget: { max_wait: \"1s\" }\nlimits: { request_timeout: \"1s\" }";
    let gateway = Gateway::start(&url, config).await;
    let post = "POST /api/v1/echo HTTP/1.1\r\nhost: x\r\nx-request-id: the-one\r\ncontent-length: 0\r\n\r\n";
    // Upstream says nothing.
    let mut client = Raw::connect(gateway.address).await;
    client.send(post).await.unwrap();
    let _silent = listener.accept().await.unwrap();
    let reply = client.reply().await;
    assert!(reply.is(504), "{reply:?}");
    assert!(
        reply.json()["message"]
            .as_str()
            .unwrap()
            .contains("limits.request_timeout")
    );
    // Upstream begins, and does not end.
    client.send(post).await.unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    let mut upstream = Raw::over(stream);
    upstream.head().await.unwrap();
    upstream
        .send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        .await
        .unwrap();
    client.until("half").await;
    assert!(!matches!(client.some().await, Ok(more) if !more.is_empty()));
    // The client says that it has something to say, and does not say it.
    let mut client = Raw::connect(gateway.address).await;
    client
        .send("POST /api/v1/echo HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf")
        .await
        .unwrap();
    assert!(client.reply().await.is(504));
    for (series, count) in [
        ("crun_gateway_refused_total{reason=\"request_timeout\"}", 2.0),
        ("crun_gateway_refused_total{reason=\"answer_cut\"}", 1.0),
        ("crun_gateway_passthrough_requests_total{code=\"5xx\"}", 2.0),
        ("crun_gateway_passthrough_requests_total{code=\"2xx\"}", 1.0),
    ] {
        let counted = gateway.metric(series).await;
        assert!((counted - count).abs() < 0.1, "{series} {counted}");
    }
    let log = gateway.logged("answer cut", 1).await;
    let line = log.lines().find(|line| line.contains("answer cut")).unwrap();
    assert!(line.contains("INFO") && line.contains("the-one"), "{line}");
    assert!(!log.contains("answer abandoned"), "told of twice: {log}");
    assert_eq!(gateway.admin("/readyz").await.0, 200);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_has_begun_is_cut_when_the_requests_time_is_over() {
    let paused = Paused::start(
        Behaviour {
            answer: |_, _| http::Response::new(vec![b'x'; 1 << 20].into()),
            ..Behaviour::default()
        },
        |_| {},
    );
    let in_flight = || paused.metric("crun_gateway_requests_in_flight");
    for asked in both_kinds("").map(|asked| asked.replace("echo", "echo?task_id=a")) {
        let mut client = paused.connect(100, CancellationToken::new());
        // It takes the beginning, and no more.
        client.send(&asked).await.unwrap();
        let start = Instant::now();
        client.some().await.unwrap();
        sleep_until(start + Duration::from_secs(899)).await;
        assert!((in_flight() - 1.0).abs() < 0.1, "{asked}");
        sleep_until(start + Duration::from_millis(900_010)).await;
        assert!(in_flight() < 0.1, "{asked}");
    }
    let cut = paused.metric("crun_gateway_refused_total{reason=\"answer_cut\"}");
    assert!((cut - 2.0).abs() < 0.1, "{cut}");
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_a_500_for_that_request_and_nothing_else_counted_and_logged() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let _listening = listen(log.reopen().unwrap(), Level::DEBUG);
    let paused = Paused::start(
        Behaviour {
            opening: |number| {
                assert!(number > 1, "a bug, planted");
                Duration::ZERO
            },
            ..Behaviour::default()
        },
        |_| {},
    );
    let poll = paused.poll(KEY, "a").await;
    poll.assert_is_our_error(500);
    let upload = || {
        let mut upload = bare(Method::POST, "/api/v1/echo?task_id=a");
        upload.headers_mut().insert("x-api-key", KEY.parse().unwrap());
        upload
    };
    paused.ask(upload()).await.assert_is_our_error(500);
    for (series, times) in [
        ("refused_total{reason=\"internal\"}", 2.0),
        (
            "requests_total{account=\"other\",cache=\"none\",client=\"other\",code=\"5xx\"}",
            1.0,
        ),
        ("passthrough_requests_total{code=\"5xx\"}", 1.0),
    ] {
        let counted = paused.metric(&format!("crun_gateway_{series}"));
        assert!((counted - times).abs() < 0.1, "{series}: {counted}");
    }
    let log = std::fs::read_to_string(log.path()).unwrap();
    for refused in [": poll refused", ": request refused"] {
        let mut lines = log.lines().filter(|line| line.contains(refused));
        let line = lines.next().unwrap_or_else(|| panic!("no{refused} in {log}"));
        assert!(
            line.contains(" code=500 detail=\"internal\"") && line.contains(" request_id="),
            "{line}"
        );
        assert_eq!(lines.next(), None);
    }
    // The same task, the same account, the same path.
    assert_eq!(paused.poll(KEY, "a").await.status, 200);
    assert_eq!(paused.ask(upload()).await.status, 200);
    let in_flight = paused.metric("crun_gateway_requests_in_flight");
    assert!(in_flight < 0.1, "{in_flight}");
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_an_accounts_budget_is_a_500_for_who_waits_for_a_permit_and_nothing_else() {
    let paused = Paused::start(Behaviour::default(), |_| {});
    let planted = Arc::new(AtomicBool::new(false));
    let (first, second, ()) = tokio::join!(
        // From then on its permit is all that it waits for: whoever grants that panics.
        paused.poll_planted(KEY, "a", &planted),
        paused.poll(KEY, "b"),
        async {
            // Both have a connection, and nothing is granted in the first second.
            sleep_until(Instant::now() + Duration::from_millis(500)).await;
            planted.store(true, Ordering::Relaxed);
        }
    );
    assert!(!planted.load(Ordering::Relaxed), "nobody has panicked");
    assert_eq!(first.status, 200, "what it has been granted it has");
    second.assert_is_our_error(500);
    let internal = paused.metric("crun_gateway_refused_total{reason=\"internal\"}");
    assert!((internal - 1.0).abs() < 0.1, "{internal}");
    assert_eq!(paused.poll(KEY, "b").await.status, 200);
}
