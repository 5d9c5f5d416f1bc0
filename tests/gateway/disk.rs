//! Ended tasks outlive the process: a restart asks upstream for none of them again; and no disk, whatever is wrong with
//! it, is in anybody's way.

use std::net::SocketAddr;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, HOUR};
use crate::harness::client::poll_request;
use crate::harness::paused::{self, Behaviour, Paused};
use crate::harness::{Gateway, KEY, PATIENCE, Reply, Simulator, poll, poll_as, raw, until};

const OTHER_KEY: &str = "ak_test_0000000000000000000000000002";

/// Where a test's answers are.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("answers")
    }

    /// Configuration that keeps ended tasks there, with `more` fields of `cache`.
    fn config(&self, more: &str) -> String {
        format!("cache: {{ disk: \"{}\", {more} }}", self.path().display())
    }
}

/// Upstream that answers at once, whatever the pace.
async fn quick_upstream() -> Simulator {
    Simulator::start(&["--limit", "1000000", "--latency", "1ms"]).await
}

/// A pace that fills a disk within a test's time.
const QUICK: &str = "budget: { limit: 100000 }\n";

/// Polls tasks in turn on a few connections, and checks each answer.
async fn poll_all(address: SocketAddr, tasks: Range<u32>, check: fn(&Reply)) {
    // As many as are read at once: nobody waits for another one's reading.
    const CONNECTIONS: u32 = 4;
    let mut polls = JoinSet::new();
    for first in tasks.start..tasks.end.min(tasks.start + CONNECTIONS) {
        let own = (first..tasks.end).step_by(CONNECTIONS as usize);
        polls.spawn(async move {
            let stream = TcpStream::connect(address).await.unwrap();
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            for task in own {
                let id = format!("ended.{task}");
                let request: http::Request<Full<Bytes>> = poll_request(KEY, &id);
                let Ok(answer) = sender.send_request(request).await else {
                    return;
                };
                let (head, body) = answer.into_parts();
                let Ok(body) = body.collect().await else { return };
                let reply = Reply {
                    status: head.status,
                    headers: head.headers,
                    body: body.to_bytes(),
                };
                assert_eq!(
                    (reply.status.as_u16(), &reply.json()["data"]["task_id"]),
                    (200, &id.into())
                );
                check(&reply);
            }
        });
    }
    while let Some(done) = polls.join_next().await {
        done.unwrap();
    }
}

const UP: &str = "crun_gateway_disk_up";
const ENTRIES: &str = "crun_gateway_disk_entries";
const WRITES: &str = "crun_gateway_disk_writes_total";
const HITS: &str = r#"crun_gateway_disk_reads_total{result="hit"}"#;
const EVICTED: &str = r#"crun_gateway_disk_evictions_total{cause="size"}"#;
const EXPIRED: &str = r#"crun_gateway_disk_evictions_total{cause="age"}"#;
const NOT_OPENED: &str = r#"crun_gateway_disk_errors_total{operation="open"}"#;
const NOT_WRITTEN: &str = r#"crun_gateway_disk_errors_total{operation="write"}"#;

/// The value of a series that counts things.
async fn count(gateway: &Gateway, series: &str) -> u32 {
    gateway.metric(series).await.to_string().parse().unwrap()
}

/// Has so many ended tasks fetched, and waits until they are on disk.
async fn fill(gateway: &Gateway, tasks: u32) {
    const AT_ONCE: u32 = 500;
    for first in (0..tasks).step_by(AT_ONCE as usize) {
        let next = tasks.min(first + AT_ONCE);
        poll_all(gateway.address, first..next, |_| {}).await;
        gateway.reaches(ENTRIES, next).await;
    }
}

async fn stop(mut gateway: Gateway) {
    gateway.terminate();
    assert_eq!(gateway.exit().await.code(), Some(0));
}

