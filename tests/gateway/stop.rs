//! A stop costs nobody an answer: what is asked is answered, what is idle ends cleanly, and all of it within `drain`.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http::Method;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::harness::client::{bare, poll_request, try_request};
use crate::harness::raw::{self, RawReply};
use crate::harness::{Gateway, KEY, Raw, Simulator, poll, request, until};

/// How long the listener and idle connections stay open.
const GRACE: Duration = Duration::from_secs(2);

/// What a busy machine may add.
const SLACK: Duration = Duration::from_millis(1500);

#[tokio::test]
async fn fifty_in_flight_and_fifty_queued_are_answered_and_the_exit_code_is_0() {
    // Longer than fifty take to be sent, so that all of them are in flight when the fiftieth is.
    let upstream = Simulator::start(&["--latency", "5s"]).await;
    let mut gateway = Gateway::start(&upstream.url, "budget: { max_wait: \"25s\" }").await;
    let address = gateway.address;
    let mut polls = JoinSet::new();
    for task in 0..100 {
        polls.spawn(async move { poll(address, &format!("ended.{task}")).await });
    }
    upstream.asked(50).await;
    assert!(upstream.queries().await < 55, "the others are still queued");
    gateway.terminate();
    gateway.drains().await;
    let mut told = 0;
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
        told += usize::from(reply.header("connection") == Some("close"));
    }
    assert!(
        told >= 95,
        "answers during the drain say that the connection closes: {told}"
    );
    assert_eq!(gateway.exit().await.code(), Some(0));
    assert_eq!(upstream.queries().await, 100);
    assert_eq!(upstream.stats().await["violations"], 0);
}

#[tokio::test]
async fn readiness_ends_at_once_and_liveness_does_not() {
    let upstream = Simulator::start(&[]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    let address = gateway.address;
    assert_eq!(gateway.admin("/readyz").await.0, 200);
    let slow = tokio::spawn(async move { poll(address, "slow-3s.a").await });
    upstream.asked(1).await;
    let stopped = Instant::now();
    gateway.terminate();
    gateway.drains().await;
    assert!(stopped.elapsed() < Duration::from_secs(1), "{:?}", stopped.elapsed());
    assert_eq!(gateway.admin("/livez").await.0, 200);
    assert_eq!(slow.await.unwrap().status, 200);
    assert_eq!(gateway.exit().await.code(), Some(0));
}

#[tokio::test]
async fn the_listener_stays_open_for_two_seconds_and_whoever_comes_is_answered() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    gateway.terminate();
    gateway.drains().await;
    let stopped = Instant::now();
    let mut answered = 0;
    while let Ok(mut connection) = Raw::try_connect(gateway.address).await {
        match exchange(&mut connection, "ended.a").await {
            Ok(Some(reply)) => assert!(reply.is(200) && reply.says_close(), "{reply:?}"),
            // As in `poll_until_refused`.
            _ if is_refused(gateway.address).await => break,
            other => panic!("after {answered} answers: {other:?}"),
        }
        answered += 1;
        sleep(Duration::from_millis(20)).await;
    }
    assert!(is_refused(gateway.address).await);
    let open = stopped.elapsed();
    assert!(
        open + Duration::from_millis(500) > GRACE && open < GRACE + SLACK,
        "{open:?}"
    );
    assert!(answered > 20, "{answered}");
    assert_eq!(gateway.exit().await.code(), Some(0));
}

#[tokio::test]
async fn an_idle_connection_may_ask_once_more() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    let mut used = Raw::connect(gateway.address).await;
    assert!(!used.poll("ended.a").await.says_close());
    let mut unused = Raw::connect(gateway.address).await;
    gateway.terminate();
    gateway.drains().await;
    for connection in [&mut used, &mut unused] {
        let last = connection.poll("ended.a").await;
        assert!(last.is(200) && last.says_close(), "{last:?}");
        connection.assert_ends().await;
    }
    drop((used, unused));
    assert_eq!(gateway.exit().await.code(), Some(0));
}

