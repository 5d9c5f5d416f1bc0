//! The scripts in a real server: what takes whose place, and who holds what for how long.

use redis::{Connection, ConnectionLike as _, Script, Value};

use super::super::tests::real::Server;
use super::*;

const ANSWER: &str = "answer:a";
const FLIGHT: &str = "flight:a";

/// What is said of an answer, where live ones are of the stages 1 to 3.
fn label(stage: u8, live: bool, asked_ms: u64) -> Label {
    Label {
        stage,
        live,
        asked_ms,
        received_ms: asked_ms + 50,
    }
}

fn value(label: Label) -> String {
    label.text() + "sealed"
}

fn publish(connection: &mut Connection, claim: &str, value: &str, most: u64) -> String {
    land(connection, claim, value, most, 0)
}

fn land(connection: &mut Connection, claim: &str, value: &str, most: u64, each: u64) -> String {
    let script = Script::new(PUBLISH_LUA);
    let mut call = script.key(ANSWER);
    call.key(FLIGHT)
        .arg(claim)
        .arg(value)
        .arg(60_000)
        .arg(most)
        .arg("answer:")
        .arg(each);
    call.invoke::<(String, u64)>(connection).unwrap().0
}

fn look(
    connection: &mut Connection,
    how: &str,
    who: &str,
    (fresh, after): (u64, u64),
    doubtful: &str,
) -> (String, String) {
    let script = Script::new(LOOK_LUA);
    let mut call = script.key(ANSWER);
    call.key(FLIGHT)
        .arg(how)
        .arg(who)
        .arg(2000)
        .arg(fresh)
        .arg(after)
        .arg(doubtful);
    let (_, value, whose): (u64, String, String) = call.invoke(connection).unwrap();
    (value, whose)
}

fn text(connection: &mut Connection, key: &str) -> Option<String> {
    redis::cmd("GET").arg(key).query(connection).unwrap()
}

fn ttl(connection: &mut Connection, key: &str) -> i64 {
    redis::cmd("PTTL").arg(key).query(connection).unwrap()
}

fn forget(connection: &mut Connection) {
    redis::cmd("FLUSHALL").exec(connection).unwrap();
}

/// The server's time, in ms.
fn now(connection: &mut Connection) -> u64 {
    let (seconds, micros): (u64, u64) = redis::cmd("TIME").query(connection).unwrap();
    seconds * 1000 + micros / 1000
}

#[test]
fn a_late_answer_takes_nothing_back_whoever_publishes_it() {
    let (_server, mut connection) = Server::start();
    let (not_found, pending, running, settling, ended) = (0, 1, 2, 3, 4);
    for (stands, comes, replaces) in [
        (label(running, true, 100), label(running, true, 101), true),
        (label(running, true, 100), label(running, true, 100), true),
        (label(running, true, 100), label(running, true, 99), false),
        (label(pending, true, 100), label(running, true, 90), true),
        // Asked for before the other had come, 50 ms after it was asked for; and after that.
        (label(running, true, 100), label(pending, true, 149), false),
        (label(running, true, 100), label(pending, true, 150), true),
        (label(settling, true, 100), label(running, true, 150), true),
        (label(ended, false, 100), label(settling, true, 150), false),
        (label(running, true, 100), label(ended, false, 90), true),
        (label(ended, false, 100), label(running, true, 110), false),
        (label(ended, false, 100), label(ended, false, 99), false),
        (label(ended, false, 100), label(ended, false, 110), true),
        (label(settling, false, 100), label(settling, true, 99), false),
        (label(settling, false, 100), label(ended, false, 99), true),
        (label(not_found, false, 100), label(pending, true, 90), true),
        (label(running, true, 100), label(not_found, false, 110), true),
        (label(running, true, 100), label(not_found, false, 90), false),
        (label(ended, false, 100), label(not_found, false, 110), false),
    ] {
        forget(&mut connection);
        assert_eq!(publish(&mut connection, "", &value(stands), u64::MAX), "stored");
        let result = publish(&mut connection, "", &value(comes), u64::MAX);
        assert_eq!(result == "stored", replaces, "{comes:?} upon {stands:?}: {result}");
        let left = if replaces { comes } else { stands };
        assert_eq!(text(&mut connection, ANSWER), Some(value(left)));
        assert!((1..=60_000).contains(&ttl(&mut connection, ANSWER)));
    }
    forget(&mut connection);
    redis::cmd("SET")
        .arg(ANSWER)
        .arg("nonsense")
        .exec(&mut connection)
        .unwrap();
    assert_eq!(
        publish(&mut connection, "", &value(label(1, true, 1)), u64::MAX),
        "stored"
    );
}

