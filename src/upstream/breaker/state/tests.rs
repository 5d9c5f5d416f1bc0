//! What the breaker does, case by case; `model` is what it may do, whatever happens.

mod model;

use std::sync::LazyLock;

use super::super::accounts::LATELY;
use super::*;
use crate::account::AccountIds;

const MS: Duration = Duration::from_millis(1);
const JUST_BEFORE_FORGOTTEN: Duration = Duration::from_millis(59_999);

fn task(name: &str) -> TaskId {
    TaskId::new(name).unwrap()
}

fn own() -> AccountId {
    AccountId::default()
}

fn fail(state: &mut State, name: &str, asked: Instant, now: Instant) -> Option<Change> {
    state.failed(Some(own()), &task(name), asked, now)
}

/// An answer about a task that never fails.
fn answer(state: &mut State, account: AccountId, asked: Instant, now: Instant) -> Option<Change> {
    state.answered(account, &task("answered"), asked, now)
}

/// Polls for `task`, and says for which task a probe began thereby.
fn poll(state: &mut State, account: AccountId, task: &TaskId, now: Instant) -> Option<(u64, TaskId)> {
    // Nobody who is to be probed for goes.
    std::mem::forget(state.line_up(account, task));
    let (number, _) = state.probe(now)?;
    state.probed.back().map(|(_, probed)| (number, probed.clone()))
}

/// The probe that began, if it is for `task`, for which somebody polls.
fn probe(state: &mut State, task: &TaskId, now: Instant) -> Option<u64> {
    let (number, probed) = poll(state, own(), task, now)?;
    (probed == *task).then_some(number)
}

/// The probe that is under way ends without an answer.
fn end_probe(state: &mut State) {
    state.probe_ended(state.probes);
}

/// A breaker that has just opened, and when.
fn opened() -> (State, Instant) {
    let (mut state, now) = (State::new(), Instant::now());
    for name in ["a", "b", "a", "b"] {
        assert_eq!(fail(&mut state, name, now, now), None);
    }
    assert_eq!(fail(&mut state, "a", now, now), Some(Change::Opened));
    assert!(state.is_open());
    (state, now)
}

#[test]
fn five_failures_in_a_row_over_two_tasks_open_it() {
    opened();
}

#[test]
fn one_task_that_always_fails_never_opens_it() {
    let (mut state, now) = (State::new(), Instant::now());
    for _ in 0..1000 {
        assert_eq!(fail(&mut state, "a", now, now), None);
    }
    assert_eq!(fail(&mut state, "b", now, now), Some(Change::Opened));
}

fn another() -> AccountId {
    static IDS: LazyLock<AccountIds> = LazyLock::new(AccountIds::default);
    IDS.listed("another")
}

/// As many failures of another account's as open it. Says what the last one does.
fn fail_elsewhere(state: &mut State, at: Instant) -> Option<Change> {
    fail_for(state, another(), at)
}

/// The same of any account's: the others do nothing.
fn fail_for(state: &mut State, account: AccountId, at: Instant) -> Option<Change> {
    for name in ["v", "w", "x", "y"] {
        assert_eq!(state.failed(Some(account), &task(name), at, at), None);
    }
    state.failed(Some(account), &task("z"), at, at)
}

#[test]
fn failures_of_one_account_open_it_unless_another_is_answered() {
    let (mut state, now) = (State::new(), Instant::now());
    answer(&mut state, another(), now, now);
    assert_eq!(fail_elsewhere(&mut state, now), Some(Change::Opened), "nobody else was");
    let (mut state, now) = (State::new(), Instant::now());
    answer(&mut state, own(), now, now);
    assert_eq!(fail_elsewhere(&mut state, now), None);
    assert_eq!(fail(&mut state, "a", now, now), Some(Change::Opened), "both fail");
}