#[tokio::test]
async fn an_idle_connection_ends_with_a_fin_after_two_seconds_and_bytes_sent_then_do_not_reset_it() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    let mut used = Raw::connect(gateway.address).await;
    assert!(used.poll("ended.a").await.is(200));
    let mut unused = Raw::connect(gateway.address).await;
    gateway.terminate();
    let stopped = Instant::now();
    for connection in [&mut used, &mut unused] {
        connection.assert_ends().await;
    }
    let ended = stopped.elapsed();
    assert!(ended >= GRACE && ended < GRACE + SLACK, "{ended:?}");
    for connection in [&mut used, &mut unused] {
        for _ in 0..10 {
            connection.send(raw::poll("ended.a")).await.unwrap();
            // A reset would come back within this, on one machine.
            sleep(Duration::from_millis(5)).await;
        }
        assert!(connection.stream.take_error().unwrap().is_none());
        connection.assert_ends().await;
    }
    drop((used, unused));
    assert_eq!(gateway.exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_request_sent_as_the_connection_closes_is_answered_or_sees_its_end_and_never_a_reset() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    let mut idle = Vec::new();
    for _ in 0..100 {
        let mut connection = Raw::connect(gateway.address).await;
        assert!(connection.poll("ended.a").await.is(200));
        idle.push(connection);
    }
    gateway.terminate();
    let closes = Instant::now() + GRACE;
    let mut polls = JoinSet::new();
    for (number, mut connection) in (0..).zip(idle) {
        polls.spawn(async move {
            sleep_until(closes - Duration::from_millis(50) + Duration::from_millis(number)).await;
            connection.send(raw::poll("ended.a")).await?;
            let reply = connection.try_reply().await?;
            if let Some(reply) = &reply {
                assert!(reply.is(200) && reply.says_close(), "{reply:?}");
                connection.assert_ends().await;
            }
            io::Result::Ok(reply.is_some())
        });
    }
    let ends = polls.join_all().await;
    let answered = ends.into_iter().filter(|end| *end.as_ref().expect("no reset")).count();
    assert!(answered > 0, "those who came before the close are answered");
    assert_eq!(gateway.exit().await.code(), Some(0));
}

#[tokio::test]
async fn requests_pipelined_behind_the_last_one_do_not_take_its_answer_away() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    let mut connection = Raw::connect(gateway.address).await;
    gateway.terminate();
    gateway.drains().await;
    connection.send(raw::poll("ended.a").repeat(50)).await.unwrap();
    let last = connection.reply().await;
    assert!(last.is(200) && last.says_close(), "{last:?}");
    connection.assert_ends().await;
    drop(connection);
    assert_eq!(gateway.exit().await.code(), Some(0));
}

/// One client that polls on a connection for as long as it may and reconnects, until nobody listens any more. Gives how
/// many answers it got.
async fn poll_until_refused(address: SocketAddr, number: usize) -> usize {
    let mut answers = 0;
    loop {
        let mut connection = match Raw::try_connect(address).await {
            Ok(connection) => connection,
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return answers,
            // The listener closed between this connection's first and last packet: the same window as below, seen
            // earlier.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset && is_refused(address).await => {
                return answers;
            }
            Err(error) => panic!("client {number} cannot connect after {answers} answers: {error}"),
        };
        let mut is_new = true;
        loop {
            let reply = match exchange(&mut connection, &format!("ended.{}", number % 8)).await {
                // The kernel opened the connection between our last accept and the listener's close: inherent to TCP.
                Err(_) if is_new && is_refused(address).await => return answers,
                reply => reply.unwrap_or_else(|error| panic!("client {number}: {error} after {answers} answers")),
            };
            // The connection was idle, and closed as the request was on its way: inherent to keep-alive.
            let Some(reply) = reply else { break };
            assert!(reply.is(200), "{reply:?}");
            answers += 1;
            if reply.says_close() {
                break;
            }
            is_new = false;
            sleep(Duration::from_millis(number as u64 % 16)).await;
        }
    }
}

