//! What users see of the gateway: a file a behaviour, tests that state facts.
//!
//! Real sockets and the real binary (`harness::Gateway`, `harness::Simulator`), or, where a promise is about time, paused
//! time over in-memory connections (`harness::paused`).
//!
//! - `coalescing`: a flight for everybody
//! - `fidelity`: bytes as upstream sent them
//! - `isolation`: keys, accounts, and what passes between them
//! - `requests`: what a poll may look like, and how bad ones are refused
//! - `pace`: never more than 15 in any sliding second, never less than 14
//! - `connections`: time-outs, limits, and who shares what
//! - `passthrough`: every other path, untouched
//! - `stop`: what SIGTERM costs nobody
//! - `tls`: upstream over TLS

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on shall fail"
)]
#![allow(unreachable_pub, reason = "the harness is public to every file here")]

mod coalescing;
mod connections;
mod fidelity;
mod harness;
mod isolation;
mod pace;
mod passthrough;
mod requests;
mod stop;
mod tls;
