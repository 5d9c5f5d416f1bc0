//! A connection on which nothing is asked gives hyper's side of it up, and nobody notices. That it does give it up is
//! `tests/idle_connections.rs`'s.

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::time::Duration;

use crun_gateway::server::GRACE;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::yield_now;
use tokio::time::{Instant, advance, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::harness::paused::{Behaviour, Paused};
use crate::harness::raw;
use crate::harness::{KEY, TASK_INFO};

const ROOM: usize = 1 << 16;
/// Any time will do: a connection rests as soon as it has nothing to answer.
const REST: Duration = Duration::from_secs(5);

fn start() -> Paused {
    Paused::start(Behaviour::default(), |_| {})
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_has_rested_is_served_like_any_other() {
    let gateway = start();
    let mut client = gateway.connect(ROOM, CancellationToken::new());
    for pause in [0, 60_000] {
        sleep(Duration::from_millis(pause)).await;
        assert!(client.poll("a").await.is(200));
    }
    sleep(REST).await;
    client.send(["a", "b", "c"].map(raw::poll).concat()).await.unwrap();
    for task in ["a", "b", "c"] {
        assert_eq!(client.reply().await.json()["data"]["task_id"], task);
    }
    sleep(REST).await;
    for byte in raw::poll("d").bytes() {
        client.send([byte]).await.unwrap();
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(client.reply().await.json()["data"]["task_id"], "d");
    sleep(REST).await;
    let head = format!("POST {TASK_INFO} HTTP/1.1\r\nhost: gateway\r\ncontent-length: 10000\r\n\r\n");
    client.send(head + "the beginning of a body").await.unwrap();
    assert!(client.reply().await.is(405));
    // hyper waits for no body that nobody wants.
    client.assert_ends().await;
}

#[tokio::test(start_paused = true)]
async fn a_rested_connection_is_held_to_the_same_rules() {
    let gateway = start();
    let mut client = gateway.connect(ROOM, CancellationToken::new());
    assert!(client.poll("a").await.is(200));
    sleep(REST).await;
    client.send("GET / HTTP/1.1\nhost: gateway\n\n").await.unwrap();
    let refusal = client.reply().await;
    assert!(refusal.is(400) && refusal.says_close(), "{refusal:?}");
    client.assert_ends().await;

    let mut client = gateway.connect(ROOM, CancellationToken::new());
    assert!(client.poll("a").await.is(200));
    sleep(REST).await;
    let started = Instant::now();
    client.send("GET / HTTP/1.1\r\nhost: ").await.unwrap();
    assert!(client.reply().await.is(408));
    assert_eq!(started.elapsed(), Duration::from_secs(10));
    client.assert_ends().await;
}

#[tokio::test(start_paused = true)]
async fn the_idle_timeout_counts_from_the_last_answer_though_the_connection_rests() {
    let gateway = start();
    for asks in [true, false] {
        let started = Instant::now();
        let mut client = gateway.connect(ROOM, CancellationToken::new());
        if asks {
            sleep(REST).await;
            assert!(client.poll("a").await.is(200));
        }
        let idle_since = if asks { Instant::now() } else { started };
        assert_eq!(client.stream.read(&mut [0; 64]).await.unwrap(), 0);
        assert_eq!(idle_since.elapsed(), Duration::from_secs(75));
    }
}

/// A thread learns between two turns of its tasks what has come on its sockets, and in a long turn a connection's time may
/// run out with a request there that nobody has been told of: over a socket, since in memory nothing comes untold.
#[tokio::test(start_paused = true)]
async fn what_came_in_time_is_answered_though_nobody_knows_of_it_yet() {
    let gateway = start();
    assert_eq!(gateway.poll(KEY, "a").await.status, 200);
    let poll = raw::poll("a");
    let (idle, head) = (Duration::from_secs(75), Duration::from_secs(10));
    for (time, drains, begun) in [(idle, false, 0), (GRACE, true, 0), (head, false, 9)] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (first, rest) = poll.split_at(begun);
        client.write_all(first.as_bytes()).unwrap();
        let draining = CancellationToken::new();
        gateway.serve(listener.accept().await.unwrap().0, draining.clone());
        // Once to begin, once to be told of what has come, and once to read it.
        for _ in 0..3 {
            yield_now().await;
        }
        if drains {
            draining.cancel();
        }
        let (ends, mut sender, rest) = (Instant::now() + time, client.try_clone().unwrap(), rest.to_owned());
        let sent = tokio::spawn(async move {
            sleep_until(ends - Duration::from_millis(1)).await;
            sender.write_all(rest.as_bytes()).unwrap();
        });
        yield_now().await;
        advance(time).await;
        sent.await.unwrap();
        client.set_nonblocking(true).unwrap();
        let mut client = raw::Raw::over(TcpStream::from_std(client).unwrap());
        let reply = client.try_reply().await.unwrap().expect("an answer");
        assert!(reply.is(200), "{reply:?}");
    }
}

/// RFC 9112 §2.2: some clients send one behind a request.
#[tokio::test(start_paused = true)]
async fn an_empty_line_behind_a_request_asks_for_nothing() {
    let gateway = start();
    assert_eq!(gateway.poll(KEY, "hit").await.status, 200);
    let head = "POST /api/v1/x?task_id=a HTTP/1.1\r\nhost: gateway\r\ncontent-length: 2";
    let post = format!("{head}\r\nx-api-key: {KEY}\r\n\r\nab");
    for asked in [&raw::poll("hit"), &raw::poll("miss"), &post] {
        for (behind, later) in [("\r\n", false), ("\r\n\r\n", false), ("\r", false), ("\r\n", true)] {
            let mut client = gateway.connect(ROOM, CancellationToken::new());
            if later {
                client.send(asked).await.unwrap();
                sleep(Duration::from_millis(1)).await;
                client.send(behind).await.unwrap();
            } else {
                client.send(format!("{asked}{behind}")).await.unwrap();
            }
            assert!(client.reply().await.is(200));
            sleep(Duration::from_mins(1)).await;
            let next = raw::poll("hit");
            client
                .send(if behind == "\r" { format!("\n{next}") } else { next })
                .await
                .unwrap();
            assert!(client.reply().await.is(200), "{asked:?} {behind:?}");
        }
        // Nor do they win any time.
        let mut client = gateway.connect(ROOM, CancellationToken::new());
        client.send(asked).await.unwrap();
        assert!(client.reply().await.is(200));
        let idle_since = Instant::now();
        for _ in 0..2 {
            sleep(Duration::from_secs(30)).await;
            client.send("\r\n").await.unwrap();
        }
        client.assert_ends().await;
        assert_eq!(idle_since.elapsed(), Duration::from_secs(75));
    }
}

#[tokio::test(start_paused = true)]
async fn a_rested_connection_may_ask_once_more_at_a_stop() {
    let gateway = start();
    for asks in [true, false] {
        let draining = CancellationToken::new();
        let mut client = gateway.connect(ROOM, draining.clone());
        assert!(client.poll("a").await.is(200));
        sleep(REST).await;
        draining.cancel();
        let stopped = Instant::now();
        sleep(GRACE / 2).await;
        if asks {
            let reply = client.poll("a").await;
            assert!(reply.is(200) && reply.says_close(), "{reply:?}");
            client.assert_ends().await;
        } else {
            client.assert_ends().await;
            assert_eq!(stopped.elapsed(), GRACE);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_not_read_yet_is_not_lost() {
    let gateway = start();
    // Holds no whole answer.
    let mut client = gateway.connect(64, CancellationToken::new());
    for _ in 0..2 {
        client.send(raw::poll("a")).await.unwrap();
        sleep(Duration::from_mins(1)).await;
        assert_eq!(client.reply().await.json()["data"]["task_id"], "a");
    }
}

/// What hyper has of a body that nobody wanted must not come back as the next request.
#[tokio::test(start_paused = true)]
async fn an_unread_body_is_no_request() {
    let gateway = start();
    let body = raw::poll("smuggled");
    let head = format!(
        "POST {TASK_INFO} HTTP/1.1\r\nhost: gateway\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let chunk = format!("{:x}\r\n{body}\r\n", body.len());
    let chunked = format!(
        "POST {TASK_INFO} HTTP/1.1\r\nhost: gateway\r\ntransfer-encoding: chunked\r\n\r\n{chunk}{chunk}0\r\n\r\n"
    );
    for request in [head.clone() + &body, chunked] {
        for cut in [0, 1, head.len(), head.len() + 1, request.len() - 1] {
            let mut client = gateway.connect(ROOM, CancellationToken::new());
            let (first, second) = request.split_at(cut);
            client.send(first).await.unwrap();
            sleep(Duration::from_millis(1)).await;
            client.send(second).await.unwrap();
            assert!(client.reply().await.is(405));
            // Whoever is still connected may go on.
            if client.send(raw::poll("next")).await.is_ok()
                && let Ok(Some(reply)) = client.try_reply().await
            {
                assert_eq!(reply.json()["data"]["task_id"], "next", "{request} in two at {cut}");
            }
        }
    }
    assert!(gateway.queries().iter().all(|query| query.task != "smuggled"));
}

/// What comes of `bytes` at a new gateway, behind a poll of `before` on the same connection: the answers' statuses, and the
/// tasks that upstream is asked for.
async fn comes_of(before: Option<&str>, bytes: &str) -> (Vec<String>, Vec<String>) {
    let gateway = start();
    let mut client = gateway.connect(ROOM, CancellationToken::new());
    if let Some(task) = before {
        assert!(client.poll(task).await.is(200));
    }
    let asked = gateway.queries().len();
    client.send(bytes).await.unwrap();
    let end = "GET / HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n";
    // Whatever was refused has closed the connection.
    let _ = client.send(end).await;
    let mut statuses = Vec::new();
    while let Some(reply) = client.try_reply().await.unwrap() {
        statuses.push(reply.head.split(' ').nth(1).unwrap().to_owned());
    }
    let queries = gateway.queries();
    (
        statuses,
        queries[asked..].iter().map(|query| query.task.clone()).collect(),
    )
}

/// A poll is compared with the one before it, and what differs may be as long and no query at all.
#[tokio::test(start_paused = true)]
async fn a_request_is_read_as_it_would_be_had_no_poll_come_before_it() {
    let (head, tail) = raw::poll("\n")
        .split_once('\n')
        .map(|(head, tail)| (head.to_owned(), tail.to_owned()))
        .unwrap();
    let poll = |task: &str| format!("{head}{task}{tail}");
    let hidden = poll("hidden");
    let length = hidden.len();
    let chunked = format!("{length:x}\r\n{hidden}\r\n0\r\n\r\n");
    for (asked, body) in [
        (format!("a HTTP/1.1\r\ncontent-length: {length}\r\nz: q"), &*hidden),
        ("a HTTP/1.1\r\ntransfer-encoding: chunked\r\nz: q".to_owned(), &*chunked),
        (
            "a HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\nz: q".to_owned(),
            &*chunked,
        ),
        ("a HTTP/1.1\r\ncontent-length: +1\r\nz: q".to_owned(), "{"),
        ("a HTTP/1.1\nz: q".to_owned(), ""),
        ("a HTTP/1.1\r\nhost: another\r\nz: q".to_owned(), ""),
        ("a HTTP/1.1\r\nconnection: close\r\nz: q".to_owned(), ""),
        ("a HTTP/1.1\r\nupgrade: websocket\r\nz: q".to_owned(), ""),
        ("a HTTP/1.1\r\nx-api-key: another\r\nz: q".to_owned(), ""),
        ("a HTTP/1.0\r\nz: q".to_owned(), ""),
        ("a b".to_owned(), ""),
        ("a#b".to_owned(), ""),
        // Two polls, as long together as the one before them.
        (format!("a{tail}{head}b"), ""),
    ] {
        let bytes = poll(&asked) + body;
        let alike = "x".repeat(asked.len());
        assert_eq!(poll(&alike).len(), poll(&asked).len());
        assert_eq!(
            comes_of(Some(&alike), &bytes).await,
            comes_of(None, &bytes).await,
            "{bytes}"
        );
    }
}
