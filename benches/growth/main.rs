//! What a gateway that grows costs: hits with more and more kept answers, connections and accounts, and 10,000 polls of
//! one task that is not kept. The real binary, real sockets, an upstream in this process.
//!
//! `cargo bench --bench growth` takes some minutes, three gigabytes and 11,000 file descriptors in each of the two
//! processes; `-- --quick` looks only whether it runs. The load comes from this process, over one thread: where that is the limit, more connections wait longer for it and not for the
//! gateway. So what the gateway spends is told beside: the CPU time of one hit, its own and the kernel's for it.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on shall fail, and what it finds is its output"
)]
#![allow(unreachable_pub, reason = "`pub` says what a file offers the others")]
#![allow(clippy::cast_precision_loss, reason = "the counts of a run are small")]

#[path = "../parts/answer.rs"]
mod answer;
mod clients;
mod gateway;
mod process;
mod upstream;

use std::time::Duration;

use clients::{Polled, poll_at_once, poll_each, poll_for};
use gateway::Gateway;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Bytes of an answer's body.
const BODY: usize = 2050;

/// What is asked for: `tasks` of each of `accounts`, over `connections`.
#[derive(Clone, Copy)]
struct Load {
    tasks: usize,
    accounts: usize,
    connections: usize,
    /// Of the only task, where there is but one.
    kind: &'static str,
}

impl Load {
    /// How many answers there are to it.
    fn answers(self) -> usize {
        self.tasks * self.accounts
    }
}

/// How much is done.
struct Extent {
    entries: &'static [usize],
    connections: &'static [usize],
    accounts: &'static [usize],
    /// Answers kept while the number of accounts grows.
    shared: usize,
    at_once: usize,
    each: Duration,
}

const FULL: Extent = Extent {
    entries: &[100, 10_000, 1_000_000],
    connections: &[1, 100, 10_000],
    accounts: &[1, 100, 10_000],
    shared: 10_000,
    at_once: 10_000,
    each: Duration::from_secs(3),
};

const QUICK: Extent = Extent {
    entries: &[10, 100],
    connections: &[1, 10],
    accounts: &[1, 10],
    shared: 100,
    at_once: 100,
    each: Duration::from_millis(100),
};

fn row(gateway: &Gateway, load: Load, each: Duration) {
    let before = gateway.cpu();
    let Polled { polls, p50, p99, .. } = poll_for(gateway.address, load, each);
    let cpu = gateway.cpu().saturating_sub(before).as_secs_f64() * 1e6 / polls as f64;
    println!(
        "| {} | {} | {} | {:.0} | {cpu:.1} µs | {p50:.0?} | {p99:.0?} |",
        load.answers(),
        load.connections,
        load.accounts,
        polls as f64 / each.as_secs_f64(),
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    // cargo bench says so; cargo test --all-targets starts this, too, and shall not wait for it.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let is_quick = arguments.iter().any(|argument| argument == "--quick");
    let extent = if is_quick { QUICK } else { FULL };
    let heading = "| kept answers | connections | accounts | hits a second | CPU of one | p50 | p99 |\n|--:|--:|--:|--:|--:|--:|--:|";
    println!("{heading}");
    let upstream = upstream::start();
    let gateway = Gateway::start(upstream);
    let (empty, mut size) = (gateway.resident(), (0, 0));
    for &entries in extent.entries {
        let load = |connections| Load {
            tasks: entries,
            accounts: 1,
            connections,
            kind: "",
        };
        poll_each(gateway.address, load(64));
        size = (entries, (gateway.resident() - empty) / entries);
        for &connections in extent.connections {
            row(&gateway, load(connections), extent.each);
        }
    }
    drop(gateway);
    for &accounts in extent.accounts {
        let gateway = Gateway::start(upstream);
        let load = Load {
            tasks: extent.shared.div_ceil(accounts),
            accounts,
            connections: extent.connections[1],
            kind: "",
        };
        poll_each(gateway.address, load);
        row(&gateway, load, extent.each);
    }
    let (entries, each) = size;
    println!(
        "\n{entries} kept answers of {BODY} bytes: {each} bytes of resident memory each, {:.2} × its body",
        each as f64 / BODY as f64
    );
    let gateway = Gateway::start(upstream);
    let (before, _) = upstream::seen();
    let load = Load {
        tasks: 1,
        accounts: 1,
        connections: extent.at_once,
        kind: upstream::SLOW,
    };
    let Polled { polls, last, .. } = poll_at_once(gateway.address, load);
    let (calls, replied) = upstream::seen();
    println!(
        "\n{polls} polls of one task at once: {} call, and the last was answered {:.0?} after its reply",
        calls - before,
        last - replied,
    );
}