#[test]
fn an_account_that_fails_while_another_is_answered_opens_it_once_until_it_is_answered() {
    let (mut state, now) = (State::new(), Instant::now());
    let mut at = now;
    assert_eq!(fail_elsewhere(&mut state, at), Some(Change::Opened));
    at += PROBE_INTERVAL;
    assert_eq!(answer(&mut state, own(), at, at), Some(Change::Closed));
    for _ in 0..100 {
        at += JUST_BEFORE_FORGOTTEN;
        assert_eq!(fail_elsewhere(&mut state, at), None);
        // Nor does it with the one task of another's that always fails.
        assert_eq!(fail(&mut state, "a", at, at), None);
        assert_eq!(answer(&mut state, own(), at, at), None);
    }
    for name in ["v", "w", "x", "y", "z"] {
        state.answered(another(), &task(name), at, at);
    }
    at += LATELY;
    assert_eq!(fail_elsewhere(&mut state, at), Some(Change::Opened));
}

#[test]
fn an_account_that_has_failed_is_believed_once_nobody_else_was_answered_for_a_minute() {
    let (mut state, now) = (State::new(), Instant::now());
    assert_eq!(fail_elsewhere(&mut state, now), Some(Change::Opened));
    let mut at = now + PROBE_INTERVAL;
    assert_eq!(answer(&mut state, own(), at, at), Some(Change::Closed));
    at += JUST_BEFORE_FORGOTTEN;
    assert_eq!(fail_elsewhere(&mut state, at), None);
    at += MS;
    assert_eq!(fail_elsewhere(&mut state, at), Some(Change::Opened));
}

#[test]
fn what_refuses_another_accounts_key_says_nothing_against_an_outage() {
    let (mut state, now) = (State::new(), Instant::now());
    let fails = |state: &mut State, name: u32| state.failed(Some(another()), &task(&name.to_string()), now, now);
    // With one task it says nothing yet.
    fails(&mut state, 0);
    for failure in 1..9 {
        assert_eq!(fails(&mut state, failure), None);
        assert_eq!(state.refused(own(), now + MS, now + MS), None);
    }
    assert_eq!(fails(&mut state, 9), Some(Change::Opened), "ten in all");
    let last = now + JUST_BEFORE_FORGOTTEN;
    assert_eq!(state.refused(own(), last, last), None);
    let closed = state.refused(own(), last + MS, last + MS);
    assert_eq!(closed, Some(Change::Closed), "whoever failed asks no more");
    for failure in 0..4 {
        assert_eq!(fails(&mut state, failure), None);
    }
}

#[test]
fn of_many_that_are_refused_no_two_are_probed_in_a_row_while_another_waits() {
    static IDS: LazyLock<AccountIds> = LazyLock::new(AccountIds::default);
    let (mut state, mut at) = (State::new(), Instant::now());
    assert_eq!(fail_elsewhere(&mut state, at), Some(Change::Opened));
    let refused: Vec<_> = (0..10).map(|number| IDS.listed(&format!("refused {number}"))).collect();
    let mut probed = Vec::new();
    for _ in 0..20 {
        at += PROBE_INTERVAL;
        for account in &refused {
            std::mem::forget(state.line_up(*account, &task("x")));
        }
        poll(&mut state, another(), &task("x"), at).unwrap();
        let account = state.probed.back().unwrap().0;
        if refused.contains(&account) {
            assert_eq!(state.refused(account, at, at), None);
        } else {
            state.failed(Some(account), &task("x"), at, at);
        }
        end_probe(&mut state);
        probed.push(account);
    }
    assert!(probed.windows(2).all(|two| two.contains(&another())), "{probed:?}");
    assert!(refused.iter().all(|account| probed.contains(account)), "{probed:?}");
}

