//! Answers and flights that replicas share: what one has fetched is there for all, and one asks for all.
//!
//! What is kept is sealed before it comes here, and opened and judged by whoever asked; here it is bytes with a label
//! that says how far the task has come and when upstream was asked and heard. In the store, every key with a time to
//! live:
//! - `answer:…`, the label and the sealed answer. Of two that cross, the one of the later stage stays, and of one stage
//!   the one that was asked for later; so a fetch that outlives its claim takes nothing back. Beyond `shared.max_bytes`
//!   of memory in use nothing is written, and answers that nobody reads make room.
//! - `flight:…`, the claim of the process that fetches it: 2 s, renewed every 500 ms in one call for all claims of a
//!   process. Whoever dies or stands still renews nothing, so another takes over. A claim only ever saves queries: each
//!   is paid for all the same, so a store that forgets claims, or tells of them late, costs queries and never breaks a
//!   limit.
//!
//! A flight looks once before it queues, and claims when its turn has come (`look.lua`, one round trip each): were the
//! claim taken before the queue, a greedy client's flights in one replica's queue would hold up a modest client of
//! another. It ends with the script that keeps the answer, or alone where there is none to keep: where upstream was
//! asked in vain, by whatever may not be kept, those who waited ask at the same time then, since one after the other
//! the last would wait for as many answers as there are replicas. Those who wait for another's claim are found out by
//! one MGET every 50 ms, whatever their number: no subscription that can be lost unnoticed, no second connection, and a
//! mean of 25 ms beside what upstream takes.
//!
//! Times are the store's own: each reply tells it, so the processes' wall clocks need not agree.
//!
//! Nobody waits longer than 40 ms for an answer that may be there; a flight whose turn has come, and that needs a
//! permit as things stand, waits for its claim as long as a call may take. The store is away when a call fails, be it
//! refused, full or read-only, or has no reply within `shared.timeout`, or when for a second none was quick enough to
//! wait for. Until a key can be written in time again nobody calls it, and each replica asks upstream for itself. Calls
//! have a connection of their own: those by which the budget is shared stay quick. And they have tasks of their own, so
//! that whoever leaves cancels none: the reply is seen for how long it took, a claim that comes too late is given back,
//! and no reply is ever left to the next call.

mod claims;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use redis::aio::MultiplexedConnection;
use redis::{RedisResult, Script, ScriptInvocation, from_redis_value};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::connect::{Connection, Dialer};
use crate::config::Config;
use crate::metrics::{Metrics, SharedCacheMetrics, SharedWrite};
use crate::moment::{Moment, millis};
use crate::panics::supervise;
use claims::Claims;

const LOOK_LUA: &str = include_str!("cache/look.lua");
const PUBLISH_LUA: &str = include_str!("cache/publish.lua");
const RENEW_LUA: &str = include_str!("cache/renew.lua");

/// How long a poll waits for an answer that may be there: with it none that needs no permit is answered 50 ms later
/// than without a store.
const PATIENCE: Duration = Duration::from_millis(40);

/// Slower than that for so long: the store is away.
const LATE: Duration = Duration::from_secs(1);

/// How soon after the store went away it is looked for again; later each time that it does not stay, so that a store
/// which is just too slow is away rather than in the way.
const RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(4);
/// What counts as having stayed.
const STEADY: Duration = Duration::from_secs(5);

/// How long a claim holds, how often it is renewed, and how often it is looked whether another's is over.
const CLAIM: Duration = Duration::from_secs(2);
const RENEW: Duration = Duration::from_millis(500);
const WATCH: Duration = Duration::from_millis(50);

/// How long after an answer that could not be shared each replica fetches it for itself: those who waited have had
/// their turn by then, unless there is a queue.
const EACH: Duration = Duration::from_secs(1);
/// Then it stands where the claim was.
const EACH_OWN: &[u8] = b"each";

/// Claims in one call: some 25 KB.
const BATCH: usize = 256;

