//! What one shared store carries: replicas ask it for permits by the script that they share, at a rising number of accounts,
//! each of which has more work at each replica than its budget allows.
//!
//! `cargo bench --bench store` takes half a minute and needs `redis-server`; a name after `--` is another server's, e.g.
//! `-- valkey-server`; `-- --quick` looks only whether it runs. Replicas are played by a thread each, which calls as
//! `shared::process` does: one call at a time, at most 64 accounts in one, each asked for again when its permit is spent or
//! when the store says so. The threads share the machine with the store, so look at the CPU time of a call, too.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on shall fail, and what it finds is its output"
)]
#![allow(unreachable_pub, reason = "`pub` says what a file offers the others")]
#![allow(clippy::cast_precision_loss, reason = "the counts of a run are small")]

#[path = "growth/ask.rs"]
mod ask;
#[path = "growth/process.rs"]
mod process;

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{park_timeout, spawn};
use std::time::Duration;

use ask::ask;
use redis::{Client, Connection, ConnectionLike as _, Script};
use tokio::net::TcpStream;
use tokio::time::Instant;

const LEND: &str = include_str!("../src/shared/lend.lua");
const KEY: &str = "crun-gateway:budget";

const LIMIT: usize = 15;
const WINDOW: Duration = Duration::from_millis(1030);

/// Accounts in one call, at most, and a call at least so often: as in `shared::process`.
const MOST_ACCOUNTS: usize = 64;
const HEARTBEAT: Duration = Duration::from_millis(250);

/// From here on a reply is none: a third of the margin.
const LATE: Duration = Duration::from_millis(10);

/// A server that keeps nothing, and ends with the bench.
struct Store {
    child: Child,
    client: Client,
    address: SocketAddr,
    _directory: tempfile::TempDir,
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Store {
    fn start(server: &str) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let port = address.port();
        let mut command = Command::new(server);
        command.args(["--bind", "127.0.0.1", "--port", &port.to_string()]);
        let directory = tempfile::tempdir().unwrap();
        command
            .args(["--save", "", "--appendonly", "no", "--dir"])
            .arg(directory.path());
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        let client = Client::open(("127.0.0.1", port)).unwrap();
        let store = Self {
            child,
            client,
            address,
            _directory: directory,
        };
        for _ in 0..1000 {
            if let Ok(mut connection) = store.client.get_connection()
                && connection.check_connection()
            {
                return store;
            }
            park_timeout(Duration::from_millis(10));
        }
        panic!("{server} does not answer");
    }

    fn connect(&self) -> Connection {
        self.client.get_connection().unwrap()
    }

    /// The time that it has run on a core.
    fn cpu(&self) -> Duration {
        let text: String = redis::cmd("INFO").arg("cpu").query(&mut self.connect()).unwrap();
        let field = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().parse().unwrap()
        };
        Duration::from_secs_f64(field("used_cpu_user:") + field("used_cpu_sys:"))
    }
}

/// What a replica saw.
#[derive(Default)]
struct Seen {
    took: Vec<Duration>,
    asks: usize,
    permits: usize,
}

/// What is asked for, and by how many.
#[derive(Clone, Copy)]
struct Load {
    replicas: usize,
    accounts: usize,
}

/// One replica, until it is told to stop. What it sees before `from` counts for nothing.
fn replica(mut connection: Connection, number: usize, load: Load, from: Instant, stop: &AtomicBool) -> Seen {
    let Load { replicas, accounts } = load;
    let script = Script::new(LEND);
    let mut seen = Seen::default();
    let (mut generation, mut time) = (String::new(), String::new());
    // When each account is asked for, by number; each replica begins elsewhere, as their clients would.
    let mut due = vec![Instant::now(); accounts];
    let mut first = number * accounts / replicas;
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        let wanted = (0..accounts)
            .map(|at| (first + at) % accounts)
            .filter(|at| due[*at] <= now);
        let wanted: Vec<_> = wanted.take(MOST_ACCOUNTS).collect();
        let Some(last) = wanted.last() else {
            let next = due.iter().min().map_or(HEARTBEAT, |next| *next - now);
            park_timeout(next.min(HEARTBEAT));
            continue;
        };
        first = (last + 1) % accounts;
        let mut call = script.key(KEY);
        call.arg(format!("{number:016}")).arg(&generation).arg(&time).arg(1);
        call.arg(LIMIT).arg(replicas).arg(WINDOW.as_micros().to_string());
        for account in &wanted {
            // As long as the name of an unlisted account.
            call.arg(format!("key:{account:064}"))
                .arg(10)
                .arg(9)
                .arg(1)
                .arg(0)
                .arg(0)
                .arg(0);
        }
        let sent = Instant::now();
        let reply: Vec<String> = call.invoke(&mut connection).unwrap();
        let took = sent.elapsed();
        (generation, time) = (reply[0].clone(), reply[1].clone());
        let mut permits = 0;
        for (account, dealt) in wanted.iter().zip(reply[3..].chunks(6)) {
            let micros = |word: &str| word.parse().ok().map(Duration::from_micros);
            let slot = micros(&dealt[0]);
            permits += usize::from(slot.is_some());
            due[*account] = sent + slot.or(micros(&dealt[1])).unwrap_or(HEARTBEAT);
        }
        if sent >= from {
            seen.took.push(took);
            seen.asks += wanted.len();
            seen.permits += permits;
        }
    }
    seen
}

