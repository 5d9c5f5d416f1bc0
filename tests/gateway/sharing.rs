//! Replicas that share answers and flights: what one has fetched is there for all, one asks for all, and no store,
//! whatever becomes of it, is in anybody's way. Real gateways, a real Redis server, and a link between each and the
//! store.

use std::net::SocketAddr;
use std::time::Duration;

use http::Method;
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::harness::client::{bare, over, poll_request, try_request};
use crate::harness::store::{Carries, Link, Store};
use crate::harness::{Gateway, KEY, PATIENCE, Reply, Simulator, poll, poll_as, request, until};

const SECOND: Duration = Duration::from_secs(1);
const OTHER_KEY: &str = "ak_test_0000000000000000000000000002";

/// A busy machine may hold up the replies about the budget for 66 ms: no claim is given back for it.
const PATIENT: &str = "budget: { margin: 200ms }";
/// The same, and in nobody's way, for tests of what is kept.
const QUICK: &str = "budget: { limit: 100000, margin: 200ms }";

/// Flights that wait for their turn, or for a permit.
const QUEUE: &str = "crun_gateway_budget_queue_length{account=\"other\",lane=\"foreground\"}";

/// Replicas that share a store.
struct Replicas {
    upstream: Simulator,
    store: Option<Store>,
    links: Vec<Link>,
    gateways: Vec<Gateway>,
}

impl Replicas {
    /// So many, with `more` configuration.
    async fn start(replicas: usize, upstream: &[&str], more: &str) -> Self {
        let mut started = Self {
            upstream: Simulator::start(upstream).await,
            store: Some(Store::start().await),
            links: Vec::new(),
            gateways: Vec::new(),
        };
        for _ in 0..replicas {
            started.add(replicas, "", more).await;
        }
        started.all_share().await;
        started
    }

    /// Of answers that come at once, whatever the pace.
    async fn quick(replicas: usize) -> Self {
        Self::start(replicas, &["--limit", "1000000", "--latency", "1ms"], QUICK).await
    }

    /// One more, with more fields of `shared`. A busy machine may hold up a call for a second: no flight is alone for it.
    async fn add(&mut self, max_replicas: usize, shared: &str, more: &str) {
        let link = Link::to(self.store().address);
        let url = link.address;
        let store = format!("url: 'redis://{url}', timeout: 1s");
        let config = format!("shared: {{ max_replicas: {max_replicas}, {store}{shared} }}\n{more}");
        self.gateways.push(Gateway::start(&self.upstream.url, &config).await);
        self.links.push(link);
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    /// Waits until all share the budget, answers and flights.
    async fn all_share(&self) {
        for replica in 0..self.gateways.len() {
            self.shows(replica, "crun_gateway_shared_cache_up", 1.0).await;
            self.shows(replica, "crun_gateway_shared_standing{standing=\"lending\"}", 1.0)
                .await;
        }
    }

    /// Waits until a series of a replica's is this.
    async fn shows(&self, replica: usize, series: &str, value: f64) {
        self.gateways[replica].shows(series, value).await;
    }

    async fn all_show(&self, series: &str, value: f64) {
        for replica in 0..self.gateways.len() {
            self.shows(replica, series, value).await;
        }
    }

    /// Waits until so many answers are published by a replica.
    async fn wrote(&self, replica: usize, answers: u32) {
        let series = "crun_gateway_shared_cache_writes_total{result=\"stored\"}";
        self.shows(replica, series, answers.into()).await;
    }

    async fn poll(&self, replica: usize, task: &str) -> Reply {
        timeout(PATIENCE, poll(self.gateways[replica].address, task))
            .await
            .expect("an answer in time")
    }

    /// Polls a replica of an upstream that is gone until its breaker is open.
    async fn finds_upstream_away(&self, replica: usize) {
        let patience = Instant::now() + PATIENCE;
        while self.gateways[replica]
            .metric("crun_gateway_upstream_breaker_open")
            .await
            < 0.5
        {
            assert!(Instant::now() < patience);
            let _ = self.poll(replica, "ended.unknown").await;
        }
    }

    /// What a script says on the server.
    fn eval(&self, script: &str) -> String {
        self.store().command(&["EVAL", script, "0"]).unwrap()
    }

    fn carry(&self, carries: Carries) {
        for link in &self.links {
            link.set(carries);
        }
    }

    async fn assert_within_the_limit(&self) {
        let stats = self.upstream.stats().await;
        assert_eq!(stats["violations"], 0, "{stats}");
    }
}

fn is_hit(reply: &Reply) -> bool {
    reply.header("cache-status").unwrap().contains("; hit")
}

#[track_caller]
fn assert_tells_of(reply: &Reply, task: &str) {
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.json()["data"]["task_id"], task);
}

/// Polls `task` at these addresses, from a hundred clients each.
fn hundreds(addresses: impl IntoIterator<Item = SocketAddr>, task: &'static str) -> JoinSet<anyhow::Result<Reply>> {
    let mut clients = JoinSet::new();
    for address in addresses {
        for _ in 0..100 {
            clients.spawn(try_request(address, poll_request(KEY, task)));
        }
    }
    clients
}

