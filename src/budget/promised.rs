//! When those who are turned away may come back: each client has a line, in which every task's poll has a turn of its own.
//!
//! A client that comes too early, or asks for more and more tasks, lengthens its own line only. A turn is when there is a
//! place at the end of the queue, so it is kept for whoever comes back: newcomers of the same client stop a little before
//! that end. Pure: `now` is passed in.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;

use tokio::time::Instant;

use super::fair_queue::MOST_NAMES;
use crate::account::Client;
use crate::task::TaskId;

/// The longest that a line makes a poll wait. Some of those who were told to come back never do.
const LONGEST_LINE: Duration = Duration::from_mins(1);

/// Who comes so little too early is let in: some count from when they asked.
const EARLY: Duration = Duration::from_millis(100);

/// How long before a turn its place is kept. Chosen, not measured.
const AHEAD: Duration = Duration::from_secs(2);

/// How long after it: `Retry-After` is in whole seconds, and the way takes time.
const GRACE: Duration = Duration::from_secs(2);

/// Who comes later than that finds what is left of the queue, as whoever comes in time: for so long. Chosen, not measured.
const REMEMBERED: Duration = Duration::from_secs(30);

/// Beyond [`MOST_NAMES`] lines clients share their caller's, and beyond so many callers share one.
const MOST_LINES: usize = 2 * MOST_NAMES;

/// Turns of an account beyond so many are told and not remembered: at 15 a second those of the longest line, and of the time
/// for which they are remembered.
const MOST_TURNS: usize = 1500;

#[derive(Debug, Default)]
pub(super) struct Promised {
    lines: HashMap<Option<Client>, Line>,
    hasher: RandomState,
}

#[derive(Debug)]
struct Line {
    weight: u32,
    /// When the last place in it comes up.
    last: Instant,
    /// When which task is told to come back.
    turns: BTreeSet<(Instant, u64)>,
    of_task: HashMap<u64, Instant>,
}

impl Promised {
    /// Promises a turn for `task` in the line of `client`, if it would come `late_by` too late; gives how long after `now`
    /// that is. One that is promised already is told again. Turns of all clients come at `rate` a second.
    pub(super) fn next(
        &mut self,
        client: &Client,
        weight: u32,
        task: &TaskId,
        late_by: Duration,
        rate: f64,
        now: Instant,
    ) -> Duration {
        let task = self.hasher.hash_one(task);
        let key = self.open(client, weight, now);
        let each = self.each(key.as_ref(), rate, now);
        let turns: usize = self.lines.values().map(|line| line.turns.len()).sum();
        let Some(line) = self.lines.get_mut(&key) else {
            return late_by + each;
        };
        match line.of_task.get(&task).copied() {
            Some(due) if due > now => return late_by.max(due - now),
            Some(due) => line.forget(due, task),
            None => {}
        }
        let end = now + LONGEST_LINE;
        line.last = line.last.max(now) + each;
        let due = line.last.min(end) + late_by;
        if line.last <= end && turns < MOST_TURNS {
            line.turns.insert((due, task));
            line.of_task.insert(task, due);
        }
        line.last = line.last.min(end);
        due - now
    }

    /// How long before the end of the queue a poll of `client` for `task` has to stop, so that those find a place who are
    /// told to come back about now; not at all if it is one of them.
    pub(super) fn kept(&mut self, client: &Client, task: &TaskId, rate: f64, now: Instant) -> Duration {
        // Mostly nobody was turned away.
        if self.lines.is_empty() {
            return Duration::ZERO;
        }
        let task = self.hasher.hash_one(task);
        let key = self.key(client);
        let Some(line) = self.lines.get_mut(&key) else {
            return Duration::ZERO;
        };
        line.lapse(now);
        if line.is_over(now) {
            self.lines.remove(&key);
            return Duration::ZERO;
        }
        if let Some(due) = line.of_task.get(&task).copied().filter(|due| *due <= now + EARLY) {
            line.forget(due, task);
            return Duration::ZERO;
        }
        let from = now.checked_sub(GRACE).unwrap_or(now);
        let turns = line.turns.range((from, 0)..(now + AHEAD, 0)).count();
        let turns = u32::try_from(turns).unwrap_or(u32::MAX);
        self.each(key.as_ref(), rate, now).saturating_mul(turns)
    }

    /// The line that is the client's, or would be: its own, else its caller's, else nobody's in particular.
    fn key(&self, client: &Client) -> Option<Client> {
        let lines = [(client.clone(), MOST_NAMES), (client.nameless(), MOST_LINES)];
        let mut lines = lines.into_iter().map(|(client, most)| (Some(client), most));
        let line = lines.find(|(line, most)| self.lines.len() < *most || self.lines.contains_key(line));
        line.and_then(|(line, _)| line)
    }

