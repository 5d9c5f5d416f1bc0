//! Clients share an account's budget fairly, and a client token stands for its account's keys.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crun_gateway::account::ApiKey;
use crun_gateway::config::{Account, Client, Key, KeySource};
use http::Method;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::harness::client::{bare, poll_request};
use crate::harness::paused::{Behaviour, Paused, goodput, most_in_a_second};
use crate::harness::raw::{self, Raw};
use crate::harness::scripted::response;
use crate::harness::{Gateway, KEY, Reply, Scripted, Simulator, TASK_INFO, poll, poll_as, request, until};

const GREEDY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
const MODEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

/// A gateway before which one client has queued a thousand tasks.
async fn with_a_greedy_client() -> (Arc<Paused>, JoinSet<()>) {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
        config.budget.max_wait = Duration::from_secs(90);
    }));
    let mut greedy = JoinSet::new();
    for task in 0..1000 {
        let gateway = Arc::clone(&gateway);
        greedy.spawn(async move {
            gateway.poll_from(GREEDY, KEY, &format!("greedy-{task}")).await;
        });
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    (gateway, greedy)
}

/// Every one of `polls`, sent at `started`, is answered 200 within 1.5 s.
async fn assert_served_soon(polls: JoinSet<Reply>, started: Instant) {
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200);
    }
    let took = started.elapsed();
    assert!(took <= Duration::from_millis(1500), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_greedy_client_cannot_starve_another() {
    let (gateway, _greedy) = with_a_greedy_client().await;
    let started = Instant::now();
    let mut modest = JoinSet::new();
    for task in 0..5 {
        let gateway = Arc::clone(&gateway);
        modest.spawn(async move { gateway.poll_from(MODEST, KEY, &format!("modest-{task}")).await });
    }
    assert_served_soon(modest, started).await;
}

#[tokio::test(start_paused = true)]
async fn a_modest_client_is_not_held_back_by_the_flight_it_joins() {
    let (gateway, _greedy) = with_a_greedy_client().await;
    let started = Instant::now();
    let mut modest = JoinSet::new();
    for task in ["modest-1", "modest-2", "modest-3", "modest-4", "greedy-900"] {
        let gateway = Arc::clone(&gateway);
        modest.spawn(async move { gateway.poll_from(MODEST, KEY, task).await });
    }
    assert_served_soon(modest, started).await;
    let arrivals = gateway.arrivals();
    assert!(most_in_a_second(&arrivals) <= 15);
}

#[tokio::test]
async fn a_greedy_client_cannot_starve_another_on_real_sockets() {
    let upstream = Simulator::start(&["--latency", "100ms"]).await;
    let gateway = Gateway::start(&upstream.url, "budget: { max_wait: \"90s\" }").await;
    let address = gateway.address;
    let named = |name: &'static str, task: String| async move {
        let mut asked = poll_request(KEY, &task);
        asked.headers_mut().insert("x-client-id", name.parse().unwrap());
        request(address, asked).await
    };
    let mut greedy = JoinSet::new();
    for task in 0..1000 {
        greedy.spawn(named("greedy", format!("ended.g{task}")));
    }
    let length = "crun_gateway_budget_queue_length{account=\"other\",lane=\"foreground\"}";
    gateway.reaches(length, 900).await;
    upstream.asked(1).await;
    let before = upstream.queries().await;
    let mut modest = JoinSet::new();
    for task in 0..5 {
        modest.spawn(named("modest", format!("ended.m{task}")));
    }
    for reply in modest.join_all().await {
        assert_eq!(reply.status, 200);
    }
    // In time it is 10 of them; the machine may take its own.
    let queries = upstream.queries().await - before;
    assert!(queries <= 60, "{queries} of 900 that waited");
    assert_eq!(upstream.stats().await["violations"], 0);
}

