//! What the shared budget promises, in simulated time; and that the script is what its model says.

#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "microseconds and counts are small"
)]

mod cluster;
pub(super) mod real;
mod store;

use proptest::prelude::*;

use super::process::Demand;
use cluster::{Cluster, Fault, Kind, LIMIT, Outcome, WINDOW, Way, demand, queue};

fn way() -> impl Strategy<Value = Way> {
    prop_oneof![2 => Just(Way::Both), 1 => Just(Way::Up), 1 => Just(Way::Down)]
}

fn kind() -> impl Strategy<Value = Kind> {
    let step = prop_oneof![Just(3600.0), Just(-3600.0), 0.4..3.0, -3.0..-0.4];
    prop_oneof![
        way().prop_map(Kind::Cut),
        way().prop_map(Kind::Hold),
        (way(), prop_oneof![Just(0.1), Just(0.5), Just(0.9)]).prop_map(|(way, part)| Kind::Drop(way, part)),
        (
            way(),
            prop_oneof![Just(0.02), Just(0.1), Just(0.5), Just(2.0), Just(10.0)]
        )
            .prop_map(|(way, most)| Kind::Delay(way, most)),
        any::<bool>().prop_map(|is_empty| Kind::Kill { is_empty }),
        Just(Kind::Flush),
        Just(Kind::Freeze),
        Just(Kind::Refuse),
        step.prop_map(Kind::Step),
        (-0.3..0.3).prop_map(Kind::FailOver),
        Just(Kind::Pause),
        Just(Kind::Crash),
        Just(Kind::Roll),
        Just(Kind::Drain),
    ]
}

/// Faults that end by 7.5 s; half of the schedules have theirs all at about the same time.
fn faults() -> impl Strategy<Value = Vec<Fault>> {
    let lasts = prop_oneof![
        Just(0.05),
        Just(0.3),
        Just(1.0),
        Just(1.5),
        Just(2.2),
        Just(3.0),
        Just(4.0),
        Just(5.0)
    ];
    let who = prop_oneof![(0..15_u32).prop_map(|one| 1 << one), any::<u32>(), Just(u32::MAX)];
    let near = prop_oneof![Just(None), (2.5..5.0).prop_map(Some)];
    let fault = (kind(), 0.0..1.0, lasts, 0.5..1.2, who);
    (near, prop::collection::vec(fault, 1..6)).prop_map(|(near, faults)| {
        let fault = |(kind, at, lasts, stretch, who): (Kind, f64, f64, f64, u32)| {
            let at = near.map_or(2.5 + at * 4.7, |near| near + at * 2.2);
            let lasts = (lasts * stretch).min(7.5 - at).max(0.0);
            Fault { kind, at, lasts, who }
        };
        faults.into_iter().map(fault).collect()
    })
}

fn play(replicas: usize, seed: u64, faults: &[Fault]) -> Outcome {
    // The number of a replica that is not there strikes one that is.
    let faults: Vec<_> = faults
        .iter()
        .map(|fault| Fault {
            who: (0..32)
                .filter(|bit| fault.who & (1 << bit) != 0)
                .fold(0, |who, bit| who | 1 << (bit % replicas)),
            ..fault.clone()
        })
        .collect();
    Cluster::new(replicas, seed, &faults).play(15.0)
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn no_second_holds_more_than_the_limit_and_somebody_always_spends(
        replicas in prop::sample::select(vec![1_usize, 2, 3, 4, 6, 15]),
        seed: u64,
        faults in faults(),
    ) {
        let Outcome { most, gap, tail, .. } = play(replicas, seed, &faults);
        prop_assert!(most <= LIMIT as usize, "{most} in a second");
        prop_assert!(gap <= 3.5, "{gap} s without a query");
        prop_assert!(tail >= 14.0, "{tail}/s at the end");
    }
}

/// What waits at a replica for a while: nobody, one flight at a time, or a queue.
fn demands() -> impl Strategy<Value = Demand> {
    let weights = [1, 10, 50, 250];
    let single = prop::sample::select(weights.to_vec()).prop_map(|weight| demand(weight, 1));
    prop_oneof![1 => Just(Demand::default()), 1 => single, 2 => queues(weights)]
}

/// Of a queue all have a connection, or one at a time.
fn queues(weights: [u32; 4]) -> impl Strategy<Value = Demand> {
    let ready = prop::sample::select(vec![1, 2, 9]);
    (prop::sample::select(weights.to_vec()), ready).prop_map(|(weight, ready)| match ready {
        1 => queue(weight),
        _ => demand(weight, ready),
    })
}

proptest! {
    #[test]
    fn whatever_was_before_a_replica_that_waits_has_its_part_within_two_seconds(
        seed: u64,
        before in prop::collection::vec((2.5..20.0, 0..3_usize, demands()), 0..12),
        from_then_on in prop::collection::vec(queues([10, 30, 50, 250]), 3),
        is_one_missing: bool,
        // The fewest are so far apart that each has to be asked for more than once.
        limit in prop::sample::select(vec![4_u32, 5, 6, 8, LIMIT, 30]),
        comes in prop::collection::vec(20.0..20.3, 3),
    ) {
        // One of four that never comes back.
        let (replicas, missing) = if is_one_missing { (4, vec![gone(3)]) } else { (3, vec![]) };
        let mut cluster = Cluster::new(replicas, seed, &missing);
        cluster.limit = limit;
        for (at, replica, demand) in before {
            cluster.want(at, replica, demand);
        }
        for (replica, at) in comes.into_iter().enumerate() {
            cluster.want(at, replica, from_then_on[replica]);
        }
        let arrivals = cluster.play(32.0).arrivals;
        let since: Vec<_> = arrivals.iter().filter(|(at, _)| *at >= 22.3).collect();
        let paid = limit - u32::from(is_one_missing) * (limit / 4);
        let due = f64::from(paid) / WINDOW * (32.0 - 22.3);
        prop_assert!(since.len() as f64 >= due * 0.98 - 2.0, "{} of {due}", since.len());
        let weights: u32 = from_then_on.iter().map(|demand| demand.weight).sum();
        for (replica, Demand { weight, .. }) in from_then_on.into_iter().enumerate() {
            // Two of its turns are what a permit at a time, dealt one by one, may be behind or ahead.
            let own = since.iter().filter(|(_, by)| *by == replica).count();
            let part = f64::from(weight) / f64::from(weights) * since.len() as f64;
            prop_assert!(own as f64 >= part - 2.0, "replica {replica}: {own} of {}, not {part}", since.len());
        }
    }
}

