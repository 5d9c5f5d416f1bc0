//! The wall clock jumps by an hour and back: pace and freshness go by another one.
//!
//! `tests/clock/run` runs this: it needs libfaketime, under which the real binary runs and which reads from a file what
//! to add to the wall clock, and to that alone.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::harness::{Gateway, PATIENCE, Simulator, poll};

/// A process's wall clock, which is ours plus what is told.
pub struct Clock {
    offset: tempfile::NamedTempFile,
}

impl Clock {
    pub fn new() -> Self {
        let clock = Self {
            offset: tempfile::NamedTempFile::new().unwrap(),
        };
        clock.write(0);
        clock
    }

    /// Sets it to ours plus so many seconds.
    pub fn write(&self, seconds: i64) {
        // Never half written: the process reads it whenever it asks for the time.
        let beside = self.offset.path().with_extension("new");
        std::fs::write(&beside, format!("{seconds:+}\n")).unwrap();
        std::fs::rename(beside, self.offset.path()).unwrap();
    }

    /// What a process has to be started with to go by it.
    pub fn env(&self) -> [(&'static str, String); 4] {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        // The C library's allocator: libfaketime does not get started under jemalloc, which Redis brings.
        let preloaded = format!("{} libc.so.6", text(&library()));
        [
            ("LD_PRELOAD", preloaded),
            ("FAKETIME_TIMESTAMP_FILE", text(self.offset.path())),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
    }

    async fn gateway(&self, upstream: &Simulator, config: &str) -> Gateway {
        let config = format!("{config}\nlog: {{ level: debug }}");
        let env = self.env();
        let env = env.each_ref().map(|(name, value)| (*name, value.as_str()));
        Gateway::start_with_env(&upstream.url, &config, &env).await
    }

    /// Sets it to ours plus so many seconds, and waits until the gateway's log is dated so.
    async fn jump(&self, gateway: &Gateway, seconds: i64) {
        self.write(seconds);
        let patience = Instant::now() + PATIENCE;
        loop {
            poll(gateway.address, "ended.kept").await;
            // Not the Date of an answer: hyper looks at the clock for it only when the one it has is a second old.
            let log = gateway.log();
            let stamp = log.lines().last().unwrap().split(' ').next().unwrap();
            let said = humantime::parse_rfc3339(stamp).unwrap();
            let unix = |at: SystemTime| {
                at.duration_since(SystemTime::UNIX_EPOCH)
                    .unwrap()
                    .as_secs()
                    .cast_signed()
            };
            let ahead = unix(said) - unix(SystemTime::now());
            if (ahead - seconds).abs() <= 5 {
                return;
            }
            assert!(Instant::now() < patience, "{ahead} s ahead, not {seconds}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Where Debian puts it.
fn library() -> PathBuf {
    let machines = std::fs::read_dir("/usr/lib").unwrap();
    let mut paths = machines.map(|machine| machine.unwrap().path().join("faketime/libfaketimeMT.so.1"));
    paths
        .find(|path| path.exists())
        .expect("libfaketime is not here: tests/clock/run installs it")
}

pub const HOUR: i64 = 3600;

#[tokio::test]
#[ignore = "needs libfaketime: tests/clock/run"]
async fn the_pace_holds_while_the_wall_clock_jumps() {
    let upstream = Simulator::start(&["--latency", "50ms"]).await;
    let clock = Clock::new();
    let gateway = clock.gateway(&upstream, "budget: { max_wait: \"30s\" }").await;
    assert_eq!(poll(gateway.address, "ended.kept").await.status, 200);
    let address = gateway.address;
    let mut polls = JoinSet::new();
    for task in 0..150 {
        polls.spawn(async move { poll(address, &format!("ended.{task}")).await });
    }
    for (asked, ahead) in [(30, HOUR), (60, -HOUR), (90, 0)] {
        upstream.asked(asked).await;
        clock.jump(&gateway, ahead).await;
    }
    assert!(upstream.queries().await < 140, "it jumped while they waited");
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    let stats = upstream.stats().await;
    let number = |name: &str| stats[name].as_u64().unwrap();
    assert_eq!((number("requests"), number("violations")), (151, 0), "{stats}");
    assert!(number("highest_in_any_second") <= 15, "{stats}");
    let span = Duration::from_nanos(number("last_arrival_unix_ns") - number("first_arrival_unix_ns"));
    let goodput = 150.0 / span.as_secs_f64();
    assert!(goodput >= 14.0, "{goodput}/s: {stats}");
}

#[tokio::test]
#[ignore = "needs libfaketime: tests/clock/run"]
async fn answers_stay_as_fresh_as_they_are_while_the_wall_clock_jumps() {
    const FLOOR: Duration = Duration::from_secs(3);
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let clock = Clock::new();
    let gateway = clock.gateway(&upstream, "cache: { fresh: { floor: \"3s\" } }").await;
    assert_eq!(poll(gateway.address, "ended.kept").await.status, 200);
    for ahead in [HOUR, -HOUR, 0] {
        let asked = upstream.stats().await["tasks"]["running.a"].as_u64().unwrap_or(0);
        let fetched = loop {
            let now = Instant::now();
            if poll(gateway.address, "running.a").await.header("age") == Some("0") && asks(&upstream, asked).await {
                break now;
            }
        };
        clock.jump(&gateway, ahead).await;
        // Until the floor it is the one that is kept, and no older than it is; from then on, the next one.
        let renewed = loop {
            let reply = poll(gateway.address, "running.a").await;
            let age: u64 = reply.header("age").unwrap().parse().unwrap();
            assert!(age <= fetched.elapsed().as_secs(), "{ahead}: {age}");
            if asks(&upstream, asked + 1).await {
                break fetched.elapsed();
            }
            assert!(
                fetched.elapsed() < FLOOR + Duration::from_millis(1500),
                "{ahead}: never renewed"
            );
        };
        assert!(renewed >= FLOOR, "{ahead}: {renewed:?}");
    }
    // What is kept for days, and the key that was confirmed, are as old as they are, too.
    let kept = poll(gateway.address, "ended.kept").await;
    assert!(kept.header("cache-status").unwrap().contains("; hit;"), "{kept:?}");
    assert_eq!(upstream.stats().await["tasks"]["ended.kept"], 1);
}

/// Whether upstream was asked for the live task more than so many times.
async fn asks(upstream: &Simulator, times: u64) -> bool {
    upstream.stats().await["tasks"]["running.a"].as_u64().unwrap_or(0) > times
}
