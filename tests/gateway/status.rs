//! `/status.json` tells what is so, on paused time; the admin port serves it whatever clients do. The page in a browser is
//! `browser`'s.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use crun_gateway::config::Config;
use crun_gateway::gateway::Gateway as Inside;
use crun_gateway::metrics::Metrics;
use http::Method;
use serde_json::{Value, json};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::harness::client::{bare, poll_request};
use crate::harness::paused::{Away, Behaviour, Paused, json as answer, music, running, success};
use crate::harness::{Gateway, KEY, Raw, Simulator, request};

const GREEDY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
const MODEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

const LISTED_KEY: &str = "ak_listed_secret";
const TOKEN: &str = "token_secret";

/// The account `music`, of which `studio` has a token.
fn list_an_account(config: &mut Config) {
    config.accounts = vec![music(LISTED_KEY, TOKEN)];
}

async fn after(seconds: f64) {
    sleep(Duration::from_secs_f64(seconds)).await;
}

/// Sends one poll for each of `tasks` tasks, and waits for none.
fn queue(gateway: &Arc<Paused>, peer: IpAddr, key: &'static str, tasks: usize) -> JoinSet<()> {
    let mut polls = JoinSet::new();
    for task in 0..tasks {
        let gateway = Arc::clone(gateway);
        polls.spawn(async move {
            let reply = gateway.poll_from(peer, key, &format!("{peer}-{task}")).await;
            assert_eq!(reply.status, 200);
        });
    }
    polls
}

fn patient(config: &mut Config) {
    config.budget.max_wait = Duration::from_secs(90);
}

fn queries(account: &Value) -> Vec<u64> {
    let seconds = account["queries"].as_array().unwrap();
    seconds.iter().map(|count| count.as_u64().unwrap()).collect()
}

#[tokio::test(start_paused = true)]
async fn the_queue_and_what_was_spent_are_told_by_client() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), patient));
    let polls = [queue(&gateway, GREEDY, KEY, 100), queue(&gateway, MODEST, KEY, 10)];
    after(0.5).await;
    let status = gateway.status();
    let account = &status["accounts"][0];
    assert_eq!(
        (&account["name"], &account["listed"]),
        (&json!("other #1"), &json!(false))
    );
    assert_eq!(account["waiting"], 110, "{account:#}");
    // Two of them have been called forward: they wait for their permits only.
    let places = json!([
        { "caller": "10.0.0.1", "has_token": false, "name": null, "flights": 100 },
        { "caller": "10.0.0.2", "has_token": false, "name": null, "flights": 10 },
    ]);
    assert_eq!(account["queue"]["by_client"], places);
    assert_eq!(
        (&account["queue"]["clients"], &account["queue"]["background"]),
        (&json!(2), &json!(0))
    );
    assert_eq!(account["spent"]["by_client"], json!([]), "nothing is granted yet");
    for polls in polls {
        polls.join_all().await;
    }
    let status = gateway.status();
    let account = &status["accounts"][0];
    assert_eq!(
        (&account["waiting"], &account["queue"]["clients"]),
        (&json!(0), &json!(0))
    );
    let spent = json!([
        { "caller": "10.0.0.1", "has_token": false, "name": null, "permits": 100 },
        { "caller": "10.0.0.2", "has_token": false, "name": null, "permits": 10 },
    ]);
    assert_eq!(account["spent"]["by_client"], spent);
    assert_eq!(
        (&account["spent"]["background"], &account["spent"]["rest"]),
        (&json!(0), &json!(0))
    );
}

#[tokio::test(start_paused = true)]
async fn a_client_whose_flight_waits_for_the_end_of_a_pause_is_told() {
    let behaviour = Behaviour {
        answer: |count, task| {
            let mut limited = answer(&json!({ "code": 429, "message": "slow down", "data": null }));
            limited.headers_mut().insert("retry-after", "60".parse().unwrap());
            if count == 0 { limited } else { success(task) }
        },
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, patient));
    let polls = queue(&gateway, MODEST, KEY, 1);
    after(10.0).await;
    let account = gateway.status()["accounts"][0].take();
    let waits = json!([{ "caller": "10.0.0.2", "has_token": false, "name": null, "flights": 1 }]);
    assert_eq!(
        (&account["waiting"], &account["queue"]["by_client"]),
        (&json!(1), &waits)
    );
    polls.join_all().await;
}