#[test]
fn a_probe_that_ends_untold_keeps_nobody_from_being_probed() {
    static IDS: LazyLock<AccountIds> = LazyLock::new(AccountIds::default);
    let (mut state, mut at) = (State::new(), Instant::now());
    assert_eq!(fail_elsewhere(&mut state, at), Some(Change::Opened));
    let stranger = IDS.listed("stranger");
    let mut next = |state: &mut State, accounts: &[AccountId]| {
        at += PROBE_INTERVAL;
        for account in accounts {
            std::mem::forget(state.line_up(*account, &task("x")));
        }
        state.probe(at).unwrap();
        end_probe(state);
        (state.probed.back().unwrap().0, at)
    };
    let (probed, at) = next(&mut state, &[stranger]);
    assert_eq!((probed, state.refused(stranger, at, at)), (stranger, None));
    assert_eq!(
        next(&mut state, &[own(), another()]).0,
        another(),
        "no two that may be refused"
    );
    // Of what became of it nobody says anything.
    assert_eq!(next(&mut state, &[another(), own()]).0, own());
}

#[test]
fn new_keys_that_are_refused_keep_nobody_waiting_who_was_answered_before() {
    static IDS: LazyLock<AccountIds> = LazyLock::new(AccountIds::default);
    let (mut state, mut at) = (State::new(), Instant::now());
    assert_eq!(fail_elsewhere(&mut state, at), Some(Change::Opened));
    at += PROBE_INTERVAL;
    poll(&mut state, own(), &task("x"), at).unwrap();
    assert_eq!(answer(&mut state, own(), at, at), Some(Change::Closed));
    at += FORGOTTEN_AFTER;
    assert_eq!(fail_elsewhere(&mut state, at), Some(Change::Opened));
    let mut probes = 0;
    while state.is_open() {
        probes += 1;
        assert!(probes < 10, "{:?}", state.probed);
        at += PROBE_INTERVAL;
        let stranger = IDS.listed(&format!("stranger {probes}"));
        for account in [another(), own(), stranger] {
            std::mem::forget(state.line_up(account, &task("x")));
        }
        state.probe(at).unwrap();
        let (account, task) = state.probed.back().unwrap().clone();
        if account == own() {
            state.answered(account, &task, at, at);
        } else if account == another() {
            state.failed(Some(account), &task, at, at);
        } else {
            assert_eq!(state.refused(account, at, at), None);
        }
        end_probe(&mut state);
    }
}

#[test]
fn accounts_that_all_are_in_trouble_hide_no_outage() {
    let (mut state, now) = (State::new(), Instant::now());
    let fails = |state: &mut State, account, at| {
        for name in ["a", "b", "c", "d", "e"] {
            assert_eq!(state.failed(Some(account), &task(name), at, at), None);
        }
    };
    answer(&mut state, own(), now, now);
    fails(&mut state, another(), now);
    answer(&mut state, own(), now + MS, now + MS);
    answer(&mut state, another(), now + 2 * MS, now + 2 * MS);
    fails(&mut state, own(), now + 2 * MS);
    for account in [another(), own()] {
        answer(&mut state, account, now + 3 * MS, now + 3 * MS);
    }
    let mut at = now + LATELY;
    fails(&mut state, own(), at);
    let mut failures = 0;
    while !state.is_open() {
        failures += 1;
        assert!(failures <= 20, "nobody is answered any more");
        at += MS;
        let account = if failures % 2 == 0 { own() } else { another() };
        state.failed(Some(account), &task(&failures.to_string()), at, at);
    }
}

#[test]
fn tasks_that_always_fail_open_it_once_and_hide_no_outage() {
    let (mut state, mut at) = (State::new(), Instant::now());
    let fails = |state: &mut State, names: [&str; 6], at| {
        let changes = names.map(|name| fail(state, name, at, at));
        changes.contains(&Some(Change::Opened))
    };
    let mut opened = 0;
    for _ in 0..100 {
        opened += u32::from(fails(&mut state, ["a", "b", "c", "d", "e", "f"], at));
        at += PROBE_INTERVAL;
        state.answered(own(), &task("v"), at, at);
        at += MS;
    }
    assert_eq!(opened, 1);
    for name in ["v", "w", "x", "y"] {
        assert_eq!(fail(&mut state, name, at, at), None);
        assert!(!fails(&mut state, ["a", "b", "c", "d", "e", "f"], at));
    }
    assert_eq!(fail(&mut state, "z", at, at), Some(Change::Opened));
}

