//! The queue of an account: so many flights of as many clients enter, and each is called forward in its turn.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use crun_gateway::account::{Caller, Client};
use crun_gateway::budget::{Budget, Entry, Pace};
use crun_gateway::metrics::Metrics;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::runtime;

/// Clients that wait; each has the same number of flights.
const CLIENTS: usize = 100;

/// Lets `of` flights through the queue, `times` times.
pub fn run(of: usize, times: usize) -> Duration {
    let metrics = Metrics::new().unwrap().account("music");
    runtime().block_on(async {
        let pace = Pace {
            limit: 15.try_into().unwrap(),
            margin: Duration::from_millis(30),
            not_before: Instant::now(),
        };
        let budget = Budget::new(pace, of, None, metrics);
        let start = Instant::now();
        for _ in 0..times {
            let mut flights = JoinSet::new();
            for number in 0..of {
                let flight = budget.flight(None);
                let address = Ipv4Addr::from_bits(u32::try_from(number % CLIENTS).unwrap());
                let client = Client {
                    caller: Caller::from(IpAddr::from(address)),
                    name: None,
                };
                flights.spawn(async move {
                    let _place = flight.join(client, 1, Instant::now() + Duration::from_hours(24), Duration::ZERO);
                    // A turn that is given back lets the next one come forward.
                    drop(flight.enter(Entry::InTurn).await.unwrap());
                });
            }
            assert_eq!(flights.join_all().await.len(), of);
        }
        start.elapsed()
    })
}
