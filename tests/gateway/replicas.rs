//! Replicas that share one budget: real gateways, a real Redis server, and a link between each and the store that is
//! cut, slowed and restored. Upstream counts the arrivals of them all by the kernel's stamps.
//!
//! That no schedule of faults breaks the promise is played in simulated time, by the thousand (`src/shared/tests.rs`).
//! Here it is seen once, fault by fault; `cargo test --test gateway -- --ignored replicas::again` goes on for ten
//! minutes. A reply of the store counts for a third of the margin: 10 ms, where it is not said otherwise. What a busy
//! machine makes of that is no fault, so most of them say otherwise.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crun_gateway::config::{self, StoreUrl};
use http::Method;
use nix::sys::signal::Signal;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::clock::{Clock, HOUR};
use crate::harness::client::{bare, poll_request, try_request};
use crate::harness::paused::{Behaviour, Paused};
use crate::harness::process::config_file;
use crate::harness::store::{Carries, Link, Store};
use crate::harness::{Gateway, KEY, PATIENCE, Reply, Simulator, poll, poll_as, request};
use crate::tls::Identity;

const SECOND: Duration = Duration::from_secs(1);

/// Somebody spends by then, whatever has become of the store.
const LONGEST_SILENCE: Duration = Duration::from_millis(3500);

/// Many more than the budget of a second.
const CLIENTS: usize = 25;

/// Replies may be late by 30 ms, and the whole budget is 13.76 a second.
const PATIENT: &str = "budget: { margin: 90ms }";
/// All of that, but for a moment.
const WHOLE: f64 = 13.5;

/// Replicas at work.
struct Replicas {
    upstream: Simulator,
    store: Option<Store>,
    links: Vec<Link>,
    urls: Vec<String>,
    /// Configuration of theirs, beside what they share.
    more: String,
    gateways: Vec<Gateway>,
    /// One that is no replica, and is never asked for a task.
    beside: Gateway,
    clients: JoinSet<()>,
    silence: Arc<Mutex<Silence>>,
    waits: Arc<Mutex<Waits>>,
}

/// How long nobody spends.
#[derive(Debug)]
struct Silence {
    /// Counted anew from here.
    since: Instant,
    longest: Duration,
}

impl Silence {
    fn count_anew(&mut self) {
        self.since = Instant::now();
        self.longest = Duration::ZERO;
    }
}

/// How long answers took: hits, and beside each one of a gateway that knows of no store. So what the machine does to
/// both is known.
#[derive(Clone, Debug, Default)]
struct Waits {
    /// Replicas that have what is asked for.
    begun: usize,
    hits: Vec<Duration>,
    others: Vec<Duration>,
}

impl Waits {
    /// The 99th percentiles.
    fn p99(&mut self) -> [Duration; 2] {
        [&mut self.hits, &mut self.others].map(|waits| {
            waits.sort_unstable();
            waits[(waits.len() - 1) * 99 / 100]
        })
    }
}

