//! Keys and accounts: what is one account's never reaches another, and a key's refusal is its own.

use std::io::Write as _;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::harness::scripted::response;
use crate::harness::{Gateway, Reply, Scripted, poll_as, until};

/// Upstream tells each key something else about the same task.
async fn upstream_that_tells_keys_apart(delay: Duration) -> Scripted {
    Scripted::start(delay, |head| {
        let key = head.split_once("x-api-key: ").unwrap().1.split("\r\n").next().unwrap();
        let body = format!(
            r#"{{"code":200,"message":"success","data":{{"task_id":"same","status":"failed","result":{{"message":"for {key}"}}}}}}"#
        );
        match key {
            "ak_revoked" => response("401 Unauthorized", "", br#"{"code":401,"message":"Unauthorized","data":null}"#),
            "ak_disabled" => response("200 OK", "", br#"{"code":403,"message":"API key disabled","data":null}"#),
            _ => response("200 OK", "Content-Type: application/json\r\n", body.as_bytes()),
        }
    })
    .await
}

#[tokio::test]
async fn two_accounts_never_see_each_others_answer() {
    let upstream = upstream_that_tells_keys_apart(Duration::from_millis(200)).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let address = gateway.address;
    // Together first, so that flights cross, and again from the cache.
    for _ in 0..2 {
        let mut polls = JoinSet::new();
        for client in 0..100 {
            polls.spawn(async move {
                let key = format!("ak_{}", client % 4);
                let reply = poll_as(address, &key, "same").await;
                assert!(
                    reply.json()["data"]["result"]["message"] == format!("for {key}"),
                    "{key} got {reply:?}"
                );
            });
        }
        polls.join_all().await;
    }
    assert_eq!(upstream.queries(), 4, "one call an account");
}

fn secret(key: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "{key}").unwrap();
    file
}

#[tokio::test]
async fn keys_of_one_account_share_flights_and_answers() {
    let upstream = upstream_that_tells_keys_apart(Duration::from_millis(200)).await;
    let (first, second) = (secret("ak_first"), secret("ak_second"));
    let config = format!(
        "accounts: [{{ name: music, keys: [{{ file: \"{}\" }}, {{ file: \"{}\" }}] }}]",
        first.path().display(),
        second.path().display()
    );
    let gateway = Gateway::start(&upstream.url, &config).await;
    let (one, two) = tokio::join!(
        poll_as(gateway.address, "ak_first", "same"),
        poll_as(gateway.address, "ak_second", "same")
    );
    assert_eq!(one.body, two.body);
    let collapsed = |reply: &Reply| reply.header("cache-status").unwrap().contains("; collapsed");
    assert!(collapsed(&one) != collapsed(&two), "{one:?} {two:?}");
    // Of the key that has not flown upstream is asked in the background, and then of neither any more.
    until("both are asked for", async || upstream.queries() >= 2).await;
    let heads = upstream.heads().concat();
    assert!(heads.contains("ak_first") && heads.contains("ak_second"), "{heads}");
    for key in ["ak_first", "ak_second"] {
        assert_eq!(poll_as(gateway.address, key, "same").await.body, one.body);
    }
    assert_eq!(upstream.queries(), 2);
    let terminal = "crun_gateway_upstream_requests_total{account=\"music\",outcome=\"terminal\"}";
    gateway.reaches(terminal, 2).await;
}

#[tokio::test]
async fn a_refused_keys_answer_goes_to_its_own_polls_only() {
    for (revoked, code) in [("ak_revoked", 401), ("ak_disabled", 403)] {
        let upstream = upstream_that_tells_keys_apart(Duration::from_millis(300)).await;
        let (bad, good) = (secret(revoked), secret("ak_good"));
        let config = format!(
            "accounts: [{{ name: music, keys: [{{ file: \"{}\" }}, {{ file: \"{}\" }}] }}]",
            bad.path().display(),
            good.path().display()
        );
        let gateway = Gateway::start(&upstream.url, &config).await;
        let address = gateway.address;
        let refused = tokio::spawn(async move { poll_as(address, revoked, "same").await });
        until("it is asked for", async || upstream.queries() > 0).await;
        // It joins the flight of the revoked key, and goes on with its own when that is refused.
        let good = poll_as(address, "ak_good", "same").await;
        assert_eq!(good.json()["data"]["result"]["message"], "for ak_good");
        assert_eq!(refused.await.unwrap().json()["code"], code);
        assert_eq!(upstream.queries(), 2, "each paid for its own");
    }
}

#[tokio::test]
async fn unknown_keys_can_be_rejected() {
    let upstream = upstream_that_tells_keys_apart(Duration::ZERO).await;
    let known = secret("ak_known");
    let config = format!(
        "unknown_keys: reject\naccounts: [{{ name: music, keys: [{{ file: \"{}\" }}] }}]",
        known.path().display()
    );
    let gateway = Gateway::start(&upstream.url, &config).await;
    poll_as(gateway.address, "ak_unknown", "same")
        .await
        .assert_is_our_error(401);
    assert_eq!(upstream.queries(), 0);
    assert_eq!(poll_as(gateway.address, "ak_known", "same").await.status, 200);
}

#[tokio::test]
async fn more_unlisted_keys_than_max_accounts_are_told_to_wait() {
    let upstream = upstream_that_tells_keys_apart(Duration::ZERO).await;
    let gateway = Gateway::start(&upstream.url, "max_accounts: 2").await;
    assert_eq!(poll_as(gateway.address, "ak_1", "same").await.status, 200);
    assert_eq!(poll_as(gateway.address, "ak_2", "same").await.status, 200);
    let third = poll_as(gateway.address, "ak_3", "same").await;
    third.assert_is_our_error(429);
    assert!(third.header("retry-after").is_some());
    let refused = gateway
        .metric("crun_gateway_refused_total{reason=\"too_many_accounts\"}")
        .await;
    assert!((refused - 1.0).abs() < 0.5, "{refused}");
    assert_eq!(poll_as(gateway.address, "ak_1", "same").await.status, 200);
}

#[tokio::test]
async fn no_key_comes_out_anywhere() {
    const SECRET: &str = "ak_S3cr3tS3cr3tS3cr3tS3cr3t";
    let upstream = upstream_that_tells_keys_apart(Duration::ZERO).await;
    let file = secret(SECRET);
    let config = format!(
        "log: {{ level: trace }}\naccounts: [{{ name: music, keys: [{{ file: \"{}\" }}] }}]",
        file.path().display()
    );
    let gateway = Gateway::start(&upstream.url, &config).await;
    for task in ["same", "other", ""] {
        poll_as(gateway.address, SECRET, task).await;
    }
    poll_as(gateway.address, "ak_S3cr3tToo", "same").await;
    let seen = [
        gateway.logged("poll answered", 3).await,
        gateway.admin("/metrics").await.1,
        gateway.admin("/").await.1,
    ]
    .concat();
    assert!(seen.contains("upstream asked"), "the log was read: {seen}");
    assert!(!seen.contains("S3cr3t"), "{seen}");
}