#[test]
fn a_task_that_always_fails_is_another_beside_one_that_fails_in_an_outage() {
    let (mut state, mut at) = (State::new(), Instant::now());
    for _ in 0..10 {
        assert_eq!(fail(&mut state, "always", at, at), None);
        at += MS;
        state.answered(own(), &task("live"), at, at);
    }
    // In either order.
    for first in ["always", "live"] {
        fail(&mut state, first, at, at);
        for _ in 0..4 {
            assert!(!state.is_open());
            fail(&mut state, "live", at, at);
            fail(&mut state, "always", at, at);
        }
        fail(&mut state, "live", at, at);
        assert!(state.is_open());
        at += MS;
        assert_eq!(state.answered(own(), &task("live"), at, at), Some(Change::Closed));
    }
}

#[test]
fn what_is_refused_in_an_outage_hides_no_task_that_fails() {
    let (mut state, mut at) = (State::new(), Instant::now());
    state.answered(own(), &task("a"), at, at);
    for _ in 0..10 {
        at += LATELY;
        let changes = ["a", "b", "c", "d", "e", "f"].map(|name| fail(&mut state, name, at, at));
        assert!(changes.contains(&Some(Change::Opened)));
        at += PROBE_INTERVAL;
        assert_eq!(state.refused(own(), at, at), Some(Change::Closed));
    }
}

#[test]
fn a_refusal_of_who_failed_long_ago_is_no_change() {
    for (later, closes) in [(JUST_BEFORE_FORGOTTEN, true), (FORGOTTEN_AFTER, false)] {
        let (mut state, now) = (State::new(), Instant::now());
        assert_eq!(fail(&mut state, "a", now, now), None);
        let at = now + later;
        for name in ["w", "x", "y", "z"] {
            state.failed(Some(another()), &task(name), at - MS, at - MS);
        }
        assert!(state.is_open());
        assert_eq!(state.refused(own(), at, at).is_some(), closes, "{later:?}");
    }
}

#[test]
fn failures_are_in_a_row_since_the_last_refusal() {
    for before in 1..5 {
        let (mut state, now) = (State::new(), Instant::now());
        for name in 0..before {
            assert_eq!(state.failed(Some(another()), &task(&name.to_string()), now, now), None);
        }
        assert_eq!(state.refused(own(), now, now), None);
        assert_eq!(fail_elsewhere(&mut state, now), Some(Change::Opened));
    }
}

#[test]
fn a_refusal_closes_it_where_nobody_else_fails_or_the_account_has() {
    let (mut state, now) = opened();
    assert_eq!(state.refused(own(), now - MS, now + MS), None, "from before");
    assert_eq!(state.refused(another(), now + MS, now + MS), None);
    assert_eq!(state.refused(own(), now + MS, now + MS), Some(Change::Closed));
    let (mut state, now) = opened();
    state.failed(Some(another()), &task("b"), now, now);
    assert_eq!(
        state.refused(another(), now + MS, now + MS),
        Some(Change::Closed),
        "that it is refused is new"
    );
}

#[test]
fn where_there_is_no_connection_the_account_says_nothing() {
    let (mut state, now) = (State::new(), Instant::now());
    answer(&mut state, own(), now, now);
    for name in ["a", "b", "c", "d"] {
        assert_eq!(state.failed(None, &task(name), now, now), None);
    }
    assert_eq!(state.failed(None, &task("e"), now, now), Some(Change::Opened));
}

