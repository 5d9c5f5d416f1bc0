//! Other paths are streamed through untouched, on nobody's budget; and what may not pass does not.

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::harness::client::bare;
use crate::harness::process::PATIENCE;
use crate::harness::scripted::response;
use crate::harness::{Gateway, KEY, Scripted, Simulator, request};

fn post(path: &str, body: &'static str) -> Request<Full<Bytes>> {
    let mut request = bare(Method::POST, path).map(|_| Full::from(body));
    request.headers_mut().insert("x-api-key", KEY.parse().unwrap());
    request
}

#[tokio::test]
async fn a_request_passes_with_its_method_path_headers_and_body() {
    let upstream = Simulator::start(&[]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let mut asked = post("/api/v1/echo/a%2Fb?x=%zz&y", r#"{"model":"suno"}"#);
    for (name, value) in [
        ("authorization", "Bearer llm"),
        ("x-custom", "1"),
        ("connection", "x-hop, keep-alive"),
        ("x-hop", "1"),
        ("te", "trailers"),
    ] {
        asked.headers_mut().insert(name, value.parse().unwrap());
    }
    let reply = request(gateway.address, asked).await;
    let echoed = reply.json();
    assert_eq!(echoed["method"], "POST");
    assert!(echoed.to_string().contains("/api/v1/echo/a%2Fb?x=%zz&y"), "{echoed}");
    let headers = &echoed["headers"];
    for (name, kept) in [
        ("authorization", true),
        ("x-custom", true),
        ("x-api-key", true),
        ("via", true),
        ("x-hop", false),
        ("te", false),
    ] {
        assert_eq!(headers.get(name).is_some(), kept, "{name}: {headers}");
    }
    assert_eq!(reply.header("via"), Some("1.1 crun-gateway"));
    let stats = upstream.stats().await;
    assert_eq!(stats["requests"], 0, "no query: {stats}");
}

#[tokio::test]
async fn both_ways_stream_without_waiting_for_the_end() {
    let upstream = Simulator::start(&[]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    let head =
        format!("POST /api/v1/mirror HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ntransfer-encoding: chunked\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut seen = String::new();
    for part in ["first", "other"] {
        stream.write_all(format!("5\r\n{part}\r\n").as_bytes()).await.unwrap();
        // It comes back before the next is sent.
        timeout(PATIENCE, async {
            while !seen.contains(part) {
                let mut chunk = [0; 1024];
                let read = stream.read(&mut chunk).await.unwrap();
                assert!(read > 0, "{seen}");
                seen += std::str::from_utf8(&chunk[..read]).unwrap();
            }
        })
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn upstreams_status_and_cookies_pass_and_nothing_is_tried_twice() {
    let answer = response(
        "201 Created",
        "Set-Cookie: a=b\r\nX-Up: 1\r\nConnection: x-hop\r\nX-Hop: 1\r\n",
        b"made",
    );
    let upstream = Scripted::always(answer).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let reply = request(gateway.address, post("/api/v1/client/job/CreateTask", "{}")).await;
    assert_eq!((reply.status.as_u16(), &reply.body[..]), (201, &b"made"[..]));
    assert_eq!(
        (reply.header("set-cookie"), reply.header("x-up"), reply.header("x-hop")),
        (Some("a=b"), Some("1"), None)
    );

    let broken = Scripted::always("").await;
    let gateway = Gateway::start(&broken.url, "").await;
    let address = gateway.address;
    let posting = tokio::spawn(async move { request(address, post("/api/v1/client/job/CreateTask", "{}")).await });
    while broken.queries() == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(broken.queries(), 1);
    posting.abort();
}

#[tokio::test]
async fn what_is_not_open_is_404_and_upstream_away_is_503() {
    let upstream = Simulator::start(&[]).await;
    let closed = Gateway::start(&upstream.url, "passthrough: []").await;
    request(closed.address, post("/api/v1/echo", ""))
        .await
        .assert_is_our_error(404);
    let open = Gateway::start("http://127.0.0.1:9", "").await;
    request(open.address, post("/admin", "")).await.assert_is_our_error(404);
    request(open.address, post("/api/v1/../admin", ""))
        .await
        .assert_is_our_error(404);
    request(open.address, post("/api/v1/echo", ""))
        .await
        .assert_is_our_error(503);
    assert_eq!(upstream.stats().await["paths"], serde_json::json!({}));
}