#[tokio::test(start_paused = true)]
async fn weights_are_shares_of_what_is_spent() {
    let secret = |text: &str| Key {
        key: ApiKey::new(text).unwrap(),
        source: KeySource::Env("SECRET".to_owned()),
    };
    let client = |name: &str, weight| Client {
        name: name.to_owned(),
        token: secret(&format!("token-{name}")),
        weight,
        passthrough: false,
    };
    let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
        config.budget.max_wait = Duration::from_secs(90);
        config.accounts = vec![Account {
            name: "music".to_owned(),
            keys: vec![secret(KEY)],
            clients: vec![client("studio", 2), client("shop", 1)],
        }];
    }));
    // Both want more than their share of the first 300, and from one address: the token is the client.
    let mut polls = JoinSet::new();
    for task in 0..300 {
        for client in ["shop", "studio"] {
            let gateway = Arc::clone(&gateway);
            polls.spawn(async move {
                let (token, task) = (format!("token-{client}"), format!("{client}-{task}"));
                gateway.poll(&token, &task).await
            });
        }
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    let queries = gateway.queries();
    assert!(queries.iter().all(|query| query.key == KEY));
    let studio = queries[..300].iter().filter(|query| query.task.starts_with("studio"));
    let studio = studio.count() as f64;
    let ratio = studio / (300.0 - studio);
    assert!((1.9..=2.1).contains(&ratio), "{studio} of 300");
    assert!(goodput(&gateway.arrivals()) >= 14.0);
}

#[tokio::test(start_paused = true)]
async fn whoever_gave_way_in_a_flight_that_another_client_leaves_is_served_all_the_same() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
        config.budget.limit = NonZeroU32::new(2).unwrap();
        config.budget.max_queue = 5;
    }));
    // From here on a permit is due at once, and then every 515 ms.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let started = Instant::now();
    let polled = |peer, task: &'static str| {
        let gateway = Arc::clone(&gateway);
        tokio::spawn(async move { gateway.poll_from(peer, KEY, task).await })
    };
    let _ahead = ["one", "two", "three", "four", "five"].map(|task| polled(GREEDY, task));
    let stays = polled(GREEDY, "shared");
    let settle = || tokio::time::sleep(Duration::from_millis(1));
    settle().await;
    let leaves = polled(MODEST, "shared");
    settle().await;
    // One too many: the greedy client gives way, first of all where the modest one stands, too.
    let newcomer = polled(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)), "new");
    settle().await;
    leaves.abort();
    assert_eq!(stays.await.unwrap().status, 200);
    assert_eq!(newcomer.await.unwrap().status, 200);
    // Five at most went before it.
    let took = started.elapsed();
    assert!(took < Duration::from_millis(515 * 6), "{took:?}");
    let length = "crun_gateway_budget_queue_length{account=\"other\",lane=\"foreground\"}";
    assert!(gateway.metric(length) < 0.5, "nobody is left behind");
}

/// How many answers each of twelve clients gets in half a minute, of whom six may wait at once. Each asks for one new
/// task after the other, and who is turned away comes back `after` so long, or when told to.
async fn served_of_twelve(latency: Duration, after: Option<Duration>) -> Vec<usize> {
    let upstream = Behaviour {
        latency,
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(upstream, |config| config.budget.max_queue = 6));
    let end = Instant::now() + Duration::from_secs(31);
    let clients = (1..=12).map(|number| {
        let gateway = Arc::clone(&gateway);
        async move {
            let mut served = 0;
            for task in 0.. {
                let task = format!("{number}-{task}");
                let reply = gateway.poll_from(IpAddr::from([10, 0, 0, number]), KEY, &task).await;
                if Instant::now() > end {
                    break;
                }
                if reply.status == 200 {
                    served += 1;
                } else {
                    let told = || Duration::from_secs(reply.header("retry-after").unwrap().parse().unwrap());
                    tokio::time::sleep(after.unwrap_or_else(told)).await;
                }
            }
            served
        }
    });
    futures_util::future::join_all(clients).await
}

