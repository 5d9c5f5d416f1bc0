use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn client(number: u8) -> Client {
    Client {
        caller: Caller::Address(IpAddr::V4(Ipv4Addr::new(10, 0, 0, number))),
        name: None,
    }
}

fn named(number: u8, name: &str) -> Client {
    Client {
        name: Some(Arc::from(name)),
        ..client(number)
    }
}

/// A queue in which flights `flights` of one client wait.
fn wait_for(queue: &mut FairQueue, flights: std::ops::Range<Flight>, client: &Client, weight: u32) {
    for flight in flights {
        queue.open(flight, None);
        queue.join(flight, client, weight);
        queue.enter(flight, false);
    }
}

fn pops(queue: &mut FairQueue, most: usize) -> Vec<Flight> {
    std::iter::from_fn(|| queue.pop()).take(most).collect()
}

#[test]
fn one_client_is_served_in_the_order_of_arrival() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..5, &client(1), 1);
    assert_eq!(pops(&mut queue, 9), [0, 1, 2, 3, 4]);
    assert_eq!(queue.waiting(), 0);
}

#[test]
fn two_clients_take_turns_however_many_flights_one_has() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..1000, &client(1), 1);
    wait_for(&mut queue, 1000..1005, &client(2), 1);
    let served = pops(&mut queue, 11);
    assert_eq!(served.iter().filter(|flight| **flight >= 1000).count(), 5, "{served:?}");
}

#[test]
fn weights_are_shares() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..1000, &client(1), 2);
    wait_for(&mut queue, 1000..2000, &client(2), 1);
    let served = pops(&mut queue, 300);
    assert_eq!(served.iter().filter(|flight| **flight < 1000).count(), 200);
}

#[test]
fn names_share_their_callers_turns() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..100, &named(1, "a"), 1);
    wait_for(&mut queue, 100..200, &named(1, "b"), 1);
    wait_for(&mut queue, 200..300, &client(2), 1);
    let served = pops(&mut queue, 40);
    let of = |range: std::ops::Range<Flight>| served.iter().filter(|flight| range.contains(flight)).count();
    assert_eq!((of(0..100), of(100..200), of(200..300)), (10, 10, 20));
}

#[test]
fn beyond_256_names_the_rest_share_one() {
    let mut queue = FairQueue::default();
    for number in 0..1000 {
        wait_for(&mut queue, number..number + 1, &named(1, &number.to_string()), 1);
    }
    assert_eq!(queue.names, 257, "256, and the one that the rest share");
    assert_eq!(pops(&mut queue, 2000).len(), 1000);
    assert_eq!(queue.names, 0);
}

#[test]
fn a_flight_goes_with_the_first_of_its_places_and_is_charged_to_that_client() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..1000, &client(1), 1);
    // A modest client joins the flight that stands 900th in the greedy one's queue.
    queue.join(900, &client(2), 1);
    let served = pops(&mut queue, 2);
    assert!(served.contains(&900), "{served:?}");
    assert_eq!(pops(&mut queue, 2000).len(), 998, "and goes but once");
}

#[test]
fn tasks_never_seen_go_ahead_of_refreshes() {
    let mut queue = FairQueue::default();
    let now = Instant::now();
    for (flight, snapshot) in [(0, Some(now)), (1, None), (2, Some(now)), (3, None)] {
        queue.open(flight, snapshot);
        queue.join(flight, &client(1), 1);
        queue.enter(flight, false);
    }
    assert_eq!(pops(&mut queue, 9), [1, 3, 0, 2]);
}

#[test]
fn the_oldest_snapshot_is_refreshed_first_waited_for_or_not() {
    let mut queue = FairQueue::default();
    let now = Instant::now();
    let ages = [3, 1, 4, 0, 2];
    for (flight, age) in (0..).zip(ages) {
        queue.open(flight, Some(now - Duration::from_secs(age)));
        queue.join(flight, &client(1), 1);
        queue.enter(flight, false);
        queue.open(flight + 10, Some(now - Duration::from_secs(age)));
        queue.keep(flight + 10);
        queue.enter(flight + 10, false);
    }
    assert_eq!(pops(&mut queue, 99), [2, 0, 4, 1, 3, 12, 10, 14, 11, 13]);
}

#[test]
fn background_gets_what_foreground_leaves_and_one_turn_in_ten() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..100, &client(1), 1);
    for flight in 100..200 {
        queue.open(flight, Some(Instant::now()));
        queue.keep(flight);
        queue.enter(flight, false);
    }
    let served = pops(&mut queue, 100);
    assert_eq!(served.iter().filter(|flight| **flight >= 100).count(), 10);
    assert_eq!(pops(&mut queue, 1000).len(), 100);
}

