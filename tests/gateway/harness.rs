//! The real binary as gateway and as simulated upstream, a scripted upstream of raw bytes, and a client.

pub mod browser;
pub mod client;
pub mod collector;
pub mod listener;
pub mod paused;
pub mod process;
pub mod raw;
pub mod scripted;
pub mod store;

pub use client::{Reply, poll, poll_as, request};
pub use process::{Gateway, PATIENCE, Simulator, until};
pub use raw::Raw;
pub use scripted::Scripted;

/// The value of one series in what `/metrics` tells, named as there.
#[track_caller]
pub fn value_of(series: &str, metrics: &str) -> f64 {
    let mut lines = metrics.lines();
    let value = lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value
        .unwrap_or_else(|| panic!("no series {series} in\n{metrics}"))
        .parse()
        .unwrap()
}

/// The key of tests that need but one account.
pub const KEY: &str = "ak_test_0000000000000000000000000001";

/// The one path that costs budget.
pub const TASK_INFO: &str = "/api/v1/client/job/TaskInfo";