#[tokio::test(start_paused = true)]
async fn the_rate_used_is_told_second_by_second() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), patient));
    queue(&gateway, GREEDY, KEY, 60).join_all().await;
    after(1.0).await;
    let status = gateway.status();
    let account = &status["accounts"][0];
    let seconds = queries(account);
    assert_eq!(seconds.len(), 180);
    assert_eq!(seconds.iter().sum::<u64>(), 60);
    assert!(seconds.iter().all(|count| *count <= 15), "{seconds:?}");
    let busy: Vec<_> = seconds.iter().copied().filter(|count| *count > 0).collect();
    assert!(
        busy.len() == 5 && busy[..4].iter().all(|count| *count >= 14),
        "{busy:?}"
    );
    assert_eq!(status["limit"], 15);
    for rate in [&status["full_rate"], &account["rate"]] {
        let off = rate.as_f64().unwrap() - 15.0 / 1.03;
        assert!(off.abs() < 1e-6, "{rate}");
    }
    // Four minutes later nothing of it is left.
    after(240.0).await;
    let status = gateway.status();
    assert_eq!(queries(&status["accounts"][0]), vec![0; 180]);
}

#[tokio::test(start_paused = true)]
async fn polls_are_told_by_how_they_were_answered() {
    let behaviour = Behaviour {
        answer: |count, task| match (task, count) {
            ("goes-on", 0) => running(task),
            ("goes-on", _) => answer(&json!({ "code": 500, "message": "oops", "data": null })),
            _ => success(task),
        },
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, list_an_account));
    let mut herd = JoinSet::new();
    for _ in 0..10 {
        let gateway = Arc::clone(&gateway);
        herd.spawn(async move { gateway.poll(LISTED_KEY, "a").await });
    }
    herd.join_all().await;
    for _ in 0..5 {
        gateway.poll(TOKEN, "a").await;
    }
    gateway.poll(LISTED_KEY, "goes-on").await;
    let status = gateway.status();
    assert_eq!(
        (
            &status["accounts"][0]["live_tasks"],
            &status["accounts"][0]["freshness_seconds"]
        ),
        (&json!(1), &json!(2.0))
    );
    after(3.0).await;
    gateway.poll(LISTED_KEY, "goes-on").await;
    let status = gateway.status();
    let account = &status["accounts"][0];
    assert_eq!((&account["name"], &account["listed"]), (&json!("music"), &json!(true)));
    for polls in [&account["polls"], &account["polls_total"]] {
        let counts = ["hit", "collapsed", "stale", "forwarded", "refused", "calls_saved"]
            .map(|kind| polls[kind].as_u64().unwrap());
        assert_eq!(counts, [5, 9, 1, 2, 0, 14], "{polls:#}");
        assert!(polls["span_seconds"].as_f64().unwrap() > 3.0, "{polls:#}");
    }
    assert_eq!(gateway.arrivals().len(), 3);
    let saved = gateway.metric("crun_gateway_upstream_calls_saved_total{account=\"music\",how=\"stale\"}");
    assert!(saved < 0.1, "{saved}");
}

#[tokio::test(start_paused = true)]
async fn an_unlisted_account_is_the_same_for_as_long_as_it_has_hits() {
    let gateway = Paused::start(Behaviour::default(), |_| {});
    gateway.sweep();
    for _ in 0..10 {
        gateway.poll(KEY, "a").await;
        after(50.0).await;
    }
    let told = |status: Value| {
        let account = &status["accounts"][0];
        (account["name"].clone(), account["polls_total"]["hit"].clone())
    };
    assert_eq!(told(gateway.status()), (json!("other #1"), json!(9)));
    after(30.0).await;
    assert_eq!(
        told(gateway.status()),
        (json!(null), json!(null)),
        "nobody has asked for a minute"
    );
}

#[tokio::test(start_paused = true)]
async fn of_those_who_get_a_snapshot_whoever_opened_the_flight_saved_no_call() {
    let behaviour = Behaviour {
        answer: |_, task| running(task),
        latency: Duration::from_millis(1500),
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |_| {}));
    gateway.poll(KEY, "a").await;
    after(3.0).await;
    // Upstream is slow: all of them get what is kept.
    let mut polls = JoinSet::new();
    for _ in 0..5 {
        let gateway = Arc::clone(&gateway);
        polls.spawn(async move { gateway.poll(KEY, "a").await });
    }
    for reply in polls.join_all().await {
        let said = reply.header("cache-status").unwrap();
        assert!(said.ends_with("detail=upstream_slow"), "{said}");
    }
    assert_eq!(gateway.arrivals().len(), 2);
    let polls = &gateway.status()["accounts"][0]["polls_total"];
    assert_eq!((&polls["stale"], &polls["calls_saved"]), (&json!(5), &json!(4)));
    let saved = gateway.metric("crun_gateway_upstream_calls_saved_total{account=\"other\",how=\"stale\"}");
    assert!((saved - 4.0).abs() < 0.1, "{saved}");
}

