//! A company's polling, played on paused time and without sockets: upstream directly, and through the gateway.
//!
//! ```text
//! fleet ─▶ client ──────────────────────▶ upstream     direct
//! fleet ─▶ client ─▶ the real Gateway ──▶ upstream     gateway
//! ```
//! The same tasks, clients and phases both times (`tasks`, `fleet`), a model of upstream's limit (`upstream`), and a
//! Markdown table of what came of it (`report`). It fails when the gateway let more than 15 arrive in any sliding second.
//! `cargo bench --bench polling` plays every row, with `-- --quick` those up to 200 tasks.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench that cannot go on shall fail, and what it finds is its output"
)]
#![allow(unreachable_pub, reason = "`pub` says what a file offers the others")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the counts of a run are small"
)]

mod client;
mod fleet;
mod report;
mod tasks;
mod upstream;

use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use crun_gateway::config::Config;
use crun_gateway::gateway::Gateway;
use crun_gateway::metrics::Metrics;
use crun_gateway::server::serve_connection;
use parking_lot::Mutex;
use tokio::io::duplex;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use client::Connect;
use fleet::{Company, PATIENCE};
use report::{Outcome, Seen};
use upstream::{LIMIT, PIPE, Upstream};

/// What happens before is not looked at: every task is new to the gateway, at once.
const WARM_UP: Duration = Duration::from_mins(3);

/// Tasks, clients, and seconds between polls.
const ROWS: &[(usize, usize, u64)] = &[
    (10, 1, 2),
    (10, 10, 2),
    (10, 10, 5),
    (50, 10, 2),
    (50, 10, 15),
    (200, 1, 5),
    (200, 50, 2),
    (200, 50, 5),
    (200, 50, 15),
    (500, 50, 2),
    (500, 200, 5),
    (500, 200, 15),
    (1000, 200, 5),
    (1000, 200, 15),
    (2000, 200, 5),
    (2000, 200, 15),
];

/// How the fleet reaches upstream.
#[derive(Clone, Copy)]
enum Way {
    Direct,
    Gateway,
}

fn main() -> ExitCode {
    let has = |wanted: &str| std::env::args().any(|argument| argument == wanted);
    // cargo bench says so; cargo test --all-targets starts this, too, and shall not wait for it.
    if !has("--bench") {
        eprintln!("nothing to test here: cargo bench --bench polling");
        return ExitCode::SUCCESS;
    }
    let rows = ROWS.iter().filter(|(tasks, ..)| !has("--quick") || *tasks <= 200);
    report::head();
    for &(tasks, clients, seconds) in rows {
        let company = Company {
            tasks,
            clients,
            interval: Duration::from_secs(seconds),
        };
        let (direct, gateway) = (play(company, Way::Direct), play(company, Way::Gateway));
        report::row(company, &direct, &gateway);
        if gateway.most_in_a_second > LIMIT {
            eprintln!(
                "the gateway let {} queries arrive in one second: no more than {LIMIT} may ({company:?})",
                gateway.most_in_a_second
            );
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// What is looked at, for this many tasks: long enough for 500 of them to end.
fn span(tasks: usize) -> Duration {
    Duration::from_secs(90 * 500 / tasks as u64).max(Duration::from_mins(4))
}

/// Plays one company's polling, from the start of everything.
fn play(company: Company, way: Way) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let start = Instant::now();
        let looked_at = WARM_UP..WARM_UP + span(company.tasks);
        let until = looked_at.end + PATIENCE;
        let tasks: Arc<[_]> = tasks::tasks(company.tasks, until).into();
        let upstream = Upstream::new(start, Arc::clone(&tasks));
        let connect: Connect = match way {
            Way::Direct => {
                let upstream = Arc::clone(&upstream);
                Arc::new(move |_| upstream.connect())
            }
            Way::Gateway => through_a_gateway(&upstream),
        };
        let seen = Arc::new(Mutex::new(Seen::new(looked_at)));
        fleet::start(company, &tasks, start, &connect, &seen);
        sleep(until).await;
        let seen = seen.lock();
        seen.outcome(company, &tasks, &upstream.arrivals())
    })
}

/// A gateway as it comes, before `upstream`; each client has an address of its own.
fn through_a_gateway(upstream: &Arc<Upstream>) -> Connect {
    let mut config = Config::default();
    config.upstream.url = "http://upstream".parse().unwrap();
    let limits = config.limits.clone();
    let metrics = Arc::new(Metrics::new().unwrap());
    let gateway = Gateway::new(config, upstream.dial(), metrics).unwrap();
    tokio::spawn({
        let gateway = Arc::clone(&gateway);
        async move { gateway.sweep().await }
    });
    Arc::new(move |client| {
        let (near, far) = duplex(PIPE);
        let (gateway, limits) = (Arc::clone(&gateway), limits.clone());
        let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 1).to_bits() + client as u32);
        tokio::spawn(async move {
            serve_connection(far, IpAddr::V4(address), gateway, &limits, CancellationToken::new()).await;
        });
        near
    })
}
