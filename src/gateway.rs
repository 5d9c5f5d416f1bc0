//! The life of a request: the only module that knows all the parts.
//!
//! ```text
//! look      a plain poll, before hyper sees it: answered there and then if it is a hit
//! handle ─▶ poll    who asks, with a key that upstream accepts, for which task, until when
//!           answer  cache: fresh? ───────────────────────▶ hit
//!                   flight: someone already fetching? ───▶ wait, collapsed
//!           fly     the leader, which outlives whoever opened the flight:
//!                   cache again ─▶ shared: another replica's? ─▶ budget: a turn ─▶ shared: a claim
//!                   ─▶ upstream: a connection ─▶ budget: a permit ─▶ upstream: send ─▶ task: read
//!                   ─▶ stored, cache, shared, disk: keep ─▶ land
//! ```
//! How the leader flies: `gateway::leader`; what follows from the attempt that it makes: `gateway::attempt`. While the
//! breaker is open nobody flies: `gateway::outage`. Who cannot be served in time hears so at once: `gateway::admission`.
//! What upstream thinks of the key stands before it all: `gateway::clearance`. What outlives the process:
//! `gateway::recall`. What other replicas have: `gateway::shared_cache`.
//! Upstream's word is final, but a live snapshot beats an error. A poll is answered by its deadline at the latest; the
//! flight goes on, and its answer is kept. Everything that is no TaskInfo query is `gateway::passthrough`'s, and
//! what the gateway tells of itself `gateway::status`'s.

mod account;
mod accounts;
mod admission;
mod answered;
mod asker;
mod attempt;
mod body;
mod clearance;
mod credential;
mod hit;
mod keys;
mod leader;
mod max_age;
mod others;
mod outage;
mod passthrough;
mod poll;
mod progress;
mod recall;
mod request_body;
mod response;
mod shared_cache;
mod status;
mod tally;
mod traced;

use std::mem;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::OptionFuture;
use http::{HeaderMap, HeaderValue, Request, Response};
use scopeguard::{ScopeGuard, guard};
use tokio::time::{Instant, sleep_until, timeout};

use crate::account::{AccountId, Caller};
use crate::cache::Cache;
use crate::config::Config;
use crate::dial::Dial;
use crate::disk::{self, Disk};
use crate::error::Error;
use crate::flight::{Carried, Flights};
use crate::metrics::{AccountMetrics, ClientRequests, InFlight, Metrics, OTHER};
use crate::otlp::Exporter;
use crate::outcome::Served;
use crate::panics;
use crate::shared::{Replica, SharedCache};
use crate::task::TaskId;
use crate::trace::TraceContext;
use crate::upstream::{TASK_INFO_PATH, Upstream};
use accounts::Accounts;
use answered::Answered;
pub use body::{Body, Data};
use clearance::is_refused_key;
use hit::Lookup;
pub use hit::{Hit, Looked, Miss, PlainPoll};
use leader::Sought;
use poll::{Poll, Seen, Terms};
use progress::{Landed, Progress, landing};
use recall::Recall;
pub use request_body::RequestBody;
pub use response::{REQUEST_ID, Reply, refusal};
pub use status::Status;
use traced::Trace;

/// How often idle accounts and connections are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Everything that a request passes through.
#[derive(Debug)]
pub struct Gateway {
    config: ArcSwap<Config>,
    accounts: Accounts,
    /// By which replicas share the budgets.
    replica: Option<Replica>,
    cache: Cache,
    flights: Flights<FlightKey, Progress>,
    /// Answers that outlive the process; `None` unless configured.
    disk: Option<Disk>,
    recalls: Flights<(AccountId, TaskId), Recall>,
    /// Answers and flights that replicas share.
    shared_cache: Option<SharedCache>,
    upstream: Upstream,
    /// Where spans go, if they do.
    exporter: Option<Exporter>,
    metrics: Arc<Metrics>,
    /// The counters of polls that belong to no account.
    strangers: (AccountMetrics, ClientRequests),
}