#[test]
fn a_poll_lifts_a_background_flight_and_the_last_to_leave_lets_it_sink_back() {
    let mut queue = FairQueue::default();
    queue.open(1, Some(Instant::now()));
    queue.keep(1);
    queue.enter(1, false);
    assert_eq!(queue.background(), 1);
    queue.join(1, &client(1), 1);
    assert_eq!((queue.background(), queue.waiting()), (0, 1));
    queue.leave(1, &client(1));
    assert_eq!((queue.background(), queue.waiting()), (1, 1));
    assert_eq!(queue.pop(), Some(1));
}

#[test]
fn a_flight_that_nobody_waits_for_is_not_served() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..2, &client(1), 1);
    queue.leave(0, &client(1));
    assert_eq!(pops(&mut queue, 9), [1]);
}

#[test]
fn a_second_attempt_goes_before_everybody() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..3, &client(1), 1);
    assert_eq!(queue.pop(), Some(0));
    queue.enter(0, true);
    queue.join(0, &client(2), 1);
    assert_eq!(pops(&mut queue, 9), [0, 1, 2]);
}

#[test]
fn the_youngest_place_of_the_client_with_most_gives_way() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..5, &client(1), 1);
    wait_for(&mut queue, 5..7, &client(2), 1);
    assert_eq!(queue.shed(), Shedding::Flight(4));
    // One that somebody else waits for, too, stays for that one.
    queue.join(3, &client(2), 1);
    assert_eq!(queue.shed(), Shedding::Place);
    assert_eq!(queue.waiting(), 6);
    assert_eq!(pops(&mut queue, 9).len(), 6);
    assert_eq!(queue.shed(), Shedding::Nothing);
}

/// Four flights of client 1 and two of client 2, who waits for the last of the other's, too: there client 1 has given way.
fn with_a_place_given_up() -> FairQueue {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..4, &client(1), 1);
    wait_for(&mut queue, 4..6, &client(2), 1);
    queue.join(3, &client(2), 1);
    assert_eq!(queue.shed(), Shedding::Place);
    queue
}

#[test]
fn whoever_has_given_a_place_up_has_one_again_when_nobody_else_waits() {
    let mut queue = with_a_place_given_up();
    queue.leave(3, &client(2));
    assert_eq!(queue.forecast().collect::<Vec<_>>(), [0, 4, 1, 5, 2, 3]);
    assert_eq!(pops(&mut queue, 9), [0, 4, 1, 5, 2, 3]);
    assert_eq!(queue.waiting(), 0);
}

#[test]
fn whoever_has_given_a_place_up_has_one_again_with_the_next_poll() {
    let mut queue = with_a_place_given_up();
    for flight in 0..3 {
        queue.leave(flight, &client(1));
    }
    queue.join(3, &client(1), 1);
    assert!(pops(&mut queue, 2).contains(&3), "in a turn of its own");
    assert_eq!(queue.charged(3), Some(&client(1)));
}

#[test]
fn of_equals_the_one_served_last_gives_way_also_when_it_has_come_back_since() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..1, &client(1), 1);
    assert_eq!(pops(&mut queue, 9), [0]);
    wait_for(&mut queue, 1..2, &client(1), 1);
    wait_for(&mut queue, 2..3, &client(2), 1);
    wait_for(&mut queue, 3..4, &client(3), 1);
    assert_eq!(queue.shed(), Shedding::Flight(1));
    assert_eq!(
        queue.shed(),
        Shedding::Flight(3),
        "of those who were not served the last to come"
    );
}

#[test]
fn a_caller_gives_way_for_all_its_names_together() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..2, &client(1), 1);
    for flight in 2..6 {
        wait_for(&mut queue, flight..flight + 1, &named(2, &flight.to_string()), 1);
    }
    wait_for(&mut queue, 6..7, &named(2, "2"), 1);
    let gave_way: Vec<_> = std::iter::repeat_with(|| queue.shed()).take(3).collect();
    assert_eq!(gave_way, [6, 5, 4].map(Shedding::Flight), "first the name with most");
}

