//! All that a process does about the shared budget, without doing it: when it calls, with what, and what comes of the
//! reply. Pure: `now` is passed in, so that whole clusters are played in no time.
//!
//! There is one call at a time, for all accounts. An account gets one permit at a time: its dispatcher wants one as
//! soon as a flight has a connection, and asks for the next when that is spent.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::lease::{Lease, Standing};
use super::script::{BackedUs, Call, Dealt, Reply, Want};
use super::share::{Leases, Share};

/// A call at least this often: `LATEST` of `lend.lua`.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// After a reply that came too late, and after none.
const AFTER_LATE: Duration = Duration::from_millis(50);
const AFTER_NONE: Duration = Duration::from_millis(10);
/// The same while cut off: a store that refuses connections is not asked for them without end.
const AFTER_MANY: Duration = Duration::from_millis(100);

/// Accounts in one call, at most: a call of so many takes the store a fraction of a millisecond, and the others go
/// next.
const MOST_ACCOUNTS: usize = 64;

/// Who waits for an account's permits, here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// The sum of the weights of the clients that wait, in tenths; the background's is one tenth. 0: nobody waits.
    pub weight: u32,
    /// Flights with a connection that may be used: none, and no permit is wanted.
    pub flights: usize,
    /// More than one flight waits, with a connection or without.
    pub is_queue: bool,
}

/// A permit of the store's: to be spent from `due` on, and not after `latest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its turn in the account's pace.
    pub due: Instant,
    /// A third of the margin later.
    pub latest: Instant,
}

/// An account, by a number within the process.
pub(super) type BorrowerId = u64;

/// What an account is told, where it can look without a lock that all accounts share.
#[derive(Debug)]
pub(super) struct Told {
    /// Notified when there is something for the dispatcher to look at.
    pub(super) news: Notify,
    share: Mutex<Share>,
}

impl Told {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            news: Notify::new(),
            share: Mutex::new(Share::new(1.0, now)),
        }
    }

    /// What part of the limit the account can count on here.
    pub(super) fn share(&self) -> MutexGuard<'_, Share> {
        self.share.lock()
    }
}

#[derive(Debug)]
struct Borrower {
    account: Arc<str>,
    demand: Demand,
    slot: Option<Slot>,
    /// Not asked for before.
    ask_at: Instant,
    /// When queries may go on after upstream's 429, and how: as known here; and whether the store has to be told.
    backed: Option<Backed>,
    is_news: bool,
    told: Arc<Told>,
}

/// What an upstream 429 does to an account's pace, on this process's clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backed {
    /// When the pause ends, or ended.
    pub until: Instant,
    /// Queries a second, of the limit, from then on; it recovers.
    pub rate: f64,
    /// The pause that was chosen where upstream did not say for how long.
    pub chosen: Duration,
}

/// Instants that stand for one and the same on two replicas may differ by a round trip.
const SAME: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(super) struct Process {
    lease: Lease,
    third: Duration,
    /// What a slice is of the limit, and how many there are.
    slice_share: f64,
    replicas: u32,
    borrowers: HashMap<BorrowerId, Borrower>,
    /// Those that want something: of many accounts, most are idle.
    wanting: BTreeSet<BorrowerId>,
    next_borrower: BorrowerId,
    /// Whose call is under way.
    calling: Option<Vec<BorrowerId>>,
    /// When the next one is due, though no account wants anything.
    next_call: Instant,
    alive: u32,
    leases: Leases,
}

impl Process {
    pub(super) fn new(window: Duration, third: Duration, slice_share: f64, replicas: u32, now: Instant) -> Self {
        Self {
            lease: Lease::new(window, third, now),
            third,
            slice_share,
            replicas,
            borrowers: HashMap::new(),
            wanting: BTreeSet::new(),
            next_borrower: 0,
            calling: None,
            next_call: now,
            alive: 0,
            leases: Leases::all(replicas, now),
        }
    }

    /// One more account.
    pub(super) fn open(&mut self, account: Arc<str>, told: Arc<Told>, now: Instant) -> BorrowerId {
        self.next_borrower += 1;
        told.share().pay(self.paid());
        let borrower = Borrower {
            account,
            demand: Demand::default(),
            slot: None,
            ask_at: now,
            backed: None,
            is_news: false,
            told,
        };
        self.borrowers.insert(self.next_borrower, borrower);
        self.next_borrower
    }

