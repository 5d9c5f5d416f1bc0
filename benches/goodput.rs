//! What of an account's 15 queries a second does work when more is asked for than there is, for two minutes: the real
//! binary, real sockets, and the project's simulated upstream, which counts every sliding second as strictly as can be.
//!
//! 50 clients ask for one unheard-of task after another, so that every answer costs a query. It fails below 14.3 answers a
//! second, or when upstream ever said 429. `cargo bench --bench goodput`; `-- --quick` looks for some seconds whether it runs.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench that cannot go on shall fail, and what it finds is its output"
)]
#![allow(unreachable_pub, reason = "`pub` says what a file offers the others")]
#![allow(clippy::cast_precision_loss, reason = "the counts of a run are small")]

#[path = "growth/ask.rs"]
mod ask;
#[path = "growth/process.rs"]
mod process;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use ask::ask;
use process::{gateway, start};

const CLIENTS: usize = 50;

/// Answers a second that have to come of 15 queries a second.
const LEAST: f64 = 14.3;

/// Before the count begins: the silence at start is over, and everybody waits in line.
const WARM_UP: Duration = Duration::from_secs(5);

/// Asks for one task after another.
async fn poll(address: SocketAddr, client: usize, answered: Arc<AtomicUsize>, is_over: Arc<AtomicBool>) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut task = 0;
    while !is_over.load(Ordering::Relaxed) {
        let path = format!("/api/v1/client/job/TaskInfo?task_id=ended.{client}.{task}");
        ask(&mut stream, &path).await;
        answered.fetch_add(1, Ordering::Relaxed);
        task += 1;
    }
}

async fn bench(counted: Duration) -> ExitCode {
    let (_upstream, upstream) = start(
        &[
            "upstream",
            "--listen",
            "127.0.0.1:0",
            "--limit",
            "15",
            "--latency",
            "100ms",
        ],
        "http://",
    );
    let (_gateway, address) = gateway(&format!("upstream: {{ url: \"http://{upstream}\" }}"));
    let (answered, is_over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        clients.spawn(poll(address, client, Arc::clone(&answered), Arc::clone(&is_over)));
    }
    sleep(WARM_UP).await;
    let (begun, before) = (Instant::now(), answered.load(Ordering::Relaxed));
    sleep_until(begun + counted).await;
    let goodput = (answered.load(Ordering::Relaxed) - before) as f64 / begun.elapsed().as_secs_f64();
    is_over.store(true, Ordering::Relaxed);
    clients.join_all().await;
    let mut stream = TcpStream::connect(upstream).await.unwrap();
    let stats = ask(&mut stream, "/__stats").await;
    let stats: Value = serde_json::from_slice(&stats).unwrap();
    let number = |name: &str| stats[name].as_u64().unwrap();
    let (limited, highest) = (
        number("rate_limited") + number("violations"),
        number("highest_in_any_second"),
    );
    println!(
        "| clients | seconds | answers a second | upstream 429s | most queries in any second |\n|--:|--:|--:|--:|--:|"
    );
    println!(
        "| {CLIENTS} | {} | {goodput:.2} | {limited} | {highest} |",
        counted.as_secs()
    );
    if goodput < LEAST || limited > 0 {
        eprintln!("below {LEAST} answers a second, or above the limit");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    // cargo bench says so; cargo test --all-targets starts this, too, and shall not wait for it.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    let is_quick = arguments.iter().any(|argument| argument == "--quick");
    let counted = Duration::from_secs(if is_quick { 5 } else { 120 });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(bench(counted))
}