async fn exchange(connection: &mut Raw, task: &str) -> io::Result<Option<RawReply>> {
    connection.send(raw::poll(task)).await?;
    connection.try_reply().await
}

async fn is_refused(address: SocketAddr) -> bool {
    matches!(Raw::try_connect(address).await, Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

#[tokio::test]
async fn no_client_of_many_sees_a_reset() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    for task in 0..8 {
        assert_eq!(poll(gateway.address, &format!("ended.{task}")).await.status, 200);
    }
    let address = gateway.address;
    let mut clients = JoinSet::new();
    for number in 0..64 {
        clients.spawn(poll_until_refused(address, number));
    }
    let hits = "crun_gateway_upstream_calls_saved_total{account=\"other\",how=\"hit\"}";
    gateway.reaches(hits, 1000).await;
    gateway.terminate();
    for answers in clients.join_all().await {
        assert!(answers > 0);
    }
    assert_eq!(gateway.exit().await.code(), Some(0));
    assert_eq!(upstream.queries().await, 8);
}

#[tokio::test]
async fn a_post_in_flight_finishes() {
    let upstream = Simulator::start(&["--latency", "1s"]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    let address = gateway.address;
    let path = "/api/v1/client/job/CreateTask";
    let post = tokio::spawn(async move { request(address, bare(Method::POST, path)).await });
    until("it is sent on", async || upstream.stats().await["paths"][path] == 1).await;
    gateway.terminate();
    let reply = post.await.unwrap();
    assert_eq!(reply.status, 200);
    assert!(reply.json()["data"]["task_id"].is_string(), "{reply:?}");
    assert_eq!(reply.header("connection"), Some("close"));
    assert_eq!(gateway.exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let upstream = Simulator::start(&[]).await;
    let mut gateway = Gateway::start(&upstream.url, "").await;
    let address = gateway.address;
    let polls = tokio::spawn(async move { try_request(address, poll_request(KEY, "hang.a")).await });
    upstream.asked(1).await;
    gateway.terminate();
    gateway.drains().await;
    let again = Instant::now();
    gateway.terminate();
    assert_eq!(gateway.exit().await.code(), Some(0));
    assert!(again.elapsed() < Duration::from_secs(1), "{:?}", again.elapsed());
    assert!(polls.await.unwrap().is_err());
}

#[tokio::test]
async fn a_stop_takes_no_longer_than_drain() {
    let upstream = Simulator::start(&[]).await;
    let mut gateway = Gateway::start(&upstream.url, "drain: \"3s\"").await;
    let address = gateway.address;
    let hanging = tokio::spawn(async move { try_request(address, poll_request(KEY, "hang.a")).await });
    upstream.asked(1).await;
    gateway.terminate();
    let stopped = Instant::now();
    let exit = timeout_at(stopped + Duration::from_secs(7), gateway.exit()).await;
    assert_eq!(exit.expect("in time").code(), Some(0));
    let took = stopped.elapsed();
    assert!(
        took > Duration::from_millis(2900) && took < Duration::from_secs(3) + SLACK,
        "{took:?}"
    );
    assert!(hanging.await.unwrap().is_err());
    gateway.logged("drain time is over", 1).await;
}

#[tokio::test]
async fn an_upload_that_is_turned_away_does_not_hold_a_stop_up() {
    let upstream = Simulator::start(&[]).await;
    let mut gateway = Gateway::start(&upstream.url, "limits: { connections: 1 }").await;
    let mut let_in = Raw::connect(gateway.address).await;
    assert!(let_in.poll("ended.a").await.is(200));
    let mut client = Raw::connect(gateway.address).await;
    let head = "POST /api/v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n";
    client.send(head).await.unwrap();
    assert!(client.reply().await.is(503));
    gateway.terminate();
    let stopped = Instant::now();
    tokio::spawn(async move {
        while client.send([b'x'; 1000]).await.is_ok() {
            sleep(Duration::from_millis(100)).await;
        }
    });
    let exit = timeout_at(stopped + 2 * GRACE + SLACK, gateway.exit()).await;
    assert_eq!(exit.expect("in time").code(), Some(0));
}