    pub(super) fn close(&mut self, borrower: BorrowerId) {
        self.borrowers.remove(&borrower);
        self.wanting.remove(&borrower);
    }

    /// What is wanted from now on; true if there is a call to be made for it.
    pub(super) fn want(&mut self, borrower: BorrowerId, demand: Demand, now: Instant) -> bool {
        let wanted = self.wanting.contains(&borrower);
        self.change(borrower, |borrower| {
            borrower.demand = demand;
            borrower.told.share().waits(demand.weight > 0, now);
        });
        !wanted && self.wanting.contains(&borrower)
    }

    /// Changes an account, and notes whether it wants something.
    fn change(&mut self, id: BorrowerId, change: impl FnOnce(&mut Borrower)) {
        if let Some(borrower) = self.borrowers.get_mut(&id) {
            change(borrower);
            if borrower.wants() {
                self.wanting.insert(id);
            } else {
                self.wanting.remove(&id);
            }
        }
    }

    fn wanting(&self) -> impl Iterator<Item = (BorrowerId, &Borrower)> {
        self.wanting
            .iter()
            .filter_map(|id| Some((*id, self.borrowers.get(id)?)))
    }

    /// The permit that the account holds.
    pub(super) fn slot(&self, borrower: BorrowerId) -> Option<Slot> {
        self.borrowers.get(&borrower)?.slot
    }

    /// It is spent, or dropped because it is late; the next may be asked for.
    pub(super) fn spent(&mut self, borrower: BorrowerId, now: Instant) {
        self.change(borrower, |borrower| {
            borrower.slot = None;
            borrower.ask_at = now;
        });
    }

    /// Whether the process spends its slice.
    pub(super) fn is_alone(&self) -> bool {
        self.lease.is_alone()
    }

    pub(super) fn standing(&self, now: Instant) -> Standing {
        self.lease.standing(now)
    }

    /// Processes that lend, as the store said last; 0 while it says nothing.
    pub(super) fn alive(&self) -> u32 {
        if self.lease.is_cut_off() { 0 } else { self.alive }
    }

    /// What upstream's 429 did to the account, wherever it was heard.
    pub(super) fn backed(&self, borrower: BorrowerId) -> Option<Backed> {
        self.borrowers.get(&borrower)?.backed
    }

    /// Upstream said 429 here.
    pub(super) fn back_off(&mut self, borrower: BorrowerId, backed: Backed, now: Instant) {
        self.change(borrower, |borrower| {
            borrower.backed = Some(backed);
            borrower.is_news = true;
            borrower.ask_at = now;
        });
    }

    /// Whoever made the calls was interrupted.
    pub(super) fn resume(&mut self, now: Instant) {
        if self.calling.is_some() {
            self.missed(now);
        }
    }

    /// Told to stop.
    pub(super) fn leave(&mut self, now: Instant) {
        self.lease.leave(now);
        self.tell_all(now);
    }

    /// What part of the limit is paid out to all replicas together; or spent here, alone.
    fn paid(&self) -> f64 {
        if self.lease.is_alone() {
            self.slice_share
        } else {
            1.0 - self.slice_share * f64::from(self.replicas.saturating_sub(self.leases.counted()))
        }
    }

    /// The store has forgotten what upstream said: where a pause is still to come it has to be told, though nobody
    /// waits here.
    fn tell_pauses(&mut self, now: Instant) {
        for (id, borrower) in &mut self.borrowers {
            if borrower.backed.is_some_and(|backed| backed.until > now) {
                borrower.is_news = true;
                self.wanting.insert(*id);
            }
        }
    }

    fn tell_all(&self, now: Instant) {
        let paid = self.paid();
        for borrower in self.borrowers.values() {
            if self.lease.is_alone() {
                // What others want is nothing to this process.
                *borrower.told.share() = Share::new(paid, now);
            } else {
                borrower.told.share().pay(paid);
            }
            borrower.told.news.notify_one();
        }
    }