#[track_caller]
fn assert_is_hit(reply: &Reply) {
    assert_eq!(reply.status, 200, "{reply:?}");
    let status = reply.header("cache-status").unwrap();
    assert!(status.starts_with("crun-gateway; hit; ttl="), "{status}");
}

/// What is left of the lifetime, and the age.
fn ttl_and_age(reply: &Reply) -> (u64, u64) {
    assert_is_hit(reply);
    let status = reply.header("cache-status").unwrap();
    let ttl = status.rsplit_once('=').unwrap().1.parse().unwrap();
    (ttl, reply.header("age").unwrap().parse().unwrap())
}

/// Has a gateway keep so many ended tasks, and stops it; gives how often upstream was asked.
async fn filled(upstream: &Simulator, config: &str, tasks: u32) -> u64 {
    let gateway = Gateway::start(&upstream.url, config).await;
    fill(&gateway, tasks).await;
    stop(gateway).await;
    upstream.queries().await
}

#[tokio::test]
async fn a_cold_restart_asks_upstream_for_none_of_ten_thousand_ended_tasks() {
    const TASKS: u32 = 10_000;
    let (upstream, place) = (quick_upstream().await, Place::new());
    let config = QUICK.to_owned() + &place.config("");
    let asked = filled(&upstream, &config, TASKS).await;
    let gateway = Gateway::start(&upstream.url, &config).await;
    poll_all(gateway.address, 0..TASKS, assert_is_hit).await;
    assert_eq!(upstream.queries().await, asked);
    let reads = count(&gateway, HITS).await;
    assert_eq!((reads, count(&gateway, "crun_gateway_panics_total").await), (TASKS, 0));
    // And from then on from memory.
    poll_all(gateway.address, 0..100, assert_is_hit).await;
    assert_eq!(count(&gateway, HITS).await, reads);
}

#[tokio::test]
async fn a_stop_writes_what_has_just_ended() {
    // Answered when the stop waits for nothing else any more, and ends at once.
    let (upstream, place) = (Simulator::start(&["--latency", "2500ms"]).await, Place::new());
    let gateway = Gateway::start(&upstream.url, &place.config("")).await;
    let address = gateway.address;
    let first = tokio::spawn(async move { poll(address, "ended.just-now").await });
    gateway.reaches("crun_gateway_requests_in_flight", 1).await;
    stop(gateway).await;
    let first = first.await.unwrap();
    assert_eq!(first.status, 200, "{first:?}");
    let gateway = Gateway::start(&upstream.url, &place.config("")).await;
    let second = poll(gateway.address, "ended.just-now").await;
    assert_is_hit(&second);
    assert_eq!((second.body, upstream.queries().await), (first.body, 1));
}

#[tokio::test]
async fn a_kill_in_the_middle_of_writing_loses_no_more_than_what_was_on_its_way() {
    const TASKS: u32 = 1500;
    let (upstream, place) = (quick_upstream().await, Place::new());
    let config = QUICK.to_owned() + &place.config("");
    let mut kept = 0;
    let written = [1, 100, 300, 700];
    for (round, written) in (0..).zip(written) {
        let gateway = Gateway::start(&upstream.url, &config).await;
        gateway.reaches(UP, 1).await;
        let found = count(&gateway, ENTRIES).await;
        assert!(found >= kept, "{found} of {kept}");
        let tasks = round * TASKS..(round + 1) * TASKS;
        let filling = tokio::spawn(poll_all(gateway.address, tasks, |_| {}));
        gateway.reaches(WRITES, written).await;
        kept = count(&gateway, ENTRIES).await;
        gateway.kill().await;
        filling.await.unwrap();
    }
    let gateway = Gateway::start(&upstream.url, &config).await;
    gateway.reaches(UP, 1).await;
    let found = count(&gateway, ENTRIES).await;
    assert!(found >= kept, "{found} of {kept}");
    poll_all(gateway.address, 0..TASKS * 4, |_| {}).await;
    assert_eq!(count(&gateway, HITS).await, found);
    let log = gateway.log();
    assert!(!log.contains("corrupt") && !log.contains("panicked"), "{log}");
}