/// A replica that ends as soon as all have started.
fn gone(replica: usize) -> Fault {
    Fault {
        kind: Kind::Crash,
        at: 1.0,
        lasts: 60.0,
        who: 1 << replica,
    }
}

#[test]
fn undisturbed_replicas_spend_the_whole_budget() {
    for replicas in [1, 2, 3, 4, 6, 15] {
        let Outcome { most, gap, tail, .. } = play(replicas, 7, &[]);
        assert!(
            most <= LIMIT as usize && tail >= 14.3 && gap < 2.5,
            "{replicas}: {most}, {gap} s, {tail}/s"
        );
    }
}

/// It has no flight that waits between two permits, and is the first to ask whenever it has one.
#[test]
fn a_heavy_client_with_one_flight_at_a_time_starves_no_queue() {
    for [heavy, one, other] in [[30.0, 20.0, 10.0], [100.0, 50.0, 10.0], [300.0, 30.0, 10.0]] {
        let mut cluster = Cluster::new(3, 3, &[]);
        cluster.demands = vec![demand(heavy as u32, 1), demand(one as u32, 9), demand(other as u32, 9)];
        let outcome = cluster.play(40.0);
        let permits = outcome.arrivals.len() as f64;
        for (replica, weight) in [heavy, one, other].into_iter().enumerate() {
            let sent = outcome.arrivals.iter().filter(|(_, by)| *by == replica).count() as f64;
            // One flight at a time wants no more than every other permit.
            let due = (permits * weight / (heavy + one + other)).min(permits / 2.0);
            assert!(
                sent >= 0.8 * due - 2.0,
                "weight {weight}: {sent} of {permits}, not {due}"
            );
        }
    }
}

/// Few connections carry no more than the budget: the next flight is ready about when its slot comes.
#[test]
fn a_heavy_queue_has_its_part_though_its_next_flight_takes_long_to_be_ready() {
    for ready_after in [0.030, 0.060] {
        let mut cluster = Cluster::new(3, 3, &[]);
        (cluster.ready_after, cluster.demands) = (ready_after, vec![queue(180), demand(10, 2), demand(10, 2)]);
        let Outcome { arrivals, tail, .. } = cluster.play(40.0);
        let heavy = arrivals.iter().filter(|(_, by)| *by == 0).count();
        let share = heavy as f64 / arrivals.len() as f64;
        assert!(
            (share - 0.9).abs() < 0.02 && tail >= 14.0,
            "{ready_after}: {share}, {tail}/s"
        );
    }
}

#[test]
fn permits_are_dealt_by_the_weight_of_whoever_waits_and_each_replica_counts_on_its_part() {
    let three = || vec![demand(10, 9), demand(30, 9), demand(10, 9)];
    let single = || vec![demand(10, 1), demand(40, 9), demand(50, 9)];
    let heavy = || vec![queue(180), demand(10, 2), demand(10, 2)];
    for (limit, demands, expected) in [
        (LIMIT, vec![demand(10, 9), demand(10, 9)], vec![0.5, 0.5]),
        (LIMIT, three(), vec![0.2, 0.6, 0.2]),
        // So far apart that each is asked for more than once.
        (5, three(), vec![0.2, 0.6, 0.2]),
        (3, three(), vec![0.2, 0.6, 0.2]),
        // The background gets what is left, and a tenth of a client's turns.
        (LIMIT, vec![demand(1, 9), demand(10, 9)], vec![1.0 / 11.0, 10.0 / 11.0]),
        // One flight at a time: no more for coming anew each time.
        (LIMIT, single(), vec![0.1, 0.4, 0.5]),
        // One with a connection at a time, of many that wait.
        (LIMIT, vec![queue(10); 3], vec![1.0 / 3.0; 3]),
        (LIMIT, heavy(), vec![0.9, 0.05, 0.05]),
        (60, heavy(), vec![0.9, 0.05, 0.05]),
    ] {
        let mut cluster = Cluster::new(demands.len(), 3, &[]);
        (cluster.limit, cluster.demands) = (limit, demands);
        let outcome = cluster.play(40.0);
        for (replica, expected) in expected.into_iter().enumerate() {
            let sent = outcome.arrivals.iter().filter(|(_, by)| *by == replica).count();
            let share = sent as f64 / outcome.arrivals.len() as f64;
            assert!(
                (share - expected).abs() < 0.02,
                "replica {replica}: {share}, not {expected}"
            );
            let told = outcome.shares[replica];
            assert!(
                (told - expected).abs() < 0.05,
                "replica {replica} counts on {told}, not {expected}"
            );
        }
    }
}