#[tokio::test(start_paused = true)]
async fn a_pause_and_the_lower_rate_after_it_are_told() {
    let behaviour = Behaviour {
        answer: |_, task| {
            let mut limited = answer(&json!({ "code": 429, "message": "slow down", "data": null }));
            limited.headers_mut().insert("retry-after", "60".parse().unwrap());
            if task == "limited" { limited } else { success(task) }
        },
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |_| {}));
    gateway.poll("ak_other", "a").await;
    gateway.poll(KEY, "limited").await;
    let seen = |status: &Value, name: &str| {
        let accounts = status["accounts"].as_array().unwrap();
        let account = accounts.iter().find(|account| account["name"] == name).unwrap();
        ["paused_seconds", "rate"].map(|field| account[field].as_f64().unwrap())
    };
    let status = gateway.status();
    let [paused, rate] = seen(&status, "other #2");
    // The poll was turned away when it had its 429.
    assert!(paused > 59.0 && paused <= 60.0, "{paused}");
    assert!(rate < 8.0, "{rate}");
    let [paused, rate] = seen(&status, "other #1");
    assert!(paused.abs() < f64::EPSILON && rate > 14.5);
    after(60.0).await;
    let [paused, rate] = seen(&gateway.status(), "other #2");
    assert!(paused.abs() < f64::EPSILON && rate > 7.0 && rate < 8.0, "{rate}");
}

#[tokio::test(start_paused = true)]
async fn both_attempts_of_a_flight_are_charged_to_the_client_whose_turn_it_had() {
    let behaviour = Behaviour {
        answer: |count, task| match count {
            0 => answer(&json!({ "code": 429, "message": "slow down", "data": null })),
            _ => success(task),
        },
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |_| {}));
    assert_eq!(gateway.poll_from(MODEST, KEY, "a").await.json()["code"], 200);
    assert_eq!(gateway.arrivals().len(), 2);
    let status = gateway.status();
    let spent = json!([{ "caller": "10.0.0.2", "has_token": false, "name": null, "permits": 2 }]);
    assert_eq!(status["accounts"][0]["spent"]["by_client"], spent);
}

#[tokio::test(start_paused = true)]
async fn the_breaker_is_told() {
    let behaviour = Behaviour {
        outage: Some((Duration::from_secs(10)..Duration::from_secs(20), Away::Status(503))),
        ..Behaviour::default()
    };
    let start = Instant::now();
    let gateway = Arc::new(Paused::start(behaviour, |_| {}));
    let breaker = async || gateway.status()["upstream"].clone();
    assert_eq!(breaker().await["breaker"], "closed");
    assert_eq!(breaker().await["host"], "upstream");
    after(11.0).await;
    for task in ["a", "b", "c", "d", "e"] {
        gateway.poll(KEY, task).await;
    }
    let open = breaker().await;
    let next = open["next_probe_seconds"].as_f64().unwrap();
    assert!(open["breaker"] == "open" && next > 0.0 && next <= 1.5, "{open:#}");
    while start.elapsed() < Duration::from_secs(24) {
        gateway.poll(KEY, "f").await;
        after(0.5).await;
    }
    let closed = breaker().await;
    assert_eq!(
        (&closed["breaker"], &closed["next_probe_seconds"]),
        (&json!("closed"), &json!(0.0))
    );
    assert!(closed["p90_seconds"].as_f64().unwrap() > 0.05, "{closed:#}");
    let status = gateway.status();
    let spent = &status["accounts"][0]["spent"];
    let [of_clients, of_probes] =
        [&spent["by_client"][0]["permits"], &spent["background"]].map(|permits| permits.as_u64().unwrap());
    assert!(of_clients >= 5 && of_probes >= 5, "{spent:#}");
    assert_eq!(of_clients + of_probes, gateway.arrivals().len() as u64);
}

#[tokio::test(start_paused = true)]
async fn no_key_is_told_even_if_a_client_makes_it_its_name() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), list_an_account));
    let named = |key, task, name: &str| {
        let mut request = poll_request(key, task);
        request.headers_mut().insert("x-client-id", name.parse().unwrap());
        let gateway = Arc::clone(&gateway);
        async move { gateway.ask(request).await }
    };
    let secrets = [KEY, LISTED_KEY, TOKEN];
    for (task, name) in ["a", "b", "c"].into_iter().zip(secrets) {
        for key in secrets {
            assert_eq!(named(key, task, name).await.status, 200);
        }
    }
    let markup = "<script>alert(1)</script>";
    assert_eq!(named(TOKEN, "d", markup).await.status, 200);
    let status = gateway.status();
    let text = status.to_string();
    for secret in secrets {
        assert!(!text.contains(secret), "{status:#}");
    }
    let spent = status["accounts"][0]["spent"]["by_client"].as_array().unwrap();
    let studio = spent
        .iter()
        .find(|row| row["caller"] == "studio" && row["name"] == markup);
    assert_eq!(studio.unwrap()["has_token"], true);
}