/// With the number of the key that flies alone: upstream has yet to accept it.
type FlightKey = (AccountId, TaskId, Option<u64>);

impl Gateway {
    /// A gateway with an empty cache, whose budgets grant nothing for the first 1 s plus `budget.margin`.
    ///
    /// # Errors
    /// When upstream, the collector or the replicas' store in `config` cannot be set up.
    ///
    /// # Panics
    /// Outside a tokio runtime: what lasts is spawned here.
    pub fn new(config: Config, dial: Dial, metrics: Arc<Metrics>) -> anyhow::Result<Arc<Self>> {
        metrics.lets_in(config.limits.connections);
        let upstream = Upstream::new(&config.upstream, &config.limits, dial, Arc::clone(&metrics))?;
        let replica = Replica::start(&config, &metrics)?;
        let accounts = Accounts::new(
            &config,
            upstream.clone(),
            replica.clone(),
            Arc::clone(&metrics),
            Instant::now(),
        );
        Ok(Arc::new(Self {
            accounts,
            replica,
            cache: Cache::new(config.cache.max_bytes, Arc::clone(&metrics)),
            flights: Flights::default(),
            disk: disk::Settings::of(&config.cache).map(|settings| Disk::open(settings, metrics.disk.clone())),
            recalls: Flights::default(),
            shared_cache: SharedCache::start(&config, &metrics)?,
            upstream,
            exporter: Exporter::start(&config.otlp, &metrics)?,
            strangers: (metrics.account(OTHER), metrics.client(OTHER, OTHER)),
            metrics,
            config: ArcSwap::from_pointee(config),
        }))
    }

    /// What is in force.
    pub fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// Takes a changed configuration over, from the next poll and the next permit on. What needs a restart is the caller's
    /// business ([`Config::taken_over`]).
    pub fn configure(&self, config: Config) {
        self.metrics.lets_in(config.limits.connections);
        self.accounts.configure(&config);
        self.config.store(Arc::new(config));
    }

    /// A place among `limits.requests`, for as long as a request is being answered.
    ///
    /// # Errors
    /// [`Error::Overloaded`] when there is none.
    pub fn place(&self) -> Result<InFlight, Error> {
        let in_flight = InFlight::new(&self.metrics.requests_in_flight);
        let most = i64::try_from(self.config.load().limits.requests).unwrap_or(i64::MAX);
        if self.metrics.requests_in_flight.get() > most {
            return Err(Error::Overloaded);
        }
        Ok(in_flight)
    }

    /// The answer to a request that goes no further, or to what is none; counted and logged. `headers` may name it.
    pub fn refuse(&self, error: &Error, headers: &HeaderMap) -> Response<Body> {
        let request_id = response::request_id(headers);
        let mut response = self.refused(error, None, &request_id, &Trace::of(headers));
        response.headers_mut().insert(REQUEST_ID, request_id);
        response
    }

    /// The answer to a request that goes no further; counted, if the edge counts such an error, and logged. A poll is on an
    /// `account`.
    fn refused(&self, error: &Error, account: Option<&str>, request_id: &HeaderValue, trace: &Trace) -> Response<Body> {
        if let Some(reason) = error.edge_refusal() {
            self.metrics.refused(reason);
        }
        tracing::debug!(
            request_id = request_id.to_str().unwrap_or_default(),
            trace_id = %trace.id(),
            account,
            cache = account.map(|_| Served::None.as_ref()),
            code = error.status().as_u16(),
            detail = error.detail(),
            "{} refused",
            if account.is_some() { "poll" } else { "request" }
        );
        trace.refused(error);
        response::error(error)
    }

    /// The process is told to stop: its part of a shared budget is its successor's.
    pub fn leave(&self) {
        if let Some(replica) = &self.replica {
            replica.leave();
        }
    }

