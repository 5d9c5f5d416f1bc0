//! Replicas, links and the store's model on one simulated clock, with everything that can go wrong between them. A seed
//! and a list of faults give the same history every time.
//!
//! Written after the simulation that found the rules; what is new here is that each replica runs the real
//! [`Process`], with two accounts. An arrival is the write plus up to a third of the margin.

mod faults;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::super::process::{BorrowerId, Demand, Process, Slot, Told};
use super::super::script::{Call, Constants, Reply};
use super::store::{State, lend};
use faults::touches;
pub(super) use faults::{Fault, Kind, Way};

pub(super) const LIMIT: u32 = 15;
pub(super) const MARGIN: f64 = 0.030;
pub(super) const WINDOW: f64 = 1.0 + MARGIN;
const THIRD: f64 = MARGIN / 3.0;
const TIMEOUT: f64 = 0.2;
/// A flight's claim is a call to the store, too.
const CLAIM: f64 = 0.003;
const ACCOUNTS: [&str; 2] = ["music", "video"];

/// What happened.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// When each query of the first account arrived, and by whom it was sent.
    pub(super) arrivals: Vec<(f64, usize)>,
    /// The most arrivals in any half-open second, of any account.
    pub(super) most: usize,
    /// The longest time without a write, counted anew at each start and end of a fault.
    pub(super) gap: f64,
    /// Writes a second in the last three.
    pub(super) tail: f64,
    /// What part of the first account's limit each replica was told to count on, at the end.
    pub(super) shares: Vec<f64>,
}

#[derive(Clone, Debug)]
enum Event {
    Look(usize, u64),
    Timeout(usize, u64),
    ToStore(usize, u64, Call),
    ToProc(usize, u64, Reply),
    Spend(usize, usize, Slot),
    Alone(usize, usize),
    Ready(usize, usize),
    Want(usize, Demand),
    Begin(usize),
    End(usize),
    Start(usize),
    Snapshot,
    Mark,
}

#[derive(Debug)]
struct Proc {
    replica: usize,
    who: String,
    process: Process,
    borrowers: [BorrowerId; 2],
    told: [Arc<Told>; 2],
    pace: f64,
    zero: f64,
    base: Instant,
    is_dead: bool,
    paused_until: f64,
    calls: u64,
    sent: Option<Instant>,
    looks: u64,
    own: [Option<Instant>; 2],
    own_runs: [bool; 2],
    scheduled: [Option<Slot>; 2],
}

#[derive(Clone, Debug, Default)]
struct Link {
    cut: Option<Way>,
    hold: Option<Way>,
    drop: Option<(Way, f64)>,
    delay: Option<(Way, f64)>,
    held: Vec<Event>,
}

pub(super) struct Cluster {
    replicas: usize,
    faults: Vec<Fault>,
    now: f64,
    events: BinaryHeap<Reverse<(u64, u64, usize)>>,
    queued: BTreeMap<usize, Event>,
    serial: usize,
    random: u64,
    procs: Vec<Proc>,
    running: Vec<usize>,
    links: Vec<Link>,
    round_trip: f64,
    clock: f64,
    run: u64,
    generations: u64,
    is_up: bool,
    refuses: bool,
    backlog: Option<Vec<Event>>,
    state: Option<State>,
    snapshot: Option<State>,
    saved: Option<State>,
    writes: [Vec<(f64, f64, usize)>; 2],
    marks: Vec<f64>,
    pub(super) limit: u32,
    /// Where a queue has one flight ready at a time, the next is so long after a permit, in seconds.
    pub(super) ready_after: f64,
    pub(super) demands: Vec<Demand>,
}

/// So many flights wait, all with a connection.
pub(super) fn demand(weight: u32, flights: usize) -> Demand {
    Demand {
        weight,
        flights,
        is_queue: flights > 1,
    }
}

/// Many wait, one with a connection at a time.
pub(super) fn queue(weight: u32) -> Demand {
    Demand {
        flights: 1,
        ..demand(weight, 9)
    }
}

fn nanos(at: f64) -> u64 {
    (at * 1e9).round() as u64
}

