//! What users see of the gateway: a file a behaviour, tests that state facts.
//!
//! Real sockets and the real binary (`harness::Gateway`, `harness::Simulator`), or, where a promise is about time,
//! paused time over in-memory connections (`harness::paused`).
//!
//! - `admission`: whoever cannot be served in time hears so at once
//! - `browser`: the status page in headless Chromium (`tests/browser/run`)
//! - `chaos`: everything goes wrong at once (`tests/chaos/run`)
//! - `client_tls`: clients over TLS: certificates that change, clients that have one, handshakes that fail
//! - `clock`: the wall clock jumps (`tests/clock/run`)
//! - `coalescing`: a flight for everybody
//! - `commands`: `check`, the admin port, the demo
//! - `connections`: time-outs, limits, and who shares what
//! - `disk`: ended tasks outlive the process, and no disk is in anybody's way
//! - `edge`: what the RFCs call an error, and the limits of a request
//! - `fairness`: clients share the budget, and what a client token stands for
//! - `fidelity`: bytes as upstream sent them
//! - `freshness`: how long a live answer is served before upstream is asked again
//! - `hits`: a hit is answered ahead of hyper, and nobody can tell
//! - `isolation`: keys, accounts, and what passes between them
//! - `keys`: keys that upstream refuses or has not confirmed lately, and missing credits
//! - `kubernetes_stop`: nor does a stop as Kubernetes does it, behind a Service, lose anything
//! - `limits`: what many connections and few file descriptors come to
//! - `log`: a log that nobody reads holds up nobody
//! - `misbehaviour`: answers of upstream that are none, and who notices
//! - `outage`: snapshots while upstream is slow or away, probes, and what comes after
//! - `pace`: never more than 15 in any sliding second, never less than 14
//! - `passthrough`: what is streamed through
//! - `reload`: a changed configuration is taken over, whole or not at all
//! - `replicas`: several of them share one budget, whatever becomes of the store
//! - `requests`: what a poll may look like, and how bad ones are refused
//! - `restart`: the process that comes next spends no second twice
//! - `resting`: a connection on which nothing is asked keeps next to nothing, and nobody notices
//! - `secrets`: a key is in nothing that comes out
//! - `sharing`: replicas share answers and flights, whatever becomes of the store
//! - `simulator`: the simulated upstream, on which the rest of them rely
//! - `spans`: what a collector is told of requests
//! - `status`: the status page and what it is drawn from tell the truth, and no key
//! - `stop`: a stop loses nothing
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