    /// Everything that is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Answers one request, within its connection's `limits.request_timeout`. `broken` is what its body has turned out to
    /// be, if that is why it goes no further.
    ///
    /// Cancel safe: a client that leaves takes only its own wait away.
    pub async fn handle(
        self: &Arc<Self>,
        mut request: Box<Request<RequestBody>>,
        caller: &Caller,
        request_timeout: Duration,
        broken: impl Fn() -> Option<Error>,
    ) -> Response<Body> {
        credential::hide(request.headers_mut());
        let request_id = response::request_id(request.headers());
        let (method, path, context) = (
            request.method(),
            request.uri().path(),
            TraceContext::of(request.headers()),
        );
        let trace = self.trace(context, method, path, &request_id);
        let is_poll = path == TASK_INFO_PATH;
        let upload = request.body().clone();
        let reply = {
            // Each move of it would take its room again.
            let answering = pin!(async {
                if is_poll {
                    let terms = self.terms(request.method(), request.uri(), request.headers());
                    let reply = self.poll(terms, None, caller, &request_id, &trace).await;
                    let refused = broken().map(|error| self.refused(&error, None, &request_id, &trace));
                    refused.map_or(reply, Reply::from)
                } else {
                    // On the heap: a poll, which almost every request is, takes no room for it.
                    let passing = Box::pin(self.pass_through(*request, &request_id, &trace, broken));
                    Reply::from(passing.await)
                }
            });
            let late = || {
                if is_poll || upload.is_awaited() {
                    Error::RequestTimeout
                } else {
                    Error::UpstreamSilent
                }
            };
            self.in_time(is_poll, &request_id, &trace, answering, request_timeout, late)
                .await
        };
        let mut response = reply.into_response();
        response.body_mut().carry(trace);
        response.headers_mut().insert(REQUEST_ID, request_id);
        response
    }

    /// Answers a plain poll that is no hit, within its connection's `limits.request_timeout`; gives its place among all
    /// requests back.
    ///
    /// Cancel safe: a client that leaves takes only its own wait away.
    pub async fn answer_plain(
        self: &Arc<Self>,
        miss: Box<Miss>,
        caller: &Caller,
        request_timeout: Duration,
    ) -> (Reply, InFlight) {
        let Miss {
            request_id,
            trace,
            terms,
            seen,
            in_flight,
        } = *miss;
        let reply = {
            let answering = pin!(self.poll(Ok(terms), seen, caller, &request_id, &trace));
            let late = || Error::RequestTimeout;
            self.in_time(true, &request_id, &trace, answering, request_timeout, late)
                .await
        };
        (reply.called(request_id), in_flight)
    }

    /// What comes of `answering` in `most` of time; `late` is why nothing did.
    async fn in_time(
        &self,
        is_poll: bool,
        request_id: &HeaderValue,
        trace: &Trace,
        answering: Pin<&mut impl Future<Output = Reply>>,
        most: Duration,
        late: impl Fn() -> Error,
    ) -> Reply {
        let begun = Instant::now();
        let unanswered = guard((), |()| self.abandoned(is_poll, request_id, trace));
        let in_time = panics::contain(timeout(most, answering)).await;
        ScopeGuard::into_inner(unanswered);
        let reply = match in_time {
            Some(Ok(reply)) => reply,
            late_or_panicked => {
                let error = late_or_panicked.map_or(Error::Internal, |_| late());
                self.count_unanswered(is_poll, &error, begun.elapsed());
                Reply::from(self.refused(&error, None, request_id, trace))
            }
        };
        trace.ended(reply.status());
        reply
    }

    /// Tells of a request whose client has left before its answer was there.
    fn abandoned(&self, is_poll: bool, request_id: &HeaderValue, trace: &Trace) {
        if is_poll {
            tracing::debug!(
                request_id = request_id.to_str().unwrap_or_default(),
                trace_id = %trace.id(),
                "poll abandoned: its client left before the answer"
            );
        } else {
            // Whatever was sent on has its line already.
            self.metrics.abandoned();
        }
    }