#[tokio::test]
async fn a_moment_without_threads_costs_nothing_of_what_is_kept() {
    const TASKS: u32 = 20;
    let (upstream, place) = (quick_upstream().await, Place::new());
    let config = QUICK.to_owned() + &place.config("");
    let asked = filled(&upstream, &config, TASKS).await;
    let gateway = Gateway::start_without_threads(&upstream.url, &config).await;
    gateway.reaches(NOT_OPENED, 1).await;
    gateway.allow_threads().await;
    gateway.reaches(UP, 1).await;
    poll_all(gateway.address, 0..TASKS, assert_is_hit).await;
    assert_eq!(upstream.queries().await, asked);
    let log = gateway.log();
    assert!(
        log.contains("no thread can be had") && !log.contains("corrupt"),
        "{log}"
    );
}

#[tokio::test(start_paused = true)]
async fn what_memory_has_no_room_for_is_a_hit_from_disk_and_held_until_its_clients_have_it() {
    const LARGE: usize = 60 << 10;
    let place = Place::new();
    let behaviour = Behaviour {
        answer: |_, task| {
            paused::json(&serde_json::json!({
                "code": 200, "message": "x".repeat(LARGE), "data": { "task_id": task, "status": "failed" },
            }))
        },
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |config| {
        config.upstream.max_body = 64 << 10;
        config.limits.body_bytes = 128 << 10;
        config.cache.max_bytes = 100 << 10;
        config.cache.disk = Some(place.path());
    });
    let patience = Instant::now() + PATIENCE;
    while gateway.metric(UP) < 0.5 {
        assert!(Instant::now() < patience, "no disk");
        sleep(Duration::from_millis(10)).await;
    }
    for number in 0..4 {
        let reply = gateway.poll(KEY, &format!("large{number}")).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        assert!(!reply.header("cache-status").unwrap().contains("stored"), "{reply:?}");
    }
    let patience = Instant::now() + PATIENCE;
    while gateway.metric(ENTRIES) < 3.5 {
        assert!(Instant::now() < patience, "not written");
        sleep(Duration::from_millis(10)).await;
    }
    let mut deaf = Vec::new();
    for number in 0..4 {
        let mut client = gateway.connect(1024, CancellationToken::new());
        client.send(raw::poll(&format!("large{number}"))).await.unwrap();
        deaf.push(client);
    }
    // Longer than an answer waits for room.
    sleep(Duration::from_secs(1)).await;
    let mut hits = 0;
    for client in &mut deaf {
        let reply = client.reply().await;
        hits += usize::from(
            reply
                .header("cache-status")
                .is_some_and(|status| status.contains("; hit;")),
        );
        assert!(
            reply.is(200) || reply.is(503) && reply.header("retry-after").is_some(),
            "{}",
            reply.head
        );
    }
    assert_eq!((hits, gateway.queries().len()), (1, 4));
}

#[tokio::test]
async fn age_and_lifetime_go_on_where_they_were() {
    let (upstream, place) = (quick_upstream().await, Place::new());
    let gateway = Gateway::start(&upstream.url, &place.config("")).await;
    let fetched = poll(gateway.address, "ended.song").await;
    let (mut ttl, mut age) = (0, 0);
    let ages = async || {
        (ttl, age) = ttl_and_age(&poll(gateway.address, "ended.song").await);
        age >= 2
    };
    until("it is 2 s old", ages).await;
    stop(gateway).await;
    let gateway = Gateway::start(&upstream.url, &place.config("")).await;
    for _ in ["from disk", "from memory"] {
        let again = poll(gateway.address, "ended.song").await;
        let (ttl_now, age_now) = ttl_and_age(&again);
        assert!(age_now >= age && age_now < age + 60, "{age} {age_now}");
        assert!(
            (ttl_now + age_now).abs_diff(ttl + age) <= 1,
            "{ttl} {age} {ttl_now} {age_now}"
        );
        again.assert_is_signed();
        assert_eq!(again.header("content-type"), fetched.header("content-type"));
        assert_eq!(again.body, fetched.body);
    }
    assert_eq!(upstream.queries().await, 1);
}