/// The largest answer that is shared, sealed: at 1 Gbit/s it holds up the calls behind it for 2 ms.
const LARGEST: usize = 256 << 10;

/// Answers on their way to the store: with [`LARGEST`] at most 32 MiB, usually some hundred KB.
const MOST_WRITES: usize = 128;

/// As much of a value as tells it from every other: the label, and what is random in what follows.
const STAMP: usize = 80;

/// This process's part in what replicas share beside the budget. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SharedCache(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The process, by a random number per start.
    who: String,
    prefix: String,
    max_bytes: u64,
    /// A call without a reply for so long is given up.
    timeout: Duration,
    look: Script,
    publish: Script,
    renew: Script,
    /// `None` while the store is away.
    line: Mutex<Option<Arc<Line>>>,
    clock: Mutex<Option<Moment>>,
    claims: Claims,
    next_claim: AtomicU64,
    writes: Arc<Semaphore>,
    metrics: SharedCacheMetrics,
}

/// A connection that answers in time.
#[derive(Debug)]
struct Line {
    calls: MultiplexedConnection,
    /// Since when no reply has come within [`PATIENCE`].
    late_since: Mutex<Option<Instant>>,
    /// It is used no longer.
    failed: CancellationToken,
    /// Why.
    why: Mutex<String>,
}

impl Line {
    /// How long replies have been late by now, where one has come to a call begun then.
    fn late_for(&self, begun: Instant) -> Duration {
        let mut since = self.late_since.lock();
        if begun.elapsed() <= PATIENCE {
            *since = None;
            return Duration::ZERO;
        }
        since.get_or_insert(begun).elapsed()
    }
}

/// What is said of an answer beside it, in the clear: the store orders answers by it. Whoever opens an answer checks
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// How far the task has come, in upstream's order; 0 is not found.
    pub stage: u8,
    /// Whether it is fresh for as long as its account's live answers are, rather than for as long as it is kept.
    pub live: bool,
    /// When upstream was asked, on the store's clock, in ms since 1970.
    pub asked_ms: u64,
    /// When it had answered.
    pub received_ms: u64,
}

impl Label {
    /// As it stands before the sealed answer.
    pub fn text(&self) -> String {
        let Self {
            stage,
            live,
            asked_ms,
            received_ms,
        } = self;
        format!("{stage} {} {asked_ms} {received_ms} ", u8::from(*live))
    }
}

/// What an answer has to be to be of use.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// How old at most, if it is live.
    pub fresh: Duration,
    /// Asked for after this, if there is one already; that a task has ended is news whenever it was asked for.
    pub after: Option<Instant>,
}

/// What stands in the store for a task.
#[derive(Debug)]
pub struct Found {
    value: Vec<u8>,
    sealed_at: usize,
    /// The store's clock when it was read.
    pub clock: Moment,
}

impl Found {
    fn new(value: Vec<u8>, clock: Moment) -> Self {
        let spaces = value.iter().enumerate().filter(|(_, byte)| **byte == b' ');
        let sealed_at = spaces.map(|(at, _)| at + 1).nth(3).unwrap_or(0);
        Self {
            value,
            sealed_at,
            clock,
        }
    }

    /// What is said of it, as it stands there.
    pub fn label(&self) -> &[u8] {
        self.value.get(..self.sealed_at).unwrap_or_default()
    }

    /// The answer.
    pub fn sealed(&self) -> &[u8] {
        self.value.get(self.sealed_at..).unwrap_or_default()
    }

    fn stamp(&self) -> &[u8] {
        self.value.get(..STAMP).unwrap_or(&self.value)
    }
}

/// Whose flight it is.
#[derive(Debug)]
pub enum Whose {
    /// Nobody's: an answer stands there that will do.
    Nobodys,
    /// Ours, until the claim is dropped or its answer is published.
    Ours(Claim),
    /// Another replica's.
    Theirs,
    /// Each replica's own: what was fetched for all just now could not be shared.
    Each,
}