#[test]
fn a_claim_is_one_process_s_until_it_lands_or_stops_renewing() {
    let (_server, mut connection) = Server::start();
    let connection = &mut connection;
    let mut claim = |who: &str| look(connection, "claim", who, (0, 0), "").1;
    assert_eq!(["a:1", "b:1", "a:1"].map(&mut claim), ["ours", "theirs", "ours"]);
    assert!((1900..=2000).contains(&ttl(connection, FLIGHT)));
    // Only who holds it renews it, and nobody brings it back.
    let renew = Script::new(RENEW_LUA);
    redis::cmd("PEXPIRE").arg(FLIGHT).arg(500).exec(connection).unwrap();
    renew
        .key(FLIGHT)
        .arg(2000)
        .arg("b:1")
        .invoke::<Value>(connection)
        .unwrap();
    assert!(ttl(connection, FLIGHT) <= 500);
    renew
        .key(FLIGHT)
        .arg(2000)
        .arg("a:1")
        .invoke::<Value>(connection)
        .unwrap();
    assert!(ttl(connection, FLIGHT) > 1500);
    // Only who holds it ends it.
    assert_eq!(publish(connection, "b:1", "", u64::MAX), "released");
    assert_eq!(text(connection, FLIGHT).as_deref(), Some("a:1"));
    assert_eq!(
        publish(connection, "a:1", &value(label(4, false, 1)), u64::MAX),
        "stored"
    );
    assert_eq!(text(connection, FLIGHT), None);
    renew
        .key(FLIGHT)
        .arg(2000)
        .arg("a:1")
        .invoke::<Value>(connection)
        .unwrap();
    assert_eq!(text(connection, FLIGHT), None);
    // What will do is claimed by nobody, unless it will not do after all.
    assert_eq!(look(connection, "claim", "b:2", (0, 0), "").1, "none");
    let found = value(label(4, false, 1));
    assert_eq!(
        look(connection, "insist", "b:2", (0, 0), ""),
        (found.clone(), "ours".to_owned())
    );
    assert_eq!(
        look(connection, "insist", "b:2", (0, 0), "another"),
        (found.clone(), "ours".to_owned())
    );
    assert_eq!(
        look(connection, "insist", "b:2", (0, 0), &found),
        (String::new(), "ours".to_owned())
    );
}

#[test]
fn after_what_could_not_be_shared_each_fetches_for_itself_for_a_while() {
    let (_server, mut connection) = Server::start();
    let connection = &mut connection;
    let whose = |connection: &mut Connection, how, who: &str| look(connection, how, who, (0, 0), "").1;
    for (answer, most, lands) in [("", u64::MAX, "released"), (&*value(label(4, false, 1)), 1, "full")] {
        forget(connection);
        assert_eq!(whose(connection, "claim", "a:1"), "ours");
        // Only who holds it ends it.
        land(connection, "b:1", answer, most, 1000);
        assert_eq!(whose(connection, "claim", "b:2"), "theirs");
        assert_eq!(land(connection, "a:1", answer, most, 1000), lands);
        for (how, who) in [("claim", "a:2"), ("claim", "b:2"), ("insist", "b:2")] {
            assert_eq!(whose(connection, how, who), "each");
        }
        assert!((900..=1000).contains(&ttl(connection, FLIGHT)));
        // What one of them brings, they share again.
        assert_eq!(publish(connection, "", &value(label(4, false, 1)), u64::MAX), "stored");
        assert_eq!(whose(connection, "claim", "a:3"), "none");
    }
    forget(connection);
    assert_eq!(whose(connection, "claim", "a:1"), "ours");
    assert_eq!(
        land(connection, "a:1", &value(label(4, false, 1)), u64::MAX, 1000),
        "stored"
    );
    assert_eq!(text(connection, FLIGHT), None);
}