    fn open(&mut self, client: &Client, weight: u32, now: Instant) -> Option<Client> {
        self.lines.retain(|_, line| {
            line.lapse(now);
            !line.is_over(now)
        });
        let key = self.key(client);
        let line = self.lines.entry(key.clone()).or_insert_with(|| Line {
            weight,
            last: now,
            turns: BTreeSet::new(),
            of_task: HashMap::new(),
        });
        line.weight = weight.max(1);
        key
    }

    /// The time between two turns of a line: those of clients whose lines are not over yet come as the queue serves them,
    /// callers by weight and a caller's names by turns.
    fn each(&self, client: Option<&Client>, rate: f64, now: Instant) -> Duration {
        let own = client.map(|client| &client.caller);
        let mut weights = HashMap::new();
        let mut names = 0_u32;
        for (other, line) in &self.lines {
            let other = other.as_ref();
            if line.last > now || other == client {
                let of = other.map(|other| &other.caller);
                names += u32::from(of == own);
                weights.insert(of, line.weight);
            }
        }
        let all: f64 = weights.values().copied().map(f64::from).sum();
        let weight = weights.get(&own).copied().map_or(1.0, f64::from);
        let share = weight / all.max(weight) / f64::from(names.max(1));
        Duration::try_from_secs_f64((rate * share).recip()).unwrap_or(LONGEST_LINE)
    }
}

impl Line {
    fn forget(&mut self, due: Instant, task: u64) {
        self.turns.remove(&(due, task));
        self.of_task.remove(&task);
    }

    /// Whether its last place, and the turns that are remembered, are long over.
    fn is_over(&self, now: Instant) -> bool {
        self.turns.is_empty() && self.last + REMEMBERED <= now
    }

