//! One flight for many: everybody joins, it lands, everybody has it.

use std::time::Duration;

use crun_gateway::flight::Flights;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::runtime;

/// Lets `of` followers join a flight and wait for it, `times` times.
pub fn run(of: usize, times: usize) -> Duration {
    runtime().block_on(async {
        let start = Instant::now();
        for _ in 0..times {
            let flights = Flights::default();
            let (_first, leader) = flights.join("task", || None);
            let mut followers = JoinSet::new();
            for _ in 0..of {
                let (mut stage, nobody) = flights.join("task", || None);
                assert!(nobody.is_none());
                followers.spawn(async move {
                    let landed = stage.wait_for(Option::is_some).await.unwrap();
                    assert_eq!(*landed, Some(7));
                });
            }
            tokio::task::yield_now().await;
            leader.unwrap().land(|stage| *stage = Some(7));
            assert_eq!(followers.join_all().await.len(), of);
        }
        start.elapsed()
    })
}
