//! What the parts take, each in process and on one thread: time, and instructions where valgrind is installed. A busy
//! machine changes the time and not the instructions.
//!
//! `cargo bench --bench parts` runs all of them, `-- hit_path` or another one's name that one alone; `-- --quick` looks
//! only whether they run.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on shall fail, and what it finds is its output"
)]
#![allow(unreachable_pub, reason = "`pub` says what a file offers the others")]
#![allow(clippy::cast_precision_loss, reason = "the counts of a run are small")]

mod answer;
mod classification;
mod fair_queue;
mod flight;
mod hit_path;
mod packing;

use std::process::Command;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::time::Instant;

/// Something that is done `times` times, in units of its own. It gives the time that this took, without what it took to
/// get there.
struct Case {
    name: &'static str,
    /// What is different from the others of its part.
    of: usize,
    /// How many units one time is.
    units: usize,
    run: fn(of: usize, times: usize) -> Duration,
    times: usize,
}

/// The case, and how many times: for a process that valgrind counts the instructions of.
const COUNTED: &str = "CRUN_GATEWAY_BENCH_COUNTED";

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut part = |name, run, all: &[(usize, usize, usize)]| {
        let case = |(of, units, times): &(usize, usize, usize)| Case {
            name,
            of: *of,
            units: *units,
            run,
            times: *times,
        };
        cases.extend(all.iter().map(case));
    };
    part("hit_path", hit_path::run, &[(1, 1, 200_000), (1000, 1, 200_000)]);
    part("miss_path", hit_path::misses, &[(1, 1, 20_000)]);
    let sizes = [(2 << 10, 1, 20_000), (64 << 10, 1, 1000), (10 << 20, 1, 20)];
    part("classification", classification::run, &sizes);
    let sizes = [(2 << 10, 1, 100_000), (32 << 10, 1, 10_000)];
    part("packing", packing::packs, &sizes);
    part("unpacking", packing::unpacks, &sizes);
    let waiters = [10, 100, 1000, 10_000, 100_000].map(|of| (of, of, 200_000 / of));
    part("fair_queue", fair_queue::run, &waiters);
    let followers = [1, 10, 100, 1000, 10_000].map(|of| (of, of, 100_000 / of));
    part("flight", flight::run, &followers);
    cases
}

fn main() {
    let cases = cases();
    if let Ok(counted) = std::env::var(COUNTED) {
        let (case, times) = counted.split_once(' ').unwrap();
        let case = &cases[case.parse::<usize>().unwrap()];
        (case.run)(case.of, times.parse().unwrap());
        return;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // cargo bench says so; cargo test --all-targets starts this, too, and shall not wait for it.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let is_quick = arguments.iter().any(|argument| argument == "--quick");
    let named: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    println!("| part | of | µs each | instructions each |\n|---|--:|--:|--:|");
    for (number, case) in cases.iter().enumerate() {
        if !named.is_empty() && named.iter().all(|name| *name != case.name) {
            continue;
        }
        let times = if is_quick { 1 } else { case.times };
        let took = (case.run)(case.of, times);
        let each = took.as_secs_f64() * 1e6 / (times * case.units) as f64;
        let instructions = (!is_quick).then(|| instructions(number, case)).flatten();
        let instructions = instructions.map_or_else(|| "–".to_owned(), |each| each.to_string());
        println!("| {} | {} | {each:.2} | {instructions} |", case.name, case.of);
    }
}

/// What one more unit takes: what is done before and after it is the same in both runs.
fn instructions(number: usize, case: &Case) -> Option<u64> {
    let (fewer, more) = ((case.times / 50).max(1), (case.times / 10).max(2));
    let counted = |times| {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(std::env::current_exe().unwrap())
            .env(COUNTED, format!("{number} {times}"))
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let (_, count) = text.rsplit_once("Collected : ")?;
        count.lines().next()?.trim().parse::<u64>().ok()
    };
    let extra = counted(more)?.saturating_sub(counted(fewer)?);
    Some(extra / ((more - fewer) * case.units) as u64)
}

/// A runtime as a worker sees it.
fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// The time that `work` takes.
fn timed<T>(work: impl FnOnce() -> T) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}