/// The right to fetch an answer for all replicas. Dropping it gives it back.
#[derive(Debug)]
pub struct Claim {
    cache: SharedCache,
    place: u128,
    name: Arc<str>,
    asks: bool,
}

impl Claim {
    /// Upstream is asked now: if the claim is given back all the same, there was nothing to share, and each is to ask
    /// for itself.
    pub fn asks(&mut self) {
        self.asks = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Self {
            cache,
            place,
            name,
            asks,
        } = self;
        let each = if *asks { EACH } else { Duration::ZERO };
        // Published, or the runtime is ending: then it ends by itself.
        if let (true, Ok(runtime)) = (cache.0.claims.end(*place, name), tokio::runtime::Handle::try_current()) {
            let (cache, place, name) = (cache.clone(), *place, Arc::clone(name));
            runtime.spawn(async move { cache.0.land(place, &name, b"", Duration::ZERO, each).await });
        }
    }
}

impl SharedCache {
    /// Starts to take part, as `config` says; `None` where it names no store, or lets it hold no answers. A store that
    /// is away is no error.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(config: &Config, metrics: &Arc<Metrics>) -> anyhow::Result<Option<Self>> {
        let store = config.shared.as_ref().and_then(|shared| shared.store.as_ref());
        let Some(store) = store.filter(|store| store.max_bytes > 0) else {
            return Ok(None);
        };
        let dialer = Dialer::new(store)?;
        let inner = Arc::new(Inner {
            who: super::random_name(),
            prefix: dialer.prefix().to_owned(),
            max_bytes: store.max_bytes,
            timeout: dialer.timeout(),
            look: Script::new(LOOK_LUA),
            publish: Script::new(PUBLISH_LUA),
            renew: Script::new(RENEW_LUA),
            line: Mutex::default(),
            clock: Mutex::default(),
            claims: Claims::default(),
            next_claim: AtomicU64::new(0),
            writes: Arc::new(Semaphore::new(MOST_WRITES)),
            metrics: metrics.shared_cache()?,
        });
        let taking_part = Arc::clone(&inner);
        let keep_up = async move || taking_part.keep_up(&dialer).await;
        tokio::spawn(supervise("shared answers", keep_up));
        Ok(Some(Self(inner)))
    }

    /// What is counted of it.
    pub fn metrics(&self) -> &SharedCacheMetrics {
        &self.0.metrics
    }

    /// What the names of its keys begin with: what is sealed is bound to it.
    pub fn prefix(&self) -> &str {
        &self.0.prefix
    }

    /// What stands at `place`. `Err` without a reply in 40 ms; at once while the store is away.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// [`Away`].
    pub async fn look(&self, place: u128, wanted: Wanted) -> Result<Option<Found>, Away> {
        let looking = self.ask("look", None, place, wanted, Vec::new());
        let looked = timeout(PATIENCE, looking).await.map_err(|_| Away)??;
        Ok(looked.0)
    }

    /// What stands at `place`, and whose the flight is; asked a second time, with what came `before`, whatever stands
    /// there will not do, and what was `doubtful` is removed. `Err` without a reply in `shared.timeout`.
    ///
    /// Cancel safe: a claim whose reply comes later is given back.
    ///
    /// # Errors
    /// [`Away`].
    pub async fn claim(
        &self,
        place: u128,
        wanted: Wanted,
        before: Option<Whose>,
        doubtful: Option<&Found>,
    ) -> Result<(Option<Found>, Whose), Away> {
        let how = if before.is_some() { "insist" } else { "claim" };
        let claim = match before {
            Some(Whose::Ours(claim)) => claim,
            Some(Whose::Theirs | Whose::Nobodys | Whose::Each) | None => {
                let number = self.0.next_claim.fetch_add(1, Ordering::Relaxed);
                Claim {
                    cache: self.clone(),
                    place,
                    name: format!("{}:{number}", self.0.who).into(),
                    asks: false,
                }
            }
        };
        let doubtful = doubtful.map(Found::stamp).unwrap_or_default().to_vec();
        self.ask(how, Some(claim), place, wanted, doubtful).await
    }

    /// Calls `look.lua`, in a task of its own.
    async fn ask(
        &self,
        how: &'static str,
        claim: Option<Claim>,
        place: u128,
        wanted: Wanted,
        doubtful: Vec<u8>,
    ) -> Result<(Option<Found>, Whose), Away> {
        let line = self.0.line().ok_or(Away)?;
        let inner = Arc::clone(&self.0);
        let asking = tokio::spawn(async move {
            let who = claim.as_ref().map(|claim| &*claim.name).unwrap_or_default();
            let (found, whose) = inner.ask(&line, place, how, who, wanted, &doubtful).await?;
            let whose = match (whose.as_str(), claim) {
                ("ours", Some(claim)) => {
                    inner.claims.hold(place, &claim.name);
                    Whose::Ours(claim)
                }
                ("theirs", _) => Whose::Theirs,
                ("each", _) => Whose::Each,
                _ => Whose::Nobodys,
            };
            Ok((found, whose))
        });
        asking.await.unwrap_or(Err(Away))
    }

    /// Waits until nobody claims the flight any more, or the store is away.
    ///
    /// Cancel safe.
    pub async fn landing(&self, place: u128) {
        let over = self.0.claims.wait(place);
        // 1. we look, and the store is there; 2. it goes away, and all who wait are told; 3. we begin to wait.
        if self.0.line().is_some() {
            let _ = over.await;
        }
    }

    /// Keeps an answer for all, and ends this process's claim on its flight. `seal` gives what stands before it, the
    /// answer itself and how long it is kept, and runs in a task of its own; nobody waits for it.
    pub fn publish<S>(&self, place: u128, seal: S)
    where
        S: FnOnce(Moment) -> Option<(Label, Vec<u8>, Duration)> + Send + 'static,
    {
        let (inner, writes) = (Arc::clone(&self.0), Arc::clone(&self.0.writes));
        let clock = inner.clock();
        let (Ok(room), Some(clock)) = (writes.try_acquire_owned(), clock) else {
            return inner.metrics.wrote(SharedWrite::Dropped);
        };
        // Only now: a claim that is not ended with the answer is ended by whoever holds it.
        let claim = inner.claims.take(place);
        tokio::spawn(async move {
            let _room = room;
            let now = clock.on(Instant::now());
            let sealed = seal(now).and_then(|(label, sealed, keep)| {
                let mut value = label.text().into_bytes();
                value.extend(sealed);
                let fits = value.len() <= LARGEST;
                if !fits {
                    inner.metrics.wrote(SharedWrite::TooLarge);
                }
                fits.then_some((value, keep))
            });
            let (value, keep) = sealed.unwrap_or_default();
            let claim = claim.as_deref().unwrap_or_default();
            if !(value.is_empty() && claim.is_empty()) {
                inner.land(place, claim, &value, keep, EACH).await;
            }
        });
    }
}