#[test]
fn an_answer_between_begins_the_count_anew() {
    let (mut state, now) = (State::new(), Instant::now());
    for _ in 0..100 {
        for name in ["a", "b", "c", "d"] {
            assert_eq!(fail(&mut state, name, now, now), None);
        }
        assert_eq!(answer(&mut state, own(), now, now), None);
    }
}

#[test]
fn a_late_time_out_from_before_the_last_answer_is_no_news() {
    let (mut state, now) = (State::new(), Instant::now());
    answer(&mut state, own(), now + 10 * MS, now + 20 * MS);
    for name in ["a", "b", "c", "d", "e", "f"] {
        assert_eq!(fail(&mut state, name, now, now + 8000 * MS), None);
    }
    assert!(!state.is_open());
}

#[test]
fn the_first_probe_comes_an_interval_after_it_opened_and_then_one_at_most_every_interval() {
    let (mut state, now) = opened();
    assert_eq!(state.until_probe(now), PROBE_INTERVAL);
    assert!(probe(&mut state, &task("a"), now + PROBE_INTERVAL - MS).is_none());
    assert!(probe(&mut state, &task("a"), now + PROBE_INTERVAL).is_some());
    assert!(
        probe(&mut state, &task("a"), now + 10 * PROBE_INTERVAL).is_none(),
        "one of a task at a time, however long it takes"
    );
    assert!(probe(&mut state, &task("b"), now + 2 * PROBE_INTERVAL).is_none());
    end_probe(&mut state);
    assert!(state.is_open());
    assert!(probe(&mut state, &task("b"), now + 2 * PROBE_INTERVAL).is_some());
    end_probe(&mut state);
    assert!(probe(&mut state, &task("c"), now + 3 * PROBE_INTERVAL - MS).is_none());
}

#[test]
fn the_task_probed_last_lets_others_go_first() {
    let (mut state, now) = opened();
    assert!(probe(&mut state, &task("a"), now + PROBE_INTERVAL).is_some());
    end_probe(&mut state);
    assert!(
        probe(&mut state, &task("a"), now + 2 * PROBE_INTERVAL).is_some(),
        "nobody else asks: then it may"
    );
    end_probe(&mut state);
    assert!(probe(&mut state, &task("b"), now + 3 * PROBE_INTERVAL - MS).is_none());
    let (_, probed) = poll(&mut state, own(), &task("a"), now + 3 * PROBE_INTERVAL).unwrap();
    assert_eq!(probed, task("b"), "somebody else does");
    end_probe(&mut state);
    assert!(probe(&mut state, &task("a"), now + 4 * PROBE_INTERVAL).is_some());
}

#[test]
fn tasks_that_hang_do_not_keep_it_open_whenever_the_others_are_polled() {
    // Every 2 s each, a little apart, the hanging first; the others every 2 s, or 5 s, were probed as often before.
    for (hanging, others, every) in [(2, 3, 2000), (3, 3, 5000), (1, 5, 5000)] {
        let (mut state, start) = opened();
        let mut tasks: Vec<_> = (0..hanging).map(|n| (task(&format!("hangs{n}")), 2000)).collect();
        tasks.extend((0..others).map(|n| (task(&format!("ends{n}")), every)));
        // An outage that ends after so many ms: nothing answers until then.
        let outage = 40_000;
        let mut under_way = Vec::new();
        let answered = (1..600_000).find(|at| {
            under_way.retain(|(ends, probe)| {
                if ends == at {
                    state.probe_ended(*probe);
                }
                ends > at
            });
            let probed: Vec<_> = (0..)
                .zip(&tasks)
                .filter(|(n, (_, every))| at % every == *n)
                .filter_map(|(_, (task, _))| poll(&mut state, own(), task, start + *at * MS))
                .collect();
            probed.into_iter().any(|(number, probed)| {
                let hangs = probed.as_str().starts_with("hangs");
                under_way.push((at + if hangs { 4000 } else { 1 }, number));
                !hangs && *at >= outage
            })
        });
        let closed_after = answered.map(|at| at - outage);
        assert!(
            closed_after.is_some_and(|ms| ms <= 20_000),
            "{hanging}, {others}, {every}: {closed_after:?}"
        );
    }
}