impl Cluster {
    pub(super) fn new(replicas: usize, seed: u64, faults: &[Fault]) -> Self {
        let mut cluster = Self {
            replicas,
            faults: faults.to_vec(),
            now: 0.0,
            events: BinaryHeap::new(),
            queued: BTreeMap::new(),
            serial: 0,
            random: seed,
            procs: Vec::new(),
            running: Vec::new(),
            links: vec![Link::default(); replicas],
            round_trip: 0.0,
            clock: 1e6,
            run: 1,
            generations: 0,
            is_up: true,
            refuses: false,
            backlog: None,
            state: None,
            snapshot: None,
            saved: None,
            writes: [Vec::new(), Vec::new()],
            marks: Vec::new(),
            limit: LIMIT,
            ready_after: CLAIM,
            demands: vec![demand(10, 9); replicas],
        };
        cluster.round_trip = [0.0003, 0.001, 0.002][cluster.below(3)];
        for replica in 0..replicas {
            let at = cluster.unit() * 0.3;
            cluster.at(at, Event::Start(replica));
        }
        for (number, fault) in faults.iter().enumerate() {
            cluster.at(fault.at, Event::Begin(number));
            cluster.at(fault.at + fault.lasts, Event::End(number));
        }
        for mark in 0..100 {
            cluster.at(f64::from(mark) * 0.25, Event::Mark);
            let at = f64::from(mark) * 0.5 + cluster.unit() * 0.4;
            cluster.at(at, Event::Snapshot);
        }
        cluster
    }

    /// From `at` on this is what waits at a replica.
    pub(super) fn want(&mut self, at: f64, replica: usize, demand: Demand) {
        self.at(at, Event::Want(replica, demand));
    }