/// There is no reply in time, or the store is known to give none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Away;

impl Inner {
    fn line(&self) -> Option<Arc<Line>> {
        self.line.lock().clone()
    }

    fn clock(&self) -> Option<Moment> {
        *self.clock.lock()
    }

    fn answer(&self, place: u128) -> String {
        format!("{}answer:{place:032x}", self.prefix)
    }

    fn flight(&self, place: u128) -> String {
        format!("{}flight:{place:032x}", self.prefix)
    }

    /// Calls `look.lua`: what is found, and whose the flight is.
    async fn ask(
        &self,
        line: &Arc<Line>,
        place: u128,
        how: &str,
        who: &str,
        wanted: Wanted,
        doubtful: &[u8],
    ) -> Result<(Option<Found>, String), Away> {
        let after = wanted
            .after
            .zip(self.clock())
            .map_or(0, |(asked, clock)| clock.on(Instant::now()).unix_ms(asked));
        let mut call = self.look.key(self.answer(place));
        call.key(self.flight(place)).arg(how).arg(who).arg(millis(CLAIM));
        call.arg(millis(wanted.fresh)).arg(after).arg(doubtful);
        let begun = Instant::now();
        let (now, value, whose): (u64, Vec<u8>, String) = self.call(line, &call).await?;
        let clock = Moment {
            at: Instant::now(),
            unix: Duration::from_micros(now),
        };
        self.metrics.read_took(clock.at - begun);
        *self.clock.lock() = Some(clock);
        let found = (!value.is_empty()).then(|| Found::new(value, clock));
        Ok((found, whose))
    }