#[tokio::test]
async fn what_is_on_disk_is_served_while_upstream_is_away() {
    let (upstream, place) = (quick_upstream().await, Place::new());
    let config = place.config("") + "\nbudget: { max_wait: \"3s\" }";
    let gateway = Gateway::start(&upstream.url, &config).await;
    poll(gateway.address, "ended.song").await;
    stop(gateway).await;
    let url = upstream.url.clone();
    let _port = upstream.gone().await;
    let gateway = Gateway::start(&url, &config).await;
    for task in 0..6 {
        assert_ne!(poll(gateway.address, &format!("ended.other-{task}")).await.status, 200);
    }
    gateway.reaches("crun_gateway_upstream_breaker_open", 1).await;
    assert_is_hit(&poll(gateway.address, "ended.song").await);
}

#[tokio::test]
async fn polls_of_one_task_share_one_reading() {
    let (upstream, place) = (quick_upstream().await, Place::new());
    let gateway = Gateway::start(&upstream.url, &place.config("")).await;
    poll(gateway.address, "ended.song").await;
    stop(gateway).await;
    let gateway = Gateway::start(&upstream.url, &place.config("")).await;
    let address = gateway.address;
    let mut polls = JoinSet::new();
    for _ in 0..100 {
        polls.spawn(async move { assert_is_hit(&poll(address, "ended.song").await) });
    }
    while let Some(done) = polls.join_next().await {
        done.unwrap();
    }
    assert_eq!(count(&gateway, HITS).await, 1);
    assert_eq!(upstream.queries().await, 1);
}

#[tokio::test]
async fn no_account_gets_what_another_had_kept() {
    let (upstream, place) = (quick_upstream().await, Place::new());
    let music = |key: &str, name: &str| {
        format!(
            "accounts: [{{ name: {name}, keys: [{{ env: {key} }}] }}]\n{}",
            place.config("")
        )
    };
    let env = [("ONE", KEY), ("OTHER", OTHER_KEY)];
    let gateway = Gateway::start_with_env(&upstream.url, &music("ONE", "music"), &env).await;
    poll(gateway.address, "ended.song").await;
    stop(gateway).await;
    assert_eq!(upstream.queries().await, 1);
    // Another account under that name; the key's own account under another; the key as an account of its own.
    for (listed, name, key) in [
        ("OTHER", "music", OTHER_KEY),
        ("ONE", "video", KEY),
        ("OTHER", "film", KEY),
    ] {
        let before = upstream.queries().await;
        let gateway = Gateway::start_with_env(&upstream.url, &music(listed, name), &env).await;
        gateway.reaches(UP, 1).await;
        let reply = poll_as(gateway.address, key, "ended.song").await;
        let status = reply.header("cache-status").unwrap();
        assert!(status.contains("fwd=uri-miss"), "{listed} {name}: {status}");
        assert_eq!(upstream.queries().await, before + 1);
        // Nothing of it is kept: each has the first one's file before it.
        gateway.kill().await;
    }
    let before = upstream.queries().await;
    let gateway = Gateway::start_with_env(&upstream.url, &music("ONE", "music"), &env).await;
    assert_is_hit(&poll(gateway.address, "ended.song").await);
    assert_eq!(upstream.queries().await, before);
}

