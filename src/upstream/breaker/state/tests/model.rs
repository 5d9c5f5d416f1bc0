//! Whatever happens to a breaker, and a model that says what it may do then.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Event {
    /// Of an account's task, asked so many ms ago.
    Failed(bool, u8, u32),
    Answered(bool, u8, u32),
    Refused(bool, u32),
    Probe(u8),
    Connected,
    ProbeConnected(u8),
    ProbeEnded,
    Connecting,
    /// And whether it is there.
    NoLongerConnecting(bool),
    GaveUp,
    Look,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => (any::<bool>(), 0_u8..3, 0_u32..3000).prop_map(|(whose, task, ago)| Event::Failed(whose, task, ago)),
        1 => (any::<bool>(), 0_u8..3, 0_u32..3000).prop_map(|(whose, task, ago)| Event::Answered(whose, task, ago)),
        1 => (any::<bool>(), 0_u32..3000).prop_map(|(whose, ago)| Event::Refused(whose, ago)),
        4 => (0_u8..3).prop_map(Event::Probe),
        1 => Just(Event::Connected),
        2 => (0_u8..3).prop_map(Event::ProbeConnected),
        2 => Just(Event::ProbeEnded),
        1 => Just(Event::Connecting),
        1 => any::<bool>().prop_map(Event::NoLongerConnecting),
        1 => Just(Event::GaveUp),
        1 => Just(Event::Look),
    ]
}

/// A breaker, and of what has happened to it as much as says what it may do next.
struct Model {
    state: State,
    now: Instant,
    opened: Option<Instant>,
    /// Whose failures, and of which task, since the last answer that was news.
    failing: Vec<(bool, u8)>,
    /// Tasks that have failed beside them, each by itself.
    beside: Vec<u8>,
    /// When an account asked last what was answered.
    answered: [Option<Instant>; 2],
    /// When it asked last what failed, and what anything else was said to.
    failed: [Option<Instant>; 2],
    heard: [Option<Instant>; 2],
    /// Its task that failed last, and whether another has since it heard anything.
    failed_task: [Option<u8>; 2],
    several_fail: [bool; 2],
    /// Tasks that have failed since they were answered: when last, and how often though somebody was answered between.
    own: HashMap<(bool, u8), (Instant, u32)>,
    /// When somebody asked last what showed that upstream is there.
    back: Option<Instant>,
    probing: bool,
    last_probe: Option<Instant>,
    connected: u32,
    connecting: u32,
    /// How long there was no connection, and whether the time that passes is part of that.
    without: Duration,
    is_without: bool,
}

impl Model {
    fn new() -> Self {
        Self {
            state: State::new(),
            now: Instant::now() + Duration::from_hours(1),
            opened: None,
            failing: Vec::new(),
            beside: Vec::new(),
            answered: [None; 2],
            failed: [None; 2],
            heard: [None; 2],
            failed_task: [None; 2],
            several_fail: [false; 2],
            own: HashMap::new(),
            back: None,
            probing: false,
            last_probe: None,
            connected: 0,
            connecting: 0,
            without: Duration::ZERO,
            is_without: false,
        }
    }