    /// Calls `publish.lua`.
    async fn land(&self, place: u128, claim: &str, value: &[u8], keep: Duration, each: Duration) {
        let mut call = self.publish.key(self.answer(place));
        call.key(self.flight(place))
            .arg(claim)
            .arg(value)
            .arg(millis(keep).max(1));
        call.arg(self.max_bytes).arg(format!("{}answer:", self.prefix));
        call.arg(millis(each));
        let landed = match self.line() {
            Some(line) => self.call::<(String, u64)>(&line, &call).await,
            None => Err(Away),
        };
        match landed {
            Ok((result, evicted)) => {
                self.metrics.evicted(evicted);
                match result.as_str() {
                    "stored" => self.metrics.wrote(SharedWrite::Stored),
                    "older" => self.metrics.wrote(SharedWrite::Older),
                    "full" => self.metrics.wrote(SharedWrite::Full),
                    _ => {}
                }
            }
            Err(Away) if value.is_empty() => {}
            Err(Away) => self.metrics.wrote(SharedWrite::Dropped),
        }
    }

    async fn call<T: redis::FromRedisValue>(
        &self,
        line: &Arc<Line>,
        invocation: &ScriptInvocation<'_>,
    ) -> Result<T, Away> {
        let mut calls = line.calls.clone();
        let value = self.in_time(line, invocation.invoke_async(&mut calls)).await?;
        from_redis_value(value).map_err(|_| Away)
    }

    /// The reply, if it comes in time.
    async fn in_time<T>(&self, line: &Arc<Line>, reply: impl Future<Output = RedisResult<T>>) -> Result<T, Away> {
        let begun = Instant::now();
        let reply = timeout(self.timeout, reply).await;
        let late_for = line.late_for(begun);
        match reply {
            Ok(Ok(value)) if late_for < LATE => return Ok(value),
            Ok(Ok(_)) => self.give_up(line, || format!("no reply within {PATIENCE:?} for {LATE:?}")),
            Ok(Err(error)) => self.give_up(line, || error.to_string()),
            Err(_) => self.give_up(line, || "no reply within shared.timeout".to_owned()),
        }
        Err(Away)
    }

    /// The store is away from now on.
    fn give_up(&self, failed: &Arc<Line>, why: impl FnOnce() -> String) {
        let mut line = self.line.lock();
        if line.as_ref().is_some_and(|line| Arc::ptr_eq(line, failed)) {
            *line = None;
            *failed.why.lock() = why();
            failed.failed.cancel();
        }
    }

    /// Finds the store, and keeps up what is claimed there, for ever.
    async fn keep_up(&self, dialer: &Dialer) {
        const AWAY: &str = "the shared store is away: each replica asks upstream for itself";
        let (mut said, mut retry) = (None, RETRY);
        loop {
            // Also after a panic.
            *self.line.lock() = None;
            self.metrics.up(false);
            self.claims.tell_all();
            match open(dialer).await {
                Ok((connection, clock)) => {
                    tracing::info!("answers and flights are shared");
                    let since = Instant::now();
                    let error = self.use_line(connection, clock).await;
                    tracing::warn!(error, "{AWAY}");
                    said = Some(error);
                    retry = if since.elapsed() < STEADY {
                        (2 * retry).min(LAST_RETRY)
                    } else {
                        RETRY
                    };
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    if said.is_none() {
                        tracing::warn!(error, "{AWAY}");
                    }
                    said = Some(error);
                }
            }
            sleep(retry).await;
        }
    }