#[tokio::test]
async fn what_is_older_than_it_may_be_is_not_served_and_goes() {
    let (upstream, place) = (quick_upstream().await, Place::new());
    let gateway = Gateway::start(&upstream.url, &place.config("")).await;
    poll(gateway.address, "ended.song").await;
    let is_old = async || ttl_and_age(&poll(gateway.address, "ended.song").await).1 >= 2;
    until("it is 2 s old", is_old).await;
    stop(gateway).await;
    let gateway = Gateway::start(&upstream.url, &place.config("disk_max_age: \"1s\"")).await;
    let reply = poll(gateway.address, "ended.song").await;
    assert!(
        reply.header("cache-status").unwrap().contains("fwd=uri-miss"),
        "{reply:?}"
    );
    gateway.reaches(EXPIRED, 1).await;
}

#[tokio::test]
async fn the_oldest_make_room_and_the_file_stays_within_its_bound() {
    let (upstream, place) = (quick_upstream().await, Place::new());
    let config = QUICK.to_owned() + &place.config("disk_max_bytes: 16MiB");
    let gateway = Gateway::start(&upstream.url, &config).await;
    let mut next = 0;
    while count(&gateway, EVICTED).await < 500 {
        poll_all(gateway.address, next..next + 500, |_| {}).await;
        next += 500;
        gateway.reaches(WRITES, next).await;
        assert!(place.path().metadata().unwrap().blocks() * 512 <= 16 << 20);
    }
    let kept = count(&gateway, ENTRIES).await;
    assert!(count(&gateway, "crun_gateway_disk_bytes").await <= 16 << 20);
    stop(gateway).await;
    let asked = upstream.queries().await;
    let gateway = Gateway::start(&upstream.url, &config).await;
    poll_all(gateway.address, next - kept / 2..next, assert_is_hit).await;
    assert_eq!(upstream.queries().await, asked);
    poll(gateway.address, "ended.0").await;
    assert_eq!(upstream.queries().await, asked + 1, "the oldest is gone");
}

#[tokio::test]
#[ignore = "needs libfaketime: tests/clock/run"]
async fn the_clock_may_be_set_back_and_a_full_file_keeps_what_is_new() {
    const NEW: u32 = 200;
    let (upstream, place, clock) = (quick_upstream().await, Place::new(), Clock::new());
    let config = QUICK.to_owned() + &place.config("disk_max_bytes: 16MiB");
    let env = clock.env();
    let env = env.each_ref().map(|(name, value)| (*name, value.as_str()));
    let start = async || Gateway::start_with_env(&upstream.url, &config, &env).await;
    clock.write(HOUR);
    let gateway = start().await;
    let mut next = 0;
    while count(&gateway, EVICTED).await == 0 {
        poll_all(gateway.address, next..next + 500, |_| {}).await;
        next += 500;
        gateway.reaches(WRITES, next).await;
    }
    stop(gateway).await;
    clock.write(0);
    let gateway = start().await;
    poll_all(gateway.address, next..next + NEW, |_| {}).await;
    stop(gateway).await;
    let asked = upstream.queries().await;
    let gateway = start().await;
    poll_all(gateway.address, next..next + NEW, assert_is_hit).await;
    assert_eq!(upstream.queries().await, asked);
}

#[tokio::test]
async fn a_corrupt_file_is_moved_aside_and_an_empty_one_begun() {
    let (upstream, place) = (quick_upstream().await, Place::new());
    let damaged = b"what somebody else has written here".repeat(1000);
    std::fs::write(place.path(), &damaged).unwrap();
    let gateway = Gateway::start(&upstream.url, &place.config("")).await;
    gateway.reaches(UP, 1).await;
    poll(gateway.address, "ended.song").await;
    let log = gateway.log();
    assert!(
        log.contains("cache.disk: the file is corrupt; it is moved aside"),
        "{log}"
    );
    assert_eq!(count(&gateway, NOT_OPENED).await, 1);
    stop(gateway).await;
    assert_eq!(std::fs::read(place.path().with_extension("corrupt")).unwrap(), damaged);
    let gateway = Gateway::start(&upstream.url, &place.config("")).await;
    assert_is_hit(&poll(gateway.address, "ended.song").await);
}