    /// The call that is due at `now`, if none is under way.
    pub(super) fn call(&mut self, now: Instant) -> Option<Call> {
        if self.calling.is_some() || self.due(now) > now {
            return None;
        }
        let mut call = self.lease.call(now);
        let mut callers = Vec::new();
        if call.named.is_some() {
            let mut wanting: Vec<_> = self.wanting().filter(|(_, borrower)| borrower.ask_at <= now).collect();
            // Who has waited longest goes first, where they are too many for one call.
            wanting.sort_by_key(|(id, borrower)| (borrower.ask_at, *id));
            for (id, borrower) in wanting.into_iter().take(MOST_ACCOUNTS) {
                call.wants.push(borrower.want(now));
                callers.push(id);
            }
        }
        self.calling = Some(callers);
        Some(call)
    }

    /// When the next call is due, if none is under way.
    fn due(&self, now: Instant) -> Instant {
        if !self.lease.lends(now) {
            return self.next_call;
        }
        let wanting = self.wanting().map(|(_, borrower)| borrower.ask_at);
        wanting.chain([self.next_call]).min().unwrap_or(now)
    }

    /// Does what is due at `now`; gives when to look again.
    pub(super) fn look(&mut self, now: Instant) -> Option<Instant> {
        let was_alone = self.lease.is_alone();
        let home = self.lease.look(now);
        if self.lease.is_alone() != was_alone {
            self.tell_all(now);
        }
        let call = self.calling.is_none().then(|| self.due(now));
        home.into_iter().chain(call).min()
    }

    /// No reply in time, or none that can be read.
    pub(super) fn missed(&mut self, now: Instant) {
        self.lease.missed();
        let pause = if self.lease.is_cut_off() {
            AFTER_MANY
        } else {
            AFTER_NONE
        };
        self.after_miss(now + pause);
    }

    fn after_miss(&mut self, next: Instant) {
        self.next_call = next;
        for id in self.calling.take().unwrap_or_default() {
            self.change(id, |borrower| borrower.ask_at = next);
        }
    }

    /// The reply to the call under way, which was `sent` at this instant; false if it took too long to be one.
    pub(super) fn heard(&mut self, sent: Instant, received: Instant, reply: &Reply) -> bool {
        let was_alone = self.lease.is_alone();
        let is_forgetful = !self.lease.is_of(&reply.generation);
        let Some(counts) = self.lease.heard(sent, received, &reply.generation, reply.time) else {
            self.after_miss(received + AFTER_LATE);
            return false;
        };
        if is_forgetful {
            self.tell_pauses(received);
        }
        self.alive = reply.alive;
        let changes = self.leases.told(reply.alive, self.lease.lends(received), received);
        let callers = self.calling.take().unwrap_or_default();
        // Dealt one by one, or not at all.
        let has_all = callers.len() == reply.dealt.len();
        let third = self.third;
        for (place, id) in callers.into_iter().enumerate() {
            self.change(id, |borrower| match reply.dealt.get(place).filter(|_| has_all) {
                Some(dealt) => borrower.deal(dealt, counts, sent, received, third),
                None => borrower.ask_at = received + AFTER_NONE,
            });
        }
        let quiet = self.lease.quiet();
        self.next_call = if quiet > received {
            quiet.min(received + HEARTBEAT)
        } else {
            received + HEARTBEAT
        };
        if changes || self.lease.is_alone() != was_alone {
            self.tell_all(received);
        }
        true
    }
}

impl Borrower {
    fn wants(&self) -> bool {
        self.is_news || (self.slot.is_none() && self.demand.flights > 0)
    }

    fn want(&self, now: Instant) -> Want {
        let backed = self.backed.filter(|_| self.is_news).map(|backed| BackedUs {
            left_us: micros(backed.until.saturating_duration_since(now)),
            rate: backed.rate,
            chosen_us: u64::try_from(backed.chosen.as_micros()).unwrap_or(u64::MAX),
        });
        Want {
            account: self.account.to_string(),
            weight: self.demand.weight,
            // One permit at a time; news goes at once.
            flights: if self.slot.is_none() { self.demand.flights } else { 0 },
            is_queue: self.demand.is_queue,
            backed,
        }
    }

    fn deal(&mut self, dealt: &Dealt, counts: bool, sent: Instant, received: Instant, third: Duration) {
        if let Some(part) = dealt.part {
            self.told.share().told(part, received);
        }
        self.is_news = false;
        self.learn(dealt.backed, received);
        self.ask_at = received + dealt.again.unwrap_or_default().min(HEARTBEAT);
        // One that is not wanted any more is as good as dropped: its slot passes.
        if let Some(slot) = dealt.slot.filter(|_| counts && self.demand.flights > 0) {
            self.slot = Some(Slot {
                due: received + slot,
                latest: sent + slot + third,
            });
            self.told.news.notify_one();
        }
    }

