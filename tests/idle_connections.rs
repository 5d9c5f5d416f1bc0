//! What a client's connection keeps of the heap, counted to the byte: `deploy/` reckons with 24 KiB. A binary of its own:
//! the allocator counts for all threads, so nothing else may run beside it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall fail")]

use std::alloc::System;
use std::future::pending;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use crun_gateway::config::Config;
use crun_gateway::dial::Dial;
use crun_gateway::gateway::Gateway;
use crun_gateway::metrics::Metrics;
use crun_gateway::server::serve_connection;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::time::{pause, sleep};
use tokio_util::sync::CancellationToken;

#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const CONNECTIONS: usize = 200;
const KIB: usize = 1 << 10;
/// What a connection holds on its way.
const ROOM: usize = 128;

/// A plain poll.
const POLL: &[u8] = b"GET /api/v1/client/job/TaskInfo?task_id=a HTTP/1.1\r\nhost: gateway\r\nx-api-key: ak_key\r\n\r\n";

fn allocated() -> usize {
    let stats = HEAP.stats();
    stats.bytes_allocated - stats.bytes_deallocated
}

/// Asks; the answer is more than the connection holds.
async fn ask(connection: &mut DuplexStream) {
    connection
        .write_all(b"GET /api/v1/client/job/TaskInfo?task_id=a HTTP/1.1\r\nhost: gateway\r\n\r\n")
        .await
        .unwrap();
    sleep(Duration::from_millis(1)).await;
}

/// Reads the whole answer.
async fn read(connection: &mut DuplexStream, status: u16) {
    let mut answer = Vec::new();
    while !answer.ends_with(b"null}") {
        assert!(connection.read_buf(&mut answer).await.unwrap() > 0);
    }
    let begins = format!("HTTP/1.1 {status} ");
    assert!(answer.starts_with(begins.as_bytes()));
    sleep(Duration::from_millis(1)).await;
}

#[tokio::test]
async fn a_connection_keeps_little_while_it_is_served_and_next_to_nothing_while_it_rests() {
    pause();
    let config = Config::default();
    let dial: Dial = Arc::new(|| Box::pin(pending()));
    let gateway = Gateway::new(config.clone(), dial, Arc::new(Metrics::new().unwrap())).unwrap();
    let open = || {
        let (near, far) = duplex(ROOM);
        let (gateway, limits) = (Arc::clone(&gateway), config.limits.clone());
        let peer = IpAddr::V4(Ipv4Addr::LOCALHOST);
        tokio::spawn(async move { serve_connection(far, peer, gateway, &limits, CancellationToken::new()).await });
        near
    };
    // What the first one brings about is none of the others'.
    let mut first = open();
    ask(&mut first).await;
    read(&mut first, 401).await;
    drop(first);
    sleep(Duration::from_millis(1)).await;

    let none = allocated();
    let each = |now: usize| (now - none) / CONNECTIONS;
    let mut connections: Vec<_> = (0..CONNECTIONS).map(|_| open()).collect();
    sleep(Duration::from_millis(1)).await;
    let unused = each(allocated());
    let (mut served, mut resting) = ([0; 2], [0; 2]);
    for round in 0..2 {
        for connection in &mut connections {
            ask(connection).await;
        }
        served[round] = each(allocated());
        for connection in &mut connections {
            // It names no key.
            read(connection, 401).await;
        }
        resting[round] = each(allocated());
    }

    // Upstream's connection never opens.
    for connection in &mut connections {
        connection.write_all(POLL).await.unwrap();
    }
    sleep(Duration::from_millis(1)).await;
    let waiting = each(allocated());
    let in_flight = gateway.metrics().requests_in_flight.get();
    assert_eq!(usize::try_from(in_flight).unwrap(), CONNECTIONS, "all wait");
    for connection in &mut connections {
        read(connection, 503).await;
    }
    let long = String::from_utf8_lossy(POLL).replacen("host", &format!("x-long: {}\r\nhost", "x".repeat(16 << 10)), 1);
    for connection in &mut connections {
        connection.write_all(long.as_bytes()).await.unwrap();
    }
    for connection in &mut connections {
        read(connection, 503).await;
    }
    let behind_long = each(allocated());

    let said = format!(
        "bytes: {unused} unused, {served:?} served, {resting:?} resting, {waiting} waiting, {behind_long} behind a long head"
    );
    assert!(waiting < 8 * KIB && behind_long < 3 * KIB, "{said}");
    for (served, resting) in served.into_iter().zip(resting) {
        assert!(unused < 3 * KIB && resting < 3 * KIB && served < 24 * KIB, "{said}");
        assert!(served > 4 * resting, "{said}");
    }
}