    /// Counts a request for which there was no answer to count.
    fn count_unanswered(&self, is_poll: bool, error: &Error, after: Duration) {
        let code = error.status().as_u16();
        if is_poll {
            let (metrics, requests) = &self.strangers;
            metrics.answered(requests, Served::None, code, after);
        } else {
            self.metrics.passed_through(code);
        }
    }

    /// Forgets what nobody uses any more, from time to time, for as long as it is polled.
    pub async fn sweep(&self) {
        loop {
            tokio::time::sleep(SWEEP_INTERVAL).await;
            let now = Instant::now();
            // What they have of an account's nobody knows, so it may be something.
            let may_be_kept_elsewhere = self.disk.is_some() || self.shared_cache.is_some();
            let may_hold = |account| may_be_kept_elsewhere || self.cache.holds_any(account);
            self.accounts.sweep(now, may_hold);
            self.upstream.sweep(now);
            // It is what has accounts that nobody polls forget their tasks, too.
            self.refresh_metrics();
        }
    }

    /// Writes what is on its way to disk, once nothing more comes. At once where nothing is kept there.
    ///
    /// Cancel safe.
    pub async fn close_disk(&self) {
        if let Some(disk) = &self.disk {
            disk.close().await;
        }
    }

    /// Sends the spans that have ended to the collector; no more are, then.
    ///
    /// Cancel safe.
    pub async fn close_spans(&self) {
        if let Some(exporter) = &self.exporter {
            exporter.close().await;
        }
    }

    /// Brings the gauges up to date that are costly to keep so.
    pub fn refresh_metrics(&self) {
        let now = Instant::now();
        self.accounts.show(now);
        self.cache.maintain();
    }

    /// Answers a poll on these `terms`; what has been `seen` of it already is not looked at again.
    async fn poll(
        self: &Arc<Self>,
        terms: Result<Terms, Error>,
        seen: Option<Lookup>,
        caller: &Caller,
        request_id: &HeaderValue,
        trace: &Trace,
    ) -> Reply {
        let arrived = seen.as_ref().map_or_else(Instant::now, |seen| seen.arrived);
        let mut poll = match terms.and_then(|terms| self.take_up(terms, seen, caller, arrived, trace)) {
            Ok(poll) => poll,
            Err(error) => {
                let (metrics, requests) = &self.strangers;
                metrics.answered(requests, Served::None, error.status().as_u16(), arrived.elapsed());
                return Reply::from(self.refused(&error, Some(OTHER), request_id, trace));
            }
        };
        let answered = loop {
            let answered = self.answer_to_key(&mut poll).await;
            match self.asker_since(&poll, &answered) {
                None => break answered,
                Some(Ok(asker)) => {
                    (poll.asker, poll.has_flown) = (asker, poll.has_flown && answered.is_ok());
                    // What was seen is the old account's.
                    poll.seen = Seen::Nothing;
                }
                Some(Err(error)) => break Err(error),
            }
        };
        let account = &poll.asker.account;
        match answered {
            Ok(answered) => {
                let Answered { served, cache, answer } = answered;
                let (code, now) = (answer.code(), Instant::now());
                let took = now.saturating_duration_since(arrived);
                trace.answered(&account.label, served, code);
                account.answered(&poll.asker.requests(caller), served, poll.has_flown, code, took);
                tracing::debug!(
                    request_id = request_id.to_str().unwrap_or_default(),
                    trace_id = %trace.id(),
                    account = &*account.label,
                    task = poll.terms.task.as_str(),
                    cache = served.as_ref(),
                    code,
                    took_s = took.as_secs_f64(),
                    "poll answered"
                );
                Reply::new(answer, cache, now, account.lifetime(now))
            }
            Err(error) => {
                // Once a poll, so that each counts whoever shared its flight, and one that has a snapshot not at all.
                if let Error::Shed { why, .. } = error {
                    account.metrics.shed(why);
                }
                let (requests, code) = (poll.asker.requests(caller), error.status().as_u16());
                account.answered(&requests, Served::None, poll.has_flown, code, arrived.elapsed());
                Reply::from(self.refused(&error, Some(&account.label), request_id, trace))
            }
        }
    }