#[tokio::test]
async fn hundreds_of_polls_at_three_replicas_make_one_upstream_call() {
    let replicas = Replicas::start(3, &["--latency", "300ms"], PATIENT).await;
    let addresses: Vec<_> = replicas.gateways.iter().map(|gateway| gateway.address).collect();
    for task in ["ended.a", "running.b", "http-404.c"] {
        let before = replicas.upstream.queries().await;
        let replies = timeout(PATIENCE, hundreds(addresses.clone(), task).join_all())
            .await
            .unwrap();
        let replies: Vec<_> = replies.into_iter().map(Result::unwrap).collect();
        assert_eq!(replies.len(), 300);
        assert!(replies.iter().all(|reply| reply.body == replies[0].body), "{task}");
        assert_eq!(replicas.upstream.queries().await - before, 1, "{task}");
    }
}

#[tokio::test]
async fn when_the_replica_that_asks_is_killed_another_asks_and_everybody_is_answered() {
    let mut replicas = Replicas::start(3, &[], PATIENT).await;
    let address = replicas.gateways[0].address;
    let first = hundreds([address], "slow-3s.a");
    replicas
        .shows(0, "crun_gateway_shared_flights_total{whose=\"ours\"}", 1.0)
        .await;
    let others = hundreds(
        replicas.gateways[1..].iter().map(|gateway| gateway.address),
        "slow-3s.a",
    );
    for replica in [1, 2] {
        replicas
            .shows(replica, "crun_gateway_shared_flights_total{whose=\"theirs\"}", 1.0)
            .await;
    }
    // It has claimed the flight; that it has asked, upstream knows.
    replicas.upstream.asked(1).await;
    let killed = Instant::now();
    replicas.gateways.remove(0).kill().await;
    drop(first);
    let replies = timeout(PATIENCE, others.join_all()).await.unwrap();
    // The claim lapses after 2 s, and upstream takes 3 s.
    assert!(killed.elapsed() < 8 * SECOND, "{:?}", killed.elapsed());
    assert_eq!(replies.len(), 200);
    for reply in replies {
        assert_tells_of(&reply.unwrap(), "slow-3s.a");
    }
    assert_eq!(replicas.upstream.queries().await, 2);
}

#[tokio::test]
async fn what_may_not_be_shared_is_fetched_by_the_others_at_the_same_time() {
    let replicas = Replicas::start(3, &["--latency", "3s"], PATIENT).await;
    let asked = Instant::now();
    let first = hundreds([replicas.gateways[0].address], "http-500.a");
    replicas
        .shows(0, "crun_gateway_shared_flights_total{whose=\"ours\"}", 1.0)
        .await;
    let others = hundreds(
        replicas.gateways[1..].iter().map(|gateway| gateway.address),
        "http-500.a",
    );
    for clients in [first, others] {
        for reply in timeout(PATIENCE, clients.join_all()).await.unwrap() {
            assert_eq!(reply.unwrap().status, 500);
        }
    }
    // One after the other they would take 9 s.
    assert!(asked.elapsed() < 8 * SECOND, "{:?}", asked.elapsed());
    assert_eq!(replicas.upstream.queries().await, 3);
    for replica in [1, 2] {
        for whose in ["theirs", "alone"] {
            let series = format!("crun_gateway_shared_flights_total{{whose=\"{whose}\"}}");
            replicas.shows(replica, &series, 1.0).await;
        }
    }
}

#[tokio::test]
async fn a_replica_that_stands_still_while_it_asks_is_not_waited_for() {
    let replicas = Replicas::start(2, &[], PATIENT).await;
    let first = tokio::spawn(try_request(
        replicas.gateways[0].address,
        poll_request(KEY, "slow-2s.a"),
    ));
    replicas
        .shows(0, "crun_gateway_shared_flights_total{whose=\"ours\"}", 1.0)
        .await;
    replicas.gateways[0].signal(Signal::SIGSTOP);
    let begun = Instant::now();
    assert_tells_of(&replicas.poll(1, "slow-2s.a").await, "slow-2s.a");
    assert!(begun.elapsed() < 8 * SECOND, "{:?}", begun.elapsed());
    replicas.gateways[0].signal(Signal::SIGCONT);
    let reply = timeout(PATIENCE, first).await.unwrap().unwrap().unwrap();
    assert_tells_of(&reply, "slow-2s.a");
    let queries = replicas.upstream.queries().await;
    let logs = || replicas.gateways.iter().map(Gateway::log).collect::<String>();
    assert!(queries <= 2, "{queries}: {}", logs());
    replicas.assert_within_the_limit().await;
}

#[tokio::test]
async fn a_replica_that_has_just_started_keeps_nobody_from_asking_elsewhere() {
    // Whoever has just started waits for longer than the other needs, be the machine busy.
    let waits_long = "budget: { limit: 100000, margin: 2s }";
    let mut replicas = Replicas::start(1, &[], waits_long).await;
    replicas.add(1, "", waits_long).await;
    let started = replicas.gateways[1].address;
    let first = tokio::spawn(poll(started, "ended.a"));
    replicas.shows(1, QUEUE, 1.0).await;
    assert_tells_of(&replicas.poll(0, "ended.a").await, "ended.a");
    let waits = "crun_gateway_shared_standing{standing=\"waiting\"}";
    assert!(replicas.gateways[1].metric(waits).await > 0.5, "it could spend by then");
    // Nor has it to ask again.
    assert_tells_of(&first.await.unwrap(), "ended.a");
    assert_eq!(replicas.upstream.queries().await, 1);
}

