//! What users see of the gateway: a file a behaviour, tests that state facts.
//!
//! Real sockets and the real binary (`harness::Gateway`, `harness::Simulator`), or, where a promise is about time, paused
//! time over in-memory connections (`harness::paused`).
//!
//! - `admission`: whoever cannot be served in time hears so at once
//! - `browser`: the status page in headless Chromium (`tests/browser/run`)
//! - `chaos`: everything goes wrong at once (`tests/chaos/run`)
//! - `client_tls`: clients over TLS: certificates that change, clients that have one, handshakes that fail
//! - `clock`: the wall clock jumps (`tests/clock/run`)
//! - `coalescing`: a flight for everybody
//! - `disk`: ended tasks outlive the process, and no disk is in anybody's way
//! - `fidelity`: bytes as upstream sent them
//! - `freshness`: how long a live answer is served before upstream is asked again
//! - `isolation`: keys, accounts, and what passes between them
//! - `keys`: keys that upstream refuses or has not confirmed lately, and missing credits
//! - `misbehaviour`: answers of upstream that are none, and who notices
//! - `outage`: snapshots while upstream is slow or away, probes, and what comes after
//! - `restart`: the process that comes next spends no second twice
//! - `reload`: a changed configuration is taken over, whole or not at all
//! - `replicas`: several of them share one budget, whatever becomes of the store
//! - `requests`: what a poll may look like, and how bad ones are refused
//! - `fairness`: clients share the budget, and what a client token stands for
//! - `sharing`: replicas share answers and flights, whatever becomes of the store
//! - `simulator`: the simulated upstream, on which the rest of them rely
//! - `spans`: what a collector is told of requests
//! - `status`: the status page and what it is drawn from tell the truth, and no key
//! - `log`: a log that nobody reads holds up nobody
//! - `secrets`: a key is in nothing that comes out
//! - `stop`: a stop loses nothing
//! - `kubernetes_stop`: nor does one as Kubernetes does it, behind a Service
//! - `passthrough`: what is streamed through
//! - `commands`: `check`, the admin port, the demo
//! - `pace`: never more than 15 in any sliding second, never less than 14
//! - `edge`: what the RFCs call an error, and the limits of a request
//! - `limits`: what many connections and few file descriptors come to
//! - `connections`: time-outs, limits, and who shares what
//! - `hits`: a hit is answered ahead of hyper, and nobody can tell
//! - `resting`: a connection on which nothing is asked keeps next to nothing, and nobody notices
//! - `threads`: too few threads end a start in words, and nothing else for good
//! - `tls`: upstream over TLS
//! - `trace`: which trace and which request it was, and who is told

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on shall fail"
)]
#![allow(unreachable_pub, reason = "`pub` says what the harness offers, crate or not")]
#![allow(clippy::cast_precision_loss, reason = "the counts of a test are small")]

mod admission;
mod browser;
mod chaos;
mod client_tls;
mod clock;
mod coalescing;
mod commands;
mod connections;
mod disk;
mod edge;
mod fairness;
mod fidelity;
mod freshness;
mod harness;
mod hits;
mod isolation;
mod keys;
mod kubernetes_stop;
mod limits;
mod log;
mod misbehaviour;
mod outage;
mod pace;
mod passthrough;
mod reload;
mod replicas;
mod requests;
mod restart;
mod resting;
mod secrets;
mod sharing;
mod simulator;
mod spans;
mod status;
mod stop;
mod threads;
mod tls;
mod trace;
