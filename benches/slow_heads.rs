//! What 500 clients that never end their request's head cost 50 that do: the real binary, real sockets.
//!
//! The 50 poll one ended task over connections that they keep, 20 ms after each answer. By turns they do so alone and with
//! the 500, each of which sends a byte of a header every second and comes back at once when it is cut off. It prints both
//! p99 of each round, and fails when the median of those with company is more than twice that of those without.
//! `cargo bench --bench slow_heads`

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench that cannot go on shall fail, and what it finds is its output"
)]
#![allow(unreachable_pub, reason = "`pub` says what a file offers the others")]

#[path = "growth/ask.rs"]
mod ask;
#[path = "growth/process.rs"]
mod process;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use ask::ask;
use process::{gateway, start};

const PATH: &str = "/api/v1/client/job/TaskInfo?task_id=ended.song";

const POLLERS: usize = 50;
const SLOW: usize = 500;

/// Between an answer and the next poll.
const PAUSE: Duration = Duration::from_millis(20);

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(5);

/// How much worse the p99 may be in slow company.
const MOST: f64 = 2.0;

/// Sends a head byte by byte, and again when it is cut off.
async fn be_slow(address: SocketAddr) {
    let begin = format!("GET {PATH} HTTP/1.1\r\nhost: gateway\r\nx-api-key: ak_bench");
    loop {
        let Ok(mut stream) = TcpStream::connect(address).await else {
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        let mut is_open = stream.write_all(begin.as_bytes()).await.is_ok();
        while is_open {
            sleep(Duration::from_secs(1)).await;
            is_open = stream.write_all(b"a").await.is_ok();
        }
    }
}

/// The p99 of the answers that the pollers get in one round, and how many these are.
async fn round(address: SocketAddr) -> (Duration, usize) {
    let mut pollers = JoinSet::new();
    for number in 0..POLLERS {
        pollers.spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.set_nodelay(true).unwrap();
            let mut took = Vec::new();
            // Nobody is in step with anybody.
            sleep(PAUSE * u32::try_from(number).unwrap() / u32::try_from(POLLERS).unwrap()).await;
            let start = Instant::now();
            while start.elapsed() < ROUND {
                let asked = Instant::now();
                ask(&mut stream, PATH).await;
                took.push(asked.elapsed());
                sleep(PAUSE).await;
            }
            took
        });
    }
    let mut took: Vec<_> = pollers.join_all().await.into_iter().flatten().collect();
    took.sort_unstable();
    (took[took.len() * 99 / 100], took.len())
}

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort_unstable();
    all[all.len() / 2]
}

async fn bench() -> ExitCode {
    let (_upstream, upstream) = start(&["upstream", "--listen", "127.0.0.1:0"], "http://");
    let (_gateway, address) = gateway(&format!("upstream: {{ url: \"http://{upstream}\" }}"));
    let mut first = TcpStream::connect(address).await.unwrap();
    ask(&mut first, PATH).await;
    // The first round warms up.
    round(address).await;
    let (mut alone, mut in_company) = (Vec::new(), Vec::new());
    println!("| round | p99 alone | p99 with {SLOW} slow heads | polls |\n|--:|--:|--:|--:|");
    for number in 1..=ROUNDS {
        let (quiet, quiet_polls) = round(address).await;
        let mut slow = JoinSet::new();
        for _ in 0..SLOW {
            slow.spawn(be_slow(address));
        }
        sleep(Duration::from_secs(1)).await;
        let (beset, polls) = round(address).await;
        slow.shutdown().await;
        println!("| {number} | {quiet:.1?} | {beset:.1?} | {quiet_polls} → {polls} |");
        alone.push(quiet);
        in_company.push(beset);
    }
    let ratio = median(in_company).as_secs_f64() / median(alone).as_secs_f64();
    println!("\nmedian with slow heads ÷ median alone: {ratio:.2}");
    if ratio > MOST {
        eprintln!("500 slow heads lift the p99 of 50 clients above {MOST} × the quiet one");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    // cargo bench says so; cargo test --all-targets starts this, too, and shall not wait for it.
    if !std::env::args().any(|argument| argument == "--bench") {
        eprintln!("nothing to test here: cargo bench --bench slow_heads");
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(bench())
}
