//! A restart under load: upstream's second is not spent twice, however the old process ends.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::harness::client::{poll_request, try_request};
use crate::harness::{Gateway, KEY, PATIENCE, Simulator};

/// More than the budget of a second, and no more than is served within any deadline.
const CLIENTS: usize = 40;

/// One client that goes on asking for new tasks, also while nobody listens.
async fn poll_for_ever(address: SocketAddr, client: usize) {
    for task in 0.. {
        let task = format!("ended.{client}-{task}");
        match try_request(address, poll_request(KEY, &task)).await {
            Ok(reply) => {
                assert_eq!(reply.status, 200, "{reply:?}");
                assert_eq!(reply.json()["data"]["task_id"], task, "nothing wrong is served");
            }
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Waits until upstream has been asked more than `queries` times; gives how often, and when for the last time.
async fn asked_more_than(upstream: &Simulator, queries: u64) -> (u64, u64) {
    let patience = Instant::now() + PATIENCE;
    loop {
        let stats = upstream.stats().await;
        let (asked, last) = (&stats["requests"], &stats["last_arrival_unix_ns"]);
        if let (Some(asked @ 1..), Some(last)) = (asked.as_u64(), last.as_u64())
            && asked > queries
        {
            return (asked, last);
        }
        assert!(Instant::now() < patience, "{stats}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Restarts a gateway at work, on its own address.
async fn restart_under_load(is_killed: bool) {
    let upstream = Simulator::start(&["--latency", "50ms"]).await;
    let mut old = Gateway::start(&upstream.url, "").await;
    let address = old.address;
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        clients.spawn(poll_for_ever(address, client));
    }
    asked_more_than(&upstream, 30).await;
    if is_killed {
        old.kill().await;
    } else {
        old.terminate();
        assert_eq!(old.exit().await.code(), Some(0));
    }
    let new = Gateway::start(&upstream.url, &format!("listen: \"{address}\"")).await;
    assert_eq!(new.address, address);
    // Read only now: the old one's last query may have been on its way when that was killed.
    let (before, last) = asked_more_than(&upstream, 0).await;
    // The new one has spent nothing in its first second and a margin: without that, some 50 ms are all there is between.
    let (mut asked, first) = asked_more_than(&upstream, before).await;
    let gap = Duration::from_nanos(first - last);
    assert!(gap >= Duration::from_secs(1), "{gap:?}");
    while asked < before + 30 {
        (asked, _) = asked_more_than(&upstream, asked).await;
    }
    clients.abort_all();
    while let Some(client) = clients.join_next().await {
        assert!(client.unwrap_err().is_cancelled(), "every answer was a good one");
    }
    let stats = upstream.stats().await;
    assert_eq!(stats["violations"], 0, "{stats}");
    assert!(stats["highest_in_any_second"].as_u64().unwrap() <= 15, "{stats}");
}

#[tokio::test]
async fn a_gateway_that_drains_and_the_next_one_spend_no_second_twice() {
    restart_under_load(false).await;
}

#[tokio::test]
async fn a_gateway_that_is_killed_and_the_next_one_spend_no_second_twice() {
    restart_under_load(true).await;
}