#[tokio::test]
async fn a_replica_that_is_told_to_stop_while_it_is_cut_off_keeps_nobody_from_asking_elsewhere() {
    let replicas = Replicas::start(2, &[], "budget: { max_wait: 20s }").await;
    // Too slow for the budget, and quick enough for answers.
    replicas.links[0].set(Carries {
        down: Duration::from_millis(15),
        ..Carries::default()
    });
    replicas
        .shows(0, "crun_gateway_shared_standing{standing=\"alone\"}", 1.0)
        .await;
    let tasks: Vec<_> = (0..30).map(|task| format!("ended.{task}")).collect();
    let polls = |replica: usize| {
        let address = replicas.gateways[replica].address;
        let polls = tasks.iter().map(|task| try_request(address, poll_request(KEY, task)));
        polls.map(tokio::spawn).collect::<Vec<_>>()
    };
    let queued = polls(0);
    replicas.shows(0, QUEUE, 25.0).await;
    replicas.gateways[0].terminate();
    replicas
        .shows(0, "crun_gateway_shared_standing{standing=\"cut_off\"}", 1.0)
        .await;
    let asked = Instant::now();
    for poll in polls(1) {
        assert_eq!(poll.await.unwrap().unwrap().status, 200);
    }
    // They are asked for at 8/s.
    assert!(asked.elapsed() < 10 * SECOND, "{:?}", asked.elapsed());
    drop(queued);
}

#[tokio::test]
async fn what_one_replica_fetched_is_a_hit_at_the_others() {
    let replicas = Replicas::quick(3).await;
    let tasks = [
        "ended.a",
        "ended-failed.b",
        "running.c",
        "http-404.d",
        "body-404.e",
        "media-info.f",
        "no-content-type.g",
    ];
    for (number, task) in (1..).zip(tasks) {
        let own = replicas.poll(0, task).await;
        assert!(!is_hit(&own), "{own:?}");
        replicas.wrote(0, number).await;
        for replica in [1, 2] {
            let theirs = replicas.poll(replica, task).await;
            assert!(is_hit(&theirs), "{task}: {theirs:?}");
            assert_eq!((theirs.status, &theirs.body), (own.status, &own.body));
            assert_eq!(theirs.header("content-type"), own.header("content-type"));
        }
    }
    assert_eq!(replicas.upstream.queries().await, tasks.len() as u64);
    // Twice, and from memory the second time.
    assert!(is_hit(&replicas.poll(1, "ended.a").await));
    let hits = replicas.gateways[1]
        .metric("crun_gateway_shared_cache_reads_total{result=\"hit\"}")
        .await;
    assert!((hits - tasks.len() as f64).abs() < 0.1, "{hits}");
    let saved = replicas.gateways[1]
        .metric("crun_gateway_upstream_calls_saved_total{account=\"other\",how=\"hit\"}")
        .await;
    assert!((saved - (tasks.len() + 1) as f64).abs() < 0.1, "{saved}");
}

#[tokio::test]
async fn a_live_answer_is_as_old_everywhere_as_it_is() {
    let replicas = Replicas::quick(2).await;
    let fetched = Instant::now();
    replicas.poll(0, "running.a").await;
    replicas.wrote(0, 1).await;
    // The floor is 2 s, and one task does not stretch it.
    let old_enough = fetched + Duration::from_millis(1200);
    tokio::time::sleep_until(old_enough).await;
    let theirs = replicas.poll(1, "running.a").await;
    if fetched.elapsed() < 2 * SECOND {
        assert!(is_hit(&theirs) && theirs.header("age") == Some("1"), "{theirs:?}");
    }
    tokio::time::sleep_until(fetched + Duration::from_millis(2300)).await;
    let refetched = replicas.poll(1, "running.a").await;
    assert!(
        refetched.header("cache-status").unwrap().contains("fwd=stale"),
        "{refetched:?}"
    );
    replicas.wrote(1, 1).await;
    // Memory has a stale one here, and the store a fresher.
    let theirs = replicas.poll(0, "running.a").await;
    assert!(is_hit(&theirs) && theirs.header("age") == Some("0"), "{theirs:?}");
    assert_eq!(replicas.upstream.queries().await, 2);
}

#[tokio::test]
async fn an_account_and_a_prefix_keep_to_themselves() {
    let mut replicas = Replicas::quick(1).await;
    replicas.add(2, ", prefix: 'other:'", QUICK).await;
    replicas.add(2, "", QUICK).await;
    replicas.all_share().await;
    replicas.poll(0, "ended.a").await;
    replicas.wrote(0, 1).await;
    let another = poll_as(replicas.gateways[2].address, OTHER_KEY, "ended.a").await;
    assert!(!is_hit(&another), "another account's");
    assert_eq!(replicas.upstream.queries().await, 2);
    replicas.wrote(2, 1).await;
    assert!(!is_hit(&replicas.poll(1, "ended.a").await), "under another prefix");
    assert_eq!(replicas.upstream.queries().await, 3);
    replicas.wrote(1, 1).await;
    // Nor where somebody moves them: the first account's to the second's place, and to the other prefix.
    let moved = replicas.eval(
        "local all = redis.call('KEYS', 'crun-gateway:answer:*')
         local other = redis.call('KEYS', 'other:answer:*')[1]
         local first = redis.call('GET', all[1])
         redis.call('SET', all[1], redis.call('GET', all[2]), 'KEEPTTL')
         redis.call('SET', all[2], first, 'KEEPTTL')
         redis.call('SET', other, first, 'KEEPTTL')
         return #all",
    );
    assert_eq!(moved, ":2\r\n");
    replicas.add(2, ", prefix: 'other:'", QUICK).await;
    replicas.add(2, "", QUICK).await;
    replicas.all_share().await;
    for (replica, key) in [(3, KEY), (4, KEY), (4, OTHER_KEY)] {
        let reply = poll_as(replicas.gateways[replica].address, key, "ended.a").await;
        assert!(!is_hit(&reply), "{reply:?}");
        assert_tells_of(&reply, "ended.a");
    }
    assert_eq!(replicas.upstream.queries().await, 6);
    let doubtful = "crun_gateway_shared_cache_reads_total{result=\"doubtful\"}";
    assert!(replicas.gateways[3].metric(doubtful).await >= 1.0);
    assert!(replicas.gateways[4].metric(doubtful).await >= 2.0);
}

