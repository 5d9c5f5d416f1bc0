//! A flight for everybody who asks the same, whatever becomes of any one of them.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::harness::client::{poll_request, try_request};
use crate::harness::paused::{Behaviour, Paused};
use crate::harness::process::PATIENCE;
use crate::harness::{Gateway, KEY, Raw, Reply, Simulator, poll, raw, scripted};

/// Polls `task` from `clients` clients at once.
async fn poll_at_once(gateway: &Gateway, task: &'static str, clients: usize) -> Vec<Reply> {
    let address = gateway.address;
    let mut polls = JoinSet::new();
    for _ in 0..clients {
        polls.spawn(async move { poll(address, task).await });
    }
    timeout(PATIENCE, polls.join_all())
        .await
        .expect("everybody is answered")
}

#[track_caller]
fn assert_all_the_same(replies: &[Reply], status: &str) {
    for reply in replies {
        assert_eq!(reply.status, 200);
        assert_eq!(reply.body, replies[0].body);
        assert_eq!(reply.json()["data"]["status"], status);
        reply.assert_is_signed();
    }
}

#[tokio::test]
async fn a_thousand_polls_of_an_ended_task_make_one_upstream_call() {
    let upstream = Simulator::start(&["--latency", "50ms"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let address = gateway.address;
    let mut clients = JoinSet::new();
    for _ in 0..50 {
        clients.spawn(async move {
            let mut replies = Vec::new();
            for _ in 0..20 {
                replies.push(poll(address, "ended.a").await);
            }
            replies
        });
    }
    let replies = timeout(PATIENCE, clients.join_all()).await.unwrap().concat_all();
    assert_eq!(replies.len(), 1000);
    assert_all_the_same(&replies, "success");
    assert_eq!(upstream.queries().await, 1);
    let saved = |how| format!("crun_gateway_upstream_calls_saved_total{{account=\"other\",how=\"{how}\"}}");
    let saved = gateway.metric(&saved("hit")).await + gateway.metric(&saved("collapsed")).await;
    assert!((saved - 999.0).abs() < f64::EPSILON, "{saved}");
}

trait ConcatAll {
    fn concat_all(self) -> Vec<Reply>;
}

impl ConcatAll for Vec<Vec<Reply>> {
    fn concat_all(self) -> Vec<Reply> {
        self.into_iter().flatten().collect()
    }
}

#[tokio::test]
async fn five_hundred_concurrent_polls_make_one_upstream_call() {
    let upstream = Simulator::start(&["--latency", "1s"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let replies = poll_at_once(&gateway, "ended.a", 500).await;
    assert_all_the_same(&replies, "success");
    assert_eq!(upstream.queries().await, 1);
    let own = replies
        .iter()
        .filter(|reply| !reply.header("cache-status").unwrap().contains("collapsed"))
        .count();
    assert_eq!(own, 1, "one led, the others followed");
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_concurrent_polls_make_one_upstream_call_and_nobody_waits_longer_than_it_takes() {
    let latency = Duration::from_secs(1);
    let gateway = Arc::new(Paused::start(
        Behaviour {
            latency,
            ..Behaviour::default()
        },
        |_| {},
    ));
    let mut polls = JoinSet::new();
    for _ in 0..10_000 {
        let gateway = Arc::clone(&gateway);
        polls.spawn(async move { (gateway.poll(KEY, "a").await, Instant::now()) });
    }
    let replies = polls.join_all().await;
    let queries = gateway.queries();
    assert_eq!(queries.len(), 1);
    let landed = queries[0].at + latency;
    for (reply, at) in replies {
        assert_eq!(reply.status, 200, "{reply:?}");
        assert!(at - landed < Duration::from_secs(1), "{:?}", at - landed);
    }
}

/// The same over as many connections as there are polls; how soon they are answered, `benches/growth` tells.
#[tokio::test]
async fn ten_thousand_polls_over_as_many_connections_make_one_upstream_call() {
    const POLLS: usize = 10_000;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", upstream.local_addr().unwrap());
    let config = format!(
        "upstream: {{ url: \"{url}\", timeout: 60s }}\nbudget: {{ max_wait: 60s, max_queue: {POLLS} }}\n\
         limits: {{ requests: 12000, connections: 12000, request_timeout: 120s }}"
    );
    let gateway = Gateway::start(&url, &config).await;
    let mut clients = Vec::new();
    for _ in 0..POLLS {
        let mut client = Raw::connect(gateway.address).await;
        client.send(raw::poll("a")).await.unwrap();
        clients.push(client);
    }
    let (stream, _) = timeout(PATIENCE, upstream.accept()).await.unwrap().unwrap();
    let mut upstream_connection = Raw::over(stream);
    assert!(upstream_connection.head().await.is_some());
    gateway.shows("crun_gateway_requests_in_flight", POLLS as f64).await;
    // Nobody is to be served from what is kept: upstream would be asked for it again.
    let body = br#"{"code":200,"message":"success","data":{"task_id":"a","status":"running","result":null}}"#;
    let answer = scripted::response("200 OK", "Content-Type: application/json\r\n", body);
    upstream_connection.send(answer).await.unwrap();
    let mut collapsed = 0;
    for client in &mut clients {
        let reply = client.reply().await;
        assert!(reply.is(200) && reply.body == body, "{reply:?}");
        collapsed += usize::from(reply.header("cache-status").unwrap().contains("collapsed"));
    }
    assert_eq!(collapsed, POLLS - 1, "one led, the others followed");
    let queries = "crun_gateway_upstream_requests_total{account=\"other\",outcome=\"live\"}";
    assert!((gateway.metric(queries).await - 1.0).abs() < f64::EPSILON);
    let more = timeout(Duration::from_millis(1), upstream_connection.head()).await;
    assert!(more.is_err(), "nothing more is asked on its connection");
}

#[tokio::test]
async fn a_running_task_that_upstream_says_not_to_store_makes_one_upstream_call_all_the_same() {
    let upstream = Simulator::start(&["--latency", "1s"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let replies = poll_at_once(&gateway, "no-store.a", 500).await;
    assert_all_the_same(&replies, "running");
    assert_eq!(upstream.queries().await, 1);
}

async fn the_first_leaves(task: &'static str, status: &str) {
    let upstream = Simulator::start(&["--latency", "3s"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let address = gateway.address;
    let first = tokio::spawn(async move { try_request(address, poll_request(KEY, task)).await });
    upstream.asked(1).await;
    let others = tokio::spawn(async move {
        let mut polls = JoinSet::new();
        for _ in 0..499 {
            polls.spawn(async move { poll(address, task).await });
        }
        polls.join_all().await
    });
    // Its connection is closed while its query is on the way, and all the others wait.
    gateway.reaches("crun_gateway_requests_in_flight", 500).await;
    first.abort();
    let replies = timeout(PATIENCE, others).await.unwrap().unwrap();
    assert_eq!(replies.len(), 499);
    assert_all_the_same(&replies, status);
    for reply in &replies {
        let cache_status = reply.header("cache-status").unwrap();
        assert!(
            cache_status.contains("; collapsed"),
            "the one that left had led: {cache_status}"
        );
    }
    assert_eq!(upstream.queries().await, 1);
}

#[tokio::test]
async fn the_first_client_may_leave() {
    the_first_leaves("ended.a", "success").await;
}

#[tokio::test]
async fn the_first_client_may_leave_a_running_task() {
    the_first_leaves("no-store.a", "running").await;
}

#[tokio::test]
async fn a_live_answer_is_asked_for_again_after_the_floor_and_not_before() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "cache: { fresh: { floor: \"1h\", ceiling: \"2h\" } }").await;
    assert_eq!(
        poll(gateway.address, "running.a").await.header("cache-status").unwrap(),
        { "crun-gateway; fwd=uri-miss; fwd-status=200; stored; ttl=3600" }
    );
    let again = poll(gateway.address, "running.a").await;
    assert!(
        again
            .header("cache-status")
            .unwrap()
            .starts_with("crun-gateway; hit; ttl=3"),
        "{again:?}"
    );
    assert_eq!(upstream.queries().await, 1);
}