#[tokio::test]
async fn a_second_process_runs_without_until_the_first_has_ended() {
    let (upstream, place) = (quick_upstream().await, Place::new());
    let first = Gateway::start(&upstream.url, &place.config("")).await;
    first.reaches(UP, 1).await;
    let second = Gateway::start(&upstream.url, &place.config("")).await;
    second.reaches(NOT_OPENED, 1).await;
    assert_eq!(poll(second.address, "ended.second").await.status, 200);
    assert_eq!(count(&second, UP).await, 0);
    let log = second.log();
    assert!(
        log.contains("another process has it open") && log.contains("give each process a file of its own"),
        "{log}"
    );
    poll(first.address, "ended.first").await;
    stop(first).await;
    second.reaches(UP, 1).await;
    assert_is_hit(&poll(second.address, "ended.first").await);
}

#[tokio::test]
async fn where_nothing_can_be_written_the_gateway_says_so_and_runs_without() {
    // Where root may not write either.
    let upstream = quick_upstream().await;
    let gateway = Gateway::start(&upstream.url, "cache: { disk: \"/sys/answers\" }").await;
    gateway.reaches(NOT_OPENED, 1).await;
    for _ in ["asked", "kept in memory"] {
        assert_eq!(poll(gateway.address, "ended.song").await.status, 200);
    }
    assert_eq!(upstream.queries().await, 1);
    gateway.reaches("crun_gateway_disk_dropped_total", 1).await;
    let log = gateway.log();
    assert!(
        log.contains("/sys/answers") && log.contains("nothing is kept on disk until it can"),
        "{log}"
    );
    assert!(
        log.contains("let the gateway's user write the file and its folder"),
        "{log}"
    );
    stop(gateway).await;
}

#[tokio::test]
async fn a_full_disk_is_told_of_and_what_was_there_is_there_again() {
    let (upstream, place) = (quick_upstream().await, Place::new());
    let config = QUICK.to_owned() + &place.config("");
    let gateway = Gateway::start_with_file_size(&upstream.url, &config, 1024).await;
    fill(&gateway, 1).await;
    let mut next = 0;
    while count(&gateway, NOT_WRITTEN).await < 1 {
        poll_all(gateway.address, next..next + 100, |_| {}).await;
        next += 100;
    }
    poll_all(gateway.address, 0..next, assert_is_hit).await;
    let log = gateway.log();
    assert!(log.contains("free space there, or lower cache.disk_max_bytes"), "{log}");
    stop(gateway).await;
    let gateway = Gateway::start(&upstream.url, &config).await;
    let asked = upstream.queries().await;
    assert_is_hit(&poll(gateway.address, "ended.0").await);
    assert_eq!(upstream.queries().await, asked);
}

#[tokio::test]
async fn neither_key_nor_task_nor_answer_can_be_read_from_the_file() {
    let (upstream, place) = (quick_upstream().await, Place::new());
    let config = format!(
        "accounts: [{{ name: music, keys: [{{ env: KEY }}], clients: [{{ name: studio, token: {{ env: TOKEN }} }}] }}]\n{}",
        place.config("")
    );
    let env = [("KEY", KEY), ("TOKEN", OTHER_KEY)];
    let gateway = Gateway::start_with_env(&upstream.url, &config, &env).await;
    poll_as(gateway.address, OTHER_KEY, "ended.song-4711").await;
    poll_as(gateway.address, "ak_unlisted_000000000003", "ended.song-4711").await;
    gateway.reaches(ENTRIES, 2).await;
    stop(gateway).await;
    let content = std::fs::read(place.path()).unwrap();
    let holds = |text: &str| content.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(holds("redb"), "it is the file");
    for hidden in [
        KEY,
        OTHER_KEY,
        "ak_unlisted",
        "4711",
        "task_id",
        "success",
        "music",
        "studio",
    ] {
        assert!(!holds(hidden), "{hidden}");
    }
}