#[tokio::test(start_paused = true)]
async fn of_those_who_find_the_queue_full_again_and_again_all_are_served_alike() {
    for latency in [Duration::ZERO, Duration::from_millis(100)] {
        for after in [Some(Duration::from_millis(200)), None] {
            let served = served_of_twelve(latency, after).await;
            let (least, all) = (served.iter().min().unwrap(), served.iter().sum::<usize>());
            assert!(
                all >= 14 * 30,
                "{latency:?}, {after:?}: the budget is spent: {served:?}"
            );
            assert!(least * 2 * 12 >= all, "{latency:?}, {after:?}: {served:?}");
        }
    }
}

/// What one client is answered in ten seconds, who asks for one new task after the other while another asks for as many
/// as it can; and how much is spent a second.
async fn answered_beside_a_greedy_client(limit: u32, max_queue: usize) -> (Vec<u16>, f64) {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
        config.budget.limit = NonZeroU32::new(limit).unwrap();
        config.budget.max_queue = max_queue;
    }));
    let mut greedy = JoinSet::new();
    for number in 0..20 {
        let gateway = Arc::clone(&gateway);
        greedy.spawn(async move {
            for task in 0.. {
                let reply = gateway.poll_from(GREEDY, KEY, &format!("greedy-{number}-{task}")).await;
                if reply.status != 200 {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        });
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (end, mut answered) = (Instant::now() + Duration::from_secs(10), Vec::new());
    while Instant::now() < end {
        let task = format!("modest-{}", answered.len());
        let reply = gateway.poll_from(MODEST, KEY, &task).await;
        answered.push(reply.status.as_u16());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    (answered, goodput(&gateway.arrivals()))
}

#[tokio::test(start_paused = true)]
async fn however_short_the_queue_a_greedy_client_cannot_starve_another() {
    for (limit, max_queue) in [(15, 2), (15, 3), (100, 10)] {
        let (answered, spent) = answered_beside_a_greedy_client(limit, max_queue).await;
        assert!(
            spent >= f64::from(limit) * 0.93,
            "{max_queue} of {limit}: {spent} a second"
        );
        assert!(answered.len() > 10, "{answered:?}");
        assert!(
            answered.iter().all(|status| *status == 200),
            "{max_queue} of {limit}: {answered:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn however_few_turns_fit_in_a_wait_a_greedy_client_cannot_starve_another() {
    for (limit, max_wait) in [(2, 1), (1, 2), (1, 3), (2, 2), (15, 1)] {
        let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
            config.budget.limit = NonZeroU32::new(limit).unwrap();
            config.budget.max_wait = Duration::from_secs(max_wait);
        }));
        let (_greedy, served) = greedy_every_50_ms(&gateway);
        tokio::time::sleep(Duration::from_secs(3)).await;
        let (end, mut modest, mut refused) = (Instant::now() + Duration::from_secs(30), 0, 0);
        while Instant::now() < end {
            let reply = gateway.poll_from(MODEST, KEY, &format!("modest-{modest}")).await;
            if reply.status == 200 {
                (modest, refused) = (modest + 1, 0);
            } else {
                refused += 1;
                let told = reply.header("retry-after").unwrap().parse().unwrap();
                tokio::time::sleep(Duration::from_secs(told)).await;
            }
            assert!(refused <= 3, "{limit} a second, {max_wait} s: {modest} served before");
        }
        let (served, spent) = (served.load(Ordering::Relaxed) + modest, gateway.arrivals().len());
        assert!(
            served * 10 >= spent * 9,
            "{limit} a second, {max_wait} s: {served} served of {spent}"
        );
        assert!(goodput(&gateway.arrivals()) >= f64::from(limit) * 0.93);
    }
}

/// A client that asks for another task every 50 ms and never comes back; and how often it is served.
fn greedy_every_50_ms(gateway: &Arc<Paused>) -> (JoinSet<()>, Arc<AtomicUsize>) {
    let (mut greedy, served) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    for number in 0..660 {
        let (gateway, served) = (Arc::clone(gateway), Arc::clone(&served));
        greedy.spawn(async move {
            tokio::time::sleep(Duration::from_millis(50) * number).await;
            let reply = gateway.poll_from(GREEDY, KEY, &format!("greedy-{number}")).await;
            served.fetch_add(usize::from(reply.status == 200), Ordering::Relaxed);
        });
    }
    (greedy, served)
}

#[tokio::test(start_paused = true)]
async fn clients_that_hang_up_hold_nobody_up_and_what_was_not_sent_for_them_costs_nothing() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |_| {}));
    // From here on a permit is due at once, and then every 69 ms.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let started = Instant::now();
    let mut polls = JoinSet::new();
    for task in 0..100_u32 {
        let gateway = Arc::clone(&gateway);
        polls.spawn(async move {
            let patience = Duration::from_millis(100 + u64::from(task));
            let task = format!("leaves-{task}");
            tokio::time::timeout(patience, gateway.poll(KEY, &task)).await.is_ok()
        });
    }
    let answered = polls.join_all().await;
    assert!(started.elapsed() < Duration::from_millis(200));
    let asked = Instant::now();
    assert_eq!(gateway.poll(KEY, "stays").await.status, 200);
    // The next permit, and an answer.
    let took = asked.elapsed();
    assert!(took <= Duration::from_millis(69 + 100), "{took:?}");
    tokio::time::sleep(Duration::from_secs(10)).await;
    // At 0, 69 and 137 ms for those who still waited then, and one for who stays.
    let queries = gateway.queries();
    assert_eq!(queries.len(), 4, "{queries:?}");
    assert_eq!(queries[3].task, "stays");
    assert!(answered.iter().filter(|answered| **answered).count() <= 3);
}

