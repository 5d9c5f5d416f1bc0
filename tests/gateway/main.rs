//! What users see of the gateway: a file a behaviour, tests that state facts.
//!
//! Real sockets and the real binary (`harness::Gateway`, `harness::Simulator`), or, where a promise is about time, paused
//! time over in-memory connections (`harness::paused`).
//!
//! - `coalescing`: a flight for everybody
//! - `fidelity`: bytes as upstream sent them
//! - `isolation`: keys, accounts, and what passes between them
//! - `outage`: snapshots while upstream is slow or away, probes, and what comes after
//! - `requests`: what a poll may look like, and how bad ones are refused
//! - `pace`: never more than 15 in any sliding second, never less than 14

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on shall fail"
)]

mod coalescing;
mod fidelity;
mod harness;
mod isolation;
mod outage;
mod pace;
mod requests;