/// How often each client is served in `turns`, where `most` flights may wait. Whoever is served comes back at once, for
/// something else, and whoever is turned away after as many turns as `after` says.
fn served_in_overload(clients: &[Client], most: usize, turns: usize, after: impl Fn(usize) -> usize) -> Vec<usize> {
    let mut queue = FairQueue::default();
    let mut served = vec![0; clients.len()];
    let mut comes: Vec<Option<usize>> = vec![Some(0); clients.len()];
    let mut asked_by: Vec<usize> = Vec::new();
    let by = |asked_by: &[usize], flight: Flight| asked_by[usize::try_from(flight).unwrap()];
    for turn in 0..turns {
        let first = queue.pop().map(|flight| by(&asked_by, flight));
        if let Some(first) = first {
            served[first] += 1;
            comes[first] = Some(turn);
        }
        for who in first.into_iter().chain(0..clients.len()) {
            if comes[who].take_if(|comes| *comes <= turn).is_none() {
                continue;
            }
            let flight = asked_by.len() as Flight;
            asked_by.push(who);
            wait_for(&mut queue, flight..flight + 1, &clients[who], 1);
            while queue.waiting() > most {
                let Shedding::Flight(shed) = queue.shed() else {
                    panic!("nobody gives way");
                };
                let shed = by(&asked_by, shed);
                comes[shed] = Some(turn + after(shed));
            }
        }
    }
    served
}

fn tokens(count: usize) -> Vec<Client> {
    let token = |number: usize| Caller::Token(Arc::from(number.to_string()));
    let client = |number| Client {
        caller: token(number),
        name: None,
    };
    (0..count).map(client).collect()
}

#[test]
fn in_overload_everybody_is_served_alike() {
    let names: Vec<_> = (0..12).map(|number: u8| named(1, &number.to_string())).collect();
    for clients in [tokens(12), names] {
        for (most, after) in [(6, 1), (6, 3), (6, 15), (1, 3)] {
            let served = served_in_overload(&clients, most, 600, |_| after);
            assert!(served.iter().all(|served| *served >= 25), "{most}, {after}: {served:?}");
        }
    }
    let served = served_in_overload(&tokens(250), 25, 2500, |_| 25);
    assert!(served.iter().all(|served| *served >= 5), "{served:?}");
}

#[test]
fn whoever_comes_back_when_told_to_is_served_among_those_who_come_all_the_time() {
    let served = served_in_overload(&tokens(12), 6, 3600, |who| if who == 11 { 30 } else { 1 });
    // Turned away, back after 30 turns, and served within 6.
    assert!(served[11] >= 3600 / 40, "{served:?}");
}

#[test]
fn the_background_gives_way_first() {
    let mut queue = FairQueue::default();
    wait_for(&mut queue, 0..5, &client(1), 1);
    queue.open(9, Some(Instant::now()));
    queue.keep(9);
    queue.enter(9, false);
    assert_eq!(queue.shed(), Shedding::Flight(9));
}

#[derive(Clone, Debug)]
enum Step {
    Open { age: Option<u8>, client: u8, weight: u32 },
    Join { flight: usize, client: u8 },
    Leave { flight: usize },
    Keep { flight: usize },
    Pop,
    Again { flight: usize },
    Shed,
    Close { flight: usize },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<Option<u8>>(), 0..6_u8, 1..4_u32).prop_map(|(age, client, weight)| Step::Open { age, client, weight }),
        2 => (any::<usize>(), 0..6_u8).prop_map(|(flight, client)| Step::Join { flight, client }),
        1 => any::<usize>().prop_map(|flight| Step::Leave { flight }),
        1 => any::<usize>().prop_map(|flight| Step::Keep { flight }),
        3 => Just(Step::Pop),
        1 => any::<usize>().prop_map(|flight| Step::Again { flight }),
        1 => Just(Step::Shed),
        1 => any::<usize>().prop_map(|flight| Step::Close { flight }),
    ]
}