#[tokio::test]
async fn clients_that_hang_up_hold_nobody_up_on_real_sockets() {
    let upstream = Simulator::start(&["--latency", "100ms"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    // From here on permits are due.
    assert_eq!(poll(gateway.address, "ended.first").await.status, 200);
    let mut leaving = Vec::new();
    for _ in 0..100 {
        leaving.push(Raw::connect(gateway.address).await);
    }
    let started = Instant::now();
    for (task, connection) in leaving.iter_mut().enumerate() {
        connection
            .send(raw::poll(&format!("ended.leaves-{task}")))
            .await
            .unwrap();
    }
    let length = "crun_gateway_budget_queue_length{account=\"other\",lane=\"foreground\"}";
    let all = async || gateway.metric(length).await + (upstream.queries().await as f64) >= 101.0;
    until("a hundred wait", all).await;
    tokio::time::sleep_until(started + Duration::from_millis(150)).await;
    drop(leaving);
    let asked = Instant::now();
    assert_eq!(poll(gateway.address, "ended.stays").await.status, 200);
    // A hundred before it would take 6.9 s.
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    // The first one, what became due since then, and at most two that had been called forward.
    let due = 1.0 + started.elapsed().as_secs_f64() * 15.0 + 2.0;
    gateway.shows(length, 0.0).await;
    let stats = upstream.stats().await;
    assert!(stats["requests"].as_f64().unwrap() <= due, "{due}: {stats}");
    assert_eq!(stats["tasks"]["ended.stays"], 1);
    assert_eq!(stats["violations"], 0);
}

fn secret(key: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "{key}").unwrap();
    file
}

async fn with_tokens(upstream: &str) -> (Gateway, Vec<tempfile::NamedTempFile>) {
    let secrets = ["ak_revoked", "ak_good", "token-a", "token-b"]
        .map(secret)
        .into_iter()
        .collect::<Vec<_>>();
    let file = |index: usize| format!("{{ file: \"{}\" }}", secrets[index].path().display());
    let config = format!(
        "accounts:\n  - name: music\n    keys: [{}, {}]\n    clients:\n      - {{ name: studio, token: {}, weight: 2 }}\n      - \
         {{ name: shop, token: {}, passthrough: true }}",
        file(0),
        file(1),
        file(2),
        file(3)
    );
    (Gateway::start(upstream, &config).await, secrets)
}

#[tokio::test]
async fn a_token_stands_for_its_accounts_keys_and_goes_nowhere() {
    let upstream = Scripted::start(Duration::ZERO, |head| {
        if head.contains("ak_revoked") {
            response(
                "401 Unauthorized",
                "",
                br#"{"code":401,"message":"Unauthorized","data":null}"#,
            )
        } else {
            let body = br#"{"code":200,"message":"ok","data":{"task_id":"a","status":"failed","result":null}}"#;
            response("200 OK", "", body)
        }
    })
    .await;
    let (gateway, _secrets) = with_tokens(&upstream.url).await;
    assert_eq!(
        poll_as(gateway.address, "token-a", "a").await.json()["code"],
        200,
        "the second key took over"
    );
    let mut bearer = bare(Method::GET, &format!("{TASK_INFO}?task_id=a"));
    bearer
        .headers_mut()
        .insert("authorization", "Bearer token-b".parse().unwrap());
    assert_eq!(request(gateway.address, bearer).await.status, 200);
    let requests = |client| {
        format!("crun_gateway_requests_total{{account=\"music\",cache=\"miss\",client=\"{client}\",code=\"2xx\"}}")
    };
    assert!(gateway.metric(&requests("studio")).await > 0.0);
    let mut create = bare(Method::POST, "/api/v1/client/job/CreateTask");
    create.headers_mut().insert("x-api-key", "token-a".parse().unwrap());
    request(gateway.address, create.clone()).await.assert_is_our_error(403);
    create.headers_mut().remove("x-api-key");
    create
        .headers_mut()
        .insert("authorization", "Bearer token-b".parse().unwrap());
    request(gateway.address, create).await;
    // Neither behind another Authorization, beside a key of the client's own.
    let mut hidden = bare(Method::POST, "/api/v1/client/job/CreateTask");
    hidden
        .headers_mut()
        .append("authorization", "Basic eDp5".parse().unwrap());
    hidden
        .headers_mut()
        .append("authorization", "Bearer token-b".parse().unwrap());
    request(gateway.address, hidden.clone()).await;
    hidden
        .headers_mut()
        .insert("authorization", "Basic eDp5,\tBearer\ttoken-b".parse().unwrap());
    request(gateway.address, hidden.clone()).await;
    hidden.headers_mut().insert("x-api-key", "ak_good".parse().unwrap());
    request(gateway.address, hidden).await.assert_is_our_error(401);
    let heads = upstream.heads().concat();
    assert!(heads.contains("POST /api/v1/client/job/CreateTask"), "{heads}");
    let created = upstream.heads().into_iter().filter(|head| head.starts_with("POST "));
    for head in created {
        assert!(
            head.contains("x-api-key: ak_good"),
            "not the key that upstream refuses: {head}"
        );
    }
    assert!(!heads.contains("token-"), "a token is ours and goes nowhere: {heads}");
}

#[tokio::test]
async fn a_token_goes_nowhere_whatever_stands_around_it() {
    let upstream = Scripted::always(response("200 OK", "", b"{}")).await;
    let (gateway, _secrets) = with_tokens(&upstream.url).await;
    for (name, value) in [
        ("authorization", "token-b"),
        ("authorization", "Basic token-b"),
        ("authorization", "Basic dG9rZW4tYjo="),
        ("authorization", "Basic bWU6dG9rZW4tYg=="),
        ("authorization", "Basic bWU6dG9rZW4tYg"),
        ("authorization", "token-b:"),
        ("referer", "https://a/?b=1&key=token-b"),
        ("authorization", "Token token=\"token-b\""),
        ("authorization", "Bearer token-b;x"),
        ("authorization", "Bearer sk-llm, token-b"),
        ("proxy-authorization", "Bearer token-b"),
        ("cookie", "a=b; session=token-b"),
        ("x-token", "token-b"),
    ] {
        let mut asked = bare(Method::POST, "/api/v1/echo");
        asked.headers_mut().insert(name, value.parse().unwrap());
        asked.headers_mut().insert("accept", "text/html;q=0.9".parse().unwrap());
        assert_eq!(request(gateway.address, asked).await.status, 200, "{value}");
        let head = upstream.heads().pop().unwrap();
        assert!(!head.contains(value), "{head}");
        assert!(head.contains("accept: text/html;q=0.9"), "{head}");
    }
}