fn row(server: &str, load: Load, each: Duration) {
    let Load { replicas, accounts } = load;
    let store = Store::start(server);
    let from = Instant::now() + each / 3;
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..replicas)
        .map(|number| {
            let (connection, stop) = (store.connect(), Arc::clone(&stop));
            spawn(move || replica(connection, number, load, from, &stop))
        })
        .collect();
    wait(from);
    let before = store.cpu();
    wait(from + each);
    let cpu = store.cpu().saturating_sub(before);
    stop.store(true, Ordering::Relaxed);
    let bytes: usize = redis::cmd("MEMORY")
        .arg("USAGE")
        .arg(KEY)
        .arg("SAMPLES")
        .arg(0)
        .query(&mut store.connect())
        .unwrap();
    let seen: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let mut took: Vec<_> = seen.iter().flat_map(|seen| seen.took.iter().copied()).collect();
    took.sort_unstable();
    let calls = took.len() as f64;
    let asks: usize = seen.iter().map(|seen| seen.asks).sum();
    let permits: usize = seen.iter().map(|seen| seen.permits).sum();
    let late = took.iter().filter(|took| **took > LATE).count();
    let seconds = each.as_secs_f64();
    let ms = |percent: usize| took[(took.len() - 1) * percent / 100].as_secs_f64() * 1e3;
    println!(
        "| {replicas} | {accounts} | {:.0} | {:.2} | {:.2} | {:.2} % | {:.0} | {:.0} | {:.0} % | {:.0} % | {} |",
        calls / seconds,
        ms(50),
        ms(99),
        100.0 * late as f64 / calls,
        asks as f64 / seconds,
        permits as f64 / seconds,
        100.0 * permits as f64 / seconds / (accounts as f64 * LIMIT as f64 / WINDOW.as_secs_f64()),
        100.0 * cpu.as_secs_f64() / seconds,
        bytes / accounts,
    );
}

/// What an answer takes of the store's memory: a gateway fetches so many and shares them.
fn answers(server: &str, answers: usize) {
    let store = Store::start(server);
    let (_upstream, upstream) = process::start(
        &[
            "upstream",
            "--listen",
            "127.0.0.1:0",
            "--limit",
            "1000000",
            "--latency",
            "0ms",
        ],
        " on http://",
    );
    let (_gateway, gateway) = process::gateway(&format!(
        "upstream: {{ url: \"http://{upstream}\" }}\n\
         budget: {{ limit: 1000000 }}\nshared: {{ url: \"redis://{}\", max_replicas: 1, max_bytes: \"16GiB\" }}",
        store.address
    ));
    let mut connection = store.connect();
    let kept = |connection: &mut Connection| -> usize {
        let keys: Vec<String> = redis::cmd("KEYS")
            .arg("crun-gateway:answer:*")
            .query(connection)
            .unwrap();
        keys.len()
    };
    let used = |connection: &mut Connection| -> usize {
        let text: String = redis::cmd("INFO").arg("memory").query(connection).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("used_memory:")).unwrap();
        line.trim().parse().unwrap()
    };
    let size = poll(gateway, answers..answers + 1);
    let before = used(&mut connection);
    let threads = [0, 1, 2, 3].map(|part| spawn(move || poll(gateway, part * answers / 4..(part + 1) * answers / 4)));
    for thread in threads {
        thread.join().unwrap();
    }
    // They are written behind.
    for _ in 0..1000 {
        if kept(&mut connection) > answers {
            break;
        }
        park_timeout(Duration::from_millis(10));
    }
    assert_eq!(kept(&mut connection), answers + 1, "each is shared");
    let each = (used(&mut connection) - before) / answers;
    println!("\n{answers} answers of {size} bytes: {each} bytes of the store's memory each");
}

/// Polls tasks that have ended, one after the other; gives the size of an answer's body, in bytes.
fn poll(gateway: SocketAddr, tasks: std::ops::Range<usize>) -> usize {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(async {
        let mut stream = TcpStream::connect(gateway).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut size = 0;
        for task in tasks {
            let path = format!("/api/v1/client/job/TaskInfo?task_id=big-624.{task:06}");
            size = ask(&mut stream, &path).await.len();
        }
        size
    })
}

fn wait(until: Instant) {
    while let Some(left) = until
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
    {
        park_timeout(left);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // cargo bench says so; cargo test --all-targets starts this, too, and shall not wait for it.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let is_quick = arguments.iter().any(|argument| argument == "--quick");
    let named = arguments.iter().find(|argument| !argument.starts_with('-'));
    let server = named.map_or("redis-server", String::as_str);
    println!("{server}");
    println!(
        "| replicas | accounts | calls a second | ms, median | p99 | over 10 ms | accounts asked for a second | permits a \
         second | of the full pace | store's CPU | bytes an account |"
    );
    println!("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    let (all, each): (&[_], _) = if is_quick {
        (&[(3, 1), (3, 100)], Duration::from_millis(300))
    } else {
        (
            &[
                (3, 1),
                (3, 100),
                (3, 1000),
                (3, 3000),
                (3, 10_000),
                (15, 100),
                (15, 1000),
                (15, 3000),
            ],
            Duration::from_secs(4),
        )
    };
    for (replicas, accounts) in all {
        let load = Load {
            replicas: *replicas,
            accounts: *accounts,
        };
        row(server, load, each);
    }
    answers(server, if is_quick { 100 } else { 10_000 });
}