    /// Time passes, then this happens.
    fn happens(&mut self, event: &Event, later: Duration) -> Result<(), TestCaseError> {
        self.now += later;
        self.without += if self.is_without { later } else { Duration::ZERO };
        let (now, was_open) = (self.now, self.state.is_open());
        let mut change = None;
        match *event {
            Event::Failed(whose, name, ago) => change = self.fails(whose, name, now - ago * MS)?,
            Event::Answered(whose, name, ago) => change = self.is_answered(whose, name, now - ago * MS)?,
            Event::Refused(whose, ago) => change = self.is_refused(whose, now - ago * MS)?,
            Event::Probe(name) => {
                if poll(&mut self.state, own(), &task(&name.to_string()), now).is_some() {
                    prop_assert_eq!(self.connected, 0, "they come first");
                    self.probe_begins()?;
                }
            }
            Event::Connected => {
                self.state.connected();
                self.connected += 1;
            }
            Event::ProbeConnected(name) if self.connected > 0 => {
                self.connected -= 1;
                let begun = self.state.probe_connected(own(), &task(&name.to_string()), now);
                self.state.no_longer_connected();
                if begun.is_some() {
                    self.probe_begins()?;
                }
            }
            Event::ProbeEnded => {
                end_probe(&mut self.state);
                self.probing = false;
            }
            Event::Connecting => {
                self.state.connecting(now);
                self.connecting += 1;
                self.is_without = true;
            }
            Event::NoLongerConnecting(is_there) if self.connecting > 0 => {
                self.connecting -= 1;
                self.state.no_longer_connecting(now);
                if is_there {
                    self.state.reached(now);
                    self.is_reached();
                }
            }
            Event::GaveUp if self.connecting > 0 => {
                self.connecting -= 1;
                self.state.gave_up(now);
                self.is_without = self.connecting > 0;
            }
            Event::ProbeConnected(_) | Event::NoLongerConnecting(_) | Event::GaveUp => {}
            Event::Look => {
                change = self.state.look(now);
                prop_assert!(change.is_none() || self.without >= LONGEST_WITHOUT);
            }
        }
        self.has_changed(was_open, change)
    }

    fn fails(&mut self, whose: bool, name: u8, asked: Instant) -> Result<Option<Change>, TestCaseError> {
        let (is_open, is_new) = (self.state.is_open(), self.back.is_none_or(|back| asked >= back));
        let is_its_own = !is_open && is_new && self.fails_by_itself(whose, name, asked);
        if is_its_own {
            self.beside.push(name);
        } else {
            self.failing.push((whose, name));
        }
        let is_heard_since = self.heard[usize::from(whose)].is_some_and(|heard| asked < heard);
        if (is_open || is_new) && !is_heard_since {
            let whose = usize::from(whose);
            let is_another = self.failed_task[whose].replace(name) != Some(name);
            self.several_fail[whose] |= is_another && self.failed[whose] > self.heard[whose];
            self.failed[whose] = self.failed[whose].max(Some(asked));
        }
        let account = Self::account(whose);
        let change = self
            .state
            .failed(Some(account), &task(&name.to_string()), asked, self.now);
        if change.is_some() {
            let failing = &self.failing;
            prop_assert!(failing.len() >= 5, "{failing:?}");
            let mut others = failing
                .iter()
                .map(|failing| failing.1)
                .chain(self.beside.iter().copied());
            prop_assert!(others.any(|other| other != name), "{failing:?}");
            let others = self.answered[usize::from(!whose)];
            let is_contradicted = others.is_some_and(|answered| asked < answered + LATELY);
            prop_assert!(
                !is_contradicted || failing.iter().any(|other| other.0 != whose),
                "{failing:?}"
            );
        }
        Ok(change)
    }

    fn forget(&mut self) {
        self.failing.clear();
        self.beside.clear();
    }

    /// Whether this task has failed three times though somebody was answered between.
    fn fails_by_itself(&mut self, whose: bool, name: u8, asked: Instant) -> bool {
        let (failed, often) = self.own.entry((whose, name)).or_insert((asked, 0));
        let told = self.answered[0].max(self.answered[1]);
        *often += u32::from(told > Some(*failed));
        *failed = asked.max(*failed);
        let within = Duration::from_secs([0, 5, 5, 20][usize::try_from(*often).unwrap().min(3)]);
        told.is_some_and(|told| asked.saturating_duration_since(told) < within)
    }