#[tokio::test]
async fn whatever_was_changed_in_the_store_is_a_miss_counted_and_mended() {
    let replicas = Replicas::quick(3).await;
    let changes = [
        (
            "a byte",
            "local v = value; return string.sub(v, 1, 200) .. string.char((string.byte(v, 201) + 1) % 256) .. string.sub(v, 202)",
        ),
        (
            "the last byte",
            "return string.sub(value, 1, -2) .. string.char((string.byte(value, -1) + 1) % 256)",
        ),
        ("cut short", "return string.sub(value, 1, -2)"),
        ("cut to its label", "return string.sub(value, 1, 30)"),
        ("a byte more", "return value .. 'x'"),
        (
            "the version",
            "return (string.gsub(value, '^(%d %d %d+ %d+ ).', '%1\\2'))",
        ),
        ("the stage", "return '3' .. string.sub(value, 2)"),
        (
            "asked in a thousand years",
            "return (string.gsub(value, '^(%d %d) %d+', '%1 99999999999999'))",
        ),
        (
            "received later",
            "return (string.gsub(value, '^(%d %d %d+) %d+', '%1 99999999999999'))",
        ),
        ("nonsense", "return 'nonsense'"),
        ("nothing", "return ''"),
    ];
    for (number, (what, change)) in (1..).zip(changes) {
        let task = format!("ended.{number}");
        replicas.poll(0, &task).await;
        replicas.wrote(0, number).await;
        let done = replicas.eval(&format!(
            "local key = redis.call('KEYS', '*answer:*')[1]
             local function change(value) {change} end
             redis.call('SET', key, change(redis.call('GET', key)), 'KEEPTTL')
             return 1"
        ));
        assert_eq!(done, ":1\r\n", "{what}");
        let own = replicas.poll(1, &task).await;
        assert!(!is_hit(&own), "{what}: {own:?}");
        assert_tells_of(&own, &task);
        assert_eq!(replicas.upstream.queries().await, 2 * u64::from(number), "{what}");
        replicas.wrote(1, number).await;
        assert!(is_hit(&replicas.poll(2, &task).await), "{what}: mended");
        replicas.eval("for _, key in ipairs(redis.call('KEYS', '*answer:*')) do redis.call('DEL', key) end");
    }
    let doubtful = replicas.gateways[1]
        .metric("crun_gateway_shared_cache_reads_total{result=\"doubtful\"}")
        .await;
    // An empty value is as good as none.
    assert!(doubtful >= (changes.len() - 1) as f64, "{doubtful}");
    // Another kind of value, under both names.
    replicas.poll(0, "ended.kind").await;
    replicas.wrote(0, u32::try_from(changes.len()).unwrap() + 1).await;
    replicas.eval(
        "local key = redis.call('KEYS', '*answer:*')[1]
         redis.call('DEL', key)
         redis.call('RPUSH', key, 'x')
         redis.call('RPUSH', (string.gsub(key, 'answer', 'flight')), 'x')
         return 1",
    );
    assert_tells_of(&replicas.poll(1, "ended.kind").await, "ended.kind");
    assert!(is_hit(&replicas.poll(2, "ended.kind").await), "mended");
}