/// Whether a flight that waits and is wanted stands where its turn comes from.
fn stands(queue: &FairQueue, flight: Flight) -> bool {
    let entry = &queue.flights[&flight];
    let order = entry.order().unwrap();
    if entry.is_again {
        return queue.again.contains(&(order.arrival, flight));
    }
    if entry.clients.is_empty() {
        return !entry.is_kept || queue.background.contains(&(order, flight));
    }
    let mut lanes = queue.callers.values().flat_map(|caller| caller.names.values());
    lanes.any(|lane| lane.places.values().any(|stands| *stands == flight))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Nothing is lost and nothing served twice: a flight waits exactly from its entry to its turn, its shedding or its
    /// end, and whatever waits and is wanted is served in the end, in the order that was forecast.
    #[test]
    fn nothing_is_lost_and_nothing_served_twice(steps in prop::collection::vec(step(), 1..200)) {
        let (mut queue, start) = (FairQueue::default(), Instant::now());
        let mut waiting = HashSet::new();
        let mut joined: HashMap<Flight, Vec<u8>> = HashMap::new();
        let mut kept = HashSet::new();
        let mut closed = HashSet::new();
        let mut opened = 0;
        let pick = |index: usize, opened: u64| (opened > 0).then(|| index as u64 % opened);
        for step in steps {
            match step {
                Step::Open { age, client: number, weight } => {
                    queue.open(opened, age.map(|age| start + Duration::from_secs(u64::from(age))));
                    queue.join(opened, &client(number), weight);
                    queue.enter(opened, false);
                    joined.entry(opened).or_default().push(number);
                    waiting.insert(opened);
                    opened += 1;
                }
                Step::Join { flight, client: number } => if let Some(flight) = pick(flight, opened).filter(|flight| !closed.contains(flight)) {
                    queue.join(flight, &client(number), 1);
                    joined.entry(flight).or_default().push(number);
                },
                Step::Leave { flight } => if let Some(flight) = pick(flight, opened)
                    && let Some(number) = joined.get_mut(&flight).and_then(Vec::pop) {
                    queue.leave(flight, &client(number));
                },
                Step::Keep { flight } => if let Some(flight) = pick(flight, opened).filter(|flight| !closed.contains(flight)) {
                    queue.keep(flight);
                    kept.insert(flight);
                },
                Step::Pop => if let Some(flight) = queue.pop() {
                    prop_assert!(waiting.remove(&flight), "{} served and not waiting", flight);
                },
                Step::Again { flight } => if let Some(flight) = pick(flight, opened)
                    .filter(|flight| !closed.contains(flight) && !waiting.contains(flight)) {
                    queue.enter(flight, true);
                    waiting.insert(flight);
                },
                Step::Shed => if let Shedding::Flight(flight) = queue.shed() {
                    prop_assert!(waiting.remove(&flight), "{} shed and not waiting", flight);
                },
                Step::Close { flight } => if let Some(flight) = pick(flight, opened) {
                    queue.close(flight);
                    closed.insert(flight);
                    waiting.remove(&flight);
                    joined.remove(&flight);
                },
            }
            prop_assert_eq!(queue.waiting(), waiting.len());
            for flight in &waiting {
                prop_assert!(stands(&queue, *flight), "{} waits for a turn that never comes", flight);
            }
        }
        let forecast: Vec<_> = queue.forecast().collect();
        let mut served = Vec::new();
        while let Some(flight) = queue.pop() {
            prop_assert!(waiting.remove(&flight), "{} served and not waiting", flight);
            served.push(flight);
        }
        prop_assert_eq!(forecast, served, "what was forecast is what happens");
        for flight in 0..opened {
            queue.close(flight);
        }
        prop_assert_eq!(queue.waiting(), 0);
        prop_assert!(queue.turns.is_empty() && queue.callers.is_empty() && queue.ranks.is_empty());
        prop_assert!(queue.again.is_empty() && queue.background.is_empty() && queue.flights.is_empty());
        prop_assert_eq!(queue.names, 0);
    }

    /// While all are backlogged, each has had its share by weight, give or take one quantum.
    #[test]
    fn shares_are_within_one_quantum_of_the_weights(weights in prop::collection::vec(1..9_u32, 2..8), turns in 1..400_usize) {
        let mut queue = FairQueue::default();
        for (number, weight) in (0_u8..).zip(&weights) {
            let first = u64::from(number) * 1000;
            wait_for(&mut queue, first..first + 500, &client(number), *weight);
        }
        let mut served = vec![0_u32; weights.len()];
        for flight in pops(&mut queue, turns) {
            served[usize::try_from(flight / 1000).unwrap()] += 1;
        }
        let rounds = f64::from(served.iter().sum::<u32>()) / f64::from(weights.iter().sum::<u32>());
        for (served, weight) in served.iter().zip(&weights) {
            let share = rounds * f64::from(*weight);
            prop_assert!((f64::from(*served) - share).abs() <= f64::from(*weight), "{} of {}", served, share);
        }
    }
}

/// Not a time, but a count of work would not be seen from outside: ten thousand waiting flights, each joined by two more
/// clients, go through in a moment or this test takes minutes.
#[test]
fn ten_thousand_waiting_flights_of_as_many_clients() {
    let mut queue = FairQueue::default();
    for flight in 0..10_000_u64 {
        let name = flight.to_string();
        let caller = Caller::Token(Arc::from(name.as_str()));
        let own = Client { caller, name: None };
        wait_for(&mut queue, flight..flight + 1, &own, 1);
        queue.join(flight, &client(1), 1);
        queue.join(flight, &client(2), 1);
    }
    assert_eq!(pops(&mut queue, 20_000).len(), 10_000);
}
