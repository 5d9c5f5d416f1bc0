//! Where the process can have no thread more, a start ends in words; and what is under way goes on when it can again.
//!
//! tokio panics then: where work is given to a thread of its own, and where a name is looked up.

use crate::harness::collector::{Collector, Takes};
use crate::harness::process::{config_file, ended, with_threads};
use crate::harness::store::Store;
use crate::harness::{Gateway, Simulator, poll};

const PANICS: &str = "crun_gateway_panics_total";

#[tokio::test]
async fn a_start_that_cannot_have_its_threads_says_so_and_ends() {
    let config = config_file("listen: \"127.0.0.1:0\"\nadmin: \"127.0.0.1:0\"\nworker_threads: 2\n");
    for (threads, missing) in [
        (1, "2 worker threads: "),
        (2, "2 worker threads: "),
        (3, "admin thread: "),
    ] {
        let mut command = with_threads(threads);
        command.arg("--config").arg(config.path());
        let ended = ended(command).await;
        assert_eq!(ended.code, 1, "{threads}: {}", ended.stderr);
        let missing = format!("crun-gateway: {missing}");
        let said = ended.stderr.lines().find(|line| line.starts_with(&missing));
        let is_why = said.is_some_and(|line| line.contains("Resource temporarily unavailable"));
        assert!(is_why, "{threads}: {}", ended.stderr);
    }
}

#[tokio::test]
async fn a_changed_configuration_is_taken_over_after_a_moment_without_threads_and_each_panic_is_counted_once() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start_without_threads(&upstream.url, "log: { format: json }").await;
    for times in [1, 2] {
        gateway.signal(nix::sys::signal::SIGHUP);
        gateway.logged("panicked", times).await;
    }
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    gateway.allow_threads().await;
    gateway.reconfigure("log: { format: json }\nbudget: { limit: 7 }");
    let log = gateway.logged("the changed configuration is taken over", 1).await;
    let panics: Vec<_> = log.lines().filter(|line| line.contains("\"panicked\"")).collect();
    assert_eq!(
        gateway.metric(PANICS).await.to_string(),
        panics.len().to_string(),
        "{log}"
    );
    for panic in panics {
        assert_eq!(panic.matches("\"message\":").count(), 1, "{panic}");
        let line: serde_json::Value = serde_json::from_str(panic).unwrap();
        let error = line["error"].as_str().unwrap();
        assert!(error.contains("can't spawn worker thread"), "{panic}");
    }
}

#[tokio::test]
async fn a_stop_without_threads_is_one_like_any_other() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let mut gateway = Gateway::start_without_threads(&upstream.url, "").await;
    gateway.terminate();
    assert!(gateway.exit().await.success());
    gateway.logged(" stopped", 1).await;
}

#[tokio::test]
async fn spans_of_a_moment_without_threads_are_told_when_it_is_over() {
    let collector = Collector::start(Takes::Everything);
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    // Its name has to be looked up.
    let port = collector.address.port();
    let config = format!("otlp: {{ endpoint: \"http://localhost:{port}\", sample_ratio: 1.0 }}");
    let gateway = Gateway::start_without_threads(&upstream.url, &config).await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    gateway
        .logged("the collector (otlp.endpoint) does not take spans", 1)
        .await;
    assert!(gateway.metric(PANICS).await > 0.5);
    gateway.allow_threads().await;
    let is_poll = |name: &str| name.starts_with("GET ");
    collector
        .until("poll", |spans| spans.iter().any(|span| is_poll(&span.name)))
        .await;
}

#[tokio::test]
async fn a_shared_store_is_found_after_a_moment_without_threads_which_fills_no_log() {
    let store = Store::start().await;
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let url = format!("redis://localhost:{}", store.address.port());
    let config = format!("shared: {{ max_replicas: 2, url: \"{url}\" }}");
    let gateway = Gateway::start_without_threads(&upstream.url, &config).await;
    let unanswered = "crun_gateway_shared_calls_total{result=\"no_reply\"}";
    gateway.reaches(unanswered, 10).await;
    // One for each call, of which there are at most four a second, and a few for answers and the configuration.
    let (panics, calls) = (gateway.metric(PANICS).await, gateway.metric(unanswered).await);
    assert!(panics > 9.5 && panics < 2.0 * calls + 10.0, "{panics} of {calls} calls");
    gateway.allow_threads().await;
    gateway
        .reaches("crun_gateway_shared_standing{standing=\"lending\"}", 1)
        .await;
    gateway.reaches("crun_gateway_shared_cache_up", 1).await;
}
