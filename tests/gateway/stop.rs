//! SIGTERM: nobody sees a reset, what is in flight or queued finishes, exit 0.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::harness::client::poll_request;
use crate::harness::process::PATIENCE;
use crate::harness::{Gateway, KEY, Simulator, poll};

async fn connect(gateway: &Gateway) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(gateway.address).await.unwrap();
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// Waits until the gateway says that it is stopping.
async fn is_draining(gateway: &Gateway) {
    while gateway.admin("/readyz").await.0 != 503 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_is_in_flight_or_queued_finishes() {
    let upstream = Simulator::start(&["--latency", "1s"]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    let address = gateway.address;
    let mut polls = JoinSet::new();
    for task in 0..40 {
        polls.spawn(async move { poll(address, &format!("ended.{task}")).await });
    }
    timeout(PATIENCE, async {
        while upstream.queries().await < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    gateway.terminate();
    is_draining(&gateway).await;
    assert_eq!(gateway.admin("/livez").await.0, 200);
    // The listener is still open: whoever a load balancer still sends is answered.
    let late = poll(address, "ended.0").await;
    assert_eq!((late.status.as_u16(), late.header("connection")), (200, Some("close")));
    for reply in timeout(PATIENCE, polls.join_all()).await.unwrap() {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    assert!(gateway.exit().await.success());
    assert_eq!(upstream.queries().await, 40);
}

#[tokio::test]
async fn an_idle_connection_may_ask_once_more_and_then_sees_a_clean_end() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    let mut kept = connect(&gateway).await;
    let first = kept.send_request(poll_request(KEY, "ended.a")).await.unwrap();
    assert!(!first.headers().contains_key("connection"));
    first.into_body().collect().await.unwrap();
    let mut idle = TcpStream::connect(gateway.address).await.unwrap();
    gateway.terminate();
    is_draining(&gateway).await;
    let started = Instant::now();
    kept.ready().await.unwrap();
    let last = kept.send_request(poll_request(KEY, "ended.a")).await.unwrap();
    assert_eq!(
        (last.status().as_u16(), last.headers()["connection"].to_str().unwrap()),
        (200, "close")
    );
    let mut rest = Vec::new();
    timeout(PATIENCE, idle.read_to_end(&mut rest))
        .await
        .unwrap()
        .expect("a FIN, no reset");
    assert!(rest.is_empty());
    assert!(
        started.elapsed() > Duration::from_millis(1500),
        "not before its grace is over: {:?}",
        started.elapsed()
    );
    assert!(gateway.exit().await.success());
}

#[tokio::test]
async fn bytes_that_come_too_late_do_not_reset_the_answer_before_them() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    gateway.terminate();
    is_draining(&gateway).await;
    // Pipelined behind a request whose answer says `close`: they lie unread, and must not take the answer with them.
    let request =
        format!("GET /api/v1/client/job/TaskInfo?task_id=ended.a HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\n\r\n");
    stream.write_all(request.repeat(50).as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer))
        .await
        .unwrap()
        .expect("a FIN, no reset");
    let answer = String::from_utf8(answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200 OK") && answer.contains("connection: close"),
        "{answer}"
    );
    drop(stream);
    assert!(gateway.exit().await.success());
}

#[tokio::test]
async fn clients_that_keep_polling_through_a_stop_see_no_error() {
    let upstream = Simulator::start(&["--latency", "20ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    poll(gateway.address, "ended.a").await;
    let mut clients = JoinSet::new();
    for _ in 0..20 {
        let mut connection = connect(&gateway).await;
        clients.spawn(async move {
            loop {
                connection.ready().await.unwrap();
                let reply = connection.send_request(poll_request(KEY, "ended.a")).await.unwrap();
                assert_eq!(reply.status(), 200);
                let closes = reply.headers().contains_key("connection");
                reply.into_body().collect().await.unwrap();
                if closes {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }
    gateway.terminate();
    timeout(PATIENCE, clients.join_all()).await.unwrap();
    assert!(gateway.exit().await.success());
}

#[tokio::test]
async fn drain_bounds_a_stop_and_a_second_signal_ends_at_once() {
    for (drain, signals) in [("3s", 1), ("30s", 2)] {
        let upstream = Simulator::start(&["--latency", "0ms"]).await;
        let config = format!(
            "drain: \"{drain}\"\nbudget: {{ max_wait: \"1m\" }}\nupstream: {{ url: \"{}\", timeout: \"1m\" }}",
            upstream.url
        );
        let mut gateway = Gateway::start(&upstream.url, &config).await;
        let address = gateway.address;
        let hanging =
            tokio::spawn(
                async move { crate::harness::client::try_request(address, poll_request(KEY, "hang.a")).await },
            );
        while upstream.queries().await == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let started = Instant::now();
        gateway.terminate();
        is_draining(&gateway).await;
        if signals == 2 {
            gateway.terminate();
        }
        assert!(gateway.exit().await.success());
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        assert!(hanging.await.unwrap().is_err());
    }
}