#[test]
fn what_nobody_asks_about_for_a_minute_is_forgotten() {
    let (mut state, now) = opened();
    assert!(probe(&mut state, &task("a"), now + PROBE_INTERVAL).is_some());
    assert_eq!(state.forget(now + 10 * FORGOTTEN_AFTER), None, "a probe is under way");
    end_probe(&mut state);
    let probed = now + FORGOTTEN_AFTER;
    assert!(probe(&mut state, &task("a"), probed).is_some());
    end_probe(&mut state);
    let asked = probed + 2 * PROBE_INTERVAL;
    state.keep_back(asked);
    assert_eq!(state.forget(asked + FORGOTTEN_AFTER - MS), None);
    let idle = asked + FORGOTTEN_AFTER;
    assert_eq!(state.forget(idle), Some(Change::Closed));
    assert_eq!(state.forget(idle), None);
    assert_eq!(fail_for(&mut state, own(), idle), Some(Change::Opened));
}

#[test]
fn tasks_that_hang_let_one_that_was_not_probed_go_first_and_before_they_end() {
    let (mut state, now) = opened();
    let hanging = ["a", "b", "c", "d", "e"].map(task);
    let mut at = now + PROBE_INTERVAL;
    for hangs in &hanging {
        assert!(probe(&mut state, hangs, at).is_some());
        at += 2 * PROBE_INTERVAL;
    }
    for hangs in &hanging {
        assert!(probe(&mut state, hangs, at - MS).is_none());
    }
    assert!(probe(&mut state, &task("f"), at - MS).is_none());
    let (_, probed) = poll(&mut state, own(), &hanging[0], at).unwrap();
    assert_eq!(probed, task("f"));
}

#[test]
fn who_was_probed_longest_ago_goes_first_however_often_and_its_account_before_it() {
    let (mut state, now) = opened();
    let ids = AccountIds::default();
    let other = ids.listed("other");
    let mut at = now;
    let mut next = |state: &mut State, account, name: &str| {
        at += PROBE_INTERVAL;
        let probed = poll(state, account, &task(name), at).map(|(_, probed)| probed);
        end_probe(state);
        probed
    };
    for _ in 0..100 {
        assert_eq!(next(&mut state, own(), "a"), Some(task("a")));
    }
    // Those that come later were never probed, and then they were.
    assert_eq!(next(&mut state, own(), "b"), Some(task("b")));
    assert_eq!(next(&mut state, own(), "c"), Some(task("c")));
    std::mem::forget(state.line_up(own(), &task("a")));
    assert_eq!(next(&mut state, own(), "b"), Some(task("a")));
    // An account that always has another task goes no oftener than one that has none.
    std::mem::forget(state.line_up(own(), &task("new")));
    std::mem::forget(state.line_up(other, &task("old")));
    assert_eq!(next(&mut state, own(), "newer"), Some(task("old")));
    std::mem::forget(state.line_up(other, &task("old")));
    assert_eq!(next(&mut state, own(), "newest"), Some(task("newest")));
}

#[test]
fn whoever_waits_with_a_connection_overtakes_a_silent_probe() {
    let (mut state, now) = opened();
    let at = now + PROBE_INTERVAL;
    assert!(probe(&mut state, &task("a"), at).is_some());
    state.connected();
    let due = at + 2 * PROBE_INTERVAL;
    assert!(probe(&mut state, &task("b"), due).is_none());
    assert!(state.probe_connected(own(), &task("a"), due - MS).is_none());
    assert!(state.probe_connected(own(), &task("a"), due).is_some());
}

