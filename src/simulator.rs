//! The simulated upstream and the demo fleet, behind the commands `upstream` and `demo`.
//!
//! The real upstream cannot be asked from a test and has no free key, so the project owns a faithful, strict stand-in:
//! it counts arrivals by the kernel's own stamps and remembers every second that held more than the limit. It runs as a
//! process of its own, so that its clock is not disturbed by the gateway's work.
//!
//! The first part of a task's id, up to its first `.`, steers how the task behaves; any other id is a task that runs:
//!
#![doc = concat!("```text\n", include_str!("simulator/steering.txt"), "```")]
//!
//! Names no other module of the crate.

mod answer;
mod arrival;
mod board;
mod body;
mod client;
mod demo;
mod endpoint;
mod fleet;
mod ledger;
mod link;
mod options;
mod server;
mod steer;
mod unwritable;
mod window;

pub use demo::{DemoArgs, demo};
pub use options::UpstreamArgs;
pub use server::upstream;