/// One client that goes on asking for what is kept, one poll after the other.
async fn poll_what_is_kept(address: SocketAddr, beside: SocketAddr, waits: Arc<Mutex<Waits>>) {
    let mut is_kept = false;
    loop {
        let asked = Instant::now();
        let reply = try_request(address, poll_request(KEY, "ended.kept")).await;
        let took = asked.elapsed();
        let is_hit = reply.is_ok_and(|reply| reply.header("cache-status").unwrap().contains("; hit"));
        let asked = Instant::now();
        let reply = try_request(beside, bare(Method::GET, "/nothing")).await;
        if is_hit && reply.is_ok_and(|reply| reply.status == 404) {
            let mut waits = waits.lock();
            waits.begun += usize::from(!std::mem::replace(&mut is_kept, true));
            waits.hits.push(took);
            waits.others.push(asked.elapsed());
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Looks at upstream's counters all the time.
async fn listen(upstream: SocketAddr, silence: Arc<Mutex<Silence>>) {
    let mut before = 0;
    loop {
        sleep(Duration::from_millis(20)).await;
        let stats = request(upstream, bare(Method::GET, "/__stats")).await.json();
        let asked = stats["requests"].as_u64().unwrap();
        let mut silence = silence.lock();
        silence.longest = silence.longest.max(silence.since.elapsed());
        if asked > before {
            silence.since = Instant::now();
        }
        before = asked;
    }
}

/// One client that goes on asking for new tasks, whatever it is told.
async fn poll_for_ever(address: SocketAddr, client: String) {
    for task in 0.. {
        let task = format!("ended.{client}-{task}");
        match try_request(address, poll_request(KEY, &task)).await {
            Ok(reply) if reply.status == 200 => {
                assert_eq!(reply.json()["data"]["task_id"], task, "nothing wrong is served");
            }
            Ok(_) | Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

impl Replicas {
    /// So many replicas under full load.
    async fn start(replicas: usize) -> Self {
        Self::start_on(Store::start().await, replicas, PATIENT).await
    }

    /// The same, with this store and `more` configuration.
    async fn start_on(store: Store, replicas: usize, more: &str) -> Self {
        let (mut urls, mut links) = (Vec::new(), Vec::new());
        for _ in 0..replicas {
            let link = Link::to(store.address);
            urls.push(format!("redis://{}", link.address));
            links.push(link);
        }
        Self {
            store: Some(store),
            links,
            ..Self::start_by(urls, more).await
        }
    }

    /// One replica for each of these stores' URLs, under full load.
    async fn start_by(urls: Vec<String>, more: &str) -> Self {
        let mut started = Self::idle_by(urls, more).await;
        let listening = listen(started.upstream.address, Arc::clone(&started.silence));
        started.clients.spawn(listening);
        for (replica, gateway) in started.gateways.iter().enumerate() {
            let keeping = poll_what_is_kept(gateway.address, started.beside.address, Arc::clone(&started.waits));
            started.clients.spawn(keeping);
            for client in 0..CLIENTS {
                let client = format!("{replica}-{client}");
                started.clients.spawn(poll_for_ever(gateway.address, client));
            }
        }
        started
    }

    /// So many replicas of which nothing is asked, once they lend. Their calls may be late by 66 ms: none is cut off
    /// because other tests share the machine.
    async fn idle(replicas: usize) -> Self {
        Self::idle_with(replicas, "budget: { margin: 200ms }").await
    }

    /// The same, with `more` configuration.
    async fn idle_with(replicas: usize, more: &str) -> Self {
        let store = Store::start().await;
        let urls = vec![format!("redis://{}", store.address); replicas];
        let store = Some(store);
        let started = Self {
            store,
            ..Self::idle_by(urls, more).await
        };
        started.all_lend().await;
        started
    }

    async fn idle_by(urls: Vec<String>, more: &str) -> Self {
        // A replica that a busy machine has cut off from its store for a moment hears of a pause of so many seconds.
        let upstream = Simulator::start(&["--latency", "50ms", "--retry-after", "3"]).await;
        let silence = Arc::new(Mutex::new(Silence {
            since: Instant::now(),
            longest: Duration::ZERO,
        }));
        let beside = Gateway::start(&upstream.url, "").await;
        let mut started = Self {
            upstream,
            beside,
            store: None,
            links: Vec::new(),
            urls,
            more: more.to_owned(),
            gateways: Vec::new(),
            clients: JoinSet::new(),
            silence,
            waits: Arc::default(),
        };
        for replica in 0..started.urls.len() {
            let gateway = Gateway::start(&started.upstream.url, &started.config(replica)).await;
            started.gateways.push(gateway);
        }
        started
    }

    fn config(&self, replica: usize) -> String {
        let (replicas, url, more) = (self.urls.len(), &self.urls[replica], &self.more);
        format!("shared: {{ max_replicas: {replicas}, url: '{url}' }}\n{more}")
    }

    /// Polls of so many tasks at a replica, all at once; gives how long each took, and its answer.
    fn rush(&self, replica: usize, polls: usize) -> JoinSet<(Duration, Reply)> {
        let address = self.gateways[replica].address;
        let mut rush = JoinSet::new();
        for task in 0..polls {
            let request = poll_request(KEY, &format!("rush-{replica}-{task}"));
            rush.spawn(async move {
                let asked = Instant::now();
                let reply = try_request(address, request).await.unwrap();
                (asked.elapsed(), reply)
            });
        }
        rush
    }

    /// Waits until so many flights wait at a replica.
    async fn queue(&self, replica: usize, flights: usize) {
        let series = "crun_gateway_budget_queue_length{account=\"other\",lane=\"foreground\"}";
        let flights = u32::try_from(flights).unwrap();
        self.gateways[replica].reaches(series, flights).await;
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    /// Waits until each of these replicas stands so.
    async fn stand(&self, standing: &str, replicas: &[usize]) {
        let series = format!("crun_gateway_shared_standing{{standing=\"{standing}\"}}");
        let all = async {
            for replica in replicas {
                while self.gateways[*replica].metric(&series).await < 1.0 {
                    sleep(Duration::from_millis(20)).await;
                }
            }
        };
        let logs = || self.gateways.iter().map(Gateway::log).collect::<String>();
        timeout(PATIENCE, all)
            .await
            .unwrap_or_else(|_| panic!("not {standing}: {}", logs()));
    }

    async fn all_lend(&self) {
        let all: Vec<_> = (0..self.gateways.len()).collect();
        self.stand("lending", &all).await;
    }

    /// How often upstream was asked, and when last, by its own clock.
    async fn asked(&self) -> (u64, Duration) {
        let stats = self.upstream.stats().await;
        let number = |name: &str| stats[name].as_u64().unwrap_or_default();
        (number("requests"), Duration::from_nanos(number("last_arrival_unix_ns")))
    }

    /// Waits until so many queries a second have arrived throughout three seconds.
    async fn spend(&self, least: f64) {
        // While the machine is busy with other things, replies are late.
        let patience = Instant::now() + 3 * PATIENCE;
        loop {
            let (before, from) = self.asked().await;
            sleep(3 * SECOND).await;
            let (after, to) = self.asked().await;
            let rate = (after - before) as f64 / (to.saturating_sub(from)).as_secs_f64();
            if rate >= least {
                eprintln!("{} replicas: {rate:.2}/s", self.gateways.len());
                return;
            }
            assert!(Instant::now() < patience, "{rate}/s, not {least}/s");
        }
    }

    /// Does `fault`, whose last step is to end it, and waits until all replicas lend again. Somebody has to spend
    /// within 3.5 s of its beginning, and of its end; and hits are nothing to the store.
    async fn survive(&mut self, name: &str, fault: impl AsyncFnOnce(&mut Self)) {
        let patience = Instant::now() + PATIENCE;
        while self.waits.lock().begun < self.gateways.len() {
            assert!(Instant::now() < patience, "{name}: what is kept is not");
            sleep(SECOND / 20).await;
        }
        let begun = Instant::now();
        self.silence.lock().count_anew();
        self.waits.lock().hits.clear();
        self.waits.lock().others.clear();
        fault(self).await;
        let ended = Instant::now();
        let mut gaps = [self.silence.lock().longest; 2];
        self.silence.lock().count_anew();
        self.all_lend().await;
        gaps[1] = self.silence.lock().longest;
        let mut waits = self.waits.lock().clone();
        assert!(waits.hits.len() >= 50, "{name}: {} hits", waits.hits.len());
        let [hits, others] = waits.p99();
        eprintln!(
            "{name}, {:?}: all lend {:?} after it; silent for {gaps:?}; p99 of {} hits {hits:?}, of others {others:?}",
            ended - begun,
            ended.elapsed(),
            waits.hits.len(),
        );
        assert!(
            hits <= others + Duration::from_millis(50),
            "{name}: hits wait {hits:?}, and nothing else does longer than {others:?}"
        );
        assert!(
            gaps.iter().all(|gap| *gap <= LONGEST_SILENCE),
            "{name}: silent for {gaps:?}"
        );
        assert!(
            ended.elapsed() < 10 * SECOND,
            "{name}: back after {:?}",
            ended.elapsed()
        );
        self.assert_within_the_limit().await;
    }

    /// The same where sentinels take their time first: the last step of `fault` is that there is a primary.
    async fn fail_over(&mut self, name: &str, fault: impl AsyncFnOnce(&mut Self)) {
        fault(self).await;
        self.silence.lock().count_anew();
        self.all_lend().await;
        // Whoever lends may yet be silent.
        self.spend(13.0).await;
        let gap = self.silence.lock().longest;
        eprintln!("{name}: silent for {gap:?}");
        assert!(gap <= LONGEST_SILENCE, "{name}: silent for {gap:?}");
        self.assert_within_the_limit().await;
    }

    fn carry(&self, replicas: &[usize], carries: Carries) {
        for replica in replicas {
            self.links[*replica].set(carries);
        }
    }

    /// Cuts one replica's link, and waits until it spends its slice.
    async fn cut_off(&self, replica: usize) {
        let cut = Carries {
            is_cut: true,
            ..Carries::default()
        };
        self.carry(&[replica], cut);
        self.stand("alone", &[replica]).await;
    }

    /// No second held more than the limit, and upstream refused nothing.
    async fn assert_within_the_limit(&self) {
        let stats = self.upstream.stats().await;
        assert_eq!(stats["violations"], 0, "{stats}");
        assert!(stats["highest_in_any_second"].as_u64().unwrap() <= 15, "{stats}");
    }
}

/// Full load on so many: at least so much of the budget, and no more than the whole.
async fn replicas_spend_one_budget(replicas: usize, more: &str, least: f64) {
    let cluster = Replicas::start_on(Store::start().await, replicas, more).await;
    cluster.all_lend().await;
    cluster.spend(least).await;
    cluster.assert_within_the_limit().await;
    // One of them that is held up for a moment lends nothing, or wants nothing and the others have its share.
    let expected = serde_json::json!({ "standing": "lending", "leases": replicas, "max_replicas": replicas });
    let patience = Instant::now() + PATIENCE;
    loop {
        let lend = cluster.gateways[0].metric("crun_gateway_shared_leases").await;
        let (_, status) = cluster.gateways[0].admin("/status.json").await;
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let share = status["accounts"][0]["share"].as_f64().unwrap();
        let are_all_seen = (lend - replicas as f64).abs() < 0.5 && status["shared"] == expected;
        if are_all_seen && (share - 1.0 / replicas as f64).abs() < 0.01 {
            return;
        }
        assert!(
            Instant::now() < patience,
            "{lend} lend, {share} of the limit, {}",
            status["shared"]
        );
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn two_replicas_spend_one_budget() {
    replicas_spend_one_budget(2, "", 14.0).await;
}

#[tokio::test]
async fn three_replicas_spend_one_budget() {
    replicas_spend_one_budget(3, PATIENT, WHOLE).await;
}

#[tokio::test]
async fn four_replicas_spend_one_budget() {
    replicas_spend_one_budget(4, PATIENT, WHOLE).await;
}

/// Everything that may become of the store, one after the other.
async fn store_suffers(cluster: &mut Replicas) {
    let all = [0, 1, 2];
    cluster.all_lend().await;
    cluster
        .survive("killed", async |cluster| {
            let address = cluster.store.take().unwrap().kill().await;
            cluster.stand("alone", &all).await;
            cluster.spend(13.0).await;
            cluster.store = Some(Store::start_at(address).await);
        })
        .await;
    cluster
        .survive("frozen", async |cluster| {
            cluster.store().signal(Signal::SIGSTOP);
            cluster.stand("alone", &all).await;
            cluster.store().signal(Signal::SIGCONT);
        })
        .await;
    cluster
        .survive("slow by 5 s", async |cluster| {
            let slow = Carries {
                up: 5 * SECOND / 2,
                down: 5 * SECOND / 2,
                ..Carries::default()
            };
            cluster.carry(&all, slow);
            cluster.stand("alone", &all).await;
            sleep(3 * SECOND).await;
            cluster.carry(&all, Carries::default());
        })
        .await;
    cluster
        .survive("flushed", async |cluster| {
            cluster.store().must(&["FLUSHALL"]);
            cluster.stand("waiting", &all).await;
        })
        .await;
    cluster
        .survive("full", async |cluster| {
            cluster.store().must(&["CONFIG", "SET", "maxmemory", "1"]);
            cluster.stand("alone", &all).await;
            cluster.store().must(&["CONFIG", "SET", "maxmemory", "0"]);
        })
        .await;
    cluster
        .survive("read-only", async |cluster| {
            cluster.store().must(&["REPLICAOF", "127.0.0.1", "1"]);
            cluster.stand("alone", &all).await;
            cluster.store().must(&["REPLICAOF", "NO", "ONE"]);
        })
        .await;
}

/// Everything that may become of one replica's link.
async fn one_link_suffers(cluster: &mut Replicas) {
    cluster.all_lend().await;
    cluster
        .survive("one cut off", async |cluster| {
            cluster.cut_off(0).await;
            cluster.stand("lending", &[1, 2]).await;
            cluster.spend(13.0).await;
            cluster.carry(&[0], Carries::default());
        })
        .await;
    cluster
        .survive("one gets its replies 5 s late", async |cluster| {
            cluster.carry(
                &[0],
                Carries {
                    down: 5 * SECOND,
                    ..Carries::default()
                },
            );
            cluster.stand("alone", &[0]).await;
            cluster.stand("lending", &[1, 2]).await;
            sleep(3 * SECOND).await;
            cluster.carry(&[0], Carries::default());
        })
        .await;
    cluster
        .survive("flushed while one is cut off", async |cluster| {
            cluster.cut_off(0).await;
            cluster.store().must(&["FLUSHALL"]);
            cluster.stand("lending", &[1, 2]).await;
            cluster.carry(&[0], Carries::default());
        })
        .await;
    cluster.spend(WHOLE).await;
    cluster.assert_within_the_limit().await;
}

#[tokio::test]
async fn whatever_becomes_of_the_store_no_second_holds_more_than_the_limit() {
    store_suffers(&mut Replicas::start(3).await).await;
}

#[tokio::test]
async fn one_replica_that_is_cut_off_spends_its_slice_and_the_others_theirs() {
    one_link_suffers(&mut Replicas::start(3).await).await;
}

/// A gateway that shares its budget through the store there.
fn sharing_through(store: SocketAddr) -> Paused {
    let url = StoreUrl {
        is_tls: false,
        addresses: vec![(store.ip().to_string(), store.port())],
        service: None,
        db: 0,
    };
    let store = config::Store {
        url,
        prefix: "test:".to_owned(),
        max_bytes: 1 << 28,
        username: None,
        password: None,
        sentinel_password: None,
        ca_file: None,
        connect_timeout: SECOND,
        timeout: SECOND / 5,
    };
    Paused::start(Behaviour::default(), |config| {
        config.shared = Some(config::Shared {
            max_replicas: NonZeroU32::new(3).unwrap(),
            store: Some(store),
        });
    })
}

#[tokio::test(start_paused = true)]
async fn no_hit_waits_for_a_store_that_is_away() {
    // Nobody listens there, or somebody who never says anything.
    for is_silent in [false, true] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let gateway = sharing_through(listener.local_addr().unwrap());
        let _listener = is_silent.then_some(listener);
        let first = gateway.poll(KEY, "kept").await;
        assert_eq!(first.status, 200, "the slice is spent: {first:?}");
        // Some seconds, and so every moment of the calls that fail.
        for step in 0..1000 {
            sleep(Duration::from_micros(step * 17 % 9000)).await;
            let asked = Instant::now();
            let reply = gateway.poll(KEY, "kept").await;
            assert!(reply.header("cache-status").unwrap().contains("; hit;"), "{reply:?}");
            assert_eq!(asked.elapsed(), Duration::ZERO);
        }
        let alone = gateway.metric("crun_gateway_shared_standing{standing=\"alone\"}");
        let in_time = gateway.metric("crun_gateway_shared_calls_total{result=\"in_time\"}");
        assert!(alone > 0.5 && in_time < 0.5, "it is away");
    }
}

#[tokio::test]
#[ignore = "needs libfaketime: tests/clock/run"]
async fn the_clock_of_the_store_may_jump() {
    let clock = Clock::new();
    let store = Store::start_with_env(&clock.env()).await;
    let mut cluster = Replicas::start_on(store, 3, PATIENT).await;
    cluster.all_lend().await;
    for (name, ahead) in [
        ("an hour ahead", HOUR),
        ("two hours back", -HOUR),
        ("right again", 0),
        ("a second ahead", 1),
        ("two seconds back", -1),
    ] {
        cluster
            .survive(name, async |cluster| {
                clock.write(ahead);
                cluster.stand("waiting", &[0, 1, 2]).await;
            })
            .await;
        let told = cluster.store().command(&["TIME"]).unwrap();
        // An array of two: seconds, microseconds.
        let told: i64 = told.lines().nth(2).unwrap().parse().unwrap();
        let ours = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert!(
            (told - ours.as_secs().cast_signed() - ahead).abs() <= 1,
            "{name}: {told}"
        );
    }
    cluster.spend(WHOLE).await;
    cluster.assert_within_the_limit().await;
}

#[tokio::test]
#[ignore = "takes ten minutes"]
async fn again_and_again() {
    let mut cluster = Replicas::start(3).await;
    let begun = Instant::now();
    while begun.elapsed() < 600 * SECOND {
        store_suffers(&mut cluster).await;
        one_link_suffers(&mut cluster).await;
    }
}

#[tokio::test]
async fn a_greedy_client_of_one_replica_does_not_starve_a_small_one_of_another() {
    let mut cluster = Replicas::start(2).await;
    cluster.all_lend().await;
    cluster.spend(WHOLE).await;
    // The second replica serves a single client from now on, one poll after the other.
    cluster.clients.abort_all();
    while cluster.clients.join_next().await.is_some() {}
    let greedy = cluster.gateways[0].address;
    for client in 0..4 * CLIENTS {
        cluster.clients.spawn(poll_for_ever(greedy, format!("greedy-{client}")));
    }
    cluster.queue(0, CLIENTS).await;
    let begun = Instant::now();
    for task in 0..20 {
        let request = poll_request(KEY, &format!("ended.small-{task}"));
        let reply = try_request(cluster.gateways[1].address, request).await.unwrap();
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    // Half of the budget would take 2.8 s, a place behind the greedy client's 100 flights 140 s.
    assert!(begun.elapsed() < 6 * SECOND, "{:?}", begun.elapsed());
    cluster.assert_within_the_limit().await;
}

#[tokio::test]
async fn whatever_a_replica_had_before_it_has_its_part_as_soon_as_others_want_theirs() {
    let [key, token] = [KEY, "token-a"].map(config_file);
    let accounts = format!(
        "accounts: [{{ name: music, keys: [{{ file: '{}' }}], clients: [{{ name: studio, token: {{ file: '{}' }}, weight: 10 }}] }}]",
        key.path().display(),
        token.path().display()
    );
    // Permits are so far apart that each is asked for more than once: so a replica wants them without a break.
    let budget = format!("budget: {{ limit: 8, margin: 200ms }}\n{accounts}");
    let mut cluster = Replicas::idle_with(2, &budget).await;
    let [one, other] = [0, 1].map(|replica| cluster.gateways[replica].address);
    // A client of weight 1 for a while. When ten times its weight begins to wait elsewhere it rests.
    for task in 0..20 {
        assert_eq!(poll(one, &format!("ended.single-{task}")).await.status, 200);
    }
    for client in 0..10 {
        cluster.clients.spawn(async move {
            for task in 0.. {
                poll_as(other, "token-a", &format!("ended.{client}-{task}")).await;
            }
        });
    }
    cluster.upstream.asked(30).await;
    let mut rush = JoinSet::new();
    for task in 0..5 {
        rush.spawn(async move {
            let asked = Instant::now();
            let reply = poll_as(one, "token-a", &format!("ended.rush-{task}")).await;
            (asked.elapsed(), reply)
        });
    }
    are_served(rush, "as much elsewhere").await;
    cluster.assert_within_the_limit().await;
}

/// Everybody in the rush is served.
async fn are_served(rush: JoinSet<(Duration, Reply)>, during: &str) {
    let replies = rush.join_all().await;
    let refused = replies.iter().filter(|(_, reply)| reply.status != 200);
    let refused: Vec<_> = refused.map(|(took, reply)| (took, reply.status)).collect();
    assert!(refused.is_empty(), "{during}, of {}: {refused:?}", replies.len());
}

#[tokio::test]
async fn a_poll_elsewhere_turns_nobody_away_whom_the_budget_can_serve() {
    let cluster = Replicas::idle(3).await;
    let rush = cluster.rush(0, 80);
    cluster.queue(0, 60).await;
    for other in [1, 2] {
        let request = poll_request(KEY, &format!("elsewhere-{other}"));
        let reply = try_request(cluster.gateways[other].address, request).await.unwrap();
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    are_served(rush, "two polls elsewhere").await;
    cluster.assert_within_the_limit().await;
}

#[tokio::test]
async fn a_second_look_takes_no_turn_from_whoever_waits_at_another_replica() {
    let cluster = Replicas::idle(2).await;
    let second_look = async |task: u32| {
        let mut request = poll_request(KEY, &format!("seen-{task}"));
        let max_age = http::HeaderValue::from_static("max-age=0");
        request.headers_mut().insert(http::header::CACHE_CONTROL, max_age);
        try_request(cluster.gateways[1].address, request).await.unwrap()
    };
    // So many live tasks that what is kept is fresh for 9 s.
    are_served(cluster.rush(1, 100), "nothing else").await;
    for task in 0..10 {
        assert_eq!(second_look(task).await.status, 200);
    }
    // Older than the floor, so that each may be asked for anew.
    sleep(2 * SECOND).await;
    let rush = cluster.rush(0, 90);
    cluster.queue(0, 70).await;
    let mut fetched = Vec::new();
    for task in 0..10 {
        let reply = second_look(task).await;
        let status = reply.header("cache-status").unwrap();
        if !status.contains("; hit") {
            fetched.push(status.to_owned());
        }
    }
    // The first of them finds out that somebody waits.
    assert!(fetched.len() <= 3, "{fetched:?} of 10");
    are_served(rush, "second looks elsewhere").await;
}

#[tokio::test]
async fn what_upstream_says_to_one_replica_pauses_the_other() {
    let cluster = Replicas::start(2).await;
    cluster.all_lend().await;
    cluster.spend(WHOLE).await;
    let paused = "crun_gateway_upstream_paused{account=\"other\"}";
    assert!(cluster.gateways[1].metric(paused).await < 0.5);
    let request = poll_request(KEY, "first-429.once");
    let refused = try_request(cluster.gateways[0].address, request);
    let told = async {
        while cluster.gateways[1].metric(paused).await < 0.5 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let (_, heard) = tokio::join!(refused, timeout(PATIENCE, told));
    let logs = || cluster.gateways.iter().map(Gateway::log).collect::<String>();
    heard.unwrap_or_else(|_| panic!("the other replica does not hear of it: {}", logs()));
    let rate = cluster.gateways[1]
        .metric("crun_gateway_budget_rate{account=\"other\"}")
        .await;
    // Half of the limit, of which half is this replica's.
    assert!(rate < 5.0, "{rate}/s");
}

/// A client of all replicas, which asks one that is ready each time, as a Service leads it, and takes no error.
async fn poll_whoever_is_ready(ready: Arc<Mutex<Vec<SocketAddr>>>, client: usize, faults: Arc<Mutex<Vec<String>>>) {
    for number in 0.. {
        let address = {
            let ready = ready.lock();
            ready[(client + number) % ready.len()]
        };
        let task = format!("ended.ready-{client}-{number}");
        let reply = try_request(address, poll_request(KEY, &task)).await;
        if !matches!(&reply, Ok(reply) if reply.status == 200 && reply.json()["data"]["task_id"] == task) {
            faults.lock().push(format!("{address}: {reply:?}"));
            sleep(Duration::from_millis(100)).await;
        }
    }
}

#[tokio::test]
async fn replicas_that_are_restarted_one_after_the_other_keep_the_budget_and_no_client_sees_it() {
    let mut cluster = Replicas::start(3).await;
    cluster.all_lend().await;
    // From now on clients go where a Service would lead them.
    cluster.clients.abort_all();
    while cluster.clients.join_next().await.is_some() {}
    let all: Vec<_> = cluster.gateways.iter().map(|gateway| gateway.address).collect();
    let (ready, faults) = (Arc::new(Mutex::new(all)), Arc::default());
    for client in 0..CLIENTS {
        let polling = poll_whoever_is_ready(Arc::clone(&ready), client, Arc::clone(&faults));
        cluster.clients.spawn(polling);
    }
    cluster.spend(WHOLE).await;
    for replica in 0..3 {
        let address = cluster.gateways[replica].address;
        ready.lock().retain(|other| *other != address);
        cluster.gateways[replica].terminate();
        let ended = cluster.gateways[replica].exit().await;
        assert_eq!(ended.code(), Some(0));
        cluster.gateways[replica] = Gateway::start(&cluster.upstream.url, &cluster.config(replica)).await;
        ready.lock().push(cluster.gateways[replica].address);
        cluster.all_lend().await;
        cluster.assert_within_the_limit().await;
    }
    cluster.spend(WHOLE).await;
    cluster.assert_within_the_limit().await;
    let faults: &Vec<String> = &faults.lock();
    assert!(faults.is_empty(), "{faults:#?}");
}

#[tokio::test]
async fn a_key_that_is_listed_no_longer_spends_one_budget_whichever_replicas_knew_it_listed() {
    let mut cluster = Replicas::start(2).await;
    cluster.all_lend().await;
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), KEY).unwrap();
    let lists = format!(
        "accounts: [{{ name: music, keys: [{{ file: '{}' }}] }}]",
        key.path().display()
    );
    for (times, accounts) in [(1, lists.as_str()), (2, "")] {
        for (replica, gateway) in cluster.gateways.iter().enumerate() {
            gateway.reconfigure(&format!("{}\n{accounts}", cluster.config(replica)));
        }
        for gateway in &cluster.gateways {
            gateway.logged("the changed configuration is taken over", times).await;
        }
        cluster.spend(WHOLE).await;
    }
    cluster.gateways[1].terminate();
    cluster.gateways[1].exit().await;
    cluster.gateways[1] = Gateway::start(&cluster.upstream.url, &cluster.config(1)).await;
    for client in 0..CLIENTS {
        let polling = poll_for_ever(cluster.gateways[1].address, format!("anew-{client}"));
        cluster.clients.spawn(polling);
    }
    cluster.all_lend().await;
    cluster.queue(1, 1).await;
    cluster.spend(WHOLE).await;
    cluster.assert_within_the_limit().await;
}

#[tokio::test]
async fn without_a_store_each_replica_spends_its_part() {
    let upstream = Simulator::start(&["--latency", "50ms"]).await;
    let gateway = Gateway::start(&upstream.url, "shared: { max_replicas: 3 }").await;
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        clients.spawn(poll_for_ever(gateway.address, client.to_string()));
    }
    upstream.asked(30).await;
    let stats = upstream.stats().await;
    assert_eq!(stats["highest_in_any_second"], 5, "{stats}");
}

#[tokio::test]
async fn replicas_whose_processes_stand_still_spend_nothing_late() {
    let cluster = Replicas::start(3).await;
    cluster.all_lend().await;
    for round in 0..30_u64 {
        let stands_still = &cluster.gateways[usize::try_from(round).unwrap() % 3];
        stands_still.signal(Signal::SIGSTOP);
        // Slots are up to 100 ms ahead.
        sleep(Duration::from_millis(20 + round * 37 % 160)).await;
        stands_still.signal(Signal::SIGCONT);
        sleep(Duration::from_millis(50)).await;
    }
    cluster.all_lend().await;
    cluster.spend(WHOLE).await;
    cluster.assert_within_the_limit().await;
}

/// Waits until a server's ROLE says so.
async fn comes_to_be(server: &Store, role: &str) {
    let patience = Instant::now() + PATIENCE;
    while !server.command(&["ROLE"]).is_some_and(|reply| reply.contains(role)) {
        assert!(Instant::now() < patience, "not {role}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_primary_that_dies_or_comes_back_to_life_is_replaced() {
    let primary = Store::start().await;
    let second = Store::replica(&primary).await;
    let sentinel = Store::sentinel(&primary).await;
    // It asks the primary for its copies every now and then.
    let patience = Instant::now() + PATIENCE;
    let copy = format!("127.0.0.1:{}", second.address.port());
    while !(sentinel.command(&["SENTINEL", "REPLICAS", "main"]))
        .is_some_and(|reply| reply.contains(&copy) && reply.contains("master-link-status\r\n$2\r\nok"))
    {
        assert!(Instant::now() < patience, "the sentinel knows no copy");
        sleep(Duration::from_millis(50)).await;
    }
    let url = format!("redis+sentinel://{}/main", sentinel.address);
    let mut cluster = Replicas::start_by(vec![url; 3], PATIENT).await;
    cluster.all_lend().await;
    cluster
        .fail_over("frozen", async |_| {
            primary.signal(Signal::SIGSTOP);
            comes_to_be(&second, "master").await;
        })
        .await;
    cluster
        .fail_over("back to life", async |_| primary.signal(Signal::SIGCONT))
        .await;
    // The first is a copy of the second from now on.
    comes_to_be(&primary, "connected").await;
    cluster
        .fail_over("killed", async |_| {
            second.kill().await;
            comes_to_be(&primary, "master").await;
        })
        .await;
    cluster.spend(WHOLE).await;
    cluster.assert_within_the_limit().await;
}

/// Whether a gateway with this configuration comes to lend; and its log.
async fn comes_to_lend(config: &str, password: &str) -> (bool, String) {
    let gateway = Gateway::start_with_env("http://127.0.0.1:1", config, &[("STORE_PASSWORD", password)]).await;
    let patience = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < patience, "{}", gateway.log());
        for (standing, lends) in [("lending", true), ("alone", false)] {
            let series = format!("crun_gateway_shared_standing{{standing=\"{standing}\"}}");
            if gateway.metric(&series).await > 0.5 {
                return (lends, gateway.log());
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_sentinel_that_says_nothing_keeps_nobody_from_the_next() {
    let primary = Store::start().await;
    let sentinel = Store::sentinel(&primary).await;
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addresses = format!("{},{}", silent.local_addr().unwrap(), sentinel.address);
    let config = format!("shared: {{ max_replicas: 2, url: 'redis+sentinel://{addresses}/main' }}");
    let (lends, log) = comes_to_lend(&config, "").await;
    assert!(lends, "{log}");
}

#[tokio::test]
async fn the_store_may_speak_tls_and_ask_for_a_password() {
    let identity = Identity::of("localhost");
    let [cert, key, root] = ["cert.pem", "key.pem", "root.pem"].map(|name| identity.file(name));
    let store = Store::guarded(&cert, &key, "correct-horse").await;
    let url = format!("rediss://localhost:{}", store.address.port());
    let config = |ca: &str| {
        format!("shared: {{ max_replicas: 2, url: '{url}', password: {{ env: STORE_PASSWORD }}, ca_file: {ca} }}")
    };
    assert!(comes_to_lend(&config(&root), "correct-horse").await.0);
    for (ca, password) in [(root.as_str(), "wrong-horse"), ("null", "correct-horse")] {
        let (lends, log) = comes_to_lend(&config(ca), password).await;
        assert!(!lends && log.contains("cut off from the shared store"), "{log}");
        assert!(!log.contains("horse"), "{log}");
    }
}

#[tokio::test]
async fn what_is_wrong_with_the_store_is_said_in_the_words_of_the_runbook() {
    let runbook = include_str!("../../deploy/RUNBOOK.md");
    let upstream = Simulator::start(&[]).await;
    for (wrong, login, word) in [
        ("CONFIG SET requirepass right", "", "unauthenticated"),
        (
            "CONFIG SET requirepass right",
            ", password: { env: WRONG }",
            "AuthenticationFailed",
        ),
        (
            "ACL SETUSER me on >right ~* +ping",
            ", username: me, password: { env: RIGHT }",
            "NoPerm",
        ),
        ("REPLICAOF 127.0.0.1 1", "", "ReadOnly"),
        ("CONFIG SET maxmemory 1", "", "OOM"),
    ] {
        let store = Store::start().await;
        store.must(&wrong.split(' ').collect::<Vec<_>>());
        let config = format!(
            "shared: {{ max_replicas: 3, url: \"redis://{}\"{login} }}",
            store.address
        );
        let env = [("RIGHT", "right"), ("WRONG", "wrong")];
        let gateway = Gateway::start_with_env(&upstream.url, &config, &env).await;
        let log = gateway.logged("cut off from the shared store", 1).await;
        let line = log.lines().find(|line| line.contains("cut off from the shared store"));
        assert!(line.is_some_and(|line| line.contains(word)), "{word}: {log}");
        assert!(runbook.contains(&format!("`{word}`")), "{word}");
    }
}