    /// The answer for one poll, by its deadline at the latest. Upstream does not refuse its key, or it is on trial.
    async fn answer(self: &Arc<Self>, poll: &mut Poll<'_>) -> Result<Answered, Error> {
        let account = &poll.asker.account;
        account.watch.asked(poll.terms.task.as_str(), poll.arrived);
        let live = self.lifetime_for(poll);
        let on_trial = poll.asker.is_refused();
        let kept = match mem::take(&mut poll.seen) {
            Seen::Kept(kept) => kept,
            Seen::Nothing => {
                let _looking = poll.trace.part("cache");
                self.cache.get(account.id, &poll.terms.task, poll.arrived, live)
            }
        };
        let kept = match kept {
            None if !on_trial => match self.recall(poll).await? {
                None => self.look_grounded(poll, live).await,
                recalled => recalled,
            },
            // Another replica may have heard more since, and here nobody might ask any more.
            Some(stale) if !on_trial && !stale.is_fresh(poll.arrived, live) => {
                Some(self.look_grounded(poll, live).await.unwrap_or(stale))
            }
            kept => kept,
        };
        let snapshot = match kept.filter(|_| !on_trial) {
            Some(answer) if answer.is_fresh(poll.arrived, live) => return Ok(Answered::hit(answer)),
            stale => stale.map(|answer| answer.asked()),
        };
        if self.upstream.breaker().is_open() {
            // Nobody can ask whether they are still missing.
            poll.asker.account.credits.lapse(poll.arrived);
        }
        if let Some(answered) = Self::out_of_credits(&poll.asker, poll.arrived) {
            return Ok(answered);
        }
        self.fetch(poll, snapshot, live).await
    }

