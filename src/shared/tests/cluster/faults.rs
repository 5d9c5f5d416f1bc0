//! What can go wrong between replicas and store, when it begins, and when it ends.

use super::{Cluster, Event, Link, State};

/// Which way a fault of a link works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Way {
    Both,
    Up,
    Down,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in super::super) enum Kind {
    Cut(Way),
    /// Held back, then all at once.
    Hold(Way),
    Drop(Way, f64),
    Delay(Way, f64),
    /// The store is killed and back, empty or from a file.
    Kill {
        is_empty: bool,
    },
    Flush,
    Freeze,
    Refuse,
    Step(f64),
    /// Another server goes on from an older copy, on a clock of its own.
    FailOver(f64),
    Pause,
    Crash,
    /// All replicas end and start, one after the other.
    Roll,
    /// Told to stop, while the successor runs already.
    Drain,
}

#[derive(Clone, Debug)]
pub(in super::super) struct Fault {
    pub(in super::super) kind: Kind,
    pub(in super::super) at: f64,
    pub(in super::super) lasts: f64,
    /// The replicas whose links or processes it strikes, as bits.
    pub(in super::super) who: u32,
}

pub(super) fn touches(fault: Option<Way>, way: Way) -> bool {
    fault.is_some_and(|fault| fault == Way::Both || fault == way)
}

impl Cluster {
    fn strikes(&self, fault: &Fault) -> Vec<usize> {
        let struck = (0..self.replicas).filter(|replica| fault.who & (1 << replica) != 0);
        let struck: Vec<_> = struck.collect();
        if struck.is_empty() { vec![0] } else { struck }
    }

    pub(super) fn begin(&mut self, fault: &Fault) {
        let struck = self.strikes(fault);
        let links = |cluster: &mut Self, set: &dyn Fn(&mut Link)| {
            for replica in &struck {
                set(&mut cluster.links[*replica]);
            }
        };
        match fault.kind {
            Kind::Cut(way) => links(self, &|link| link.cut = Some(way)),
            Kind::Hold(way) => links(self, &|link| link.hold = Some(way)),
            Kind::Drop(way, part) => links(self, &|link| link.drop = Some((way, part))),
            Kind::Delay(way, most) => links(self, &|link| link.delay = Some((way, most))),
            Kind::Kill { .. } => {
                self.is_up = false;
                self.saved.clone_from(&self.snapshot);
            }
            Kind::Flush => self.state = None,
            Kind::Freeze => self.backlog = Some(self.backlog.take().unwrap_or_default()),
            Kind::Refuse => self.refuses = true,
            Kind::Step(by) => self.clock += by,
            Kind::FailOver(by) => {
                self.clock += by;
                self.restart(self.snapshot.clone());
            }
            Kind::Pause => {
                let until = self.now + fault.lasts;
                let proc = &mut self.procs[self.running[struck[0]]];
                proc.paused_until = proc.paused_until.max(until);
            }
            Kind::Crash => self.procs[self.running[struck[0]]].is_dead = true,
            Kind::Roll => {
                for replica in 0..self.replicas {
                    let at = self.now + fault.lasts * replica as f64 / self.replicas as f64;
                    self.at(at, Event::Start(replica));
                }
            }
            Kind::Drain => {
                let number = self.running[struck[0]];
                let now = self.local(number);
                self.procs[number].process.leave(now);
                self.start(struck[0]);
            }
        }
    }

    fn restart(&mut self, state: Option<State>) {
        self.is_up = true;
        self.run += 1;
        self.backlog = None;
        self.state = state;
    }

    pub(super) fn end(&mut self, fault: &Fault) {
        let struck = self.strikes(fault);
        match fault.kind {
            Kind::Cut(_) => struck.iter().for_each(|replica| self.links[*replica].cut = None),
            Kind::Drop(..) => struck.iter().for_each(|replica| self.links[*replica].drop = None),
            Kind::Delay(..) => struck.iter().for_each(|replica| self.links[*replica].delay = None),
            Kind::Hold(_) => {
                for replica in struck {
                    self.links[replica].hold = None;
                    for event in std::mem::take(&mut self.links[replica].held) {
                        let takes = self.unit() * 0.002;
                        self.at(self.now + takes, event);
                    }
                }
            }
            Kind::Kill { is_empty } => {
                let saved = self.saved.take().filter(|_| !is_empty);
                self.restart(saved);
            }
            Kind::Freeze => {
                for event in self.backlog.take().unwrap_or_default() {
                    self.answer(event);
                }
            }
            Kind::Refuse => self.refuses = false,
            // In the place of whoever another fault has started meanwhile.
            Kind::Crash => self.happen(Event::Start(struck[0])),
            // Whoever was told to stop ends.
            Kind::Drain => {
                let last = self.running[struck[0]];
                let of = struck[0];
                let old = self.procs.iter_mut().enumerate();
                old.filter(|(number, proc)| proc.replica == of && *number != last)
                    .for_each(|(_, proc)| proc.is_dead = true);
            }
            Kind::Flush | Kind::Step(_) | Kind::FailOver(_) | Kind::Pause | Kind::Roll => {}
        }
    }
}
