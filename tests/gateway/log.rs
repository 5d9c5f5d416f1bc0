//! The log holds up nobody, and loses nothing that it need not.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::harness::process::Reader;
use crate::harness::raw::keep_hitting;
use crate::harness::{Gateway, PATIENCE, Simulator, poll};

const DROPPED: &str = "crun_gateway_log_lines_dropped_total";
const TALKATIVE: &str = "log: { level: debug }";

/// Polls on some connections, all of which have to be answered, until lines are dropped.
async fn poll_until_lines_are_dropped(gateway: &Gateway) {
    let mut clients = keep_hitting(gateway.address);
    let dropped = async {
        while gateway.metric(DROPPED).await < 1000.0 {
            if let Some(ended) = clients.try_join_next() {
                ended.unwrap();
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, dropped).await.expect("polls go on being answered");
}

#[tokio::test]
async fn each_query_is_a_line_at_info_and_no_poll_is() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "log: { level: info }").await;
    for task in ["ended.a", "ended.a", "ended.b"] {
        assert_eq!(poll(gateway.address, task).await.status, 200);
    }
    let log = gateway.logged("upstream asked", 2).await;
    let told = |task: &str| log.lines().filter(|line| line.contains(task)).count();
    assert_eq!((told("ended.a"), told("ended.b")), (1, 1), "{log}");
}

#[tokio::test]
async fn a_log_that_nobody_reads_holds_up_no_request_and_what_it_loses_is_counted() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, TALKATIVE).await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    assert_eq!(gateway.metric(DROPPED).await.to_string(), "0");
    gateway.reader(Reader::Pauses);
    poll_until_lines_are_dropped(&gateway).await;
    assert_eq!(poll(gateway.address, "ended.b").await.status, 200);
    assert!(!gateway.log().contains("ended.b"));

    gateway.reader(Reader::Reads);
    let last = async {
        while !gateway.log().contains("ended.last") {
            assert_eq!(poll(gateway.address, "ended.last").await.status, 200);
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, last)
        .await
        .expect("it goes on where it is read again");
    gateway.terminate();
    assert!(gateway.exit().await.success());
}

#[tokio::test]
async fn a_log_that_nobody_reads_does_not_hold_up_a_stop() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let read = Gateway::start(&upstream.url, TALKATIVE).await;
    // As where both go into one pipe.
    let stuck = Gateway::start_with_full_stdout(&upstream.url, TALKATIVE).await;
    for mut gateway in [read, stuck] {
        gateway.reader(Reader::Pauses);
        poll_until_lines_are_dropped(&gateway).await;
        gateway.terminate();
        assert!(gateway.exit().await.success());
    }
}

#[tokio::test]
async fn what_is_logged_just_before_the_end_is_not_lost() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    for _ in 0..5 {
        let mut gateway = Gateway::start(&upstream.url, "drain: \"2s\"\nbudget: { max_wait: \"1s\" }").await;
        gateway.terminate();
        // The second one ends it at once.
        gateway.terminate();
        assert!(gateway.exit().await.success());
        gateway.logged(" stopped", 1).await;
    }
}

#[tokio::test]
async fn lines_that_cannot_be_written_are_counted() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start(&upstream.url, TALKATIVE).await;
    gateway.reader(Reader::Leaves);
    let counted = async {
        while gateway.metric(DROPPED).await < 1.0 {
            assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
        }
    };
    timeout(PATIENCE, counted)
        .await
        .expect("what is written to nobody is counted");
    gateway.terminate();
    assert!(gateway.exit().await.success());
}