    /// Lets calls go over a connection until it fails; says why it did.
    async fn use_line(&self, mut connection: Connection, clock: Moment) -> String {
        let line = Arc::new(Line {
            calls: connection.calls.clone(),
            late_since: Mutex::default(),
            failed: CancellationToken::new(),
            why: Mutex::default(),
        });
        *self.clock.lock() = Some(clock);
        *self.line.lock() = Some(Arc::clone(&line));
        self.metrics.up(true);
        tokio::select! {
            biased;
            () = line.failed.cancelled() => {}
            () = connection.closed() => self.give_up(&line, || "the connection was closed".to_owned()),
            () = self.tend(&line) => {}
        }
        // Nobody waits for what is away while it is looked for again.
        self.metrics.up(false);
        self.claims.tell_all();
        let why = line.why.lock();
        why.clone()
    }

    /// Renews what is claimed, and tells those who wait for others.
    async fn tend(&self, line: &Arc<Line>) {
        let (mut renewed, mut watched) = (Instant::now(), Instant::now());
        loop {
            let (holds, waits) = (self.claims.holds_any(), self.claims.waits_any());
            tokio::select! {
                () = self.claims.changed() => {}
                () = sleep_until(renewed + RENEW), if holds => {
                    renewed = Instant::now();
                    self.renew_all(line).await;
                }
                () = sleep_until(watched + WATCH), if waits => {
                    watched = Instant::now();
                    self.watch_all(line).await;
                }
            }
        }
    }

    async fn renew_all(&self, line: &Arc<Line>) {
        for batch in self.claims.held().chunks(BATCH) {
            let mut call = self.renew.prepare_invoke();
            call.arg(millis(CLAIM));
            for (place, name) in batch {
                call.key(self.flight(*place)).arg(&**name);
            }
            let mut calls = line.calls.clone();
            // Where it fails, `in_time` has given the line up.
            let _ = self.in_time(line, call.invoke_async::<()>(&mut calls)).await;
        }
    }

    async fn watch_all(&self, line: &Arc<Line>) {
        for batch in self.claims.waited_for().chunks(BATCH) {
            let mut call = redis::cmd("MGET");
            for place in batch {
                call.arg(self.flight(*place));
            }
            let mut calls = line.calls.clone();
            let reply = call.query_async::<Vec<Option<Vec<u8>>>>(&mut calls);
            if let Ok(holders) = self.in_time(line, reply).await {
                let is_over = |holder: &Option<Vec<u8>>| holder.as_deref().is_none_or(|holder| holder == EACH_OWN);
                let over = batch.iter().zip(holders).filter(|(_, holder)| is_over(holder));
                over.for_each(|(place, _)| self.claims.tell(*place));
            }
        }
    }
}

/// A connection on which a key could be written in time, and the time there.
async fn open(dialer: &Dialer) -> anyhow::Result<(Connection, Moment)> {
    let mut connection = dialer.connect().await?;
    let mut probe = redis::pipe();
    probe.cmd("SET").arg(format!("{}written", dialer.prefix())).arg("");
    probe.arg("PX").arg(millis(CLAIM)).ignore().cmd("TIME");
    let reply = timeout(PATIENCE, probe.query_async::<((u64, u64),)>(&mut connection.calls));
    let reply = reply.await.map_err(|_| anyhow::anyhow!("no reply within {PATIENCE:?}"));
    let ((seconds, micros),) = reply??;
    let clock = Moment {
        at: Instant::now(),
        // However many µs they are, a later time fits into a `Duration`, too.
        unix: Duration::from_micros(seconds.saturating_mul(1_000_000).saturating_add(micros)),
    };
    Ok((connection, clock))
}