    /// Takes over what the store knows of upstream's last 429, or keeps what it has to be told.
    fn learn(&mut self, backed: Option<BackedUs>, received: Instant) {
        let heard = backed.and_then(|backed| {
            let span = Duration::from_micros(backed.left_us.unsigned_abs());
            let until = if backed.left_us < 0 {
                received.checked_sub(span)?
            } else {
                received + span
            };
            Some(Backed {
                until,
                rate: backed.rate,
                chosen: Duration::from_micros(backed.chosen_us),
            })
        });
        match (heard, self.backed) {
            (Some(heard), known) if known.is_none_or(|known| heard.until > known.until + SAME) => {
                self.backed = Some(heard);
                self.told.news.notify_one();
            }
            // It has forgotten, or never knew.
            (heard, Some(known)) if heard.is_none_or(|heard| known.until > heard.until + SAME) => {
                self.is_news = known.until > received;
            }
            _ => {}
        }
    }
}

fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A process with one account that has waited for 3 s, and what it calls then.
    fn waiting() -> (Process, BorrowerId, Call, Instant, impl Fn(u64) -> Duration) {
        let start = Instant::now();
        let mut process = Process::new(ms(1030), ms(10), 1.0 / 3.0, 3, start);
        let borrower = process.open("music".into(), Arc::new(Told::new(start)), start);
        let demand = Demand {
            weight: 10,
            flights: 3,
            is_queue: true,
        };
        process.want(borrower, demand, start);
        let mut now = start;
        loop {
            now = process.look(now).unwrap().max(now);
            let call = process.call(now).unwrap();
            if now >= start + ms(3000) {
                return (process, borrower, call, now, move |after| now - start + ms(after));
            }
            let dealt = call.wants.iter().map(|_| dealt(None)).collect();
            process.heard(now, now + ms(1), &reply("a", now - start, dealt));
        }
    }

    fn dealt(slot: Option<Duration>) -> Dealt {
        Dealt {
            slot,
            again: slot.is_none().then_some(ms(50)),
            part: Some(1.0),
            backed: None,
        }
    }

    fn reply(generation: &str, time: Duration, dealt: Vec<Dealt>) -> Reply {
        Reply {
            generation: generation.to_owned(),
            time: 1_000_000 + u64::try_from(time.as_micros()).unwrap(),
            alive: 3,
            dealt,
        }
    }

    #[test]
    fn a_permit_is_for_its_slot_and_a_third_of_the_margin_after_it_and_the_next_is_asked_for_when_it_is_spent() {
        let (mut process, borrower, call, sent, at) = waiting();
        assert_eq!(call.wants.len(), 1);
        let received = sent + ms(4);
        process.heard(sent, received, &reply("a", at(1), vec![dealt(Some(ms(60)))]));
        let slot = process.slot(borrower).unwrap();
        assert_eq!((slot.due, slot.latest), (received + ms(60), sent + ms(70)));
        assert_eq!(process.look(received), Some(received + HEARTBEAT));
        process.spent(borrower, slot.due);
        assert_eq!(process.look(slot.due), Some(slot.due));
        assert_eq!(process.call(slot.due).unwrap().wants.len(), 1);
    }

    #[test]
    fn a_permit_of_a_reply_that_is_odd_late_or_not_wanted_any_more_is_dropped() {
        let granted = || vec![dealt(Some(ms(60)))];
        let (mut process, borrower, _, sent, at) = waiting();
        process.heard(sent, sent + ms(1), &reply("a", at(1), granted()));
        assert!(process.slot(borrower).is_some(), "or else it counts");
        let (mut process, borrower, _, sent, at) = waiting();
        process.heard(sent, sent + ms(1), &reply("b", at(1), granted()));
        assert_eq!(process.slot(borrower), None, "a new generation");
        let (mut process, borrower, _, sent, at) = waiting();
        assert!(!process.heard(sent, sent + ms(11), &reply("a", at(1), granted())));
        assert_eq!(process.slot(borrower), None, "too late");
        let (mut process, borrower, _, sent, at) = waiting();
        process.want(borrower, Demand::default(), sent);
        process.heard(sent, sent + ms(1), &reply("a", at(1), granted()));
        assert_eq!(process.slot(borrower), None, "nobody waits");
    }

    #[test]
    fn what_upstream_said_here_is_told_though_a_permit_is_outstanding() {
        let (mut process, borrower, _, sent, at) = waiting();
        process.heard(sent, sent + ms(1), &reply("a", at(1), vec![dealt(Some(ms(60)))]));
        let backed = Backed {
            until: sent + ms(1002),
            rate: 7.5,
            chosen: ms(1000),
        };
        process.back_off(borrower, backed, sent + ms(2));
        let call = process.call(sent + ms(2)).unwrap();
        let told = (call.wants[0].flights, call.wants[0].backed.unwrap().left_us);
        assert_eq!(told, (0, 1_000_000), "and no second permit asked for");
        // Once told it is told no more.
        process.heard(
            sent + ms(2),
            sent + ms(3),
            &reply(
                "a",
                at(3),
                vec![Dealt {
                    backed: call.wants[0].backed,
                    ..dealt(None)
                }],
            ),
        );
        assert_eq!(process.look(sent + ms(3)), Some(sent + ms(3) + HEARTBEAT));
    }

    #[test]
    fn what_another_replica_heard_is_taken_over_and_not_told_back() {
        let (mut process, borrower, _, sent, at) = waiting();
        let backed = BackedUs {
            left_us: 500_000,
            rate: 7.5,
            chosen_us: 1_000_000,
        };
        let refused = || Dealt {
            backed: Some(backed),
            ..dealt(None)
        };
        process.heard(sent, sent + ms(1), &reply("a", at(1), vec![refused()]));
        let backed = process.backed(borrower).unwrap();
        assert_eq!((backed.until, backed.rate), (sent + ms(501), 7.5));
        let call = process.call(sent + ms(51)).unwrap();
        assert_eq!(call.wants[0].backed, None);
    }

    #[test]
    fn a_store_that_has_forgotten_a_pause_is_told_of_it_though_nobody_waits() {
        let (mut process, borrower, mut call, mut now, at) = waiting();
        let (sent, until) = (now, now + ms(40_000));
        let backed = Backed {
            until,
            rate: 7.5,
            chosen: ms(1000),
        };
        process.back_off(borrower, backed, sent);
        let known = BackedUs {
            left_us: 39_999_000,
            rate: 7.5,
            chosen_us: 1_000_000,
        };
        let dealt = Dealt {
            backed: Some(known),
            ..dealt(None)
        };
        process.heard(sent, sent + ms(1), &reply("a", at(1), vec![dealt]));
        process.want(borrower, Demand::default(), sent + ms(1));
        while call.wants.is_empty() || now == sent {
            assert!(now < sent + ms(3000), "it is not told");
            now = process.look(now).unwrap().max(now);
            call = process.call(now).unwrap();
            process.heard(now, now + ms(1), &reply("b", now - sent + at(1), vec![]));
        }
        let told = call.wants[0].backed.unwrap();
        assert_eq!((told.left_us, call.wants[0].flights), (micros(until - now), 0));
    }

    /// The store has forgotten; once the wait is over this process lends again, and no other does.
    #[test]
    fn what_others_are_about_to_lend_again_is_counted_on_and_what_they_do_not_is_not() {
        let (mut process, borrower, mut call, sent, at) = waiting();
        let told = Arc::clone(&process.borrowers[&borrower].told);
        let (mut now, mut lends_since) = (sent, None);
        let mut shares = Vec::new();
        while lends_since.is_none_or(|since| now < since + ms(2500)) {
            let dealt = call.wants.iter().map(|_| dealt(None)).collect();
            let of_others = reply("b", now - sent + at(1), dealt);
            let alive = u32::from(call.lends);
            process.heard(now, now + ms(1), &Reply { alive, ..of_others });
            if call.lends && now > sent {
                let since = *lends_since.get_or_insert(now);
                shares.push((now - since, told.share().of_limit(now + ms(1))));
            }
            now = process.look(now).unwrap().max(now + ms(1));
            call = process.call(now).unwrap();
        }
        for (lent, share) in shares {
            let expected = if lent < ms(1700) { 1.0 } else { 1.0 / 3.0 };
            let is_near = (share - expected).abs() < 1e-9;
            assert!(
                is_near || (ms(1700)..ms(2100)).contains(&lent),
                "{share} after {lent:?}"
            );
        }
    }
}