#[test]
fn who_has_gone_is_not_probed_for() {
    let (mut state, now) = opened();
    drop(state.line_up(own(), &task("gone")));
    assert!(state.probe(now + PROBE_INTERVAL).is_none());
    assert!(probe(&mut state, &task("b"), now + PROBE_INTERVAL).is_some());
}

#[test]
fn who_is_first_in_line_is_told_that_it_is_over() {
    let (mut state, now) = opened();
    let mut told = state.line_up(own(), &task("a")).unwrap();
    answer(&mut state, own(), now, now);
    assert!(
        told.try_recv()
            .is_err_and(|error| error == oneshot::error::TryRecvError::Closed)
    );
    assert!(state.line_up(own(), &task("a")).is_none());
}

#[test]
fn a_probes_answer_closes_it_and_the_count_begins_anew() {
    let (mut state, now) = opened();
    let later = now + PROBE_INTERVAL;
    assert!(probe(&mut state, &task("a"), later).is_some());
    assert_eq!(answer(&mut state, own(), later, later + 200 * MS), Some(Change::Closed));
    end_probe(&mut state);
    assert!(!state.is_open());
    assert_eq!(state.until_probe(later), Duration::ZERO);
    assert_eq!(fail_for(&mut state, own(), later), Some(Change::Opened));
}

#[test]
fn a_probe_that_was_overtaken_ends_nobody_elses() {
    let (mut state, now) = opened();
    let first = probe(&mut state, &task("a"), now + PROBE_INTERVAL).unwrap();
    answer(&mut state, own(), now + MS, now + 2 * PROBE_INTERVAL);
    for name in ["v", "w", "x", "y", "z"] {
        fail(&mut state, name, now + 2 * PROBE_INTERVAL, now + 2 * PROBE_INTERVAL);
    }
    assert!(probe(&mut state, &task("b"), now + 4 * PROBE_INTERVAL).is_some());
    state.probe_ended(first);
    assert_eq!(probe(&mut state, &task("c"), now + 6 * PROBE_INTERVAL - MS), None);
}

#[test]
fn an_answer_that_was_asked_for_before_it_opened_does_not_close_it() {
    let (mut state, now) = (State::new(), Instant::now());
    for name in ["a", "b", "c", "d", "e"] {
        fail(&mut state, name, now, now + 10 * MS);
    }
    assert!(state.is_open());
    assert_eq!(answer(&mut state, own(), now + 9 * MS, now + 20 * MS), None);
    assert!(state.is_open());
    assert_eq!(
        answer(&mut state, own(), now + 10 * MS, now + 20 * MS),
        Some(Change::Closed)
    );
}

#[test]
fn two_seconds_without_a_connection_open_it() {
    let (mut state, now) = (State::new(), Instant::now());
    assert_eq!(state.next_look(), None);
    state.connecting(now);
    state.connecting(now + 500 * MS);
    assert_eq!(state.next_look(), Some(now + LONGEST_WITHOUT));
    assert_eq!(state.look(now + LONGEST_WITHOUT - MS), None);
    state.no_longer_connecting(now + LONGEST_WITHOUT - MS);
    assert_eq!(state.look(now + LONGEST_WITHOUT), Some(Change::Opened));
    assert_eq!(state.next_look(), None);
    assert_eq!(state.look(now + 2 * LONGEST_WITHOUT), None, "it opens once");
}

#[test]
fn a_connection_or_an_answer_begins_the_two_seconds_anew() {
    let (mut state, now) = (State::new(), Instant::now());
    for reach in [
        (|state, now| state.reached(now)) as fn(&mut State, Instant),
        |state, now| {
            answer(state, own(), now, now);
        },
    ] {
        state.connecting(now);
        reach(&mut state, now + 1900 * MS);
        assert_eq!(state.look(now + 3899 * MS), None);
        state.no_longer_connecting(now + 3899 * MS);
        state.reached(now + 3899 * MS);
    }
    assert_eq!(state.next_look(), None);
}