    /// Forgets those who have not come back.
    fn lapse(&mut self, now: Instant) {
        while let Some((due, task)) = self.turns.first().copied()
            && due + REMEMBERED < now
        {
            self.forget(due, task);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};
    use std::sync::Arc;

    use super::*;
    use crate::account::Caller;

    const SECOND: Duration = Duration::from_secs(1);

    fn client(number: u8, name: Option<&str>) -> Client {
        Client {
            caller: Caller::from(IpAddr::from(Ipv4Addr::new(10, 0, 0, number))),
            name: name.map(Arc::from),
        }
    }

    fn task(number: u32) -> TaskId {
        TaskId::from_query(Some(&format!("task_id=task-{number}"))).unwrap()
    }

    /// Promises turns for these tasks at 10 a second; gives the last.
    fn promise(
        promised: &mut Promised,
        client: &Client,
        weight: u32,
        tasks: std::ops::Range<u32>,
        now: Instant,
    ) -> Duration {
        let turns = tasks.map(|number| promised.next(client, weight, &task(number), Duration::ZERO, 10.0, now));
        turns.last().unwrap()
    }

    #[track_caller]
    fn assert_about(turn: Duration, seconds: f64) {
        assert!((turn.as_secs_f64() - seconds).abs() < 1e-3, "{turn:?}, not {seconds} s");
    }

    #[test]
    fn each_task_has_a_turn_of_its_own_and_is_told_the_same_again() {
        let (mut promised, now, one) = (Promised::default(), Instant::now(), client(1, None));
        assert_about(promise(&mut promised, &one, 1, 0..100, now), 10.0);
        // Too early, again and again: nothing gets longer.
        for _ in 0..100 {
            assert_about(promise(&mut promised, &one, 1, 50..51, now + SECOND), 4.1);
        }
        assert_about(promise(&mut promised, &one, 1, 100..101, now + SECOND), 9.1);
        // Not served when told to come back: another turn.
        assert_about(promise(&mut promised, &one, 1, 0..1, now + SECOND), 9.2);
        let line = &promised.lines[&Some(one)];
        assert_eq!((line.turns.len(), line.of_task.len()), (101, 101));
    }

    #[test]
    fn a_line_is_its_clients_own_and_moves_at_that_clients_share() {
        let (mut promised, now) = (Promised::default(), Instant::now());
        let (one, another) = (client(1, None), client(2, None));
        assert_about(promise(&mut promised, &one, 1, 0..200, now), 20.0);
        assert_about(promise(&mut promised, &another, 1, 0..10, now), 2.0);
        let weighty = client(3, None);
        assert_about(promise(&mut promised, &weighty, 8, 0..8, now), 1.0);
        assert_about(promise(&mut promised, &another, 1, 10..11, now), 3.0);
        // A caller's names share what is the caller's.
        let (mut promised, named) = (Promised::default(), client(1, Some("a")));
        promise(&mut promised, &named, 1, 0..100, now);
        promise(&mut promised, &another, 1, 0..100, now);
        assert_about(promise(&mut promised, &client(1, Some("b")), 1, 0..1, now), 0.4);
    }

    #[test]
    fn no_line_is_longer_than_a_minute() {
        let (mut promised, now, one) = (Promised::default(), Instant::now(), client(1, None));
        assert_about(promise(&mut promised, &one, 1, 0..5000, now), 60.0);
        let line = &promised.lines[&Some(one)];
        assert_eq!((line.turns.len(), line.of_task.len()), (600, 600));
    }

    #[test]
    fn a_place_is_kept_from_newcomers_for_a_while_before_and_after_its_turn() {
        let (mut promised, now, one) = (Promised::default(), Instant::now(), client(1, None));
        promise(&mut promised, &one, 1, 0..100, now);
        let mut kept = |client: &Client, number, after| promised.kept(client, &task(number), 10.0, now + after);
        let newcomer = 1000;
        assert_about(kept(&one, newcomer, Duration::ZERO), 1.9);
        assert_eq!(kept(&client(2, None), newcomer, Duration::ZERO), Duration::ZERO);
        assert_about(kept(&one, newcomer, SECOND), 2.9);
        // Too early is a newcomer; in time has its place, and leaves it.
        assert_about(kept(&one, 30, SECOND), 2.9);
        assert_eq!(kept(&one, 5, SECOND), Duration::ZERO);
        assert_about(kept(&one, newcomer, SECOND), 2.8);
        assert_about(kept(&one, newcomer, 5 * SECOND), 4.0);
        assert_eq!(kept(&one, 70, 13 * SECOND), Duration::ZERO);
        assert_eq!(kept(&one, newcomer, 13 * SECOND), Duration::ZERO);
    }

    #[test]
    fn one_caller_under_many_names_takes_nobody_elses_line() {
        let (mut promised, now) = (Promised::default(), Instant::now());
        for name in 0..2000 {
            promise(&mut promised, &client(1, Some(&name.to_string())), 1, 0..1, now);
        }
        assert_eq!(promised.lines.len(), MOST_NAMES + 1);
        assert_about(promise(&mut promised, &client(2, None), 1, 0..10, now), 2.0);
        assert_about(promise(&mut promised, &client(2, Some("a")), 1, 10..20, now), 4.0);
        assert_about(promise(&mut promised, &client(3, Some("a")), 1, 0..10, now), 3.0);
    }

    #[test]
    fn lines_and_turns_are_few() {
        let (mut promised, now) = (Promised::default(), Instant::now());
        for number in 0..600_u32 {
            let [_, _, high, low] = number.to_be_bytes();
            let caller = Caller::from(IpAddr::from(Ipv4Addr::new(10, 0, high, low)));
            let client = Client { caller, name: None };
            for number in 0..5 {
                promised.next(&client, 1, &task(number), Duration::ZERO, 1000.0, now);
            }
        }
        assert_eq!(promised.lines.len(), MOST_LINES + 1);
        let turns: usize = promised.lines.values().map(|line| line.turns.len()).sum();
        assert_eq!(turns, MOST_TURNS);
    }

    #[test]
    fn lines_and_turns_that_are_over_go() {
        let (mut promised, now) = (Promised::default(), Instant::now());
        let (one, paused, back) = (client(1, None), client(2, None), client(3, None));
        promise(&mut promised, &one, 1, 0..100, now);
        let pause = 200 * SECOND;
        promised.next(&paused, 1, &task(0), pause, 10.0, now);
        promise(&mut promised, &back, 1, 0..1, now);
        assert_eq!(promised.lines.len(), 3);
        // Whoever comes back and finds a place leaves a line behind that is nobody's.
        assert_eq!(promised.kept(&back, &task(0), 10.0, now + SECOND), Duration::ZERO);
        promised.kept(&back, &task(1), 10.0, now + 32 * SECOND);
        assert_eq!(promised.lines.len(), 2);
        promise(&mut promised, &client(4, None), 1, 0..1, now + 100 * SECOND);
        assert!(!promised.lines.contains_key(&Some(one)), "all of its turns are over");
        assert!(promised.lines.contains_key(&Some(paused)), "its turn is yet to come");
    }
}
