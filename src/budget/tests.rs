//! What the budget promises, in simulated time.

mod handles;
mod world;

use proptest::prelude::*;

use super::*;
use world::{GivesUp, History, Plan, Plans, hold, interval, play};

const SECOND: Duration = Duration::from_secs(1);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// The most instants that any half-open second holds.
fn most_in_a_second(instants: &[Duration]) -> usize {
    let within = |first: Duration| {
        instants
            .iter()
            .filter(|at| (first..first + SECOND).contains(*at))
            .count()
    };
    instants.iter().map(|first| within(*first)).max().unwrap_or(0)
}

/// The fewest permits that any second holds in which a flight with a connection waits throughout.
fn fewest_in_a_wanted_second(history: &History) -> Option<usize> {
    let mut fewest = None;
    for &(from, to) in &history.wanted {
        let just_after = |granted: &Duration| *granted + Duration::from_nanos(1);
        let starts = history.granted.iter().map(just_after).chain([from]);
        for start in starts.filter(|start| *start >= from && *start + SECOND <= to) {
            let second = start..start + SECOND;
            let granted = history.granted.iter().filter(|at| second.contains(*at)).count();
            fewest = fewest.into_iter().chain([granted]).min();
        }
    }
    fewest
}

fn micros(range: std::ops::Range<u64>) -> impl Strategy<Value = Duration> {
    range.prop_map(Duration::from_micros)
}

fn gives_up(unused: impl Strategy<Value = Duration> + 'static) -> impl Strategy<Value = GivesUp> {
    prop_oneof![
        12 => Just(GivesUp::Never),
        1 => micros(0..2_000_000).prop_map(GivesUp::AfterEntry),
        1 => micros(0..500_000).prop_map(GivesUp::AfterCall),
        1 => micros(0..200_000).prop_map(GivesUp::AfterReady),
        1 => unused.prop_map(GivesUp::Unused),
    ]
}

fn plan(
    unused: impl Strategy<Value = Duration> + 'static,
    writes: impl Strategy<Value = Duration>,
) -> impl Strategy<Value = Plan> {
    let arrives = prop_oneof![6 => Just(Duration::ZERO), 3 => micros(0..90_000), 1 => micros(0..1_500_000)];
    let connects = prop_oneof![
        4 => Just(Some(Duration::ZERO)),
        6 => micros(0..30_000).prop_map(Some),
        6 => micros(0..500_000).prop_map(Some),
        1 => Just(None),
    ];
    (arrives, connects, gives_up(unused), writes).prop_map(|(arrives, connects, gives_up, writes)| Plan {
        arrives,
        connects,
        gives_up,
        writes,
    })
}

fn plans(plan: impl Strategy<Value = Plan>, late: impl Strategy<Value = Duration>) -> impl Strategy<Value = Plans> {
    let limit = prop_oneof![6 => Just(15), 1 => Just(1), 1 => Just(2), 2 => Just(100)];
    let pauses = prop::collection::vec((micros(0..6_000_000), micros(0..2_000_000)), 0..3);
    let flights = prop::collection::vec(plan, 1..200);
    let lateness = prop::collection::vec(late, 1..40);
    (limit, flights, pauses, lateness).prop_map(|(limit, flights, pauses, lateness)| Plans {
        limit,
        limits: Vec::new(),
        flights,
        pauses,
        lateness,
    })
}

fn anything() -> impl Strategy<Value = Plans> {
    let late = prop_oneof![8 => micros(0..3_000), 1 => micros(0..100_000)];
    plans(plan(micros(0..200_000), micros(0..50_000)), late)
}

fn punctual() -> impl Strategy<Value = Plans> {
    plans(plan(Just(Duration::ZERO), Just(Duration::ZERO)), micros(0..3_000))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_second_holds_more_than_the_limit(plans in anything()) {
        let history = play(&plans);
        prop_assert!(most_in_a_second(&history.written) <= plans.limit as usize);
        prop_assert_eq!(history.forgotten, 0);
    }

    #[test]
    fn no_second_holds_more_than_the_largest_limit_however_often_it_changes(
        plans in anything(),
        limits in prop::collection::vec((micros(0..6_000_000), prop_oneof![3 => 1..16_u32, 1 => 16..100_u32]), 1..60),
    ) {
        let history = play(&Plans { limits: limits.clone(), ..plans.clone() });
        let largest = limits.iter().map(|(_, limit)| *limit).chain([plans.limit]).max().unwrap();
        prop_assert!(most_in_a_second(&history.written) <= largest as usize);
        prop_assert_eq!(history.forgotten, 0);
    }

    #[test]
    fn every_second_in_which_a_ready_flight_waits_is_spent(plans in punctual()) {
        let history = play(&plans);
        let least = ms(997).as_nanos() / interval(plans.limit).as_nanos();
        if let Some(fewest) = fewest_in_a_wanted_second(&history) {
            prop_assert!(fewest as u128 >= least, "{fewest} < {least}");
        }
        prop_assert!(most_in_a_second(&history.written) <= plans.limit as usize);
        prop_assert_eq!(history.forgotten, 0);
    }
}