    /// By `SplitMix64`.
    fn bits(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn below(&mut self, most: u64) -> usize {
        usize::try_from(self.bits() % most).unwrap()
    }

    fn at(&mut self, at: f64, event: Event) {
        self.serial += 1;
        self.queued.insert(self.serial, event);
        self.events.push(Reverse((nanos(at), self.serial as u64, self.serial)));
    }

    fn start(&mut self, replica: usize) {
        let pace = 1.0 + (self.unit() - 0.5) * 4e-4;
        let base = Instant::now();
        let window = Duration::from_secs_f64(WINDOW);
        let third = Duration::from_secs_f64(THIRD);
        let replicas = u32::try_from(self.replicas).unwrap();
        let share = f64::from(self.limit / replicas) / f64::from(self.limit);
        let mut process = Process::new(window, third, share, replicas, base);
        let told = [(); 2].map(|()| Arc::new(Told::new(base)));
        let borrowers =
            [0, 1].map(|borrower| process.open(ACCOUNTS[borrower].into(), Arc::clone(&told[borrower]), base));
        for borrower in borrowers {
            process.want(borrower, self.demands[replica], base);
        }
        let proc = Proc {
            replica,
            who: self.procs.len().to_string(),
            process,
            borrowers,
            told,
            pace,
            zero: self.now,
            base,
            is_dead: false,
            paused_until: 0.0,
            calls: 0,
            sent: None,
            looks: 0,
            own: [None; 2],
            own_runs: [false; 2],
            scheduled: [None; 2],
        };
        self.procs.push(proc);
        let number = self.procs.len() - 1;
        if self.running.len() <= replica {
            self.running.resize(replica + 1, number);
        }
        self.running[replica] = number;
        self.look(number);
    }

    fn local(&self, proc: usize) -> Instant {
        let proc = &self.procs[proc];
        proc.base + Duration::from_secs_f64((self.now - proc.zero) * proc.pace)
    }

    /// A timer of the process: up to 1 ms late.
    fn after(&mut self, proc: usize, at: Instant, event: Event) {
        let late = self.unit() * 0.001;
        let left = at.saturating_duration_since(self.local(proc)).as_secs_f64();
        self.at(self.now + left / self.procs[proc].pace + late, event);
    }

    /// Does what a process's driver does whenever something has changed.
    fn look(&mut self, number: usize) {
        let now = self.local(number);
        let proc = &mut self.procs[number];
        let next = proc.process.look(now);
        if let Some(call) = proc.process.call(now) {
            proc.calls += 1;
            proc.sent = Some(now);
            let id = proc.calls;
            self.carry(Way::Up, Event::ToStore(number, id, call));
            self.after(
                number,
                now + Duration::from_secs_f64(TIMEOUT),
                Event::Timeout(number, id),
            );
            return self.look(number);
        }
        proc.looks += 1;
        let looks = proc.looks;
        if let Some(next) = next {
            self.after(number, next, Event::Look(number, looks));
        }
        for borrower in 0..2 {
            let proc = &self.procs[number];
            let slot = proc.process.slot(proc.borrowers[borrower]);
            if let Some(slot) = slot.filter(|slot| proc.scheduled[borrower] != Some(*slot)) {
                self.procs[number].scheduled[borrower] = Some(slot);
                self.after(number, slot.due, Event::Spend(number, borrower, slot));
            }
            let proc = &mut self.procs[number];
            if proc.process.is_alone() && !proc.own_runs[borrower] {
                proc.own_runs[borrower] = true;
                self.after(number, now, Event::Alone(number, borrower));
            }
        }
    }

    fn write(&mut self, number: usize, borrower: usize) {
        let jitter = self.unit() * THIRD;
        let replica = self.procs[number].replica;
        self.writes[borrower].push((self.now + jitter, self.now, replica));
    }

    fn spend(&mut self, number: usize, borrower: usize, slot: Slot) {
        let now = self.local(number);
        if now <= slot.latest {
            self.write(number, borrower);
        }
        let proc = &mut self.procs[number];
        let demand = self.demands[proc.replica];
        if demand.is_queue && demand.flights == 1 {
            proc.process
                .want(proc.borrowers[borrower], Demand { flights: 0, ..demand }, now);
            self.at(self.now + self.ready_after, Event::Ready(number, borrower));
        }
        let proc = &mut self.procs[number];
        proc.process.spent(proc.borrowers[borrower], now);
        self.look(number);
    }

    fn carry(&mut self, way: Way, event: Event) {
        let (Event::ToStore(number, ..) | Event::ToProc(number, ..)) = event else {
            unreachable!("only messages are carried")
        };
        let replica = self.procs[number].replica;
        let mut takes = self.round_trip * (0.25 + 0.5 * self.unit());
        let (drops, delays) = (self.unit(), self.unit());
        let link = &mut self.links[replica];
        let is_dropped = link
            .drop
            .is_some_and(|(of, part)| touches(Some(of), way) && drops < part);
        if touches(link.cut, way) || is_dropped {
            return;
        }
        if let Some((_, most)) = link.delay.filter(|(of, _)| touches(Some(*of), way)) {
            takes += delays * most;
        }
        if touches(link.hold, way) {
            link.held.push(event);
        } else {
            self.at(self.now + takes, event);
        }
    }

    fn answer(&mut self, event: Event) {
        if let Some(backlog) = &mut self.backlog {
            backlog.push(event);
            return;
        }
        let Event::ToStore(number, id, call) = event else {
            return;
        };
        if !self.is_up || self.refuses {
            return;
        }
        let constants = Constants {
            who: self.procs[number].who.clone(),
            limit: self.limit,
            replicas: u32::try_from(self.replicas).unwrap(),
            window: Duration::from_secs_f64(WINDOW),
        };
        let (run, now) = (self.run.to_string(), ((self.now + self.clock) * 1e6).floor());
        let generations = &mut self.generations;
        let reply = lend(&mut self.state, &run, now, &call, &constants, || {
            *generations += 1;
            generations.to_string()
        });
        self.carry(Way::Down, Event::ToProc(number, id, reply));
    }

    /// The process whose event it is may not run now.
    fn holds_back(&mut self, event: &Event) -> bool {
        let (Event::Look(number, _)
        | Event::Timeout(number, _)
        | Event::ToProc(number, ..)
        | Event::Spend(number, ..)
        | Event::Alone(number, _)
        | Event::Ready(number, _)) = *event
        else {
            return false;
        };
        let proc = &self.procs[number];
        if !proc.is_dead && nanos(proc.paused_until) > nanos(self.now) {
            self.at(proc.paused_until, event.clone());
            return true;
        }
        proc.is_dead
    }

    fn happen(&mut self, event: Event) {
        if self.holds_back(&event) {
            return;
        }
        match event {
            Event::Look(number, looks) => {
                if self.procs[number].looks == looks {
                    self.look(number);
                }
            }
            Event::Timeout(number, id) => {
                let now = self.local(number);
                let proc = &mut self.procs[number];
                if proc.calls == id && proc.sent.take().is_some() {
                    proc.process.missed(now);
                    self.look(number);
                }
            }
            Event::ToStore(..) => self.answer(event),
            Event::ToProc(number, id, reply) => {
                let now = self.local(number);
                let proc = &mut self.procs[number];
                if proc.calls == id
                    && let Some(sent) = proc.sent.take()
                {
                    proc.process.heard(sent, now, &reply);
                    self.look(number);
                }
            }
            Event::Spend(number, borrower, slot) => self.spend(number, borrower, slot),
            Event::Ready(number, borrower) => {
                let now = self.local(number);
                let proc = &mut self.procs[number];
                proc.process
                    .want(proc.borrowers[borrower], self.demands[proc.replica], now);
                self.look(number);
            }
            Event::Alone(number, borrower) => {
                let now = self.local(number);
                let proc = &mut self.procs[number];
                if !proc.process.is_alone() {
                    proc.own_runs[borrower] = false;
                    return;
                }
                let slice = self.limit / u32::try_from(self.replicas).unwrap();
                let gap = Duration::from_secs_f64(WINDOW / f64::from(slice));
                let due = proc.own[borrower].map_or(now, |last| last + gap);
                let last = if now >= due { now } else { due - gap };
                proc.own[borrower] = Some(last);
                if now >= due {
                    self.write(number, borrower);
                }
                self.after(number, last + gap, Event::Alone(number, borrower));
            }
            Event::Want(replica, demand) => {
                self.demands[replica] = demand;
                if let Some(&number) = self.running.get(replica) {
                    let now = self.local(number);
                    let proc = &mut self.procs[number];
                    for borrower in proc.borrowers {
                        proc.process.want(borrower, demand, now);
                    }
                    self.look(number);
                }
            }
            Event::Begin(fault) => {
                self.marks.push(self.now);
                let fault = self.faults[fault].clone();
                self.begin(&fault);
            }
            Event::End(fault) => {
                self.marks.push(self.now);
                let fault = self.faults[fault].clone();
                self.end(&fault);
            }
            Event::Start(replica) => {
                if let Some(old) = self.running.get(replica).copied()
                    && self.procs[old].replica == replica
                {
                    self.procs[old].is_dead = true;
                    self.marks.push(self.now);
                }
                self.start(replica);
            }
            Event::Snapshot => self.snapshot.clone_from(&self.state),
            Event::Mark => {
                let runs = |number: &usize| {
                    let proc = &self.procs[*number];
                    !proc.is_dead && proc.paused_until <= self.now
                };
                if !self.running.iter().any(runs) {
                    self.marks.push(self.now);
                }
            }
        }
    }

    /// Plays until `end`, in seconds.
    pub(super) fn play(mut self, end: f64) -> Outcome {
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            assert!(self.serial < 2_000_000, "busy for nothing at {} s", self.now);
            if at > nanos(end) {
                break;
            }
            self.now = at as f64 / 1e9;
            let event = self.queued.remove(&event).unwrap();
            self.happen(event);
        }
        let mut outcome = Outcome {
            tail: f64::MAX,
            ..Outcome::default()
        };
        for writes in &mut self.writes {
            writes.sort_by(|one, other| one.0.total_cmp(&other.0));
            let mut first = 0;
            for last in 0..writes.len() {
                while writes[last].0 - writes[first].0 >= 1.0 {
                    first += 1;
                }
                outcome.most = outcome.most.max(last + 1 - first);
            }
            let written = writes.iter().map(|(_, written, _)| *written);
            let mut marks: Vec<_> = written.chain(self.marks.iter().copied()).chain([0.3, end]).collect();
            marks.sort_by(f64::total_cmp);
            let gaps = marks.windows(2).map(|pair| pair[1] - pair[0]);
            outcome.gap = gaps.fold(outcome.gap, f64::max);
            let tail = writes.iter().filter(|(_, at, _)| *at >= end - 3.0 && *at < end).count();
            outcome.tail = outcome.tail.min(tail as f64 / 3.0);
        }
        let share = |&running: &usize| self.procs[running].told[0].share().of_limit(self.local(running));
        outcome.shares = self.running.iter().map(share).collect();
        outcome.arrivals = self.writes[0].iter().map(|(at, _, replica)| (*at, *replica)).collect();
        outcome
    }
}