#[test]
fn a_live_answer_will_do_while_it_is_fresh_and_newer_than_what_one_has() {
    let (_server, mut connection) = Server::start();
    let connection = &mut connection;
    let received = now(connection) - 5000;
    let found = value(label(2, true, received - 50));
    publish(connection, "", &found, u64::MAX);
    let mut claim = |fresh, after| look(connection, "claim", "a:1", (fresh, after), "");
    assert_eq!(claim(60_000, 0), (found.clone(), "none".to_owned()));
    assert_eq!(claim(60_000, received - 51), (found.clone(), "none".to_owned()));
    // Stale, and still all that is known.
    assert_eq!(claim(4000, 0), (found.clone(), "ours".to_owned()));
    assert_eq!(claim(60_000, received - 50), (String::new(), "ours".to_owned()));
    assert_eq!(look(connection, "look", "", (4000, 0), ""), (found, "none".to_owned()));
}

#[test]
fn a_live_answer_from_before_the_clock_was_set_back_will_not_do() {
    let (_server, mut connection) = Server::start();
    let connection = &mut connection;
    let asked = now(connection);
    for (ahead, counts) in [(100, true), (2000, false), (10_000, false)] {
        for (stage, live) in [(2, true), (0, false)] {
            forget(connection);
            let found = value(label(stage, live, asked + ahead));
            publish(connection, "", &found, u64::MAX);
            let (answer, whose) = look(connection, "claim", "a:1", (60_000, 0), "");
            assert_eq!(
                (answer == found, whose == "none"),
                (counts, counts),
                "{stage}, {ahead} ms ahead"
            );
            // Nor does it keep a newer one out.
            let result = publish(connection, "", &value(label(stage, live, asked)), u64::MAX);
            assert_eq!(result, if counts { "older" } else { "stored" });
        }
        forget(connection);
        let ended = value(label(4, false, asked + ahead));
        publish(connection, "", &ended, u64::MAX);
        assert_eq!(
            look(connection, "claim", "a:1", (60_000, 0), ""),
            (ended, "none".to_owned())
        );
    }
}

#[test]
fn that_a_task_has_ended_is_news_whenever_it_was_asked_for() {
    let (_server, mut connection) = Server::start();
    let connection = &mut connection;
    for (stage, is_news) in [(0, false), (3, true), (4, true)] {
        forget(connection);
        let found = value(label(stage, false, 100));
        publish(connection, "", &found, u64::MAX);
        for after in [100, 200] {
            let (answer, whose) = look(connection, "claim", "a:1", (0, after), "");
            assert_eq!(answer == found, is_news, "{stage} after {after}");
            assert_eq!(whose, if is_news { "none" } else { "ours" });
        }
    }
}

#[test]
fn what_nobody_has_read_for_longest_makes_room() {
    let (_server, mut connection) = Server::start();
    let connection = &mut connection;
    for number in 0..200 {
        let key = format!("{}:{number}", if number < 20 { "theirs" } else { "answer" });
        redis::cmd("SET")
            .arg(key)
            .arg("x".repeat(1000))
            .exec(connection)
            .unwrap();
    }
    // All that is in use is too much.
    assert_eq!(publish(connection, "", &value(label(4, false, 1)), 1), "full");
    let keys: Vec<String> = redis::cmd("KEYS").arg("answer:*").query(connection).unwrap();
    assert!((170..180).contains(&keys.len()), "a few each time: {}", keys.len());
    for _ in 0..200 {
        publish(connection, "", &value(label(4, false, 1)), 1);
    }
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(connection).unwrap();
    let (theirs, ours): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| key.starts_with("theirs"));
    assert_eq!(theirs.len(), 20, "what is not ours stays");
    assert!(ours.len() < 10, "{}", ours.len());
    assert!(connection.check_connection());
}