    fn is_answered(&mut self, whose: bool, name: u8, asked: Instant) -> Result<Option<Change>, TestCaseError> {
        let was_open = self.state.is_open();
        let change = self
            .state
            .answered(Self::account(whose), &task(&name.to_string()), asked, self.now);
        let is_news = self.opened.is_none_or(|opened| asked >= opened);
        prop_assert_eq!(change.is_some(), was_open && is_news);
        if is_news || !was_open {
            let last = &mut self.answered[usize::from(whose)];
            *last = (*last).max(Some(asked));
            self.hears(whose, asked);
            self.own.remove(&(whose, name));
            self.forget();
            self.back = self.back.max(Some(asked));
            prop_assert!(!self.state.is_open());
        }
        self.is_reached();
        Ok(change)
    }

    fn is_refused(&mut self, whose: bool, asked: Instant) -> Result<Option<Change>, TestCaseError> {
        let was_open = self.state.is_open();
        let change = self.state.refused(Self::account(whose), asked, self.now);
        let is_news = !was_open || self.opened.is_some_and(|opened| asked >= opened);
        let lately = |failed| asked.saturating_duration_since(failed) < Duration::from_mins(1);
        let unheard = |whose: bool| {
            let (failed, heard) = (self.failed[usize::from(whose)], self.heard[usize::from(whose)]);
            failed.filter(|_| failed > heard)
        };
        let is_change = unheard(whose).is_some_and(|failed| failed < asked && lately(failed));
        let several_fail = self.several_fail[usize::from(!whose)];
        let is_contradicted = !is_change && several_fail && unheard(!whose).is_some_and(lately);
        prop_assert_eq!(change.is_some(), was_open && is_news && !is_contradicted);
        if is_news {
            let is_known = self.failed[usize::from(whose)]
                .max(self.answered[usize::from(whose)])
                .is_some();
            if is_known {
                self.hears(whose, asked);
            }
            self.is_reached();
        }
        if is_news && !is_contradicted {
            self.forget();
        }
        if change.is_some() {
            self.back = self.back.max(Some(asked));
        }
        Ok(change)
    }

    fn hears(&mut self, whose: bool, asked: Instant) {
        let whose = usize::from(whose);
        self.heard[whose] = self.heard[whose].max(Some(asked));
        self.several_fail[whose] &= self.failed[whose] > self.heard[whose];
    }

    fn account(whose: bool) -> AccountId {
        if whose { own() } else { another() }
    }

    fn is_reached(&mut self) {
        (self.without, self.is_without) = (Duration::ZERO, self.connecting > 0);
    }

    fn probe_begins(&mut self) -> Result<(), TestCaseError> {
        prop_assert!(self.state.is_open());
        let apart = if self.probing {
            2 * PROBE_INTERVAL
        } else {
            PROBE_INTERVAL
        };
        prop_assert!(self.last_probe.is_none_or(|last| self.now >= last + apart));
        prop_assert!(self.opened.is_some_and(|opened| self.now >= opened + PROBE_INTERVAL));
        (self.probing, self.last_probe) = (true, Some(self.now));
        Ok(())
    }

    fn has_changed(&mut self, was_open: bool, change: Option<Change>) -> Result<(), TestCaseError> {
        let is_open = self.state.is_open();
        match change {
            Some(Change::Opened) => {
                prop_assert!(!was_open && is_open);
                self.opened = Some(self.now);
                self.forget();
                self.probing = false;
            }
            Some(Change::Closed) => {
                prop_assert!(was_open && !is_open);
                self.probing = false;
            }
            None => prop_assert_eq!(was_open, is_open),
        }
        prop_assert!(self.state.until_probe(self.now) <= PROBE_INTERVAL);
        let looks = self.state.next_look().is_some();
        prop_assert!(!looks || (!is_open && self.connecting > 0));
        Ok(())
    }
}

proptest! {
    /// Whatever happens: it opens for a reason and closes by an answer; probes are an interval apart, two while one is
    /// under way.
    #[test]
    fn it_opens_for_a_reason_and_probes_seldom(
        events in prop::collection::vec((event(), 0_u32..1000), 1..300)
    ) {
        let mut model = Model::new();
        for (event, ms) in events {
            model.happens(&event, ms * MS)?;
        }
    }
}