/// Flights that are all there at once, connect at once and write at once.
fn rush(limit: u32, flights: usize, late: Duration) -> Plans {
    let plan = Plan {
        arrives: Duration::ZERO,
        connects: Some(Duration::ZERO),
        gives_up: GivesUp::Never,
        writes: Duration::ZERO,
    };
    Plans {
        limit,
        limits: Vec::new(),
        flights: vec![plan; flights],
        pauses: Vec::new(),
        lateness: vec![late],
    }
}

#[test]
fn nothing_is_granted_in_the_first_second_and_a_margin() {
    let history = play(&rush(15, 3, Duration::ZERO));
    assert_eq!(
        history.granted,
        [hold(), hold() + interval(15), hold() + interval(15) * 2]
    );
}

#[test]
fn late_wake_ups_do_not_move_the_schedule() {
    for (limit, least) in [(1, 0), (2, 1), (15, 14), (100, 96)] {
        let late = Duration::from_micros(2_900);
        let history = play(&rush(limit, 400, late));
        let last = history.granted.iter().max().copied().unwrap();
        assert_eq!(last, hold() + interval(limit) * 399 + late, "{limit} a second");
        assert!(
            fewest_in_a_wanted_second(&history).unwrap() >= least,
            "{limit} a second"
        );
    }
}

/// Two flights wait with a connection; a third, earlier one connects between each due instant and the late wake-up.
#[test]
fn a_connection_that_comes_late_does_not_move_the_schedule() {
    let connects = |at| Plan {
        arrives: Duration::ZERO,
        connects: Some(at),
        gives_up: GivesUp::Never,
        writes: Duration::ZERO,
    };
    let late = ms(3);
    let shift = |n: u32| hold() + interval(15) * n + ms(2);
    let mut plans = rush(15, 0, late);
    plans.flights = (0..14)
        .map(|n| connects(shift(n)))
        .chain(std::iter::repeat_n(connects(ms(0)), 16))
        .collect();
    let history = play(&plans);
    let in_order = history.granted.iter().enumerate();
    for (n, granted) in in_order {
        assert!(
            *granted <= hold() + interval(15) * u32::try_from(n).unwrap() + late,
            "permit {n}: {granted:?}"
        );
    }
}

#[test]
fn ten_changes_a_second_grant_nothing_more_and_cost_nothing() {
    let mut plans = rush(15, 300, ms(1));
    plans.limits = (0..200)
        .map(|n| (ms(100) * n, if n % 2 == 0 { 15 } else { 14 }))
        .collect();
    let history = play(&plans);
    assert!(most_in_a_second(&history.written) <= 15);
    assert!(fewest_in_a_wanted_second(&history).unwrap() >= 13);
}

#[test]
fn a_changed_limit_holds_from_the_next_permit_on() {
    let mut plans = rush(15, 100, Duration::ZERO);
    let lowered = hold() + interval(15) * 30 + ms(1);
    plans.limits = vec![(lowered, 5)];
    let history = play(&plans);
    // The last second's fifteen count against five.
    let after: Vec<_> = history.granted.iter().filter(|granted| **granted > lowered).collect();
    assert!(*after[0] >= lowered + interval(15) * 10, "{:?}", after[0]);
    assert!(most_in_a_second(&history.granted[31..]) <= 5);
    let granted = hold() + interval(5) * 30;
    let mut plans = rush(5, 100, Duration::ZERO);
    plans.limits = vec![(granted + ms(1), 15)];
    let history = play(&plans);
    assert_eq!(history.granted[31], granted + interval(15));
    assert_eq!(history.granted[45], granted + interval(15) * 15);
}

#[test]
fn a_permit_dropped_unused_makes_room_at_once() {
    let mut plans = rush(2, 3, Duration::ZERO);
    // The first is written so late that it still counts when the third is due; the second is not written at all.
    plans.flights[0].writes = ms(500);
    plans.flights[1].gives_up = GivesUp::Unused(ms(600));
    let history = play(&plans);
    assert_eq!(history.granted[2], history.granted[1] + ms(600));
}

/// The task was not woken for it, and has to be for the next.
#[test]
fn a_permit_granted_on_arrival_counts_from_its_write() {
    let mut plans = rush(1, 2, Duration::ZERO);
    let first = hold() + SECOND;
    plans.flights[0].arrives = first;
    plans.flights[0].writes = ms(500);
    plans.flights[1].arrives = ms(100);
    let history = play(&plans);
    assert_eq!(history.granted, [first, first + ms(500) + ms(1010)]);
}

#[test]
fn where_the_process_is_slow_nobody_is_called_forward_as_if_connections_were() {
    let mut plans = rush(15, 20, SECOND);
    for flight in &mut plans.flights {
        flight.connects = Some(SECOND * 3);
    }
    // Late enough for several more, were it not that the task has not come to look either.
    plans.flights[19].arrives = ms(500);
    let called = play(&plans).called;
    assert_eq!(called[..3], [ms(0), ms(0), SECOND]);
}

/// The world counts wake-ups, and refuses timers that are over already.
#[test]
fn the_highest_limit_keeps_nobody_waiting_and_the_dispatcher_not_busy() {
    let limit = 1_000_000;
    let history = play(&rush(limit, 1_000, Duration::ZERO));
    let last = history.granted.iter().max().copied().unwrap();
    assert_eq!(last, hold() + interval(limit) * 999);
}