    /// The answer for a poll that what is kept will not do for. `live` is how long live answers are fresh for it, and
    /// `snapshot` since when the stale one is kept.
    async fn fetch(
        self: &Arc<Self>,
        poll: &mut Poll<'_>,
        snapshot: Option<Instant>,
        live: Duration,
    ) -> Result<Answered, Error> {
        let max_wait = self.config.load().budget.max_wait;
        let deadline = poll.arrived + max_wait;
        let account = &poll.asker.account;
        let mut asker = poll.asker.clone();
        let name = poll.terms.name.as_ref().filter(|name| !self.accounts.is_secret(name));
        let client = asker.client(poll.caller, name);
        let takes = self.reckon(account);
        // Half of what upstream leaves is for newcomers, though none of those who were told to come back ever does.
        let kept = account.budget.kept(&client, &poll.terms.task, poll.arrived);
        let kept = kept.min(max_wait.saturating_sub(takes) / 2);
        // Another replica's may come into memory as the flight goes on.
        let may_stand_in = snapshot.is_some() || self.shared_cache.is_some();
        loop {
            if let Some(answered) = Self::refused_meanwhile(&mut asker, poll.arrived) {
                return Ok(answered);
            }
            if self.upstream.breaker().is_open() {
                let error = self.turn_away(&asker, &poll.terms.task);
                return self.stand_in(poll, error.detail()).ok_or(error);
            }
            let alone = asker.is_refused().then_some(asker.key.number);
            let mut trace = None;
            let (progress, leader) = self.flights.join((account.id, poll.terms.task.clone(), alone), || {
                let trace = trace.insert(poll.trace.flight());
                Progress::new(account.budget.flight(snapshot), trace.link(), snapshot.is_some())
            });
            let queued = progress.borrow().queued.clone();
            let mut place = queued.join(client.clone(), asker.weight(), deadline, takes + kept);
            let collapsed = leader.is_none();
            let had_flown = poll.has_flown;
            poll.has_flown |= !collapsed;
            let mut carried = if let (Some(leader), Some(trace)) = (leader, trace) {
                let puts = poll.puts;
                let sought = alone.is_none().then_some(Sought { live, puts });
                Some(self.launch(leader, &asker, &poll.terms.task, sought, trace))
            } else {
                poll.trace.joined(&progress.borrow());
                None
            };
            let landed = tokio::select! {
                biased;
                // First, so that its landing is seen at once.
                Some(never) = OptionFuture::from(carried.as_mut().map(Carried::on)) => match never {},
                landed = landing(progress.clone()) => Some(landed),
                slow = self.snapshot_when_slow(poll, progress.clone()), if may_stand_in => return Ok(slow),
                late_by = place.late() => {
                    let late_by = late_by.saturating_sub(kept);
                    return self.answer_without_landing(poll, progress, Some(late_by), collapsed, &client);
                }
                () = sleep_until(deadline) => None,
            };
            let was_stale = progress.borrow().was_stale;
            if landed.as_ref().is_some_and(Landed::is_unspent) {
                poll.has_flown = had_flown;
            }
            return match landed {
                None => self.answer_without_landing(poll, progress, None, collapsed, &client),
                Some(Landed::Kept(answer)) if answer.is_fresh(poll.arrived, live) => Ok(Answered::hit(answer)),
                // Fresh enough for the client that opened the flight, but not for this one.
                Some(Landed::Kept(_) | Landed::InVain) => continue,
                // It may have been the account as it was before this poll's, under the same name.
                Some(Landed::Superseded) if !account.superseded.is_cancelled() => continue,
                Some(Landed::Superseded) => Err(self.unavailable(account)),
                Some(Landed::Shed) => self.answer_without_place(poll, &client),
                Some(Landed::Failed(error)) => self.stand_in(poll, error.detail()).ok_or(error),
                // Another key's refusal says nothing about this one, and a token stands for all of its account's keys.
                Some(Landed::Fetched(answer, key))
                    if is_refused_key(&answer)
                        && (!Arc::ptr_eq(&key, &asker.key) || asker.take_next_key(poll.arrived)) =>
                {
                    continue;
                }
                Some(Landed::Fetched(answer, _)) if answer.class().yields_to_snapshot() => {
                    let detail = answer.class().into();
                    Ok(self
                        .stand_in(poll, detail)
                        .unwrap_or_else(|| Answered::forwarded(answer, was_stale, collapsed)))
                }
                Some(Landed::Fetched(answer, _)) => Ok(Answered::forwarded(answer, was_stale, collapsed)),
            };
        }
    }

    /// How long live answers are fresh for this poll: a client may want it shorter, down to the floor, as long as that
    /// takes no turn from anybody who waits.
    fn lifetime_for(&self, poll: &Poll<'_>) -> Duration {
        let account = &*poll.asker.account;
        let lifetime = account.lifetime(poll.arrived);
        match poll.terms.max_age {
            Some(max_age) if !account.budget.is_wanted(poll.arrived) => {
                lifetime.min(max_age.max(self.config.load().cache.fresh.floor))
            }
            Some(_) | None => lifetime,
        }
    }

    /// The snapshot that may be served instead of an error.
    fn stand_in(&self, poll: &Poll<'_>, detail: &'static str) -> Option<Answered> {
        if poll.asker.is_refused() {
            return None;
        }
        let now = Instant::now();
        let snapshot = self.cache.snapshot(poll.asker.account.id, &poll.terms.task, now)?;
        let max_stale = self.config.load().cache.max_stale;
        snapshot
            .may_stand_in(now, max_stale)
            .then(|| Answered::stand_in(snapshot, detail, now, poll.asker.account.lifetime(now)))
    }
}
