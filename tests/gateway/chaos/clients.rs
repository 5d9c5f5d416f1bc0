//! Those who poll in the chaos: clients that want an answer and check it, and clients that vanish, stall and lie.

use std::hash::{DefaultHasher, Hasher as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::time::{Instant, sleep, timeout};

use super::answers::{BAD, Due, GOOD, LIMITED, judge, prefix};
use super::{Account, Chaos};
use crate::harness::TASK_INFO;
use crate::harness::raw::Raw;

/// The shortest that a real client waits.
const PATIENCE: Duration = Duration::from_secs(15);

/// A number that depends on nothing else.
fn dice(seed: impl std::hash::Hash) -> usize {
    let mut hasher = DefaultHasher::new();
    seed.hash(&mut hasher);
    usize::try_from(hasher.finish() >> 16).unwrap_or(0)
}

fn poll(key: &str, task: &str) -> String {
    format!("GET {TASK_INFO}?task_id={task} HTTP/1.1\r\nhost: gateway\r\nx-api-key: {key}\r\n\r\n")
}

/// What is polled for in this turn: mostly tasks that others poll, too.
fn choose(account: &Account, client: usize, turn: usize) -> (String, Due) {
    let (kind, which) = (dice((client, turn, "kind")) % 100, dice((client, turn, "which")));
    let own = account.name;
    // Each is asked for some dozens of times, by several clients, and then no more.
    let generation = turn / 40;
    match kind {
        0..60 => (
            super::shared_tasks()[which % super::shared_tasks().len()].clone(),
            Due::Task,
        ),
        60..75 => (format!("{own}-{generation}-{}", which % 8), Due::Task),
        75..96 => (
            format!("{}.{own}-{generation}-{}", GOOD[which % GOOD.len()], which % 3),
            Due::Task,
        ),
        _ => {
            let (word, due) = BAD[which % BAD.len()];
            (format!("{word}.{own}-{client}-{turn}"), due)
        }
    }
}

/// Polls over a connection that it keeps, and checks each answer.
pub async fn polls(chaos: Arc<Chaos>, account: Arc<Account>, client: usize) {
    let mut kept = None;
    for turn in 0.. {
        if chaos.stop.is_cancelled() {
            return;
        }
        let (task, due) = if account.is_limited {
            let (word, due) = LIMITED[dice((client, turn)) % LIMITED.len()];
            (format!("{word}.{client}-{turn}"), due)
        } else {
            choose(&account, client, turn)
        };
        let mut connection = match kept.take() {
            Some(connection) => connection,
            None => Raw::connect(chaos.address).await,
        };
        let key = account.credentials[dice((client, turn, "key")) % account.credentials.len()];
        let started = Instant::now();
        let answered = async {
            connection.send(poll(key, &task)).await?;
            connection.try_reply().await
        };
        match answered.await {
            Ok(Some(reply)) => {
                let known = account.known.get(&task).map(Vec::as_slice);
                let judged = judge(&task, due, known, &reply);
                if judged.as_ref().is_ok_and(|kind| !kind.starts_with("refused")) {
                    *chaos.told.lock().entry(prefix(&task).to_owned()).or_default() += 1;
                }
                chaos.count(judged);
                if started.elapsed() > PATIENCE {
                    chaos.count(Err(format!("{task}: answered after {:?}", started.elapsed())));
                }
                kept = Some(connection).filter(|_| !reply.says_close());
            }
            other => chaos.count(Err(format!("{task}: no answer: {other:?}"))),
        }
        sleep(Duration::from_millis(dice((client, turn, "pause")) as u64 % 60)).await;
    }
}

/// Asks with a key that upstream refuses, and with one that nobody has seen before.
pub async fn strangers(chaos: Arc<Chaos>) {
    for turn in 0.. {
        for (key, status) in [("ak_refused_1".to_owned(), 401), (format!("ak_stranger_{turn}"), 200)] {
            if chaos.stop.is_cancelled() {
                return;
            }
            let mut connection = Raw::connect(chaos.address).await;
            let task = format!("ended.music-{}", turn % 8);
            connection.send(poll(&key, &task)).await.unwrap();
            let reply = connection.reply().await;
            let due = if status == 401 { Due::Code(401) } else { Due::Task };
            chaos.count(judge(&task, due, None, &reply));
            sleep(Duration::from_millis(500)).await;
        }
    }
}

/// Goes before it is answered, or before it has asked.
pub async fn vanishes(chaos: Arc<Chaos>, account: Arc<Account>, client: usize) {
    for turn in 0.. {
        if chaos.stop.is_cancelled() {
            return;
        }
        let (task, _) = choose(&account, client, turn);
        let text = poll(account.credentials[0], &task);
        let mut connection = Raw::connect(chaos.address).await;
        let sent = if turn % 3 == 0 { text.len() / 2 } else { text.len() };
        // The gateway may have closed it already: that is no fault.
        let _ = connection.send(&text[..sent]).await;
        sleep(Duration::from_millis([0, 1, 20, 200][turn % 4])).await;
        if turn % 2 == 0 {
            let _ = SockRef::from(&connection.stream).set_linger(Some(Duration::ZERO));
        }
        drop(connection);
        chaos.count(Ok("vanished".into()));
        sleep(Duration::from_millis(20)).await;
    }
}

/// Sends its head byte by byte, or reads nothing of large answers.
pub async fn stalls(chaos: Arc<Chaos>, account: Arc<Account>, client: usize) {
    for turn in 0.. {
        if chaos.stop.is_cancelled() {
            return;
        }
        let mut connection = Raw::connect(chaos.address).await;
        if (client + turn).is_multiple_of(2) {
            let text = poll(account.credentials[0], "ended.x");
            let dripped = async {
                for byte in text.as_bytes().chunks(1).cycle() {
                    connection.send(byte).await?;
                    sleep(Duration::from_millis(300)).await;
                }
                std::io::Result::Ok(())
            };
            match timeout(PATIENCE, dripped).await {
                Ok(_) => chaos.count(Ok("stalled, and was cut off".into())),
                Err(_) => chaos.count(Err("a head of 15 s".into())),
            }
        } else {
            let task = format!("big-1MiB.{}-0-0", account.name);
            let text = poll(account.credentials[0], &task).repeat(10);
            let _ = connection.send(text).await;
            sleep(Duration::from_secs(3)).await;
            chaos.count(Ok("stalled, and went".into()));
        }
    }
}

/// Sends what is no poll.
pub async fn lies(chaos: Arc<Chaos>, key: &'static str) {
    let head = |line: &str, headers: &str| format!("{line} HTTP/1.1\r\nhost: gateway\r\n{headers}\r\n");
    let with_key = format!("x-api-key: {key}\r\n");
    let info = format!("GET {TASK_INFO}?task_id=ended.lie");
    let lies = [
        (head("GET /", ""), Some(404)),
        (head(&info, ""), Some(401)),
        (head(&info, &format!("{with_key}x-api-key: ak_other\r\n")), Some(401)),
        (head(&format!("GET {TASK_INFO}"), &with_key), Some(422)),
        (
            head(&format!("GET {TASK_INFO}?task_id={}", "a".repeat(300)), &with_key),
            Some(422),
        ),
        (head(&format!("DELETE {TASK_INFO}?task_id=a"), &with_key), Some(405)),
        (
            head("GET /api/v1/client/job//TaskInfo?task_id=ended.lie", &with_key),
            Some(404),
        ),
        (
            head("GET /api/v1/client/job/Task%49nfo/?task_id=ended.lie", &with_key),
            Some(404),
        ),
        (
            head(&info, &format!("{with_key}x-filler: {}\r\n", "a".repeat(1 << 20))),
            None,
        ),
        (
            head(&info, &format!("{with_key}content-length: 4\r\ncontent-length: 5\r\n")),
            None,
        ),
        ("\u{1}\u{2} neither HTTP\r\nnor anything else\r\n\r\n".to_owned(), None),
        // A body that never comes.
        (head("POST /api/v1/echo", "content-length: 1000\r\n"), None),
    ];
    for (lie, status) in lies.iter().cycle() {
        if chaos.stop.is_cancelled() {
            return;
        }
        let mut connection = Raw::connect(chaos.address).await;
        let _ = connection.send(lie).await;
        match (timeout(Duration::from_secs(5), connection.try_reply()).await, status) {
            (Ok(Ok(Some(reply))), Some(status)) if reply.is(*status) => chaos.count(Ok("lied, and was refused".into())),
            (Ok(Ok(Some(reply))), None) if !reply.is(200) => chaos.count(Ok("lied, and was refused".into())),
            (Ok(Ok(None) | Err(_)) | Err(_), None) => chaos.count(Ok("lied, and got nothing".into())),
            (other, _) => {
                let lie: String = lie.chars().take(200).collect();
                chaos.count(Err(format!("{other:?} to {lie:?}")));
            }
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Posts bodies that are streamed through, and checks that they arrived whole.
pub async fn posts(chaos: Arc<Chaos>) {
    for turn in 0.. {
        if chaos.stop.is_cancelled() {
            return;
        }
        let length = dice(turn) % 100_000;
        let text = format!("POST /api/v1/echo HTTP/1.1\r\nhost: gateway\r\ncontent-length: {length}\r\n\r\n");
        let mut connection = Raw::connect(chaos.address).await;
        connection.send(text + &"a".repeat(length)).await.unwrap();
        let reply = connection.reply().await;
        let is_whole = || reply.json()["body_length"] == length;
        chaos.count(match reply.is(200) {
            true if is_whole() => Ok("streamed through".into()),
            false if reply.is(502) || reply.is(503) => Ok("not streamed through".into()),
            _ => Err(format!("a post of {length} bytes: {}", reply.head)),
        });
        sleep(Duration::from_millis(200)).await;
    }
}

/// The bytes of an answer that stays the same; asks until it is one.
pub async fn learn(address: SocketAddr, key: &str, task: &str) -> Vec<u8> {
    let mut connection = Raw::connect(address).await;
    connection.send(poll(key, task)).await.unwrap();
    let reply = connection.reply().await;
    assert!(reply.is(200), "{reply:?}");
    reply.body
}