#[tokio::test(start_paused = true)]
async fn of_many_unlisted_accounts_the_busiest_are_told_and_the_rest_is_a_sum() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), list_an_account));
    let mut polls = JoinSet::new();
    for account in 0..200 {
        // The last twenty ask for two tasks.
        for task in 0..=usize::from(account >= 180) {
            let gateway = Arc::clone(&gateway);
            polls.spawn(async move { gateway.poll(&format!("ak_{account}"), &task.to_string()).await.status });
        }
    }
    assert!(polls.join_all().await.iter().all(|status| *status == 200));
    let status = gateway.status();
    let accounts = status["accounts"].as_array().unwrap();
    assert_eq!(accounts.len(), 21);
    assert_eq!(
        (&accounts[0]["name"], &accounts[0]["waiting"]),
        (&json!("music"), &json!(0))
    );
    for account in &accounts[1..] {
        assert_eq!(account["polls_total"]["forwarded"], 2, "{account:#}");
        assert!(account["name"].as_str().unwrap().starts_with("other #"));
    }
    assert_eq!(
        status["other_accounts"],
        json!({ "accounts": 180, "waiting": 0, "queries": 180 })
    );
    assert!(!status.to_string().contains("ak_"));
}

/// Every name of a field, however deep.
fn fields(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                found.insert(name.clone());
                fields(value, found);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| fields(value, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[tokio::test(start_paused = true)]
async fn the_readme_names_every_field() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), patient));
    let polls = queue(&gateway, GREEDY, KEY, 20);
    after(2.0).await;
    let mut found = BTreeSet::new();
    fields(&gateway.status(), &mut found);
    assert!(found.contains("flights") && found.contains("permits"), "{found:?}");
    let (_, readme) = include_str!("../../README.md").split_once("\n## Status\n").unwrap();
    let (section, _) = readme.split_once("\n## ").unwrap();
    let words: BTreeSet<_> = section.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    found.retain(|field| !words.contains(field.as_str()));
    assert!(found.is_empty(), "not in the README: {found:?}");
    drop(polls);
}

/// The status is asked on the admin port's runtime.
#[test]
fn where_the_main_runtime_stands_still_all_is_told() {
    let stuck = Builder::new_current_thread().enable_all().build().unwrap();
    let gateway = {
        let _main = stuck.enter();
        let mut config = Config::default();
        list_an_account(&mut config);
        let dial = crun_gateway::dial::tcp(config.upstream.url.clone());
        Inside::new(config, dial, Arc::new(Metrics::new().unwrap())).unwrap()
    };
    let status = serde_json::to_value(gateway.status()).unwrap();
    let account = &status["accounts"][0];
    assert_eq!((&account["name"], &account["waiting"]), (&json!("music"), &json!(0)));
    assert!(
        account["queue"].is_object() && account["spent"].is_object(),
        "{account}"
    );
}

#[tokio::test]
async fn the_admin_port_answers_while_the_client_port_is_at_its_limit() {
    let upstream = Simulator::start(&["--latency", "1ms"]).await;
    let gateway = Gateway::start(&upstream.url, "limits: { connections: 2 }").await;
    let mut let_in = [Raw::connect(gateway.address).await, Raw::connect(gateway.address).await];
    for connection in &mut let_in {
        assert!(connection.poll("ended.a").await.is(200));
    }
    let mut third = Raw::connect(gateway.address).await;
    third.send(crate::harness::raw::poll("ended.a")).await.unwrap();
    assert!(third.reply().await.is(503));
    let told = request(gateway.admin, bare(Method::GET, "/status.json")).await;
    assert_eq!(
        (told.status.as_u16(), told.header("content-type")),
        (200, Some("application/json"))
    );
    assert_eq!(told.header("cache-control"), Some("no-store"));
    let status = told.json();
    assert_eq!((&status["live"], &status["ready"]), (&json!(true), &json!(true)));
    assert_eq!(status["client_connections"], 2);
    assert_eq!(status["accounts"][0]["polls_total"]["forwarded"], 1, "{status:#}");
    let page = request(gateway.admin, bare(Method::GET, "/status")).await;
    assert_eq!(
        (page.status.as_u16(), page.header("content-type")),
        (200, Some("text/html; charset=utf-8"))
    );
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"),
        "{policy}"
    );
    for (directive, count) in [("style-src 'sha256-", 1), ("script-src 'sha256-", 1), ("http", 0)] {
        assert_eq!(policy.matches(directive).count(), count, "{policy}");
    }
    for path in ["/status", "/status.json"] {
        let refused = request(gateway.admin, bare(Method::POST, path)).await;
        assert_eq!(refused.status, 405, "nothing here changes state");
    }
}