#[tokio::test]
async fn the_store_holds_no_key_no_task_and_nothing_for_ever() {
    let replicas = Replicas::start(2, &["--latency", "1ms"], PATIENT).await;
    let claimed = tokio::spawn(try_request(
        replicas.gateways[0].address,
        poll_request(KEY, "slow-2s.secret-task"),
    ));
    for task in ["ended.secret-task", "running.secret-task", "http-404.secret-task"] {
        replicas.poll(0, task).await;
        replicas.poll(1, task).await;
    }
    replicas.wrote(0, 3).await;
    let found = replicas.eval(&format!(
        "local kinds = {{}}
         for _, key in ipairs(redis.call('KEYS', '*')) do
           local value = redis.call('DUMP', key)
           if redis.call('TYPE', key).ok == 'string' then value = redis.call('GET', key) end
           local ttl = redis.call('PTTL', key)
           for _, secret in ipairs({{'{KEY}', string.sub('{KEY}', 8), 'secret-task', 'task_id', 'status'}}) do
             if string.find(key .. value, secret, 1, true) then return key .. ' tells ' .. secret end
           end
           if ttl <= 0 or ttl > 8 * 86400000 then return key .. ' stays for ' .. ttl end
           kinds[string.match(key, '^crun%-gateway:(%l+)')] = true
         end
         local names = {{}}
         for kind in pairs(kinds) do table.insert(names, kind) end
         table.sort(names)
         return table.concat(names, ' ')"
    ));
    // `written` is short-lived, and may be gone.
    assert!(
        ["answer budget flight", "answer budget flight written"]
            .iter()
            .any(|kinds| found.contains(&format!("\r\n{kinds}\r\n"))),
        "{found}"
    );
    claimed.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_poll_that_may_not_fly_is_answered_by_what_another_replica_has() {
    let mut replicas = Replicas::start(2, &["--latency", "1ms"], PATIENT).await;
    replicas.poll(0, "ended.a").await;
    replicas.poll(0, "running.b").await;
    replicas.wrote(0, 2).await;
    let upstream = std::mem::replace(&mut replicas.upstream, Simulator::start(&[]).await);
    let _port = upstream.gone().await;
    replicas.finds_upstream_away(1).await;
    assert!(is_hit(&replicas.poll(1, "ended.a").await));
    let snapshot = replicas.poll(1, "running.b").await;
    assert_tells_of(&snapshot, "running.b");
    assert_ne!(replicas.poll(1, "ended.unknown").await.status, 200);
}

#[tokio::test]
async fn a_stale_answer_in_memory_hides_nothing_from_a_poll_that_may_not_fly() {
    let mut replicas = Replicas::start(2, &["--latency", "1ms", "--run-time", "1s"], PATIENT).await;
    let has_ended = |reply: &Reply| reply.json()["data"]["status"] == "success";
    for (key, task) in [(KEY, "runs.a"), (OTHER_KEY, "runs.b")] {
        let live = poll_as(replicas.gateways[1].address, key, task).await;
        assert!(live.status == 200 && !has_ended(&live), "{live:?}");
        // Fresh for 2 s, and ended by then.
        let address = replicas.gateways[0].address;
        until("it ends", async || has_ended(&poll_as(address, key, task).await)).await;
    }
    replicas.wrote(0, 2).await;
    let unpaid = poll_as(replicas.gateways[1].address, OTHER_KEY, "http-402.c").await;
    assert_eq!(unpaid.status, 402, "{unpaid:?}");
    let theirs = poll_as(replicas.gateways[1].address, OTHER_KEY, "runs.b").await;
    assert!(is_hit(&theirs) && has_ended(&theirs), "without credits: {theirs:?}");
    let upstream = std::mem::replace(&mut replicas.upstream, Simulator::start(&[]).await);
    let _port = upstream.gone().await;
    replicas.finds_upstream_away(1).await;
    let theirs = replicas.poll(1, "runs.a").await;
    assert!(is_hit(&theirs) && has_ended(&theirs), "in an outage: {theirs:?}");
}

#[tokio::test]
async fn whoever_has_a_snapshot_in_the_store_only_is_not_kept_waiting_by_a_slow_upstream() {
    let replicas = Replicas::quick(3).await;
    replicas.poll(0, "running.a").await;
    replicas.poll(0, "running.b").await;
    let fetched = Instant::now();
    replicas.wrote(0, 2).await;
    tokio::time::sleep_until(fetched + Duration::from_millis(2300)).await;
    let refetched = replicas.poll(1, "running.b").await;
    let status = refetched.header("cache-status").unwrap();
    assert!(status.contains("fwd=stale"), "it was kept, and stale: {status}");
    replicas.upstream.signal(Signal::SIGSTOP);
    // One asks, and the other waits for what that brings.
    let [asks, waits] = [1, 2].map(|replica| tokio::spawn(poll(replicas.gateways[replica].address, "running.a")));
    for polled in [asks, waits] {
        let snapshot = timeout(PATIENCE, polled).await.unwrap().unwrap();
        assert_tells_of(&snapshot, "running.a");
        let status = snapshot.header("cache-status").unwrap();
        assert!(status.ends_with("detail=upstream_slow"), "{status}");
    }
    replicas.upstream.signal(Signal::SIGCONT);
}

#[tokio::test]
async fn who_waits_for_a_replica_that_upstream_keeps_waiting_is_not_told_that_the_budget_is_spent() {
    let replicas = Replicas::start(2, &[], "budget: { max_wait: 2s, margin: 200ms }").await;
    let asks = tokio::spawn(poll(replicas.gateways[0].address, "hang.a"));
    let flights = |whose| format!("crun_gateway_shared_flights_total{{whose=\"{whose}\"}}");
    replicas.shows(0, &flights("ours"), 1.0).await;
    let waits = replicas.poll(1, "hang.a").await;
    replicas.shows(1, &flights("theirs"), 1.0).await;
    for reply in [waits, asks.await.unwrap()] {
        reply.assert_is_our_error(504);
        assert!(
            reply.header("proxy-status").unwrap().contains("http_response_timeout"),
            "{reply:?}"
        );
    }
}

#[tokio::test]
async fn an_ended_task_taken_over_from_another_replica_outlives_the_process_too() {
    let mut replicas = Replicas::quick(1).await;
    let directory = tempfile::tempdir().unwrap();
    let on_disk = format!(
        "{QUICK}\ncache: {{ disk: '{}' }}",
        directory.path().join("answers").display()
    );
    replicas.add(2, "", &on_disk).await;
    replicas.all_share().await;
    replicas.poll(0, "ended.a").await;
    replicas.poll(0, "running.b").await;
    replicas.wrote(0, 2).await;
    assert!(is_hit(&replicas.poll(1, "ended.a").await));
    assert!(is_hit(&replicas.poll(1, "running.b").await));
    replicas.shows(1, "crun_gateway_disk_entries", 1.0).await;
    let mut stopped = replicas.gateways.pop().unwrap();
    stopped.terminate();
    stopped.exit().await;
    replicas.links.pop();
    replicas.store().must(&["FLUSHALL"]);
    replicas.add(2, "", &on_disk).await;
    assert!(is_hit(&replicas.poll(1, "ended.a").await));
    assert_eq!(replicas.upstream.queries().await, 2);
}

/// What 200 polls in turn took, of which each needs no permit; the slowest but two.
async fn p99(address: SocketAddr, task: &str) -> Duration {
    let mut took = Vec::new();
    for _ in 0..200 {
        let begun = Instant::now();
        let reply = poll(address, task).await;
        took.push(begun.elapsed());
        assert_tells_of(&reply, task);
    }
    took.sort_unstable();
    took[197]
}

/// Polls for ever, and says who is not answered.
async fn poll_new_tasks(address: SocketAddr, replica: usize) {
    for number in 0.. {
        let task = format!("ended.{replica}-{number}");
        let reply = timeout(15 * SECOND, poll(address, &task))
            .await
            .expect("an answer in time");
        assert_tells_of(&reply, &task);
    }
}

#[tokio::test]
async fn whatever_becomes_of_the_store_polls_are_answered_and_nobody_waits_for_it() {
    let mut replicas = Replicas::start(3, &["--latency", "20ms"], PATIENT).await;
    for replica in 0..3 {
        replicas.poll(replica, "ended.kept").await;
    }
    let mut clients = JoinSet::new();
    for (replica, gateway) in replicas.gateways.iter().enumerate() {
        clients.spawn(poll_new_tasks(gateway.address, replica));
    }
    let well = p99(replicas.gateways[0].address, "ended.kept").await;
    let up = "crun_gateway_shared_cache_up";
    let slow = Carries {
        up: 5 * SECOND / 2,
        down: 5 * SECOND / 2,
        ..Carries::default()
    };
    let cut = Carries {
        is_cut: true,
        ..Carries::default()
    };
    for fault in ["killed", "frozen", "slow by 5 s", "cut", "full", "read-only", "flushed"] {
        match fault {
            "killed" => {
                let address = replicas.store.take().unwrap().kill().await;
                replicas.all_show(up, 0.0).await;
                let suffers = p99(replicas.gateways[0].address, "ended.kept").await;
                assert!(suffers < well + Duration::from_millis(50), "{fault}: {suffers:?}");
                replicas.store = Some(Store::start_at(address).await);
                replicas.all_show(up, 1.0).await;
                continue;
            }
            "frozen" => replicas.store().signal(Signal::SIGSTOP),
            "slow by 5 s" => replicas.carry(slow),
            "cut" => replicas.carry(cut),
            "full" => replicas.store().must(&["CONFIG", "SET", "maxmemory", "1"]),
            "read-only" => replicas.store().must(&["REPLICAOF", "127.0.0.1", "1"]),
            _ => replicas.store().must(&["FLUSHALL"]),
        }
        if fault != "flushed" {
            replicas.all_show(up, 0.0).await;
        }
        let suffers = p99(replicas.gateways[0].address, "ended.kept").await;
        eprintln!("{fault}: {suffers:?}, {well:?} before");
        assert!(suffers < well + Duration::from_millis(50), "{fault}: {suffers:?}");
        match fault {
            "frozen" => replicas.store().signal(Signal::SIGCONT),
            "slow by 5 s" | "cut" => replicas.carry(Carries::default()),
            "full" => replicas.store().must(&["CONFIG", "SET", "maxmemory", "0"]),
            "read-only" => replicas.store().must(&["REPLICAOF", "NO", "ONE"]),
            _ => {}
        }
        replicas.all_show(up, 1.0).await;
    }
    // Nobody was left without an answer so far, and nobody is now.
    assert!(clients.try_join_next().is_none());
    replicas.assert_within_the_limit().await;
    clients.abort_all();
    replicas.all_share().await;
    replicas.poll(0, "ended.after").await;
    let stored = async {
        while !is_hit(&replicas.poll(1, "ended.after").await) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, stored).await.unwrap();
}

#[tokio::test]
async fn a_store_that_comes_and_goes_costs_a_poll_that_may_not_fly_fifty_milliseconds() {
    let mut replicas = Replicas::start(1, &["--latency", "1ms"], PATIENT).await;
    let upstream = std::mem::replace(&mut replicas.upstream, Simulator::start(&[]).await);
    let _port = upstream.gone().await;
    let address = replicas.gateways[0].address;
    replicas.finds_upstream_away(0).await;
    // Each asks the store, and the store comes and goes: the worst that can be.
    let link = &replicas.links[0];
    let (mut took, mut others) = (Vec::new(), Vec::new());
    for round in 0..100 {
        let down = if round % 2 == 0 { 5 * SECOND } else { Duration::ZERO };
        link.set(Carries {
            down,
            ..Carries::default()
        });
        for _ in 0..3 {
            let begun = Instant::now();
            let reply = poll(address, "ended.unknown").await;
            took.push(begun.elapsed());
            assert_ne!(reply.status, 200);
            // What the machine does to a request that asks nobody.
            let begun = Instant::now();
            assert_eq!(request(address, bare(Method::GET, "/nothing")).await.status, 404);
            others.push(begun.elapsed());
        }
    }
    let [p99, other] = [took, others].map(|mut took| {
        took.sort_unstable();
        took[took.len() * 99 / 100]
    });
    assert!(p99 < other + Duration::from_millis(50), "{p99:?}, others {other:?}");
}

#[tokio::test]
async fn a_store_whose_replies_are_late_for_a_second_is_away_until_they_are_not() {
    let replicas = Replicas::quick(1).await;
    let (gateway, up) = (&replicas.gateways[0], "crun_gateway_shared_cache_up");
    // Nobody waits so long for an answer, and no call is given up for it.
    replicas.carry(Carries {
        down: Duration::from_millis(100),
        ..Carries::default()
    });
    let begun = Instant::now();
    let mut task = 0;
    while gateway.metric(up).await > 0.5 {
        assert!(begun.elapsed() < PATIENCE, "{}", gateway.log());
        assert_eq!(replicas.poll(0, &format!("ended.{task}")).await.status, 200);
        task += 1;
    }
    assert!(begun.elapsed() >= SECOND, "{:?}", begun.elapsed());
    gateway.logged("no reply within 40ms for 1s", 1).await;
    replicas.carry(Carries::default());
    replicas.shows(0, up, 1.0).await;
}

/// How many calls a replica has had replies to.
async fn counted(gateway: &Gateway) -> f64 {
    let (_, text) = gateway.admin("/metrics").await;
    let is_counted = |line: &&str| {
        let families = ["cache_reads", "cache_writes", "flights", "calls"];
        let without = ["\"away\"", "\"dropped\"", "\"alone\"", "\"no_reply\""];
        families
            .iter()
            .any(|of| line.starts_with(&format!("crun_gateway_shared_{of}_total{{")))
            && !without.iter().any(|result| line.contains(result))
    };
    let values = text
        .lines()
        .filter(is_counted)
        .map(|line| line.rsplit_once(' ').unwrap().1);
    values.map(|value| value.parse::<f64>().unwrap()).sum()
}

#[tokio::test]
async fn ten_thousand_polls_that_leave_while_the_store_is_asked_mix_nothing_up() {
    const TASKS: usize = 200;
    // Memory for a part of those who stay, so that most come from the store.
    let more = "budget: { limit: 100000, margin: 200ms }\ncache: { max_bytes: 1MiB }";
    let replicas = Replicas::start(2, &["--limit", "1000000", "--latency", "1ms"], more).await;
    let [leaving, staying] =
        ["leaving", "staying"].map(|who| move |number| format!("big-8KiB.{who}-{}", number % TASKS));
    for number in 0..TASKS {
        replicas.poll(0, &leaving(number)).await;
        replicas.poll(0, &staying(number)).await;
    }
    replicas.wrote(0, 2 * u32::try_from(TASKS).unwrap()).await;
    // Replies are on their way for longer than most of the polls stay.
    let slow = Carries {
        down: Duration::from_millis(10),
        ..Carries::default()
    };
    replicas.carry(slow);
    let address = replicas.gateways[1].address;
    let mut clients = JoinSet::new();
    for client in 0..20 {
        clients.spawn(async move {
            for number in 0.. {
                let task = leaving(client * 10 + number);
                let stream = TcpStream::connect(address).await.unwrap();
                let polls = over(stream, poll_request(KEY, &task));
                if let Ok(reply) = timeout(Duration::from_millis(2 + number as u64 % 8), polls).await {
                    assert_tells_of(&reply.unwrap(), &task);
                }
                if number % 8 == 0 {
                    let task = staying(client * 31 + number * 11);
                    assert_tells_of(&poll(address, &task).await, &task);
                }
            }
        });
    }
    let reads = |result| format!("crun_gateway_shared_cache_reads_total{{result=\"{result}\"}}");
    let patience = Instant::now() + 4 * PATIENCE;
    let (mut abandoned, mut hits) = (0.0, 0.0);
    while abandoned < 10_000.0 || hits < 500.0 {
        assert!(
            Instant::now() < patience,
            "{abandoned} calls abandoned, {hits} answers from the store"
        );
        sleep(SECOND / 2).await;
        assert!(clients.try_join_next().is_none(), "an answer told of another task");
        let script = "return string.match(redis.call('INFO', 'commandstats'), 'cmdstat_evalsha:calls=(%d+)')";
        let (first, second) = (
            counted(&replicas.gateways[0]).await,
            counted(&replicas.gateways[1]).await,
        );
        let calls = replicas.eval(script);
        abandoned = calls.lines().nth(1).unwrap().parse::<f64>().unwrap() - first - second;
        hits = replicas.gateways[1].metric(&reads("hit")).await;
    }
    assert!(replicas.gateways[1].metric(&reads("doubtful")).await < 0.5);
}

#[tokio::test]
async fn answers_that_nobody_reads_make_room_and_the_store_never_holds_more_than_it_may() {
    let mut replicas = Replicas::quick(0).await;
    replicas.add(1, ", max_bytes: 4MiB", QUICK).await;
    replicas.all_share().await;
    let used = |replicas: &Replicas| {
        let info = replicas.eval("return string.match(redis.call('INFO', 'memory'), 'used_memory:(%d+)')");
        info.lines().nth(1).unwrap().parse::<u64>().unwrap()
    };
    for number in 0..150 {
        assert_eq!(replicas.poll(0, &format!("big-60KiB.{number}")).await.status, 200);
        // One answer more than it may, and what connections need for it.
        assert!(
            used(&replicas) < (4 << 20) + (512 << 10),
            "{number}: {}",
            used(&replicas)
        );
    }
    let wrote = |result| format!("crun_gateway_shared_cache_writes_total{{result=\"{result}\"}}");
    let gateway = &replicas.gateways[0];
    let evicted = gateway.metric("crun_gateway_shared_cache_evictions_total").await;
    assert!(evicted > 50.0, "{evicted} evicted");
    assert!(gateway.metric(&wrote("stored")).await > 100.0);
    // Too large for anybody to wait behind it.
    replicas.poll(0, "big-1MiB.a").await;
    replicas.shows(0, &wrote("too_large"), 1.0).await;
    // Somebody else's need leaves no room at all: that is no fault.
    replicas.eval("redis.call('SET', 'theirs', string.rep('x', 8388608)) return 1");
    replicas.eval("for _, key in ipairs(redis.call('KEYS', '*answer:*')) do redis.call('DEL', key) end");
    replicas.poll(0, "ended.a").await;
    gateway.reaches(&wrote("full"), 1).await;
    replicas.shows(0, "crun_gateway_shared_cache_up", 1.0).await;
}

#[tokio::test]
async fn claims_that_the_server_evicts_cost_a_query_each_and_nothing_else() {
    let replicas = Replicas::start(3, &[], PATIENT).await;
    let mut clients = JoinSet::new();
    for replica in 0..3 {
        clients.spawn(try_request(
            replicas.gateways[replica].address,
            poll_request(KEY, "slow-1s.a"),
        ));
    }
    // As under any policy that evicts: all that controls anything is gone again and again, the budget's hash first.
    let evicting = async {
        loop {
            replicas.eval("for _, key in ipairs(redis.call('KEYS', '*flight:*')) do redis.call('DEL', key) end");
            sleep(Duration::from_millis(20)).await;
        }
    };
    let replies = tokio::select! {
        () = evicting => unreachable!(),
        replies = clients.join_all() => replies,
    };
    for reply in replies {
        assert_tells_of(&reply.unwrap(), "slow-1s.a");
    }
    let queries = replicas.upstream.queries().await;
    assert!((1..=3).contains(&queries), "{queries}");
    replicas.store().must(&["FLUSHALL"]);
    assert_tells_of(&replicas.poll(1, "ended.b").await, "ended.b");
    replicas.assert_within_the_limit().await;
}

#[tokio::test]
async fn a_store_may_be_for_the_budget_alone() {
    let mut replicas = Replicas::quick(0).await;
    for _ in 0..2 {
        replicas.add(2, ", max_bytes: 0", QUICK).await;
    }
    for replica in 0..2 {
        replicas
            .shows(replica, "crun_gateway_shared_standing{standing=\"lending\"}", 1.0)
            .await;
        assert_tells_of(&replicas.poll(replica, "ended.a").await, "ended.a");
    }
    assert_eq!(replicas.upstream.queries().await, 2);
    let (_, text) = replicas.gateways[0].admin("/metrics").await;
    assert!(!text.contains("crun_gateway_shared_cache"), "no such families");
}

#[tokio::test]
async fn a_user_for_the_gateway_needs_what_the_readme_says_and_no_more() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let (_, told) = readme.split_once("A user for the gateway needs the keys `").unwrap();
    let (keys, commands) = told.split_once('`').unwrap();
    let (commands, _) = commands.split_once(';').unwrap();
    let allowed = commands
        .split('`')
        .skip(1)
        .step_by(2)
        .map(|command| format!("+{}", command.replace(' ', "|")));
    let mut replicas = Replicas::quick(0).await;
    let pattern = format!("~{keys}");
    let mut rule = vec!["ACL", "SETUSER", "gateway", "on", ">correct-horse", &pattern];
    let allowed: Vec<_> = allowed.collect();
    rule.extend(allowed.iter().map(String::as_str));
    replicas.store().must(&rule);
    let password = crate::harness::process::config_file("correct-horse");
    let user = format!(
        ", username: gateway, max_bytes: 4MiB, password: {{ file: '{}' }}",
        password.path().display()
    );
    for _ in 0..2 {
        replicas.add(2, &user, QUICK).await;
    }
    // One by way of a sentinel, to another database.
    let sentinel = Store::sentinel(replicas.store()).await;
    let config = format!(
        "shared: {{ max_replicas: 1, url: 'redis+sentinel://{}/main/1'{user} }}",
        sentinel.address
    );
    replicas
        .gateways
        .push(Gateway::start(&replicas.upstream.url, &config).await);
    replicas.all_share().await;
    assert_tells_of(&replicas.poll(2, "ended.a").await, "ended.a");
    replicas.wrote(2, 1).await;
    for number in 0..100 {
        replicas.poll(0, &format!("big-60KiB.{number}")).await;
    }
    let evicted = "crun_gateway_shared_cache_evictions_total";
    assert!(replicas.gateways[0].metric(evicted).await > 1.0);
    let addresses = replicas.gateways[..2].iter().map(|gateway| gateway.address);
    let both = hundreds(addresses, "slow-1s.a");
    for reply in timeout(PATIENCE, both.join_all()).await.unwrap() {
        assert_tells_of(&reply.unwrap(), "slow-1s.a");
    }
    replicas.all_share().await;
    assert_eq!(
        replicas.store().command(&["ACL", "LOG"]).as_deref(),
        Some("*0\r\n"),
        "nothing refused"
    );
}

#[tokio::test]
async fn a_store_that_tells_a_time_beyond_all_times_makes_nobody_panic() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = listener.local_addr().unwrap();
    // To every call what answers the first: a key is written, and the time is asked for.
    let most = format!("$20\r\n{}\r\n", u64::MAX);
    let says = format!("+OK\r\n*2\r\n{most}{most}");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let says = says.clone();
            tokio::spawn(async move {
                while let Ok(1..) = stream.read(&mut [0; 4096]).await {
                    stream.write_all(says.as_bytes()).await.unwrap();
                }
            });
        }
    });
    let upstream = Simulator::start(&[]).await;
    let gateway = Gateway::start(
        &upstream.url,
        &format!("shared: {{ max_replicas: 2, url: 'redis://{url}' }}"),
    )
    .await;
    gateway.reaches("crun_gateway_shared_cache_up", 1).await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    assert!(
        gateway.metric("crun_gateway_panics_total").await < 1.0,
        "{}",
        gateway.log()
    );
}