#[test]
fn a_failure_long_ago_is_no_part_of_it() {
    let (mut state, now) = (State::new(), Instant::now());
    for hour in 0..100 {
        let now = now + hour * Duration::from_hours(1);
        state.connecting(now);
        state.no_longer_connecting(now + MS);
        assert_eq!(state.look(now + MS), None);
    }
}

#[test]
fn a_pause_between_two_attempts_does_not_hide_an_outage() {
    let (mut state, now) = (State::new(), Instant::now());
    for second in 0..3 {
        let now = now + second * Duration::from_secs(1);
        state.connecting(now);
        state.no_longer_connecting(now + MS);
        assert_eq!(state.look(now + MS).is_some(), second == 2);
    }
}

/// An attempt that is given up after so many milliseconds.
fn give_up(state: &mut State, began: Instant, after: u32) {
    state.connecting(began);
    assert!(state.next_look().is_some_and(|look| look > began + after * MS));
    state.gave_up(began + after * MS);
}

#[test]
fn the_pause_behind_an_attempt_that_was_given_up_is_no_part_of_it() {
    for (times, after, apart) in [(1, 100, 2050), (1, 100, 1900), (33, 60, 500), (1999, 1, 1999)] {
        let (mut state, mut now) = (State::new(), Instant::now());
        for _ in 0..times {
            give_up(&mut state, now, after);
            now += apart * MS;
        }
        assert_eq!(state.look(now), None);
        state.connecting(now);
        assert_eq!(state.look(now), None);
        assert!(state.next_look().is_some_and(|look| look > now));
    }
}

#[test]
fn attempts_that_are_given_up_do_not_hide_that_none_comes_to_an_end() {
    // With pauses, and so that there is always one.
    for apart in [1500, 900] {
        let (mut state, mut now) = (State::new(), Instant::now());
        for _ in 0..2 {
            give_up(&mut state, now, 900);
            now += apart * MS;
        }
        state.connecting(now);
        assert_eq!(state.next_look(), Some(now + 200 * MS));
        assert_eq!(state.look(now + 199 * MS), None);
        assert_eq!(state.look(now + 200 * MS), Some(Change::Opened));
    }
    let (mut state, now) = (State::new(), Instant::now());
    state.connecting(now);
    for second in 1..20 {
        state.connecting(now + second * 100 * MS);
        state.gave_up(now + second * 100 * MS);
    }
    assert_eq!(state.next_look(), Some(now + LONGEST_WITHOUT));
    assert_eq!(state.look(now + LONGEST_WITHOUT), Some(Change::Opened));
}

#[test]
fn attempts_that_fail_at_their_time_out_open_it() {
    let (mut state, mut now) = (State::new(), Instant::now());
    for attempt in 0..3 {
        state.connecting(now);
        now += 800 * MS;
        state.no_longer_connecting(now);
        assert_eq!(state.look(now).is_some(), attempt == 2);
    }
}

#[test]
fn whichever_ended_last_says_what_the_pause_behind_it_is() {
    for given_up_last in [true, false] {
        let (mut state, now) = (State::new(), Instant::now());
        state.connecting(now);
        state.connecting(now);
        if given_up_last {
            state.no_longer_connecting(now + MS);
            state.gave_up(now + MS);
        } else {
            state.gave_up(now + MS);
            state.no_longer_connecting(now + MS);
        }
        state.connecting(now + 1900 * MS);
        assert_eq!(state.look(now + LONGEST_WITHOUT).is_none(), given_up_last);
    }
}

#[test]
fn a_connection_that_comes_while_it_is_open_does_not_close_it() {
    let (mut state, now) = opened();
    state.connecting(now);
    state.no_longer_connecting(now + MS);
    state.reached(now + MS);
    assert!(state.is_open());
}
