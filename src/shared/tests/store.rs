//! The store as a model: what `lend.lua` does, on a clock that is passed in. A test holds the two to each other.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::script::{BackedUs, Call, Constants, Dealt, Reply, Want};

const LEASE: f64 = 1e6;
const STEP: f64 = 5e3;
const AHEAD: f64 = 1e5;
const WANTS: f64 = 1.5e5;
const TURN: f64 = 2.5e4;
const LATEST: f64 = 2.5e5;

/// The hash; times in µs.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) run: String,
    pub(super) generation: String,
    last: f64,
    leases: BTreeMap<String, f64>,
    accounts: BTreeMap<String, Account>,
}

#[derive(Clone, Debug, Default)]
struct Account {
    next: f64,
    virtual_time: f64,
    wants: BTreeMap<String, Wants>,
    paused: f64,
    rate: f64,
    chosen: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Wants {
    served: f64,
    weight: f64,
    until: f64,
    waits_until: f64,
}

/// Answers a call that arrives when the store's clock shows `now`, in whole µs. `generation` names a new one.
pub(super) fn lend(
    state: &mut Option<State>,
    run: &str,
    now: f64,
    call: &Call,
    constants: &Constants,
    generation: impl FnOnce() -> String,
) -> Reply {
    if state
        .as_ref()
        .is_none_or(|state| state.run != run || state.last > now + STEP)
    {
        *state = Some(State {
            run: run.to_owned(),
            generation: generation(),
            last: now,
            leases: BTreeMap::new(),
            accounts: BTreeMap::new(),
        });
    }
    let state = state.as_mut().unwrap();
    state.last = state.last.max(now);
    let mut reply = Reply {
        generation: state.generation.clone(),
        time: now as u64,
        alive: state.alive(now),
        dealt: Vec::new(),
    };
    let Some(named) = call.named.filter(|_| call.generation == state.generation) else {
        return reply;
    };
    let ends = named as f64 + LEASE;
    if call.lends {
        let lease = state.leases.entry(constants.who.clone()).or_insert(ends);
        *lease = lease.max(ends);
    }
    state.leases.retain(|_, ends| *ends >= now - LEASE);
    reply.alive = state.alive(now);
    if ends <= now {
        return reply;
    }
    for want in &call.wants {
        let mut account = state.accounts.remove(&want.account).unwrap_or_default();
        account.hear(want.backed, now);
        let slot = account.next.max(now);
        let (limit, replicas) = (f64::from(constants.limit), f64::from(constants.replicas));
        let missing = (replicas - f64::from(state.alive(slot))).max(0.0);
        let pay = limit - f64::from(constants.limit / constants.replicas) * missing;
        let weight = f64::from(want.weight.max(1));
        let mut dealt = (None, None);
        let mut part = None;
        if want.flights > 0 {
            let others = || account.wants.iter().filter(|(who, _)| **who != constants.who);
            let at_others = others().filter(|(_, want)| want.waits_until > now);
            let weights = weight + at_others.map(|(_, want)| want.weight).sum::<f64>();
            part = Some((1e6 * weight / weights).round_ties_even() / 1e6);
            let wanting = others().filter(|(_, want)| want.until > now);
            let floor = wanting.map(|(_, want)| want.served).min_by(f64::total_cmp);
            let mut mine = account.wants.get(&constants.who).copied().unwrap_or_default();
            let time = account.virtual_time.max(floor.unwrap_or(0.0));
            if mine.until <= now {
                mine.served = mine.served.max(time);
            }
            mine.served = mine.served.min(time + 1.0 / weight);
            (mine.weight, mine.until, mine.waits_until) = (weight, now + WANTS, now + WANTS);
            account.wants.insert(constants.who.clone(), mine);
            let all = account.virtual_time.max(floor.unwrap_or(0.0).min(mine.served));
            account
                .wants
                .retain(|_, want| want.waits_until > now || want.served > all);
            if account.paused > now {
                dealt.1 = Some((account.paused - now).min(LATEST));
            } else if slot - now > AHEAD {
                dealt.1 = Some((slot - now - AHEAD / 2.0).min(LATEST));
            } else if floor.is_some_and(|floor| mine.served > floor) {
                dealt.1 = Some(TURN);
            } else if pay <= 0.0 {
                dealt.1 = Some(50e3);
            } else {
                let recovered = account.rate + (slot - account.paused) / 1e6 * limit / 30.0;
                let rate = if account.paused > 0.0 { recovered } else { limit };
                account.next = slot + constants.window.as_micros() as f64 / pay.min(rate);
                account.virtual_time = account.virtual_time.max(mine.served);
                mine.served += 1.0 / weight;
                mine.spends(want, now, slot, account.next);
                dealt.0 = Some(slot - now);
            }
            mine.comes_again(now, dealt.1);
            account.wants.insert(constants.who.clone(), mine);
        }
        let micros = |micros: f64| Duration::from_micros(micros.round_ties_even() as u64);
        reply.dealt.push(Dealt {
            slot: dealt.0.map(micros),
            again: dealt.1.map(micros),
            part,
            backed: (account.paused > 0.0).then(|| BackedUs {
                left_us: (account.paused - now).round_ties_even() as i64,
                rate: account.rate,
                chosen_us: account.chosen as u64,
            }),
        });
        state.accounts.insert(want.account.clone(), account);
    }
    reply
}

impl Wants {
    /// It is granted this slot.
    fn spends(&mut self, want: &Want, now: f64, slot: f64, next: f64) {
        (self.until, self.waits_until) = (now, now);
        if want.is_queue {
            self.until = slot
                + if want.flights > 1 {
                    WANTS
                } else {
                    WANTS.min(next - slot)
                };
            self.waits_until = slot + WANTS;
        }
    }

    fn comes_again(&mut self, now: f64, again: Option<f64>) {
        if let Some(again) = again {
            self.until = self.until.max(now + again + AHEAD / 2.0);
            self.waits_until = self.until;
        }
    }
}

impl Account {
    fn hear(&mut self, backed: Option<BackedUs>, now: f64) {
        if let Some(backed) = backed
            && backed.left_us > 0
            && now + backed.left_us as f64 > self.paused
        {
            self.paused = now + backed.left_us as f64;
            self.rate = backed.rate;
            self.chosen = backed.chosen_us as f64;
        }
    }
}

impl State {
    fn alive(&self, at: f64) -> u32 {
        u32::try_from(self.leases.values().filter(|ends| **ends > at).count()).unwrap()
    }
}
